"""Scaling laws: from a budget to a model, its tokens and a config file; from finished runs to a law of your own.

    python -m tools.scaling_laws plan --gpu_hours=62 --gpu=a100 --output=configs/mine.toml
    python -m tools.scaling_laws plan --unique_tokens=100M --flops=1e20  # how many epochs, AR or diffusion?
    python -m tools.scaling_laws plan --preset=425M --tokens=10B         # one of the 54 shapes that `shapes` prints
    python -m tools.scaling_laws sweep chinchilla --flops=6e18,1e19,3e19 # a folder of TOML files and run.sh
    python -m tools.scaling_laws fit sweeps/chinchilla/runs/*            # constants with intervals, law.json, law.png
    python -m tools.scaling_laws cluster                                 # memory and traffic of DDP, FSDP, HSDP, TP

N is the number of parameters, D the tokens seen, U the unique tokens among them, C = 6 N D the training FLOPs and L
the loss in nats per token. A plan is a forecast: the laws were fitted to other data, tokenizers and optimizers. To make
it yours, run a sweep, fit it and plan with --law=law.json.
"""

import itertools
import json
import math
import random
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model import ModelConfig
from nano416 import config, estimate, files, metrics

GPT2_VOCAB = 50257
Objective = Literal["ar", "mdm"]


# ---- Shapes ----------------------------------------------------------------------------------------------------------

# The family of arXiv:2305.16264 and arXiv:2507.15857: name, dim, head_dim, n_heads, n_layers. Some were published with
# n_heads x head_dim != dim.
FAMILY = """
7M 128 32 4 3         14M 224 32 7 4        20M 288 32 7 5        35M 448 32 7 6        44M 512 64 8 8
57M 576 64 9 9        74M 640 64 10 10      90M 640 64 10 13      106M 640 64 10 16     117M 768 64 12 12
140M 768 64 12 15     163M 768 64 12 18     175M 896 64 14 14     196M 896 64 14 16     217M 896 64 14 18
251M 1024 64 16 16    278M 1024 64 16 18    306M 1024 64 16 20    425M 1280 128 10 18   489M 1280 128 10 21
509M 1408 128 11 18   552M 1280 128 10 24   587M 1408 128 11 21   632M 1536 128 12 19   664M 1408 128 11 24
724M 1536 128 12 22   816M 1536 128 12 25   893M 1792 128 14 20   1018M 1792 128 14 23  1143M 1792 128 14 26
1266M 2048 128 16 22  1424M 2176 128 17 22  1429M 2048 128 16 25  1593M 2048 128 16 28  1609M 2176 128 17 25
1731M 2304 128 18 24  1794M 2176 128 17 28  2007M 2304 128 18 28  2283M 2304 128 18 32  2298M 2560 128 20 26
2639M 2560 128 20 30  2980M 2560 128 20 34  3530M 2688 128 21 36  3802M 2816 128 22 36  4084M 2944 128 23 36
4516M 3072 128 24 36  6796M 3584 128 28 40  9293M 4096 128 32 42  11452M 4352 128 32 47 12295M 4608 128 36 44
12569M 4608 128 32 47 13735M 4864 128 32 47 14940M 4992 128 32 49 16183M 5120 128 40 47
"""


def llama(dim: int, head_dim: int, n_heads: int, n_layers: int) -> ModelConfig:
    """A Llama with GPT-2's vocabulary whose ffn_dim is 8/3 dim, rounded down to a multiple of 64."""
    shape = ModelConfig(dim=dim, head_dim=head_dim, n_heads=n_heads, n_layers=n_layers, qk_norm=False)
    return replace(shape, ffn_dim=8 * dim // 3 // 64 * 64, vocab_size=GPT2_VOCAB, seq_len=2048)


FAMILY_ROWS = re.findall(r"(\w+) (\d+) (\d+) (\d+) (\d+)", FAMILY)
SHAPES = {name: llama(*map(int, sizes)) for name, *sizes in FAMILY_ROWS}


def published_params(shape: ModelConfig) -> int:
    """The count of arXiv:2507.15857, section 9: norms have biases (4 dim more per layer), the last norm is left out."""
    per_layer = 4 * shape.dim**2 + 3 * shape.dim * shape.ffn_dim + 6 * shape.dim
    return shape.n_layers * per_layer + shape.vocab_size * shape.dim


def describe_shape(shape: ModelConfig) -> str:
    heads = f"{shape.n_heads} heads of {shape.head_dim}"
    return f"{shape.n_layers} layers, dim {shape.dim}, {heads}, ffn_dim {shape.ffn_dim}"


@dataclass(frozen=True)
class ShapesConfig:
    """`shapes` has no options."""


def shapes(cfg: ShapesConfig) -> None:
    """Print the 54 shapes with their parameters and the papers' count of them (arXiv:2507.15857, section 9)."""
    print(f"{'preset':8}{'parameters':>16}{'published':>12}   shape")
    for name, shape in SHAPES.items():
        published = f"{published_params(shape) / 1e6:.1f}M"
        print(f"{name:8}{shape.num_params():>16,}{published:>12}   {describe_shape(shape)}")


# ---- Laws ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Law:
    """L(N, D) = E + A / N^alpha + B / D^beta. Repeated tokens and excess parameters count less (arXiv:2305.16264).

    E is None if only the ratio of the other two terms is known, r_data and r_params if repeats are not modelled.
    """

    E: float | None
    A: float
    B: float
    alpha: float
    beta: float
    r_data: float | None = None  # R_D*: number of repeats after which one more is worth 1/e of new tokens
    r_params: float | None = None  # R_N*: the same for parameters in excess of the optimum for U
    source: str = ""

    @property
    def balance(self) -> float:
        """G of arXiv:2203.15556, eq. 4: the optimal N is G (C / 6)^(beta / (alpha + beta))."""
        return (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))

    def optimal_params(self, tokens: Any) -> Any:
        """N for which `tokens` (a number or a tensor) new tokens are the compute-optimal D."""
        return self.balance * (tokens * self.balance) ** (self.beta / self.alpha)

    def optimum(self, flops: float) -> tuple[float, float]:
        """(N, D) of least loss under C = 6 N D, all tokens new."""
        params = self.balance * (flops / 6) ** (self.beta / (self.alpha + self.beta))
        return params, flops / 6 / params

    def effective_ND(self, params: float, tokens: float, unique: float | None = None) -> tuple[float, float]:
        """(N', D'): parameters and new tokens that do as much as N and D of which U tokens are unique.

        The value of repeats decays exponentially with their number (arXiv:2305.16264, eq. 5 and 6).
        """
        if unique is None or tokens <= unique or self.r_data is None or self.r_params is None:
            return params, tokens
        useful_params = min(params, self.optimal_params(unique))
        excess = params / useful_params - 1
        repeats = tokens / unique - 1
        effective_params = useful_params * (1 + self.r_params * -math.expm1(-excess / self.r_params))
        effective_tokens = unique * (1 + self.r_data * -math.expm1(-repeats / self.r_data))
        return effective_params, effective_tokens

    def reducible_loss(self, params: float, tokens: float, unique: float | None = None) -> float:
        """L - E."""
        N, D = self.effective_ND(params, tokens, unique)
        return self.A / N**self.alpha + self.B / D**self.beta

    def loss(self, params: float, tokens: float, unique: float | None = None) -> float:
        """L. Only for laws whose E is known."""
        assert self.E is not None
        return self.E + self.reducible_loss(params, tokens, unique)

    def describe(self) -> str:
        """The constants that decide the optimal N, for messages."""
        return f"E={self.E}, A={self.A:g}, B={self.B:g}, alpha={self.alpha:g}, beta={self.beta:g}"

    def constants(self) -> dict[str, float]:
        """The fitted constants, and the exponent of C in the optimal N."""
        named = {name: value for name, value in asdict(self).items() if isinstance(value, float)}
        return {**named, "exponent": self.beta / (self.alpha + self.beta)}


