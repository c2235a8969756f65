"""What a run logs: rows of numbers in metrics.jsonl, lines of text, model FLOPs utilization, the picture of a run.

    log = RunLog(run_dir, total_steps)
    log.metrics(step, tokens, loss=2.5, lr=3e-4)        # one row in metrics.jsonl, one line on the terminal
    write_summary(run_dir)                              # final_metrics.json and final_metrics.png

A row is one JSON object with `step`, `tokens` and what was measured there: `loss`, `val_loss`, `val_bpb`, `lr`,
`grad_norm`, `tokens_per_s`, `mfu`, `memory_gb`, `hellaswag_acc_norm`, ... Losses are in nats per token.
Several runs in one picture: `python -m tools.plot`.
"""

import contextlib
import json
import math
import os
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from nano416 import files
from nano416.config import visible
from nano416.devices import device_name, peak_memory_gb, synchronize

# Peak dense bf16 FLOP/s with fp32 accumulation, from the data sheets. The first entry that occurs in a GPU's name
# applies, so variants come before the plain name.
PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A6000": 155e12,
    "A10G": 70e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
# How a log line shows a value; values without an entry are in metrics.jsonl alone.
LOG_FORMATS = {
    "loss": "loss {:.4f}",
    "val_loss": "validation loss {:.4f}",
    "val_bpb": "{:.4f} bits per byte",
    "val_macro_loss": "macro {:.4f}",
    "lr": "lr {:.2e}",
    "grad_norm": "norm {:.2f}",
    "tokens_per_s": "{:,.0f} tok/s",
    "mfu": "mfu {:.1%}",
    "memory_gb": "{:.2f} GB",
    "skipped_steps": "{} steps skipped",
    "hellaswag_acc": "HellaSwag acc {:.2%}",
    "hellaswag_acc_norm": "acc_norm {:.2%}",
}
# Smoothing of training losses in pictures, as in the original 416M run. Short runs have less, or the curve would lag.
SMOOTHING = 0.99


