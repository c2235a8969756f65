"""Masked diffusion: mask a batch for training, bound the likelihood of a text, fill in an answer.

    batch = mask_batch(batch, DiffusionConfig(), mask_id, seed, batch_sequences)          # training
    nats = nelbo(model, tokens, first_id=0, num_mc=1)                                     # validation
    values, is_greedy = log_likelihood(model, context, ending, LikelihoodConfig(), seed)  # scoring
    for tokens in denoise(model, prompt, 64, Sampling(), DenoiseConfig(steps=32)): ...    # chat

A bidirectional network (causal = false) learns to restore masked tokens. Each sequence has a noise level t, uniform in
[0, 1); each of its tokens is masked with probability p = (1 - EPS) t + EPS. The loss is the sum over the masked tokens
of cross entropy / p, divided by the number of all tokens: an upper bound on the negative log-likelihood per token
(MDLM, arXiv:2406.07524; LLaDA, arXiv:2502.09992), as trained in "Diffusion Beats Autoregressive in Data-Constrained
Settings" (arXiv:2507.15857). The mask token has id vocab_size, in the padding of the embedding: the network reads it
and never predicts it.

All noise is a function of the seed and of a sequence's number in the run, so it does not depend on the number of
processes and is the same after a resume.
"""

# Tensor dimensions: B batch, T tokens, V vocab_size, K masks per ending, E tokens of the ending, U positions to predict

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from model import IGNORE_INDEX, Transformer
from nano416.dataloader import Batch
from nano416.generate import Sampling, sample

# Smallest probability of being masked, as in LLaDA's code. It bounds the loss weights 1/p by 1,000.
EPS = 1e-3
# Factor of t in the first low_noise_start steps, as in the code of arXiv:2507.15857.
LOW_NOISE = 0.5
# Validation always draws the same masks, so that two losses differ only by the model.
VALIDATION_SEED = 0
# Multiples of the golden ratio, modulo 1, are spread evenly over [0, 1), however many there are.
GOLDEN_RATIO = 0.6180339887498949
# Positions whose logits exist at once in scoring: 512 of a vocabulary of 50,257 are 100 MB.
LOGIT_ROWS = 512


@dataclass(frozen=True)
class DiffusionConfig:
    """Noise of masked diffusion (--objective=mdm)."""

    num_mc: int = 1  # masks drawn per validation sequence; more give a less noisy val_loss and take longer
    # Spread the noise levels of a step evenly over [0, 1) instead of drawing them independently.
    stratified: bool = field(default=False, metadata={"file_only": True})
    # Steps at half the noise level at the beginning; arXiv:2507.15857's code has 1000.
    low_noise_start: int = field(default=0, metadata={"file_only": True})
    # Fraction of the sequences that are cut to a random length; LLaDA has 0.01.
    random_length: float = field(default=0.0, metadata={"file_only": True})
    # Fraction of the sequences masked at their end instead of at random positions.
    ar_ratio: float = field(default=0.0, metadata={"file_only": True})

    # Options that version 0.1 wrote into [diffusion] and that are now in [ablation].
    retired: ClassVar = {"num_orders": 0, "predefined_orders": False, "randmask_ratio": 0.0, "attention_dropout": 0.0}

    def __post_init__(self):
        if self.num_mc < 1:
            raise ValueError(f"num_mc must be at least 1, got {self.num_mc}")
        if self.low_noise_start < 0:
            raise ValueError(f"low_noise_start must not be negative, got {self.low_noise_start}")
        for name in ("random_length", "ar_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")

    def validate_for(self, objective: str) -> None:
        """Raise ValueError for an option that has no effect with the objective."""
        default = DiffusionConfig()
        for name in ("num_mc", "stratified", "low_noise_start", "random_length", "ar_ratio"):
            if objective != "mdm" and getattr(self, name) != getattr(default, name):
                raise ValueError(f"{name} has no effect with --objective={objective}; leave it out or train mdm")


@dataclass(frozen=True)
class LikelihoodConfig:
    """How to estimate the log-likelihood of an ending; see `sample_masks`."""

    likelihood: Literal["chain", "mc", "counts"] = "chain"
    num_mc: int = 32  # masks per ending, for mc and counts
    guidance: float = 0.0  # classifier-free guidance, see `guided_logits`
    batch_tokens: int = 2048  # tokens per forward pass, at least one copy of the text


@dataclass(frozen=True)
class DenoiseConfig:
    """How to fill in an answer; see `denoise`."""

    steps: int | None = None  # forward passes in total; None = one per token
    block_length: int | None = None  # tokens per block; None = one block
    remasking: Literal["low_confidence", "random"] = "low_confidence"  # which predictions are masked again
    guidance: float = 0.0  # classifier-free guidance, see `guided_logits`