# Muennighoff's constants are published as logarithms.
E, A, B = map(math.exp, (0.6254804, 6.255414, 7.3049974))
EXPONENT = 0.3526596
# A law must give sizes of models for budgets from a CPU's minute to beyond all computers.
SOUND_FLOPS = (1e10, 1e40)
# Masked diffusion: arXiv:2507.15857 publishes R_D* and R_N* (table 1) and these single-epoch optima, but no E, A or B.
# With alpha = beta the optima determine A/B; the value of alpha, here Muennighoff's, then hardly affects the optimal N.
MDM_OPTIMA = {1e19: "117M", 3e19: "217M", 1e20: "425M"}
MDM_BALANCE = math.prod(SHAPES[name].num_params() / math.sqrt(C / 6) for C, name in MDM_OPTIMA.items()) ** (1 / 3)
MDM_A = MDM_BALANCE ** (2 * EXPONENT)
LAWS = {
    "hoffmann": Law(1.69, 406.4, 410.7, 0.34, 0.28, source="arXiv:2203.15556, approach 3"),
    "epoch": Law(1.8172, 482.01, 2085.43, 0.3478, 0.3658, source="arXiv:2404.10102, refit of the same runs"),
    "muennighoff": Law(E, A, B, EXPONENT, EXPONENT, 15.387756, 5.309743, source="arXiv:2305.16264"),
    "diffusion": Law(None, MDM_A, 1.0, EXPONENT, EXPONENT, 493.89, 1265.65, source="arXiv:2507.15857, table 1"),
}
# Compute that masked diffusion needs to match AR's loss while all tokens are new (arXiv:2410.18514).
MDM_COST = 16
# Epochs whose tokens are about as good as new ones (arXiv:2305.16264 and arXiv:2507.15857).
AS_GOOD_AS_NEW = {"ar": 4, "mdm": 100}
# Within this factor of the critical compute the answer is "either". Our own margin: nobody has published one.
CRITICAL_MARGIN = 3.0


def critical_flops(unique: float) -> float:
    """C above which masked diffusion beats AR on U unique tokens (arXiv:2507.15857)."""
    # A power law through crossings at 25M to 100M tokens, hence a guess far from these. The constants are those of
    # version 7 of the paper; earlier versions print others.
    return 2.12 * 10**1.956 * unique**2.174


def read_law(path: str) -> Law:
    """The law in a file that `fit` has written. Raises ValueError."""
    constants = config.load_file(path).get("law")
    if not isinstance(constants, dict) or not {"E", "A", "B", "alpha", "beta"} <= constants.keys():
        raise ValueError(f"{path} holds no law with E, A, B, alpha and beta; write one with the command `fit`")
    law = config.from_dict(Law, constants, f"{path}: law.")
    if not is_sound(law):
        raise ValueError(f"{path}: no model can be planned with the constants {law.describe()}; fit more runs")
    return law


def is_sound(law: Law) -> bool:
    """Whether all constants are positive and determine the best model for any compute."""
    constants = [law.A, law.B, law.alpha, law.beta, law.r_data, law.r_params]
    if any(constant is not None and constant <= 0 for constant in constants) or (law.E is not None and law.E < 0):
        return False
    values: list[float] = []
    try:
        for flops in SOUND_FLOPS:
            params, tokens = law.optimum(flops)
            values += [params, tokens, law.optimal_params(tokens), law.reducible_loss(params, tokens)]
            # What a plan for another preset or with many epochs asks for.
            values += [law.optimal_params(1e30), law.reducible_loss(1e6, 1e6), law.reducible_loss(1e12, 1e15)]
    except (OverflowError, ZeroDivisionError):
        return False
    return all(0 < value < math.inf for value in values)


# ---- plan ------------------------------------------------------------------------------------------------------------

# A bound of all amounts: products of three of them are still numbers.
MAX_AMOUNT = 1e40


