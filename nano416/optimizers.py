"""Build the optimizer, schedule its learning rate, clip gradients, average and measure weights.

    optimizer = build_optimizer(model, cfg)
    lr = set_lr(optimizer, step, total_steps, cfg)      # before optimizer step `step`, counted from 0
    grad_norm = clip_grad_norm_(model, cfg.grad_clip)
    optimizer_step(optimizer, skip)                     # where skip is 1.0, weights and state stay as they are

Parameters are in three groups: "hidden" (matrices inside the layers), "embeddings" (token embedding and output head)
and "norms" (vectors, which have no weight decay). To add an optimizer, write a function like `adamw` and add one line
to OPTIMIZERS; to add a schedule, add one line to SCHEDULES.
"""

# Tensor dimensions: n matrices of one shape [A, B]

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

# One kernel for a whole list of tensors instead of one for each. torch 2.13 has no public name for these; its own
# optimizers are built on them.
from torch import Tensor, _foreach_add_, _foreach_copy_, _foreach_lerp_, _foreach_mul_, nn  # type: ignore[attr-defined]
from torch.optim import Optimizer

ScheduleName = Literal["cosine", "linear", "wsd", "constant", "inv_sqrt"]
ParamGroups = list[dict[str, Any]]
# map_sharded(work, batch, like) = work(batch), with the items of `batch` divided among the ranks.
MapSharded = Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], Tensor]

# Added to the denominator of Adam and RMSprop.
EPS = 1e-8
# Decay takes the last fifth of a warmup-stable-decay schedule; 10-20% is enough (arXiv:2405.18392).
WSD_DECAY_FRAC = 0.2
# K. Jordan's value.
MUON_MOMENTUM = 0.95
# Repeated five times, x -> ax + bx^3 + cx^5 takes singular values in (0, 1] to about [0.7, 1.2] (K. Jordan, 2024).
NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and learning-rate schedule."""

    # Options of version 0.1, with the values that change nothing.
    retired: ClassVar[dict[str, Any]] = {"embed_lr": None, "eps": 1e-8}

    optimizer: str = "muon"  # muon, adamw, lion, adam, nadam, rmsprop or sgd
    max_lr: float | None = None  # peak learning rate; none = the optimizer's default (3e-3 for muon, 3e-4 for adamw)
    min_lr: float = 0.0  # learning rate at the end of the schedule
    schedule: ScheduleName = "linear"  # decay after the warmup: linear, cosine, wsd, constant or inv_sqrt
    warmup_frac: float = 0.02  # fraction of all steps spent on linear warmup
    weight_decay: float = 0.1  # decoupled weight decay of matrices; norms have none
    beta1: float = 0.9  # decay of the first moment
    beta2: float = 0.95  # decay of the second moment
    grad_clip: float | None = 1.0  # maximum global gradient norm; none = no clipping
    z_loss: float = 0.0  # coefficient of the z-loss logsumexp(logits)^2 (PaLM: 1e-4), which keeps logits from drifting
    ema: float | None = None  # decay (0.999) of averaged weights, for evaluation and chat; none = no averaging

    def __post_init__(self):
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {self.optimizer!r}")
        if not self.peak_lr > 0:
            raise ValueError(f"max_lr must be above 0, got {self.max_lr}")
        if not 0 <= self.min_lr <= self.peak_lr:
            raise ValueError(f"min_lr must be between 0 and max_lr ({self.peak_lr:g}), got {self.min_lr}")
        if self.schedule == "constant" and self.min_lr:
            raise ValueError(f"min_lr ({self.min_lr:g}) has no effect with the constant schedule; leave it out")
        if not 0 <= self.warmup_frac < 1:
            raise ValueError(f"warmup_frac must be in [0, 1), got {self.warmup_frac}")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay must not be negative, got {self.weight_decay}")
        if not 0 <= self.beta1 < 1:
            raise ValueError(f"beta1 must be in [0, 1), got {self.beta1}")
        if not 0 <= self.beta2 < 1:
            raise ValueError(f"beta2 must be in [0, 1), got {self.beta2}")
        if self.grad_clip is not None and not self.grad_clip > 0:
            raise ValueError(f"grad_clip must be above 0 (none = no clipping), got {self.grad_clip}")
        if not self.z_loss >= 0:
            raise ValueError(f"z_loss must not be negative, got {self.z_loss}")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"ema must be in (0, 1) (none = no averaging), got {self.ema}")

    @property
    def peak_lr(self) -> float:
        """max_lr, or the optimizer's default."""
        if self.max_lr is not None:
            return self.max_lr
        _, default_lr = OPTIMIZERS[self.optimizer]
        return default_lr


