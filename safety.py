"""Why a run stops before its end, and what it refuses to learn from.

    stop = safety.Stop(time_limit, kill_switch)      # SIGTERM, SIGINT, SIGUSR1, a clock, a file
    reason = stop.agreed()                           # once per step: the same answer on every rank, or None
    guard = safety.Guard(device, skip_spikes)        # NaN and infinity, and spikes, are skipped without a sync
    lock = safety.lock(run_dir)                      # two runs never share a run directory

Exit codes: 0 finished, or stopped by the kill switch; 75 (EX_TEMPFAIL) stopped early with everything saved, run the same
command again to go on (SIGTERM, SIGUSR1, time limit); 130 the same after Ctrl-C; 1 a failure; 2 bad input.
"""

import fcntl
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import distributed

GO_ON_LATER, INTERRUPTED = 75, 130
REASONS = ("SIGTERM", "SIGINT", "SIGUSR1", "time limit", "kill switch")
EXIT_CODES = {"SIGINT": INTERRUPTED, "kill switch": 0}
SPIKE_WINDOW, SPIKE_SIGMAS = 128, 6.0  # Levanter's: beyond 6 sigma of the last 128 steps
BAD_STEPS_IN_A_ROW = 5


class Stop:
    """Collects wishes to stop; every rank acts on them in the same step."""

    def __init__(self, time_limit: float | None = None, kill_switch: str | None = None):
        self.reason: str | None = None
        self.deadline = time.monotonic() + time_limit if time_limit else None
        self.kill_switch = Path(kill_switch) if kill_switch else None
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            self.previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: object) -> None:  # no input or output in a handler: it may interrupt any
        self.reason = signal.Signals(number).name
        signal.signal(number, signal.SIG_DFL)  # a second one ends a process that hangs

    def agreed(self) -> str | None:
        """Why to stop now, the same on all ranks: the clock and the file are rank 0's, a signal may reach any."""
        if self.reason is None and distributed.rank() == 0:
            if self.kill_switch and self.kill_switch.exists():
                self.reason = "kill switch"
            elif self.deadline and time.monotonic() > self.deadline:
                self.reason = "time limit"
        number = distributed.largest(REASONS.index(self.reason) + 1 if self.reason else 0)
        return REASONS[number - 1] if number else None


class Guard:
    """Which optimizer steps to skip. Everything stays on the device until `report`."""

    def __init__(self, device: torch.device, skip_spikes: bool = False):
        self.skip_spikes, self.seen = skip_spikes, 0
        self.window = torch.zeros(2, SPIKE_WINDOW, device=device)  # losses and gradient norms of good steps
        self.good = torch.zeros((), device=device, dtype=torch.long)  # how many of them
        self.skipped = torch.zeros((), device=device, dtype=torch.long)
        self.in_a_row = torch.zeros((), device=device, dtype=torch.long)

    def judge(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """1.0 if this step must be skipped, else 0.0. `loss` and `grad_norm` are the same on all ranks."""
        pair = torch.stack((loss, grad_norm)).float()  # [2]
        bad = ~torch.isfinite(pair).all()
        if self.skip_spikes:
            bad = bad | ((self.good >= SPIKE_WINDOW // 2) & self._is_spike(pair))
        slot = torch.arange(SPIKE_WINDOW, device=pair.device) == self.good % SPIKE_WINDOW  # [window]
        self.window = torch.where(slot & ~bad, pair[:, None], self.window)  # window[:, good] would wait for the device
        self.good += (~bad).long()
        self.skipped += bad.long()
        self.in_a_row = torch.where(bad, self.in_a_row + 1, torch.zeros_like(self.in_a_row))
        return bad.float()

    def _is_spike(self, pair: Tensor) -> Tensor:
        used = (torch.arange(SPIKE_WINDOW, device=pair.device) < self.good).float()  # [window]
        mean = (self.window * used).sum(1) / used.sum()
        std = (((self.window - mean[:, None]) ** 2 * used).sum(1) / used.sum()).sqrt()
        return (pair > mean + SPIKE_SIGMAS * std).any()

    def new_skips(self) -> int:
        """Steps skipped since the last call; one synchronisation with the GPU."""
        total = int(self.skipped)
        fresh, self.seen = total - self.seen, total
        return fresh

    def hopeless(self) -> bool:
        """True after BAD_STEPS_IN_A_ROW bad steps; one synchronisation."""
        return int(self.in_a_row) >= BAD_STEPS_IN_A_ROW

    def state_dict(self) -> dict[str, Tensor]:
        """For the checkpoint."""
        return {"window": self.window, "good": self.good, "skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Undo of `state_dict`."""
        for name, tensor in state.items():
            getattr(self, name).copy_(tensor)
        self.seen = int(self.skipped)


def lock(run_dir: str | Path) -> int:
    """Hold RUN_DIR for as long as this process lives. Raises ValueError if another run holds it."""
    held = os.open(run_dir, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(held)
        raise ValueError(f"another run is writing to {run_dir}; wait for it, or choose another --run_dir") from error
    return held
