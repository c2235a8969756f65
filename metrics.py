"""Rows of numbers to metrics.jsonl, model FLOPs utilisation, and plots of them.

    python metrics.py runs/sample                   # nine panels of one run -> runs/sample/final_metrics.png
    python metrics.py runs/a runs/b -o loss.png     # losses of several runs by tokens, both axes logarithmic
    python metrics.py runs/a runs/b --x=hours       # ... by step, tokens, flops or hours
    python metrics.py runs/sample --watch           # draws again while it trains
    python metrics.py runs/sample --stats           # stats.jsonl (training.py --stats_every=50) as four maps

A row is one JSON object with `step`, `tokens` and what was measured there: `loss`, `val_loss`, `val_bpb`, `lr`,
`grad_norm`, `tokens_per_s`, `mfu`, `memory_gb`, `hellaswag_acc_norm`, ... Losses are in nats per token.
"""

import json
import math
import os
import resource
import statistics
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from config import ArgumentParser, run

# Dense bf16 peak with fp32 accumulation, FLOP/s, from the data sheets; the first name found in the GPU's name counts.
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
ASSUMED_MFU = 0.45  # for plans: what plain PyTorch reaches on one GPU generation or another
SHOWN = {  # how a log line writes a value
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
WATCH_S = 5.0  # seconds between two looks of --watch
LOGITS_BYTES = 4  # per token and word of the vocabulary, compiled: bf16 logits and their gradient
EMA_DECAY = 0.99  # of the smoothed loss in plots, the seed's; less for short runs, where it would lag


class MetricsLog:
    """What a run says: rows to metrics.jsonl, lines to the terminal and train.log, a progress bar on a terminal.

    On other ranks than 0 (enabled=False) it is silent.
    """

    def __init__(self, run_dir: str | Path, total_steps: int, enabled: bool = True, lock: int | None = None):
        self.run_dir, self.total_steps, self.enabled = Path(run_dir), total_steps, enabled
        self.release = weakref.finalize(self, os.close, lock) if lock is not None else None  # the run directory's
        self.bar, self.said, self.started = None, set(), (time.monotonic(), 0)
        self.tracker: Any = None  # one of trackers.py, told every row

    def begin(self, step: int) -> None:
        """Start the clock and the bar at `step`."""
        self.started = (time.monotonic(), step)
        if self.enabled and sys.stderr.isatty():
            self.bar = tqdm(total=self.total_steps, initial=step, unit="step", dynamic_ncols=True, smoothing=0.05)

    def advance(self, step: int) -> None:
        """One step is done."""
        if self.bar is not None:
            self.bar.update(step - self.bar.n)

    def end(self) -> None:
        """Close the bar, let go of the run directory."""
        if self.release is not None:
            self.release()
        if self.tracker is not None:
            self.tracker.close()
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def write(self, step: int, tokens: int, **values: Any) -> None:
        """Append one row; None is left out, NaN and infinity become null (JSON has neither)."""
        if self.enabled:
            row = {"step": step, "tokens": tokens, **{k: _finite(v) for k, v in values.items() if v is not None}}
            self.append("metrics.jsonl", row)
            if self.tracker is not None:
                self.tracker.log({k: v for k, v in row.items() if k != "step" and v is not None}, step)

    def append(self, name: str, row: dict[str, Any]) -> None:
        """One row to a .jsonl file of the run directory."""
        if self.enabled:
            with open(self.run_dir / name, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def line(self, text: str) -> None:
        """One line to the terminal (above the bar) and to train.log; nothing for an empty text."""
        if self.enabled and text:
            self.say(text)
            with open(self.run_dir / "train.log", "a", encoding="utf-8") as file:
                file.write(text + "\n")

    def say(self, text: str) -> None:
        """One line to the terminal alone."""
        if self.enabled:
            tqdm.write(text) if self.bar is not None else print(text, flush=True)

    def once(self, text: str) -> None:
        """A line that is said only the first time."""
        if text not in self.said:
            self.said.add(text)
            self.line(text)

    def report(self, step: int, tokens: int, **values: Any) -> None:
        """A row of metrics, and the same as one readable line; nothing if there are no values."""
        if values:
            self.write(step, tokens, **values)
            shown = [SHOWN[key].format(value) for key, value in values.items() if key in SHOWN and value is not None]
            eta = [f"eta {self.eta(step)}"] if "loss" in values else []
            self.line("  ".join([f"step {step:>{len(str(self.total_steps))}}/{self.total_steps}", *shown, *eta]))

    def eta(self, step: int) -> str:
        """Time left at the speed of this process so far, evaluations and checkpoints included."""
        since, first = self.started
        return duration((time.monotonic() - since) / max(1, step - first) * (self.total_steps - step))

    def rewind(self, step: int) -> None:
        """Forget what a killed run logged after the checkpoint of `step`, and its evaluation there, which is repeated."""
        for path in (self.run_dir / "metrics.jsonl", self.run_dir / "stats.jsonl"):
            if self.enabled and path.exists():
                last = lambda row: "val_loss" not in row and "hellaswag_acc" not in row
                kept = [r for r in read_metrics(path) if r["step"] < step or (r["step"] == step and last(r))]
                write_text(path, "".join(json.dumps(row) + "\n" for row in kept))


def duration(seconds: float) -> str:
    """Seconds as people say them: 2m05s, 1h30m."""
    hours, minutes = int(seconds) // 3600, int(seconds) // 60 % 60
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{int(seconds) % 60:02d}s"


def write_text(path: str | Path, text: str) -> None:
    """Replace a small file as a whole: readers see the old one or the new one."""
    partial = Path(path).with_name(f".{Path(path).name}.tmp")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl or of the run directory around it; a last line torn by a kill is left out."""
    path = Path(path)
    path = path / "metrics.jsonl" if path.is_dir() else path
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise ValueError(f"cannot read {path}: {reason}; give a run directory or its metrics.jsonl") from error
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows.append(row) if isinstance(row, dict) and "step" in row else None
        except ValueError as error:
            if number < len(lines):
                raise ValueError(f"{path}:{number} is no JSON row") from error
    return rows


def peak_flops(device_name: str) -> float | None:
    """Peak FLOP/s of a GPU by its name, None when unknown."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name.lower() in device_name.lower()), None)


def activation_bytes(dim: int, query_width: int, kv_width: int, ffn_dim: int) -> int:
    """What compiled bf16 training keeps of a token in a layer for the backward pass, recomputing nothing.

    The residual stream twice in fp32, three vectors of dim, queries and their answer, keys, values and SwiGLU's three in bf16.
    """
    return (8 + 6) * dim + 4 * query_width + 4 * kv_width + 6 * ffn_dim


def mfu(flops_per_token: float, tokens_per_s: float, device_name: str, n_devices: int) -> float | None:
    """Model FLOPs utilisation, 0..1 (arXiv:2204.02311): the share of the GPUs' peak that the model's own FLOPs take."""
    peak = peak_flops(device_name)
    return flops_per_token * tokens_per_s / (peak * n_devices) if peak else None


def peak_memory_gb() -> float:
    """Largest memory so far: of the GPU if there is one, else of this process (GB = 1e9 bytes)."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def ema(values: list[float], decay: float | None = None) -> list[float]:
    """Exponential moving average without the bias of its start; by default over a hundredth of the values."""
    decay = min(EMA_DECAY, 1 - 1 / (1 + len(values) / 100)) if decay is None else decay
    smooth, out = 0.0, []
    for n, value in enumerate(values, 1):
        smooth = decay * smooth + (1 - decay) * value
        out.append(smooth / (1 - decay**n))
    return out


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What final_metrics.json holds: the last value of everything, the best validation loss, typical speed."""
    last = {key: value for row in rows for key, value in row.items()}
    best = min((r["val_loss"] for r in rows if r.get("val_loss") is not None), default=None)
    typical = {
        f"median_{key}": statistics.median(values)
        for key in ("tokens_per_s", "mfu")
        if (values := [r[key] for r in rows if r.get(key) is not None])
    }
    return {**last, "best_val_loss": best, **typical}


def write_summary(run_dir: str | Path, **facts: Any) -> dict[str, Any]:
    """final_metrics.json and final_metrics.png of a run; returns what the file holds."""
    rows = read_metrics(run_dir)
    summary = {**summarize(rows), **facts}
    write_text(Path(run_dir) / "final_metrics.json", json.dumps(summary, indent=2) + "\n")
    plot(Path(run_dir).name, rows, Path(run_dir) / "final_metrics.png")
    return summary


# Title, unit, what is drawn, x axis, scale of the y axis: the seed's nine.
PANELS = (
    ("Loss", "nats per token", ("loss", "val_loss"), "step", "linear"),
    ("Perplexity", "exp(loss)", ("perplexity", "val_perplexity"), "step", "log"),
    ("Learning rate", "", ("lr",), "step", "linear"),
    ("Throughput", "tokens/s", ("tokens_per_s",), "step", "linear"),
    ("Gradient norm", "before clipping", ("grad_norm",), "step", "log"),
    ("Model FLOPs utilisation", "% of the GPUs' peak", ("mfu",), "step", "linear"),
    ("Loss by tokens", "nats per token", ("loss", "val_loss"), "tokens", "linear"),
    ("Peak memory", "GB", ("memory_gb",), "step", "linear"),
    ("HellaSwag acc_norm", "% correct", ("hellaswag_acc_norm",), "step", "linear"),
)
DERIVED = {  # drawn from a logged value
    "perplexity": ("loss", lambda loss: math.exp(min(loss, 50))),
    "val_perplexity": ("val_loss", lambda loss: math.exp(min(loss, 50))),
    "mfu": ("mfu", lambda share: 100 * share),
    "hellaswag_acc_norm": ("hellaswag_acc_norm", lambda share: 100 * share),
}


def plot(name: str, rows: list[dict[str, Any]], out: str | Path) -> None:
    """Nine panels (3 x 3) of one run as a picture at `out`."""
    figure, axes = _figure(3, 3, figsize=(16, 11))
    for axis, (title, unit, keys, x, scale) in zip(axes.flat, PANELS, strict=True):
        drawn = [_draw(axis, rows, key, x) for key in keys]
        axis.set(title=title, ylabel=unit, xlabel=x if x == "tokens" else "step")
        axis.grid(alpha=0.25)
        if not any(drawn):
            axis.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axis.transAxes, color="gray")
            axis.set(xticks=[], yticks=[])
            continue
        axis.set_yscale(scale)
        if title in ("Throughput", "Peak memory"):
            axis.set_ylim(0, 1.1 * axis.get_ylim()[1])
        if title.startswith("HellaSwag"):
            axis.axhline(25, color="gray", ls=":", label="chance")
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    figure.suptitle(name, fontsize=13)
    save_figure(figure, out)


# What a comparison is drawn against: its label, and a row's value (None where the row does not say).
X_AXES: dict[str, tuple[str, Callable[[dict[str, Any]], float | None]]] = {
    "step": ("optimizer steps", lambda row: row["step"]),
    "tokens": ("training tokens", lambda row: row["tokens"]),
    "flops": ("training FLOPs", lambda row: row.get("flops")),
    "hours": ("hours", lambda row: row["elapsed_s"] / 3600 if "elapsed_s" in row else None),
}


def plot_comparison(runs: dict[str, list[dict[str, Any]]], x: str, out: str | Path) -> None:
    """Training (smoothed) and validation losses of several runs against one of X_AXES, as a picture at `out`."""
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

    figure, axes = _figure(1, 2, figsize=(15, 6.5))
    for axis, key, title in zip(axes.flat, ("loss", "val_loss"), ("Training loss, smoothed", "Validation loss")):
        for name, rows in runs.items():
            at, values = curve(rows, key, x)
            axis.plot(at, ema(values) if key == "loss" else values, "-" if key == "loss" else "o-", ms=3, label=name)
        axis.set(title=title, xlabel=X_AXES[x][0], xscale="log", yscale="log")
        low, high = axis.get_ylim()  # within a decade the usual ticks are too few
        axis.yaxis.set_major_locator(MaxNLocator(12) if high < 10 * low else LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter("{x:.3g}")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.25, which="both")
        axis.legend(fontsize=8)
    axes.flat[0].set_ylabel("nats per token")
    save_figure(figure, out)


def curve(rows: list[dict[str, Any]], key: str, x: str) -> tuple[list[float], list[float]]:
    """(positions on the axis x, values) of `key`; positions that a row lacks lie between its neighbours', by tokens."""
    known = [(row["tokens"], value) for row in rows if (value := X_AXES[x][1](row)) is not None]
    if not known:
        raise ValueError(f"these runs do not say their {x}; choose another --x")
    measured = [row for row in rows if row.get(key) is not None and row["tokens"] > 0]  # a logarithm has no 0
    tokens, positions = zip((0, 0), *known)
    at = np.interp([row["tokens"] for row in measured], tokens, positions)
    return at.tolist(), [row[key] for row in measured]


def reached(rows: list[dict[str, Any]], loss: float, x: str) -> float | None:
    """Where on the axis x the validation loss first falls to `loss`, between two evaluations on a straight line."""
    at, values = curve(rows, "val_loss", x)
    for i, value in enumerate(values):
        if value <= loss:
            share = (values[i - 1] - loss) / (values[i - 1] - value) if i else 1.0
            return at[i - 1] + share * (at[i] - at[i - 1]) if i else at[0]
    return None


def compare(runs: dict[str, list[dict[str, Any]]], x: str) -> str:
    """Each run's last validation loss, and where on the axis x it reached that of the first run."""
    last = {name: (curve(rows, "val_loss", x)[1] or [math.nan])[-1] for name, rows in runs.items()}
    goal, whole = next(iter(last.values())), (curve(next(iter(runs.values())), "val_loss", x)[0] or [math.nan])[-1]
    lines = [f"{'':40} validation loss   reaches {goal:.4f} after"]
    for name, rows in runs.items():
        at = reached(rows, goal, x)
        when = f"{at:.4g} {x} ({at / whole:.2f}x)" if at is not None else "-"
        lines.append(f"{name:40} {last[name]:15.4f}   {when}")
    return "\n".join(lines)


def plot_stats(run_dir: str | Path, out: str | Path) -> None:
    """Every weight's statistics in stats.jsonl as maps, weights down, steps to the right."""
    rows = read_metrics(Path(run_dir) / "stats.jsonl")
    if not rows:
        raise ValueError(f"{run_dir}/stats.jsonl has no rows yet; train for at least stats_every steps")
    names, steps = list(rows[0]["weight_norm"]), [row["step"] for row in rows]
    figure, axes = _figure(2, 2, figsize=(16, 5 + 0.18 * len(names)))
    ratio = [{n: row["update_norm"][n] / max(row["weight_norm"][n], 1e-30) for n in names} for row in rows]
    maps = {
        "weight norm": [row["weight_norm"] for row in rows],
        "gradient norm, clipped": [row["grad_norm"] for row in rows],
        "update norm / weight norm": ratio,
        "cosine with the gradient before": [row.get("grad_cosine", {}) for row in rows],
    }
    for axis, (title, columns) in zip(axes.flat, maps.items(), strict=True):
        values = np.array([[column.get(name, np.nan) for column in columns] for name in names], dtype=float)
        cosine = title.startswith("cosine")
        shown = values if cosine else np.log10(np.maximum(values, 1e-12))
        image = axis.imshow(shown, aspect="auto", interpolation="nearest", cmap="RdBu" if cosine else "viridis")
        image.set_clim(-1, 1) if cosine else None
        figure.colorbar(image, ax=axis, label=None if cosine else "log10")
        ticks = np.unique(np.linspace(0, len(steps) - 1, 6).astype(int))
        axis.set(title=title, xlabel="step", xticks=ticks, xticklabels=[steps[i] for i in ticks])
        axis.set_yticks(range(len(names)), [name.removesuffix(".weight") for name in names], fontsize=6)
    save_figure(figure, out)


def _figure(rows: int, columns: int, **options: Any) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(rows, columns, constrained_layout=True, **options)


def save_figure(figure: Any, out: str | Path) -> None:
    """Replace the picture `out` as a whole. Raises ValueError where it cannot be written."""
    import matplotlib.pyplot as plt

    partial = Path(out).with_name(f".{Path(out).name}")
    try:
        figure.savefig(partial, dpi=110, format=Path(out).suffix[1:] or "png")
        os.replace(partial, out)
    except (FileNotFoundError, NotADirectoryError, PermissionError, ValueError) as error:  # or no such kind of picture
        raise ValueError(f"cannot write {out}: {getattr(error, 'strerror', None) or error}") from error
    plt.close(figure)


def _draw(axis, rows, key: str, x: str) -> bool:
    """One curve: training losses faint with their average on top, evaluations as dots. False if nothing was measured."""
    source, transform = DERIVED.get(key, (key, lambda value: value))
    points = [(row[x], row[source]) for row in rows if row.get(source) is not None]
    if not points:
        return False
    at, measured = [p[0] for p in points], [p[1] for p in points]
    values = [transform(value) for value in measured]
    if key in ("loss", "perplexity"):
        axis.plot(at, values, color="C0", alpha=0.25)
        axis.plot(at, [transform(value) for value in ema(measured)], color="C0", label="training, smoothed")
    elif key.startswith(("val_", "hellaswag")):
        axis.plot(at, values, "o-", color="black", ms=3, lw=1, label=key.split("_")[0].replace("val", "validation"))
    else:
        axis.plot(at, values, color="C0", lw=1)
    return True


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _changed(paths: list[str]) -> list[float]:
    """When the runs were last written to."""
    files = [Path(path, "metrics.jsonl") if Path(path).is_dir() else Path(path) for path in paths]
    return [file.stat().st_mtime for file in files if file.exists()]


def main() -> None:
    """Command line: plot the runs given."""
    parser = ArgumentParser()
    parser.add_argument("run_dir", nargs="+", help="run directories (or metrics.jsonl files)")
    parser.add_argument("-o", "--output", help="picture to write [RUN_DIR/final_metrics.png, or runs.png for several]")
    parser.add_argument("--x", choices=X_AXES, help="draw only losses, against this [tokens for several runs]")
    parser.add_argument("--stats", action="store_true", help="draw stats.jsonl of one run")
    parser.add_argument("--watch", action="store_true", help="draw again whenever there are new rows, until Ctrl-C")
    args = parser.parse_args()
    first, several = Path(args.run_dir[0]), len(args.run_dir) > 1
    if args.stats and (several or args.x):
        raise ValueError("--stats draws one run on its own; leave out --x and the other runs")
    folder = first if first.is_dir() else first.parent
    name = "stats.png" if args.stats else "final_metrics.png"
    out = Path(args.output or ("runs.png" if several else folder / name))
    x = args.x or ("tokens" if several else None)
    seen = draw(args.run_dir, x, args.stats, out)
    print(out)
    while args.watch:
        time.sleep(WATCH_S)
        if _changed(args.run_dir) != seen:
            seen = draw(args.run_dir, x, args.stats, out)


def draw(paths: list[str], x: str | None, stats: bool, out: Path) -> list[float]:
    """The picture that the command line asks for, and what compares runs as text; returns _changed() before it."""
    seen = _changed(paths)
    short = os.path.commonpath([os.path.dirname(os.path.normpath(path)) for path in paths])
    runs = {os.path.relpath(path, short or "."): read_metrics(path) for path in paths}
    if empty := [name for name, rows in runs.items() if not rows]:
        raise ValueError(f"{empty[0]} has no rows yet; train for at least log_every steps")
    if stats:
        plot_stats(paths[0], out)
    elif x:
        plot_comparison(runs, x, out)
        print(compare(runs, x))
    else:
        plot(*next(iter(runs.items())), out)
    return seen


if __name__ == "__main__":
    run(main)