def build_optimizer(model: nn.Module, cfg: OptimConfig, map_sharded: MapSharded | None = None) -> Optimizer:
    """The optimizer that `cfg` names, over all parameters of `model`.

    map_sharded: distributed.map_sharded, where several ranks train; Muon divides its matrix products among them.
    """
    hidden = []
    embeddings = []
    norms = []
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            norms.append(parameter)
        elif name.startswith("layers."):
            hidden.append(parameter)
        else:
            # Not for Muon: a step uses few rows of an embedding, but orthogonalized updates move all rows equally.
            embeddings.append(parameter)
    groups = [
        {"params": hidden, "kind": "hidden", "weight_decay": cfg.weight_decay},
        {"params": embeddings, "kind": "embeddings", "weight_decay": cfg.weight_decay},
        {"params": norms, "kind": "norms", "weight_decay": 0.0},
    ]
    make_optimizer, _ = OPTIMIZERS[cfg.optimizer]
    return make_optimizer(groups, cfg, map_sharded or map_locally)


def map_locally(work: Callable[[Tensor], Tensor], batch: Tensor, like: Tensor) -> Tensor:
    """map_sharded for a single process."""
    return work(batch)


# ---- Optimizers ------------------------------------------------------------------------------------------------------


class Muon(Optimizer):
    """Orthogonalized momentum for hidden matrices (K. Jordan, 2024), AdamW for the other groups.

    An orthogonal [A, B] matrix has entries of RMS 1/sqrt(max(A, B)). Multiplied by 0.2 sqrt(max(A, B)) the update is as
    large as AdamW's, so that one learning rate suits both (Moonlight, arXiv:2502.16982).

    Why not torch.optim.Muon (2.13): it multiplies one matrix after another, on every rank, and cannot skip a step
    without waiting for the device. This one batches matrices of one shape and divides them among the ranks.
    """

    found_inf: Tensor | None = None  # set by `optimizer_step`

    def __init__(self, groups: ParamGroups, cfg: OptimConfig, map_sharded: MapSharded):
        super().__init__(groups, {"lr": cfg.peak_lr})
        self.map_sharded = map_sharded
        # AdamW works on the same group dictionaries and the same state, so this is one optimizer to a checkpoint.
        self.adamw = adamw(self._adamw_groups(), cfg, map_sharded)
        self.adamw.state = self.state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Part of load_state_dict, which replaces the groups and the state: AdamW gets the new ones."""
        super().__setstate__(state)
        self.adamw.__setstate__({"param_groups": self._adamw_groups(), "state": self.state})

    def _adamw_groups(self) -> ParamGroups:
        return [group for group in self.param_groups if group["kind"] != "hidden"]

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:  # type: ignore[override]
        """Update all weights. Where found_inf is 1, weights and state stay as they are."""
        assert closure is None
        self.adamw.found_inf = self.found_inf  # type: ignore[attr-defined]
        self.adamw.step()
        for group in self.param_groups:
            if group["kind"] != "hidden":
                continue
            # Matrices are batched if they have one shape and are sharded in one way.
            batches: dict[tuple[Any, ...], list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    batches.setdefault((p.shape, getattr(p, "placements", None)), []).append(p)
            for batch in batches.values():
                self._update(batch, group["lr"], group["weight_decay"])

    def _update(self, params: list[Tensor], lr: float, weight_decay: float) -> None:
        """Update n matrices [A, B] of one shape. Each rank moves its own shard of them."""
        weights = [local(p) for p in params]
        grads = torch.stack([local(p.grad) for p in params])  # [n, A, B], or this rank's shard of each
        keep = _keep(self.found_inf, grads.device)
        # Not a product: 0 x NaN is NaN.
        grads = torch.where(keep > 0, grads, 0.0)
        for p in params:
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        momenta = [local(self.state[p]["momentum"]) for p in params]
        momentum = torch.stack(momenta).lerp_(grads, (1 - MUON_MOMENTUM) * keep)
        # Nesterov momentum, in the gradients' own memory.
        nesterov = grads.lerp_(momentum, MUON_MOMENTUM)
        direction = self.map_sharded(newton_schulz, nesterov, params[0])
        scale = 0.2 * math.sqrt(max(params[0].shape))
        _foreach_mul_(weights, 1 - lr * weight_decay * keep)
        _foreach_add_(weights, list((direction * (-lr * scale * keep)).unbind()))
        _foreach_copy_(momenta, list(momentum.unbind()))


def newton_schulz(matrices: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrices of [n, A, B], with singular values of about 0.7 to 1.2; products in bf16."""
    # The smaller of the two Gram matrices is the cheaper one.
    transposed = matrices.shape[1] > matrices.shape[2]
    # Divided by their Frobenius norm, all singular values are at most 1, as the iteration requires. The 1e-7 keeps a
    # zero gradient from becoming NaN.
    x = (matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)).bfloat16()
    if transposed:
        x = x.mT
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT  # [n, min(A, B), min(A, B)]
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    if transposed:
        x = x.mT
    return x.to(matrices.dtype)


