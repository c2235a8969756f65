"""README.md and docs/: the commands exist with the options shown, config snippets are read, links lead somewhere."""

import contextlib
import functools
import io
import re
import runpy
import shlex
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT

import training
from nano416.config import from_dict

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in ROOT.glob("docs/*.md")}
ALL_PAGES = {"README.md": README, **PAGES}
SUBCOMMANDS = {
    "data_pipeline.py": ("sample", "download", "prepare", "verify", "info"),
    "tools.convert_hf": ("export", "import", "push", "pull"),
    "tools.scaling_laws": ("plan", "fit", "sweep", "cluster", "shapes"),
    "tools.benchmark": ("train", "data", "checkpoint", "hellaswag", "decode"),
}
# These pass their options to training.py.
LAUNCHERS = ("launch_training.sh", "slurm/train.sbatch")


def code_blocks(language: str) -> list[str]:
    blocks = [re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL) for text in ALL_PAGES.values()]
    return [block for page in blocks for block in page]


def shown_commands() -> list[str]:
    """All commands in code blocks, and those in the text that begin with python, without comments."""
    lines = [line for block in code_blocks("bash") for line in block.splitlines()]
    for text in ALL_PAGES.values():
        inline = re.findall(r"`(python [^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
        lines += [" ".join(command.split()) for command in inline]
    commands = [re.sub(r"(^|\s+)#.*", "", line).strip() for line in lines]
    return sorted({command for command in commands if command})


def split_command(command: str) -> tuple[str, list[str]]:
    """The script (a file, or tools.NAME) and its arguments."""
    words = shlex.split(command)
    for i, word in enumerate(words):
        if word == "-m":
            return words[i + 1], words[i + 2 :]
        if word.endswith((".py", ".sh", ".sbatch")):
            return word.removeprefix("./"), words[i + 1 :]
    raise AssertionError(f"no script in {command!r}")


def path_of(script: str) -> Path:
    return ROOT / (script.replace(".", "/") + ".py" if script.startswith("tools.") else script)


@functools.cache
def help_of(script: str, subcommand: str = "") -> str:
    """What the script prints for --help, run in this process, which has imported torch already."""
    output = io.StringIO()
    argv = [script, *([subcommand] if subcommand else []), "--help"]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output), pytest.raises(SystemExit) as exit:
        patch.setattr(sys, "argv", argv)
        runpy.run_path(str(path_of(script)), run_name="__main__")
    assert not exit.value.code
    return output.getvalue()


@pytest.mark.parametrize("command", shown_commands())
def test_a_command_exists_with_the_options_it_shows(command):
    script, arguments = split_command(command)
    assert path_of(script).exists()
    for argument in arguments:
        if argument.startswith("configs/"):
            assert (ROOT / argument).exists()
    options = {argument.split("=")[0] for argument in arguments if argument.startswith("--")}
    if script == "tests/run.sh":  # its options are pytest's
        return
    if script in LAUNCHERS:
        script = "training.py"
    subcommand = ""
    if script in SUBCOMMANDS and arguments:
        subcommand = arguments[0]
        assert subcommand in SUBCOMMANDS[script]
    shown = set(re.findall(r"^ +(--\w+)", help_of(script, subcommand), re.MULTILINE))
    assert options <= shown | {"--help"}


@pytest.mark.parametrize("snippet", code_blocks("toml"))
def test_a_config_snippet_is_a_config_file(snippet):
    from_dict(training.Config, tomllib.loads(snippet))


@pytest.mark.parametrize("page", ALL_PAGES)
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)]+)\)", ALL_PAGES[page]):
        file, _, heading = target.partition("#")
        linked = (ROOT / page).parent / file
        assert linked.exists(), target
        if heading:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = [re.sub(r"[^\w -]", "", text).lower().replace(" ", "-") for text in headings]
            assert heading in anchors, target


@pytest.mark.parametrize("page", PAGES)
def test_every_page_is_one_click_away_from_the_readme(page):
    assert f"]({page})" in README


def test_every_file_is_on_the_map():
    files = {path.name for folder in (".", "nano416", "tools") for path in ROOT.glob(f"{folder}/*.py")}
    assert files - {"__init__.py"} == set(re.findall(r"`(\w+\.py)`", README))


def test_the_readme_is_short_and_lines_fit_a_terminal():
    assert len(README.splitlines()) <= 170
    for page, text in ALL_PAGES.items():
        for number, line in enumerate(text.splitlines(), 1):
            # A row of a table cannot be broken.
            assert len(line) <= 120 or line.startswith("|"), f"{page}:{number}"
