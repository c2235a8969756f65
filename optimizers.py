"""Parameters to optimizer, step to learning rate.

optimizer = build_optimizer(model, cfg)
lr = lr_at(step, total_steps, cfg)          # before optimizer step `step` (0-based)
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

OptimizerName = Literal["adamw"]
ScheduleName = Literal["cosine", "linear", "wsd", "constant", "inv_sqrt"]
WSD_DECAY_FRAC = 0.2  # the last fifth of a warm-up, stable, decay schedule (arXiv:2405.18392 finds 10-20% enough)


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and learning-rate schedule."""

    optimizer: OptimizerName = "adamw"  # update rule: adamw
    max_lr: float = 3e-4  # peak learning rate
    min_lr: float = 3e-5  # learning rate at the end of the schedule
    schedule: ScheduleName = "cosine"  # cosine, linear, wsd, constant or inv_sqrt: the way down from max_lr
    warmup_frac: float = 0.02  # share of the steps in which the learning rate rises linearly
    weight_decay: float = 0.1  # decoupled decay of weight matrices; gains have none
    beta1: float = 0.9  # decay of the gradient's running mean
    beta2: float = 0.95  # decay of the squared gradient's running mean
    eps: float = 1e-8  # added to the root of the squared gradient
    grad_clip: float | None = 1.0  # largest norm of the whole gradient; none = no clipping

    def __post_init__(self):
        checks = {
            "max_lr must be above 0": self.max_lr > 0,
            f"min_lr must be between 0 and max_lr ({self.max_lr:g})": 0 <= self.min_lr <= self.max_lr,
            "warmup_frac must be in [0, 1)": 0 <= self.warmup_frac < 1,
            "weight_decay must not be negative": self.weight_decay >= 0,
            "beta1 must be in [0, 1)": 0 <= self.beta1 < 1,
            "beta2 must be in [0, 1)": 0 <= self.beta2 < 1,
            "eps must be above 0": self.eps > 0,
            "grad_clip must be above 0 (none = no clipping)": self.grad_clip is None or self.grad_clip > 0,
        }
        for rule, holds in checks.items():
            if not holds:
                raise ValueError(f"{rule}, got {getattr(self, rule.split()[0])}")


def build_optimizer(model: nn.Module, cfg: OptimConfig) -> Optimizer:
    """Matrices decay, vectors (gains) do not; one fused kernel per step."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": cfg.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=cfg.max_lr, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, fused=True)


def clip_gradients(model: nn.Module, max_norm: float | None) -> Tensor:
    """Norm of the whole gradient before clipping, as a tensor on the device (no synchronisation)."""
    return nn.utils.clip_grad_norm_(model.parameters(), math.inf if max_norm is None else max_norm)


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Learning rate of all groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr


# Each schedule maps progress after the warm-up, 0..1, to a share of (max_lr - min_lr), 1..0.
SCHEDULES: dict[str, Callable[[float, float], float]] = {
    "cosine": lambda progress, warmup: 0.5 * (1 + math.cos(math.pi * progress)),
    "linear": lambda progress, warmup: 1 - progress,
    "wsd": lambda progress, warmup: min(1.0, (1 - progress) / WSD_DECAY_FRAC),
    "constant": lambda progress, warmup: 1.0,
    "inv_sqrt": lambda progress, warmup: math.sqrt(warmup / (warmup + progress * (1 - warmup))),
}


def lr_at(step: int, total_steps: int, cfg: OptimConfig) -> float:
    """Learning rate of optimizer step `step` (0-based): a linear warm-up to max_lr, then the schedule down to min_lr."""
    warmup_steps = round(cfg.warmup_frac * total_steps)
    if step < warmup_steps:
        return cfg.max_lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)
    warmup = max(warmup_steps, 1) / total_steps
    return cfg.min_lr + (cfg.max_lr - cfg.min_lr) * SCHEDULES[cfg.schedule](min(progress, 1.0), warmup)
