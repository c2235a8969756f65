"""The options of a run, and what follows from them before it begins: steps, micro-steps, memory, hours, dollars.

cfg = config.parse_config(Config)          # defaults < one TOML or JSON file < command line
plan = make_plan(cfg, world_size=8)        # ValueError with the nearest batch that can be split
print(describe(plan, cfg, dist))           # what `training.py --dry_run` prints
"""

import importlib.util
import os
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

import diffusion
import distributed
import metrics
from diffusion import DiffusionConfig
from distributed import Dist
from model import ModelConfig, Transformer
from optimizers import OptimConfig
from shards import DataConfig

GPT2_VOCAB = 50257  # for a plan without data
MAX_AUTO = 128  # sequences per micro-step beyond which nothing gets faster
CPU_AUTO = 8  # on a CPU small micro-steps stay in its caches
MEMORY_SHARE = 0.94  # of a GPU's memory, for a run to fill; the rest is the driver's and fragments


@dataclass(frozen=True)
class TrainConfig:
    """The run: budget, batch, what happens how often, where it is written."""

    run_dir: str = "checkpoints"  # directory of the run
    seed: int = 42  # of the initial weights and of the order of the data
    max_tokens: int = 10_000_000_000  # tokens to train on
    epochs: float | None = None  # passes over the data (or over unique_tokens of it); overrides max_tokens
    max_steps: int | None = None  # optimizer steps; overrides epochs and max_tokens
    batch_tokens: int = 655_360  # tokens per optimizer step, over all GPUs and micro-steps
    batch_size: int | Literal["auto"] = "auto"  # sequences per GPU and micro-step at most; auto = what fits in memory
    log_every: int = 10  # steps between log lines, 0 = never
    eval_every: int = 250  # steps between validations, 0 = only at the end
    eval_tokens: int = 5_000_000  # validation tokens to use at most
    checkpoint_every: int = 2000  # steps between permanent checkpoints, 0 = only at the end
    keep_every: int | None = None  # of these keep only multiples of so many steps, and the last; none = all
    save_interval: float | None = 900.0  # seconds (15m) between temporary checkpoints; none = no temporary ones
    sample_every: int = 1000  # steps between samples of generated text, 0 = only at the end
    stats_every: int = 0  # steps between rows of stats.jsonl: norms of each weight, gradient, update; 0 = none
    hellaswag: str | None = "data/hellaswag_val.jsonl"  # items scored at each checkpoint; none = never
    time_limit: float | None = None  # seconds (3h50m) after which to save and leave with exit code 75
    kill_switch: str | None = None  # file that stops the run while it exists: save and leave with exit code 0
    skip_spikes: bool = False  # skip steps whose loss or gradient is beyond 6 sigma of the last 128
    timeout: float = 600.0  # seconds (10m) that the other ranks wait for a silent one before they give up
    resume: str = "auto"  # auto = newest checkpoint of run_dir if there is one; never; or a checkpoint's path
    init_from: str | None = None  # checkpoint whose weights start a new run
    zero_init: bool = False  # layers start as the identity: their output projections are zero
    compile: bool | None = None  # torch.compile the model; none = on a GPU
    activation_memory_budget: float = 1.0  # share of activations kept when compiled; less saves memory, costs time
    dtype: Literal["bf16", "fp32"] | None = None  # of activations and matmuls; none = bf16 where it is faster
    parallel: distributed.Strategy = "ddp"  # ddp, fsdp or hsdp: fsdp cuts the weights, hsdp cuts them within each node
    cpu_offload: bool = False  # keep weights and optimizer state in host memory, with fsdp or hsdp; slow
    recompute: distributed.Recompute = "none"  # activations computed twice, not kept: none, selective or full
    tensor_parallel: int = 1  # neighbouring GPUs that share each matrix product, with fsdp or hsdp
    objective: Literal["ar", "mdm"] = "ar"  # ar = predict the next token, mdm = masked diffusion: restore masked tokens
    eval_only: str | None = None  # checkpoint to validate on the sources, then leave; no training
    tracker: Literal["wandb", "tensorboard", "trackio"] | None = None  # where rows go beside metrics.jsonl
    dry_run: bool = False  # print the plan and leave
    preflight: bool = False  # check that all ranks' machines, clocks, data and links are alike, then leave
    dollars_per_gpu_hour: float = 2.0  # for the plan's cost

    def __post_init__(self):
        for name in ("max_tokens", "batch_tokens", "batch_size", "eval_tokens", "tensor_parallel"):
            if getattr(self, name) != "auto" and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("log_every", "eval_every", "checkpoint_every", "sample_every", "stats_every", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("max_steps", "epochs", "keep_every", "save_interval", "time_limit", "timeout"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if not 0 < self.activation_memory_budget <= 1:
            raise ValueError(f"activation_memory_budget must be in (0, 1], got {self.activation_memory_budget}")
        if self.tracker and not importlib.util.find_spec(self.tracker):
            raise ValueError(
                f"--tracker={self.tracker} needs that package: pip install {self.tracker}, or leave it out"
            )


@dataclass(frozen=True)
class Config:
    """Everything a run needs; each section belongs to the room that reads it."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)

    def __post_init__(self):
        if not self.train.eval_only:  # there the checkpoint says what it is
            diffusion.check(self.diffusion, self.train.objective)
        if self.train.objective == "mdm":
            object.__setattr__(self, "model", replace(self.model, causal=False))
        elif not self.model.causal:
            raise ValueError(
                "causal=false lets each token see the one that it should predict; train it with --objective=mdm"
            )


@dataclass(frozen=True)
class Plan:
    """What follows from a config and the number of processes."""

    steps: int
    batch_sequences: int  # per optimizer step, all ranks
    batch_size: int  # sequences per rank and micro-step
    micro_steps: int  # per optimizer step, each rank
    params: int
    flops_per_token: int
    unique_tokens: int | None  # one epoch, where the data are known


def make_plan(cfg: Config, world_size: int, tokens_per_epoch: int | None = None, fits: int = MAX_AUTO) -> Plan:
    """Derive steps and micro-steps; `fits` is the limit of batch_size "auto". Raises ValueError with the nearest batch."""
    seq_len, batch_tokens = cfg.model.seq_len, cfg.train.batch_tokens
    limit = fits if cfg.train.batch_size == "auto" else cfg.train.batch_size
    sequences, unit = batch_tokens // seq_len, seq_len * world_size
    share = batch_tokens // unit  # sequences per rank and optimizer step
    batch_size = max((n for n in range(1, limit + 1) if share and share % n == 0), default=0)
    if share and batch_tokens % unit and not batch_tokens % seq_len:
        batch_size = least_idle(sequences, world_size, limit)
    elif batch_tokens % unit or (batch_size <= limit // 2 and share > limit and cfg.train.batch_size != "auto"):
        step = seq_len * world_size if batch_tokens % unit else unit * limit
        raise ValueError(
            f"batch_tokens ({batch_tokens}) does not split into micro-steps of about batch_size ({cfg.train.batch_size})"
            f" x seq_len ({seq_len}) x processes ({world_size}); try --batch_tokens={max(1, round(batch_tokens / step)) * step}"
        )
    tokens = int(cfg.train.epochs * tokens_per_epoch) if cfg.train.epochs and tokens_per_epoch else cfg.train.max_tokens
    steps = cfg.train.max_steps or tokens // batch_tokens
    if not steps:
        raise ValueError(f"max_tokens ({tokens}) is less than one step of batch_tokens ({batch_tokens})")
    with torch.device("meta"):
        shape = Transformer(cfg.model)
    micro_steps = -(-sequences // (batch_size * world_size))
    size = shape.num_params(), shape.flops_per_token()
    return Plan(steps, sequences, batch_size, micro_steps, *size, tokens_per_epoch)


def least_idle(sequences: int, world_size: int, limit: int) -> int:
    """Sequences per micro-step where the ranks do not divide the batch (three of an elastic run's four nodes): in the
    last round some have nothing to do. At least 8 where that can be: smaller micro-steps are slow."""
    sizes = [n for n in range(1, min(limit, -(-sequences // world_size)) + 1) if sequences % n == 0]
    sizes = [n for n in sizes if n >= min(limit, 8)] or sizes
    return min(sizes, key=lambda n: (n * -(-sequences // (n * world_size)), -n))


def describe(plan: Plan, cfg: Config, dist: Dist) -> str:
    """The plan as text: what will be trained, how much of it, what it takes."""
    tokens = plan.steps * cfg.train.batch_tokens
    flops = plan.flops_per_token * tokens
    saves = 1 + (plan.steps - 1) // cfg.train.checkpoint_every if cfg.train.checkpoint_every else 1
    epochs = f", {tokens / plan.unique_tokens:.3g} epochs" if plan.unique_tokens else ""
    on = f"{dist.world_size} x {device_name(dist.device)}"
    lines = [
        f"model      {plan.params:,} parameters, {plan.flops_per_token / 1e9:.3g} GFLOP per token",
        f"batch      {cfg.train.batch_tokens:,} tokens = {plan.batch_size} sequences x {cfg.model.seq_len} tokens x "
        f"{plan.micro_steps} micro-steps x {dist.data_size} processes",
        f"run        {plan.steps:,} steps, {tokens:,} tokens ({tokens / plan.params:.1f} per parameter{epochs}), {flops:.3g} FLOP",
        f"memory     {expected_memory_gb(plan, cfg, dist):.1f} GB per process, here are {memory_gb(dist.device):.0f} GB",
        f"disk       {saves} checkpoints of {12 * plan.params / 1e9:.2f} GB in {cfg.train.run_dir}",
    ]
    if speed := expected_tokens_per_s(plan, dist):
        hours = tokens / speed / 3600
        dollars = hours * dist.world_size * cfg.train.dollars_per_gpu_hour
        lines.append(
            f"time       {hours:.1f} h, ${dollars:,.0f} on {on}: {speed:,.0f} tokens/s at an assumed {metrics.ASSUMED_MFU:.0%} MFU"
        )
    else:
        lines.append(f"time       not known in advance on {on}; the log shows an ETA")
    return "\n".join(lines)


def expected_tokens_per_s(plan: Plan, dist: Dist) -> float | None:
    """Of all GPUs together, from their data sheet; None for a device without an entry in metrics.PEAK_FLOPS."""
    peak = metrics.peak_flops(device_name(dist.device))
    return peak * metrics.ASSUMED_MFU * dist.world_size / plan.flops_per_token if peak else None


def expected_memory_gb(plan: Plan, cfg: Config, dist: Dist) -> float:
    """Weights, gradients, optimizer and one micro-step's activations of one process, GB.

    Activations are metrics.activation_bytes, half as many again without the compiler; with recompute "full" a layer's input.
    """
    shape, compiled = cfg.model, uses_compiler(cfg, dist.device)
    assert shape.n_kv_heads and shape.head_dim and shape.ffn_dim and shape.vocab_size
    state = {"sgd": 4, "lion": 4, "muon": 4}.get(cfg.optim.optimizer, 8) + (4 if cfg.optim.ema else 0)
    widths = shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim
    layer = metrics.activation_bytes(shape.dim, *widths, shape.ffn_dim) * (
        cfg.train.activation_memory_budget if compiled else 1.5
    )
    layer = 4 * shape.dim if cfg.train.recompute == "full" else layer
    fused = compiled and dist.device.type == "cuda"  # otherwise a chunk of the logits exists at a time
    head = metrics.LOGITS_BYTES * shape.vocab_size if fused else 0
    per_token = (shape.n_layers * layer + head) * (1 if uses_bf16(cfg, dist.device) else 1.7)
    libraries = 0.4e9 if dist.device.type == "cpu" else 0  # of the process, before anything is built
    return (libraries + (8 + 2 + state) * plan.params / dist.parts + per_token * plan.batch_size * shape.seq_len) / 1e9


def expected_to_fit(plan: Plan, cfg: Config, dist: Dist) -> int:
    """What batch_size "auto" will find, by the plan's own arithmetic."""
    if dist.device.type != "cuda":
        return CPU_AUTO
    room = MEMORY_SHARE * memory_gb(dist.device)
    fits = (n for n in range(MAX_AUTO, 0, -1) if expected_memory_gb(replace(plan, batch_size=n), cfg, dist) < room)
    return next(fits, 1)


def memory_gb(device: torch.device) -> float:
    """All memory of this GPU, or of this machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[1] / 1e9
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9


def with_vocabulary(cfg: Config, data_vocab: int | None) -> Config:
    """The config with vocab_size filled in from the data. Raises ValueError where the model's is too small for it."""
    given = cfg.model.vocab_size
    if given is not None and data_vocab is not None and given < data_vocab:
        raise ValueError(
            f"vocab_size ({given}) is smaller than the {data_vocab} tokens of the data's tokenizer; "
            "leave it out, or prepare the data with another --tokenizer"
        )
    return replace(cfg, model=replace(cfg.model, vocab_size=given or data_vocab or GPT2_VOCAB))


def uses_compiler(cfg: Config, device: torch.device) -> bool:
    """Unless told otherwise: on a GPU."""
    return device.type == "cuda" if cfg.train.compile is None else cfg.train.compile


def uses_bf16(cfg: Config, device: torch.device) -> bool:
    """Unless told otherwise: on a GPU, and on a CPU that has instructions for it (4.5 times fp32's matmuls there)."""
    if cfg.train.dtype is not None:
        return cfg.train.dtype == "bf16"
    return device.type == "cuda" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def device_name(device: torch.device) -> str:
    """Of the GPU, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
