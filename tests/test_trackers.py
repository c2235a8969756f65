"""trackers.py: every row arrives once, under the run's name; a resumed run continues its record."""

import contextlib
import importlib.util
import os
import sqlite3
import subprocess
import sys
import time

import pytest

from nano416 import trackers
from nano416.trackers import TRACKERS, SafeTracker, Tracker

CONFIG = {"model": {"dim": 32}, "train": {"seed": 1}}
IS_INSTALLED = {kind: importlib.util.find_spec(kind) is not None for kind in TRACKERS}


def needs(kind: str):
    return pytest.mark.skipif(not IS_INSTALLED[kind], reason=f"the optional package {kind} is not installed")


def fail(text: str) -> None:
    raise AssertionError(text)


def record(kind: str, run_dir, steps: range) -> None:
    """One process of a run that logs these steps."""
    tracker = SafeTracker(kind, str(run_dir), CONFIG, steps.start - 1, warn=fail)
    for step in steps:
        tracker.log({"loss": 10.0 - step, "tokens": 100.0 * step}, step)
    tracker.close()


def record_in_new_process(kind: str, run_dir, steps: range, **environment: str) -> None:
    """The same in a Python process of its own: wandb and trackio keep global state."""
    code = "import sys; sys.path[:0] = sys.argv[1:]; from test_trackers import record; "
    code += f"record({kind!r}, {str(run_dir)!r}, {steps})"
    command = [sys.executable, "-c", code, *sys.path]
    subprocess.run(command, env={**os.environ, **environment}, check=True, capture_output=True, timeout=120)


@needs("tensorboard")
def test_tensorboard_has_every_step_once_after_a_crash_and_a_resume(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    record("tensorboard", tmp_path, range(1, 8))
    record("tensorboard", tmp_path, range(5, 10))  # from the checkpoint of step 4
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(s, 10.0 - s) for s in range(1, 10)]


@needs("trackio")
def test_trackio_continues_the_record_of_a_resumed_run(tmp_path):
    store = tmp_path / "store"
    record_in_new_process("trackio", tmp_path / "mine", range(1, 5), TRACKIO_DIR=str(store))
    record_in_new_process("trackio", tmp_path / "mine", range(5, 8), TRACKIO_DIR=str(store))
    with contextlib.closing(sqlite3.connect(store / "nano416.db")) as database:
        rows = database.execute("select run_name, step from metrics order by step").fetchall()
    assert rows == [("mine", step) for step in range(1, 8)]


@needs("wandb")
def test_wandb_gets_name_config_and_the_same_id_from_all_processes_of_a_run(tmp_path, monkeypatch):
    import wandb

    calls = []
    logged = []

    class Run:
        step = 6  # on the server: the process that crashed had continued after its checkpoint

        def log(self, values, step):
            logged.append(step)

        def finish(self):
            logged.append("end")

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(wandb, "init", lambda **options: calls.append(options) or Run())
    record("wandb", tmp_path / "mine", range(1, 4))
    record("wandb", tmp_path / "mine", range(5, 8))
    assert logged == ["end", 6, 7, "end"]
    assert calls[0] == calls[1]
    expected = {"resume": "allow", "name": "mine", "config": CONFIG, "project": "nano416"}
    assert expected.items() <= calls[0].items()


@needs("wandb")
def test_wandb_writes_a_run_without_a_network(tmp_path):
    run_dir = tmp_path / "mine"
    run_dir.mkdir()
    record_in_new_process("wandb", run_dir, range(1, 4), WANDB_MODE="offline", WANDB_SILENT="true")
    assert list((run_dir / "wandb").glob("offline-run-*/*.wandb"))


def test_a_tracker_that_is_not_installed_is_one_clear_line(monkeypatch):
    from training import TrainConfig

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--tracker=wandb needs a package: pip install wandb"):
        TrainConfig(tracker="wandb")


def raise_system_exit(*_: object) -> None:
    raise SystemExit("no key")


def hang(*_: object) -> None:
    time.sleep(60)


@pytest.mark.parametrize(
    ("opened", "expected"),
    [
        (raise_system_exit, "no broken from here on: SystemExit: no key; metrics.jsonl has every row"),
        (hang, "no broken from here on: no answer in 0.2 s; metrics.jsonl has every row"),
        (lambda *_: Tracker(log=hang, close=print), "no broken from here on: no answer in 0.2 s"),
        (lambda *_: Tracker(log=raise_system_exit, close=print), "no broken from here on: SystemExit: no key"),
        (lambda *_: Tracker(log=lambda values, step: None, close=hang), "no broken from here on: no answer"),
    ],
)
def test_a_tracker_that_fails_or_hangs_costs_one_line(tmp_path, monkeypatch, opened, expected):
    monkeypatch.setitem(TRACKERS, "broken", opened)
    monkeypatch.setattr(trackers, "PATIENCE_S", 0.2)
    lines: list[str] = []
    tracker = SafeTracker("broken", str(tmp_path), CONFIG, 0, warn=lines.append)
    for step in range(1, 4):
        tracker.log({"loss": 1.0}, step)
    tracker.close()
    assert len(lines) == 1 and lines[0].startswith(expected)


@needs("tensorboard")
def test_a_record_that_cannot_be_written_costs_one_line(tmp_path):
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    lines: list[str] = []
    SafeTracker("tensorboard", str(tmp_path), CONFIG, 0, warn=lines.append).log({"loss": 1.0}, 1)
    assert len(lines) == 1