class RunLog:
    """The log of a run: rows to metrics.jsonl and a tracker, text to the terminal and train.log, a progress bar.

    With enabled=False, as on all ranks but 0, nothing is written or printed. `lock` is the descriptor from files.lock
    that keeps other runs out of the run directory.
    """

    def __init__(self, run_dir: str | Path, total_steps: int, enabled: bool = True, lock: int | None = None):
        self.run_dir = Path(run_dir)
        self.total_steps = total_steps
        self.enabled = enabled
        self.start_time = time.monotonic()
        self.start_step = 0
        self.warned: set[str] = set()
        # Lines that the disk has refused, by file name: written once it takes them.
        self.unwritten: dict[str, str] = {}
        self.cannot_write = False
        self.progress_bar: tqdm | None = None
        self.tracker: Any = None
        # Released by close(), or with this object when an exception ends the run.
        self.unlock = weakref.finalize(self, os.close, lock) if lock is not None else None

    def start_tracker(self, kind: str, config: dict[str, Any], step: int) -> None:
        """Send all rows from `step` on to wandb, tensorboard or trackio as well."""
        if self.enabled:
            from nano416 import trackers

            self.tracker = trackers.SafeTracker(kind, str(self.run_dir), config, step, warn=self.info)

    def start(self, step: int) -> None:
        """Start the clock of the ETA, and on a terminal the progress bar, at `step`."""
        self.start_time = time.monotonic()
        self.start_step = step
        if self.enabled and sys.stderr.isatty():
            self.progress_bar = tqdm(
                total=self.total_steps, initial=step, unit="step", dynamic_ncols=True, smoothing=0.05
            )

    def advance(self, step: int) -> None:
        """Move the progress bar to `step`."""
        if self.progress_bar is not None:
            self.progress_bar.update(step - self.progress_bar.n)

    def close(self) -> None:
        """Release the run directory, close tracker and progress bar. Text can still be logged."""
        if self.unwritten and self._flush():
            lost = sum(text.count("\n") for text in self.unwritten.values())
            self.print(f"{lost} lines of the log could not be written to {self.run_dir}")
        if self.unlock is not None:
            self.unlock()
        if self.tracker is not None:
            self.tracker.close()
            self.tracker = None
        if self.progress_bar is not None:
            self.progress_bar.close()
            self.progress_bar = None

    def info(self, text: str) -> None:
        """Log a line to the terminal and train.log; nothing if it is empty."""
        if self.enabled and text:
            # A path or a sample may hold what a terminal would obey.
            text = visible(text)
            self.print(text)
            self._write("train.log", text + "\n")

    def print(self, text: str) -> None:
        """Print a line to the terminal, above the progress bar."""
        if not self.enabled:
            return
        if self.progress_bar is not None:
            tqdm.write(text)
        else:
            # In one piece: the thread that writes checkpoints prints too.
            print(text + "\n", end="", flush=True)

    def warn_once(self, text: str) -> None:
        """Log a line the first time only."""
        if text not in self.warned:
            self.warned.add(text)
            self.info(text)

    def metrics(self, step: int, tokens: int, **values: Any) -> None:
        """Log a row and one readable line, or nothing if there are no values.

        Values of None are left out. NaN and infinity become null in the row, since JSON has neither.
        """
        measured = {key: value for key, value in values.items() if value is not None}
        if not self.enabled or not values:
            return
        row = {"step": step, "tokens": tokens, **{key: _finite(value) for key, value in measured.items()}}
        self.append("metrics.jsonl", row)
        if self.tracker is not None:
            self.tracker.log({key: value for key, value in row.items() if key != "step" and value is not None}, step)
        columns = [f"step {step:>{len(str(self.total_steps))}}/{self.total_steps}"]
        columns += [LOG_FORMATS[key].format(value) for key, value in measured.items() if key in LOG_FORMATS]
        if "loss" in values:
            columns.append(f"eta {self.eta(step)}")
        self.info("  ".join(columns))

    def append(self, name: str, row: dict[str, Any]) -> None:
        """Append a row to a .jsonl file of the run directory."""
        if self.enabled:
            self._write(name, json.dumps(row) + "\n")

    def _write(self, name: str, text: str) -> None:
        """Append to a file of the run directory. What cannot be written now is kept and written with a later call."""
        self.unwritten[name] = self.unwritten.get(name, "") + text
        error = self._flush()
        if error and not self.cannot_write:
            # A run of days must survive an hour of a full disk.
            self.print(f"cannot write to {self.run_dir}: {error}; the log is kept in memory until it can be written")
        if self.cannot_write and not error:
            self.print(f"{self.run_dir} can be written to again, nothing of the log is lost")
        self.cannot_write = bool(error)

    def _flush(self) -> str:
        """Write what is not written yet. Returns why that failed, "" if it did not."""
        error = ""
        for name, text in list(self.unwritten.items()):
            try:
                # Opened for each line, so that a killed process has lost nothing.
                files.append_text(self.run_dir / name, text)
                del self.unwritten[name]
            except OSError as caught:
                error = caught.strerror or str(caught)
        return error

    def eta(self, step: int) -> str:
        """Remaining time at the average speed of this process, with evaluations and checkpoints."""
        seconds_per_step = (time.monotonic() - self.start_time) / max(1, step - self.start_step)
        return duration(seconds_per_step * (self.total_steps - step))

    def rewind(self, step: int) -> None:
        """Delete the rows that a resumed run will write again: those after `step`, and evaluations at `step`."""
        if not self.enabled:
            return
        for path in (self.run_dir / "metrics.jsonl", self.run_dir / "stats.jsonl"):
            if path.exists():
                rows, damaged = parse_rows(path)
                if damaged:
                    # A log must not keep a run from continuing.
                    aside = path.with_name(path.name + ".damaged")
                    files.append_text(aside, "".join(line + "\n" for _, line in damaged))
                    numbers = ", ".join(str(number) for number, _ in damaged[:5])
                    self.info(f"{path}: {len(damaged)} damaged lines (line {numbers}), moved to {aside}")
                rows = [row for row in rows if _is_before(row, step)]
                files.write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def _is_before(row: dict[str, Any], step: int) -> bool:
    """True for rows written before the checkpoint of `step`, which is saved before the model is evaluated there."""
    is_evaluation = "val_loss" in row or "hellaswag_acc" in row
    return row["step"] < step or (row["step"] == step and not is_evaluation)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Timer:
    """Training speed and where the time goes. Evaluations and checkpoints are not training, see `exclude`.

    tokens, elapsed_s: what earlier processes of the run trained on, and how long they took.
    """

    def __init__(self, device: torch.device, tokens: int = 0, elapsed_s: float = 0.0):
        self.device = device
        # A monotonic clock, because the wall clock may be adjusted during a run.
        self.process_start = time.monotonic()
        self.run_start = self.process_start - elapsed_s
        self.lap_start = self.process_start
        self.lap_tokens = tokens
        self.excluded: dict[str, float] = {}

    @contextlib.contextmanager
    def exclude(self, name: str) -> Iterator[None]:
        """Count the time inside the block as `name` and not as training."""
        # The GPU may still be busy with training steps, which are not part of the block.
        synchronize(self.device)
        start = time.monotonic()
        yield
        seconds = time.monotonic() - start
        self.lap_start += seconds
        self.excluded[name] = self.excluded.get(name, 0.0) + seconds

    def tokens_per_s(self, tokens: int) -> float:
        """Training speed since the last call; `tokens` counts from the beginning of the run."""
        now = time.monotonic()
        speed = (tokens - self.lap_tokens) / (now - self.lap_start)
        self.lap_start = now
        self.lap_tokens = tokens
        return speed

    def speed(self, tokens: int, flops_per_token: int, n_devices: int) -> dict[str, float | None]:
        """Speed, utilization, FLOPs, time and memory after `tokens` tokens of the run, as a part of a row."""
        tokens_per_s = self.tokens_per_s(tokens)
        return {
            "tokens_per_s": tokens_per_s,
            "mfu": mfu(flops_per_token, tokens_per_s, device_name(self.device), n_devices),
            "flops": flops_per_token * tokens,
            "elapsed_s": round(self.elapsed_s(), 1),
            "memory_gb": peak_memory_gb(self.device),
        }

    def elapsed_s(self) -> float:
        """Seconds that the run has taken, earlier processes included."""
        return time.monotonic() - self.run_start

    def seconds(self) -> dict[str, float]:
        """Seconds of this process by activity: {"training": ..., "validation": ..., ...}."""
        total = time.monotonic() - self.process_start
        return {"training": total - sum(self.excluded.values()), **self.excluded}


