"""Which checkpoint a run continues from, and what becomes of checkpoints that do not lead to it.

    point = find_resume_point(run_dir, "auto", print)               # the newest checkpoint, or None
    point = find_resume_point(run_dir, "run/checkpoint_step_2000.pt", print)
    print(set_aside_others(point, run_dir))                         # "... moved to run/abandoned_1: ..."

A run that starts at an explicit checkpoint is a branch. Its checkpoints carry the branch's name, so that the same
command continues the branch instead of starting it once more.
"""

import itertools
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nano416 import checkpoint


@dataclass(frozen=True)
class ResumePoint:
    """The checkpoint that a run continues from."""

    path: Path
    state: dict[str, Any]  # what checkpoint.read returned
    branch: str | None  # to be saved in the checkpoints that follow, under "branch"
    starts_branch: bool  # the run directory may hold checkpoints that do not lead here


def find_resume_point(run_dir: str, resume: str, warn: Callable[[str], None]) -> ResumePoint | None:
    """Where --resume=`resume` continues the run in `run_dir`; None for a new run.

    auto: the newest readable checkpoint. never: None. A path: that checkpoint as long as the run directory holds
    nothing that continues it, then as auto. Raises ValueError if there is nothing to read, or for never something.
    """
    if resume == "never":
        existing = checkpoint.latest(run_dir)
        if existing:
            raise ValueError(f"--resume=never, but {existing} exists; choose another --run_dir or remove it first")
        return None
    branch = _branch_name(run_dir, resume)
    try:
        newest = checkpoint.read_latest(run_dir, warn)
    except ValueError:
        # Only checkpoints of this branch matter, and there are none yet.
        if branch is None:
            raise
        newest = None
    if branch and (newest is None or newest[1].get("branch") != branch):
        path = checkpoint.resolve(resume)
        return ResumePoint(path, checkpoint.read(path), branch, starts_branch=True)
    if newest is None:
        return None
    path, state = newest
    return ResumePoint(path, state, state.get("branch"), starts_branch=False)


def _branch_name(run_dir: str, resume: str) -> str | None:
    """What checkpoints that continue `resume` are marked with; None if it means the newest of the run directory."""
    root = Path(run_dir).resolve()
    path = Path(resume).resolve()
    if resume == "auto" or path == root:
        return None
    # Relative, so that a run directory may be moved.
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)


def set_aside_others(point: ResumePoint, run_dir: str) -> str:
    """Move the checkpoints that do not lead to `point` into RUN_DIR/abandoned_N, with a copy of the metrics.

    Returns one line that names them, "" if there are none. Only one process of a run may call it.
    """
    root = Path(run_dir)
    step = point.state["step"]
    # The earlier checkpoints of this directory lead to one of it; to one from elsewhere none does.
    is_inside = point.path.parent.resolve() == root.resolve()
    others = [path for other, path in checkpoint.list_checkpoints(root) if not is_inside or other > step]
    if not others:
        return ""
    number = next(n for n in itertools.count(1) if not (root / f"abandoned_{n}").exists())
    folder = root / f"abandoned_{number}"
    folder.mkdir()
    for name in ("metrics.jsonl", "final_metrics.json", "final_metrics.png"):
        if (root / name).exists():
            shutil.copy(root / name, folder)
    for path in others:
        path.rename(folder / path.name)
    names = ", ".join(path.name for path in others)
    return f"this run branches off at step {step:,}; moved to {folder}: {names}"
