"""Log-likelihoods of endings after contexts, batched and split over ranks.

    rows = list(pack_context(0, context, endings, max_row_length(model)))
    for row, logprobs, is_greedy in score_rows(model, rows): ...

Endings that share a context are packed into one row of a batch. A block mask lets each ending see the context and its
own past only, so the context is computed once. The model is a Transformer, or any module with the same `hidden`, `head`
and `config.seq_len`. A masked-diffusion model scores every ending separately, with nano416/diffusion.py.
"""

# Tensor dimensions: B batch (rows), T tokens, D dim, V vocabulary, U scored positions, W most endings of a row

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from model import Transformer
from nano416 import distributed
from nano416.devices import autocast

# Tokens per forward pass, padding included.
CPU_BATCH_TOKENS = 2048
GPU_BATCH_TOKENS = 32_768
# Rows of logits in memory at once. On a CPU 128 rows of GPT-2's vocabulary (25 MB) reuse memory that was freed before,
# while glibc would request 50 MB from the system anew for each batch.
CPU_LOGIT_ROWS = 128
GPU_LOGIT_ROWS = 4096


@dataclass(frozen=True)
class ScoringConfig:
    """How to score. All but the last two concern masked-diffusion models; see diffusion.log_likelihood."""

    likelihood: Literal["chain", "mc", "counts"] = "chain"
    num_mc: int = 32  # Monte Carlo samples per ending, for mc and counts
    guidance: float = 0.0  # classifier-free guidance, away from the ending without its context
    progress: bool = False  # show a progress bar, if stderr is a terminal
    between_batches: Callable[[], object] = lambda: None  # called equally often on every rank; what it raises ends it


class Row(NamedTuple):
    """One row of a batch: a context and the endings that share it."""

    item: int  # index of the question
    first: int  # index of the row's first ending among the question's endings
    context: list[int]
    endings: list[list[int]]
    truncated_contexts: int = 0  # 1 if the context lost tokens on its left
    truncated_endings: int = 0  # number of endings that lost tokens on their left

    @property
    def length(self) -> int:
        """Tokens that the model reads: an ending's last token is only predicted."""
        return len(self.context) + sum(len(ending) - 1 for ending in self.endings)


# A row, and for each of its endings: log-likelihood in nats, and whether greedy decoding would produce it.
Scores = list[tuple[Row, list[float], list[bool]]]

# Fills a batch of the ranks that have one batch fewer than the others.
DUMMY = Row(-1, 0, [0], [[0]])


def is_bidirectional(model: Transformer) -> bool:
    """True for a masked-diffusion model."""
    # Models of transformers have no `causal` in their config.
    return not getattr(model.config, "causal", True)


def max_row_length(model: Transformer) -> int:
    """Most tokens of a row. A masked-diffusion model also reads the last token of an ending, as a mask."""
    return model.config.seq_len - (1 if is_bidirectional(model) else 0)


def pack_context(
    item: int, context: list[int], endings: list[list[int]], seq_len: int, share_context: bool = True
) -> Iterator[Row]:
    """Yield the rows of one question: a single row if its context fits with the longest ending, else one per ending.

    A context is truncated on the left to fit seq_len, by as much as each ending needs; hence the row per ending.
    Raises ValueError for an ending without tokens.
    """
    if not all(endings):
        raise ValueError(f"item {item}: ending {endings.index([])} adds no token to its context; remove the item")
    longest = max(len(ending) for ending in endings)
    if share_context and len(context) + longest - 1 <= seq_len:
        yield Row(item, 0, context, endings)
        return
    for i, ending in enumerate(endings):
        kept = ending[-seq_len:]
        start = max(0, len(context) + len(kept) - 1 - seq_len)
        yield Row(item, i, context[start:], [kept], int(start > 0), int(len(kept) < len(ending)))


def score_rows(
    model: Transformer, rows: list[Row], dtype: torch.dtype | None = None, scoring: ScoringConfig | None = None
) -> Scores:
    """Score the endings of all rows with matmuls in `dtype`, and return all scores on every rank.

    Whole batches are dealt out to the ranks, so that batches, and with them the scores, do not depend on the number of
    ranks. All ranks make the same number of forward passes: a sharded model would wait forever for a missing one.
    """
    if not rows:
        return []
    scoring = scoring or ScoringConfig()
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    # Not inference_mode: autocast does not cache its casts there, and would cast the weights in every batch.
    with torch.no_grad(), autocast(device, dtype):
        if is_bidirectional(model):
            scores = _score_masked_diffusion(model, rows, device, scoring)
        else:
            scores = _score_autoregressive(model, rows, device, scoring)
    model.train(was_training)
    return scores


