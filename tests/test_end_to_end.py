"""The main job from the outside: launch_training.sh in a folder with spaces, then the chat command it prints."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, changed

from nano416 import metrics

SHORT = ["--max_steps=4", "--eval_tokens=512", "--log_every=1", "--n_layers=1", "--dim=48", "--n_heads=2"]


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> Path:
    """A checkout in a folder whose name has spaces."""
    folder = tmp_path_factory.mktemp("a house") / "with two words"
    folder.mkdir()
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*.sh"), *ROOT.glob("requirements*.txt")]:
        shutil.copy(path, folder)
    for name in ("configs", "nano416"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def launch(house: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """./launch_training.sh from elsewhere, in the virtual environment of the tests."""
    env = {**os.environ, "VIRTUAL_ENV": sys.prefix, "CUDA_VISIBLE_DEVICES": "", **environment}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    command = [str(house / "launch_training.sh"), *arguments]
    return subprocess.run(command, cwd="/", env=env, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def first(house) -> subprocess.CompletedProcess[str]:
    return launch(house, *SHORT)


def test_from_nothing_to_a_model_that_answers(house, first):
    assert first.returncode == 0, first.stderr
    rows = [row for row in metrics.read_metrics(house / "runs/sample") if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and rows[-1]["loss"] < rows[0]["loss"]
    command = re.search(r"talk to it  (.*)", first.stdout)
    assert command and command[1].endswith("chat.py runs/sample")
    lines = "The import statement\n/bench\n/compare\n/quit\n"
    chat = [sys.executable, "chat.py", "runs/sample", "--max_tokens=8"]
    answer = subprocess.run(chat, cwd=house, input=lines, capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0 and not answer.stderr, answer.stderr
    assert "tokens/s" in answer.stdout


def test_a_second_call_skips_what_is_done_and_more_steps_go_on_even_on_two_processes(house, first):
    written = (house / "data/sample/meta.json").stat().st_mtime_ns
    again = launch(house, *SHORT)
    assert again.returncode == 0 and "step 1/" not in again.stdout and "done: 4 steps" in again.stdout
    more = launch(house, *changed(SHORT, "--max_steps=5"), NGPUS="2")
    assert "resumed" in more.stdout and "done: 5 steps" in more.stdout, more.stdout + more.stderr
    assert more.returncode == 0 and "2 processes" in more.stdout
    assert (house / "data/sample/meta.json").stat().st_mtime_ns == written


def test_a_bad_option_is_one_line_and_not_tried_again(house):
    done = launch(house, "--max_stepz=4")
    assert done.returncode == 2 and "--max_steps" in done.stderr and done.stderr.count("\n") == 1
    assert not (house / "runs/none").exists()


def test_an_old_python_is_refused_before_anything_is_made(house, tmp_path):
    fake = tmp_path / "bin"
    fake.mkdir()
    for name in ("python3.13", "python3.12", "python3.11", "python3", "python"):
        (fake / name).write_text("#!/bin/sh\nexit 1\n")
        (fake / name).chmod(0o755)
    env = {"PATH": f"{fake}:/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run([str(house / "launch_training.sh")], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0 and "Python >= 3.11" in done.stderr and not (house / ".venv").exists()
