"""Masked diffusion: mask a batch, score a text, fill a text; and what is tried to make autoregression overfit less.

    loss = model(**corrupt(inputs, targets, numbers, "mdm", DiffusionConfig(), ...))   # training.py
    bound = nelbo(model, text, first=0, num_mc=1)                    # nats of whole sequences, comparable with AR's loss
    values, greedy = log_likelihood(model, context, ending)          # nats per token of an ending
    for text in fill(model, prompt, 64, steps=32): ...               # each step of an answer, MASK where it is still open

A network that sees both sides (causal = false) learns to restore masked tokens. The noise level t is uniform, each token
is masked with probability p = (1 - EPS) t + EPS, the loss is the sum over masked tokens of cross entropy / p, divided by
all tokens: an upper bound on the negative log-likelihood per token (MDLM, arXiv:2406.07524; LLaDA, arXiv:2502.09992), as
trained in "Diffusion Beats Autoregressive in Data-Constrained Settings" (arXiv:2507.15857). MASK is the token vocab_size,
in the padding of the embedding: it can be read and is never predicted.

All noise is a function of the seed and of the sequence's number in the run: the same on any number of processes, and
after a resume.
"""

# Tensor dimensions: B batch, T tokens, V vocabulary, M draws, K ways to mask an ending, E its tokens, U scored positions

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from model import IGNORED, Transformer, sample

Objective = Literal["ar", "mdm"]
Likelihood = Literal["chain", "mc", "counts"]
Remasking = Literal["low_confidence", "random"]
EPS = 1e-3  # least probability of being masked: bounds the weights 1/p
LOW_NOISE = 0.5  # factor of t during low_noise_start
VALIDATION_SEED = 0  # the noise of a validation never changes, so that two of them differ by the model alone
GOLDEN = 0.6180339887498949  # multiples of it, modulo 1, fill [0, 1) evenly for any number of them
HEAD_ROWS = 512  # rows of logits that exist at once in scoring


@dataclass(frozen=True)
class DiffusionConfig:
    """Noise: of masked diffusion (mdm), and of what is tried to make autoregression (ar) overfit less."""

    num_mc: int = 1  # mdm: draws per validation sequence; more are slower and less noisy
    stratified: bool = False  # mdm: noise levels spread evenly over the sequences of a step, not independent
    low_noise_start: int = 0  # mdm: steps with half the noise at the beginning (1000 in arXiv:2507.15857's code)
    random_length: float = 0.0  # mdm: share of sequences cut to a random length (0.01 in LLaDA)
    ar_ratio: float = 0.0  # mdm: share of sequences masked at their end instead of at random
    num_orders: int = 0  # ar: read each sequence in one of so many orders of its tokens; 0 = left to right
    predefined_orders: bool = False  # ar: order i moves tokens by about i places; false = random permutations
    randmask_ratio: float = 0.0  # ar: share of tokens that see only a random part of those before them
    attention_dropout: float = 0.0  # share of attention weights dropped in training

    def __post_init__(self):
        limits = {
            "num_mc must be at least 1": self.num_mc >= 1,
            "low_noise_start must not be negative": self.low_noise_start >= 0,
            "num_orders must not be negative": self.num_orders >= 0,
            "random_length must be in [0, 1]": 0 <= self.random_length <= 1,
            "ar_ratio must be in [0, 1]": 0 <= self.ar_ratio <= 1,
            "randmask_ratio must be in [0, 1]": 0 <= self.randmask_ratio <= 1,
            "attention_dropout must be in [0, 1)": 0 <= self.attention_dropout < 1,
        }
        for rule, holds in limits.items():
            if not holds:
                raise ValueError(f"{rule}, got {getattr(self, rule.split()[0])}")
        if self.predefined_orders and self.num_orders < 2:
            raise ValueError(f"predefined_orders has no effect with num_orders={self.num_orders}; set it to 2 or more")


OF_OBJECTIVE = {
    "mdm": ("num_mc", "stratified", "low_noise_start", "random_length", "ar_ratio"),
    "ar": ("num_orders", "predefined_orders", "randmask_ratio"),
}