@dataclass(frozen=True)
class Budget:
    """The options of `plan`: one of flops, gpu_hours, tokens or epochs, and how it is spent."""

    flops: float | None = None  # compute, 6 x parameters x tokens
    gpu_hours: float | None = None  # compute in hours of one --gpu at --mfu
    tokens: int | None = None  # tokens to train on; they determine the model unless --preset does
    epochs: float | None = None  # passes over --unique_tokens
    unique_tokens: int | None = None  # unique tokens available; training on more repeats them
    preset: str | None = None  # shape to train (425M, see `shapes`); none = the best one
    objective: Literal["auto", "ar", "mdm"] = "auto"  # auto = masked diffusion (mdm) above the critical compute
    law: str | None = None  # hoffmann, epoch, muennighoff or a file of `fit`; none = one that covers the question
    gpu: str = "h100"  # GPU model
    n_gpus: int = 8  # GPUs that train in parallel
    mfu: float = estimate.ASSUMED_MFU  # fraction of the GPU's peak FLOP/s that training reaches
    dollars_per_gpu_hour: float = 2.0  # price
    seq_len: int = 2048  # context length in tokens
    vocab_size: int = GPT2_VOCAB  # tokens in the vocabulary; embeddings count as parameters
    source: str = "data/fineweb_edu"  # shard folder for the config file
    output: str | None = None  # config file to write (.toml); none = only print the plan

    def __post_init__(self):
        amounts = {name: getattr(self, name) for name in ("flops", "gpu_hours", "tokens", "epochs")}
        amounts = {name: amount for name, amount in amounts.items() if amount is not None}
        require_positive(self, *amounts, "unique_tokens", "seq_len", "vocab_size", "n_gpus", "mfu")
        if len(amounts) > 1 or not (amounts or self.unique_tokens):
            given = ", ".join(f"--{name}" for name in amounts) or "none"
            raise ValueError(f"give one of --flops, --gpu_hours, --tokens, --epochs or --unique_tokens; got {given}")
        if self.epochs and not self.unique_tokens:
            raise ValueError("--epochs counts passes over --unique_tokens; give both")
        if self.preset and self.preset not in SHAPES:
            raise ValueError(config.unknown_name("preset", self.preset, SHAPES, "the command `shapes` lists them"))
        require_folder(self.output)
        peak_flops(self.gpu)

    @property
    def flops_per_gpu_hour(self) -> float:
        return peak_flops(self.gpu) * self.mfu * 3600

    @cached_property
    def shapes(self) -> dict[str, ModelConfig]:
        """The shapes to choose from, with this vocabulary and context length."""
        names = [self.preset] if self.preset else SHAPES
        return {name: replace(SHAPES[name], vocab_size=self.vocab_size, seq_len=self.seq_len) for name in names}

    def nearest_shape(self, params: float) -> str:
        """Name of the shape whose number of parameters is closest, as a ratio."""
        return min(self.shapes, key=lambda name: abs(math.log(self.shapes[name].num_params() / params)))

    def law_for(self, objective: Objective) -> Law:
        """The law of --law (one of LAWS, or a file of `fit`), or the default one that models what the budget needs."""
        ar_default = "muennighoff" if self.unique_tokens else "epoch"
        name = self.law or ("diffusion" if objective == "mdm" else ar_default)
        if name in LAWS:
            law = LAWS[name]
        elif name.endswith(".json"):
            law = read_law(name)
        else:
            raise ValueError(f"unknown law {name!r}; choose {', '.join(LAWS)} or a .json file written by `fit`")
        if self.unique_tokens and law.r_data is None:
            raise ValueError(f"law {name} does not model repeated tokens; choose muennighoff, or fit runs with repeats")
        return law

    def tokens_for(self, shape: ModelConfig) -> float:
        """D that spends the whole budget on this shape."""
        if self.flops:
            return self.flops / 6 / shape.num_params()
        if self.gpu_hours:
            # A GPU also computes attention, which C = 6 N D leaves out.
            return self.gpu_hours * self.flops_per_gpu_hour / shape.flops_per_token()
        if self.tokens:
            return self.tokens
        assert self.unique_tokens
        return (self.epochs or AS_GOOD_AS_NEW["mdm" if self.objective == "mdm" else "ar"]) * self.unique_tokens

    def solve(self, objective: Objective) -> "TrainingPlan":
        """The shape of least predicted loss. A budget of tokens or epochs takes the shape it is compute-optimal for."""
        law = self.law_for(objective)
        unique = self.unique_tokens
        tokens = {name: self.tokens_for(shape) for name, shape in self.shapes.items()}
        if self.flops or self.gpu_hours:
            losses = {n: law.reducible_loss(self.shapes[n].num_params(), tokens[n], unique) for n in tokens}
            name = min(losses, key=losses.__getitem__)
        else:
            _, effective_tokens = law.effective_ND(1, next(iter(tokens.values())), unique)
            name = self.nearest_shape(law.optimal_params(effective_tokens))
        shape = self.shapes[name]
        flops = 6 * shape.num_params() * tokens[name]
        # arXiv:2401.02954, eq. 1, fitted from 1e17 to 2e19 FLOPs. The batch becomes seq_len times a power of two.
        batch_tokens = self.seq_len * 2 ** max(0, round(math.log2(0.2920 * flops**0.3271 / self.seq_len)))
        max_lr = float(f"{0.3118 * flops**-0.125:.1e}")
        return TrainingPlan(name, shape, tokens[name], objective, batch_tokens, max_lr, unique)


@dataclass(frozen=True)
class TrainingPlan:
    """A model and how to train it."""

    name: str
    shape: ModelConfig
    tokens: float
    objective: Objective
    batch_tokens: int  # tokens per optimizer step
    max_lr: float
    unique_tokens: int | None = None

    @property
    def flops(self) -> float:
        return 6 * self.shape.num_params() * self.tokens

    @property
    def epochs(self) -> float:
        return self.tokens / self.unique_tokens if self.unique_tokens else 1.0


def plan(cfg: Budget) -> None:
    """Print the model, tokens, objective, hours and dollars for a budget of FLOPs, GPU-hours, tokens or epochs."""
    best, reason = choose_objective(cfg)
    N = best.shape.num_params()
    D = best.tokens
    U = best.unique_tokens
    has_repeats = U is not None and D > U
    law = cfg.law_for(best.objective)
    print(f"model      {best.name}: {N:,} parameters, {describe_shape(best.shape)}")
    print(f"tokens     {D:,.0f} ({D / N:.1f} per parameter), {best.flops:.3g} FLOP")
    if has_repeats:
        _, new_tokens = law.effective_ND(N, D, U)
        worth = f"worth {new_tokens:,.0f} new ones ({new_tokens / D:.0%} of the tokens seen)"
        print(f"epochs     {best.epochs:.3g} of {U:,} unique tokens, {worth}")
    # Without --law an AR plan shows what each published law predicts.
    published = LAWS if best.objective == "ar" else {}
    losses = ", ".join(
        f"{law.loss(N, D, U):.3f} ({name})"
        for name, law in ({cfg.law: law} if cfg.law else published).items()
        if law.E is not None and (law.r_data is not None or not has_repeats)
    )
    unknown = "unknown for masked diffusion: E, A and B are not published; fit your own runs and give that --law"
    print(config.visible(f"loss       {losses + ', nats per token' if losses else unknown}"))
    steps = f"{D // best.batch_tokens:,.0f} steps, max_lr {best.max_lr:g} (arXiv:2401.02954)"
    print(f"batch      {best.batch_tokens:,} tokens, {steps}")
    hours = D * best.shape.flops_per_token() / cfg.flops_per_gpu_hour
    print(
        f"time       {hours / cfg.n_gpus:.3g} h on {cfg.n_gpus} x {cfg.gpu} at an assumed {cfg.mfu:.0%} MFU: "
        f"{hours:.3g} GPU-hours, ${hours * cfg.dollars_per_gpu_hour:,.2f} at ${cfg.dollars_per_gpu_hour:g} each"
    )
    print(f"objective  {reason}")
    if not cfg.preset and best.name in (FAMILY_ROWS[0][0], FAMILY_ROWS[-1][0]):
        print(f"note       {best.name} is the end of the family: the best model lies beyond it")
    if best.objective == "ar" and best.epochs > 16:
        print("note       the law does not model overfitting: after some tens of epochs AR's validation loss rises")
    if best.tokens < 100 * best.batch_tokens:
        print(f"note       {D / best.batch_tokens:.0f} steps are few; a smaller --batch_tokens may do better")
    if cfg.output:
        title = f"scaling_laws plan, {best.flops:.3g} FLOP"
        files.write_text(cfg.output, to_toml(best, cfg.source, Path("runs", Path(cfg.output).stem), title))
        print(config.visible(f"wrote      {cfg.output}; python training.py {cfg.output} --dry_run"))


