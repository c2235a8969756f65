"""The network: a Llama-shaped decoder. Tokens in, logits or a loss out.

RMSNorm, rotary positions (half-split, as in Hugging Face), SwiGLU, no biases; optionally grouped-query attention,
QK-norm (Qwen3) and bidirectional attention (masked diffusion). Parameter names are Hugging Face's, so an export is a
rename.

    model = Transformer(ModelConfig(vocab_size=50257))      # 416,420,864 parameters
    logits = model(tokens)                                  # [B, T] -> [B, T, V]
    loss = model(tokens, targets)                           # mean cross entropy, nats per token
"""

# Tensor dimensions: B batch, T tokens, D dim, N query heads, K key/value heads, H head_dim, S cached tokens + T,
# V vocabulary (padded)

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from nano416 import cpu_ops

INIT_STD = 0.02
# A matmul with 50304 columns is faster than with 50257; modded-nanogpt and nanochat pad to a multiple of 128 as well.
VOCAB_MULTIPLE = 128
# Targets with this value carry no loss, as in torch.nn.functional.cross_entropy.
IGNORE_INDEX = -100
# The keys of Llama 3's rope_scaling.
ROPE_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
# The largest sizes, beyond all published models (1,000 layers in arXiv:2203.00555, contexts of 10M tokens): a file may
# claim any. 2,000 layers take 7 s to build, fp32 counts positions exactly up to 2**24, and no tensor of such widths has
# more than 2**52 elements, of which torch can compute the bytes.
MAX_SIZES = {"dim": 2**20, "n_layers": 2000, "n_heads": 2**16, "n_kv_heads": 2**16, "head_dim": 2**16}
MAX_SIZES |= {"ffn_dim": 2**24, "vocab_size": 2**24, "seq_len": 2**24}


