"""Validation loss of a checkpoint on any data of its tokenizer: loss, perplexity and bits per byte.

    python -m tools.eval_loss runs/mine --sources=data/mine                 # the loss that training logged
    python -m tools.eval_loss runs/mine --sources=data/mine,data/other --eval_tokens=1M
    python -m tools.eval_loss runs/mdm --sources=data/mine --num_mc=32      # masked diffusion: its bound, less noisy
    torchrun --standalone --nproc_per_node=8 -m tools.eval_loss runs/mine --sources=data/mine

Reads the validation shards of each source. With several sources it prints each one's loss, their average over tokens
(micro) and over sources (macro).
"""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch

from nano416 import checkpoint, distributed
from nano416.config import parse_config, run_cli, visible
from nano416.dataloader import BatchLayout, DataConfig
from nano416.dataset import TokenDataset
from nano416.devices import supports_bf16
from nano416.evaluate import LossOptions, evaluate_loss
from nano416.scoring import is_bidirectional
from nano416.tokenizer import Tokenizer


@dataclass(frozen=True)
class EvalLossConfig:
    """Validation loss of a checkpoint."""

    checkpoint: str  # file, run directory or Hub id
    sources: dict[str, float] = field(default_factory=lambda: DataConfig().sources)  # shard folders: a,b
    eval_tokens: int = 5_000_000  # most validation tokens per source
    batch_size: int = 8  # sequences per device and forward pass
    dtype: Literal["bf16", "fp32"] | None = None  # precision of matmuls; none = bf16 where it is faster
    num_mc: int | None = None  # masked diffusion: Monte Carlo samples per sequence; none = 1, as in training

    def __post_init__(self):
        for name in ("eval_tokens", "batch_size", "num_mc"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


def open_dataset(source: str, checkpoint_path: str, tokenizer: Tokenizer) -> TokenDataset:
    """Open a shard folder. Raises ValueError unless its tokens are those of the checkpoint's tokenizer."""
    dataset = TokenDataset(source)
    expected = tokenizer.info()
    actual = dataset.tokenizer
    # Not the names: a tokenizer.json may change or move.
    if any(actual[key] != expected[key] for key in ("sha256", "vocab_size", "eot_id")):
        raise ValueError(
            f"{source} holds tokens of {actual['name']} (vocabulary {str(actual['sha256'])[:12]}), {checkpoint_path} "
            f"reads {expected['name']} ({expected['sha256'][:12]}); prepare the text again with "
            f"--tokenizer={expected['name']}"
        )
    return dataset


def format_table(row: dict[str, float | None], sources: list[str]) -> str:
    """A table of what evaluate_loss returned: one line per source if there are several, then the averages."""
    lines = [f"{'':24}{'loss':>10}{'perplexity':>12}{'bits per byte':>15}"]
    several = len(sources) > 1
    values = {name: (row[f"val_loss/{name}"], row[f"val_bpb/{name}"]) for name in sources if several}
    values["all tokens (micro)"] = (row["val_loss"], row["val_bpb"])
    if several:
        values["sources (macro)"] = (row["val_macro_loss"], None)
    for name, (loss, bpb) in values.items():
        assert loss is not None
        bpb_text = "" if bpb is None else f"{bpb:15.4f}"
        # e^50 keeps the column in its width.
        lines.append(f"{name:24}{loss:10.4f}{math.exp(min(loss, 50)):12.3f}{bpb_text}")
    return "\n".join(lines)


def main(cfg: EvalLossConfig) -> None:
    """Evaluate in one process or under torchrun, and print the table."""
    dist = distributed.init()
    model, tokenizer, metadata = checkpoint.load_model_and_tokenizer(cfg.checkpoint, dist.device)
    datasets = {source: open_dataset(source, metadata["path"], tokenizer) for source in cfg.sources}
    if cfg.num_mc is not None and not is_bidirectional(model):
        raise ValueError("--num_mc has no effect on an autoregressive model; leave it out")
    use_bf16 = supports_bf16(dist.device) if cfg.dtype is None else cfg.dtype == "bf16"
    options = LossOptions(cfg.eval_tokens, torch.bfloat16 if use_bf16 else None, cfg.num_mc or 1)
    layout = BatchLayout(cfg.batch_size * dist.dp_size, cfg.batch_size, dist.dp_rank, dist.dp_size)
    row = evaluate_loss(model, datasets, tokenizer, layout, options)
    if dist.is_main:
        table = format_table(row, list(cfg.sources))
        print(visible(f"{metadata['path']}, step {metadata['step']:,}\n{table}"))
    distributed.shutdown()


if __name__ == "__main__":
    run_cli(lambda: main(parse_config(EvalLossConfig)))