def peak_flops(gpu: str) -> float:
    """Peak FLOP/s. Raises ValueError for an unknown GPU."""
    peak = metrics.peak_flops(gpu)
    if peak is None:
        raise ValueError(f"unknown gpu {gpu!r}; choose one of {', '.join(metrics.PEAK_FLOPS)}")
    return peak


def require_positive(cfg: Any, *names: str) -> None:
    """Raise ValueError for an option that is given and not above 0, or so large that its products overflow."""
    for name in names:
        value = getattr(cfg, name)
        if value is not None and value <= 0:
            raise ValueError(f"{name} must be above 0, got {value:g}")
        if value is not None and value > MAX_AMOUNT:
            raise ValueError(f"{name} must be at most {MAX_AMOUNT:g}, got {str(value)[:40]}")


def require_folder(path: str | None) -> None:
    """Raise ValueError if the folder of a file to write is missing: before the work, not after it."""
    if path and not Path(path).parent.is_dir():
        raise ValueError(f"cannot write {path}: no folder {Path(path).parent}; make it first")


def choose_objective(budget: Budget) -> tuple[TrainingPlan, str]:
    """(plan, reason): AR while all tokens are new, masked diffusion above the critical compute of the unique ones."""
    best = budget.solve("mdm" if budget.objective == "mdm" else "ar")
    if budget.unique_tokens is None or best.tokens <= budget.unique_tokens:
        reason = f"AR does better; masked diffusion needs about {MDM_COST}x its compute (arXiv:2410.18514)"
        return best, f"{best.objective}. all tokens are new: {reason}"
    critical = critical_flops(budget.unique_tokens)
    ratio = best.flops / critical
    verdict = "mdm" if ratio > 1 else "ar"
    if 1 / CRITICAL_MARGIN < ratio < CRITICAL_MARGIN:
        verdict = "either, train both"
    if budget.objective == "auto" and ratio > 1:
        best = budget.solve("mdm")
    return best, (
        f"{best.objective}. The critical compute of {budget.unique_tokens:,} tokens is about {critical:.2g} FLOP (a "
        f"fit at 25M-100M tokens, arXiv:2507.15857: an order of magnitude); this is {ratio:.2g} of it: {verdict}"
    )


def to_toml(run: TrainingPlan, source: str, run_dir: Path, title: str) -> str:
    """The plan as a config file for training.py, with AdamW and a cosine schedule as in the papers' runs."""
    shape = run.shape
    data = [f"sources = {{ {json.dumps(source)} = 1.0 }}"]
    length = f"max_tokens = {run.tokens:.0f}"
    if run.unique_tokens is not None:
        data.append(f"unique_tokens = {run.unique_tokens}")
        length = f"epochs = {run.epochs:.6g}"
    sizes = ("dim", "n_layers", "n_heads", "head_dim", "ffn_dim", "seq_len")
    model = [*(f"{name} = {getattr(shape, name)}" for name in sizes), "qk_norm = false"]
    optim = ['optimizer = "adamw"', 'schedule = "cosine"', f"max_lr = {run.max_lr:g}", f"min_lr = {run.max_lr / 10:g}"]
    train = [f"run_dir = {json.dumps(str(run_dir))}", f'objective = "{run.objective}"', length]
    lines = [f"# {title}: {run.name}, {shape.num_params():,} parameters, vocabulary {shape.vocab_size:,}"]
    lines += ["", "[model]", *model, "", "[data]", *data, "", "[optim]", *optim, "warmup_frac = 0.01"]
    return "\n".join([*lines, "", "[train]", *train, f"batch_tokens = {run.batch_tokens}", ""])


# ---- fit -------------------------------------------------------------------------------------------------------------


class Point(NamedTuple):
    """One finished run."""

    params: float
    tokens: float
    unique: float  # unique tokens, at most `tokens`
    loss: float  # validation loss, nats per token

    @property
    def flops(self) -> float:
        return 6 * self.params * self.tokens

    @property
    def is_new(self) -> bool:
        """At most one epoch. The last batch may reach into the second one."""
        return self.tokens <= 1.01 * self.unique


@dataclass(frozen=True)
class FitConfig:
    """The options of `fit`."""

    runs: list[str]  # finished run directories, or .jsonl files of {"params", "tokens", "loss"[, "unique_tokens"]}
    output: str = "law.json"  # file for the constants, which `plan --law` reads
    plot: str | None = "law.png"  # picture; none = no picture
    bootstrap: int = 100  # resampled fits for the intervals

    def __post_init__(self):
        if self.bootstrap < 0:
            raise ValueError(f"bootstrap must be at least 0, got {self.bootstrap}")
        require_folder(self.output)
        require_folder(self.plot)


def fit(cfg: FitConfig) -> None:
    """Fit L(N, D) to final validation losses, with 95% intervals; with repeated data also R_D* and R_N*.

    As in arXiv:2203.15556: L-BFGS on the sum of Huber losses of log L, from the best points of a grid. Repeats follow
    in a second step, as in arXiv:2305.16264: runs of at most one epoch give five constants, the others the last two.
    """
    require_same_kind(cfg.runs)
    points = [point for path in cfg.runs for point in read_points(Path(path))]
    law = fit_law(points)
    if not is_sound(law):
        raise ValueError(f"the runs do not determine a law: the best fit is {law.describe()}; add runs of more sizes")
    intervals = bootstrap_intervals(points, law, cfg.bootstrap)
    print_fit(points, law, intervals)
    files.write_json(cfg.output, {"law": asdict(law), "intervals": intervals, "runs": len(points)})
    if cfg.plot:
        draw(points, law, Path(cfg.plot))
    written = cfg.output + (f" and {cfg.plot}" if cfg.plot else "")
    print(config.visible(f"wrote      {written}; python -m tools.scaling_laws plan --flops=1e19 --law={cfg.output}"))