def mask_id(model: Transformer) -> int:
    """The id of the mask token: the first one after the vocabulary."""
    assert model.config.vocab_size and not model.config.causal
    return model.config.vocab_size


# ---- Training --------------------------------------------------------------------------------------------------------


def mask_batch(batch: Batch, cfg: DiffusionConfig, mask_id: int, seed: int, batch_sequences: int) -> Batch:
    """Return the batch with masked tokens, targets at the masked positions only, and loss weights 1/p.

    A token is masked, and so has a loss, with probability p: its expected weight is 1, and the mean loss estimates the
    bound. batch_sequences: sequences per optimizer step; sequence i belongs to step i // batch_sequences.
    """
    # The network predicts the tokens themselves, not the next ones, so the batch's own targets are not needed.
    tokens = batch.tokens  # [B, T]
    T = tokens.shape[1]
    # Four numbers decide for the whole sequence, the other T for one token each.
    noise = uniform_noise(batch.sequence_ids, 4 + T, seed, tokens.device)
    t, suffix_draw, length_draw, length = noise[:, :4, None].unbind(1)  # [B, 1] each
    if cfg.stratified:
        levels = [stratified_noise_level(i, seed, batch_sequences) for i in batch.sequence_ids]
        t = torch.tensor(levels, device=tokens.device)[:, None]
    if cfg.low_noise_start:
        is_early = [i // batch_sequences < cfg.low_noise_start for i in batch.sequence_ids]
        t = torch.where(torch.tensor(is_early, device=tokens.device)[:, None], LOW_NOISE * t, t)
    p = (1 - EPS) * t + EPS

    position = torch.arange(T, device=tokens.device)
    end = torch.where(length_draw < cfg.random_length, 1 + (length * T).long(), T)  # [B, 1]
    masked = (noise[:, 4:] < p) & (position < end)
    if cfg.ar_ratio:
        # Mask the same number of tokens, but at the end. Not with a slice: [-0:] would take all of them.
        suffix = (position >= end - masked.sum(1, keepdim=True)) & (position < end)
        masked = torch.where(suffix_draw < cfg.ar_ratio, suffix, masked)
    return replace(
        batch,
        tokens=tokens.masked_fill(masked, mask_id),
        targets=tokens.masked_fill(~masked, IGNORE_INDEX),
        # T / end, so that a cut sequence counts as much as a whole one.
        loss_weights=(T / end / p).expand(-1, T),
        mask=(position < end)[:, None, None] if cfg.random_length else None,  # [B, 1, 1, T]
    )


def uniform_noise(sequence_ids: Sequence[int], width: int, seed: int, device: torch.device) -> Tensor:
    """[B, width] in [0, 1), one row per sequence. Drawn on the CPU, so that it is the same on every device."""
    rows = [np.random.default_rng((seed, i)).random(width, dtype=np.float32) for i in sequence_ids]
    noise = torch.from_numpy(np.stack(rows))
    if device.type == "cuda":
        noise = noise.pin_memory()
    return noise.to(device, non_blocking=True)


def stratified_noise_level(sequence_id: int, seed: int, batch_sequences: int) -> float:
    """The noise level of a sequence; the levels of a step are 1/batch_sequences apart (VDM, arXiv:2107.00630, I.1)."""
    step, index = divmod(sequence_id, batch_sequences)
    offset = np.random.default_rng((seed, step, 1)).random()
    return (offset + index / batch_sequences) % 1


# ---- Scoring ---------------------------------------------------------------------------------------------------------


def sample_masks(
    n: int, cfg: LikelihoodConfig, rng: np.random.Generator, first_level: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """K masks of n tokens, bool [K, n], and weights [K, n]: the sum of weight x log p estimates the log-likelihood.

    chain   K = n, exact: token i is predicted from those before it, while it and all later ones are masked.
    mc      K = num_mc: noise levels 1/num_mc apart (arXiv:2107.00630, I.1), from first_level or a random one; tokens
            are masked independently. Estimates a lower bound.
    counts  As mc, but exactly k tokens are masked, k uniform in 1..n: the same mean, without the variance of k
            (LLaDA, arXiv:2502.09992, eq. 6).
    """
    if cfg.likelihood == "chain":
        return np.triu(np.ones((n, n), bool)), np.eye(n)
    if first_level is None:
        first_level = rng.random()
    levels = (first_level + np.arange(cfg.num_mc) / cfg.num_mc) % 1  # [K]
    draws = rng.random((cfg.num_mc, n))
    if cfg.likelihood == "mc":
        masked = draws < levels[:, None]
        # At level 0 nothing is masked; the floor only avoids 0/0.
        return masked, masked / (np.maximum(levels, 1e-12)[:, None] * cfg.num_mc)
    k = 1 + (levels * n).astype(int)[:, None]  # [K, 1]
    # The second argsort turns the order into ranks: the k tokens with the smallest draws are masked.
    masked = draws.argsort(1).argsort(1) < k
    return masked, masked / (k / n * cfg.num_mc)


@torch.no_grad()
def nelbo(model: Transformer, tokens: Tensor, first_id: int, num_mc: int) -> Tensor:
    """Estimate an upper bound on the negative log-likelihood of tokens [B, T], summed over all rows, in nats.

    Positions with IGNORE_INDEX, at the end of a row, are padding: neither read nor scored. Row i is sequence
    first_id + i of the validation data, which determines its masks. Noise levels are spread evenly over sequences and
    draws.
    """
    is_real = tokens != IGNORE_INDEX
    counts = LikelihoodConfig("counts", num_mc)
    masked = np.zeros((num_mc, *tokens.shape), bool)
    weights = np.zeros((num_mc, *tokens.shape), np.float32)
    for row, n in enumerate(is_real.sum(1).tolist()):
        sequence_id = first_id + row
        rng = np.random.default_rng((VALIDATION_SEED, sequence_id))
        if n:
            masked[:, row, :n], weights[:, row, :n] = sample_masks(n, counts, rng, GOLDEN_RATIO * sequence_id % 1)
    # A row of padding alone attends to itself: attention without any key would be NaN.
    visible = is_real | ~is_real.any(1, keepdim=True)
    attention_mask = None if visible.all() else visible[:, None, None]  # [B, 1, 1, T]
    total = torch.zeros((), device=tokens.device)
    for mask, weight in zip(torch.from_numpy(masked).to(tokens.device), torch.from_numpy(weights).to(tokens.device)):
        noisy = tokens.clamp(min=0).masked_fill(mask, mask_id(model))
        targets = tokens.masked_fill(~mask, IGNORE_INDEX)
        total += model(noisy, targets, loss_weights=weight, reduction="sum", mask=attention_mask)
    return total


@torch.no_grad()
def log_likelihood(
    model: Transformer,
    context: list[int],
    ending: list[int],
    cfg: LikelihoodConfig = LikelihoodConfig(),
    seed: int | tuple[int, ...] = 0,
) -> tuple[Tensor, bool]:
    """Log-likelihoods [E] in nats of an ending's tokens, fp64, and whether the ending is the greedy continuation.

    The context is never masked. Only likelihood "chain" can tell that the ending is greedy; others return False.
    """
    device = model.embed_tokens.weight.device
    C = len(context)
    masks, weights = sample_masks(len(ending), cfg, np.random.default_rng(seed))
    text = torch.tensor(context + ending, device=device)
    targets = torch.tensor(ending, device=device)
    values = torch.zeros(len(ending), dtype=torch.float64, device=device)
    hits = torch.zeros((), device=device)
    batch_size = max(1, cfg.batch_tokens // len(text))
    for start in range(0, len(masks), batch_size):
        mask = torch.from_numpy(masks[start : start + batch_size]).to(device)  # [B, E]
        weight = torch.from_numpy(weights[start : start + batch_size]).to(device)  # [B, E]
        noisy = text.repeat(len(mask), 1)  # [B, C + E]
        noisy[:, C:].masked_fill_(mask, mask_id(model))
        positions = weight.nonzero() + torch.tensor([0, C], device=device)  # [U, 2]: row and column in noisy
        for (row, column), logits in guided_logits(model, noisy, C, positions, cfg.guidance):
            logprobs = logits.float().log_softmax(-1)  # [u, V]
            index = column - C  # [u]
            chosen = logprobs.gather(-1, targets[index, None])[:, 0]  # [u]
            values.index_add_(0, index, chosen * weight[row, index])
            hits += (chosen >= logprobs.amax(-1)).sum()
    return values, cfg.likelihood == "chain" and int(hits) == len(ending)


def num_forward_passes(context_len: int, ending_len: int, cfg: LikelihoodConfig = LikelihoodConfig()) -> int:
    """The number of forward passes that `log_likelihood` makes for a context and an ending of these lengths."""
    n_masks = ending_len if cfg.likelihood == "chain" else cfg.num_mc
    batch_size = max(1, cfg.batch_tokens // (context_len + ending_len))
    n_batches = -(-n_masks // batch_size)
    return 2 * n_batches if cfg.guidance else n_batches


def guided_logits(
    model: Transformer, tokens: Tensor, prompt_len: int, positions: Tensor, guidance: float
) -> Iterator[tuple[tuple[Tensor, Tensor], Tensor]]:
    """Yield ((row, column) [u], logits [u, V]) for the positions [U, 2] of tokens [B, T], LOGIT_ROWS at a time.

    guidance is classifier-free guidance (arXiv:2410.18514, eq. 11): 0 is off, above 0 moves the logits away from those
    of the same text with its prompt masked.
    """
    V = model.config.vocab_size
    hidden = model.hidden(tokens)
    hidden_without_prompt = None
    if guidance:
        without_prompt = tokens.clone()
        without_prompt[:, :prompt_len] = mask_id(model)
        hidden_without_prompt = model.hidden(without_prompt)
    for chunk in positions.split(LOGIT_ROWS):
        index = (chunk[:, 0], chunk[:, 1])
        # Without the padding of the vocabulary, whose logits are -inf: their difference would be NaN.
        logits = model.head(hidden[index])[:, :V]
        if hidden_without_prompt is not None:
            unguided = model.head(hidden_without_prompt[index])[:, :V]
            logits = unguided + (1 + guidance) * (logits - unguided)
        yield index, logits


# ---- Generation ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def denoise(
    model: Transformer, prompt: list[int], n_tokens: int, sampling: Sampling, cfg: DenoiseConfig = DenoiseConfig()
) -> Iterator[list[int]]:
    """Yield the n_tokens that follow the prompt, once per step; undecided ones are mask_id(model).

    LLaDA's sampler (arXiv:2502.09992, algorithms 4 and 5). Blocks are filled from left to right. Each step predicts all
    masked tokens of a block and keeps the most confident of them (or random ones), the same number in each step.
    Stops after a block that contains sampling.stop_token. A repetition penalty is not supported.
    """
    device = model.embed_tokens.weight.device
    generator = torch.Generator(device).manual_seed(sampling.seed) if sampling.seed is not None else None
    C = len(prompt)
    text = torch.tensor(prompt + [mask_id(model)] * n_tokens, device=device)  # [C + n_tokens]
    block_length = min(cfg.block_length or n_tokens, n_tokens)
    for start, steps in _steps_per_block(n_tokens, block_length, cfg.steps):
        block = text[C + start : C + start + block_length]  # a view of text
        for steps_left in range(steps, 0, -1):
            masked = (block == mask_id(model)).nonzero()[:, 0]  # [U]
            positions = torch.stack([torch.zeros_like(masked), C + start + masked], dim=1)  # [U, 2]
            chunks = [logits.float() for _, logits in guided_logits(model, text[None], C, positions, cfg.guidance)]
            logits = torch.cat(chunks)  # [U, V]
            tokens = sample(logits, sampling, generator)  # [U]
            if cfg.remasking == "random":
                confidence = torch.rand(len(tokens), generator=generator, device=device)
            else:
                confidence = logits.softmax(-1).gather(-1, tokens[:, None])[:, 0]
            n_kept = -(-len(masked) // steps_left)
            kept = confidence.topk(n_kept).indices
            block[masked[kept]] = tokens[kept]
            yield text[C:].tolist()
        if sampling.stop_token is not None and sampling.stop_token in block.tolist():
            return


def _steps_per_block(n_tokens: int, block_length: int, steps: int | None) -> Iterator[tuple[int, int]]:
    """Yield (start, steps) per block: steps in proportion to its tokens, at least one, at most one per token."""
    starts = range(0, n_tokens, block_length)
    steps_left = max(len(starts), min(steps or n_tokens, n_tokens))
    for block, start in enumerate(starts):
        blocks_after = len(starts) - block - 1
        tokens_left = n_tokens - start
        proportional = -(-steps_left * min(block_length, tokens_left) // tokens_left)
        # Leave at least one step for each block to come.
        block_steps = min(proportional, steps_left - blocks_after)
        steps_left -= block_steps
        yield start, block_steps


def generate(
    model: Transformer, prompt: list[int], n_tokens: int, sampling: Sampling, cfg: DenoiseConfig = DenoiseConfig()
) -> list[int]:
    """Return the finished answer, up to sampling.stop_token; prompt and answer are shortened to fit the context."""
    prompt, n_tokens = fit_to_context(model, prompt, n_tokens)
    *_, tokens = denoise(model, prompt, n_tokens, sampling, cfg)
    if sampling.stop_token in tokens:
        tokens = tokens[: tokens.index(sampling.stop_token)]
    return tokens


def fit_to_context(model: Transformer, prompt: list[int], n_tokens: int) -> tuple[list[int], int]:
    """Return the end of the prompt and an answer length that fit the context together; the prompt gets at most half."""
    seq_len = model.config.seq_len
    n_tokens = min(n_tokens, seq_len - min(len(prompt), seq_len // 2))
    prompt_len = min(len(prompt), seq_len - n_tokens)
    return prompt[len(prompt) - prompt_len :], n_tokens
