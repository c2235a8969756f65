"""Why a run stops before its end, and which steps it refuses to learn from.

    with StopSignal(time_limit, kill_switch, save_interval) as stop:
        stop_reason, save_due = stop.check()        # once per step: the same answer on every rank
    guard = StepGuard(device, skip_spikes)          # NaN, infinity and spikes are skipped without waiting for the GPU
    skip = guard.is_bad(loss, grad_norm)

Exit codes: 0 finished, or stopped by the kill switch; 75 (EX_TEMPFAIL) stopped early with everything saved: run the
same command again to resume (SIGTERM, SIGUSR1, time limit); 130 the same after Ctrl-C; 1 a failure; 2 bad input.
"""

import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nano416 import distributed

# EX_TEMPFAIL of sysexits.h, "the user is invited to retry".
EXIT_RESUME = 75
# A shell's code for a process that Ctrl-C ended: 128 + SIGINT.
EXIT_INTERRUPTED = 130
STOP_REASONS = ("SIGTERM", "SIGINT", "SIGUSR1", "time limit", "kill switch")
EXIT_CODES = {"SIGINT": EXIT_INTERRUPTED, "kill switch": 0}  # every other reason: EXIT_RESUME
# Levanter's rule: beyond 6 sigma of the last 128 steps.
SPIKE_WINDOW = 128
SPIKE_SIGMAS = 6.0
# Skipping more would only burn time: what is wrong does not go away by itself.
MAX_BAD_STEPS_IN_A_ROW = 5


class StopSignal:
    """Collect reasons to stop or to save, so that every rank acts on them in the same step."""

    def __init__(
        self, time_limit: float | None = None, kill_switch: str | None = None, save_interval: float | None = None
    ):
        # A wall clock may jump.
        now = time.monotonic()
        self.reason: str | None = None
        self.deadline = now + time_limit if time_limit else None
        self.kill_switch = Path(kill_switch) if kill_switch else None
        self.save_interval = save_interval
        self.last_save = now
        self._previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            self._previous_handlers[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _frame: object) -> None:
        # Only a note: a signal may interrupt any line, and printing in the middle of another print can fail or hang.
        self.reason = signal.Signals(number).name
        # From now on the default applies, so that a second signal ends a process that hangs.
        signal.signal(number, signal.SIG_DFL)

    def check(self) -> tuple[str | None, bool]:
        """(why to stop now or None, whether save_interval has passed), agreed by all ranks in one small all-reduce.

        The clocks and the kill switch are rank 0's; a signal may reach any rank.
        """
        save_due = False
        if distributed.rank() == 0:
            now = time.monotonic()
            save_due = self.save_interval is not None and now - self.last_save > self.save_interval
            if self.reason is None and self.kill_switch and self.kill_switch.exists():
                self.reason = "kill switch"
            elif self.reason is None and self.deadline and now > self.deadline:
                self.reason = "time limit"
        # As numbers, of which all ranks take the largest: of different reasons the last in the list wins.
        code = STOP_REASONS.index(self.reason) + 1 if self.reason else 0
        code, save_due = distributed.all_reduce_max([code, int(save_due)])
        if save_due:
            self.last_save = time.monotonic()
        return STOP_REASONS[code - 1] if code else None, bool(save_due)


def bad_steps_message(step: int, where: str) -> str:
    """What to tell the user after MAX_BAD_STEPS_IN_A_ROW; `where` says where in the data the last batch begins."""
    return (
        f"{MAX_BAD_STEPS_IN_A_ROW} bad steps in a row at step {step}: loss or gradient is NaN, infinite or a spike, "
        f"at {where}; the weights are those before them. Resume with a lower --max_lr or with --qk_norm, "
        "look at that text, or check the GPU"
    )


class StepGuard:
    """Decides which optimizer steps to skip. All of its state stays on the device."""

    def __init__(self, device: torch.device, skip_spikes: bool = False):
        self.skip_spikes = skip_spikes
        self.window = torch.zeros(2, SPIKE_WINDOW, device=device)  # losses and gradient norms of good steps
        self.good = torch.zeros((), device=device, dtype=torch.long)  # number of good steps so far
        self.skipped = torch.zeros((), device=device, dtype=torch.long)
        self.in_a_row = torch.zeros((), device=device, dtype=torch.long)
        self._reported = 0

    def is_bad(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Record a step and return 1.0 if it must be skipped, else 0.0, on the device.

        Loss and gradient norm are the same on all ranks, so all of them decide alike.
        """
        values = torch.stack((loss, grad_norm)).float()  # [2]
        bad = ~torch.isfinite(values).all()
        if self.skip_spikes:
            # The first losses fall too fast for statistics: no step is a spike before half a window is full.
            bad = bad | ((self.good >= SPIKE_WINDOW // 2) & self._is_spike(values))
        # A mask instead of window[:, good], which would wait for the device. Bad steps stay out of the window, or a few
        # spikes would raise the limit for the next ones.
        slot = torch.arange(SPIKE_WINDOW, device=values.device) == self.good % SPIKE_WINDOW  # [window]
        self.window = torch.where(slot & ~bad, values[:, None], self.window)
        self.good += (~bad).long()
        self.skipped += bad.long()
        self.in_a_row = torch.where(bad, self.in_a_row + 1, torch.zeros_like(self.in_a_row))
        return bad.float()

    def _is_spike(self, values: Tensor) -> Tensor:
        # Until the window is full, only its first `good` entries count.
        used = (torch.arange(SPIKE_WINDOW, device=values.device) < self.good).float()  # [window]
        mean = (self.window * used).sum(1) / used.sum()
        std = (((self.window - mean[:, None]) ** 2 * used).sum(1) / used.sum()).sqrt()
        return (values > mean + SPIKE_SIGMAS * std).any()

    def newly_skipped(self) -> int:
        """Steps skipped since the last call. Waits for the device."""
        total = int(self.skipped)
        new = total - self._reported
        self._reported = total
        return new

    def gave_up(self) -> bool:
        """True after MAX_BAD_STEPS_IN_A_ROW bad steps. Waits for the device."""
        return int(self.in_a_row) >= MAX_BAD_STEPS_IN_A_ROW

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors that a resumed run needs, on the device."""
        return {"window": self.window, "good": self.good, "skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from a state_dict; an empty one, of an old checkpoint, changes nothing."""
        for name, tensor in state.items():
            getattr(self, name).copy_(tensor)
        self._reported = int(self.skipped)
