"""Sampling: continue a prompt token by token, or several prompts at once.

for token in generate(model, prompt, 100, Sampling(temperature=0.8, top_k=50, seed=1)): ...
for next_tokens in generate_batch(model, prompts, 100, Sampling(temperature=0)): ...
"""

# Tensor dimensions: B batch, T tokens, S cached tokens, V vocabulary

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from model import KVCache, Transformer

# cuDNN attention, the default on new GPUs, plans each new prompt length anew: 23-37 ms on the host.
PREFILL_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
# Bounds of temperature and repetition penalty. Logits of up to 1e20 still fit into fp32 after both.
MIN_FACTOR = 1e-6
MAX_FACTOR = 1e6
# Picks the next token [1] from logits [1, V].
Draw = Callable[[Tensor], Tensor]
# decode(model, context, draw) yields next tokens, at least until the context is full; the caller appends them to it.
Decode = Callable[[Transformer, list[int], Draw], Iterator[int]]


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn, and when to stop."""

    temperature: float = 0.8  # 0 is greedy
    top_k: int | None = None  # only the k likeliest tokens
    top_p: float | None = None  # only the likeliest tokens that together have this probability
    min_p: float | None = None  # only tokens at least min_p times as likely as the likeliest (arXiv:2407.01082)
    repetition_penalty: float | None = None  # above 1: tokens of the context become less likely (arXiv:1909.05858)
    seed: int | None = None  # None draws differently each time
    stop_token: int | None = None  # ends the text and is not part of it

    def __post_init__(self) -> None:
        # Written so that NaN is refused too.
        if self.temperature != 0 and not MIN_FACTOR <= self.temperature <= MAX_FACTOR:
            raise ValueError(f"temperature must be 0 or from {MIN_FACTOR:g} to {MAX_FACTOR:g}, got {self.temperature}")
        penalty = self.repetition_penalty
        if penalty is not None and not MIN_FACTOR <= penalty <= MAX_FACTOR:
            raise ValueError(f"repetition_penalty must be from {MIN_FACTOR:g} to {MAX_FACTOR:g}, got {penalty}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {value}")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be from 0 to 2**63 - 1, got {self.seed}")


def decode_cached(model: Transformer, context: list[int], draw: Draw) -> Iterator[int]:
    """Decode with a key/value cache: prefill once, then one token per forward pass."""
    cache = KVCache(model.config.seq_len)
    unseen = list(context)
    while True:
        token = int(draw(next_logits(model, unseen, cache)))
        yield token
        unseen = [token]


def decode_uncached(model: Transformer, context: list[int], draw: Draw) -> Iterator[int]:
    """Decode without a cache: every token is a forward pass over the whole context."""
    while True:
        yield int(draw(next_logits(model, context)))


def generate(
    model: Transformer,
    prompt: list[int],
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    decode: Decode = decode_cached,
) -> Iterator[int]:
    """Yield up to `max_new_tokens` tokens that continue `prompt` (at least one token).

    When the context is full the older half is dropped. decode: `decode_cached`, `decode_uncached` or
    `CompiledDecoder.decode`; all give the same tokens.
    """
    assert prompt, "a prompt has at least one token"
    device = model.embed_tokens.weight.device
    generator = torch.Generator(device).manual_seed(sampling.seed) if sampling.seed is not None else None
    seq_len = model.config.seq_len
    context = list(prompt[-seq_len:])

    def draw(logits: Tensor) -> Tensor:
        if sampling.repetition_penalty is not None:
            seen = torch.tensor([context], device=device)
            logits = apply_repetition_penalty(logits, seen, sampling.repetition_penalty)
        return sample(logits, sampling, generator)

    remaining = max_new_tokens
    while remaining > 0:
        for token in decode(model, context, draw):
            if token == sampling.stop_token:
                return
            yield token
            context.append(token)
            remaining -= 1
            if remaining == 0 or len(context) > seq_len:
                break
        # Dropping one token at a time would cost a prefill per token, since positions are counted from the first one.
        context = context[-max(1, seq_len // 2) :]


@torch.inference_mode()
def next_logits(model: Transformer, tokens: list[int], cache: KVCache | None = None) -> Tensor:
    """Logits [1, V] of the token after `tokens`. With a cache, `tokens` are those that it does not hold yet."""
    tokens_2d = torch.tensor([tokens], device=model.embed_tokens.weight.device)  # [1, T]
    with sdpa_kernel(PREFILL_BACKENDS):
        hidden = model.hidden(tokens_2d, cache=cache)
    # The head of the 416M model costs as much as three layers; only the last position needs it.
    return model.head(hidden[:, -1])


@torch.inference_mode()
def generate_batch(
    model: Transformer, prompts: list[list[int]], max_new_tokens: int, sampling: Sampling = Sampling()
) -> Iterator[list[int]]:
    """Yield the next token of each of B prompts, `max_new_tokens` times.

    Raises ValueError if the longest prompt and the new tokens exceed the context.
    """
    device = model.embed_tokens.weight.device
    seq_len = model.config.seq_len
    T = max(map(len, prompts))
    if T + max_new_tokens > seq_len:
        raise ValueError(
            f"{T} + {max_new_tokens} tokens exceed the context of {seq_len} (seq_len); shorten one of them"
        )
    # On the left, so that the last token of every prompt, which predicts the next one, is in the last column.
    padding = torch.tensor([T - len(prompt) for prompt in prompts], device=device)  # [B]
    tokens = torch.tensor([[0] * (T - len(prompt)) + prompt for prompt in prompts], device=device)  # [B, T]
    is_real = torch.arange(T + max_new_tokens, device=device) >= padding[:, None]  # [B, S]
    causal = torch.ones(T, T, dtype=torch.bool, device=device).tril()
    itself = torch.eye(T, dtype=torch.bool, device=device)
    # A padding token sees itself alone: a row without any key would be NaN.
    mask = (is_real[:, None, :T] & causal) | itself  # [B, T, T]
    positions = (torch.arange(T, device=device) - padding[:, None]).clamp(min=0)  # [B, T]
    cache = KVCache(T + max_new_tokens)
    generator = torch.Generator(device).manual_seed(sampling.seed) if sampling.seed is not None else None
    for length in range(T, T + max_new_tokens):
        hidden = model.hidden(tokens, cache=cache, positions=positions, mask=mask[:, None])
        next_tokens = sample(model.head(hidden[:, -1]), sampling, generator)  # [B]
        yield next_tokens.tolist()
        tokens = next_tokens[:, None]
        positions = (length - padding)[:, None]
        mask = is_real[:, None, : length + 1]


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> Tensor:
    """Draw one token per row of logits [B, V] -> [B]. Raises ValueError for logits that are not finite."""
    # The largest is NaN if any is. -inf is the logit of padding alone.
    if not logits.amax(-1).isfinite().all():
        raise ValueError("the model's logits are not finite: its weights are broken; take another checkpoint")
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float() / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        kth = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if sampling.top_p is not None and sampling.top_p < 1:
        sorted_logits, order = logits.sort(descending=True)
        probs = sorted_logits.softmax(-1)
        # Probability of all tokens before this one. It is 0 for the first, which always stays.
        likelier = probs.cumsum(-1) - probs
        sorted_logits[(likelier >= sampling.top_p) & (likelier > 0)] = -math.inf
        logits = torch.empty_like(logits).scatter_(-1, order, sorted_logits)
    if sampling.min_p:
        # A factor of probabilities is a difference of logits.
        threshold = logits.amax(-1, keepdim=True) + math.log(sampling.min_p)
        logits = logits.masked_fill(logits < threshold, -math.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)


def apply_repetition_penalty(logits: Tensor, tokens: Tensor, penalty: float) -> Tensor:
    """Make `tokens` [B, T] less likely: divide positive logits [B, V] by `penalty`, multiply negative ones by it."""
    seen = logits.gather(-1, tokens)
    return logits.scatter(-1, tokens, torch.where(seen > 0, seen / penalty, seen * penalty))
