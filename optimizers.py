"""Parameters to optimizer, step to learning rate.

optimizer = build_optimizer(model, cfg)
set_lr(optimizer, lr_at(step, total_steps, cfg))   # before optimizer step `step` (0-based)
apply(optimizer, skip)                             # skip: 1.0 leaves weights and state as they are

An optimizer of your own is one function, from parameter groups and OptimConfig to a torch Optimizer, and one line in
OPTIMIZERS. Matrices inside the layers are "hidden", embedding and head are "tables", everything else is a "gain".
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor, _foreach_add_, _foreach_copy_, _foreach_lerp_, _foreach_mul_, _foreach_norm, _foreach_sub_, nn  # type: ignore[attr-defined]
from torch.optim import Optimizer

ScheduleName = Literal["cosine", "linear", "wsd", "constant", "inv_sqrt"]
Groups = list[dict[str, Any]]
Place = Callable[[Tensor, Tensor], Tensor]  # a tensor, cut and placed like another
Spread = Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], Tensor]  # work on a batch, shared by all ranks
WSD_DECAY_FRAC = 0.2  # the last fifth of a warm-up, stable, decay schedule (arXiv:2405.18392 finds 10-20% enough)
MUON_MOMENTUM = 0.95
NEWTON_SCHULZ = 3.4445, -4.7750, 2.0315  # x -> ax + bx^3 + cx^5, five times: (0, 1] to [0.7, 1.2] (K. Jordan, 2024)
NEWTON_SCHULZ_STEPS = 5


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and learning-rate schedule."""

    optimizer: str = "muon"  # update rule: muon, adamw, lion, adam, nadam, rmsprop or sgd
    max_lr: float | None = None  # peak learning rate; none = the optimizer's own, 3e-3 for muon and 3e-4 for adamw
    embed_lr: float | None = None  # peak learning rate of embedding and head; none = max_lr
    min_lr: float = 0.0  # learning rate at the end of the schedule
    schedule: ScheduleName = "linear"  # linear, cosine, wsd, constant or inv_sqrt: the way down from max_lr
    warmup_frac: float = 0.02  # share of the steps in which the learning rate rises linearly
    weight_decay: float = 0.1  # decoupled decay of weight matrices; gains have none
    beta1: float = 0.9  # decay of the gradient's running mean
    beta2: float = 0.95  # decay of the squared gradient's running mean
    eps: float = 1e-8  # added to the root of the squared gradient
    grad_clip: float | None = 1.0  # largest norm of the whole gradient; none = no clipping
    z_loss: float = 0.0  # weight of log(sum of exp(logits))^2 beside the loss (1e-4 in PaLM): logits do not drift
    ema: float | None = None  # decay (0.999) of averaged weights, used to evaluate and to chat; none = no average

    def __post_init__(self):
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {self.optimizer!r}")
        if self.schedule == "constant" and self.min_lr:
            raise ValueError(f"min_lr ({self.min_lr:g}) has no effect with the constant schedule; leave it out")
        checks = {
            "embed_lr must be above 0 (none = max_lr)": self.embed_lr is None or self.embed_lr > 0,
            "z_loss must not be negative": self.z_loss >= 0,
            "ema must be in (0, 1) (none = no average)": self.ema is None or 0 < self.ema < 1,
            "max_lr must be above 0": self.peak_lr > 0,
            f"min_lr must be between 0 and max_lr ({self.peak_lr:g})": 0 <= self.min_lr <= self.peak_lr,
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

    @property
    def peak_lr(self) -> float:
        """max_lr, or what suits the optimizer."""
        return MAX_LR[self.optimizer] if self.max_lr is None else self.max_lr


def build_optimizer(model: nn.Module, cfg: OptimConfig, spread: Spread | None = None) -> Optimizer:
    """The optimizer of `cfg` over all parameters. Matrices decay, gains do not.

    spread: distributed.spread, for update rules whose work the ranks share.
    """
    kinds: dict[str, list[nn.Parameter]] = {"hidden": [], "tables": [], "gains": []}
    for name, parameter in model.named_parameters():
        kind = "gains" if parameter.dim() < 2 else "hidden" if name.startswith("layers.") else "tables"
        kinds[kind].append(parameter)
    embed_lr = cfg.peak_lr if cfg.embed_lr is None else cfg.embed_lr
    groups: Groups = [
        {"params": kinds["hidden"], "kind": "hidden", "lr_scale": 1.0, "weight_decay": cfg.weight_decay},
        {
            "params": kinds["tables"],
            "kind": "tables",
            "lr_scale": embed_lr / cfg.peak_lr,
            "weight_decay": cfg.weight_decay,
        },
        {"params": kinds["gains"], "kind": "gains", "lr_scale": 1.0, "weight_decay": 0.0},
    ]
    optimizer = OPTIMIZERS[cfg.optimizer](groups, cfg)
    if isinstance(optimizer, Muon) and spread:
        optimizer.spread = spread
    return optimizer


def adamw(groups: Groups, cfg: OptimConfig) -> Optimizer:
    """arXiv:1711.05101, one fused kernel per step."""
    return torch.optim.AdamW(groups, lr=cfg.peak_lr, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, fused=True)


def muon(groups: Groups, cfg: OptimConfig) -> Optimizer:
    """Muon for hidden matrices, AdamW for the rest."""
    return Muon(groups, lr=cfg.peak_lr, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, fused=True)


def lion(groups: Groups, cfg: OptimConfig) -> Optimizer:
    """Wants a 3 to 10 times lower learning rate and as much higher decay than adamw."""
    return Lion(groups, {"lr": cfg.peak_lr, "betas": (cfg.beta1, cfg.beta2)})


def adam(groups: Groups, cfg: OptimConfig) -> Optimizer:
    """arXiv:1412.6980; the decay is part of the gradient."""
    return torch.optim.Adam(groups, lr=cfg.peak_lr, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, fused=True)


def nadam(groups: Groups, cfg: OptimConfig) -> Optimizer:
    """AdamW with Nesterov's momentum (Dozat 2016)."""
    betas = (cfg.beta1, cfg.beta2)
    return torch.optim.NAdam(groups, lr=cfg.peak_lr, betas=betas, eps=cfg.eps, decoupled_weight_decay=True)


def rmsprop(groups: Groups, cfg: OptimConfig) -> Optimizer:
    """Hinton's, with momentum beta1; the decay is part of the gradient."""
    return torch.optim.RMSprop(groups, lr=cfg.peak_lr, alpha=cfg.beta2, eps=cfg.eps, momentum=cfg.beta1)


def sgd(groups: Groups, cfg: OptimConfig) -> Optimizer:
    """Nesterov momentum beta1; wants learning rates around 0.1-1."""
    return torch.optim.SGD(groups, lr=cfg.peak_lr, momentum=cfg.beta1, nesterov=cfg.beta1 > 0, fused=True)


OPTIMIZERS: dict[str, Callable[[Groups, OptimConfig], Optimizer]] = {
    "muon": muon,
    "adamw": adamw,
    "lion": lion,
    "adam": adam,
    "nadam": nadam,
    "rmsprop": rmsprop,
    "sgd": sgd,
}
# Learning rates to begin with: muon's by measurement (EXPERIMENTS.md), adamw's is GPT-3's for this size (arXiv:2005.14165).
MAX_LR = {"muon": 3e-3, "adamw": 3e-4, "adam": 3e-4, "nadam": 3e-4, "rmsprop": 3e-4, "lion": 1e-4, "sgd": 0.3}


class Muon(torch.optim.AdamW):
    """Momentum made orthogonal for the group "hidden" (K. Jordan, 2024), AdamW for the others.

    An orthogonal [A, B] matrix has entries of RMS 1/sqrt(max(A, B)); times 0.2 sqrt(max(A, B)) its update is as large as
    AdamW's, and one learning rate suits both (Moonlight, arXiv:2502.16982).
    """

    spread: Spread = staticmethod(lambda work, batch, like: work(batch))  # type: ignore[assignment]

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Part of load_state_dict. Adam's mends old files and looks for a "step" that momenta lack."""
        Optimizer.__setstate__(self, state)

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:  # type: ignore[override]
        """One update; found_inf = 1 leaves weights and momentum as they are, without a synchronisation."""
        assert closure is None
        groups = self.param_groups
        self.param_groups = [group for group in groups if group["kind"] != "hidden"]
        super().step()
        self.param_groups = groups
        shape_of: Callable[[Tensor], tuple] = lambda p: (*p.shape, str(getattr(p, "placements", "")))  # how it is cut
        for group in groups:
            if group["kind"] == "hidden":
                ready = sorted((p for p in group["params"] if p.grad is not None), key=shape_of)
                for _, same in groupby(ready, shape_of):
                    self._update(list(same), group["lr"], group["weight_decay"])

    def _update(self, params: list[Tensor], lr: float, weight_decay: float) -> None:
        """All matrices of one shape together: their products are batched. Each rank moves its own part of them."""
        grads = torch.stack([local(p.grad) for p in params if p.grad is not None])  # [n, A, B]
        skip = getattr(self, "found_inf", None)
        keep = torch.ones((), device=grads.device) if skip is None else 1 - skip
        grads = torch.where(keep > 0, grads, 0.0)
        for p in params:
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        momenta = [local(self.state[p]["momentum"]) for p in params]
        momentum = torch.stack(momenta).lerp_(grads, (1 - MUON_MOMENTUM) * keep)
        ahead = grads.lerp_(momentum, MUON_MOMENTUM)  # Nesterov's
        direction = self.spread(orthogonalize, ahead, params[0])
        size = 0.2 * math.sqrt(max(params[0].shape))
        parts = [local(p) for p in params]
        _foreach_mul_(parts, 1 - lr * weight_decay * keep)
        _foreach_add_(parts, list((direction * (-lr * size * keep)).unbind()))
        _foreach_copy_(momenta, list(momentum.unbind()))


def orthogonalize(matrices: Tensor) -> Tensor:
    """[n, A, B] -> the nearest (semi-)orthogonal matrices, singular values within about [0.7, 1.2], in bf16 products."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)).bfloat16()  # singular values <= 1
    x = x.mT if tall else x  # the smaller of the two squares
    a, b, c = NEWTON_SCHULZ
    for _ in range(NEWTON_SCHULZ_STEPS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


class Lion(Optimizer):
    """Sign of an interpolated momentum (arXiv:2302.06675, algorithm 2)."""

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:  # type: ignore[override]
        """One update; found_inf = 1 leaves weights and momentum as they are, without a synchronisation."""
        assert closure is None
        skip = getattr(self, "found_inf", None)
        for group in self.param_groups:
            lr, (beta1, beta2) = group["lr"], group["betas"]
            for p in (p for p in group["params"] if p.grad is not None):
                keep = torch.ones((), device=p.device) if skip is None else 1 - skip
                grad = torch.where(keep > 0, p.grad, 0.0)
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                direction = momentum.lerp(grad, 1 - beta1).sign_()
                p.mul_(1 - lr * group["weight_decay"] * keep).add_(direction * (-lr * keep))
                momentum.lerp_(grad, (1 - beta2) * keep)


def apply(optimizer: Optimizer, skip: Tensor) -> None:
    """One optimizer step, or none where `skip` is 1. Fused kernels and our own look at it on the device, others cost a wait."""
    if optimizer.defaults.get("fused") or isinstance(optimizer, Lion):
        device = optimizer.param_groups[0]["params"][0].device  # the host's, if the weights are there
        optimizer.found_inf = skip.to(device)  # type: ignore[attr-defined]
        optimizer.step()
    elif not skip.item():
        optimizer.step()


class Average:
    """Exponential moving average of the weights: often better than the last ones, and never evaluated by accident.

    place: distributed.part_like, for the saved weights of a `state` that goes on.
    """

    def __init__(self, model: nn.Module, decay: float, state: dict[str, Any] | None = None, place: Place | None = None):
        self.decay, self.live = decay, dict(model.named_parameters())
        self.updates: int = (state or {}).get("ema_updates", 0)
        self.weights = {name: p.detach().clone() for name, p in self.live.items()}
        for name, saved in ((state or {}).get("ema") or {}).items():
            weight = self.weights[name]
            weight.copy_(place(saved, weight) if place else saved)

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint, beside the live weights."""
        return {"ema": self.weights, "ema_updates": self.updates}

    @torch.no_grad()
    def update(self) -> None:
        """After each optimizer step. The decay grows to its full value, or the random start would linger."""
        self.updates += 1
        decay = min(self.decay, self.updates / (self.updates + 10))
        _foreach_lerp_([local(w) for w in self.weights.values()], [local(p) for p in self.live.values()], 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the model's weights and the averaged ones, in place: a sharded model knows its weights by address."""
        for name, p in self.live.items():
            live, average = local(p), local(self.weights[name])
            kept = live.clone()
            live.copy_(average)
            average.copy_(kept)


@contextlib.contextmanager
def swapped_in(average: Average | None) -> Iterator[None]:
    """The model holds the averaged weights inside, the live ones after."""
    if average:
        average.swap()
    try:
        yield
    finally:
        if average:
            average.swap()


class Statistics:
    """Norms of every parameter, of its gradient (as clipped) and of its update, and how far successive gradients agree.

    One row per `period` steps (0 = none): {"step", "weight_norm": {name: value}, "grad_norm": ..., "update_norm": ...,
    "grad_cosine": ...}. Such a step holds two more copies of the weights and waits for the device once.
    """

    def __init__(self, model: nn.Module, period: int, write: Callable[[dict[str, Any]], None]):
        self.named, self.period, self.write = dict(model.named_parameters()), period, write
        self.gradients: list[Tensor] = []  # of the step before

    @contextlib.contextmanager
    def around(self, step: int) -> Iterator[None]:
        """Around the optimizer's part of step `step` (1-based)."""
        due, due_next = (self.period > 0 and s % self.period == 0 for s in (step, step + 1))
        weights = list(self.named.values())
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in weights] if due or due_next else []
        before = [p.detach().clone() for p in weights] if due else []
        yield
        if due:
            _foreach_sub_(before, weights := [p.detach() for p in weights])
            columns = {"weight_norm": _norms(weights), "grad_norm": _norms(gradients), "update_norm": _norms(before)}
            if self.gradients:
                dots = torch.stack([(a * b).sum() for a, b in zip(gradients, self.gradients, strict=True)])
                columns["grad_cosine"] = dots / (columns["grad_norm"] * _norms(self.gradients)).clamp_min(1e-30)
            values = torch.stack([_whole(column) for column in columns.values()]).tolist()
            rows = {
                key: dict(zip(self.named, column, strict=True)) for key, column in zip(columns, values, strict=True)
            }
            self.write({"step": step, **rows})
        self.gradients = [g.clone() for g in gradients] if due_next else []


def _norms(tensors: list[Tensor]) -> Tensor:
    return torch.stack(_foreach_norm(tensors))


def _whole(value: Any) -> Tensor:
    """A sharded tensor's full value."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def clip_gradients(model: nn.Module, max_norm: float | None) -> Tensor:
    """Norm of the whole gradient before clipping, as a tensor on the device (no synchronisation).

    Sharded gradients are added up over the ranks; those that are cut in another way are another sum.
    """
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    mesh_of: Callable[[Tensor], str] = lambda grad: str(getattr(grad, "device_mesh", ""))
    sums = [nn.utils.get_total_norm(list(same)) for _, same in groupby(sorted(grads, key=mesh_of), mesh_of)]
    sums = [norm.full_tensor() if hasattr(norm, "full_tensor") else norm for norm in sums]  # type: ignore[operator]
    norm = sums[0] if len(sums) == 1 else torch.linalg.vector_norm(torch.stack(sums))
    share = 1.0 if max_norm is None else (max_norm / (norm + 1e-6)).clamp(max=1)
    _foreach_mul_([local(grad) for grad in grads], share)
    return norm


def local(tensor: Any) -> Tensor:
    """This rank's part of a sharded tensor, in place; any other tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Learning rate of all groups, each in proportion to its own peak."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


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
        return cfg.peak_lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)
    share = SCHEDULES[cfg.schedule](min(progress, 1.0), max(warmup_steps, 1) / total_steps)
    return share * cfg.peak_lr + (1 - share) * cfg.min_lr