class Lion(Optimizer):
    """The sign of an interpolated momentum (arXiv:2302.06675, algorithm 2)."""

    found_inf: Tensor | None = None  # set by `optimizer_step`

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:  # type: ignore[override]
        """Update all weights. Where found_inf is 1, weights and momentum stay as they are."""
        assert closure is None
        for group in self.param_groups:
            lr = group["lr"]
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                keep = _keep(self.found_inf, p.device)
                # Not a product: 0 x NaN is NaN.
                grad = torch.where(keep > 0, p.grad, 0.0)
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                momentum = self.state[p]["momentum"]
                direction = momentum.lerp(grad, 1 - beta1).sign_()
                p.mul_(1 - lr * group["weight_decay"] * keep).add_(direction * (-lr * keep))
                momentum.lerp_(grad, (1 - beta2) * keep)


def _keep(found_inf: Tensor | None, device: torch.device) -> Tensor:
    """0.0 in a step that is skipped, otherwise 1.0, as a tensor [] on the device."""
    return torch.ones((), device=device) if found_inf is None else 1 - found_inf


def adamw(groups: ParamGroups, cfg: OptimConfig, _: MapSharded) -> Optimizer:
    """AdamW (arXiv:1711.05101), one fused kernel per step."""
    return torch.optim.AdamW(groups, lr=cfg.peak_lr, betas=(cfg.beta1, cfg.beta2), eps=EPS, fused=True)


def lion(groups: ParamGroups, cfg: OptimConfig, _: MapSharded) -> Optimizer:
    """Lion, which wants a 3 to 10 times lower learning rate than AdamW and as much more weight decay."""
    return Lion(groups, {"lr": cfg.peak_lr, "betas": (cfg.beta1, cfg.beta2)})


def adam(groups: ParamGroups, cfg: OptimConfig, _: MapSharded) -> Optimizer:
    """Adam (arXiv:1412.6980), whose weight decay is part of the gradient."""
    return torch.optim.Adam(groups, lr=cfg.peak_lr, betas=(cfg.beta1, cfg.beta2), eps=EPS, fused=True)


def nadam(groups: ParamGroups, cfg: OptimConfig, _: MapSharded) -> Optimizer:
    """AdamW with Nesterov momentum (Dozat, 2016)."""
    betas = (cfg.beta1, cfg.beta2)
    return torch.optim.NAdam(groups, lr=cfg.peak_lr, betas=betas, eps=EPS, decoupled_weight_decay=True)


def rmsprop(groups: ParamGroups, cfg: OptimConfig, _: MapSharded) -> Optimizer:
    """RMSprop (Hinton, 2012) with momentum beta1; its weight decay is part of the gradient."""
    return torch.optim.RMSprop(groups, lr=cfg.peak_lr, alpha=cfg.beta2, eps=EPS, momentum=cfg.beta1)


