"""From a budget to a model, its tokens and a TOML file for training.py; from finished runs to a law of your own.

    python scaling_laws.py plan --flops=1e19                              # the best model for this compute
    python scaling_laws.py plan --gpu_hours=62 --gpu=a100 --output=configs/mine.toml
    python scaling_laws.py plan --unique_tokens=100M --flops=1e20         # repeat 100M tokens: how often, which objective?
    python scaling_laws.py plan --preset=425M --tokens=10B                # one of the 54 shapes that `shapes` lists
    python scaling_laws.py sweep chinchilla --flops=6e18,1e19,3e19        # a folder of TOML files and run.sh
    python scaling_laws.py fit runs/c*                                    # constants, their intervals, law.json, law.png
    python scaling_laws.py cluster                                        # memory and traffic of DDP, FSDP, HSDP, TP

N is parameters, D tokens seen, U unique tokens, C = 6 N D FLOPs, L the loss in nats per token. A plan is a forecast: the laws were
fitted on other data, tokenizers and optimizers; runs of your own and `fit` make it yours.
"""

import itertools
import json
import math
import os
import random
import re
import shlex
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

import config
import metrics

GPT2_VOCAB = 50257
Objective = Literal["ar", "mdm"]


# ---- shapes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """A model of model.py with as many key/value heads as heads; ffn_dim 0 is two thirds of 4 dim, in multiples of 64."""

    dim: int
    head_dim: int
    n_heads: int
    n_layers: int
    ffn_dim: int = 0
    vocab_size: int = GPT2_VOCAB
    tied: bool = True

    def __post_init__(self):
        if not self.ffn_dim:
            object.__setattr__(self, "ffn_dim", 8 * self.dim // 3 // 64 * 64)

    @property
    def block_params(self) -> int:
        """Of one layer."""
        return 4 * self.dim * self.n_heads * self.head_dim + 3 * self.dim * self.ffn_dim + 2 * self.dim

    @property
    def table_params(self) -> int:
        """Of embedding and head."""
        return self.vocab_size * self.dim * (1 if self.tied else 2)

    @property
    def params(self) -> int:
        """N, as Transformer.num_params counts."""
        return self.n_layers * self.block_params + self.dim + self.table_params

    @property
    def published_params(self) -> int:
        """The count of arXiv:2507.15857, section 9: it has biases of norms, 4 dim more per layer, and no last norm."""
        per_layer = 4 * self.dim**2 + 3 * self.dim * self.ffn_dim + 6 * self.dim
        return self.n_layers * per_layer + self.vocab_size * self.dim

    def flops_per_token(self, seq_len: int) -> int:
        """As Transformer.flops_per_token counts: the matrices' and attention's."""
        lookup_only = 0 if self.tied else self.vocab_size * self.dim
        return 6 * (self.params - lookup_only) + 12 * self.n_layers * self.n_heads * self.head_dim * seq_len

    def __str__(self) -> str:
        heads = f"{self.n_heads} heads of {self.head_dim}"
        return f"{self.n_layers} layers, dim {self.dim}, {heads}, ffn_dim {self.ffn_dim}"


# The family of arXiv:2305.16264 and arXiv:2507.15857: name, dim, head_dim, heads, layers; some have heads x head_dim != dim.
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
ROWS = re.findall(r"(\w+) (\d+) (\d+) (\d+) (\d+)", FAMILY)
SHAPES = {name: Shape(int(d), int(h), int(n), int(layers)) for name, d, h, n, layers in ROWS}


def dial(depth: int, vocab_size: int = GPT2_VOCAB) -> tuple[Shape, int, int]:
    """nanochat's dial: layers alone decide. Returns shape, tokens (12 per weight of a matrix), tokens per batch."""

    def sized(layers: int) -> tuple[Shape, int]:
        heads = -(-layers // 2)  # 64 columns per layer, in heads of 128
        shape = Shape(128 * heads, 128, heads, layers, vocab_size=vocab_size, tied=False)
        return shape, 12 * (layers * (shape.block_params - 2 * shape.dim) + vocab_size * shape.dim)

    shape, tokens = sized(depth)
    return shape, tokens, 2 ** round(math.log2(2**19 * (tokens / sized(12)[1]) ** 0.383))


# ---- laws ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Law:
    """L(N, D) = E + A / N^alpha + B / D^beta; repeated tokens and excess parameters count less (arXiv:2305.16264).

    E is None where only the balance of the other two terms is known; r_data and r_params None where repeats are not modelled.
    """

    E: float | None
    A: float
    B: float
    alpha: float
    beta: float
    r_data: float | None = None  # R_D*: repeats after which one more is worth 1/e of a new token
    r_params: float | None = None  # R_N*
    source: str = ""

    @property
    def balance(self) -> float:
        """G of arXiv:2203.15556, eq. 4: how the best N grows out of C."""
        return (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))

    def best_params(self, tokens: float) -> float:
        """N that is compute-optimal together with D new tokens."""
        return self.balance * (tokens * self.balance) ** (self.beta / self.alpha)

    def optimum(self, flops: float) -> tuple[float, float]:
        """(N, D) of least loss with C = 6 N D, all tokens new."""
        params = self.balance * (flops / 6) ** (self.beta / (self.alpha + self.beta))
        return params, flops / 6 / params

    def worth(self, params: float, tokens: float, unique: float | None = None) -> tuple[float, float]:
        """(N', D'): the parameters and new tokens that would do as much as N and D tokens of which `unique` are different."""
        if unique is None or tokens <= unique or self.r_data is None or self.r_params is None:
            return params, tokens
        needed = min(params, self.best_params(unique))
        excess, repeats = params / needed - 1, tokens / unique - 1
        return (
            needed * (1 + self.r_params * -math.expm1(-excess / self.r_params)),
            unique * (1 + self.r_data * -math.expm1(-repeats / self.r_data)),
        )

    def gap(self, params: float, tokens: float, unique: float | None = None) -> float:
        """L - E."""
        N, D = self.worth(params, tokens, unique)
        return self.A / N**self.alpha + self.B / D**self.beta

    def loss(self, params: float, tokens: float, unique: float | None = None) -> float:
        """L. Only where E is known."""
        assert self.E is not None
        return self.E + self.gap(params, tokens, unique)


# Masked diffusion: arXiv:2507.15857 publishes R_D*, R_N* (table 1) and these single-epoch optima, but no E, A, B. With
# alpha = beta the optima give A/B; the value of alpha, here Muennighoff's, then hardly moves the best N.
MDM_OPTIMA = {1e19: "117M", 3e19: "217M", 1e20: "425M"}
EXPONENT = 0.3526596
MDM_BALANCE = math.prod(SHAPES[name].params / math.sqrt(C / 6) for C, name in MDM_OPTIMA.items()) ** (1 / 3)
MDM_A = MDM_BALANCE ** (2 * EXPONENT)
E, A, B = map(math.exp, (0.6254804, 6.255414, 7.3049974))  # published as logarithms
LAWS = {
    "hoffmann": Law(1.69, 406.4, 410.7, 0.34, 0.28, source="arXiv:2203.15556, approach 3"),
    "epoch": Law(1.8172, 482.01, 2085.43, 0.3478, 0.3658, source="arXiv:2404.10102, refit of the same runs"),
    "muennighoff": Law(E, A, B, EXPONENT, EXPONENT, 15.387756, 5.309743, source="arXiv:2305.16264"),
    "diffusion": Law(None, MDM_A, 1.0, EXPONENT, EXPONENT, 493.89, 1265.65, source="arXiv:2507.15857, table 1"),
}
MDM_COST = 16  # compute that masked diffusion needs for AR's loss while all tokens are new (arXiv:2410.18514)
AS_GOOD_AS_NEW = {"ar": 4, "mdm": 100}  # epochs that teach about as much as new tokens would (the same two papers)
CLOSE = 3.0  # within this factor of the critical compute the answer is "either"; our margin, nobody has published one


def critical_flops(unique: float) -> float:
    """C above which masked diffusion beats AR on U unique tokens (arXiv:2507.15857, version 7).

    A power law through crossings at 25M to 100M tokens, so far off these a guess; earlier versions print other constants.
    """
    return 2.12 * 10**1.956 * unique**2.174


def load_law(name: str) -> Law:
    """One of LAWS by name, or a file that `fit` has written."""
    if name in LAWS:
        return LAWS[name]
    if not name.endswith(".json"):
        raise ValueError(f"unknown law {name!r}; known are {', '.join(LAWS)}, or a .json file that `fit` has written")
    return config.from_dict(Law, config.load_file(name).get("law", {}))


# ---- plan ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """A model and how long to train it."""

    name: str
    shape: Shape
    tokens: float
    objective: Objective
    seq_len: int
    unique_tokens: int | None = None
    max_lr: float | None = None  # instead of the rule's
    batch: int | None = None  # tokens per optimizer step, instead of the rule's

    @property
    def flops(self) -> float:
        return 6 * self.shape.params * self.tokens

    @property
    def batch_tokens(self) -> int:
        """0.2920 C^0.3271 (arXiv:2401.02954, eq. 1) as a power of two times the context."""
        return self.batch or self.seq_len * 2 ** max(0, round(math.log2(0.2920 * self.flops**0.3271 / self.seq_len)))

    @property
    def lr(self) -> float:
        """0.3118 C^-0.125 (arXiv:2401.02954, eq. 1; fitted from 1e17 to 2e19 FLOPs) to two digits."""
        return float(f"{self.max_lr or 0.3118 * self.flops**-0.125:.1e}")

    @property
    def epochs(self) -> float:
        return self.tokens / self.unique_tokens if self.unique_tokens else 1.0

    @property
    def size(self) -> tuple[float, float, float | None]:
        """(N, D, U), as a law takes them."""
        return self.shape.params, self.tokens, self.unique_tokens


def plan(
    flops: float | None = None,  # compute, 6 x parameters x tokens
    gpu_hours: float | None = None,  # compute, as hours of one --gpu at --mfu
    tokens: int | None = None,  # tokens to train on; the model follows, or is --preset
    unique_tokens: int | None = None,  # different tokens at hand; more than that are repeats
    epochs: float | None = None,  # passes over them, instead of a compute budget
    preset: str | None = None,  # shape to train (425M, see `shapes`) instead of the best one
    depth: int | None = None,  # nanochat's dial: this many layers, everything else follows
    objective: Literal["auto", "ar", "mdm"] = "auto",  # auto = masked diffusion (mdm) above the critical compute
    law: str | None = None,  # hoffmann, epoch, muennighoff or a file of `fit`; none = the one that fits the question
    gpu: str = "h100",  # GPU whose hours are meant
    n_gpus: int = 8,  # how many work at once
    mfu: float = metrics.ASSUMED_MFU,  # share of their peak that is reached
    dollars_per_gpu_hour: float = 2.0,  # price
    seq_len: int = 2048,  # context length
    vocab_size: int = GPT2_VOCAB,  # of the tokenizer: embeddings are parameters too
    source: str = "data/fineweb_edu",  # shard folder that the TOML file names
    output: str | None = None,  # TOML file to write
) -> None:
    """A model, a token count, an objective, hours and dollars from a budget: FLOPs, GPU-hours, tokens, epochs or a depth."""
    rate = peak_of(gpu) * mfu * 3600
    positive(n_gpus=n_gpus, mfu=mfu)
    check_folder(output)
    budget = {"flops": flops, "gpu_hours": gpu_hours, "tokens": tokens, "epochs": epochs, "depth": depth}
    budget = {name: value for name, value in budget.items() if value is not None}
    if not budget and unique_tokens:
        budget["epochs"] = AS_GOOD_AS_NEW["mdm" if objective == "mdm" else "ar"]
    question = Question(budget, unique_tokens, preset, seq_len, vocab_size, rate, law)
    choice, reason = decide(question, objective)
    hours = choice.tokens * choice.shape.flops_per_token(seq_len) / rate
    cost = f"{hours:.3g} GPU-hours, ${hours * dollars_per_gpu_hour:,.2f} at ${dollars_per_gpu_hour:g} each"
    print(describe(choice, question))
    print(f"time       {hours / n_gpus:.3g} h on {n_gpus} x {gpu} at an assumed {mfu:.0%} MFU: {cost}")
    print(f"objective  {reason}")
    for note in notes(choice, question):
        print(f"note       {note}")
    if output:
        why = f"scaling_laws.py plan, {choice.flops:.3g} FLOP"
        metrics.write_text(output, toml(choice, source, Path("runs", Path(output).stem), why))
        print(f"wrote      {output}; python training.py {output} --dry_run")


def peak_of(gpu: str) -> float:
    """FLOP/s. Raises ValueError for an unknown GPU."""
    if peak := metrics.peak_flops(gpu):
        return peak
    raise ValueError(f"unknown gpu {gpu!r}; known are {', '.join(metrics.PEAK_FLOPS)}")


def positive(**values: float | None) -> None:
    """Raise ValueError for a value that is not above 0; None was not given."""
    for name, value in values.items():
        if value is not None and value <= 0:
            raise ValueError(f"{name} must be above 0, got {value:g}")


def check_folder(path: str | None) -> None:
    """Raise ValueError for a file that cannot be written, before the work that it will hold."""
    if path and not Path(path).parent.is_dir():
        raise ValueError(f"cannot write {path}: no folder {Path(path).parent}; make it first")


@dataclass(frozen=True)
class Question:
    """What a plan is asked for. `budget` has exactly one entry."""

    budget: Mapping[str, float]
    unique_tokens: int | None = None
    preset: str | None = None
    seq_len: int = 2048
    vocab_size: int = GPT2_VOCAB
    flops_per_gpu_hour: float = 0.0
    law: str | None = None

    def __post_init__(self):
        positive(unique_tokens=self.unique_tokens, seq_len=self.seq_len, vocab_size=self.vocab_size, **self.budget)
        if len(self.budget) != 1:
            known = "--flops, --gpu_hours, --tokens, --epochs, --depth, or --unique_tokens"
            raise ValueError(f"give one of {known}; got {', '.join(f'--{name}' for name in self.budget) or 'none'}")
        if "epochs" in self.budget and not self.unique_tokens:
            raise ValueError("--epochs counts passes over --unique_tokens; give both")
        if "depth" in self.budget and (self.preset or self.unique_tokens):
            raise ValueError("--depth decides shape and tokens; leave out --preset and --unique_tokens")
        if self.preset and self.preset not in SHAPES:
            raise ValueError(f"unknown preset {self.preset!r}; one of {', '.join(SHAPES)}")

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        """Those to choose from."""
        names = [self.preset] if self.preset else SHAPES
        return {name: replace(SHAPES[name], vocab_size=self.vocab_size) for name in names}

    def nearest(self, params: float) -> str:
        """Name of the shape with about so many parameters."""
        return min(self.shapes, key=lambda name: abs(math.log(self.shapes[name].params / params)))

    def law_for(self, objective: Objective) -> Law:
        """The law asked for, or the one that fits: only two know about repeated tokens, one of them diffusion's."""
        default = "diffusion" if objective == "mdm" else "muennighoff" if self.unique_tokens else "epoch"
        law = load_law(self.law or default)
        if self.unique_tokens and law.r_data is None:
            what = f"law {self.law} knows nothing of repeated tokens"
            raise ValueError(f"{what}; take muennighoff, or a fit of runs with repeats")
        return law

    def tokens_for(self, shape: Shape) -> float:
        """D that uses the budget up."""
        match self.budget:
            case {"flops": flops}:
                return flops / 6 / shape.params
            case {"gpu_hours": hours}:
                return hours * self.flops_per_gpu_hour / shape.flops_per_token(self.seq_len)
            case {"epochs": epochs}:
                return epochs * (self.unique_tokens or 0)
        return self.budget["tokens"]

    def answer(self, objective: Objective) -> Choice:
        """The shape with the least expected loss; where tokens are the budget, the one for which they are optimal."""
        if depth := self.budget.get("depth"):
            shape, tokens, batch = dial(int(depth), self.vocab_size)
            return Choice(f"d{int(depth)}", shape, tokens, objective, self.seq_len, batch=batch)
        law, unique = self.law_for(objective), self.unique_tokens
        tokens = {name: self.tokens_for(shape) for name, shape in self.shapes.items()}
        if self.budget.keys() & {"tokens", "epochs"}:
            name = self.nearest(law.best_params(law.worth(1, next(iter(tokens.values())), unique)[1]))
        else:
            name = min(tokens, key=lambda name: law.gap(self.shapes[name].params, tokens[name], unique))
        return Choice(name, self.shapes[name], tokens[name], objective, self.seq_len, unique)


def decide(question: Question, objective: Literal["auto", "ar", "mdm"]) -> tuple[Choice, str]:
    """(what to train, why with this objective): AR while tokens are new, masked diffusion beyond the critical compute."""
    choice = question.answer("mdm" if objective == "mdm" else "ar")
    if question.unique_tokens is None or choice.tokens <= question.unique_tokens:
        why = f"AR is right; masked diffusion needs about {MDM_COST}x the compute (arXiv:2410.18514)"
        return choice, f"{choice.objective}. all tokens are new: {why}"
    critical = critical_flops(question.unique_tokens)
    share = choice.flops / critical
    right = "either, train both" if 1 / CLOSE < share < CLOSE else "mdm" if share > 1 else "ar"
    if objective == "auto" and share > 1:
        choice = question.answer("mdm")
    return choice, (
        f"{choice.objective}. The critical compute of {question.unique_tokens:,} tokens is about {critical:.2g} FLOP (one fit at "
        f"25M-100M tokens, arXiv:2507.15857: read it as an order of magnitude); this is {share:.2g} of it: {right}"
    )


def describe(choice: Choice, question: Question) -> str:
    """The plan as text, without time and objective."""
    (N, D, U), law, asked = choice.size, question.law_for(choice.objective), question.law
    lines = [
        f"model      {choice.name}: {N:,} parameters, {choice.shape}",
        f"tokens     {D:,.0f} ({D / N:.1f} per parameter), {choice.flops:.3g} FLOP",
    ]
    repeats = U is not None and D > U
    if repeats:
        new = law.worth(N, D, U)[1]
        worth = f"worth {new:,.0f} new ones ({new / D:.0%} of those seen)"
        lines += [f"epochs     {choice.epochs:.3g} of {U:,} unique tokens, {worth}"]
    known = {asked: law} if asked else LAWS if choice.objective == "ar" else {}
    able = {name: law for name, law in known.items() if law.E is not None and (law.r_data is not None or not repeats)}
    losses = ", ".join(f"{law.loss(N, D, U):.3f} ({name})" for name, law in able.items())
    unknown = "not known for masked diffusion: E, A and B are not published; --law with a fit of your own runs"
    lines += [f"loss       {f'{losses}, nats per token' if losses else unknown}"]
    steps = f"{D // choice.batch_tokens:,.0f} steps, max_lr {choice.lr:g} (arXiv:2401.02954)"
    return "\n".join([*lines, f"batch      {choice.batch_tokens:,} tokens, {steps}"])


def notes(choice: Choice, question: Question) -> list[str]:
    """What a reader of the plan should know before spending the money."""
    said, law = [], question.law_for(choice.objective)
    if choice.name in (ROWS[0][0], ROWS[-1][0]) and not question.preset:
        said.append(f"{choice.name} is the end of the family: the best model lies beyond it")
    if "flops" in question.budget and law.E is not None and choice.epochs > 1:
        enough = saturation(question, law, choice)
        if enough < 0.7 * choice.flops:
            said.append(f"the first {enough:.2g} FLOP give all but 0.01 nats of this: past that, repeats teach nothing")
    if choice.objective == "ar" and choice.epochs > 16:
        said.append(
            "the law knows no overfitting: beyond some tens of epochs AR's validation loss rises; watch it, and stop"
        )
    if choice.tokens < 100 * choice.batch_tokens:
        said.append(f"{choice.tokens / choice.batch_tokens:.0f} steps are few; a smaller --batch_tokens may do better")
    return said


def saturation(question: Question, law: Law, choice: Choice) -> float:
    """The least compute, within 0.02%, whose best model comes within 0.01 nats of `choice`'s loss."""
    spent = lambda i: choice.flops * 10 ** (i / 10_000 - 4)
    best = lambda i: replace(question, budget={"flops": spent(i)}).answer(choice.objective)
    limit = law.gap(*choice.size) + 0.01
    return spent(bisect_left(range(40_000), True, key=lambda i: law.gap(*best(i).size) < limit))


def toml(choice: Choice, source: str, run_dir: Path, why: str) -> str:
    """A config file for training.py."""
    shape, repeats = choice.shape, choice.unique_tokens is not None
    lines = [f"# {why}: {choice.name}, {shape.params:,} parameters, vocabulary {shape.vocab_size:,}", "", "[model]"]
    lines += [f"{name} = {getattr(shape, name)}" for name in ("dim", "n_layers", "n_heads", "head_dim", "ffn_dim")]
    lines += [f"seq_len = {choice.seq_len}", "qk_norm = false"]
    lines += [] if shape.tied else ["tie_embeddings = false"]
    lines += ["causal = false"] if choice.objective == "mdm" else []
    lines += ["", "[data]", f"sources = {{ {json.dumps(source)} = 1.0 }}"]
    lines += [f"unique_tokens = {choice.unique_tokens}"] if repeats else []
    lines += ["", "[optim]", 'optimizer = "adamw"', 'schedule = "cosine"']  # as the laws' runs
    lines += [f"max_lr = {choice.lr:g}", f"min_lr = {choice.lr / 10:g}", "warmup_frac = 0.01"]
    lines += ["", "[train]", f"run_dir = {json.dumps(str(run_dir))}", f'objective = "{choice.objective}"']
    lines += [f"epochs = {choice.epochs:.6g}"] if repeats else [f"max_tokens = {choice.tokens:.0f}"]
    return "\n".join([*lines, f"batch_tokens = {choice.batch_tokens}", ""])


def shapes() -> None:
    """The 54 shapes, their parameters, and what the papers count (arXiv:2507.15857, section 9)."""
    print(f"{'preset':8}{'parameters':>16}{'published':>12}   shape")
    for name, shape in SHAPES.items():
        print(f"{name:8}{shape.params:>16,}{shape.published_params / 1e6:>11.1f}M   {shape}")


# ---- fit -------------------------------------------------------------------------------------------------------------


class Point(NamedTuple):
    """One finished run."""

    params: float
    tokens: float
    unique: float  # of the tokens, at most `tokens`
    loss: float  # validation, nats per token

    @property
    def flops(self) -> float:
        return 6 * self.params * self.tokens

    @property
    def is_new(self) -> bool:
        """At most one epoch; the last batch may begin the second."""
        return self.tokens <= 1.01 * self.unique


def fit(
    runs: list[str],  # finished run directories, or .jsonl files of {"params", "tokens", "loss"[, "unique_tokens"]}
    output: str = "law.json",  # file for the constants; plan --law reads it
    plot: str | None = "law.png",  # picture; none = no picture
    bootstrap: int = 100,  # resamplings for the intervals
) -> None:
    """Constants of L(N, D) from final validation losses, with 95% intervals; with repeated data also R_D* and R_N*.

    As in arXiv:2203.15556: the sum of Huber losses of log L, L-BFGS from the best of a grid. Repeats in a second step, as in
    arXiv:2305.16264: the five constants come from runs of at most one epoch, the two others from the rest.
    """
    check_folder(output)
    check_folder(plot)
    same_kind(runs)
    points = [point for path in runs for point in read_points(Path(path))]
    law = fit_law(points)
    spread = intervals(points, law, bootstrap)
    print(report(points, law, spread))
    found = {"law": asdict(law), "intervals": spread, "runs": len(points)}
    metrics.write_text(output, json.dumps(found, indent=1) + "\n")
    if plot:
        draw(points, law, Path(plot))
    print(
        f"wrote      {output}{f' and {plot}' if plot else ''}; python scaling_laws.py plan --flops=1e19 --law={output}"
    )


def read_points(path: Path) -> list[Point]:
    """Of a run directory that training.py has finished, or a .jsonl file."""
    file = path if path.suffix == ".jsonl" else path / "final_metrics.json"
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path} is no finished run ({file} cannot be read); finish it, or leave it out") from error
    points = []
    for line in text.splitlines() if file == path else [text]:
        try:
            row = json.loads(line)
            params, loss = row.get("parameters", row.get("params")), row.get("val_loss", row.get("loss"))
            unique = min(row["tokens"], row.get("unique_tokens") or row["tokens"])
            points.append(Point(*map(float, (params, row["tokens"], unique, loss))))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} lacks params, tokens or loss, or one is no number: {line[:80]}") from error
        if not all(0 < value < math.inf for value in points[-1]):
            raise ValueError(f"{path}: params, tokens and loss must be above 0, got {points[-1]}")
    return points


