"""The network: tokens in, logits or loss out; key/value cache and sampling.

A Llama-shaped decoder: RMSNorm, rotary positions (half-split, as Hugging Face), SwiGLU, no biases; optional grouped
key/value heads, QK-norm (Qwen3) and bidirectional attention (masked diffusion). Parameter names are Hugging Face's,
so exporting is a rename. Copy this file into another project: it needs torch alone.

    model = Transformer(ModelConfig(vocab_size=50257))      # 416,420,864 parameters
    logits = model(tokens)                                  # [B, T] -> [B, T, V]
    loss = model(tokens, targets)                           # mean cross entropy, nats per token
    for token in generate(model, prompt, 100): ...          # prompt: list of ints
"""

# Tensor dimensions: B batch, T tokens, D dim, N query heads, K key/value heads, H head_dim, S cached tokens,
# V vocabulary (padded), F ffn_dim, L layers

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

INIT_STD = 0.02
VOCAB_MULTIPLE = 128  # matmuls with 50304 columns are faster than with 50257; modded-nanogpt and nanochat do the same
IGNORED = -100  # a target that carries no loss
FEW = 16  # tokens after what a cache holds that attend one by one
LOSS_CHUNK = 2**26  # logits that exist at once in `linear_cross_entropy`: 128 MB in bf16
LOSS_BLOCK = 2**21  # of them in fp32, on a CPU: 8 MB, which its caches hold
ROPE_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")  # Llama 3's names
# For prompts: cuDNN, the default of new GPUs, plans each new length anew, 23-37 ms on the host.
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the network."""

    dim: int = 1024  # width of the residual stream
    n_layers: int = 24  # transformer blocks
    n_heads: int = 16  # query heads
    n_kv_heads: int | None = None  # key/value heads; none = n_heads, fewer = grouped-query attention
    head_dim: int | None = None  # width of one head; none = dim / n_heads
    ffn_dim: int | None = None  # width of the SwiGLU layer; none = 3.5 x dim
    vocab_size: int | None = None  # number of tokens; none = that of the data's tokenizer
    seq_len: int = 1024  # context length in tokens
    rope_theta: float = 10000.0  # base of the rotary frequencies; larger for longer contexts
    rope_scaling: dict[str, float] | None = None  # Llama 3's stretch of slow frequencies, for imported models
    norm_eps: float = 1e-6  # what RMSNorm adds to the mean square
    tie_embeddings: bool = True  # output head shares the embedding's weights
    qk_norm: bool = True  # RMSNorm on queries and keys (Qwen3), steadier at high learning rates; false = Llama
    causal: bool = True  # false = every token sees every token (masked diffusion)

    def __post_init__(self):
        for name in ("dim", "n_layers", "n_heads", "seq_len"):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        if self.head_dim is None:
            _require(self.dim % self.n_heads == 0, f"dim ({self.dim}) must be a multiple of n_heads ({self.n_heads})")
        derived = {
            "n_kv_heads": self.n_heads,
            "head_dim": self.dim // self.n_heads,
            "ffn_dim": 7 * self.dim // 2,
        }
        for name, value in derived.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)  # frozen: this is its one moment of change
        n_kv, head_dim, ffn_dim = self.n_kv_heads or 0, self.head_dim or 0, self.ffn_dim or 0
        _require(
            n_kv >= 1 and self.n_heads % n_kv == 0,
            f"n_heads ({self.n_heads}) must be a multiple of n_kv_heads ({self.n_kv_heads})",
        )
        _require(
            head_dim >= 2 and head_dim % 2 == 0,
            f"head_dim must be even (rotary positions turn pairs), got {self.head_dim}; choose another dim or n_heads",
        )
        _require(ffn_dim >= 1, f"ffn_dim must be at least 1, got {self.ffn_dim}")
        _require(self.rope_theta > 1, f"rope_theta must be above 1, got {self.rope_theta}")
        _require(self.norm_eps > 0, f"norm_eps must be above 0, got {self.norm_eps}")
        if self.rope_scaling is not None:
            values = [self.rope_scaling.get(name, 0) for name in ROPE_SCALING]  # factor, low, high, context
            known = len(self.rope_scaling) == len(values) and min(values) > 0 and values[2] > values[1]
            _require(known, f"rope_scaling needs {', '.join(ROPE_SCALING)}, low below high; got {self.rope_scaling}")
        _require(
            self.vocab_size is None or self.vocab_size >= 2,
            f"vocab_size must be at least 2, got {self.vocab_size}",
        )


class Attention(nn.Module):
    """Self-attention with rotary positions."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        assert config.head_dim and config.n_kv_heads
        self.n_heads, self.n_kv_heads, self.head_dim = config.n_heads, config.n_kv_heads, config.head_dim
        self.q_proj = nn.Linear(config.dim, self.n_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.dim, self.n_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.dim, self.n_kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.n_heads * self.head_dim, config.dim, bias=False)
        self.q_norm = HeadNorm(self.head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = HeadNorm(self.head_dim, eps=config.norm_eps) if config.qk_norm else None

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
        is_causal: bool,
        cache: "KVCache | None",
        layer: int,
        dropout: float,
    ) -> Tensor:
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # [B, N, T, H]; a part of N, K
        k = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # [B, K, T, H]; under tensor
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # [B, K, T, H]; parallelism
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.update(layer, k, v)  # [B, K, S + T, H]
        out = attend(q, k, v, mask, is_causal, dropout)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))


