"""The checkpoint format of the original 416M run (dankit/language-model-pretraining), converted on reading.

Its files hold {"model_state_dict", "config", "step", "total_tokens", ...}. Three things differ from ours: the names of
the weights, the pairs of components that RoPE rotates, and an embedding without padding. The tokenizer is always gpt2.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model import VOCAB_MULTIPLE
from nano416.tokenizer import GPT2

# Parts of the names of weights: the original's, and ours.
SEED_NAMES = {
    "embeddings": "embed_tokens",
    "attention.w_q": "self_attn.q_proj",
    "attention.w_k": "self_attn.k_proj",
    "attention.w_v": "self_attn.v_proj",
    "attention.w_o": "self_attn.o_proj",
    "ffn.w_gate": "mlp.gate_proj",
    "ffn.w_value": "mlp.up_proj",
    "ffn.out": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def convert(checkpoint: dict[str, Any], path: Path) -> dict[str, Any]:
    """A checkpoint of the original run, converted to our format. Raises ValueError if it is not one."""
    # torch.compile and DDP put these prefixes before the names of the model they wrap.
    prefix = re.compile(r"^(_orig_mod\.|module\.)+")
    saved = checkpoint["model_state_dict"]
    weights = {prefix.sub("", name): weight for name, weight in saved.items()} if _is_state_dict(saved) else {}
    settings = checkpoint.get("config")
    names = {"embeddings.weight", "layers.0.ffn.w_gate.weight"}
    has_matrices = names <= weights.keys() and all(weights[name].dim() == 2 for name in names)
    n_heads = settings.get("n_heads") if isinstance(settings, dict) else None
    if not has_matrices or not isinstance(settings, dict) or not isinstance(n_heads, int) or n_heads < 1:
        raise ValueError(
            f"{path} looks like a checkpoint of another project: "
            "`embeddings.weight` or `n_heads` in its `config` is missing"
        )
    embedding = weights["embeddings.weight"]
    if not torch.equal(weights.get("lm_head.weight", embedding), embedding):
        raise ValueError(f"{path} has an untied output head; the original run ties it to the embedding")
    vocab_size, dim = embedding.shape
    layers = [re.match(r"layers\.(\d+)\.", name) for name in weights]
    config = {
        "dim": dim,
        "qk_norm": False,
        "n_layers": 1 + max(int(match[1]) for match in layers if match),
        "n_heads": n_heads,
        "n_kv_heads": settings.get("n_kv_heads", n_heads),
        # The file's config has only the ratio ffn_dim / dim.
        "ffn_dim": weights["layers.0.ffn.w_gate.weight"].shape[0],
        "vocab_size": vocab_size,
        "seq_len": settings.get("seq_len", 1024),
    }
    return {
        "format": 1,
        "step": checkpoint.get("step", 0),
        "tokens": checkpoint.get("total_tokens", 0),
        "config": {"model": config},
        "tokenizer": GPT2,
        "model": _convert_weights(weights, dim // n_heads, path),
        "metrics": {},
    }


def _is_state_dict(value: Any) -> bool:
    """True for a dict of dense tensors by name."""
    if not isinstance(value, dict):
        return False
    tensors = all(isinstance(weight, Tensor) and weight.layout == torch.strided for weight in value.values())
    return tensors and all(isinstance(name, str) for name in value)


def _convert_weights(weights: dict[str, Tensor], head_dim: int, path: Path) -> dict[str, Tensor]:
    converted = {}
    for name, weight in weights.items():
        # The head is tied to the embedding, and the rotary tables follow from the config.
        if name == "lm_head.weight" or "rope" in name or "rotary" in name:
            continue
        for theirs, ours in SEED_NAMES.items():
            name = re.sub(rf"(^|\.){re.escape(theirs)}\.", rf"\g<1>{ours}.", name)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            if weight.dim() != 2 or head_dim < 2 or head_dim % 2 or len(weight) % head_dim:
                raise ValueError(f"{path} has {name} of {list(weight.shape)}, which are no heads of {head_dim}")
            weight = _interleaved_to_half_split(weight, head_dim)
        converted[name] = weight
    embedding = converted["embed_tokens.weight"]
    padding = -len(embedding) % VOCAB_MULTIPLE
    converted["embed_tokens.weight"] = torch.nn.functional.pad(embedding, (0, 0, 0, padding))
    return converted


def _interleaved_to_half_split(weight: Tensor, head_dim: int) -> Tensor:
    """Reorder the rows of a q or k projection for our RoPE.

    The original rotates components (0, 1), (2, 3), ... of a head, ours (0, H/2), (1, H/2 + 1), ...
    """
    pairs = weight.view(-1, head_dim // 2, 2, weight.shape[1])  # [heads, H/2, 2, D]
    return pairs.transpose(1, 2).reshape(weight.shape)