def duration(seconds: float) -> str:
    """Seconds in words: 2m05s, 1h30m."""
    hours = int(seconds) // 3600
    minutes = int(seconds) // 60 % 60
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{int(seconds) % 60:02d}s"


# ---- Numbers ---------------------------------------------------------------------------------------------------------


def peak_flops(gpu: str) -> float | None:
    """Peak bf16 FLOP/s of a GPU by its name; None if it is unknown."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name.lower() in gpu.lower()), None)


def mfu(flops_per_token: float, tokens_per_s: float, gpu: str, n_devices: int) -> float | None:
    """Model FLOPs utilization from 0 to 1 (PaLM, arXiv:2204.02311); None for a device of unknown peak."""
    peak = peak_flops(gpu)
    return flops_per_token * tokens_per_s / (peak * n_devices) if peak else None


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl, or of the one in a run directory; damaged lines are named on stderr and left out.

    Raises ValueError if there is no such file.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "metrics.jsonl"
    rows, damaged = parse_rows(path)
    if not rows and path.stat().st_size:
        raise ValueError(f"{path} holds no rows of metrics; give a run directory or its metrics.jsonl")
    for number, _ in damaged[:5]:
        print(visible(f"{path}:{number} is not a row of metrics, left out"), file=sys.stderr)
    return rows


def parse_rows(path: Path) -> tuple[list[dict[str, Any]], list[tuple[int, str]]]:
    """The rows of a .jsonl file of a run, and (line number, text) of the lines that are not rows."""
    try:
        text = path.read_bytes().decode(errors="backslashreplace")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}; give a run directory or its metrics.jsonl") from error
    lines = text.split("\n")
    # A run that was killed while writing leaves half of its last line; otherwise nothing follows the last newline.
    lines.pop()
    rows = []
    damaged = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict) and type(row.get("step")) is int:
            rows.append(row)
        elif line.strip("\0\r "):
            damaged.append((number, line))
    return rows, damaged


def smooth(values: list[float], decay: float | None = None) -> list[float]:
    """Exponential moving average with bias correction; by default over about a hundredth of the values."""
    if decay is None:
        decay = min(SMOOTHING, 1 - 1 / (1 + len(values) / 100))
    average = 0.0
    averages = []
    for n, value in enumerate(values, 1):
        average = decay * average + (1 - decay) * value
        averages.append(average / (1 - decay**n))
    return averages


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The last value of everything, the best validation loss, the median speed and MFU."""
    # Later rows win.
    summary: dict[str, Any] = {}
    for row in rows:
        summary |= row
    val_losses = [row["val_loss"] for row in rows if row.get("val_loss") is not None]
    summary["best_val_loss"] = min(val_losses, default=None)
    # The median, because single rows may be slow, such as one that includes compilation.
    for key in ("tokens_per_s", "mfu"):
        values = [row[key] for row in rows if row.get(key) is not None]
        if values:
            summary[f"median_{key}"] = statistics.median(values)
    return summary