def read_points(path: Path) -> list[Point]:
    """The points of a run directory that training.py has finished, or of a .jsonl file."""
    file = path if path.suffix == ".jsonl" else path / "final_metrics.json"
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path} is not a finished run: cannot read {file}; finish it, or leave it out") from error
    points = []
    for line in text.splitlines() if file == path else [text]:
        try:
            row = json.loads(line)
            params = row.get("parameters", row.get("params"))
            loss = row.get("val_loss", row.get("loss"))
            unique = min(row["tokens"], row.get("unique_tokens") or row["tokens"])
            point = Point(float(params), float(row["tokens"]), float(unique), float(loss))
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            raise ValueError(f"{path} lacks params, tokens or loss, or one is not a number: {line[:80]}") from error
        # Far beyond all runs. Outside, the sums and powers of the fit overflow.
        is_run = 1 <= point.params <= 1e15 and 1 <= point.unique <= point.tokens <= 1e18 and 1e-3 <= point.loss <= 1e3
        if not is_run:
            raise ValueError(f"{path}: params, tokens and loss must be above 0 and those of a run, got {point}")
        points.append(point)
    return points


def require_same_kind(runs: Sequence[str]) -> None:
    """Raise ValueError if runs differ in objective or vocabulary: their losses do not belong to one law."""
    kinds: dict[tuple[str, int], str] = {}
    for run in runs:
        file = Path(run, "config.json")
        if file.exists():
            options = config.load_file(str(file))
            try:
                kind = (str(options["train"]["objective"]), int(options["model"]["vocab_size"]))
            except (LookupError, TypeError, ValueError) as error:
                raise ValueError(f"{file} is not the config of a run: it lacks {error}; leave {run} out") from error
            kinds.setdefault(kind, run)
    if len(kinds) > 1:
        listing = " and ".join(f"{run} ({objective}, {size} tokens)" for (objective, size), run in kinds.items())
        raise ValueError(f"losses of different objectives or tokenizers do not belong to one law: {listing}")


# Starting points of log A, log B, log E, alpha and beta (arXiv:2203.15556, appendix D.3).
LOG_FACTORS = [0.0, 5, 10, 15, 20, 25]
EXPONENTS = [0.0, 0.5, 1, 1.5, 2]
STARTS = (LOG_FACTORS, LOG_FACTORS, [-1.0, -0.5, 0, 0.5, 1], EXPONENTS, EXPONENTS)
# Starting points of log R_D* and log R_N*, and the value beyond which neither can be told from infinity.
REPEAT_STARTS = [[math.log(r) for r in (1, 10, 100, 1000)]] * 2
MAX_LOG_R = 25.0
# L-BFGS descends from this many of the best starting points.
N_DESCENTS = 4
# Residuals of log L above a thousandth count linearly, so that outliers do not decide the fit (arXiv:2203.15556).
HUBER_DELTA = 1e-3


def fit_law(points: Sequence[Point], start: Law | None = None) -> Law:
    """The law that fits best; with `start`, from that starting point alone. Raises ValueError for too few runs."""
    new = [p for p in points if p.is_new]
    repeated = [p for p in points if not p.is_new]
    n_sizes = len({p.params for p in new})
    # In thousands: runs of the same length differ by parts of a batch.
    n_token_counts = len({round(p.tokens, -3) for p in new})
    # To a millionth: what differs by less is rounding.
    n_losses = len({round(math.log(p.loss), 6) for p in new})
    if len(new) < 6 or min(n_sizes, n_token_counts, n_losses) < 3:
        raise ValueError(
            f"{len(new)} runs of at most one epoch, {n_sizes} sizes, {n_token_counts} token counts: five constants "
            "need at least 6 runs, 3 sizes, 3 token counts and 3 different losses; make more (`sweep chinchilla`)"
        )
    starts: Iterable[Sequence[float]] = itertools.product(*STARTS)
    if start is not None and start.E is not None:
        starts = [(math.log(start.A), math.log(start.B), math.log(start.E), start.alpha, start.beta)]
    a, b, e, alpha, beta = _minimize(_residuals, new, starts)
    law = Law(math.exp(e), math.exp(a), math.exp(b), alpha, beta, source=f"fit of {len(points)} runs")
    if not repeated:
        return law
    starts = itertools.product(*REPEAT_STARTS)
    if start is not None and start.r_data is not None and start.r_params is not None:
        starts = [(math.log(start.r_data), math.log(start.r_params))]
    log_r_data, log_r_params = _minimize(partial(_repeat_residuals, law), repeated, starts)
    return replace(law, r_data=math.exp(log_r_data), r_params=math.exp(log_r_params))


def _residuals(theta: Tensor, runs: Tensor) -> Tensor:
    """Predicted minus measured log L [..., n], of theta [..., 5] and runs [n, 4]; in logarithms, nothing overflows."""
    params, tokens, _, loss = runs.log().T
    a, b, e, alpha, beta = theta[..., None].unbind(-2)
    return (a - alpha * params).logaddexp(b - beta * tokens).logaddexp(e) - loss


def _repeat_residuals(law: Law, theta: Tensor, runs: Tensor) -> Tensor:
    """The same for theta [..., 2] = log R_D*, log R_N*: a differentiable Law.effective_ND and Law.loss."""
    params, tokens, unique, loss = runs.T
    useful_params = params.minimum(law.optimal_params(unique))
    r_data, r_params = theta.clamp(-MAX_LOG_R, MAX_LOG_R).exp()[..., None].unbind(-2)
    assert law.E is not None
    N = useful_params * (1 - r_params * ((1 - params / useful_params) / r_params).expm1())
    D = unique * (1 - r_data * ((1 - tokens / unique) / r_data).expm1())
    return (law.E + law.A * N**-law.alpha + law.B * D**-law.beta).log() - loss.log()


def _minimize(
    residuals: Callable[[Tensor, Tensor], Tensor], points: Sequence[Point], starts: Iterable[Sequence[float]]
) -> list[float]:
    """theta of the least sum of Huber losses over the points."""
    runs = torch.tensor(points, dtype=torch.float64)
    grid = torch.tensor(list(starts), dtype=torch.float64)

    def objective(theta: Tensor) -> Tensor:
        errors = residuals(theta, runs)
        losses = F.huber_loss(errors, torch.zeros_like(errors), delta=HUBER_DELTA, reduction="none")
        # In units of delta squared the sum is near 1, where L-BFGS's tolerances make sense.
        return losses.sum(-1) / HUBER_DELTA**2

    def descend(theta: Tensor) -> tuple[float, list[float]]:
        theta = theta.clone().requires_grad_()
        optimizer = torch.optim.LBFGS(
            [theta], max_iter=500, tolerance_grad=1e-7, tolerance_change=1e-12, line_search_fn="strong_wolfe"
        )

        def closure() -> Any:
            optimizer.zero_grad()
            loss = objective(theta)
            loss.backward()
            return loss

        optimizer.step(closure)
        value = objective(theta).item()
        return (value if math.isfinite(value) else math.inf), theta.tolist()

    best_starts = grid[objective(grid).argsort()[:N_DESCENTS]]
    return min(map(descend, best_starts))[1]


