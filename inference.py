"""A model made ready to write: weights in fewer bytes that lie better, and one step compiled for a GPU.

    model = prepare(model, "int8")                         # or "bf16", "fp32"; in place, for inference alone
    step = Step(model)                                     # GPU
    step.compile(mode="reduce-overhead", fullgraph=True)   # about a minute at the first token
    for token in generate(model, prompt, 100, step=step): ...

Writing one token reads every weight once, so that bytes per weight, and how fast they are read, decide the speed.
"""

# Tensor dimensions: B batch, T tokens, D dim, K key/value heads, H head_dim, S cached tokens, V vocabulary

import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from model import KVCache, Transformer, next_logits

MAKE_QUANTIZED: Any = getattr(torch, "_make_per_channel_quantized_tensor", None)
INT8_MATMUL: Any = None  # fbgemm's, which x86 processors have
if MAKE_QUANTIZED is not None and "fbgemm" in torch.backends.quantized.supported_engines:
    INT8_MATMUL = getattr(torch.ops.quantized, "linear_with_input_q_dq_qweight_dq_output_fp32", None)


class PackedLinear(nn.Module):
    """A linear layer in oneDNN's own layout, and never fewer than ROWS rows: one row alone goes through a kernel that is
    slower and adds up in another order. On 2 cores of an EPYC 4 rows read 31 GB/s of bf16, 1 row 26, in plain layout 18."""

    ROWS = 4

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), self.ROWS)
        self.bias = None if bias is None else bias.to(weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        padded = F.pad(rows, (0, 0, 0, max(0, self.ROWS - len(rows))))
        out = torch.ops.mkldnn._linear_pointwise(padded, self.weight, self.bias, "none", [], "")
        return out[: len(rows)].view(*x.shape[:-1], -1)


class Int8Linear(nn.Module):
    """Weights as int8, one scale per row; everything else as it was."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.weight, self.scale = to_int8(weight)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        out = F.linear(x, self.weight.to(x.dtype)) * self.scale.to(x.dtype)  # compiled: one kernel that reads int8
        return out if self.bias is None else out + self.bias.to(x.dtype)


class Int8PackedLinear(nn.Module):
    """The same for fbgemm on x86, which multiplies int8 by int8: activations are rounded, too, with one scale per token.
    Sums are integers, so a token's result does not depend on the tokens beside it."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__()
        rows, scale = to_int8(weight)
        zeros = torch.zeros(len(rows), dtype=torch.long)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a later torch will not have quantized tensors; Int8Linear takes over then
            rows = MAKE_QUANTIZED(rows, scale.double(), zeros, 0)
        self.packed, self.bias = torch.ops.quantized.linear_prepack(rows, None), bias

    def forward(self, x: Tensor) -> Tensor:
        largest = x.abs().amax(-1, keepdim=True).clamp(min=1e-12)
        out = INT8_MATMUL(x / largest, 1 / 127, 128, self.packed).mul_(largest)
        return out if self.bias is None else out.add_(self.bias)


def to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weight [out, in] as int8 and the scales [out] that bring it back."""
    scale = weight.detach().float().abs().amax(1).clamp(min=1e-12) / 127
    return (weight.detach().float() / scale[:, None]).round().to(torch.int8), scale


@torch.no_grad()
def prepare(model: Transformer, dtype: str) -> Transformer:
    """Turn the weights in place into "fp32", "bf16" or "int8" for this device; for inference, there is no way back."""
    on_cpu = model.embed_tokens.weight.device.type == "cpu"
    if dtype == "bf16":
        model.to(torch.bfloat16)
    if dtype == "int8":
        kind = Int8PackedLinear if on_cpu and INT8_MATMUL is not None else Int8Linear
    else:
        kind = PackedLinear if on_cpu and can_pack(model.embed_tokens.weight.dtype) else None
    if kind is not None:
        head = model.embed_tokens if model.lm_head is None else model.lm_head
        model.lm_head = None
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(module, name, kind(child.weight))
        model.lm_head = kind(head.weight, model.padding_bias)  # type: ignore[assignment]
    if dtype == "int8" and not on_cpu:
        model.to(torch.bfloat16)  # what is not int8: the embedding and the norms
    return model


def choose_threads(model: Transformer) -> int:
    """Set and return the number of threads, of at most what torch would take, that writes a token fastest right now.

    Threads wait for each other dozens of times per token: beside a neighbour one can be faster than all.
    """
    times, n = {}, torch.get_num_threads()
    while n >= 1:
        torch.set_num_threads(n)
        times[n] = min(_seconds(lambda: next_logits(model, [0])) for _ in range(4))
        n //= 2
    fastest = min(times, key=lambda n: times[n])
    torch.set_num_threads(fastest)
    return fastest


def bandwidth(device: torch.device) -> float:
    """Bytes per second that this device's memory gives to a sum over 256 MB, more than any cache: the limit of decoding."""
    data = torch.ones(2**25, dtype=torch.int64, device=device)
    return data.nbytes / min(_seconds(lambda: data.sum().item()) for _ in range(6))


def _seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def bytes_per_token(model: Transformer, dtype: str) -> int:
    """Bytes of weights that one more token has to read; the cache comes on top."""
    config = model.config
    lookup_only = 0 if config.tie_embeddings else (config.vocab_size or 0) * config.dim
    return (model.num_params() - lookup_only) * {"fp32": 4, "bf16": 2, "int8": 1}[dtype]


def can_pack(dtype: torch.dtype) -> bool:
    """True if oneDNN multiplies this type on this processor."""
    return torch.backends.mkldnn.is_available() and (
        dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


class Step(nn.Module):
    """One token through the network: the same work on the same memory at every call, so that it can be compiled once and
    replayed as one CUDA graph. The position lives on the device; attention looks at the whole cache and masks the rest."""

    position: Tensor  # [1]

    def __init__(self, model: Transformer):
        super().__init__()
        self.model, self.cache = model, KVCache(model.config.seq_len)
        device = model.embed_tokens.weight.device
        self.register_buffer("position", torch.zeros(1, dtype=torch.long, device=device), persistent=False)

    @torch.inference_mode()
    def prefill(self, tokens: list[int]) -> Tensor:
        """Logits [1, V] after `tokens`, which fill the cache from its beginning."""
        first = not self.cache.entries
        self.cache.length = 0
        logits = next_logits(self.model, tokens, self.cache)
        self.position.fill_(len(tokens))
        if first:  # a graph may write only to memory that stays where it is
            for tensor in (self.position, *(t for pair in self.cache.entries.values() for t in pair)):
                torch._dynamo.mark_static_address(tensor)
        return logits

    def forward(self, token: Tensor) -> Tensor:
        """Logits [1, V] after one more token [1, 1]."""
        seen = torch.arange(self.cache.max_len, device=token.device) <= self.position  # [S]
        cache = _Here(self.cache, self.position)
        hidden = self.model.hidden(token, cache=cache, positions=self.position[None], mask=seen[None, None, None])
        self.position.add_(1)
        return self.model.head(hidden[:, -1])

    def stream(self, window: list[int], draw: Callable[[Tensor], Tensor]) -> Iterator[int]:
        """The next tokens of `window`, until the context is full. The GPU begins a step before the host reads the token."""
        on_gpu, end = self.position.is_cuda, self.cache.max_len
        host, arrived = torch.empty(1, dtype=torch.long, pin_memory=on_gpu), torch.cuda.Event() if on_gpu else None
        logits = self.prefill(window)
        for length in range(len(window), end + 1):
            token = draw(logits)  # [1]
            host.copy_(token, non_blocking=True)
            if arrived is not None:
                arrived.record()
            if length < end:
                with torch.inference_mode():
                    logits = self(token[:, None])
            if arrived is not None:
                arrived.synchronize()
            yield int(host)


class _Here(KVCache):
    """A cache that is written at a position on the device, and read whole."""

    def __init__(self, cache: KVCache, position: Tensor):
        super().__init__(cache.max_len)
        self.entries, self.position = cache.entries, position

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.entries[layer]
        return keys.index_copy_(2, self.position, k), values.index_copy_(2, self.position, v)
