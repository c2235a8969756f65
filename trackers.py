"""Rows of metrics to wandb, TensorBoard or trackio, beside the metrics.jsonl that every run writes.

    python training.py --tracker=wandb              # pip install wandb; WANDB_PROJECT, WANDB_TAGS, WANDB_MODE=offline, ...
    python training.py --tracker=tensorboard        # pip install tensorboard; tensorboard --logdir checkpoints
    python training.py --tracker=trackio            # pip install trackio; trackio show

A run is named after its directory. When it resumes, its record goes on; steps it repeats after a crash count once.
A tracker of your own is one function and one line in TRACKERS.
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

PROJECT = "nano416"


class Tracker(NamedTuple):
    """Where rows go."""

    log: Callable[[dict[str, float], int], None]  # values, step
    close: Callable[[], None]


def open_tracker(kind: str, run_dir: str, config: dict[str, Any], step: int) -> Tracker:
    """Begin or continue the record of `run_dir`, whose next step is `step`; config is a run's config.json."""
    return TRACKERS[kind](Path(run_dir).resolve(), config, step)


def wandb_run(run_dir: Path, config: dict[str, Any], step: int) -> Tracker:
    """https://docs.wandb.ai; its WANDB_* variables say project, name, tags, entity and mode."""
    import wandb

    named: Any = {
        "project": os.environ.get("WANDB_PROJECT", PROJECT),
        "name": os.environ.get("WANDB_NAME", run_dir.name),
    }
    record = hashlib.sha256(str(run_dir).encode()).hexdigest()[:12]
    run = wandb.init(**named, id=os.environ.get("WANDB_RUN_ID", record), resume="allow", config=config, dir=run_dir)
    first = run.step

    def log(values: dict[str, float], step: int) -> None:
        if step >= first:  # what it has of an earlier process, which went on for a while after the checkpoint
            run.log(values, step=step)

    return Tracker(log, run.finish)


def tensorboard_events(run_dir: Path, config: dict[str, Any], step: int) -> Tracker:
    """Event files in RUN_DIR/tensorboard."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(run_dir / "tensorboard", purge_step=step + 1)
    writer.add_text("config", "\n".join(f"    {section}: {values}" for section, values in config.items()))

    def log(values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return Tracker(log, writer.close)


def trackio_run(run_dir: Path, config: dict[str, Any], step: int) -> Tracker:
    """https://huggingface.co/docs/trackio; local unless TRACKIO_SPACE_ID is set."""
    import trackio

    run = trackio.init(project=PROJECT, name=run_dir.name, config=config, resume="allow")
    return Tracker(lambda values, step: run.log(values, step=step), trackio.finish)


TRACKERS = {"wandb": wandb_run, "tensorboard": tensorboard_events, "trackio": trackio_run}