def bootstrap_intervals(points: Sequence[Point], law: Law, rounds: int) -> dict[str, list[float]]:
    """{constant: [low, high]}, the middle 95% of fits to runs drawn with replacement; {} if no draw can be fitted."""
    rng = random.Random(0)
    fits: list[dict[str, float]] = []
    # A draw may have too few different runs to be fitted, hence more draws than fits.
    for _ in range(20 * rounds):
        if len(fits) == rounds:
            break
        with suppress(ValueError):
            constants = fit_law(rng.choices(points, k=len(points)), law).constants()
            # A draw without repeated tokens has no R_D* and R_N*.
            if constants.keys() == law.constants().keys():
                fits.append(constants)
    low = int(0.025 * len(fits))
    high = math.ceil(0.975 * len(fits)) - 1
    ranked = {name: sorted(constants[name] for constants in fits) for name in law.constants()}
    return {name: [values[low], values[high]] for name, values in ranked.items() if fits}


def print_fit(points: Sequence[Point], law: Law, intervals: Mapping[str, Sequence[float]]) -> None:
    """Print constants with intervals, how well they describe the runs, and the best models for more compute."""
    errors = [math.log(p.loss / law.loss(p.params, p.tokens, p.unique)) for p in points]
    mean = sum(math.log(p.loss) for p in points) / len(points)
    r_squared = 1 - sum(e**2 for e in errors) / sum((math.log(p.loss) - mean) ** 2 for p in points)
    print(f"{len(points)} runs, {sum(not p.is_new for p in points)} with repeated tokens")
    print(f"{'':10}{'estimate':>12}{'95% interval':>26}")
    for name, value in law.constants().items():
        low, high = intervals.get(name, (math.nan, math.nan))
        print(f"{name:10}{value:12.5g}{f'{low:.5g} to {high:.5g}':>26}")
    print(f"R^2 of log L {r_squared:.4f}, largest error {max(map(abs, errors)):.2%}")
    max_flops = max(p.flops for p in points)
    for C in (max_flops, 10 * max_flops):
        N, D = law.optimum(C)
        print(f"best for {C:.2g} FLOP: N {N:.3g}, D {D:.3g} ({D / N:.1f} per parameter), L {law.loss(N, D):.3f}")
    print(f"beyond {max_flops:.2g} FLOP, the largest run here, the law is a guess")


def isoflop_groups(points: Sequence[Point], max_groups: int = 9) -> list[list[Point]]:
    """The largest groups of new-token runs whose compute is within 10%, of at least three sizes, by compute."""
    groups: list[list[Point]] = []
    for point in sorted((p for p in points if p.is_new), key=lambda p: p.flops):
        if groups and point.flops <= 1.1 * groups[-1][0].flops:
            groups[-1].append(point)
        else:
            groups.append([point])
    groups = [sorted(group) for group in groups if len({p.params for p in group}) >= 3]
    largest = sorted(groups, key=len)[-max_groups:]
    return sorted(largest, key=lambda group: group[0].flops)


def draw(points: Sequence[Point], law: Law, output: Path) -> None:
    """Panels: loss by size at equal compute, if the runs allow it; loss by compute; errors."""
    groups = isoflop_groups(points)
    n_panels = 3 if groups else 2
    figure, axes = metrics.new_figure(1, n_panels, figsize=(5.5 * n_panels, 5))
    if groups:
        _draw_isoflops(axes[0], groups, law)

    frontier = axes[-2]
    frontier.set(title="Loss by compute", xlabel="FLOP", ylabel="validation loss, nats per token")
    for is_new, marker, label in (True, "o", "at most one epoch"), (False, "x", "repeated tokens"):
        runs = [p for p in points if p.is_new is is_new]
        if runs:
            frontier.plot([p.flops for p in runs], [p.loss for p in runs], marker, ms=4, alpha=0.7, label=label)
    max_flops = max(p.flops for p in points)
    line = np.geomspace(min(p.flops for p in points), 10 * max_flops, 200)
    frontier.plot(line, [law.loss(*law.optimum(C)) for C in line], "k--", lw=1, label="optimum of the law, tokens new")
    frontier.axvspan(max_flops, 10 * max_flops, color="gray", alpha=0.12, lw=0, label="extrapolated")

    errors = [100 * (p.loss / law.loss(p.params, p.tokens, p.unique) - 1) for p in points]
    log_tokens = [math.log10(p.tokens) for p in points]
    axes[-1].set(title="Errors of the law", xlabel="parameters", ylabel="measured loss / predicted - 1, %")
    axes[-1].axhline(0, color="black", lw=0.8)
    scatter = axes[-1].scatter([p.params for p in points], errors, s=14, c=log_tokens, cmap="viridis")
    figure.colorbar(scatter, ax=axes[-1], label="log10 of tokens")

    for axis in axes:
        axis.set_xscale("log")
        axis.grid(alpha=0.25)
    for axis in axes[:-1]:
        axis.legend(fontsize=8)
    terms = f"{law.A:.4g} / $N^{{{law.alpha:.3f}}}$ + {law.B:.4g} / $D^{{{law.beta:.3f}}}$"
    figure.suptitle(f"L = {law.E:.3f} + {terms}, {len(points)} runs", fontsize=13)
    metrics.save_figure(figure, output)


def _draw_isoflops(axis: Any, groups: Sequence[Sequence[Point]], law: Law) -> None:
    axis.set(title="Loss by size, at equal compute", xlabel="parameters", ylabel="validation loss, nats per token")
    for i, group in enumerate(groups):
        C = sum(p.flops for p in group) / len(group)
        color = f"C{i}"
        axis.plot([p.params for p in group], [p.loss for p in group], "o", ms=4, color=color, label=f"{C:.2g} FLOP")
        best, tokens = law.optimum(C)
        sizes = np.geomspace(min(best, 0.8 * group[0].params), max(best, 1.25 * group[-1].params), 200)
        axis.plot(sizes, [law.loss(N, C / 6 / N) for N in sizes], "-", lw=1, color=color)
        axis.plot([best], [law.loss(best, tokens)], "*", ms=11, color=color, mec="black", mew=0.5, zorder=3)
    axis.plot([], [], "*", ms=9, color="white", mec="black", label="optimum of the law")


# ---- sweep -----------------------------------------------------------------------------------------------------------