# The default of sizes that follow from others: None until __post_init__ computes them (vocab_size: until training.py
# knows the tokenizer). Typed Any so that the fields are int and no reader of a ModelConfig needs to check for None.
DERIVED: Any = None


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the network."""

    dim: int = 1024  # width of the residual stream
    n_layers: int = 24  # transformer blocks
    n_heads: int = 16  # query heads
    n_kv_heads: int = DERIVED  # key/value heads, fewer for grouped-query attention; none = n_heads
    head_dim: int = DERIVED  # width of one head; none = dim / n_heads
    ffn_dim: int = DERIVED  # width of the SwiGLU layer; none = 3.5 x dim
    vocab_size: int = DERIVED  # number of tokens; none = the data's tokenizer's
    seq_len: int = 1024  # context length in tokens
    rope_theta: float = 10000.0  # base of the rotary frequencies; larger for longer contexts
    tie_embeddings: bool = True  # use the embedding's weights for the output head
    qk_norm: bool = True  # RMSNorm on queries and keys (Qwen3), stable at higher learning rates; false = Llama
    # Imported models bring these two along; a config file may set them.
    norm_eps: float = field(default=1e-6, metadata={"file_only": True})
    rope_scaling: dict[str, float] | None = field(default=None, metadata={"file_only": True})
    # False for masked diffusion, where every token sees every token. It follows from the objective.
    causal: bool = field(default=True, metadata={"file_only": True})

    def __post_init__(self):
        for name in ("dim", "n_layers", "n_heads", "seq_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name, limit in MAX_SIZES.items():
            value = getattr(self, name)
            if value is not None and value > limit:
                raise ValueError(f"{name} must be at most {limit:,}, got {value:,}")
        if self.head_dim is None and self.dim % self.n_heads:
            raise ValueError(f"dim ({self.dim}) must be a multiple of n_heads ({self.n_heads})")
        derived = {"n_kv_heads": self.n_heads, "head_dim": self.dim // self.n_heads, "ffn_dim": 7 * self.dim // 2}
        for name, value in derived.items():
            if getattr(self, name) is None:
                # The dataclass is frozen for everybody else.
                object.__setattr__(self, name, value)
        if self.n_kv_heads < 1 or self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads ({self.n_heads}) must be a multiple of n_kv_heads ({self.n_kv_heads})")
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(
                f"head_dim must be even (rotary positions rotate pairs), got {self.head_dim}; "
                "choose another dim or n_heads"
            )
        if self.ffn_dim < 1:
            raise ValueError(f"ffn_dim must be at least 1, got {self.ffn_dim}")
        if self.vocab_size is not None and self.vocab_size < 2:
            raise ValueError(f"vocab_size must be at least 2, got {self.vocab_size}")
        if self.rope_theta <= 1:
            raise ValueError(f"rope_theta must be above 1, got {self.rope_theta}")
        if self.norm_eps <= 0:
            raise ValueError(f"norm_eps must be above 0, got {self.norm_eps}")
        if self.rope_scaling is not None:
            scaling = self.rope_scaling
            is_complete = set(scaling) == set(ROPE_SCALING) and min(scaling.values()) > 0
            if not is_complete or scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
                raise ValueError(f"rope_scaling needs {', '.join(ROPE_SCALING)}, low below high; got {scaling}")

    def num_params(self) -> int:
        """Number of parameters without the padding rows of the vocabulary; tied weights count once."""
        # Queries and output, keys and values.
        attention = 2 * self.dim * (self.n_heads + self.n_kv_heads) * self.head_dim
        norms = 2 * self.dim + (2 * self.head_dim if self.qk_norm else 0)
        block = attention + 3 * self.dim * self.ffn_dim + norms
        tables = 1 if self.tie_embeddings else 2
        return tables * self.vocab_size * self.dim + self.n_layers * block + self.dim

    def flops_per_token(self) -> int:
        """Training FLOPs per token: 6 per matmul parameter and 12 L N H T for attention (arXiv:2204.02311, app. B)."""
        # Attention counts in full although causal kernels skip half of it: nanoGPT, nanochat and torchtitan count so,
        # and MFUs can only be compared within one convention. An untied embedding is looked up, not multiplied.
        lookup_only = 0 if self.tie_embeddings else self.vocab_size * self.dim
        attention = 12 * self.n_layers * self.n_heads * self.head_dim * self.seq_len
        return 6 * (self.num_params() - lookup_only) + attention


class QKNorm(nn.RMSNorm):
    """RMSNorm over head_dim in the dtype of x. Under autocast an fp32 gain would also make the queries fp32."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Self-attention with rotary positions."""

    def __init__(self, config: ModelConfig, layer_idx: int):
        super().__init__()
        # Where this layer's keys and values are in a KVCache.
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.enable_gqa = config.n_heads != config.n_kv_heads
        self.q_proj = nn.Linear(config.dim, config.n_heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.n_heads * config.head_dim, config.dim, bias=False)
        self.q_norm = QKNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = QKNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, sdpa: dict[str, Any], cache: "KVCache | None") -> Tensor:
        B, T, _ = x.shape
        # -1 and not n_heads: under tensor parallelism each rank has some of the heads.
        q = self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # [B, N, T, H]
        k = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # [B, K, T, H]
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # [B, K, T, H]
        if self.q_norm is not None and self.k_norm is not None:
            q = self.q_norm(q)
            k = self.k_norm(k)
        q = apply_rotary_emb(q, cos, sin)
        k = apply_rotary_emb(k, cos, sin)
        if cache is not None:
            k, v = cache.update(self.layer_idx, k, v)  # [B, K, S, H]
        out = F.scaled_dot_product_attention(q, k, v, enable_gqa=self.enable_gqa, **sdpa)  # [B, N, T, H]
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), Shazeer 2020 (arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.up_proj = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.down_proj = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention and SwiGLU, each after an RMSNorm and added to the residual stream."""

    def __init__(self, config: ModelConfig, layer_idx: int):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.self_attn = Attention(config, layer_idx)
        # Hugging Face's name; it is the norm before the MLP.
        self.post_attention_layernorm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, sdpa: dict[str, Any], cache: "KVCache | None") -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, sdpa, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """The whole network. `config.vocab_size` must be set."""

    rope_cos: Tensor  # [seq_len + 1, H/2]
    rope_sin: Tensor  # [seq_len + 1, H/2]
    padding_bias: Tensor | None  # [V]

    def __init__(self, config: ModelConfig):
        super().__init__()
        assert config.vocab_size, "vocab_size comes from the tokenizer"
        self.config = config
        # Masked diffusion needs one more row, for the mask token.
        rows = config.vocab_size if config.causal else config.vocab_size + 1
        padded_vocab_size = math.ceil(rows / VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        self.embed_tokens = nn.Embedding(padded_vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config, layer_idx) for layer_idx in range(config.n_layers))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.lm_head = None if config.tie_embeddings else nn.Linear(config.dim, padded_vocab_size, bias=False)
        self.init_buffers()
        self.init_weights()

    def init_buffers(self) -> None:
        """Compute rotary angles and the mask of padded tokens, which follow from the config and are in no checkpoint.

        A model built on the meta device calls this again once its tensors have memory.
        """
        config = self.config
        # In fp32: bf16 has 8 significant bits, so positions above 256 would no longer be distinct.
        inv_freq = config.rope_theta ** (-torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim)
        if config.rope_scaling is not None:
            inv_freq = scale_rope_llama3(inv_freq, config.rope_scaling)
        # One more position than seq_len, for nano416/ablations.py: the last target of a reordered sequence may be read.
        positions = torch.arange(config.seq_len + 1, dtype=torch.float32)
        angles = torch.outer(positions, inv_freq)  # [seq_len + 1, H/2]
        # Padded tokens get a logit of -inf: they are never drawn and have no gradient.
        padding_bias = torch.zeros(self.embed_tokens.num_embeddings)
        padding_bias[config.vocab_size :] = -math.inf
        has_padding = len(padding_bias) > config.vocab_size
        self.register_buffer("rope_cos", angles.cos(), persistent=False)
        self.register_buffer("rope_sin", angles.sin(), persistent=False)
        self.register_buffer("padding_bias", padding_bias if has_padding else None, persistent=False)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialize as GPT-2: std 0.02, divided by sqrt(2 n_layers) in layers that write to the residual stream."""
        # 2 n_layers outputs are added up; with this their sum does not grow with depth.
        residual_std = INIT_STD / math.sqrt(2 * self.config.n_layers)
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                nn.init.ones_(parameter)
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.normal_(parameter, std=residual_std)
            else:
                nn.init.normal_(parameter, std=INIT_STD)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        loss_weights: Tensor | None = None,
        reduction: str = "mean",
        z_loss: float = 0.0,
        **hidden_args: Any,
    ) -> Tensor:
        """Logits [B, T, V] of `tokens` [B, T]; with `targets` [B, T] their cross entropy in nats, see `loss`.

        hidden_args: cache, positions, mask and attention_dropout, see `hidden`.
        """
        hidden = self.hidden(tokens, **hidden_args)
        if targets is None:
            return self.head(hidden)
        return self.loss(hidden, targets, loss_weights, reduction, z_loss)

    def hidden(
        self,
        tokens: Tensor,
        *,
        cache: "KVCache | None" = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        attention_dropout: float = 0.0,
    ) -> Tensor:
        """Normalised hidden states [B, T, D] after the last block, the input of `head`.

        cache: keys and values of earlier tokens, to which those of `tokens` are appended. positions [B, T]: where each
        token stands; by default they follow one another after the cache. mask: bool, broadcast to [B, N, T, S], true =
        may attend; it replaces the causal mask. attention_dropout: fraction of the attention weights set to zero.
        """
        T = tokens.shape[1]
        start = cache.length if cache is not None else 0
        if positions is not None:
            cos = self.rope_cos[positions][:, None]  # [B, 1, T, H/2]
            sin = self.rope_sin[positions][:, None]
        elif start + T <= self.config.seq_len:
            cos = self.rope_cos[start : start + T]  # [T, H/2]
            sin = self.rope_sin[start : start + T]
        else:
            raise ValueError(f"{start + T} tokens exceed the context of {self.config.seq_len} (seq_len)")
        # A single token may attend to all of the cache, which needs no mask.
        is_causal = mask is None and self.config.causal and T > 1
        if is_causal and start > 0:
            # SDPA's is_causal would take the T queries for the first of the S tokens; they are the last.
            mask = torch.ones(T, start + T, dtype=torch.bool, device=tokens.device).tril(diagonal=start)
            is_causal = False
        sdpa = {"attn_mask": mask, "is_causal": is_causal, "dropout_p": attention_dropout}
        x = self.embed_tokens(tokens)  # [B, T, D]
        for block in self.layers:
            x = block(x, cos, sin, sdpa, cache)
        if cache is not None:
            # Only now: all layers have written to the same positions.
            cache.length += T
        return self.norm(x)

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., D] to logits [..., V]; padded columns are -inf."""
        table = self.embed_tokens if self.lm_head is None else self.lm_head
        if not isinstance(table, nn.Embedding | nn.Linear):
            return table(hidden)  # a quantized layer, which adds padding_bias itself
        if self.padding_bias is None:
            return F.linear(hidden, table.weight)
        if torch.is_grad_enabled():
            return F.linear(hidden, table.weight, self.padding_bias.to(table.weight.dtype))
        # Without gradients they can be overwritten, where a bias would write all logits once more.
        logits = F.linear(hidden, table.weight)
        logits[..., self.config.vocab_size :] = -math.inf
        return logits

    def loss(
        self, hidden: Tensor, targets: Tensor, loss_weights: Tensor | None, reduction: str, z_loss: float
    ) -> Tensor:
        """Cross entropy of `head(hidden)` against targets [B, T] in fp32, nats. Targets of -100 carry no loss.

        reduction: "mean" over the counted targets, "sum", or "none" ([B, T]). loss_weights [B, T] multiply each token's
        loss, and the mean then divides by B x T. z_loss x logsumexp(logits)^2 keeps logits from drifting (PaLM,
        arXiv:2204.02311, section 5); only its gradient is added, so that the value remains the cross entropy.
        """
        counted = (targets != IGNORE_INDEX).float()
        weights = counted if loss_weights is None else counted * loss_weights  # [B, T]
        if reduction == "mean":
            weights = weights / (counted.sum() if loss_weights is None else counted.numel())
        table = self.embed_tokens if self.lm_head is None else self.lm_head
        # On a GPU the compiler fuses logits and cross entropy. Elsewhere cpu_ops computes both in chunks, so that the
        # logits, the largest tensor of a step, never exist as a whole.
        is_fused_by_compiler = torch.compiler.is_compiling() and hidden.device.type == "cuda"
        if reduction != "none" and isinstance(table, nn.Embedding | nn.Linear) and not is_fused_by_compiler:
            device_type = hidden.device.type
            autocasting = torch.is_autocast_enabled(device_type)
            dtype = torch.get_autocast_dtype(device_type) if autocasting else table.weight.dtype
            rows = hidden.flatten(0, -2).to(dtype)  # [B*T, D]
            targets = targets.flatten().clamp(min=0)  # ignored ones have weight 0
            vocab_size = self.config.vocab_size
            return cpu_ops.linear_cross_entropy(rows, table.weight, targets, weights.flatten(), vocab_size, z_loss)
        logits = self.head(hidden).float().flatten(0, -2)  # [B*T, V]
        losses = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none")
        losses = losses.view_as(targets)  # [B, T]
        if z_loss:
            z = z_loss * logits.logsumexp(-1).view_as(targets).square()
            losses = losses + (z - z.detach())
        losses = losses * weights
        return losses if reduction == "none" else losses.sum()


class KVCache:
    """Keys and values of the tokens seen so far, at most `max_len`."""

    def __init__(self, max_len: int):
        self.max_len = max_len
        self.length = 0
        self.entries: dict[int, tuple[Tensor, Tensor]] = {}  # layer_idx -> k, v of [B, K, max_len, H]

    def update(self, layer_idx: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k, v [B, K, T, H] of one layer and return all of its keys and values, [B, K, S, H] each."""
        if layer_idx not in self.entries:
            # Empty: memory that is never used is never touched, and only what was written is read.
            shape = (*k.shape[:2], self.max_len, k.shape[3])
            self.entries[layer_idx] = (k.new_empty(shape), v.new_empty(shape))
        keys, values = self.entries[layer_idx]
        end = self.length + k.shape[2]
        keys[:, :, self.length : end] = k
        values[:, :, self.length : end] = v
        return keys[:, :, :end], values[:, :, :end]


def apply_rotary_emb(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (arXiv:2104.09864) on x [B, N, T, H]; dimension i is paired with i + H/2."""
    # The fp32 tables would turn bf16 queries and keys into fp32.
    cos = cos.to(x.dtype)
    sin = sin.to(x.dtype)
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)


def scale_rope_llama3(inv_freq: Tensor, scaling: dict[str, float]) -> Tensor:
    """Llama 3.1's context extension of inv_freq [H/2] (huggingface.co/meta-llama/Llama-3.1-8B, config.json).

    Frequencies that turn less than low_freq_factor times within the original context are divided by `factor`, those
    above high_freq_factor turns stay, and in between the two are blended.
    """
    factor, low, high, context = (scaling[name] for name in ROPE_SCALING)
    kept = ((inv_freq * context / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
    return inv_freq * (kept + (1 - kept) / factor)