def same_kind(runs: Sequence[str]) -> None:
    """Raise ValueError if runs differ in objective or vocabulary: their losses do not belong to one law."""
    kinds: dict[tuple[Any, Any], str] = {}
    for run in runs:
        if (file := Path(run, "config.json")).exists():
            options = config.load_file(str(file))
            kinds.setdefault((options["train"]["objective"], options["model"]["vocab_size"]), run)
    if len(kinds) > 1:
        told = " and ".join(f"{run} ({objective}, {size} tokens)" for (objective, size), run in kinds.items())
        raise ValueError(f"losses of different objectives or tokenizers do not belong to one law: {told}")


FACTORS, FLOORS, EXPONENTS = [0.0, 5, 10, 15, 20, 25], [-1.0, -0.5, 0, 0.5, 1], [0.0, 0.5, 1, 1.5, 2]
STARTS = (FACTORS, FACTORS, FLOORS, EXPONENTS, EXPONENTS)  # log A, log B, log E, alpha, beta: arXiv:2203.15556, D.3
REPEAT_STARTS = [[math.log(R) for R in (1, 10, 100, 1000)]] * 2  # R_D*, R_N*
LARGEST = 25.0  # log of R_D* and R_N* beyond which nothing is left to see
POLISHED = 4  # best starts that are followed down
HUBER_DELTA = 1e-3  # of the residual of log L: outliers beyond a thousandth count linearly