def _score_autoregressive(model: Transformer, rows: list[Row], device: torch.device, scoring: ScoringConfig) -> Scores:
    max_tokens = CPU_BATCH_TOKENS if device.type == "cpu" else GPU_BATCH_TOKENS
    # eval_hellaswag.HuggingFaceModel has a lower limit, since it computes the logits of all positions.
    max_tokens = min(max_tokens, getattr(model, "max_batch_tokens", max_tokens))
    batches = distributed.shard_list(list(make_batches(rows, max_tokens)), filler=[DUMMY])
    results = []
    # tqdm(disable=None) shows the bar only on a terminal.
    for batch in tqdm(batches, unit="batch", disable=not scoring.progress or None):
        scoring.between_batches()
        results.append(score_batch(model, batch, device))
    my_rows = [row for batch in batches for row in batch]
    counts = [len(row.endings) for row in my_rows]
    # Copied to the host once, after all batches, so that nothing waits for the device in between.
    logprobs = torch.cat([result[0] for result in results]).cpu().split(counts)
    greedy = torch.cat([result[1] for result in results]).cpu().split(counts)
    scores = [(row, a.tolist(), b.tolist()) for row, a, b in zip(my_rows, logprobs, greedy) if row is not DUMMY]
    return [score for part in distributed.all_gather_dp(scores) for score in part]


def _score_masked_diffusion(
    model: Transformer, rows: list[Row], device: torch.device, scoring: ScoringConfig
) -> Scores:
    """Score row by row, where the masked copies of an ending form a batch."""
    from nano416 import diffusion

    batch_tokens = CPU_BATCH_TOKENS if device.type == "cpu" else GPU_BATCH_TOKENS
    cfg = diffusion.LikelihoodConfig(scoring.likelihood, scoring.num_mc, scoring.guidance, batch_tokens)
    padded = distributed.shard_list(sorted(rows, key=_longest_first), filler=DUMMY)
    my_rows = [row for row in padded if row is not DUMMY]
    n_passes = 0
    for row in my_rows:
        for ending in row.endings:
            n_passes += diffusion.num_forward_passes(len(row.context), len(ending), cfg)
    # Before the first pass: a rank that waits here could not take part in the passes of a sharded model.
    [most_passes] = distributed.all_reduce_max([n_passes])
    scores = []
    for row in tqdm(padded, unit="row", disable=not scoring.progress or None):
        # Ranks make different numbers of passes per row, and those of a sharded model wait for each other in each.
        if not distributed.is_sharded(model):
            scoring.between_batches()
        if row is DUMMY:
            continue
        logprobs = []
        greedy = []
        for i, ending in enumerate(row.endings, row.first):
            values, is_greedy = diffusion.log_likelihood(model, row.context, ending, cfg, seed=(row.item, i))
            logprobs.append(values.sum().item())
            greedy.append(is_greedy)
        scores.append((row, logprobs, greedy))
    for _ in range(most_passes - n_passes):
        model.hidden(torch.zeros(1, 1, dtype=torch.long, device=device))
    return [score for part in distributed.all_gather_dp(scores) for score in part]


def _longest_first(row: Row) -> tuple[int, int, int]:
    return -row.length, row.item, row.first


