"""Log-likelihoods of endings after contexts: many in one forward pass, shared by all ranks.

    rows = [row for i, (context, endings) in enumerate(questions) for row in fit(i, context, endings, longest_row(model))]
    for row, sums, greedy in score_rows(model, rows): ...   # nats of each of row.endings, which begin with row.first

Endings that share a context are one row of a batch, where each sees the context and its own past: the context is
computed once. model: a Transformer or anything with its `hidden` and `head`. A masked-diffusion model scores an ending
in passes of its own, as diffusion.py says.
"""

# Tensor dimensions: B batch, T tokens, D dim, V vocabulary; U scored positions, W endings of a row, at most

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import distributed

BATCH_TOKENS = {"cpu": 2048, "cuda": 32_768}  # tokens forwarded at once, padding included
HEAD_ROWS = {"cpu": 128, "cuda": 4096}  # rows of logits held at once; a CPU reuses 25 MB, but maps 50 MB anew each time


class Row(NamedTuple):
    """One line of a batch: a context and the endings that share it."""

    item: int  # index into the items
    first: int  # number of its first ending
    context: list[int]
    endings: list[list[int]]
    cut_contexts: int = 0  # 1 where the context lost tokens on its left
    cut_endings: int = 0  # how many endings did

    @property
    def length(self) -> int:
        return len(self.context) + sum(len(ending) - 1 for ending in self.endings)


DUMMY = Row(-1, 0, [0], [[0]])  # for a rank that has no batch left while others have
Scores = list[tuple[Row, list[float], list[bool]]]  # of each ending: log-likelihood in nats, is it the greedy one?


def sees_both_sides(model: Any) -> bool:
    """A masked-diffusion model, then."""
    return not getattr(model.config, "causal", True)


def longest_row(model: Any) -> int:
    """Tokens of a row: an ending's last one is only predicted, but a model that sees both sides reads it, too, masked."""
    return model.config.seq_len - sees_both_sides(model)


def fit(index: int, context: list[int], endings: list[list[int]], seq_len: int, share: bool = True) -> Iterator[Row]:
    """All endings in one row, so that the context is computed once. Where the context must be cut from the left to
    fit seq_len, it is cut for each ending by itself, which takes a row each.
    """
    if not all(endings):
        raise ValueError(f"item {index}: ending {endings.index([])} has no tokens of its own after its context")
    if share and len(context) + max(map(len, endings)) - 1 <= seq_len:
        yield Row(index, 0, context, endings)
        return
    for number, ending in enumerate(endings):
        kept = ending[-seq_len:]
        start = max(0, len(context) + len(kept) - 1 - seq_len)
        yield Row(index, number, context[start:], [kept], int(start > 0), int(len(kept) < len(ending)))


def batches_of(rows: list[Row], batch_tokens: int) -> Iterator[list[Row]]:
    """Rows of similar length together, longest first, so that little is padding and memory peaks at once."""
    batch: list[Row] = []
    for row in sorted(rows, key=lambda row: (-row.length, row.item, row.first)):
        if batch and (len(batch) + 1) * batch[0].length > batch_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def score_rows(
    model: Any,
    rows: list[Row],
    dtype: torch.dtype | None = None,
    progress: bool = False,
    scoring: dict[str, Any] | None = None,
) -> Scores:
    """Score the endings of all rows; every rank gets them all. scoring: options of diffusion.log_likelihood, for a
    model that sees both sides.

    Ranks take whole batches in turn: the batches, hence the scores, are the same for any number of ranks, and all
    ranks make as many forward passes (a sharded model would wait for the missing one).
    """
    if not rows:
        return []
    if sees_both_sides(model):
        return score_masked(model, rows, dtype, progress, scoring or {})
    device = next(model.parameters()).device
    budget = min(BATCH_TOKENS[device.type], getattr(model, "max_batch_tokens", 1 << 30))
    batches = distributed.share(list(batches_of(rows, budget)), filler=[DUMMY])
    was_training = model.training
    model.eval()
    with torch.no_grad(), cast(device, dtype):  # not inference_mode: in it autocast casts the weights for every batch
        quiet = None if progress else True  # None: unless it is a terminal
        scores = [score(model, batch, device) for batch in tqdm(batches, unit="batch", disable=quiet)]
    model.train(was_training)
    mine = [row for batch in batches for row in batch]
    counts = [len(row.endings) for row in mine]
    sums, greedy = (torch.cat(part).cpu().split(counts) for part in zip(*scores, strict=True))
    found = [(row, s.tolist(), g.tolist()) for row, s, g in zip(mine, sums, greedy, strict=True) if row is not DUMMY]
    return [x for part in distributed.gather_shares(found) for x in part]


