"""trackers.py: every row arrives, once, under the run's name; a resumed run goes on with its record."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from trackers import TRACKERS, open_tracker

CONFIG = {"model": {"dim": 32}, "train": {"seed": 1}}
installed = {kind: importlib.util.find_spec(kind) is not None for kind in TRACKERS}


def needs(kind: str):
    return pytest.mark.skipif(not installed[kind], reason=f"the optional package {kind} is not installed")


def record(kind: str, run_dir, steps: range) -> None:
    """One process of a run, which logs these steps."""
    tracker = open_tracker(kind, str(run_dir), CONFIG, steps.start - 1)
    for step in steps:
        tracker.log({"loss": 10.0 - step, "tokens": 100.0 * step}, step)
    tracker.close()


@needs("tensorboard")
def test_tensorboard_holds_every_step_once_after_a_crash_and_a_resume(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    record("tensorboard", tmp_path, range(1, 8))
    record("tensorboard", tmp_path, range(5, 10))  # from the checkpoint of step 4
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(s, 10.0 - s) for s in range(1, 10)]


@needs("trackio")
def test_trackio_goes_on_with_the_record_of_a_resumed_run(tmp_path):
    code = "import sys; sys.path[:0] = sys.argv[3:]; from test_trackers import record; "
    code += "record('trackio', sys.argv[1], range(*map(int, sys.argv[2].split(','))))"
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "store")}
    for steps in ("1,5", "5,8"):
        command = [sys.executable, "-c", code, str(tmp_path / "mine"), steps, *sys.path]
        subprocess.run(command, env=environment, check=True, capture_output=True, timeout=120)
    code = "import json, sqlite3, sys; rows = sqlite3.connect(sys.argv[1]).execute("
    code += "'select run_name, step from metrics order by step').fetchall(); print(json.dumps(rows))"
    found = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "store/nano416.db")], capture_output=True, check=True
    )
    assert json.loads(found.stdout) == [["mine", step] for step in range(1, 8)]


@needs("wandb")
def test_wandb_is_given_name_config_and_one_id_for_all_processes_of_a_run(tmp_path, monkeypatch):
    import wandb

    calls, logged = [], []

    class Run:
        step = 6  # what the server has: the crashed process went on after its checkpoint

        def log(self, values, step):
            logged.append(step)

        def finish(self):
            logged.append("end")

    monkeypatch.setattr(wandb, "init", lambda **options: calls.append(options) or Run())
    record("wandb", tmp_path / "mine", range(1, 4))
    record("wandb", tmp_path / "mine", range(5, 8))
    assert logged == ["end", 6, 7, "end"]
    assert calls[0] == calls[1] and calls[0]["resume"] == "allow" and calls[0]["name"] == "mine"
    assert calls[0]["config"] == CONFIG and calls[0]["project"] == "nano416"


@needs("wandb")
def test_wandb_writes_a_run_without_a_network(tmp_path):
    code = "import sys; sys.path[:0] = sys.argv[2:]; from test_trackers import record; record('wandb', sys.argv[1], range(1, 4))"
    environment = {**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    (tmp_path / "mine").mkdir()
    command = [sys.executable, "-c", code, str(tmp_path / "mine"), *sys.path]
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=120)
    assert list((tmp_path / "mine" / "wandb").glob("offline-run-*/*.wandb"))


def test_a_tracker_that_is_not_installed_is_one_clear_line(monkeypatch):
    from plan import TrainConfig  # not above: the processes that record need no torch

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--tracker=wandb needs that package: pip install wandb"):
        TrainConfig(tracker="wandb")
