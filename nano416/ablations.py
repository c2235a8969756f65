"""Ablations of autoregressive training: attempts to make it overfit less on repeated data.

    batch = ablations.apply(batch, cfg, seed)      # token orders, random attention masks, attention dropout

They answer the question of arXiv:2507.15857 whether data augmentation alone explains the advantage of masked diffusion
over many epochs. There only many token orders helped. All of them concern training; validation stays left to right.

Token orders and attention masks are a function of the seed and of a sequence's number in the run, so they do not depend
on the number of processes and are the same after a resume. Set in the table [ablation] of a config file:

    [ablation]
    num_orders = 16
"""

# Tensor dimensions: B batch, T tokens, N num_orders

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from nano416.dataloader import Batch

# Smallest probability of losing a key, for a token that loses some: masked diffusion's EPS.
MIN_DROP_PROB = 1e-3


@dataclass(frozen=True)
class AblationConfig:
    """Ablations of autoregressive training (arXiv:2507.15857)."""

    # Token orders in which sequences are read; 0 = left to right.
    num_orders: int = field(default=0, metadata={"file_only": True})
    # Order i moves a token by about i positions; otherwise the orders are random permutations.
    predefined_orders: bool = field(default=False, metadata={"file_only": True})
    # Fraction of the tokens that see only a random part of the tokens before them.
    randmask_ratio: float = field(default=0.0, metadata={"file_only": True})
    # Dropout on the attention weights, for both objectives.
    attention_dropout: float = field(default=0.0, metadata={"file_only": True})

    def __post_init__(self):
        if self.num_orders < 0:
            raise ValueError(f"num_orders must not be negative, got {self.num_orders}")
        if not 0 <= self.randmask_ratio <= 1:
            raise ValueError(f"randmask_ratio must be in [0, 1], got {self.randmask_ratio}")
        if not 0 <= self.attention_dropout < 1:
            raise ValueError(f"attention_dropout must be in [0, 1), got {self.attention_dropout}")
        if self.predefined_orders and self.num_orders < 2:
            raise ValueError(f"predefined_orders has no effect with num_orders={self.num_orders}; set it to 2 or more")

    @property
    def is_active(self) -> bool:
        return self != AblationConfig()

    def validate_for(self, objective: str) -> None:
        """Raise ValueError for an option that has no effect with the objective."""
        default = AblationConfig()
        for name in ("num_orders", "predefined_orders", "randmask_ratio"):
            if objective != "ar" and getattr(self, name) != getattr(default, name):
                raise ValueError(f"{name} has no effect with --objective={objective}; leave it out or train ar")


def apply(batch: Batch, cfg: AblationConfig, seed: int) -> Batch:
    """Return the batch with reordered tokens, an attention mask and attention dropout, as `cfg` asks."""
    if cfg.num_orders:
        batch = reorder(batch, cfg, seed)
    if cfg.randmask_ratio:
        T = batch.tokens.shape[1]
        mask = random_attention_mask(batch.sequence_ids, T, cfg.randmask_ratio, seed, batch.tokens.device)
        batch = replace(batch, mask=mask)
    return replace(batch, attention_dropout=cfg.attention_dropout)


def reorder(batch: Batch, cfg: AblationConfig, seed: int) -> Batch:
    """Return the batch with each sequence in one of `num_orders` orders.

    The first token stays first. A token carries its own position, but the model is not told its target's.
    """
    device = batch.tokens.device
    sequences = torch.cat([batch.tokens, batch.targets[:, -1:]], dim=1)  # [B, T + 1]
    orders = token_orders(batch.tokens.shape[1], cfg.num_orders, cfg.predefined_orders, seed).to(device)  # [N, T]
    draws = [np.random.default_rng((seed, i)).random(dtype=np.float32) for i in batch.sequence_ids]
    choice = (torch.tensor(draws, device=device) * cfg.num_orders).long()  # [B]
    positions = torch.nn.functional.pad(1 + orders[choice], (1, 0))  # [B, T + 1], beginning with 0
    sequences = sequences.gather(1, positions)
    return replace(batch, tokens=sequences[:, :-1], targets=sequences[:, 1:], positions=positions[:, :-1])


# Every micro-batch of a run asks for the same orders.
@lru_cache(maxsize=1)
def token_orders(length: int, count: int, predefined: bool, seed: int) -> Tensor:
    """Permutations [count, length] of the positions; the first one is left to right.

    predefined: order i sorts the positions after adding noise with standard deviation i to each.
    """
    rng = np.random.default_rng((seed, 0, 2))
    positions = np.arange(length)
    if predefined:
        keys = positions + np.arange(count)[:, None] * rng.standard_normal((count, length))
    else:
        keys = np.concatenate([positions[None], rng.random((count - 1, length))])
    return torch.from_numpy(keys.argsort(1))


def random_attention_mask(sequence_ids: Sequence[int], T: int, ratio: float, seed: int, device: torch.device) -> Tensor:
    """Return a causal attention mask, bool [B, 1, T, T], in which a fraction `ratio` of the tokens lose earlier keys.

    Such a token loses each key with the same probability, which is drawn for the token as masked diffusion draws it for
    a sequence. A token always sees itself.
    """
    kept = []
    for i in sequence_ids:
        state = np.random.SeedSequence((seed, i, 3)).generate_state(1, np.uint64)[0]
        # torch seeds are signed: 63 bits.
        generator = torch.Generator(device).manual_seed(int(state >> np.uint64(1)))
        noise = torch.rand(T, T + 2, device=device, generator=generator)
        choice, level, keys = noise.split([1, 1, T], dim=1)  # [T, 1], [T, 1], [T, T]
        p = (1 - MIN_DROP_PROB) * level + MIN_DROP_PROB
        kept.append((choice >= ratio) | (keys >= p))
    itself = torch.eye(T, dtype=torch.bool, device=device)
    return (torch.stack(kept).tril() | itself)[:, None]