def check(cfg: DiffusionConfig, objective: Objective) -> None:
    """Raise ValueError for an option that has no effect with the objective."""
    default = DiffusionConfig()
    for other, names in OF_OBJECTIVE.items():
        for name in names:
            if other != objective and getattr(cfg, name) != getattr(default, name):
                raise ValueError(f"{name} has no effect with --objective={objective}; leave it out or train {other}")


# ---- Training --------------------------------------------------------------------------------------------------------


def corrupt(
    inputs: Tensor,
    targets: Tensor,
    numbers: Sequence[int],
    objective: Objective,
    cfg: DiffusionConfig,
    *,
    mask_id: int,
    seed: int,
    batch_sequences: int,
) -> dict[str, Any]:
    """What to call the model with, for inputs [B, T], the next tokens targets [B, T] and their sequences' numbers.

    batch_sequences: sequences per optimizer step, from which a number's step follows.
    """
    call: dict[str, Any] = {"tokens": inputs, "targets": targets}
    if objective == "mdm":
        call = mask_tokens(inputs, numbers, cfg, mask_id=mask_id, seed=seed, batch_sequences=batch_sequences)
    elif cfg.num_orders:
        call = reorder(inputs, targets, numbers, cfg, seed)
    if cfg.randmask_ratio:
        call["mask"] = partly_blind(numbers, inputs.shape[1], cfg.randmask_ratio, seed, inputs.device)
    return call | ({"attention_dropout": cfg.attention_dropout} if cfg.attention_dropout else {})