def fit_law(points: Sequence[Point], start: Law | None = None) -> Law:
    """The law that describes the points. `start`: only improve that one."""
    fresh, repeated = [p for p in points if p.is_new], [p for p in points if not p.is_new]
    variety = len({p.params for p in fresh}), len({round(p.tokens, -3) for p in fresh})
    if len(fresh) < 6 or min(variety) < 3:
        raise ValueError(
            f"{len(fresh)} runs of at most one epoch, {variety[0]} sizes, {variety[1]} token counts: five constants need "
            "at least 6 runs, 3 sizes, 3 token counts; make more (`sweep chinchilla`)"
        )
    starts: Iterable[Sequence[float]] = itertools.product(*STARTS)
    if start and start.E:
        starts = [(math.log(start.A), math.log(start.B), math.log(start.E), start.alpha, start.beta)]
    a, b, e, alpha, beta = _minimize(_residuals, fresh, starts)
    law = Law(math.exp(e), math.exp(a), math.exp(b), alpha, beta, source=f"fit of {len(points)} runs")
    if not repeated:
        return law
    starts = itertools.product(*REPEAT_STARTS)
    if start and start.r_data and start.r_params:
        starts = [(math.log(start.r_data), math.log(start.r_params))]
    r_data, r_params = _minimize(partial(_repeat_residuals, law), repeated, starts)
    return replace(law, r_data=math.exp(r_data), r_params=math.exp(r_params))


