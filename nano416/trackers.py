"""Rows of metrics to wandb, TensorBoard or trackio, in addition to the metrics.jsonl that every run writes.

    python training.py --tracker=wandb              # pip install wandb; WANDB_PROJECT, WANDB_MODE, ...
    python training.py --tracker=tensorboard        # pip install tensorboard; tensorboard --logdir checkpoints
    python training.py --tracker=trackio            # pip install trackio; trackio show

A run is named after its directory. A resumed run continues its record; steps repeated after a crash count once.
A tracker never stops a run: if it fails or does not answer in time, that is one line, and the run continues without it.
To add a tracker, write one function and add one line to TRACKERS.
"""

import functools
import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

PROJECT = "nano416"
# Seconds that a run waits for a tracker's server, at its start and at its end.
PATIENCE_S = 20.0


class Tracker(NamedTuple):
    """Where rows go."""

    log: Callable[[dict[str, float], int], None]  # values, step
    close: Callable[[], None]


class SafeTracker:
    """A tracker that is given up with one line when it fails.

    kind: a key of TRACKERS. config: what config.json holds. warn: called with the line.
    """

    def __init__(self, kind: str, run_dir: str, config: dict[str, Any], step: int, warn: Callable[[str], None]):
        self.kind = kind
        self.warn = warn
        self.tracker: Tracker | None = None
        self._attempt(lambda: self._open(Path(run_dir).resolve(), config, step))

    def log(self, values: dict[str, float], step: int) -> None:
        """Send a row."""
        if self.tracker:
            self._attempt(functools.partial(self.tracker.log, values, step))

    def close(self) -> None:
        """Send what is left."""
        if self.tracker:
            self._attempt(self.tracker.close)

    def _open(self, run_dir: Path, config: dict[str, Any], step: int) -> None:
        self.tracker = TRACKERS[self.kind](run_dir, config, step)

    def _attempt(self, call: Callable[[], Any]) -> None:
        error = call_within(PATIENCE_S, call)
        if error:
            self.tracker = None
            self.warn(f"no {self.kind} from here on: {error}; metrics.jsonl has every row")


def call_within(seconds: float, call: Callable[[], Any]) -> str:
    """Call in a thread and wait at most `seconds`. Returns what went wrong in one line, "" if nothing did."""
    errors: list[str] = [f"no answer in {seconds:g} s"]

    def run() -> None:
        try:
            call()
            errors.clear()
        except BaseException as error:
            # SystemExit too: in a library it is no reason to end a run.
            first_line = (str(error).strip().splitlines() or [""])[0]
            errors[:] = [f"{type(error).__name__}: {first_line}"]

    # A daemon, or a call that never returns would keep the process alive.
    thread = threading.Thread(target=run, daemon=True, name="tracker")
    thread.start()
    thread.join(seconds)
    return "".join(errors)


def wandb_run(run_dir: Path, config: dict[str, Any], step: int) -> Tracker:
    """https://docs.wandb.ai; its WANDB_* variables set project, name, tags, entity and mode."""
    import wandb

    is_online = os.environ.get("WANDB_MODE", "online") == "online"
    # On a terminal init would ask for a missing key and wait for ever. `prompt` is new in wandb 0.31.
    if is_online and not wandb.login(prompt=False, verify=False):
        raise ValueError("no API key; run `wandb login`, or set WANDB_API_KEY or WANDB_MODE=offline")
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        name=os.environ.get("WANDB_NAME", run_dir.name),
        # The same id for every process of this run, so that wandb continues its record.
        id=os.environ.get("WANDB_RUN_ID", hashlib.sha256(str(run_dir).encode()).hexdigest()[:12]),
        resume="allow",
        config=config,
        dir=os.environ.get("WANDB_DIR", run_dir),
    )
    first_step = run.step

    def log(values: dict[str, float], step: int) -> None:
        # wandb refuses to go back. It already has the steps between the checkpoint and the crash of an earlier process.
        if step >= first_step:
            run.log(values, step=step)

    return Tracker(log, run.finish)


def tensorboard_events(run_dir: Path, config: dict[str, Any], step: int) -> Tracker:
    """Event files in RUN_DIR/tensorboard."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(run_dir / "tensorboard", purge_step=step + 1)
    # Four spaces make it a code block in TensorBoard's Markdown.
    writer.add_text("config", "\n".join(f"    {section}: {values}" for section, values in config.items()))

    def log(values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return Tracker(log, writer.close)


def trackio_run(run_dir: Path, config: dict[str, Any], step: int) -> Tracker:
    """https://huggingface.co/docs/trackio; local unless TRACKIO_SPACE_ID is set."""
    import trackio

    run = trackio.init(project=PROJECT, name=run_dir.name, config=config, resume="allow")
    return Tracker(lambda values, step: run.log(values, step=step), run.finish)


TRACKERS = {"wandb": wandb_run, "tensorboard": tensorboard_events, "trackio": trackio_run}