def write_summary(run_dir: str | Path, **extra: Any) -> dict[str, Any]:
    """Write final_metrics.json and final_metrics.png of a run; returns the summary, which includes `extra`."""
    rows = read_metrics(run_dir)
    summary = {**summarize(rows), **extra}
    plot(Path(run_dir).name, rows, Path(run_dir) / "final_metrics.png")
    # Last, because it marks the run as finished.
    files.write_json(Path(run_dir) / "final_metrics.json", summary)
    return summary


def compare_with_plan(summary: dict[str, Any]) -> str:
    """Lines of text: where the time of a run went, and how its speed and memory compare with the plan's."""
    total_s = sum(summary["seconds"].values())
    activities = ", ".join(f"{name} {seconds / total_s:.1%}" for name, seconds in summary["seconds"].items())
    lines = [f"time       {duration(total_s)}: {activities}"]
    planned = summary["planned_tokens_per_s"]
    measured = summary.get("median_tokens_per_s")
    if planned and measured:
        lines.append(f"speed      {measured:,.0f} tokens/s, {measured / planned:.0%} of the plan's {planned:,.0f}")
    if "memory_gb" in summary:
        lines.append(f"memory     {summary['memory_gb']:.1f} GB at most, planned {summary['planned_memory_gb']:.1f} GB")
    return "\n".join(lines)


# ---- Pictures --------------------------------------------------------------------------------------------------------


class Panel(NamedTuple):
    """One of the nine panels: curves of `keys` over `x`."""

    title: str
    unit: str
    keys: tuple[str, ...]
    x: str = "step"
    scale: str = "linear"
    transform: Callable[[float], float] = float


def _perplexity(loss: float) -> float:
    # exp(50) is beyond any vocabulary, but still a number that can be drawn.
    return math.exp(min(loss, 50))


def _percent(fraction: float) -> float:
    return 100 * fraction