def _residuals(theta: Any, runs: Any) -> Any:
    """[..., n], differences of log L: of theta [..., 5] to runs [n, 4]; by logarithms, so that no term overflows."""
    params, tokens, _, loss = runs.log().T
    a, b, e, alpha, beta = theta[..., None].unbind(-2)
    return (a - alpha * params).logaddexp(b - beta * tokens).logaddexp(e) - loss


def _repeat_residuals(law: Law, theta: Any, runs: Any) -> Any:
    """The same for theta [..., 2], logs of R_D* and R_N*: Law.worth and Law.loss in differentiable form."""
    params, tokens, unique, loss = runs.T
    needed = params.minimum(law.best_params(unique))
    r_data, r_params = theta.clamp(-LARGEST, LARGEST).exp()[..., None].unbind(-2)
    N = needed * (1 - r_params * ((1 - params / needed) / r_params).expm1())
    D = unique * (1 - r_data * ((1 - tokens / unique) / r_data).expm1())
    return (law.E + law.A * N**-law.alpha + law.B * D**-law.beta).log() - loss.log()


def _minimize(residuals: Callable[..., Any], points: Sequence[Point], starts: Iterable[Sequence[float]]) -> list[float]:
    """theta of the least sum of Huber losses over the points: L-BFGS from the POLISHED best starts."""
    import torch

    runs, grid = torch.tensor(points, dtype=torch.float64), torch.tensor(list(starts), dtype=torch.float64)

    def objective(theta: Any) -> Any:  # in units of delta squared, which keeps it near 1 for the optimizer
        errors = residuals(theta, runs)
        losses = torch.nn.functional.huber_loss(errors, errors * 0, delta=HUBER_DELTA, reduction="none")
        return losses.sum(-1) / HUBER_DELTA**2

    def descend(theta: Any) -> tuple[float, list[float]]:
        theta = theta.clone().requires_grad_()
        optimizer = torch.optim.LBFGS([theta], max_iter=500, tolerance_grad=1e-7, tolerance_change=1e-12, line_search_fn="strong_wolfe")  # fmt: skip

        def closure() -> Any:
            optimizer.zero_grad()
            loss = objective(theta)
            loss.backward()
            return loss

        optimizer.step(closure)
        value = objective(theta).item()
        return (value if math.isfinite(value) else math.inf), theta.tolist()

    return min(map(descend, grid[objective(grid).argsort()[:POLISHED]]))[1]


