"""Draw runs: nine panels of one, the losses of several in one picture, or the statistics of one run's weights.

    python -m tools.plot runs/sample                          # nine panels -> runs/sample/final_metrics.png
    python -m tools.plot runs/sample --watch                  # again whenever there are new rows, until Ctrl-C
    python -m tools.plot runs/a runs/b --output=ab.png        # losses by tokens, both axes logarithmic
    python -m tools.plot runs/a runs/b --x=hours              # ... by step, tokens, flops or hours
    python -m tools.plot runs/sample --stats                  # stats.jsonl (training.py --stats_every=50) as four maps

Reads metrics.jsonl or stats.jsonl. A comparison also prints how soon each run reaches the loss of the first.
"""

import math
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nano416 import metrics
from nano416.config import parse_config, run_cli, visible

Rows = list[dict[str, Any]]
XName = Literal["step", "tokens", "flops", "hours"]
X_LABELS = {"step": "optimizer steps", "tokens": "training tokens", "flops": "training FLOPs", "hours": "hours"}
# The numbers of a row that are drawn.
DRAWN = {"step", "tokens", "flops", "elapsed_s"} | {key for panel in metrics.PANELS for key in panel.keys}
# Beyond this size, and thus for infinity, matplotlib cannot place ticks.
MAX_DRAWN = 1e100
# Seconds between two looks at the files.
WATCH_INTERVAL_S = 5.0


@dataclass(frozen=True)
class PlotConfig:
    """What to draw, and where to."""

    run_dirs: list[str]  # run directories, or their metrics.jsonl files
    output: str | None = None  # picture to write; none = RUN_DIR/final_metrics.png, RUN_DIR/stats.png or runs.png
    x: XName | None = None  # draw only losses, over step, tokens, flops or hours; several runs: tokens
    stats: bool = False  # draw stats.jsonl of one run
    watch: bool = False  # draw again whenever there are new rows, until Ctrl-C

    def __post_init__(self):
        if self.stats and (self.x or len(self.run_dirs) > 1):
            raise ValueError("--stats draws one run; leave out --x and the other runs")

    @property
    def picture(self) -> Path:
        """The file to write."""
        if self.output:
            return Path(self.output)
        if len(self.run_dirs) > 1:
            return Path("runs.png")
        run_dir = Path(self.run_dirs[0])
        folder = run_dir if run_dir.is_dir() else run_dir.parent
        return folder / ("stats.png" if self.stats else "final_metrics.png")


def main(cfg: PlotConfig) -> None:
    """Draw once, or with --watch until interrupted."""
    drawn = last_change(cfg.run_dirs)
    draw(cfg)
    print(visible(str(cfg.picture)))
    while cfg.watch:
        time.sleep(WATCH_INTERVAL_S)
        changed = last_change(cfg.run_dirs)
        if changed != drawn:
            drawn = changed
            draw(cfg)


def last_change(run_dirs: list[str]) -> list[float]:
    """When the rows of each run were last written."""
    files = [Path(path, "metrics.jsonl") if Path(path).is_dir() else Path(path) for path in run_dirs]
    return [file.stat().st_mtime for file in files if file.exists()]


def draw(cfg: PlotConfig) -> None:
    """Write the picture; print the comparison, if it is one."""
    if cfg.stats:
        plot_stats(cfg.run_dirs[0], cfg.picture)
        return
    runs = read_runs(cfg.run_dirs)
    if cfg.x or len(runs) > 1:
        x = cfg.x or "tokens"
        plot_comparison(runs, x, cfg.picture)
        print(visible(compare(runs, x)))
    else:
        name, rows = runs.popitem()
        metrics.plot(name, rows, cfg.picture)