def make_batches(rows: list[Row], max_tokens: int) -> Iterator[list[Row]]:
    """Yield batches of at most `max_tokens` tokens, or of one row.

    Rows of similar length are batched together, which keeps padding low. The longest come first, so that a batch too
    large for the memory fails at once.
    """
    batch: list[Row] = []
    for row in sorted(rows, key=_longest_first):
        if batch and (len(batch) + 1) * batch[0].length > max_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def score_batch(model: Transformer, rows: list[Row], device: torch.device) -> tuple[Tensor, Tensor]:
    """Score a batch in one forward pass: log-likelihood (nats, fp64) and greediness of all endings, in order."""
    batch = PackedBatch(*(tensor.to(device, non_blocking=True) for tensor in pack_rows(rows)))
    same_segment = batch.segments[:, :, None] == batch.segments[:, None, :]  # [B, T, T]
    is_context = batch.segments[:, None, :] == 0  # [B, 1, T]
    # tril: of the context and its own segment, a position sees only what comes before it.
    mask = (same_segment | is_context).tril()[:, None]  # [B, 1, T, T]
    hidden = model.hidden(batch.tokens, positions=batch.positions, mask=mask)  # [B, T, D]
    # Most positions of a row belong to the context, whose logits nobody needs.
    hidden = hidden.flatten(0, 1)[batch.scored]  # [U, D]
    n = CPU_LOGIT_ROWS if device.type == "cpu" else GPU_LOGIT_ROWS
    results = [target_logprobs(model, h, t) for h, t in zip(hidden.split(n), batch.targets.split(n))]
    logprobs = torch.cat([result[0] for result in results]).flatten()  # [U * W]
    is_best = torch.cat([result[1] for result in results]).flatten()  # [U * W]

    # In fp64, since the rounding errors of long endings would add up. The last sum collects the unused targets.
    n_endings = sum(len(row.endings) for row in rows)
    owners = batch.owners.flatten()
    sums = torch.zeros(n_endings + 1, dtype=torch.float64, device=device).index_add_(0, owners, logprobs.double())
    misses = torch.zeros_like(sums).index_add_(0, owners, (~is_best).double())
    return sums[:-1], misses[:-1] == 0


def target_logprobs(model: Transformer, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return log p(target) in fp32 and whether the target is the argmax, both [u, W], for hidden states [u, D]."""
    logits = model.head(hidden).float()  # [u, V]
    chosen = logits.gather(-1, targets)
    top = logits.amax(-1, keepdim=True)
    # Softmax in place, because a CPU waits for memory here. Its largest value is e^0 / sum, which gives the normalizer.
    torch.softmax(logits, -1, out=logits)
    return chosen - top + logits.amax(-1, keepdim=True).log(), chosen >= top


class PackedBatch(NamedTuple):
    """What one forward pass reads and predicts."""

    tokens: Tensor  # [B, T]
    positions: Tensor  # [B, T]
    segments: Tensor  # [B, T]: 0 = context and padding, 1, 2, ... = the row's endings
    scored: Tensor  # [U]: flat indices of the positions that predict something
    targets: Tensor  # [U, W]: what they predict; a context's last token predicts the first token of every ending
    owners: Tensor  # [U, W]: the ending that a target belongs to, counted over all rows; n_endings = unused


def pack_rows(rows: list[Row]) -> PackedBatch:
    """Lay out rows as tensors, in pinned memory if there is a GPU to copy them to."""
    B = len(rows)
    T = max(row.length for row in rows)
    W = max(len(row.endings) for row in rows)
    U = sum(row.length - len(row.context) + 1 for row in rows)
    n_endings = sum(len(row.endings) for row in rows)
    tokens, positions, segments = np.zeros((3, B, T), dtype=np.int64)
    scored = np.zeros(U, dtype=np.int64)
    targets = np.zeros((U, W), dtype=np.int64)
    owners = np.full((U, W), n_endings, dtype=np.int64)

    u = 0
    owner = 0
    for b, row in enumerate(rows):
        n_context = len(row.context)
        tokens[b, :n_context] = row.context
        positions[b, :n_context] = np.arange(n_context)
        scored[u] = b * T + n_context - 1
        targets[u, : len(row.endings)] = [ending[0] for ending in row.endings]
        owners[u, : len(row.endings)] = np.arange(owner, owner + len(row.endings))
        u += 1
        start = n_context
        for segment, ending in enumerate(row.endings, 1):
            n = len(ending) - 1
            tokens[b, start : start + n] = ending[:-1]
            positions[b, start : start + n] = np.arange(n_context, n_context + n)
            segments[b, start : start + n] = segment
            scored[u : u + n] = np.arange(b * T + start, b * T + start + n)
            targets[u : u + n, 0] = ending[1:]
            owners[u : u + n, 0] = owner
            start += n
            u += n
            owner += 1
    tensors = [torch.from_numpy(array) for array in (tokens, positions, segments, scored, targets, owners)]
    if torch.cuda.is_available():
        tensors = [tensor.pin_memory() for tensor in tensors]
    return PackedBatch(*tensors)