def intervals(points: Sequence[Point], law: Law, rounds: int) -> dict[str, list[float]]:
    """{constant: [low, high]}, the middle 95% of fits to runs drawn with replacement."""
    rng, fits = random.Random(0), []
    for _ in range(20 * rounds):
        if len(fits) < rounds:
            with suppress(ValueError):  # a draw with too few different runs
                fits.append(constants(fit_law(rng.choices(points, k=len(points)), law)))
    ranked = {name: sorted(fit[name] for fit in fits) for name in constants(law)} if fits else {}
    return {name: [v[int(0.025 * len(v))], v[math.ceil(0.975 * len(v)) - 1]] for name, v in ranked.items()}


def constants(law: Law) -> dict[str, float]:
    """Those that are fitted, and the exponent of the best N in C."""
    named = {name: value for name, value in asdict(law).items() if isinstance(value, float)}
    return {**named, "exponent": law.beta / (law.alpha + law.beta)}


def report(points: Sequence[Point], law: Law, spread: Mapping[str, Sequence[float]]) -> str:
    """Constants with intervals, how well they describe the runs, what they recommend."""
    errors = [math.log(p.loss / law.loss(*p[:3])) for p in points]
    mean = sum(math.log(p.loss) for p in points) / len(points)
    r2 = 1 - sum(e * e for e in errors) / sum((math.log(p.loss) - mean) ** 2 for p in points)
    repeated, largest = sum(not p.is_new for p in points), max(p.flops for p in points)
    lines = [f"{len(points)} runs, {repeated} with repeated tokens", f"{'':10}{'estimate':>12}{'95% interval':>26}"]
    for name, value in constants(law).items():
        low, high = spread.get(name, (math.nan, math.nan))
        lines.append(f"{name:10}{value:12.5g}{f'{low:.5g} to {high:.5g}':>26}")
    lines.append(f"R^2 of log L {r2:.4f}, largest error {max(map(abs, errors)):.2%}")
    for C in (largest, 10 * largest):
        N, D = law.optimum(C)
        lines.append(f"best for {C:.2g} FLOP: N {N:.3g}, D {D:.3g} ({D / N:.1f} per parameter), L {law.loss(N, D):.3f}")
    return "\n".join([*lines, f"beyond {largest:.2g} FLOP, the largest run here, the law is a guess"])


