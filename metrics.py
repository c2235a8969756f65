"""Rows of numbers to metrics.jsonl, model FLOPs utilisation, and plots of them.

    python metrics.py runs/sample                   # nine panels of one run -> runs/sample/final_metrics.png
    python metrics.py runs/a runs/b -o loss.png     # several runs over each other

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
from pathlib import Path
from typing import Any

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
EMA_DECAY = 0.99  # of the smoothed loss in plots, the seed's; less for short runs, where it would lag


class MetricsLog:
    """What a run says: rows to metrics.jsonl, lines to the terminal and train.log, a progress bar on a terminal.

    On other ranks than 0 (enabled=False) it is silent.
    """

    def __init__(self, run_dir: str | Path, total_steps: int, enabled: bool = True, lock: int | None = None):
        self.run_dir, self.total_steps, self.enabled = Path(run_dir), total_steps, enabled
        self.release = weakref.finalize(self, os.close, lock) if lock is not None else None  # the run directory's
        self.bar, self.said, self.started = None, set(), (time.monotonic(), 0)

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
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def write(self, step: int, tokens: int, **values: Any) -> None:
        """Append one row; None is left out, NaN and infinity become null (JSON has neither)."""
        if self.enabled:
            row = {"step": step, "tokens": tokens, **{k: _finite(v) for k, v in values.items() if v is not None}}
            with open(self.run_dir / "metrics.jsonl", "a", encoding="utf-8") as file:
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
        seconds = int((time.monotonic() - since) / max(1, step - first) * (self.total_steps - step))
        hours, minutes = seconds // 3600, seconds // 60 % 60
        return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds % 60:02d}s"

    def rewind(self, step: int) -> None:
        """Forget what a killed run logged after the checkpoint of `step`, and its evaluation there, which is repeated."""
        path = self.run_dir / "metrics.jsonl"
        if self.enabled and path.exists():
            kept = [r for r in read_metrics(path) if r["step"] < step or (r["step"] == step and "loss" in r)]
            write_text(path, "".join(json.dumps(row) + "\n" for row in kept))


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
    plot({Path(run_dir).name: rows}, Path(run_dir) / "final_metrics.png")
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


def plot(runs: dict[str, list[dict[str, Any]]], out: str | Path) -> None:
    """Nine panels (3 x 3) of one run, or of several over each other, as a picture at `out`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(3, 3, figsize=(16, 11), constrained_layout=True)
    for axis, (title, unit, keys, x, scale) in zip(axes.flat, PANELS, strict=True):
        drawn = [
            _draw(axis, rows, key, x, i, name, len(runs)) for i, (name, rows) in enumerate(runs.items()) for key in keys
        ]
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
    figure.suptitle(", ".join(runs), fontsize=13)
    save_figure(figure, out)


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


def _draw(axis, rows, key: str, x: str, number: int, name: str, n_runs: int) -> bool:
    """One curve: training losses faint with their average on top, evaluations as dots. False if nothing was measured."""
    source, transform = DERIVED.get(key, (key, lambda value: value))
    points = [(row[x], row[source]) for row in rows if row.get(source) is not None]
    if not points:
        return False
    at, measured = [p[0] for p in points], [p[1] for p in points]
    values = [transform(value) for value in measured]
    color, label = f"C{number}", name if n_runs > 1 else None
    if key in ("loss", "perplexity"):
        axis.plot(at, values, color=color, alpha=0.25)
        axis.plot(at, [transform(value) for value in ema(measured)], color=color, label=label or "training, smoothed")
    elif key.startswith(("val_", "hellaswag")):
        own = "black" if n_runs == 1 else color
        axis.plot(
            at,
            values,
            "o-",
            color=own,
            ms=3,
            lw=1,
            label=None if label else key.split("_")[0].replace("val", "validation"),
        )
    else:
        axis.plot(at, values, color=color, lw=1, label=label)
    return True


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main() -> None:
    """Command line: plot the runs given."""
    parser = ArgumentParser()
    parser.add_argument("run_dir", nargs="+", help="run directories (or metrics.jsonl files)")
    parser.add_argument("-o", "--output", help="picture to write [RUN_DIR/final_metrics.png, or runs.png for several]")
    args = parser.parse_args()
    runs = {str(path): read_metrics(path) for path in args.run_dir}
    if empty := [name for name, rows in runs.items() if not rows]:
        raise ValueError(f"{empty[0]} has no rows yet; train for at least log_every steps")
    folder = Path(args.run_dir[0]) if Path(args.run_dir[0]).is_dir() else Path(args.run_dir[0]).parent
    out = Path(args.output or (folder / "final_metrics.png" if len(runs) == 1 else "runs.png"))
    plot(runs, out)
    print(out)


if __name__ == "__main__":
    run(main)