def read_runs(run_dirs: list[str]) -> dict[str, Rows]:
    """{name: rows}; runs/a and runs/b are called a and b. Raises ValueError for a run without rows or with odd ones."""
    # Absolute, since relative and absolute paths have nothing in common.
    parents = [os.path.dirname(os.path.abspath(path)) for path in run_dirs]
    common = os.path.commonpath(parents)
    runs = {}
    for path in run_dirs:
        name = os.path.relpath(path, common)
        rows = [read_numbers(row, DRAWN, f"{path}: row {n}") for n, row in enumerate(metrics.read_metrics(path), 1)]
        if not rows:
            raise ValueError(f"{name} has no rows yet; train for at least log_every steps")
        for number, row in enumerate(rows, 1):
            if not {"step", "tokens"} <= row.keys():
                raise ValueError(f"{path}: row {number} lacks the number of its step or of its tokens; delete it")
        runs[name] = rows
    return runs


def read_numbers(row: Any, keys: Iterable[str], where: str) -> dict[str, float]:
    """The numbers of these keys; null and NaN are left out. Raises ValueError for anything else."""
    if not isinstance(row, dict):
        raise ValueError(f"{where} is not a table of numbers")
    numbers = {}
    for key in keys:
        value = row.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{where} has {key} = {str(value)[:40]!r}, which is not a number; delete that row")
        if abs(value) <= MAX_DRAWN:
            numbers[key] = value
    return numbers


# ---- Comparison ------------------------------------------------------------------------------------------------------


def x_value(row: dict[str, Any], x: XName) -> float | None:
    """Where a row lies on the x axis; None if it does not say."""
    if x == "hours":
        return row["elapsed_s"] / 3600 if "elapsed_s" in row else None
    return row.get(x)


def curve(rows: Rows, key: str, x: XName) -> tuple[list[float], list[float]]:
    """(x, y) of all rows with a value of `key`. Evaluations log no flops or hours: interpolated by tokens."""
    known = [(row["tokens"], x_value(row, x)) for row in rows if x_value(row, x) is not None]
    if not known:
        raise ValueError(f"the runs were logged without {x}; choose another --x")
    # Step 0 is left out: it has no place on a logarithmic axis.
    measured = [row for row in rows if row.get(key) is not None and row["tokens"] > 0]
    # In order even if two runs have written to the same file.
    known_tokens, known_xs = zip((0, 0), *sorted(known), strict=True)
    xs = np.interp([row["tokens"] for row in measured], known_tokens, known_xs)
    return xs.tolist(), [row[key] for row in measured]


def steps_to_loss(rows: Rows, loss: float, x: XName = "step") -> float | None:
    """Where on the x axis the validation loss first reaches `loss`, interpolated between evaluations; None if never."""
    xs, losses = curve(rows, "val_loss", x)
    # The first time counts: a run that overfits rises above the loss again.
    for i, value in enumerate(losses):
        if value > loss:
            continue
        if i == 0:
            return xs[0]
        frac = (losses[i - 1] - loss) / (losses[i - 1] - value)
        return xs[i - 1] + frac * (xs[i] - xs[i - 1])
    return None


def compare(runs: dict[str, Rows], x: XName) -> str:
    """A table: each run's last validation loss, and where it reached the first run's, also as a multiple of its end."""
    curves = {name: curve(rows, "val_loss", x) for name, rows in runs.items()}
    first_xs, first_losses = next(iter(curves.values()))
    target = first_losses[-1] if first_losses else math.nan
    width = max(len(name) for name in runs)
    lines = [f"{'':{width}}  validation loss   reaches {target:.4f} after"]
    for name, rows in runs.items():
        _, losses = curves[name]
        last = losses[-1] if losses else math.nan
        reached = steps_to_loss(rows, target, x) if first_losses else None
        ratio = reached / first_xs[-1] if reached is not None and first_xs[-1] else math.nan
        when = "-" if reached is None else f"{reached:.4g} {x} ({ratio:.2f}x)"
        lines.append(f"{name:{width}}  {last:15.4f}   {when}")
    return "\n".join(lines)