def draw(points: Sequence[Point], law: Law, out: Path) -> None:
    """Panels: loss by size at equal compute, where the runs show it; loss by compute; errors."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [*([_draw_isoflops] if budgets(points) else []), _draw_frontier, _draw_errors]
    figure, axes = plt.subplots(1, len(panels), figsize=(5.5 * len(panels), 5), constrained_layout=True)
    for axis, panel in zip(axes, panels, strict=True):
        axis.set_xscale("log")
        panel(axis, points, law, plt.get_cmap("viridis"))
        axis.grid(alpha=0.25)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    terms = f"{law.A:.4g} / $N^{{{law.alpha:.3f}}}$ + {law.B:.4g} / $D^{{{law.beta:.3f}}}$"
    figure.suptitle(f"L = {law.E:.3f} + {terms}, {len(points)} runs", fontsize=13)
    metrics.save_figure(figure, out)


def budgets(points: Sequence[Point], most: int = 9) -> list[list[Point]]:
    """The `most` largest groups of runs of nearly the same compute (within 10% of the smallest), of three sizes or more."""
    groups: list[list[Point]] = []
    for point in sorted((p for p in points if p.is_new), key=lambda p: p.flops):
        if groups and point.flops <= 1.1 * groups[-1][0].flops:
            groups[-1].append(point)
        else:
            groups.append([point])
    groups = sorted((sorted(g) for g in groups if len({p.params for p in g}) >= 3), key=len)[-most:]
    return sorted(groups, key=lambda group: group[0].flops)


def _draw_isoflops(axis: Any, points: Sequence[Point], law: Law, colors: Any) -> None:
    axis.set(title="Loss by size, at equal compute", xlabel="parameters", ylabel="validation loss, nats per token")
    groups = budgets(points)
    for i, group in enumerate(groups):
        C = sum(p.flops for p in group) / len(group)
        color = colors(0.9 * i / max(1, len(groups) - 1))
        axis.plot([p.params for p in group], [p.loss for p in group], "o", ms=4, color=color, label=f"{C:.2g} FLOP")
        best, tokens = law.optimum(C)
        sizes = np.geomspace(min(best, 0.8 * group[0].params), max(best, 1.25 * group[-1].params), 200)
        axis.plot(sizes, [law.loss(N, C / 6 / N) for N in sizes], "-", lw=1, color=color)
        axis.plot([best], [law.loss(best, tokens)], "*", ms=11, color=color, mec="black", mew=0.5, zorder=3)
    axis.plot([], [], "*", ms=9, color="white", mec="black", label="best by the law")


def _draw_frontier(axis: Any, points: Sequence[Point], law: Law, colors: Any) -> None:
    axis.set(title="Loss by compute", xlabel="FLOP", ylabel="validation loss, nats per token")
    for new, mark, label in (True, "o", "at most one epoch"), (False, "x", "repeated tokens"):
        if some := [(p.flops, p.loss) for p in points if p.is_new is new]:
            axis.plot(*zip(*some, strict=True), mark, ms=4, alpha=0.7, label=label)
    least, most = min(p.flops for p in points), max(p.flops for p in points)
    line = np.geomspace(least, 10 * most, 200)
    axis.plot(line, [law.loss(*law.optimum(C)) for C in line], "k--", lw=1, label="best by the law, tokens new")
    axis.axvspan(most, 10 * most, color="gray", alpha=0.12, lw=0, label="extrapolated")


def _draw_errors(axis: Any, points: Sequence[Point], law: Law, colors: Any) -> None:
    axis.set(title="What the law misses", xlabel="parameters", ylabel="measured loss / the law's - 1, %")
    errors = [100 * (p.loss / law.loss(*p[:3]) - 1) for p in points]
    shade = [math.log10(p.tokens) for p in points]
    drawn = axis.scatter([p.params for p in points], errors, s=14, c=shade, cmap=colors)
    axis.axhline(0, color="black", lw=0.8)
    axis.figure.colorbar(drawn, ax=axis, label="log10 of tokens")


# ---- sweep -----------------------------------------------------------------------------------------------------------

SWEEP_SCRIPT = """#!/usr/bin/env bash
# {title}
# Call it in the folder of training.py; finished runs are left alone, interrupted ones go on. Options go to training.py:
#   {folder}/run.sh --sources=data/mine
#   JOB=3 {folder}/run.sh                        # only the fourth file; under `sbatch --array=0-{last}` each job its own
set -euo pipefail
[ -f training.py ] || {{ echo "run.sh: call it in the folder of training.py" >&2; exit 2; }}
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
DATA_VALUE_EPOCHS = (1, 2, 4, 10, 20, 50, 100)  # of arXiv:2507.15857's experiment on the value of data
LR_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
WIDTH = 4.0  # a Chinchilla sweep tries sizes up to this factor from the best one