SWEEP_SCRIPT = """#!/usr/bin/env bash
# {title}
# Run it in the folder of training.py. Finished runs are skipped, interrupted ones resume. Options go to training.py:
#   {folder}/run.sh --sources=data/mine
#   JOB=3 {folder}/run.sh                        # only the fourth file, as in `sbatch --array=0-{last}`
set -euo pipefail
[ -f training.py ] || {{ echo "run.sh: run it in the folder of training.py" >&2; exit 2; }}
files=("$(dirname "$0")"/*.toml)
job=${{JOB:-${{SLURM_ARRAY_TASK_ID:-}}}}
[ -z "$job" ] || files=("${{files[$job]}}")
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
for file in "${{files[@]}}"; do
    echo "== $file"
    if [ "$gpus" -gt 1 ]; then
        torchrun --standalone --nproc_per_node="$gpus" training.py "$file" "$@"
    else
        python training.py "$file" "$@"
    fi
done
[ -n "$job" ] || {finish}
"""
# The epochs of arXiv:2507.15857's experiment on the value of data.
DATA_VALUE_EPOCHS = (1, 2, 4, 10, 20, 50, 100)
LR_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
# A Chinchilla sweep tries sizes within this factor of the best one.
SIZE_FACTOR = 4.0


@dataclass(frozen=True)
class SweepConfig:
    """The options of `sweep`."""

    experiment: Literal["chinchilla", "data_value", "learning_rate"]  # chinchilla, data_value or learning_rate
    flops: list[float] | None = None  # compute per run, 6 x parameters x tokens; several for chinchilla
    sizes: int = 7  # model sizes per compute (chinchilla)
    objective: Objective = "ar"  # ar or mdm
    seq_len: int = 2048  # context length in tokens
    vocab_size: int = GPT2_VOCAB  # of the tokenizer; embeddings count as parameters
    batch_tokens: int | None = None  # tokens per optimizer step; none = by the rule of `plan`
    source: str = "data/fineweb_edu"  # shard folder
    out_dir: str | None = None  # folder to write; none = sweeps/EXPERIMENT

    def __post_init__(self):
        if not self.flops:
            raise ValueError("sweep needs --flops (6e18,1e19)")
        if self.experiment != "chinchilla" and len(self.flops) > 1:
            given = config.format_value([f"{C:g}" for C in self.flops])
            raise ValueError(f"{self.experiment} takes one compute, got --flops={given}")
        if self.experiment == "chinchilla" and self.sizes < max(3, 6 / len(self.flops)):
            raise ValueError(f"sizes must be at least 3, and 6 for a single compute, for `fit`; got {self.sizes}")
        if self.sizes > len(SHAPES):
            raise ValueError(f"sizes must be at most {len(SHAPES)}, the number of shapes, got {self.sizes}")
        require_positive(self, "seq_len", "batch_tokens")
        if self.batch_tokens and self.batch_tokens % self.seq_len:
            raise ValueError(f"batch_tokens ({self.batch_tokens}) must be a multiple of seq_len ({self.seq_len})")


def sweep(cfg: SweepConfig) -> None:
    """Write a grid of config files and a run.sh that trains them all, then fits or plots them.

    chinchilla: several sizes at equal compute, new tokens. data_value: one size and compute, 1 to 100 epochs over fewer
    and fewer unique tokens. learning_rate: one size and compute, a quarter to four times the rule's learning rate.
    """
    folder = Path(cfg.out_dir or f"sweeps/{cfg.experiment}")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; choose another --out_dir or remove it")
    runs: dict[str, TrainingPlan] = {}
    for C in cfg.flops or []:
        runs |= sweep_runs(cfg, Budget(flops=C, seq_len=cfg.seq_len, vocab_size=cfg.vocab_size))
    files.make_folder(folder)
    for name, run in runs.items():
        title = f"{cfg.experiment}, {run.flops:.3g} FLOP"
        files.write_text(folder / f"{name}.toml", to_toml(run, cfg.source, folder / "runs" / name, title))
    quoted = shlex.quote(str(folder))
    finish = f"python -m tools.plot {quoted}/runs/* --output={quoted}/runs.png"
    if cfg.experiment == "chinchilla":
        outputs = f"--output={quoted}/law.json --plot={quoted}/law.png"
        finish = f"python -m tools.scaling_laws fit {quoted}/runs/* {outputs}"
    title = f"{cfg.experiment}: {len(runs)} runs, {sum(run.flops for run in runs.values()):.3g} FLOP in all"
    script = SWEEP_SCRIPT.format(title=title, folder=quoted, last=len(runs) - 1, finish=finish)
    files.write_text(folder / "run.sh", script)
    (folder / "run.sh").chmod(0o755)
    print(config.visible(f"{title}\nwrote      {folder}/*.toml and {folder}/run.sh"))


def sweep_runs(cfg: SweepConfig, budget: Budget) -> dict[str, TrainingPlan]:
    """{name: run} of one compute, around its best plan."""
    best = budget.solve(cfg.objective)
    if cfg.batch_tokens:
        best = replace(best, batch_tokens=cfg.batch_tokens)
    runs = {}
    match cfg.experiment:
        case "chinchilla":
            for params in best.shape.num_params() * np.geomspace(1 / SIZE_FACTOR, SIZE_FACTOR, cfg.sizes):
                name = budget.nearest_shape(params)
                shape = budget.shapes[name]
                run = replace(best, name=name, shape=shape, tokens=budget.tokens_for(shape))
                runs[f"c{best.flops:.3g}_{name}"] = run
        case "data_value":
            for epochs in DATA_VALUE_EPOCHS:
                runs[f"{best.name}_{epochs:03}epochs"] = replace(best, unique_tokens=int(best.tokens / epochs))
        case "learning_rate":
            for factor in LR_FACTORS:
                max_lr = f"{best.max_lr * factor:.1e}"
                runs[f"{best.name}_lr{max_lr}"] = replace(best, max_lr=float(max_lr))
    return runs


# ---- cluster ---------------------------------------------------------------------------------------------------------

# Latencies in NCCL's own cost model (src/graph/tuning.cc, protocol Simple): per call; per hop of a ring or a tree
# within a node; per hop to another node.
CALL_S = 8.4e-6
RING_HOP_S = 3.4e-6
TREE_HOP_S = 4.0e-6
NODE_HOP_S = 14.0e-6
# DDP reduces gradients in buckets of this size (torch's default).
BUCKET_BYTES = 25 * 2**20
# The default model, configs/dclm_1b.toml and configs/dclm_7b.toml.
DCLM = {"vocab_size": 50432, "tie_embeddings": False}
CLUSTER_SHAPES = {
    "416M": replace(llama(1024, 64, 16, 24), ffn_dim=3584),
    "1.4B": replace(llama(2048, 128, 16, 24), ffn_dim=5632, **DCLM),
    "7B": replace(llama(4096, 128, 32, 32), ffn_dim=11008, **DCLM),
}