class HeadNorm(nn.RMSNorm):
    """[..., H] normalised in the dtype of x: an fp32 gain under autocast would take the slow way, and queries to fp32."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, dropout: float = 0.0) -> Tensor:
    """Attention of q [B, N, T, H] over k, v [B, K, S, H]; causal: q are the last T of the S tokens."""
    T, S, grouped = q.shape[2], k.shape[2], q.shape[1] != k.shape[1]
    if is_causal and T < S:  # SDPA's is_causal would take q for the first T
        if T <= FEW:  # each as if it came alone, rounding included
            alone = (attend(q[:, :, t : t + 1], k[:, :, : S - T + t + 1], v[:, :, : S - T + t + 1], None, False) for t in range(T))  # fmt: skip
            return torch.cat(list(alone), dim=2)
        mask, is_causal = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(diagonal=S - T), False
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=is_causal, enable_gqa=grouped
    )


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), Shazeer 2020 (arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        assert config.ffn_dim
        self.gate_proj = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.up_proj = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.down_proj = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention, then the feed-forward layer, each behind an RMSNorm and beside the residual stream."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x: Tensor, *attention_args) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), *attention_args)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """The whole network. `config.vocab_size` must be set."""

    rope_cos: Tensor  # [seq_len + 1, H/2]
    rope_sin: Tensor  # [seq_len + 1, H/2]
    padding_bias: Tensor | None  # [V]

    def __init__(self, config: ModelConfig):
        super().__init__()
        assert config.vocab_size and config.head_dim, "vocab_size comes from the tokenizer"
        self.config = config
        rows = config.vocab_size + (not config.causal)  # one of the padded rows of a bidirectional model is MASK
        padded = -(-rows // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        self.embed_tokens = nn.Embedding(padded, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.lm_head = None if config.tie_embeddings else nn.Linear(config.dim, padded, bias=False)
        self.build_tables()
        self.init_weights()

    def build_tables(self) -> None:
        """Rotary angles and the mask of padded tokens: derived from the shape, so never in a checkpoint."""
        config, padded = self.config, self.embed_tokens.num_embeddings
        assert config.head_dim and config.vocab_size
        # Angles in fp32: bf16 has 8 significant bits, so positions above 256 would no longer be distinct.
        frequencies = config.rope_theta ** (-torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim)
        if config.rope_scaling is not None:
            frequencies = stretch(frequencies, config.rope_scaling)
        places = torch.arange(config.seq_len + 1, dtype=torch.float32)  # in another order the last target's may be read
        angles = torch.outer(places, frequencies)  # [seq_len + 1, H/2]
        bias = torch.zeros(padded)
        bias[config.vocab_size :] = -math.inf  # padded tokens never win and get no gradient
        self.register_buffer("rope_cos", angles.cos(), persistent=False)
        self.register_buffer("rope_sin", angles.sin(), persistent=False)
        self.register_buffer("padding_bias", bias if padded > config.vocab_size else None, persistent=False)

    @torch.no_grad()
    def init_weights(self) -> None:
        """GPT-2's: normal(0, 0.02); layers that write to the residual stream are scaled by 1/sqrt(2 n_layers)."""
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                nn.init.ones_(parameter)
            else:
                writes = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=INIT_STD / math.sqrt(2 * self.config.n_layers) if writes else INIT_STD)

    @torch.no_grad()
    def zero_outputs(self) -> None:
        """Layers begin as the identity: what they write to the residual stream is zero (Fixup, arXiv:1901.09321)."""
        for name, parameter in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.zero_()

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        loss_weights: Tensor | None = None,
        reduction: str = "mean",
        z_loss: float = 0.0,
        cache: "KVCache | None" = None,
        **order: Any,
    ) -> Tensor:
        """Logits [B, T, V] (padded columns are -inf); with `targets` [B, T] the loss in nats instead.

        Targets of -100 carry no loss. reduction: "mean" over the targets that count, "sum", or "none" ([B, T]).
        loss_weights [B, T] multiply the loss of each token; the mean then divides by all B*T. order: as for `hidden`.
        """
        hidden = self.hidden(tokens, cache=cache, **order)
        return self.head(hidden) if targets is None else self.loss(hidden, targets, loss_weights, reduction, z_loss)

    def hidden(
        self,
        tokens: Tensor,
        *,
        cache: "KVCache | None" = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        attention_dropout: float = 0.0,
    ) -> Tensor:
        """Final hidden states [B, T, D], normalised, ready for `head`.

        positions [B, T] and mask (bool, broadcast to [B, N, T, S+T], true = may look) replace the usual order.
        attention_dropout: share of attention weights set to 0, the others scaled up.
        """
        T, start = tokens.shape[1], cache.length if cache is not None else 0
        if start + T > self.config.seq_len and positions is None:
            raise ValueError(f"{start + T} tokens exceed the context of {self.config.seq_len} (seq_len)")
        at = slice(start, start + T) if positions is None else positions
        cos, sin = self.rope_cos[at], self.rope_sin[at]  # [T, H/2] or [B, T, H/2]
        if positions is not None:
            cos, sin = cos[:, None], sin[:, None]  # [B, 1, T, H/2]
        is_causal = mask is None and self.config.causal and T > 1
        x = self.embed_tokens(tokens)  # [B, T, D]
        for i, block in enumerate(self.layers):
            x = block(x, cos, sin, mask, is_causal, cache, i, attention_dropout)
        if cache is not None:
            cache.length += T
        return self.norm(x)

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., D] to logits [..., V]."""
        table = self.embed_tokens if self.lm_head is None else self.lm_head
        if not isinstance(table, nn.Embedding | nn.Linear):  # of inference.prepare
            return table(hidden)
        weight = table.weight
        bias = self.padding_bias
        if bias is None or torch.is_grad_enabled():
            return F.linear(hidden, weight, None if bias is None else bias.to(weight.dtype))
        logits = F.linear(hidden, weight)
        logits[..., self.config.vocab_size :] = -math.inf  # a bias would write all logits once more
        return logits

    def loss(
        self,
        hidden: Tensor,
        targets: Tensor,
        loss_weights: Tensor | None = None,
        reduction: str = "mean",
        z_loss: float = 0.0,
    ) -> Tensor:
        """Cross entropy of `head(hidden)` against targets [B, T], in fp32; z_loss bends its gradient, not its value.

        z_loss x log(sum of exp(logits))^2 keeps logits from drifting (PaLM, arXiv:2204.02311, section 5).
        """
        counted = (targets != IGNORED).float()
        weights = counted if loss_weights is None else counted * loss_weights  # [B, T]
        if reduction == "mean":
            weights = weights / (counted.sum() if loss_weights is None else counted.numel())
        table, size = self.embed_tokens if self.lm_head is None else self.lm_head, self.config.vocab_size
        kind = hidden.device.type
        if reduction != "none" and isinstance(table, nn.Embedding | nn.Linear) and not compiler_fuses(kind):
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else table.weight.dtype
            rows, words = hidden.flatten(0, -2).to(dtype), targets.flatten().clamp(min=0)
            learns = torch.is_grad_enabled()
            return linear_cross_entropy(rows, table.weight, words, weights.flatten(), size, z_loss, learns)[0]
        logits = self.head(hidden).float().flatten(0, -2)  # [B*T, V]
        losses = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction="none").view_as(targets)
        if z_loss:
            z = z_loss * logits.logsumexp(-1).view_as(targets).square()
            losses = losses + (z - z.detach())
        losses = losses * weights
        return losses if reduction == "none" else losses.sum()

    def num_params(self) -> int:
        """Parameters of the real vocabulary, without padding rows; tied weights count once."""
        assert self.config.vocab_size
        padding = self.embed_tokens.num_embeddings - self.config.vocab_size
        tables = 1 if self.lm_head is None else 2
        return sum(p.numel() for p in self.parameters()) - tables * padding * self.config.dim

    def flops_per_token(self) -> int:
        """Training FLOPs per token: 6 x matmul parameters + 12 L N H T for attention (PaLM, arXiv:2204.02311, app. B)."""
        config = self.config
        assert config.vocab_size and config.head_dim
        lookup_only = 0 if self.lm_head is None else config.vocab_size * config.dim
        attention = 12 * config.n_layers * config.n_heads * config.head_dim * config.seq_len
        return 6 * (self.num_params() - lookup_only) + attention


def compiler_fuses(device: str) -> bool:
    """On a GPU the compiler makes one kernel of logits and cross entropy; its kernel for CPUs is slower than ours."""
    return torch.compiler.is_compiling() and device == "cuda"


@torch.library.custom_op("nano416::linear_cross_entropy", mutates_args=())
def linear_cross_entropy(
    hidden: Tensor, table: Tensor, targets: Tensor, weights: Tensor, vocab_size: int, z_loss: float, learns: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Head and cross entropy in one, over chunks of rows: neither logits nor their gradient ever exist as a whole.

    hidden [R, D], table [V, D], targets [R], weights [R] -> the sum over rows of weight x cross entropy, and if it `learns`
    the gradients of hidden and table, made while a chunk's probabilities are at hand. To the compiler it is one operator.
    """
    words, on_cpu = table.to(hidden.dtype), hidden.device.type == "cpu"
    hidden_grad = torch.empty_like(hidden if learns else hidden[:0])
    table_grad = torch.empty_like(table if learns else table[:0], dtype=torch.float32)
    share = torch.empty_like(words if learns else words[:0])
    rows = min(len(hidden), max(64, LOSS_CHUNK // len(table)))
    block = min(rows, max(8, LOSS_BLOCK // len(table))) if on_cpu else rows
    chunk = hidden.new_empty(rows, len(table))  # reused, as `wide` is: new pages cost time
    wide = chunk.new_empty(block, len(table), dtype=torch.float32)
    loss = torch.zeros((), device=hidden.device)
    for start in range(0, len(hidden), rows):
        some = hidden[start : start + rows]
        logits = torch.mm(some, words.T, out=chunk[: len(some)])
        for first in range(0, len(some), block):  # in the processor's caches
            narrow, at = logits[first : first + block], slice(start + first, min(start + first + block, start + rows))
            probabilities, index, weight = wide[: len(narrow)].copy_(narrow), targets[at, None], weights[at, None]
            probabilities[:, vocab_size:] = -math.inf
            target_logits, peaks = probabilities.gather(1, index), probabilities.amax(1, keepdim=True)
            torch.softmax(probabilities, 1, out=probabilities)
            logsumexp = peaks - probabilities.amax(1, keepdim=True).log()  # the likeliest one has e^0 / sum
            loss += ((logsumexp - target_logits) * weight).sum()
            if learns:
                probabilities.mul_(weight * (1 + 2 * z_loss * logsumexp)).scatter_add_(1, index, -weight)
                narrow.copy_(probabilities)
        if learns:
            torch.mm(logits, words, out=hidden_grad[start : start + rows])
            torch.mm(logits.T, some, out=share)
            table_grad.add_(share) if start else table_grad.copy_(share)
    return loss, hidden_grad, table_grad


@linear_cross_entropy.register_fake
def _(hidden, table, targets, weights, vocab_size, z_loss, learns):
    given = (hidden, table) if learns else (hidden[:0], table[:0])
    return hidden.new_empty((), dtype=torch.float32), torch.empty_like(given[0]), given[1].float().contiguous()


def _keep_gradients(ctx, inputs, output) -> None:
    ctx.save_for_backward(*output[1:])


@torch.autograd.function.once_differentiable
def _scale_gradients(ctx, grad_loss: Tensor, *_):
    hidden_grad, table_grad = ctx.saved_tensors
    return hidden_grad * grad_loss, table_grad * grad_loss, None, None, None, None, None


linear_cross_entropy.register_autograd(_scale_gradients, setup_context=_keep_gradients)


class KVCache:
    """Keys and values of the tokens seen so far; room for `max_len`. Takes dtype and device from what it is given."""

    def __init__(self, max_len: int):
        self.max_len, self.length = max_len, 0
        self.entries: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> k, v of [B, K, max_len, H]

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store [B, K, T, H] after the tokens held; return all of them, [B, K, S + T, H]."""
        B, K, T, H = k.shape
        if layer not in self.entries:  # zeros: what `Step` masks must still be a number
            self.entries[layer] = (k.new_zeros(B, K, self.max_len, H), v.new_zeros(B, K, self.max_len, H))
        keys, values = self.entries[layer]
        end = self.length + T
        keys[:, :, self.length : end], values[:, :, self.length : end] = k, v
        return keys[:, :, :end], values[:, :, :end]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (arXiv:2104.09864) on x [B, N, T, H]; dimension i is paired with i + H/2."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)


def stretch(frequencies: Tensor, scaling: dict[str, float]) -> Tensor:
    """Llama 3.1's context extension: frequencies [H/2] that turn less than low_freq_factor times within the original
    context are divided by `factor`, those above high_freq_factor turns stay, in between the two are blended."""
    factor, low, high, context = (scaling[name] for name in ROPE_SCALING)
    kept = ((frequencies * context / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / factor)


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    min_p: float | None = None,
) -> Tensor:
    """Draw one token per row of logits [B, V] -> [B]. temperature 0 is greedy; top_k, top_p and min_p narrow the choice.

    min_p (arXiv:2407.01082) drops what is less likely than min_p x the likeliest token.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # probability of everything likelier
        ordered[(before >= top_p) & (before > 0)] = -math.inf  # the likeliest token always stays
        logits = torch.empty_like(logits).scatter_(-1, order, ordered)
    if min_p:
        logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(min_p), -math.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)


def penalize(logits: Tensor, tokens: Tensor, penalty: float) -> Tensor:
    """Make `tokens` [B, T] less likely in logits [B, V]: above 0 divided by `penalty`, below multiplied (arXiv:1909.05858)."""
    seen = logits.gather(-1, tokens)
    return logits.scatter(-1, tokens, torch.where(seen > 0, seen / penalty, seen * penalty))


def generate(
    model: Transformer,
    prompt: list[int],
    max_new_tokens: int,
    *,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    seed: int | None = None,
    stop_token: int | None = None,
    use_cache: bool = True,
    lookup: int = 0,
    step: Any = None,
) -> Iterator[int]:
    """Yield the tokens that continue `prompt` (at least one token), one by one; `stop_token` ends it unseen.

    Past the context the oldest half is forgotten, with and without cache alike, so both give the same tokens. So does
    lookup, the number of tokens to guess ahead where the text repeats itself; step is inference.Step, compiled.
    """
    assert prompt, "a prompt has at least one token"
    device = model.embed_tokens.weight.device
    generator = torch.Generator(device).manual_seed(seed) if seed is not None else None
    limit = model.config.seq_len
    window = list(prompt[-limit:])

    def draw(logits: Tensor) -> Tensor:
        if repetition_penalty is not None:
            logits = penalize(logits, torch.tensor([window], device=device), repetition_penalty)
        return sample(logits, temperature, top_k, top_p, generator, min_p)

    left = max_new_tokens
    while left > 0:
        room = min(limit, len(window) + left)
        if step is not None and repetition_penalty is None:  # a penalty reads the text, which is still on its way
            tokens = step.stream(window, draw)
        else:
            tokens = _guess(model, window, draw, room, lookup) if use_cache else _from_scratch(model, window, draw)
        for token in tokens:
            if token == stop_token:
                return
            yield token
            window.append(token)
            left -= 1
            if left == 0 or len(window) > limit:
                break
        window = window[-(limit // 2 or 1) :]


def _from_scratch(model: Transformer, window: list[int], draw: Callable[[Tensor], Tensor]) -> Iterator[int]:
    """The next tokens of `window`, which the caller extends, without a cache."""
    while True:
        yield int(draw(next_logits(model, window)))


def _guess(
    model: Transformer, window: list[int], draw: Callable[[Tensor], Tensor], room: int, lookup: int
) -> Iterator[int]:
    """The next tokens of `window`, which the caller extends, through a cache of `room` tokens.

    Prompt lookup: where the text's end was there before, what followed then is read along with the last token, and as
    much of it is kept as the model says itself. Each token is drawn as without a guess, so the text is the same: greedy
    or not. Short rows cost little more than one token, since the time goes into reading the weights.
    """
    cache, unseen, guess = KVCache(room), list(window), []
    match, length = 2, min(4, lookup)  # tokens that must agree before a guess, and how many to guess; both learn
    while True:
        rows = next_logits(model, unseen + guess, cache, last=len(guess) + 1)  # [1 + guess, V]
        kept = 0
        for kept, expected in enumerate([*guess, None]):
            token = int(draw(rows[kept : kept + 1]))
            yield token
            if token != expected:
                break
        cache.length -= len(guess) - kept
        if guess:
            hit = kept == len(guess)
            match, length = (2, min(2 * length, lookup)) if hit else (min(match + (kept == 0), 8), max(1, kept))
        unseen, guess = [token], look_up(window, match, min(length, room - cache.length - 1)) if lookup else []


def look_up(window: list[int], match: int, length: int) -> list[int]:
    """The `length` tokens that followed the last `match` tokens of `window` when they were there before, or none.

    Where they run into the end of the window, the guess goes on with itself: a loop is guessed round and round.
    """
    end, n = window[-match:], len(window)
    for at in range(n - match - 1, max(-1, n - 4096), -1):
        if window[at] == end[0] and window[at : at + match] == end:
            period = n - match - at
            return [window[at + match + i % period] for i in range(length)]
    return []


def generate_batch(
    model: Transformer, prompts: list[list[int]], max_new_tokens: int, *, seed: int | None = None, **sampling: Any
) -> Iterator[list[int]]:
    """Yield `max_new_tokens` times the next token of every prompt, at once; `sampling` is that of `sample`.

    Prompts are padded on the left; padding sees only itself. Longest prompt and new tokens must fit the context.
    """
    device, T = model.embed_tokens.weight.device, max(map(len, prompts))
    if T + max_new_tokens > model.config.seq_len:
        limit = model.config.seq_len
        raise ValueError(f"{T} + {max_new_tokens} tokens exceed the context of {limit} (seq_len); shorten one of them")
    padding = torch.tensor([T - len(prompt) for prompt in prompts], device=device)  # [B]
    tokens = torch.tensor([[0] * (T - len(prompt)) + prompt for prompt in prompts], device=device)  # [B, T]
    real = torch.arange(T + max_new_tokens, device=device) >= padding[:, None]  # [B, S]
    ones = torch.ones(T, T, dtype=torch.bool, device=device)
    mask = (real[:, None, :T] & ones.tril()) | ones.tril().triu()  # [B, T, T]
    positions = (torch.arange(T, device=device) - padding[:, None]).clamp(min=0)  # [B, T]
    cache = KVCache(T + max_new_tokens)
    generator = torch.Generator(device).manual_seed(seed) if seed is not None else None
    for length in range(T, T + max_new_tokens):
        with torch.inference_mode():
            hidden = model.hidden(tokens, cache=cache, positions=positions, mask=mask[:, None])
            drawn = sample(model.head(hidden[:, -1]), generator=generator, **sampling)  # [B]
        yield drawn.tolist()
        tokens, positions, mask = drawn[:, None], (length - padding)[:, None], real[:, None, : length + 1]


@torch.inference_mode()
def next_logits(model: Transformer, tokens: list[int], cache: KVCache | None = None, last: int = 1) -> Tensor:
    """Logits [last, V] after the last of `tokens`, and after those before it; `tokens` follow what `cache` holds."""
    ids = torch.tensor([tokens], device=model.embed_tokens.weight.device)
    with sdpa_kernel(ATTENTION):
        hidden = model.hidden(ids, cache=cache)
    return model.head(hidden[0, -last:])


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