def sweep(
    experiment: Literal["chinchilla", "data_value", "learning_rate"],  # chinchilla, data_value or learning_rate
    flops: list[float] | None = None,  # compute of each run, 6 x parameters x tokens; several for chinchilla
    sizes: int = 7,  # model sizes per compute (chinchilla)
    objective: Objective = "ar",  # ar or mdm
    seq_len: int = 2048,  # context length
    vocab_size: int = GPT2_VOCAB,  # of the tokenizer: embeddings are parameters too
    batch_tokens: int | None = None,  # tokens per optimizer step; none = by the rule of `plan`
    source: str = "data/fineweb_edu",  # shard folder
    out_dir: str | None = None,  # folder to write; none = sweeps/EXPERIMENT
) -> None:
    """A grid of TOML files and run.sh, which trains them all and then fits or compares.

    chinchilla: several sizes at equal compute, new tokens. data_value: one size and compute, 1 to 100 epochs of ever fewer
    unique tokens. learning_rate: one size and compute, a quarter to four times the rule's learning rate.
    """
    if not flops:
        raise ValueError("sweep needs --flops (6e18,1e19)")
    if experiment != "chinchilla" and len(flops) > 1:
        raise ValueError(f"{experiment} takes one compute, got --flops={','.join(f'{C:g}' for C in flops)}")
    if sizes < 3:
        raise ValueError(f"sizes must be at least 3 for a curve with a lowest point, got {sizes}")
    positive(seq_len=seq_len, batch_tokens=batch_tokens)
    if batch_tokens and batch_tokens % seq_len:
        raise ValueError(f"batch_tokens ({batch_tokens}) must be a multiple of seq_len ({seq_len})")
    folder = Path(out_dir or f"sweeps/{experiment}")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; choose another --out_dir or remove it")
    runs: dict[str, Choice] = {}
    for C in flops:
        question = Question({"flops": C}, seq_len=seq_len, vocab_size=vocab_size)
        runs |= grid(experiment, question, replace(question.answer(objective), batch=batch_tokens), sizes)
    folder.mkdir(parents=True, exist_ok=True)
    for name, run in runs.items():
        why = f"{experiment}, {run.flops:.3g} FLOP"
        metrics.write_text(folder / f"{name}.toml", toml(run, source, folder / "runs" / name, why))
    here = shlex.quote(str(folder))
    finish = f"python metrics.py {here}/runs/* -o {here}/runs.png"
    if experiment == "chinchilla":
        finish = f"python scaling_laws.py fit {here}/runs/* --output={here}/law.json --plot={here}/law.png"
    title = f"{experiment}: {len(runs)} runs, {sum(run.flops for run in runs.values()):.3g} FLOP in all"
    script = SWEEP_SCRIPT.format(title=title, folder=here, last=len(runs) - 1, finish=finish)
    metrics.write_text(folder / "run.sh", script)
    os.chmod(folder / "run.sh", 0o755)
    print(f"{title}\nwrote      {folder}/*.toml and {folder}/run.sh")


def grid(experiment: str, question: Question, best: Choice, sizes: int) -> dict[str, Choice]:
    """{name: run} of one compute, around the best one."""
    match experiment:
        case "data_value":
            unique = {E: int(best.tokens / E) for E in DATA_VALUE_EPOCHS}
            return {f"{best.name}_{E:03}epochs": replace(best, unique_tokens=U) for E, U in unique.items()}
        case "learning_rate":
            rates = [best.lr * factor for factor in LR_FACTORS]
            return {f"{best.name}_lr{rate:.1e}": replace(best, max_lr=rate) for rate in rates}
    runs = {}
    for params in best.shape.params * np.geomspace(1 / WIDTH, WIDTH, sizes):
        name = question.nearest(params)
        shape = question.shapes[name]
        runs[f"c{best.flops:.3g}_{name}"] = replace(best, name=name, shape=shape, tokens=question.tokens_for(shape))
    return runs


# ---- cluster ---------------------------------------------------------------------------------------------------------


# Seconds of NCCL's own cost model (src/graph/tuning.cc, protocol Simple): per call; per hop of a ring or tree within a node;
# per hop to another node.
CALL_S, RING_S, TREE_S, HOP_S = 8.4e-6, 3.4e-6, 4.0e-6, 14.0e-6
BUCKET = 25 * 2**20  # bytes that DDP reduces at once (torch's default)