def plot_comparison(runs: dict[str, Rows], x: XName, path: Path) -> None:
    """Draw training losses (smoothed) and validation losses of several runs."""
    figure, axes = metrics.new_figure(1, 2, figsize=(15, 6.5))
    panels = {"loss": "Training loss, smoothed", "val_loss": "Validation loss"}
    for axis, (key, title) in zip(axes.flat, panels.items(), strict=True):
        for name, rows in runs.items():
            label = metrics.plain_label(name)
            xs, losses = curve(rows, key, x)
            if key == "loss":
                axis.plot(xs, metrics.smooth(losses), label=label)
            else:
                axis.plot(xs, losses, "o-", ms=3, label=label)
        axis.set(title=title, xlabel=X_LABELS[x], ylabel="nats per token", xscale="log", yscale="log")
        format_log_axes(axis, x)
        axis.legend(fontsize=8)
    metrics.save_figure(figure, path)


def format_log_axes(axis: Any, x: XName) -> None:
    """Label the axes with 2.5 and 300M, where matplotlib would write 2.5 x 10^0 and 3 x 10^8."""
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

    low, high = axis.get_ylim()
    # Losses often stay within one decade, where a logarithmic locator finds one tick or none.
    axis.yaxis.set_major_locator(MaxNLocator(12) if high < 10 * low else LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:.3g}")
    axis.yaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    # EngFormatter would write 0.01 hours as 10m.
    axis.xaxis.set_major_formatter("{x:g}" if x == "hours" else EngFormatter(sep=""))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.grid(alpha=0.25, which="both")


# ---- Statistics of weights -------------------------------------------------------------------------------------------


def plot_stats(run_dir: str, path: Path) -> None:
    """Draw stats.jsonl as four maps: weights from top to bottom, steps from left to right."""
    rows = metrics.read_metrics(Path(run_dir) / "stats.jsonl")
    if not rows:
        raise ValueError(f"{run_dir}/stats.jsonl has no rows yet; train for at least stats_every steps")
    # In the model's own order, from the embedding to the last norm.
    norms = rows[0].get("weight_norm")
    names = list(norms) if isinstance(norms, dict) else []
    if not names:
        raise ValueError(
            f"{run_dir}/stats.jsonl does not begin with the weight_norm of any weight; delete its first row"
        )
    steps = [str(row["step"])[:12] for row in rows]

    def table(key: str) -> np.ndarray:  # [weights, steps]
        columns = [read_numbers(row.get(key) or {}, names, f"{run_dir}/stats.jsonl: {key}") for row in rows]
        return np.array([[column.get(name, np.nan) for column in columns] for name in names], dtype=float)

    maps = {
        "weight norm": table("weight_norm"),
        "gradient norm, clipped": table("grad_norm"),
        "update norm / weight norm": table("update_norm") / np.maximum(table("weight_norm"), 1e-30),
        "cosine with the previous gradient": table("grad_cosine"),
    }
    figure, axes = metrics.new_figure(2, 2, figsize=(16, 5 + 0.18 * len(names)))
    for axis, (title, values) in zip(axes.flat, maps.items(), strict=True):
        if title.startswith("cosine"):
            image = axis.imshow(values, aspect="auto", interpolation="nearest", cmap="RdBu", vmin=-1, vmax=1)
            figure.colorbar(image, ax=axis)
        else:
            # Zeros, such as the updates in a step with learning rate 0, stay white and do not stretch the scale.
            logs = np.log10(np.where(values > 0, values, np.nan))
            image = axis.imshow(logs, aspect="auto", interpolation="nearest")
            figure.colorbar(image, ax=axis, label="log10")
        ticks = np.unique(np.linspace(0, len(steps) - 1, 6).astype(int))
        axis.set(title=title, xlabel="step", xticks=ticks, xticklabels=[metrics.plain_label(steps[i]) for i in ticks])
        labels = [metrics.plain_label(name.removesuffix(".weight")) for name in names]
        axis.set_yticks(range(len(names)), labels, fontsize=6)
    metrics.save_figure(figure, path)


if __name__ == "__main__":
    run_cli(lambda: main(parse_config(PlotConfig)))
