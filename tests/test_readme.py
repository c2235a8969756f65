"""Every command in README.md exists with the options it shows."""

import functools
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.split("#")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.split("#")[0].strip()
]

SUBCOMMANDS = {
    "data_pipeline.py": ("download", "prepare", "verify", "info"),
    "convert_hf.py": ("export", "import", "push"),
    "scaling_laws.py": ("plan", "fit", "sweep", "cluster"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_exists_with_the_options_it_shows(command):
    words = [word for word in shlex.split(command) if "=" not in word or word.startswith("--")]
    script = next(word for word in words if word.endswith((".py", ".sh")))
    assert (ROOT / script).exists()
    for word in words:
        if word.endswith((".toml", ".json")) and word.startswith("configs/"):
            assert (ROOT / word).exists()
    options = [w.split("=")[0] for w in words[words.index(script) + 1 :] if w.startswith("--")]
    if options:
        named = [word for word in words if word in SUBCOMMANDS.get(script, ())]
        assert set(options) <= set(re.findall(r"--\w+", help_of(script, *named)))


@functools.cache
def help_of(script: str, *subcommand: str) -> str:
    argv = [sys.executable, ROOT / script, *subcommand, "--help"]
    return subprocess.run(argv, capture_output=True, text=True, check=True, timeout=60).stdout


def test_every_script_of_the_house_is_on_the_map():
    assert {path.name for path in ROOT.glob("*.py")} <= set(re.findall(r"`(\w+\.py)`", README))


def test_it_is_short_enough_to_be_read():
    assert len(README.splitlines()) <= 250