@dataclass(frozen=True)
class Network:
    """Bytes per second that one GPU sends: to GPUs of its node, to other nodes."""

    inside: float
    across: float
    node: int = 8  # GPUs of a node

    def collect(self, size: float, gpus: int, calls: int, local: int) -> tuple[float, float]:
        """(bytes a GPU sends, seconds) of an all-gather or reduce-scatter of `size` bytes over `gpus`, in `calls` parts.

        Within each node, where `local` of them are, then between the nodes through all their cards at once.
        """
        nodes = gpus // local
        within, between = size * (local - 1) / local, size * (nodes - 1) / nodes / local
        waits = calls * (CALL_S + (gpus - nodes) * RING_S + (nodes - 1) * HOP_S) if gpus > 1 else 0.0
        return within + between, within / self.inside + between / self.across + waits

    def reduce(self, size: float, gpus: int, calls: int, local: int) -> tuple[float, float]:
        """The same of an all-reduce: twice the bytes, but trees, whose depth grows with the logarithm of the nodes."""
        sent, seconds = self.collect(size, gpus, 0, local)
        depth = (local - 1) * TREE_S + math.log2(gpus / local) * HOP_S
        return 2 * sent, 2 * seconds + (calls * (CALL_S + 2 * depth) if gpus > 1 else 0.0)


def step_cost(strategy: str, shape: Shape, gpus: int, tokens: int, network: Network) -> tuple[float, float, float]:
    """(bytes of state, bytes sent, seconds of communication) of one GPU and optimizer step, `tokens` per GPU at once.

    State: fp32 weights, gradients, AdamW's moments, and the bf16 weights at hand.
    ddp: all-reduce of fp32 gradients in buckets. fsdp: layer by layer all-gather of bf16 weights for the forward and
    for the backward pass, reduce-scatter of fp32 gradients. hsdp: fsdp within a node, all-reduce of the shards across nodes.
    tp: each layer split over a node with sequence parallelism (arXiv:2205.05198: 8 gathers or scatters of the node's
    activations per layer), ddp across nodes.
    """
    N, local, layers = shape.params, min(gpus, network.node), shape.n_layers + 1  # + 1: tables and last norm
    shards = {"ddp": 1, "fsdp": gpus}.get(strategy, local)
    gathered, share, parts = 2 * N / shards, 4 * N / shards, []
    calls = math.ceil(share / BUCKET)
    if strategy == "tp":
        parts = 8 * shape.n_layers * [network.collect(2 * tokens * shards * shape.dim, shards, 1, local)]
    elif strategy != "ddp":
        gathered, calls = 2 * (2 * shape.block_params + shape.table_params), layers  # this layer, the next, the tables
        parts = [network.collect(size, shards, layers, local) for size in (2 * N, 2 * N, 4 * N)]
    parts.append(network.reduce(share, gpus // shards, calls, max(1, local // shards)))
    return 16 * N / shards + gathered, sum(sent for sent, _ in parts), sum(seconds for _, seconds in parts)


CLUSTER_SHAPES = {  # the default model, configs/dclm_1b.toml, configs/dclm_7b.toml
    "416M": Shape(1024, 64, 16, 24, ffn_dim=3584),
    "1.4B": Shape(2048, 128, 16, 24, ffn_dim=5632, vocab_size=50432, tied=False),
    "7B": Shape(4096, 128, 32, 32, ffn_dim=11008, vocab_size=50432, tied=False),
}


def cluster(
    gpus: list[int] | None = None,  # counts of GPUs; none = 8,64,1024
    gpu: str = "h100",  # for its peak FLOP/s
    memory_gb: float = 80.0,  # of one GPU
    mfu: float = metrics.ASSUMED_MFU,  # share of the peak reached while computing
    nvlink_gb_per_s: float = 400.0,  # one GPU to others of its node (NVSwitch of an H100: 450 on paper)
    network_gb_per_s: float = 40.0,  # one GPU to other nodes (one 400 Gbit/s card per GPU: 50 on paper)
    tokens: int = 8192,  # per GPU and optimizer step, one micro-step
    seq_len: int = 2048,  # context length
) -> None:
    """Memory per GPU, and communication against compute of one step, for DDP, FSDP, HSDP and TP at three sizes.

    A model, not a measurement: bytes / bandwidth plus NCCL's latencies, nothing overlapped. Up to 100%, overlap can hide it.
    """
    counts = gpus or [8, 64, 1024]
    peak, network = peak_of(gpu), Network(nvlink_gb_per_s * 1e9, network_gb_per_s * 1e9)
    if bad := [n for n in counts if n < 1 or (n > network.node and n % network.node)]:
        raise ValueError(f"gpus must be up to {network.node} or a multiple of it (a full node), got {bad[0]}")
    positive(mfu=mfu, nvlink_gb_per_s=nvlink_gb_per_s, network_gb_per_s=network_gb_per_s, tokens=tokens)
    print(
        f"{tokens:,} tokens per GPU and step, {gpu} at {mfu:.0%} MFU, {nvlink_gb_per_s:g} GB/s within and {network_gb_per_s:g} GB/s "
        f"between nodes of {network.node}\nGB per GPU: state is weights, gradients, AdamW; more than {memory_gb:g} in all "
        f"does not fit (*)\n\n{'model':6}{'GPUs':>6}{'batch':>12}  {'':6}{'state':>8}{'activ.':>8}{'in all':>9}"
        f"{'sent GB':>10}{'comm. ms':>10}{'compute ms':>12}{'ratio':>8}"
    )
    for (name, shape), n, strategy in itertools.product(CLUSTER_SHAPES.items(), counts, ("ddp", "fsdp", "hsdp", "tp")):
        heads = shape.n_heads * shape.head_dim
        kept = shape.n_layers * metrics.activation_bytes(shape.dim, heads, heads, shape.ffn_dim)
        activations = tokens * (kept + metrics.LOGITS_BYTES * shape.vocab_size)
        state, sent, seconds = step_cost(strategy, shape, n, tokens, network)
        compute, in_all = tokens * shape.flops_per_token(seq_len) / peak / mfu, (state + activations) / 1e9
        print(
            f"{name:6}{n:>6}{n * tokens:>12,}  {strategy:6}{state / 1e9:>8.1f}{activations / 1e9:>8.1f}"
            f"{in_all:>8.1f}{'*' if in_all > memory_gb else ' '}{sent / 1e9:>10.2f}{1e3 * seconds:>10.1f}"
            f"{1e3 * compute:>12.1f}{seconds / compute:>8.0%}"
        )


COMMANDS = (plan, fit, sweep, cluster, shapes)

if __name__ == "__main__":
    config.run(lambda: config.call(COMMANDS))
