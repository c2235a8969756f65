"""Validation loss of a model: nats per token, bits per byte, per source.

datasets = {"data/edu": TokenDataset("data/edu")}
row = evaluate_loss(model, datasets, tokenizer, layout, LossOptions(max_tokens=5_000_000))
row["val_loss"], row["val_bpb"]
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from model import Transformer
from nano416 import distributed
from nano416.dataloader import BatchLayout, validation_batches
from nano416.dataset import TokenDataset
from nano416.devices import autocast
from nano416.tokenizer import Tokenizer


@dataclass(frozen=True)
class LossOptions:
    """How much to evaluate, and in which precision."""

    max_tokens: int | None = None  # per source; none = all
    dtype: torch.dtype | None = None  # of matmuls; none = the weights' own
    num_mc: int = 1  # masked diffusion: draws per sequence
    between_batches: Callable[[], object] = lambda: None  # called equally often on every rank; what it raises ends it


def evaluate_loss(
    model: Transformer,
    datasets: dict[str, TokenDataset],
    tokenizer: Tokenizer | None,
    layout: BatchLayout,
    options: LossOptions,
) -> dict[str, float | None]:
    """Validation loss (nats per token) and bits per byte (None without a tokenizer) over the val splits, on all ranks.

    val_loss is the average over all tokens. Of several sources the row also has each one's val_loss/NAME and
    val_bpb/NAME, and val_macro_loss, the average over sources.
    """
    sums = {name: _sum_losses(model, dataset, tokenizer, layout, options) for name, dataset in datasets.items()}
    total = torch.stack(list(sums.values())).sum(0)
    row: dict[str, float | None] = {"val_loss": _loss_per_token(total), "val_bpb": _bits_per_byte(total)}
    if len(sums) > 1:
        row |= {f"val_loss/{name}": _loss_per_token(source) for name, source in sums.items()}
        row |= {f"val_bpb/{name}": _bits_per_byte(source) for name, source in sums.items()}
        row["val_macro_loss"] = sum(map(_loss_per_token, sums.values())) / len(sums)
    return row


@torch.no_grad()
def _sum_losses(
    model: Transformer,
    dataset: TokenDataset,
    tokenizer: Tokenizer | None,
    layout: BatchLayout,
    options: LossOptions,
) -> Tensor:
    """[sum of losses in nats, tokens, bytes] of one val split over all ranks, fp64."""
    # Not the weights' device: with --cpu_offload they lie in host memory.
    device = model.rope_cos.device
    token_bytes = torch.from_numpy(tokenizer.byte_lengths()) if tokenizer else None
    sums = torch.zeros(3, dtype=torch.float64)
    batches = validation_batches(dataset, model.config.seq_len, layout, options.max_tokens)
    for number, (tokens, targets) in enumerate(batches):
        options.between_batches()
        # Targets beyond the data are -100.
        counted = targets >= 0
        n_tokens = int(counted.sum())
        n_bytes = int(token_bytes[targets[counted]].sum()) if token_bytes is not None else 0
        with autocast(device, options.dtype):
            if model.config.causal:
                # An empty batch runs through the model too, since sharded ranks wait for each other in every pass. It
                # gets any targets: the mean over none is NaN, and 0 times NaN too.
                loss_targets = targets if n_tokens else tokens
                loss = n_tokens * model(tokens.to(device), loss_targets.to(device)).item()
            else:
                # Here, because autoregressive runs never need it.
                from nano416 import diffusion

                first = (number * layout.dp_size + layout.dp_rank) * layout.batch_size
                loss = diffusion.nelbo(model, targets.to(device), first, options.num_mc).item()
        # fp64: fp32 would round sums over millions of tokens.
        sums += torch.tensor([loss, n_tokens, n_bytes], dtype=torch.float64)
    return distributed.all_reduce_sum(sums.to(device)).cpu()


def _loss_per_token(sums: Tensor) -> float:
    loss, n_tokens, _ = sums.tolist()
    return loss / n_tokens


def _bits_per_byte(sums: Tensor) -> float | None:
    # Losses per token depend on how much text a token covers; this one compares models of different tokenizers.
    loss, _, n_bytes = sums.tolist()
    return loss / n_bytes / math.log(2) if n_bytes else None