@dataclass(frozen=True)
class Network:
    """Bytes per second that one GPU sends to the GPUs of the same node and to other nodes."""

    within_node: float
    between_nodes: float
    gpus_per_node: int = 8

    def all_gather(self, size: float, gpus: int, calls: int, local: int) -> np.ndarray:
        """[bytes that a GPU sends, seconds] of an all-gather or reduce-scatter of `size` bytes, in `calls` calls.

        It runs over `gpus` GPUs, first within each node, which has `local` of them, then between the nodes through all
        their network cards at once.
        """
        nodes = gpus // local
        within = size * (local - 1) / local
        between = size * (nodes - 1) / nodes / local
        seconds = within / self.within_node + between / self.between_nodes
        if gpus > 1:
            seconds += calls * (CALL_S + (gpus - nodes) * RING_HOP_S + (nodes - 1) * NODE_HOP_S)
        return np.array([within + between, seconds])

    def all_reduce(self, size: float, gpus: int, calls: int, local: int) -> np.ndarray:
        """The same for an all-reduce: twice the bytes, over trees as deep as the logarithm of the number of nodes."""
        cost = 2 * self.all_gather(size, gpus, 0, local)
        if gpus > 1:
            cost[1] += calls * (CALL_S + 2 * (local - 1) * TREE_HOP_S + 2 * math.log2(gpus / local) * NODE_HOP_S)
        return cost


def step_cost(
    strategy: str, shape: ModelConfig, gpus: int, tokens: int, network: Network
) -> tuple[float, float, float]:
    """(bytes of state, bytes sent, seconds of communication) of one GPU for an optimizer step on `tokens` per GPU.

    State is fp32 weights, gradients and AdamW's moments, and the bf16 weights in use.
    ddp: all-reduce of fp32 gradients in buckets. fsdp: per layer, all-gather of bf16 weights for the forward and for
    the backward pass, reduce-scatter of fp32 gradients. hsdp: fsdp within a node, all-reduce of the shards between
    nodes. tp: each layer is split over a node, with sequence parallelism (arXiv:2205.05198: 8 gathers or scatters of
    the node's activations per layer); ddp between nodes.
    """
    N = shape.num_params()
    local = min(gpus, network.gpus_per_node)
    n_shards = {"ddp": 1, "fsdp": gpus}.get(strategy, local)
    grad_bytes = 4 * N / n_shards
    weight_bytes = 2 * N / n_shards
    n_calls = math.ceil(grad_bytes / BUCKET_BYTES)
    cost = np.zeros(2)
    if strategy == "tp":
        cost += 8 * shape.n_layers * network.all_gather(2 * tokens * n_shards * shape.dim, n_shards, 1, local)
    elif strategy in ("fsdp", "hsdp"):
        table_params = shape.vocab_size * shape.dim * (1 if shape.tie_embeddings else 2)
        block_params = (N - table_params - shape.dim) // shape.n_layers
        # In use at once: a layer, the next one, which is gathered meanwhile, and embedding and head.
        weight_bytes = 2 * (2 * block_params + table_params)
        # Embedding, head and last norm are one more group.
        n_calls = shape.n_layers + 1
        for size in (2 * N, 2 * N, 4 * N):
            cost += network.all_gather(size, n_shards, n_calls, local)
    cost += network.all_reduce(grad_bytes, gpus // n_shards, n_calls, max(1, local // n_shards))
    # 16 bytes per parameter in fp32: weight, gradient and two moments.
    return 16 * N / n_shards + weight_bytes, cost[0], cost[1]


@dataclass(frozen=True)
class ClusterConfig:
    """The options of `cluster`."""

    gpus: list[int] = field(default_factory=lambda: [8, 64, 1024])  # numbers of GPUs
    gpu: str = "h100"  # GPU model, for its peak FLOP/s
    memory_gb: float = 80.0  # memory of one GPU
    mfu: float = estimate.ASSUMED_MFU  # fraction of peak FLOP/s reached while computing
    nvlink_gb_per_s: float = 400.0  # one GPU to the others of its node (NVSwitch of an H100: 450 on paper)
    network_gb_per_s: float = 40.0  # one GPU to other nodes (one 400 Gbit/s card per GPU: 50 on paper)
    tokens: int = 8192  # tokens per GPU and optimizer step, in one micro-step
    seq_len: int = 2048  # context length in tokens

    def __post_init__(self):
        per_node = Network.gpus_per_node
        for n in self.gpus:
            if n < 1 or (n > per_node and n % per_node):
                raise ValueError(f"gpus must be up to {per_node} or a multiple of it (full nodes), got {n}")
        require_positive(self, "mfu", "nvlink_gb_per_s", "network_gb_per_s", "tokens", "seq_len")


def cluster(cfg: ClusterConfig) -> None:
    """Print memory per GPU, and communication against computation per step, for DDP, FSDP, HSDP and TP at three sizes.

    A model, not a measurement: bytes / bandwidth plus NCCL's latencies. Overlap can hide ratios up to 100%.
    """
    peak = peak_flops(cfg.gpu)
    network = Network(cfg.nvlink_gb_per_s * 1e9, cfg.network_gb_per_s * 1e9)
    print(
        f"{cfg.tokens:,} tokens per GPU and step, {cfg.gpu} at {cfg.mfu:.0%} MFU, {cfg.nvlink_gb_per_s:g} GB/s within "
        f"and {cfg.network_gb_per_s:g} GB/s between nodes of {network.gpus_per_node}\n"
        f"GB per GPU: state is weights, gradients and AdamW; a total above {cfg.memory_gb:g} does not fit (*)\n\n"
        f"{'model':6}{'GPUs':>6}{'batch':>12}  {'':6}{'state':>8}{'activ.':>8}{'total':>9}"
        f"{'sent GB':>10}{'comm. ms':>10}{'compute ms':>12}{'ratio':>8}"
    )
    rows = itertools.product(CLUSTER_SHAPES.items(), cfg.gpus, ("ddp", "fsdp", "hsdp", "tp"))
    for (name, shape), n, strategy in rows:
        state, sent, seconds = step_cost(strategy, shape, n, cfg.tokens, network)
        # Compiled training also keeps bf16 logits and their gradient.
        layer_bytes = shape.n_layers * estimate.activation_bytes_per_layer(shape)
        activations = cfg.tokens * (layer_bytes + 4 * shape.vocab_size)
        compute_s = cfg.tokens * replace(shape, seq_len=cfg.seq_len).flops_per_token() / peak / cfg.mfu
        total = (state + activations) / 1e9
        print(
            f"{name:6}{n:>6}{n * cfg.tokens:>12,}  {strategy:6}{state / 1e9:>8.1f}{activations / 1e9:>8.1f}"
            f"{total:>8.1f}{'*' if total > cfg.memory_gb else ' '}{sent / 1e9:>10.2f}{1e3 * seconds:>10.1f}"
            f"{1e3 * compute_s:>12.1f}{seconds / compute_s:>8.0%}"
        )


if __name__ == "__main__":
    config.run_cli(lambda: config.run_subcommand(plan, fit, sweep, cluster, shapes))