# The nine panels of the original 416M run.
PANELS = (
    Panel("Loss", "nats per token", ("loss", "val_loss")),
    Panel("Perplexity", "exp(loss)", ("loss", "val_loss"), scale="log", transform=_perplexity),
    Panel("Learning rate", "", ("lr",)),
    Panel("Throughput", "tokens/s", ("tokens_per_s",)),
    Panel("Gradient norm", "before clipping", ("grad_norm",), scale="log"),
    Panel("Model FLOPs utilization", "% of peak", ("mfu",), transform=_percent),
    Panel("Loss by tokens", "nats per token", ("loss", "val_loss"), x="tokens"),
    Panel("Peak memory", "GB", ("memory_gb",)),
    Panel("HellaSwag acc_norm", "% correct", ("hellaswag_acc_norm",), transform=_percent),
)


def plot(name: str, rows: list[dict[str, Any]], path: str | Path) -> None:
    """Draw the nine panels of one run."""
    figure, axes = new_figure(3, 3, figsize=(16, 11))
    for axis, panel in zip(axes.flat, PANELS, strict=True):
        axis.set(title=panel.title, xlabel=panel.x, ylabel=panel.unit)
        axis.grid(alpha=0.25)
        measured = [_draw_curve(axis, rows, panel, key) for key in panel.keys]
        if not any(measured):
            axis.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axis.transAxes, color="gray")
            axis.set(xticks=[], yticks=[])
            continue
        axis.set_yscale(panel.scale)
        if panel.title in ("Throughput", "Peak memory"):
            # From zero, so that noise does not look like a change.
            axis.set_ylim(0, 1.1 * axis.get_ylim()[1])
        if panel.title.startswith("HellaSwag"):
            axis.axhline(25, color="gray", ls=":", label="chance")
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    figure.suptitle(plain_label(name), fontsize=13)
    save_figure(figure, path)


def plain_label(text: str) -> str:
    """A name as matplotlib draws it unchanged: it takes $...$ for a formula and leaves _names out of legends."""
    escaped = visible(text).replace("$", r"\$")
    return f" {escaped}" if escaped.startswith("_") else escaped


def _draw_curve(axis: Any, rows: list[dict[str, Any]], panel: Panel, key: str) -> bool:
    """Draw one curve: training losses faint under their average, evaluations as dots. False if nothing was measured."""
    rows = [row for row in rows if row.get(key) is not None]
    xs = [row[panel.x] for row in rows]
    values = [row[key] for row in rows]
    ys = [panel.transform(value) for value in values]
    if not rows:
        return False
    if key == "loss":
        # The loss is averaged, not its transform: a mean of perplexities would follow the outliers.
        axis.plot(xs, ys, color="C0", alpha=0.25)
        axis.plot(xs, [panel.transform(value) for value in smooth(values)], color="C0", label="training, smoothed")
    elif key == "val_loss":
        axis.plot(xs, ys, "o-", color="black", ms=3, lw=1, label="validation")
    elif key == "hellaswag_acc_norm":
        axis.plot(xs, ys, "o-", color="black", ms=3, lw=1, label="HellaSwag")
    else:
        axis.plot(xs, ys, color="C0", lw=1)
    return True


def new_figure(rows: int, columns: int, **options: Any) -> tuple[Any, Any]:
    """A matplotlib figure and its axes, for a machine without a display. `options` go to plt.subplots."""
    # Imported here because it takes half a second.
    import matplotlib

    # Draws into memory; the default backend may look for a display.
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(rows, columns, constrained_layout=True, **options)


def save_figure(figure: Any, path: str | Path) -> None:
    """Write a figure in the format of the file's suffix and close it. Raises ValueError if that is impossible."""
    import matplotlib.pyplot as plt

    try:
        # Atomically: with --watch somebody may be looking at the old picture.
        with files.atomic_write(path) as file:
            figure.savefig(file, dpi=110, format=Path(path).suffix[1:] or "png")
    except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
        raise ValueError(error.strerror) from error
    except ValueError as error:
        # matplotlib lists the formats it has.
        raise ValueError(f"cannot write {path}: {error}") from error
    finally:
        plt.close(figure)