def sgd(groups: ParamGroups, cfg: OptimConfig, _: MapSharded) -> Optimizer:
    """SGD with Nesterov momentum beta1, which wants learning rates of 0.1 to 1."""
    return torch.optim.SGD(groups, lr=cfg.peak_lr, momentum=cfg.beta1, nesterov=cfg.beta1 > 0, fused=True)


# Name: (function, peak learning rate unless --max_lr is given). Muon's rate is measured (EXPERIMENTS.md), AdamW's is
# what GPT-3 used at 350M parameters (arXiv:2005.14165).
OPTIMIZERS: dict[str, tuple[Callable[[ParamGroups, OptimConfig, MapSharded], Optimizer], float]] = {
    "muon": (Muon, 3e-3),
    "adamw": (adamw, 3e-4),
    "lion": (lion, 1e-4),
    "adam": (adam, 3e-4),
    "nadam": (nadam, 3e-4),
    "rmsprop": (rmsprop, 3e-4),
    "sgd": (sgd, 0.3),
}


def optimizer_step(optimizer: Optimizer, skip: Tensor) -> None:
    """Make one optimizer step, or none where `skip` [] is 1.0. Only nadam and rmsprop wait for the device."""
    if optimizer.defaults.get("fused") or isinstance(optimizer, Muon | Lion):
        # `found_inf` is torch's own protocol: torch.amp.GradScaler sets it, and fused kernels read it on the device and
        # leave weights and state alone. With cpu_offload the weights are on another device than the loss.
        device = optimizer.param_groups[0]["params"][0].device
        optimizer.found_inf = skip.to(device)  # type: ignore[attr-defined]
        optimizer.step()
    elif not skip.item():
        optimizer.step()


# ---- Learning rate ---------------------------------------------------------------------------------------------------

# Each schedule maps the progress after the warmup (0 to 1) and the warmup's fraction of the run to a factor of
# max_lr - min_lr that falls from 1.
SCHEDULES: dict[str, Callable[[float, float], float]] = {
    "cosine": lambda progress, warmup: 0.5 * (1 + math.cos(math.pi * progress)),
    "linear": lambda progress, warmup: 1 - progress,
    "wsd": lambda progress, warmup: min(1.0, (1 - progress) / WSD_DECAY_FRAC),
    "constant": lambda progress, warmup: 1.0,
    "inv_sqrt": lambda progress, warmup: math.sqrt(warmup / (warmup + progress * (1 - warmup))),
}


def get_lr(step: float, total_steps: int, cfg: OptimConfig) -> float:
    """Learning rate of step `step` (from 0, may be a fraction): linear warmup to max_lr, then down to min_lr."""
    warmup_steps = round(cfg.warmup_frac * total_steps)
    if step < warmup_steps:
        return cfg.peak_lr * (step + 1) / warmup_steps
    # The last step gets min_lr. One with a learning rate of 0 would learn nothing, so 0 is what would follow it.
    last_step = total_steps - 1 if cfg.min_lr else total_steps
    progress = (step - warmup_steps) / max(1, last_step - warmup_steps)
    factor = SCHEDULES[cfg.schedule](min(progress, 1.0), max(warmup_steps, 1) / total_steps)
    return factor * cfg.peak_lr + (1 - factor) * cfg.min_lr


def set_lr(optimizer: Optimizer, step: float, total_steps: int, cfg: OptimConfig) -> float:
    """Set the learning rate of step `step` (from 0) for all parameter groups and return it."""
    lr = get_lr(step, total_steps, cfg)
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


# ---- Gradients and weights -------------------------------------------------------------------------------------------


def clip_grad_norm_(model: nn.Module, max_norm: float | None) -> Tensor:
    """Scale all gradients so that their global norm is at most `max_norm` (None = no clipping).

    Returns the norm before clipping, over all ranks' shards, as a tensor [] on the device.
    """
    # nn.utils.clip_grad_norm_ cannot stack DTensors of several meshes, which tensor parallelism leads to.
    by_mesh: dict[Any, list[nn.Parameter]] = {}
    for p in model.parameters():
        if p.grad is not None:
            by_mesh.setdefault(getattr(p.grad, "device_mesh", None), []).append(p)
    norms = []
    for params in by_mesh.values():
        norms.append(full(nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])))
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    if max_norm is not None:
        for params in by_mesh.values():
            nn.utils.clip_grads_with_norm_(params, max_norm, norm)
    return norm


