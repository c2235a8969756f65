"""The commands of README.md and docs/ run as they are written, in a folder with small data and small runs.

What trains gets a time limit and a small batch. What needs a network, eight GPUs or hours is listed with the reason.
"""

import contextlib
import gzip
import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, changed
from test_readme import path_of, shown_commands, split_command

import data_pipeline
import training
from nano416.config import parse_config

SHAPE = ["--dim=32", "--n_layers=1", "--n_heads=2", "--seq_len=32"]
SMALL = ["--batch_size=2", "--batch_tokens=64", "--eval_tokens=64", "--sample_tokens=4"]
NOT_RUN = {
    r"torchrun|NNODES|sbatch|preflight": "several processes or machines: test_parallel, test_nodes, test_preflight",
    r"download": "needs a network: test_download",
    r"convert_hf (push|pull)|convert_hf import Qwen|hf:": "the Hub: test_convert_hf, test_hub",
    r"eval_lm_harness": "task data of the Hub: test_lm_harness",
    r"launch_training.sh|tests/run.sh": "test_end_to_end",
    r"benchmark": "measures speed for minutes: test_benchmark",
    r"^python (-m tools.decontaminate|training.py)$": "the name of a command, which needs FineWeb-Edu",
    r"--watch": "does not end",
    r"python chat.py runs/\S+( runs/\S+)?$|python chat.py [^-]*--(steps|dtype)": "a prompt on the terminal: test_chat",
    r"scaling_laws fit": "the runs of a sweep: test_scaling_laws",
}
COMMANDS = [command for command in shown_commands() if not any(re.search(pattern, command) for pattern in NOT_RUN)]


def test_every_reason_not_to_run_a_command_still_has_a_command():
    for pattern in NOT_RUN:
        assert any(re.search(pattern, command) for command in shown_commands()), pattern
    assert len(COMMANDS) > 25


@pytest.fixture(scope="module")
def house(tmp_path_factory, data) -> Path:
    """A folder with what the examples name: my/*.jsonl.gz, data/, runs/, my_items.jsonl, prompt.txt."""
    folder = tmp_path_factory.mktemp("house")
    words = [
        "the",
        "quick",
        "brown",
        "fox",
        "jumps",
        "over",
        "the",
        "lazy",
        "dog",
        "while",
        "it",
        "thinks",
        "of",
        "the",
        "import",
        "statement",
        "of",
        "python",
    ]
    (folder / "my").mkdir()
    for number in range(10):
        lines = [json.dumps({"text": " ".join(words[number:] * (5 + line))}) for line in range(40)]
        (folder / f"my/{number:02d}.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    item = {"ctx_a": " ".join(words[:12]), "ctx_b": "", "endings": words[12:16], "activity_label": "a", "ind": 1}
    item["ctx"] = item["ctx_a"]
    items = [{**item, "label": str(number % 4)} for number in range(6)]
    (folder / "my_items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (folder / "prompt.txt").write_text("The sky is")
    shutil.copytree(ROOT / "configs", folder / "configs")
    for name in ("sample", "edu", "code"):
        shutil.copytree(data, folder / "data" / name)
    shutil.copy(folder / "my_items.jsonl", folder / "data/hellaswag_val.jsonl")
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()):
        # The documented command takes gpt2, whose vocabulary not every machine has.
        data_pipeline.prepare(data_pipeline.PrepareConfig("my/*.jsonl.gz", "data/mine", tokenizer="bytes", workers=1))
        for name in ("mine", "sample", "a", "b", "original", "mdm"):
            options = [
                "--sources=data/mine",
                f"--run_dir=runs/{name}",
                "--max_steps=2",
                "--log_every=1",
                "--stats_every=1",
            ]
            options += ["--objective=mdm"] * (name == "mdm")
            training.main(parse_config(training.Config, [*SHAPE, *SMALL, *options]))
    return folder


def arguments_for(script: str, arguments: list[str]) -> list[str]:
    """What is given in addition, or instead, so that a command ends soon."""
    if script == "training.py" and "--help" not in arguments and "--dry_run" not in arguments:
        small = [*SMALL, "--eval_every=0", "--time_limit=0.01"]
        if not any(argument.endswith(".json") for argument in arguments):
            small += [*SHAPE, "--run_dir=runs/new"]
        # The house has less text than the examples.
        arguments = [argument.replace("unique_tokens=100M", "unique_tokens=100K") for argument in arguments]
        return changed(small, *arguments)
    if arguments[:1] == ["prepare"]:
        return [*arguments, "--tokenizer=bytes", "--workers=1"]
    return arguments


@pytest.mark.parametrize("command", COMMANDS)
def test_a_documented_command_runs_as_written(command, house, tmp_path, monkeypatch):
    folder = tmp_path / "copy"
    shutil.copytree(house, folder)
    monkeypatch.chdir(folder)
    script, arguments = split_command(command)
    # What a command makes is not there yet.
    if arguments[0] in ("prepare", "sample"):
        shutil.rmtree("data")
    if script == "training.py" and not arguments[0].endswith(".json"):
        shutil.rmtree("runs")
    if command.startswith("python eval_hellaswag.py --compare"):
        for name in ("a", "b"):
            run(["eval_hellaswag.py", f"--checkpoint=runs/{name}", f"--output={name}.json"])
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    assert run([script, *arguments_for(script, arguments)]) in (0, None, 75)


def run(argv: list[str]) -> int | str | None:
    """The exit code of a script, which is run in this process: importing torch takes longer than most of them."""
    if argv[0] == "tools.decontaminate":
        # Its workers are started from the main module.
        return subprocess.run([sys.executable, "-m", *argv], env={**os.environ, "PYTHONPATH": str(ROOT)}).returncode
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr(sys, "argv", argv)
        try:
            runpy.run_path(str(path_of(argv[0])), run_name="__main__")
        except SystemExit as stopped:
            return stopped.code
    return 0


OWN_OPTIMIZER = """
def mine(groups, cfg, _):
    return torch.optim.Adagrad(groups, lr=cfg.peak_lr)
"""


def test_an_optimizer_of_your_own_is_a_function_and_a_line(house, tmp_path, monkeypatch):
    """The recipe of docs/training.md, in a copy of the code."""
    from processes import python

    code = tmp_path / "code"
    shutil.copytree(ROOT / "nano416", code / "nano416")
    for path in ROOT.glob("*.py"):
        shutil.copy(path, code)
    path = code / "nano416/optimizers.py"
    text = path.read_text()
    text = text.replace("# Name: (function, peak", OWN_OPTIMIZER + "\n\n# Name: (function, peak")
    path.write_text(text.replace('    "sgd": (sgd, 0.3),\n', '    "sgd": (sgd, 0.3),\n    "mine": (mine, 1e-2),\n'))
    options = ["--optimizer=mine", f"--sources={house}/data/mine", f"--run_dir={tmp_path}/run", "--max_steps=2"]
    exit_code, out, error = python(str(code / "training.py"), *SHAPE, *SMALL, *options)
    assert exit_code == 0 and "done: 2 steps" in out, out + error
