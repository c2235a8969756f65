"""Rows of metrics to wandb, TensorBoard or trackio, in addition to the metrics.jsonl that every run writes.

    python training.py --tracker=wandb              # pip install wandb; WANDB_PROJECT, WANDB_MODE, ...
    python training.py --tracker=tensorboard        # pip install tensorboard; tensorboard --logdir checkpoints
    python training.py --tracker=trackio            # pip install trackio; trackio show

A run is named after its directory. A resumed run continues its record; steps repeated after a crash count once.
To add a tracker, write one function and add one line to TRACKERS.
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
    """Start or continue the record of `run_dir` at `step`; `config` is what config.json holds."""
    return TRACKERS[kind](Path(run_dir).resolve(), config, step)


def wandb_run(run_dir: Path, config: dict[str, Any], step: int) -> Tracker:
    """https://docs.wandb.ai; its WANDB_* variables set project, name, tags, entity and mode."""
    import wandb

    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        name=os.environ.get("WANDB_NAME", run_dir.name),
        # The same id for every process of this run, so that wandb continues its record.
        id=os.environ.get("WANDB_RUN_ID", hashlib.sha256(str(run_dir).encode()).hexdigest()[:12]),
        resume="allow",
        config=config,
        dir=run_dir,
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
    return Tracker(lambda values, step: run.log(values, step=step), trackio.finish)


TRACKERS = {"wandb": wandb_run, "tensorboard": tensorboard_events, "trackio": trackio_run}