def score_masked(
    model: Any, rows: list[Row], dtype: torch.dtype | None, progress: bool, scoring: dict[str, Any]
) -> Scores:
    """`score_rows` for masked diffusion: the ways to mask one ending are a batch. All ranks make as many passes."""
    import diffusion

    device = next(model.parameters()).device
    options = {**scoring, "batch_tokens": BATCH_TOKENS[device.type]}
    rows = sorted(rows, key=lambda row: (-row.length, row.item, row.first))
    shares = [rows[rank :: distributed.world_size()] for rank in range(distributed.world_size())]
    passes = [
        sum(diffusion.passes(len(row.context), len(ending), **options) for row in share for ending in row.endings)
        for share in shares
    ]
    found = []
    with torch.no_grad(), cast(device, dtype):
        for row in tqdm(shares[distributed.rank()], unit="row", disable=None if progress else True):
            parts = [
                diffusion.log_likelihood(model, row.context, ending, **options, seed=(row.item, number))
                for number, ending in enumerate(row.endings, row.first)
            ]
            found.append((row, [values.sum().item() for values, _ in parts], [greedy for _, greedy in parts]))
        for _ in range(max(passes) - passes[distributed.rank()]):  # a sharded model waits for all ranks in each pass
            model.hidden(torch.zeros(1, 1, dtype=torch.long, device=device))
    return [x for part in distributed.gather(found) for x in part]


def score(model: Any, rows: list[Row], device: torch.device) -> tuple[Tensor, Tensor]:
    """Log-likelihood (nats, fp64) and greediness of each ending of each row, in order: one forward pass, logits only
    where an ending is scored, nothing waits for the device.
    """
    packed, at, targets, owner = (x.to(device, non_blocking=True) for x in pack(rows))
    tokens, positions, segments = packed  # [B, T] each
    same = (segments[:, None, :] == segments[:, :, None]) | (segments[:, None, :] == 0)  # [B, T, T]
    mask = same.tril()[:, None]  # [B, 1, T, T]: the context and the ending's own past
    hidden = model.hidden(tokens, positions=positions, mask=mask).flatten(0, 1)[at]  # [U, D]
    n = HEAD_ROWS[device.type]
    parts = [_logprobs(model, h, t) for h, t in zip(hidden.split(n), targets.split(n), strict=True)]
    logprobs, best = (torch.cat(part).flatten() for part in zip(*parts, strict=True))  # [U*W]
    n_endings = sum(len(row.endings) for row in rows)
    sums = logprobs.new_zeros(n_endings + 1, dtype=torch.float64).index_add_(0, owner.flatten(), logprobs.double())
    misses = sums.new_zeros(n_endings + 1).index_add_(0, owner.flatten(), (~best).double())
    return sums[:-1], misses[:-1] == 0


def pack(rows: list[Row]) -> list[Tensor]:
    """tokens, positions and segments [3, B, T]; at [U], targets [U, W], owner [U, W].

    segments: 0 the context (and padding), 1.. the endings. at: the flat positions that are scored; targets: what is to
    be predicted there (the context's last token has one target per ending); owner: of which ending among all.
    """
    B, T, W = len(rows), max(row.length for row in rows), max(len(row.endings) for row in rows)
    U = sum(row.length - len(row.context) + 1 for row in rows)
    packed = np.zeros((3, B, T), dtype=np.int64)
    targets, owner = np.zeros((U, W), dtype=np.int64), np.full((U, W), sum(len(row.endings) for row in rows))
    at: list[int] = []
    ending_id = 0
    for b, row in enumerate(rows):
        C, start, u = len(row.context), len(row.context), len(at)
        packed[0, b, :C], packed[1, b, :C] = row.context, range(C)
        at += range(b * T + C - 1, b * T + row.length)
        for segment, ending in enumerate(row.endings, 1):
            end, v = start + len(ending) - 1, u + 1 + start - C  # the last token is only predicted
            packed[0, b, start:end], packed[1, b, start:end] = ending[:-1], range(C, C + end - start)
            packed[2, b, start:end] = segment
            targets[u, segment - 1], targets[v : v + end - start, 0] = ending[0], ending[1:]
            owner[u, segment - 1] = owner[v : v + end - start, 0] = ending_id
            start, ending_id = end, ending_id + 1
    tensors = [torch.from_numpy(x) for x in (packed, np.array(at), targets, owner)]
    return [x.pin_memory() for x in tensors] if torch.cuda.is_available() else tensors


def _logprobs(model: Any, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """log p(target) in fp32 and whether the target is the likeliest, both [u, W], for hidden states [u, D]."""
    logits = model.head(hidden).float()  # [u, V]
    chosen, top = logits.gather(-1, targets), logits.amax(-1, keepdim=True)
    torch.softmax(logits, -1, out=logits)  # in place: memory is what a CPU waits for here
    return chosen - top + logits.amax(-1, keepdim=True).log(), chosen >= top  # the likeliest one has e^0 / sum


def cast(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager:
    """Matmuls in `dtype`; None changes nothing."""
    return torch.autocast(device.type, dtype) if dtype is not None else contextlib.nullcontext()
