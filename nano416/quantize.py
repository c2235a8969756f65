"""A model made ready for inference: weights in fewer bytes, and a decoding step compiled for a GPU.

    model = quantize_(model, "int8")                # or "bf16", "fp32"; in place, for inference alone
    decoder = CompiledDecoder(model)                # on a GPU the first token takes about a minute
    for token in generate(model, prompt, 100, decode=decoder.decode): ...

Decoding reads every weight once per token, so the bytes per weight and the memory's bandwidth decide its speed.
"""

# Tensor dimensions: T tokens, K key/value heads, H head_dim, S context length, V vocabulary

from collections.abc import Iterator

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from model import KVCache, Transformer
from nano416 import cpu_ops
from nano416.generate import Draw, next_logits


class Int8Linear(nn.Module):
    """A linear layer with weights in int8 and one scale per output; activations keep their dtype."""

    weight: Tensor  # [out, in]
    scale: Tensor  # [out]
    bias: Tensor | None  # [out]

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None = None):
        super().__init__()
        # Buffers, so that model.to(torch.bfloat16) casts the scale. A cast in `forward` crashes the compiler: torch
        # 2.11 to 2.13 match its pattern of int8 weights, then fail with "AssertionError: <class Pointwise>".
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        # Compiled, this is one kernel that reads int8.
        out = F.linear(x, self.weight.to(x.dtype)) * self.scale
        return out if self.bias is None else out + self.bias


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round weight [out, in] to int8; also return the scale [out] that restores it, weight ~ int8 x scale."""
    weight = weight.detach().float()
    scale = weight.abs().amax(1).clamp(min=1e-12) / 127
    return (weight / scale[:, None]).round().to(torch.int8), scale


@torch.no_grad()
def quantize_(model: Transformer, dtype: str) -> Transformer:
    """Convert the weights in place to "fp32", "bf16" or "int8", in the layout that is fastest on their device.

    For inference only. int8 applies to the linear layers and the output head; the rest is fp32 on a CPU and bf16 on a
    GPU.
    """
    on_cpu = model.norm.weight.device.type == "cpu"
    if dtype == "bf16":
        model.to(torch.bfloat16)
    if dtype == "int8" or (on_cpu and cpu_ops.PackedLinear.is_supported(model.norm.weight.dtype)):
        head = model.embed_tokens if model.lm_head is None else model.lm_head
        for block in model.layers:
            for module in list(block.modules()):
                for name, child in list(module.named_children()):
                    if isinstance(child, nn.Linear):
                        setattr(module, name, inference_linear(child.weight, None, dtype))
        # The head is converted even if it is tied: the embedding keeps its table, from which rows are looked up.
        model.lm_head = inference_linear(head.weight, model.padding_bias, dtype)  # type: ignore[assignment]
    # What is not int8 yet: embedding, norms and the scales.
    if dtype == "int8" and not on_cpu:
        model.to(torch.bfloat16)
    return model


def inference_linear(weight: Tensor, bias: Tensor | None, dtype: str) -> nn.Module:
    """The linear layer that replaces an nn.Linear of this weight."""
    if dtype != "int8":
        return cpu_ops.PackedLinear(weight, bias)
    if weight.device.type == "cpu" and cpu_ops.Int8PackedLinear.is_supported():
        return cpu_ops.Int8PackedLinear(*quantize_int8(weight), bias)
    return Int8Linear(*quantize_int8(weight), bias)


def bytes_per_token(model: Transformer, dtype: str) -> int:
    """Bytes of weights that are read to decode one token, without the KV cache."""
    config = model.config
    # A separate embedding is looked up, not read.
    lookup_only = 0 if config.tie_embeddings else config.vocab_size * config.dim
    return (config.num_params() - lookup_only) * {"fp32": 4, "bf16": 2, "int8": 1}[dtype]


def memory_bandwidth(device: torch.device) -> float:
    """Bytes per second at which this device sums 256 MB, more than any cache holds: the limit of decoding."""
    data = torch.ones(2**25, dtype=torch.int64, device=device)
    return data.nbytes / min(cpu_ops.elapsed(lambda: data.sum().item()) for _ in range(6))


class CompiledDecoder(nn.Module):
    """Decodes with the same operations on the same memory for every token, so that it is compiled only once.

    On a GPU a token is one replay of a CUDA graph, as in gpt-fast; on a CPU nothing is compiled. The position is a
    tensor on the device, and attention covers the whole cache under a mask.
    """

    position: Tensor  # [1], the number of tokens in the cache

    def __init__(self, model: Transformer):
        super().__init__()
        config = model.config
        self.model = model
        # Buffers, because the compiler relies on them staying where they are, as a CUDA graph requires.
        self.register_buffer("position", torch.zeros(1, dtype=torch.long, device=model.norm.weight.device))
        shape = (1, config.n_kv_heads, config.seq_len, config.head_dim)
        for layer_idx in range(config.n_layers):
            self.register_buffer(f"keys_{layer_idx}", model.norm.weight.new_zeros(shape))
            self.register_buffer(f"values_{layer_idx}", model.norm.weight.new_zeros(shape))
        if self.position.is_cuda:
            # Coordinate descent tuning makes a product with one row a kernel that reads int8 weights as they are;
            # cuBLAS would need a bf16 copy of them for each token.
            self.compile(fullgraph=True, options={"triton.cudagraphs": True, "coordinate_descent_tuning": True})

    @torch.inference_mode()
    def prefill(self, tokens: list[int]) -> Tensor:
        """Fill the cache with `tokens` and return the logits [1, V] after them."""
        cache = KVCache(len(tokens))
        logits = next_logits(self.model, tokens, cache)
        for layer_idx, (k, v) in cache.entries.items():
            self.get_buffer(f"keys_{layer_idx}")[:, :, : len(tokens)] = k
            self.get_buffer(f"values_{layer_idx}")[:, :, : len(tokens)] = v
        self.position.fill_(len(tokens))
        return logits

    def forward(self, token: Tensor) -> Tensor:
        """Append `token` [1, 1] to the cache and return the logits [1, V] after it."""
        mask = torch.arange(self.model.config.seq_len, device=token.device)[None] <= self.position  # [1, S]
        hidden = self.model.hidden(token, cache=StaticKVCache(self), positions=self.position[None], mask=mask)
        self.position.add_(1)
        return self.model.head(hidden[:, -1])

    def decode(self, model: Transformer, context: list[int], draw: Draw) -> Iterator[int]:
        """Yield the tokens after `context` until the context is full; for the `decode` argument of `generate`."""
        assert model is self.model
        seq_len = model.config.seq_len
        on_gpu = self.position.is_cuda
        host_token = torch.empty(1, dtype=torch.long, pin_memory=on_gpu)
        copied = torch.cuda.Event() if on_gpu else None
        logits = self.prefill(context)
        for length in range(len(context), seq_len + 1):
            token = draw(logits)  # [1]
            host_token.copy_(token, non_blocking=True)
            if copied is not None:
                copied.record()
            # The GPU starts on the next token before the host waits for this one.
            if length < seq_len:
                with torch.inference_mode():
                    logits = self(token[:, None])
            if copied is not None:
                copied.synchronize()
            yield int(host_token)


class StaticKVCache(KVCache):
    """The cache of a `CompiledDecoder`: written at a position on the device, and read as a whole."""

    def __init__(self, decoder: CompiledDecoder):
        super().__init__(decoder.model.config.seq_len)
        self.decoder = decoder

    def update(self, layer_idx: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v [1, K, 1, H] of one layer and return the whole cache, [1, K, S, H] each."""
        keys = self.decoder.get_buffer(f"keys_{layer_idx}")
        values = self.decoder.get_buffer(f"values_{layer_idx}")
        keys.index_copy_(2, self.decoder.position, k)
        values.index_copy_(2, self.decoder.position, v)
        return keys, values
