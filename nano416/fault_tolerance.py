"""Why a run stops before its end, and which steps it refuses to learn from.

    with StopSignal(time_limit, kill_switch, save_interval) as stop:
        stop_reason, save_due = stop.check()        # once per step: the same answer on every rank
        stop.abandon()                              # between the batches of an evaluation: raises Abandoned
    guard = StepGuard(device, skip_spikes)          # NaN, infinity and spikes are skipped without waiting for the GPU
    skip = guard.is_bad(loss, grad_norm)

Exit codes: 0 finished, or stopped by the kill switch; 75 (EX_TEMPFAIL) stopped early with everything saved: run the
same command again to resume (SIGTERM, SIGUSR1, time limit); 130 the same after Ctrl-C; 1 a failure; 2 bad input.
"""

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nano416 import distributed
from nano416.config import final_exit_code

# EX_TEMPFAIL of sysexits.h, "the user is invited to retry".
EXIT_RESUME = 75
# A shell's code for a process that Ctrl-C ended: 128 + SIGINT.
EXIT_INTERRUPTED = 130
# systemd and Slurm may send a signal to all processes at once, of which the launcher hands it on once more.
SAME_SIGNAL_S = 2.0
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
LAUNCHER_GONE = "the end of its launcher"
STOP_REASONS = (*(number.name for number in STOP_SIGNALS), "time limit", "kill switch", LAUNCHER_GONE)
# Every other reason: EXIT_RESUME. Machines whose launcher is alive start again after a failure.
EXIT_CODES = {"SIGINT": EXIT_INTERRUPTED, "kill switch": 0, LAUNCHER_GONE: 1}
# Levanter's rule: beyond 6 sigma of the last 128 steps.
SPIKE_WINDOW = 128
SPIKE_SIGMAS = 6.0
# Skipping more would only burn time: what is wrong does not go away by itself.
MAX_BAD_STEPS_IN_A_ROW = 5


class Abandoned(Exception):
    """An evaluation was left, on every rank, because it is time to stop."""


class StopSignal:
    """Collect reasons to stop or to save, so that every rank acts on them in the same step.

    The time limit counts from the start of launch_training.sh, if that has started this process.
    """

    def __init__(
        self, time_limit: float | None = None, kill_switch: str | None = None, save_interval: float | None = None
    ):
        # A wall clock may jump. The monotonic one is the same for all processes of a machine.
        now = time.monotonic()
        start = float(os.environ.get("NANO416_START_TIME", now))
        self.reason: str | None = None
        self.signal_time: float | None = None
        self.checks = 0
        self.deadline = start + time_limit if time_limit else None
        self.kill_switch = Path(kill_switch) if kill_switch else None
        self.save_interval = save_interval
        self.last_save = now
        # None: nobody waits for this process, whose parent may leave (nohup).
        self.launcher = _launcher_pid()
        self._previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        for number in STOP_SIGNALS:
            self._previous_handlers[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _frame: object) -> None:
        now = time.monotonic()
        name = signal.Signals(number).name
        # Machines must agree, or the others would wait for the one that has left.
        is_one_machine = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
        if self.checks < 2 and is_one_machine:
            # No step is done, so there is nothing to save, and compiling the first one may take minutes.
            os._exit(final_exit_code(EXIT_CODES.get(name, EXIT_RESUME)))
        elif self.reason is None or self.signal_time is None:
            # Only a note: a signal may interrupt any line, and printing in the middle of another print can fail or
            # hang.
            self.reason = name
            self.signal_time = now
        elif now - self.signal_time > SAME_SIGNAL_S:
            # A second signal ends a process that hangs.
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def check(self) -> tuple[str | None, bool]:
        """(why to stop now or None, whether save_interval has passed), agreed by all ranks in one small all-reduce.

        The clocks and the kill switch are rank 0's; a signal may reach any rank.
        """
        self.checks += 1
        # All ranks save together, so rank 0's clock decides.
        is_due = self.save_interval is not None and time.monotonic() - self.last_save > self.save_interval
        reason, save_due = self._agree(is_due and distributed.rank() == 0)
        if save_due:
            self.last_save = time.monotonic()
        return reason, save_due

    def abandon(self) -> None:
        """Raise Abandoned, on every rank, if it is time to stop. Every rank calls it equally often."""
        if self._agree()[0]:
            raise Abandoned

    def _agree(self, save_due: bool = False) -> tuple[str | None, bool]:
        if self.reason is None:
            self.reason = self._other_reason()
        # As numbers, of which all ranks take the largest: of different reasons the last in the list wins.
        code = STOP_REASONS.index(self.reason) + 1 if self.reason else 0
        code, due = distributed.all_reduce_max([code, int(save_due)])
        return STOP_REASONS[code - 1] if code else None, bool(due)

    def _other_reason(self) -> str | None:
        """Why to stop, apart from signals."""
        # The parent of an orphan is another process.
        if self.launcher is not None and os.getppid() != self.launcher:
            return LAUNCHER_GONE
        if distributed.rank() == 0 and self.kill_switch and self.kill_switch.exists():
            return "kill switch"
        if distributed.rank() == 0 and self.deadline and time.monotonic() > self.deadline:
            return "time limit"
        return None


def _launcher_pid() -> int | None:
    """The process that started this one to stay with it, launcher.py or torchrun; None for any other parent."""
    if "NANO416_LAUNCHER" in os.environ:
        return int(os.environ["NANO416_LAUNCHER"])
    return os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None


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

    def in_bad_streak(self) -> bool:
        """True if the last step was bad. Waits for the device."""
        return int(self.in_a_row) > 0

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors that a resumed run needs, on the device."""
        return {"window": self.window, "good": self.good, "skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from a state_dict; an empty one, of an old checkpoint, changes nothing."""
        for name, tensor in state.items():
            getattr(self, name).copy_(tensor)
        self._reported = int(self.skipped)