def mask_tokens(
    tokens: Tensor, numbers: Sequence[int], cfg: DiffusionConfig, *, mask_id: int, seed: int, batch_sequences: int
) -> dict[str, Tensor]:
    """Noisy tokens, targets at the masked ones, and weights 1/p whose expectation over masked and not is 1 per token."""
    T, device = tokens.shape[1], tokens.device
    drawn = uniform(numbers, 4 + T, seed, device)
    t, is_suffix, is_short, length = drawn[:, :4, None].unbind(1)  # [B, 1] each
    if cfg.stratified:
        t = torch.tensor([[spread_level(n, seed, batch_sequences)] for n in numbers], device=device)
    if cfg.low_noise_start:
        early = torch.tensor([[n // batch_sequences < cfg.low_noise_start] for n in numbers], device=device)
        t = torch.where(early, LOW_NOISE * t, t)
    p, at = (1 - EPS) * t + EPS, torch.arange(T, device=device)
    ends = torch.where(is_short < cfg.random_length, 1 + (length * T).long(), T)  # [B, 1]; T unless cut
    masked = (drawn[:, 4:] < p) & (at < ends)
    if cfg.ar_ratio:  # as many at the end; by position, because the slice [-0:] would take them all
        suffix = (at >= ends - masked.sum(1, keepdim=True)) & (at < ends)
        masked = torch.where(is_suffix < cfg.ar_ratio, suffix, masked)
    call = {
        "tokens": tokens.masked_fill(masked, mask_id),
        "targets": tokens.masked_fill(~masked, IGNORED),
        "loss_weights": (T / ends / p).expand(-1, T),  # every sequence counts alike, a cut one too
    }
    return call | ({"mask": (at < ends)[:, None, None]} if cfg.random_length else {})


def uniform(numbers: Sequence[int], width: int, seed: int, device: torch.device) -> Tensor:
    """[B, width] in [0, 1): a row per sequence number. Drawn on the CPU, so the same on every device."""
    rows = [np.random.default_rng((seed, number)).random(width, dtype=np.float32) for number in numbers]
    drawn = torch.from_numpy(np.stack(rows))
    return (drawn.pin_memory() if device.type == "cuda" else drawn).to(device, non_blocking=True)


def spread_level(number: int, seed: int, batch_sequences: int) -> float:
    """The noise level of a sequence: those of one step lie 1/batch_sequences apart (VDM, arXiv:2107.00630, I.1)."""
    step, place = divmod(number, batch_sequences)
    return (np.random.default_rng((seed, step, 1)).random() + place / batch_sequences) % 1


def reorder(inputs: Tensor, targets: Tensor, numbers: Sequence[int], cfg: DiffusionConfig, seed: int) -> dict[str, Any]:
    """Each sequence in one of num_orders orders: the first token stays, each knows its own place, not that of its target."""
    whole = torch.cat([inputs, targets[:, -1:]], dim=1)  # [B, T + 1]
    orders = token_orders(inputs.shape[1], cfg.num_orders, cfg.predefined_orders, seed).to(inputs.device)
    which = (uniform(numbers, 1, seed, inputs.device)[:, 0] * cfg.num_orders).long()  # [B]
    places = torch.nn.functional.pad(1 + orders[which], (1, 0))  # [B, T + 1], beginning with 0
    read = whole.gather(1, places)
    return {"tokens": read[:, :-1], "targets": read[:, 1:], "positions": places[:, :-1]}


@lru_cache(maxsize=1)
def token_orders(length: int, count: int, predefined: bool, seed: int) -> Tensor:
    """[count, length]; the first is left to right. predefined: order i sorts places to which noise of deviation i is added."""
    rng, places = np.random.default_rng((seed, 0, 2)), np.arange(length)
    if predefined:
        moved = places + np.arange(count)[:, None] * rng.standard_normal((count, length))
    else:
        moved = np.concatenate([places[None], rng.random((count - 1, length))])
    return torch.from_numpy(moved.argsort(1))


def partly_blind(numbers: Sequence[int], T: int, ratio: float, seed: int, device: torch.device) -> Tensor:
    """Attention mask [B, 1, T, T]: causal, and a share `ratio` of the rows lose each earlier key with a probability p,
    drawn for the row as for masked diffusion. A token always sees itself.
    """
    kept = []
    for number in numbers:
        state = np.random.SeedSequence((seed, number, 3)).generate_state(1, np.uint64)[0]
        generator = torch.Generator(device).manual_seed(int(state >> np.uint64(1)))
        chosen, level, keys = torch.rand(T, T + 2, device=device, generator=generator).split([1, 1, T], dim=1)
        kept.append((chosen >= ratio) | (keys >= (1 - EPS) * level + EPS))
    itself = torch.eye(T, dtype=torch.bool, device=device)
    return (torch.stack(kept).tril() | itself)[:, None]


# ---- Scoring ---------------------------------------------------------------------------------------------------------


def ways_to_mask(n: int, likelihood: Likelihood, num_mc: int, rng: np.random.Generator, level: float | None = None):
    """masked [K, n] and weights [K, n] of n tokens: the sum of weights x log p over the masked ones estimates (mc, counts)
    a lower bound of the log-likelihood, or is (chain) one, exactly.

    chain: K = n, token i is predicted from all before it while it and all after are masked. mc: K = num_mc noise levels,
    1/num_mc apart (arXiv:2107.00630, I.1), tokens masked independently. counts: as mc, but exactly k tokens are masked,
    k uniform in 1..n, which has the same mean without the variance of k (LLaDA, arXiv:2502.09992, eq. 6).
    """
    if likelihood == "chain":
        return np.triu(np.ones((n, n), bool)), np.eye(n)
    levels = ((rng.random() if level is None else level) + np.arange(num_mc) / num_mc) % 1
    order = rng.random((num_mc, n))
    if likelihood == "counts":
        k = 1 + (levels * n).astype(int)[:, None]  # [K, 1]
        order, levels = order.argsort(1).argsort(1), k[:, 0] / n
        masked = order < k
    else:
        masked = order < levels[:, None]
    return masked, masked / (np.maximum(levels, 1e-12)[:, None] * num_mc)


@torch.no_grad()
def nelbo(model: Transformer, clean: Tensor, first: int, num_mc: int) -> Tensor:
    """Estimate the upper bound on the negative log-likelihood of all of clean [B, T] together, in nats.

    Tokens of -100, at the end of a row, are beyond the data: not seen, not scored. first: number of the first row; rows
    of other numbers get other masks, always the same ones. Exact counts, and levels spread evenly over rows and draws.
    """
    counted = clean != IGNORED
    masked, weights = np.zeros((num_mc, *clean.shape), bool), np.zeros((num_mc, *clean.shape), np.float32)
    for row, n in enumerate(counted.sum(1).tolist()):
        number = first + row
        rng = np.random.default_rng((VALIDATION_SEED, number))
        if n:
            masked[:, row, :n], weights[:, row, :n] = ways_to_mask(n, "counts", num_mc, rng, GOLDEN * number % 1)
    seen = counted | ~counted.any(1, keepdim=True)  # a row of filler sees itself: no NaN
    mask = None if seen.all() else seen[:, None, None]
    total = torch.zeros((), device=clean.device)
    for which, weight in zip(torch.from_numpy(masked).to(clean.device), torch.from_numpy(weights).to(clean.device)):
        noisy = clean.clamp(min=0).masked_fill(which, mask_id(model))
        goal = clean.masked_fill(~which, IGNORED)
        total += model(noisy, goal, loss_weights=weight, reduction="sum", mask=mask)
    return total


@torch.no_grad()
def log_likelihood(
    model: Transformer,
    context: list[int],
    ending: list[int],
    likelihood: Likelihood = "chain",
    *,
    num_mc: int = 32,
    guidance: float = 0.0,
    seed: int | tuple[int, ...] = 0,
    batch_tokens: int = 2048,
) -> tuple[Tensor, bool]:
    """(nats [E] of each token of the ending, is it the greedy continuation token by token?); only `chain` knows the latter.

    The ending is masked as `ways_to_mask` says, the context never; batch_tokens are forwarded at once.
    """
    device, C = model.embed_tokens.weight.device, len(context)
    masked, weights = ways_to_mask(len(ending), likelihood, num_mc, np.random.default_rng(seed))
    text, answers = torch.tensor(context + ending, device=device), torch.tensor(ending, device=device)
    values, hits = torch.zeros(len(ending), dtype=torch.float64, device=device), torch.zeros((), device=device)
    rows = max(1, batch_tokens // len(text))
    for start in range(0, len(masked), rows):
        which = torch.from_numpy(masked[start : start + rows]).to(device)  # [B, E]
        weight = torch.from_numpy(weights[start : start + rows]).to(device)
        noisy = text.repeat(len(which), 1)
        noisy[:, C:].masked_fill_(which, mask_id(model))
        at = weight.nonzero() + torch.tensor([0, C], device=device)  # [U, 2]: row, place of what counts
        for (b, place), logits in guided_logits(model, noisy, C, at, guidance):
            logits, token = logits.float().log_softmax(-1), place - C  # [u, V], [u]
            chosen = logits.gather(-1, answers[token, None])[:, 0]
            values.index_add_(0, token, chosen * weight[b, token])
            hits += (chosen >= logits.amax(-1)).sum()
    return values, likelihood == "chain" and int(hits) == len(ending)


def passes(
    context: int, ending: int, likelihood: Likelihood = "chain", *, num_mc=32, batch_tokens=2048, guidance=0.0
) -> int:
    """Forward passes that `log_likelihood` makes for a context and an ending of so many tokens."""
    ways, rows = ending if likelihood == "chain" else num_mc, max(1, batch_tokens // (context + ending))
    return -(-ways // rows) * (2 if guidance else 1)


def guided_logits(
    model: Transformer, tokens: Tensor, prompt_length: int, at: Tensor, guidance: float
) -> Iterator[tuple[tuple[Tensor, Tensor], Tensor]]:
    """((row, place) [u] each, logits [u, vocab_size]) of the places `at` [U, 2] of tokens [B, T], HEAD_ROWS at a time.

    Classifier-free guidance (arXiv:2410.18514, eq. 11): away from the logits of a text whose prompt is masked.
    """
    hidden, blank = model.hidden(tokens), None
    if guidance:
        without = tokens.clone()
        without[:, :prompt_length] = mask_id(model)
        blank = model.hidden(without)
    for part in at.split(HEAD_ROWS):
        place = (part[:, 0], part[:, 1])
        logits = model.head(hidden[place])[:, : model.config.vocab_size]  # not the -inf of padding: it would become NaN
        if blank is not None:
            unguided = model.head(blank[place])[:, : model.config.vocab_size]
            logits = unguided + (1 + guidance) * (logits - unguided)
        yield place, logits


def mask_id(model: Transformer) -> int:
    """The token that stands for "masked": the first one behind the vocabulary."""
    assert model.config.vocab_size and not model.config.causal
    return model.config.vocab_size


# ---- Generation ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def fill(
    model: Transformer,
    prompt: list[int],
    n_tokens: int,
    *,
    steps: int | None = None,
    block_length: int | None = None,
    remasking: Remasking = "low_confidence",
    guidance: float = 0.0,
    seed: int | None = None,
    stop_token: int | None = None,
    **sampling: Any,
) -> Iterator[list[int]]:
    """Yield the n_tokens after `prompt` once per step, open ones as MASK; ends early behind a block with `stop_token`.

    LLaDA's sampler (arXiv:2502.09992, algorithms 4 and 5): blocks from left to right, none = one; each step predicts all
    open tokens of the block and keeps the most confident (or random) of them, the same number in each step.
    steps: forward passes for all blocks together, at least one per block; none = one per token. sampling: model.sample's.
    """
    device, C = model.embed_tokens.weight.device, len(prompt)
    generator = torch.Generator(device).manual_seed(seed) if seed is not None else None
    text = torch.tensor(prompt + [mask_id(model)] * n_tokens, device=device)
    size = min(block_length or n_tokens, n_tokens)
    starts = range(C, len(text), size)
    left = max(len(starts), min(steps or n_tokens, n_tokens))  # steps, of all blocks to come
    for blocks_after, start in zip(reversed(range(len(starts))), starts):
        tokens_left = len(text) - start
        width = min(size, tokens_left)
        share = min(-(-left * width // tokens_left), left - blocks_after)  # of the steps, as of the tokens
        left -= share
        for remaining in range(share, 0, -1):
            masked = start + (text[start : start + width] == mask_id(model)).nonzero()[:, 0]  # [U]
            at = torch.stack([torch.zeros_like(masked), masked], dim=1)
            logits = torch.cat([part.float() for _, part in guided_logits(model, text[None], C, at, guidance)])
            tokens = sample(logits, generator=generator, **sampling)  # [U] of [U, V]
            kept = confidence(logits, tokens, remasking, generator).topk(-(-len(masked) // remaining)).indices
            text[masked[kept]] = tokens[kept]
            yield text[C:].tolist()
        if stop_token is not None and stop_token in text[C : start + width].tolist():
            return


def confidence(logits: Tensor, tokens: Tensor, remasking: Remasking, generator: torch.Generator | None) -> Tensor:
    """[U]: what decides which of the predicted tokens [U] stay."""
    if remasking == "random":
        return torch.rand(len(tokens), generator=generator, device=tokens.device)
    return logits.softmax(-1).gather(-1, tokens[:, None])[:, 0]


def fit(model: Transformer, prompt: list[int], n_tokens: int) -> tuple[list[int], int]:
    """The end of the prompt and the length of the answer that fit the context together; the prompt gets half at most."""
    limit = model.config.seq_len
    n_tokens = min(n_tokens, limit - min(len(prompt), limit // 2))
    return prompt[-(limit - n_tokens) :] if limit > n_tokens else [], n_tokens


def write(model: Transformer, prompt: list[int], n_tokens: int, *, stop_token: int, **options: Any) -> list[int]:
    """The whole answer at once, without what follows `stop_token`; options: those of `fill`."""
    prompt, n_tokens = fit(model, prompt, n_tokens)
    *_, text = fill(model, prompt, n_tokens, stop_token=stop_token, **options)
    return text[: text.index(stop_token)] if stop_token in text else text