class EMA:
    """Exponential moving average of the weights, used for evaluation and chat.

    Starts from the weights that `model` has when this is created.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.updates = 0
        self.live = dict(model.named_parameters())
        self.averages = {name: p.detach().clone() for name, p in self.live.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Add the current weights to the average; called after each optimizer step."""
        self.updates += 1
        # The decay rises to its value, since the random initial weights would linger for 1 / (1 - decay) steps.
        decay = min(self.decay, self.updates / (self.updates + 10))
        averages = [local(average) for average in self.averages.values()]
        weights = [local(p) for p in self.live.values()]
        _foreach_lerp_(averages, weights, 1 - decay)

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        """Inside the block the model holds the averaged weights, afterwards its own again."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        # In place, because FSDP and DDP hold on to the storage of each weight; one at a time, to save memory.
        for name, p in self.live.items():
            weight = local(p)
            average = local(self.averages[name])
            previous = weight.clone()
            weight.copy_(average)
            average.copy_(previous)

    def state_dict(self) -> dict[str, Any]:
        """Averages and number of updates, for a checkpoint."""
        return {"ema": self.averages, "ema_updates": self.updates}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any], place: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Continue from `state`. If it has no averages (--ema is new), start again from the current weights.

        place: distributed.distribute_like, which shards a full tensor like the second one.
        """
        saved = state.get("ema")
        self.updates = state.get("ema_updates", 0)
        for name, average in self.averages.items():
            average.copy_(place(saved[name], average) if saved else self.live[name])


class ParamStats:
    """Statistics of each weight, its clipped gradient and its update, every `every` steps (0 = never).

    `write` gets rows {"step", "weight_norm": {name: norm}, "grad_norm": ..., "update_norm": ..., "grad_cosine": ...}.
    The cosine is between the gradients of this step and the one before; a first step has none. Such a step holds two
    more copies of the weights and waits for the device once.
    """

    def __init__(self, model: nn.Module, every: int, write: Callable[[dict[str, Any]], None]):
        self.params = dict(model.named_parameters())
        self.every = every
        self.write = write
        self.previous_grads: list[Tensor] = []

    @contextlib.contextmanager
    def record(self, step: int) -> Iterator[None]:
        """Wrap the optimizer's update of step `step`, counted from 1."""
        due = self._is_due(step)
        # A step before a due one only keeps its gradients, for the cosine.
        due_next = self._is_due(step + 1)
        weights = [p.detach() for p in self.params.values()]
        weights_before = [weight.clone() for weight in weights] if due else []
        grads: list[Tensor] = []
        if due or due_next:
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params.values()]
        yield
        if due:
            # In place, to save memory; the sign does not matter to a norm.
            updates = [before.sub_(after) for before, after in zip(weights_before, weights, strict=True)]
            columns = {"weight_norm": _norms(weights), "grad_norm": _norms(grads), "update_norm": _norms(updates)}
            if self.previous_grads:
                dots = torch.stack([(a * b).sum() for a, b in zip(grads, self.previous_grads, strict=True)])
                columns["grad_cosine"] = dots / (columns["grad_norm"] * _norms(self.previous_grads)).clamp_min(1e-30)
            # One transfer from the device for all of them.
            table = torch.stack([full(column) for column in columns.values()]).tolist()
            row: dict[str, Any] = {"step": step}
            for key, values in zip(columns, table, strict=True):
                row[key] = dict(zip(self.params, values, strict=True))
            self.write(row)
        self.previous_grads = [grad.clone() for grad in grads] if due_next else []

    def _is_due(self, step: int) -> bool:
        return self.every > 0 and step % self.every == 0


def _norms(tensors: list[Tensor]) -> Tensor:
    return torch.stack([torch.linalg.vector_norm(tensor) for tensor in tensors])


def local(tensor: Any) -> Tensor:
    """This rank's shard of a DTensor, sharing its storage; any other tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def full(tensor: Any) -> Tensor:
    """The full value of a DTensor, on every rank; any other tensor itself."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
