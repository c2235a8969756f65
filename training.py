"""Train a transformer on token shards: bf16, one process per GPU, checkpoints you can resume and chat with.

    python training.py configs/sample.toml                       # a CPU, two minutes (after: data_pipeline.py sample)
    torchrun --standalone --nproc_per_node=8 training.py         # the 416M run on 8 GPUs
    python training.py --sources=data/mine --dim=512 --n_layers=8 --max_tokens=500M --run_dir=runs/mine
    python training.py --eval_only=runs/mine --sources=data/other  # validate a checkpoint, on any data of its tokenizer
    python training.py runs/mine/config.json                     # the same run again: resumes, or finds itself done

Reads shards written by data_pipeline.py; writes RUN_DIR/{config.json, metrics.jsonl, train.log,
checkpoint_step_<N>.pt, final_metrics.json, final_metrics.png}. The same command is the same run on any number of GPUs.
"""

import contextlib
import gc
import importlib.util
import json
import math
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import config

if __name__ == "__main__":  # before torch is imported, which takes seconds
    sections = {"model": "model.py:ModelConfig", "data": "shards.py:DataConfig"}
    sections |= {"optim": "optimizers.py:OptimConfig", "train": "training.py:TrainConfig"}
    sections |= {"diffusion": "diffusion.py:DiffusionConfig"}
    config.answer_help(__doc__, sections)
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # threads that spin long while they wait starve on shared cores

import torch
import torch._functorch.config as functorch
from torch import Tensor, nn

import checkpoint
import diffusion
import distributed
import eval_hellaswag
import metrics
import safety
from diffusion import DiffusionConfig
from distributed import Dist
from model import ModelConfig, Transformer, generate
from optimizers import (
    Average,
    OptimConfig,
    Statistics,
    apply,
    build_optimizer,
    clip_gradients,
    lr_at,
    set_lr,
    swapped_in,
)
from shards import DataConfig, Dataset, Tokenizer, TokenLoader, load_tokenizer, validation_batches

SAMPLE_PROMPT, SAMPLE_TOKENS = "The", 200  # the text sampled during training
GPT2_VOCAB = 50257  # for a plan without data
MAX_AUTO = 128  # sequences per micro-step beyond which nothing gets faster
CPU_AUTO = 8  # on a CPU small micro-steps stay in its caches


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
        f"memory     {expected_memory_gb(plan, cfg, dist):.1f} GB per process",
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
    head = metrics.LOGITS_BYTES * shape.vocab_size if compiled else 0  # eagerly a chunk of the logits exists at a time
    per_token = (shape.n_layers * layer + head) * (1 if uses_bf16(cfg, dist.device) else 1.7)
    libraries = 0.4e9 if dist.device.type == "cpu" else 0  # of the process, before anything is built
    return (libraries + (8 + 2 + state) * plan.params / dist.parts + per_token * plan.batch_size * shape.seq_len) / 1e9


def main(cfg: Config) -> None:
    """Train as `cfg` says, in this process or as one rank of torchrun. Exits with a code of safety.py if stopped."""
    if cfg.train.kill_switch and Path(cfg.train.kill_switch).exists():
        raise ValueError(f"the kill switch {cfg.train.kill_switch} exists; remove it to train")
    dist = distributed.init(cfg.train.timeout, cfg.train.parallel, cfg.train.tensor_parallel)
    try:
        alone = eval_only if cfg.train.eval_only else dry_run if cfg.train.dry_run else None
        alone = preflight if cfg.train.preflight else alone
        reason = alone(cfg, dist) if alone else train(cfg, dist)
    except RuntimeError as error:
        if dist.world_size == 1 or not any(name in str(error).lower() for name in ("gloo", "nccl")):
            raise
        text = f"{distributed.silent_ranks()} (--timeout={cfg.train.timeout:g}); the same command goes on from the last save"
        raise config.Failure(text) from error
    distributed.shutdown()
    if reason and (code := safety.EXIT_CODES.get(reason, safety.GO_ON_LATER)):
        sys.exit(code)


def dry_run(cfg: Config, dist: Dist) -> None:
    """Print the plan; only one in epochs of all data needs the data."""
    if Path(next(iter(cfg.data.sources))).exists() or (cfg.train.epochs and not cfg.data.unique_tokens):
        cfg, plan, loader = open_data(cfg, dist)
        loader.close()
    else:
        cfg = with_vocabulary(cfg, None)
        plan = make_plan(cfg, dist.data_size, cfg.data.unique_tokens)
    if cfg.train.batch_size == "auto":
        plan = make_plan(cfg, dist.data_size, plan.unique_tokens, expected_to_fit(plan, cfg, dist))
    if dist.is_main:
        print(describe(plan, cfg, dist))


def expected_to_fit(plan: Plan, cfg: Config, dist: Dist) -> int:
    """What batch_size "auto" will find, by the plan's own arithmetic."""
    if dist.device.type != "cuda":
        return CPU_AUTO
    room = 0.94 * torch.cuda.mem_get_info()[1] / 1e9
    fits = (n for n in range(MAX_AUTO, 0, -1) if expected_memory_gb(replace(plan, batch_size=n), cfg, dist) < room)
    return next(fits, 1)


def preflight(cfg: Config, dist: Dist) -> None:
    """Compare the ranks' machines, before hours are spent on one that is ill."""
    import preflight

    params = make_plan(with_vocabulary(cfg, None), 1).params
    preflight.fly(dist, cfg.train.run_dir, cfg.data.sources, disk_gb=2 * 12 * params / 1e9)


def train(cfg: Config, dist: Dist) -> str | None:
    """The run: set up, then measure, save, stop, learn, report. Returns why it stopped early, or None."""
    cfg, plan, loader = open_data(cfg, dist)
    say = print if dist.is_main else lambda _: None
    state = choose_checkpoint(cfg, say)
    if state and finished(cfg, plan, state):
        say("\n".join([*changed_options(state, cfg), outcome(cfg)]))
        return loader.close()
    if state:
        loader.load_state_dict(state["loader"])
    log = open_run_dir(cfg, dist, plan.steps)
    torch.manual_seed(cfg.train.seed)
    torch.set_float32_matmul_precision("high")
    narrow = torch.bfloat16 if uses_bf16(cfg, dist.device) else None
    raw_model: Any = distributed.build(lambda: Transformer(cfg.model), dist, narrow, cfg.train.cpu_offload)
    optimizer = build_optimizer(raw_model, cfg.optim, distributed.spread)
    guard = safety.Guard(dist.device, cfg.train.skip_spikes)
    step, tokens, elapsed_s = start(state, cfg, raw_model, optimizer, guard, log)
    average = Average(raw_model, cfg.optim.ema, state, distributed.part_like) if cfg.optim.ema else None
    stats = Statistics(raw_model, cfg.train.stats_every, partial(log.append, "stats.jsonl"))
    del state  # its pages of the checkpoint file
    write_config(cfg, dist)
    tokenizer = tokenizer_if_there(loader, log)
    distributed.recompute(raw_model, cfg.train.recompute)
    compile_model(raw_model, cfg, dist)
    if cfg.train.batch_size == "auto":
        plan = make_plan(cfg, dist.data_size, loader.tokens_per_epoch, largest_that_fits(raw_model, cfg, plan, dist))
        loader.resize(plan.batch_size)
    model = distributed.parallelize(raw_model, dist)
    if dist.world_size > 1:
        rehearse(model, cfg, plan, dist)
    writer = checkpoint.Writer(cfg.train.run_dir, log.say, cfg.train.keep_every)
    watch, first_step = Stopwatch(dist.device, tokens, elapsed_s, cfg.train.save_interval), step
    log.line(describe(plan, cfg, dist))
    if cfg.train.tracker and dist.is_main:
        import trackers

        log.tracker = trackers.open_tracker(cfg.train.tracker, cfg.train.run_dir, config.to_dict(cfg), step)
    log.begin(step)
    gc.collect()
    gc.freeze()  # what lives as long as the run is not looked through again and again
    with safety.Stop(cfg.train.time_limit, cfg.train.kill_switch) as stop:
        while True:
            last, reason = step >= plan.steps, stop.agreed()
            permanent = last or every(step, cfg.train.checkpoint_every)
            if step > first_step and (permanent or reason or watch.save_is_due()):
                with watch.paused("saving"):  # before evaluating: what fails there must not cost the weights
                    facts = {"tokens": tokens, "loader": loader.state_dict(), "tokenizer": loader.tokenizer}
                    facts |= {"config": config.to_dict(cfg), "guard": guard.state_dict()}
                    facts |= {"metrics": {"elapsed_s": watch.elapsed_s()}, **(average.state_dict() if average else {})}
                    path = writer.save(step=step, model=raw_model, optimizer=optimizer, permanent=permanent, **facts)
                    log.line(f"saving {path}")
            if reason and not last:
                break
            if last or every(step, cfg.train.eval_every):
                with watch.paused("validation"), swapped_in(average), distributed.evaluating(raw_model, narrow):
                    log.report(step, tokens, **validate(raw_model, tokenizer, cfg, dist, plan.batch_size))
            if last or (step and every(step, cfg.train.checkpoint_every)):
                with watch.paused("HellaSwag"), swapped_in(average), distributed.evaluating(raw_model, narrow):
                    log.report(step, tokens, **hellaswag(raw_model, tokenizer, cfg, dist, log))
            if last or (step and every(step, cfg.train.sample_every)):
                with watch.paused("sampling"), swapped_in(average), distributed.evaluating(raw_model, narrow):
                    log.line(sample_text(raw_model, tokenizer, dist))
            if last:
                break
            lr = lr_at(step, plan.steps, cfg.optim)
            set_lr(optimizer, lr)
            watched = stats.around(step + 1)
            loss, grad_norm = train_step(model, optimizer, guard, loader, plan.micro_steps, cfg, dist, watched)
            if average:
                average.update()
            step, tokens = step + 1, tokens + cfg.train.batch_tokens
            log.advance(step)
            if every(step, cfg.train.log_every):
                values = {"loss": loss.item(), "lr": lr, "grad_norm": grad_norm.item()}  # the GPU is waited for here
                values["tokens_per_s"] = speed = watch.lap(tokens)
                values["mfu"] = metrics.mfu(plan.flops_per_token, speed, device_name(dist.device), dist.world_size)
                values["skipped_steps"] = guard.new_skips() or None
                values |= {"flops": plan.flops_per_token * tokens, "elapsed_s": round(watch.elapsed_s(), 1)}
                log.report(step, tokens, **values, memory_gb=metrics.peak_memory_gb())
                if guard.hopeless():
                    raise config.Failure(bad_numbers(step, loader.where()))
    writer.wait()
    loader.close()
    if writer.failed and (last or reason):
        raise config.Failure(f"the last checkpoint is missing: {writer.failed}")
    if last:
        finish(cfg, plan, dist, log, watch)
        return None
    log.end()
    log.line(f"stopped by {reason} at step {step:,} of {plan.steps:,}; the same command goes on from here")
    return reason


def bad_numbers(step: int, where: str) -> str:
    """What to say after safety.BAD_STEPS_IN_A_ROW steps whose loss or gradient was not finite, or a spike."""
    return (
        f"{safety.BAD_STEPS_IN_A_ROW} bad steps in a row at step {step}: loss or gradient is NaN, infinite or a spike, at "
        f"{where}; the weights are those before them. Go on from the last checkpoint with a lower --max_lr or "
        "--qk_norm, look at that text, or check the GPU"
    )


def compile_model(model: Transformer, cfg: Config, dist: Dist) -> None:
    """torch.compile in place, where it is wanted; a smaller budget of activations computes some of them twice."""
    if uses_compiler(cfg, dist.device):
        functorch.activation_memory_budget = cfg.train.activation_memory_budget
        for part in model.layers if dist.sharded else [model]:  # a sharded layer is gathered between two of them
            part.compile(dynamic=False)
    elif cfg.train.activation_memory_budget < 1:
        raise ValueError("activation_memory_budget has no effect without --compile")


def largest_that_fits(model: Transformer, cfg: Config, plan: Plan, dist: Dist) -> int:
    """Sequences per micro-step for which a forward and a backward pass fit in the memory of every rank's GPU, by trying."""
    if dist.device.type != "cuda":
        return CPU_AUTO
    size, room = (
        plan.batch_size,
        0.94 * torch.cuda.mem_get_info()[1] - 20 * plan.params / dist.parts,
    )  # AdamW's or Muon's state to come
    while size > 1:
        torch.cuda.reset_peak_memory_stats()
        try:
            learn_nothing(model, cfg, size, dist)
            tight = torch.cuda.max_memory_allocated() > room
        except torch.OutOfMemoryError:
            tight = True
        model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        if not distributed.largest(int(tight)):
            break
        size = max(n for n in range(1, size) if plan.batch_sequences // dist.data_size % n == 0)
    return size


def learn_nothing(model: nn.Module, cfg: Config, batch_size: int, dist: Dist) -> None:
    """One forward and backward pass, which leaves the random state as it is."""
    tokens = torch.zeros(batch_size, cfg.model.seq_len, dtype=torch.long, device=dist.device)
    with torch.random.fork_rng([dist.device] if dist.device.type == "cuda" else []), autocast(cfg, dist.device):
        loss = model(**as_seen(tokens, tokens, range(batch_size), cfg), z_loss=cfg.optim.z_loss)
    loss.backward()


def rehearse(model: nn.Module, cfg: Config, plan: Plan, dist: Dist) -> None:
    """One forward and backward pass that counts for nothing.

    DDP orders its gradient buckets anew after the first backward pass, which changes the last bit of sums over three or
    more ranks: without this the first step after a resume would differ from the uninterrupted run's.
    """
    learn_nothing(model, cfg, plan.batch_size, dist)
    model.zero_grad(set_to_none=True)


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    guard: safety.Guard,
    loader: TokenLoader,
    micro_steps: int,
    cfg: Config,
    dist: Dist,
    watched: contextlib.AbstractContextManager,
) -> tuple[Tensor, Tensor]:
    """One optimizer step. Returns the mean loss of all ranks and the gradient's norm, as tensors on the device."""
    loss_sum = torch.zeros((), device=dist.device)
    for micro_step in range(micro_steps):
        inputs, targets = (x.to(dist.device, non_blocking=True) for x in loader.next())
        with distributed.no_sync(model, last=micro_step == micro_steps - 1):  # forward too, or DDP would reduce
            with autocast(cfg, dist.device):
                loss = model(**as_seen(inputs, targets, loader.numbers(), cfg), z_loss=cfg.optim.z_loss)
            (loss * loader.weight / micro_steps).backward()
        loss_sum += loss.detach() * loader.weight
    loss = distributed.mean(loss_sum / micro_steps)
    grad_norm = clip_gradients(model, cfg.optim.grad_clip).to(dist.device)
    with watched:
        apply(optimizer, guard.judge(loss, grad_norm))
    optimizer.zero_grad(set_to_none=True)
    return loss, grad_norm


def as_seen(inputs: Tensor, targets: Tensor, numbers: range, cfg: Config) -> dict[str, Any]:
    """What the model is called with: a batch [B, T] of the sequences of these numbers, as the objective shows it."""
    noise = {"mask_id": cfg.model.vocab_size, "seed": cfg.train.seed}
    noise |= {"batch_sequences": cfg.train.batch_tokens // cfg.model.seq_len}
    return diffusion.corrupt(inputs, targets, numbers, cfg.train.objective, cfg.diffusion, **noise)


def validate(
    model: Transformer, tokenizer: Tokenizer | None, cfg: Config, dist: Dist, batch_size: int
) -> dict[str, float | None]:
    """Loss (nats per token) and bits per byte over the first eval_tokens validation tokens of each source.

    With several sources also each one's, and their macro average; val_loss is the micro average, over tokens.
    """
    sums = {name: validation_sums(name, model, tokenizer, cfg, dist, batch_size) for name in cfg.data.sources}
    losses = {name: _losses(*column) for name, column in sums.items()}
    loss, bpb = _losses(*(sum(column) for column in zip(*sums.values(), strict=True)))
    row: dict[str, float | None] = {"val_loss": loss, "val_bpb": bpb}
    if len(sums) > 1:
        row |= {f"val_loss/{name}": loss for name, (loss, _) in losses.items()}
        row |= {f"val_bpb/{name}": bpb for name, (_, bpb) in losses.items()}
        row["val_macro_loss"] = sum(loss for loss, _ in losses.values()) / len(losses)
    return row


def _losses(loss_sum: float, n_tokens: float, n_bytes: float) -> tuple[float, float | None]:
    return loss_sum / n_tokens, loss_sum / n_bytes / math.log(2) if n_bytes else None


def eval_only(cfg: Config, dist: Dist) -> None:
    """Print loss, perplexity and bits per byte of the checkpoint cfg.train.eval_only on the validation parts of the sources."""
    model, meta = checkpoint.load_model(cfg.train.eval_only or "", dist.device)
    tokenizer = load_tokenizer(meta["tokenizer"]["name"], meta["tokenizer"].get("sha256"))
    for source in cfg.data.sources:
        if (theirs := Dataset(source).tokenizer)["name"] != tokenizer.name:
            raise ValueError(
                f"{source} holds {theirs['name']} tokens, {meta['path']} reads {tokenizer.name}; prepare the text again "
                f"with --tokenizer={tokenizer.name}"
            )
    objective = replace(cfg.train, objective="ar" if model.config.causal else "mdm")
    diffusion.check(cfg.diffusion, objective.objective)
    cfg = replace(cfg, model=model.config, train=objective)
    row = validate(model, tokenizer, cfg, dist, make_plan(cfg, dist.data_size).batch_size)
    if not dist.is_main:
        return
    rows = [("all tokens (micro)", row["val_loss"], row["val_bpb"])]
    if len(cfg.data.sources) > 1:
        rows = [(name, row[f"val_loss/{name}"], row[f"val_bpb/{name}"]) for name in cfg.data.sources] + rows
        rows.append(("sources (macro)", row["val_macro_loss"], None))
    print(f"{meta['path']}, step {meta['step']:,}\n{'':24}{'loss':>10}{'perplexity':>12}{'bits per byte':>15}")
    for name, loss, bpb in rows:
        assert loss is not None
        print(f"{name:24}{loss:10.4f}{math.exp(min(loss, 50)):12.3f}{'' if bpb is None else f'{bpb:15.4f}'}")


@torch.no_grad()
def validation_sums(
    source: str, model: Transformer, tokenizer: Tokenizer | None, cfg: Config, dist: Dist, batch_size: int
) -> list[float]:
    """[sum of losses, tokens, bytes] of one source's validation split, over all ranks."""
    lengths = torch.from_numpy(tokenizer.byte_lengths()) if tokenizer else None
    sums = torch.zeros(3, dtype=torch.float64)
    batches = validation_batches(
        {source: 1.0},
        seq_len=cfg.model.seq_len,
        batch_size=batch_size,
        rank=dist.data_rank,
        world_size=dist.data_size,
        max_tokens=cfg.train.eval_tokens,
    )
    for number, (inputs, targets) in enumerate(batches):
        counted = targets >= 0
        n = int(counted.sum())  # 0 in filler: all ranks make as many steps, and sharded models as many passes
        with autocast(cfg, dist.device):
            if cfg.model.causal:
                total = n * model(inputs.to(dist.device), (targets if n else inputs).to(dist.device)).item()
            else:  # of the same tokens
                first = (number * dist.data_size + dist.data_rank) * batch_size
                total = diffusion.nelbo(model, targets.to(dist.device), first, cfg.diffusion.num_mc).item()
        n_bytes = int(lengths[targets[counted]].sum()) if lengths is not None else 0
        sums += torch.tensor([total, n, n_bytes], dtype=torch.float64)
    return distributed.total(sums.to(dist.device)).tolist()


def hellaswag(model: Transformer, tokenizer: Tokenizer | None, cfg: Config, dist: Dist, log) -> dict[str, float]:
    """Accuracy on all items of cfg.train.hellaswag, on all ranks; {} where there are none."""
    path = cfg.train.hellaswag
    if path is None or tokenizer is None:
        return {}
    if not Path(path).exists():
        log.once(f"no HellaSwag items at {path}: not scored (eval_hellaswag.py downloads them)")
        return {}
    dtype = torch.bfloat16 if uses_bf16(cfg, dist.device) else None
    scores = eval_hellaswag.evaluate(model, tokenizer, eval_hellaswag.load_items(path), dtype=dtype)
    return {f"hellaswag_{key}": scores[key] for key in ("acc", "acc_norm", "acc_norm_stderr")}


def sample_text(model: Transformer, tokenizer: Tokenizer | None, dist: Dist) -> str:
    """How the model continues SAMPLE_PROMPT, as one quoted line. Ranks that hold a part of the weights all take part."""
    if tokenizer is None or not (dist.is_main or dist.sharded):
        return ""
    prompt = [tokenizer.eot_id, *tokenizer.encode(SAMPLE_PROMPT)]
    write = generate if model.config.causal else partial(diffusion.write, stop_token=tokenizer.eot_id)
    tokens = list(write(model, prompt, SAMPLE_TOKENS, temperature=0.8, top_k=50, seed=0))  # as many on every rank
    tokens = tokens[: tokens.index(tokenizer.eot_id)] if tokenizer.eot_id in tokens else tokens
    return f"sample: {SAMPLE_PROMPT + tokenizer.decode(tokens)!r}"


def with_vocabulary(cfg: Config, data_vocab: int | None) -> Config:
    """The config with vocab_size filled in from the data. Raises ValueError where the model's is too small for it."""
    given = cfg.model.vocab_size
    if given is not None and data_vocab is not None and given < data_vocab:
        raise ValueError(
            f"vocab_size ({given}) is smaller than the {data_vocab} tokens of the data's tokenizer; "
            "leave it out, or prepare the data with another --tokenizer"
        )
    return replace(cfg, model=replace(cfg.model, vocab_size=given or data_vocab or GPT2_VOCAB))


def open_data(cfg: Config, dist: Dist) -> tuple[Config, Plan, TokenLoader]:
    """What the data decide: the vocabulary, the length of an epoch; and this rank's training batches."""
    first = Dataset(next(iter(cfg.data.sources)))  # the loader checks that all sources have one tokenizer
    cfg = with_vocabulary(cfg, first.tokenizer["vocab_size"])
    plan = make_plan(cfg, dist.data_size)
    loader = TokenLoader(
        cfg.data.sources,
        seq_len=cfg.model.seq_len,
        batch_size=plan.batch_size,
        batch_sequences=plan.batch_sequences,
        rank=dist.data_rank,
        world_size=dist.data_size,
        seed=cfg.train.seed,
        vocab_size=cfg.model.vocab_size,
        stages=cfg.data.stages,
        unique_tokens=cfg.data.unique_tokens,
        pin_memory=dist.device.type == "cuda",
    )
    return cfg, make_plan(cfg, dist.data_size, loader.tokens_per_epoch), loader


def tokenizer_if_there(loader: TokenLoader, log: metrics.MetricsLog) -> Tokenizer | None:
    """Training itself needs no tokenizer; bits per byte, samples and HellaSwag do."""
    try:
        return load_tokenizer(loader.tokenizer["name"], loader.tokenizer.get("sha256"))
    except ValueError as error:
        log.line(f"no val_bpb, samples and HellaSwag: {error}")
        return None


def open_run_dir(cfg: Config, dist: Dist, steps: int) -> metrics.MetricsLog:
    """Create the run directory, prove that it can be written to, and lock it, before anything has been computed."""
    folder, held = Path(cfg.train.run_dir), None
    if dist.is_main:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held = safety.lock(folder)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise ValueError(f"cannot write to run_dir {folder}: {error.strerror}; choose another --run_dir") from error
    distributed.barrier()
    return metrics.MetricsLog(folder, steps, enabled=dist.is_main, lock=held)


def write_config(cfg: Config, dist: Dist) -> None:
    """RUN_DIR/config.json, itself a config file."""
    if dist.is_main:
        metrics.write_text(Path(cfg.train.run_dir, "config.json"), json.dumps(config.to_dict(cfg), indent=2) + "\n")


def choose_checkpoint(cfg: Config, say: Callable[[str], None]) -> dict[str, Any] | None:
    """The checkpoint to continue from, or None for a fresh start. Raises ValueError rather than ignore a wish."""
    run_dir, resume = cfg.train.run_dir, cfg.train.resume
    there = checkpoint.latest(run_dir)
    if resume == "never" and there:
        raise ValueError(f"--resume=never, but {there} exists; choose another --run_dir or remove it first")
    if resume not in ("auto", "never"):
        if cfg.train.init_from:
            raise ValueError("--resume and --init_from exclude each other: go on with a run, or start one from weights")
        path = checkpoint.find(resume)
        found = path, checkpoint.read(path)
    else:
        found = checkpoint.read_latest(run_dir, say)  # with init_from: the weights it began with are long inside
    if found is None:
        return None
    path, state = found
    same_model(state, cfg, path)
    if "optimizer" not in state:
        raise ValueError(f"{path} has weights but no optimizer state; start from it with --init_from={path}")
    return {**state, "path": path}


def same_model(state: dict[str, Any], cfg: Config, path: Path) -> None:
    """Raise ValueError listing how a checkpoint's model differs from the configured one."""
    theirs = config.to_dict(config.from_dict(ModelConfig, state["config"]["model"]))
    if different := config.differences(theirs, config.to_dict(cfg.model)):
        raise ValueError(f"{path} holds another model ({'; '.join(different)}); give its shape, or another --run_dir")


def changed_options(state: dict[str, Any], cfg: Config) -> list[str]:
    """How this run's options differ from those a checkpoint was trained with, one line each."""
    old, new = state["config"], config.to_dict(cfg)
    return [
        f"  {line}"
        for name in new
        if name != "model"
        for line in config.differences(old.get(name, new[name]), new[name])
    ]


def start(
    state: dict[str, Any] | None, cfg: Config, model, optimizer, guard: safety.Guard, log: metrics.MetricsLog
) -> tuple[int, int, float]:
    """Fill everything from `state`, or the weights from init_from, or nothing. Returns steps, tokens, seconds so far."""
    if state:
        checkpoint.restore(state, model, optimizer, state["path"])
        guard.load_state_dict(state.get("guard", {}))
        log.rewind(state["step"])
        log.line("\n".join([f"resumed {state['path']} at step {state['step']:,}", *changed_options(state, cfg)]))
        if len(state["rng"]) != distributed.world_size():
            log.line(f"  processes: {len(state['rng'])} -> {distributed.world_size()} (random state starts anew)")
        return state["step"], state["tokens"], state["metrics"].get("elapsed_s", 0.0)
    log.rewind(0)
    if cfg.train.init_from:
        path = checkpoint.find(cfg.train.init_from)
        weights = checkpoint.read(path)
        same_model(weights, cfg, path)
        checkpoint.load_weights(model, weights.get("ema", weights["model"]), path)
        log.line(f"weights from {path}")
    elif cfg.train.zero_init:
        model.zero_outputs()
    return 0, 0, 0.0


def finished(cfg: Config, plan: Plan, state: dict[str, Any]) -> bool:
    """True if the run directory already holds the outcome of this plan."""
    there = Path(cfg.train.run_dir, "final_metrics.json").exists()
    return there and state["path"] == checkpoint.path_of(cfg.train.run_dir, plan.steps)


def finish(cfg: Config, plan: Plan, dist: Dist, log: metrics.MetricsLog, watch: "Stopwatch") -> None:
    """Write final_metrics.json and .png, say how the plan came out and where everything lies."""
    log.end()
    if dist.is_main:
        facts: dict[str, Any] = {"parameters": plan.params, "unique_tokens": plan.unique_tokens}
        facts |= {"device": device_name(dist.device), "n_devices": dist.world_size}
        facts |= {"planned_memory_gb": expected_memory_gb(plan, cfg, dist), "seconds": watch.seconds()}
        facts["planned_tokens_per_s"] = expected_tokens_per_s(plan, dist)
        summary = metrics.write_summary(cfg.train.run_dir, **facts, torch=str(torch.__version__))
        log.line("\n".join([checked(summary), outcome(cfg)]))


def checked(summary: dict[str, Any]) -> str:
    """What the plan said beside what was measured; where this process's time went."""
    total = sum(summary["seconds"].values())
    shares = ", ".join(f"{name} {seconds / total:.1%}" for name, seconds in summary["seconds"].items())
    planned, speed = summary["planned_tokens_per_s"], summary.get("median_tokens_per_s")
    lines = [f"time       {metrics.duration(total)}: {shares}"]
    if planned and speed:
        lines.append(f"speed      {speed:,.0f} tokens/s, {speed / planned:.0%} of the plan's {planned:,.0f}")
    if "memory_gb" in summary:
        lines.append(f"memory     {summary['memory_gb']:.1f} GB at most, planned {summary['planned_memory_gb']:.1f} GB")
    return "\n".join(lines)


def outcome(cfg: Config) -> str:
    """Where a finished run lies and what to do with it."""
    run_dir = cfg.train.run_dir
    inside = Path(sys.executable).is_relative_to(Path.cwd())  # the launch script's .venv, which no shell has activated
    python = os.path.relpath(sys.executable) if inside else "python"
    summary = json.loads(Path(run_dir, "final_metrics.json").read_text(encoding="utf-8"))
    return (
        f"done: {summary['step']:,} steps, {summary['tokens']:,} tokens, validation loss {summary['val_loss']:.4f}\n"
        f"  checkpoint  {checkpoint.path_of(run_dir, summary['step'])}\n"
        f"  numbers     {run_dir}/metrics.jsonl, {run_dir}/final_metrics.json\n"
        f"  picture     {run_dir}/final_metrics.png\n"
        f"  talk to it  {python} chat.py {shlex.quote(run_dir)}"
    )


class Stopwatch:
    """Speed of training without the time that `paused` covers, seconds since the run's beginning, saves by the clock."""

    def __init__(self, device: torch.device, tokens: int, elapsed_s: float, save_interval: float | None):
        self.device, self.tokens, self.save_interval = device, tokens, save_interval
        self.since = self.saved = time.monotonic()  # a wall clock may jump
        self.began, self.started = self.since, self.since - elapsed_s
        self.aside: dict[str, float] = {}  # seconds by what they went to

    @contextlib.contextmanager
    def paused(self, name: str):
        """Evaluation and checkpoints are not training; what the GPU has yet to do of it is."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        began = time.monotonic()
        yield
        seconds = time.monotonic() - began
        self.since += seconds
        self.aside[name] = self.aside.get(name, 0.0) + seconds

    def seconds(self) -> dict[str, float]:
        """Where the time of this process went, after its start."""
        total = time.monotonic() - self.began
        return {"training": total - sum(self.aside.values()), **self.aside}

    def lap(self, tokens: int) -> float:
        """Tokens per second since the last lap."""
        now = time.monotonic()
        speed = (tokens - self.tokens) / (now - self.since)
        self.since, self.tokens = now, tokens
        return speed

    def elapsed_s(self) -> float:
        """Seconds of this run, earlier processes included."""
        return time.monotonic() - self.started

    def save_is_due(self) -> bool:
        """True once per save_interval, on all ranks in the same step: rank 0's clock counts."""
        late = self.save_interval is not None and time.monotonic() - self.saved > self.save_interval
        due = bool(distributed.largest(int(late and distributed.rank() == 0)))
        if due:
            self.saved = time.monotonic()
        return due


def every(step: int, period: int) -> bool:
    """True at multiples of `period`; a period of 0 means never."""
    return period > 0 and step % period == 0


def uses_compiler(cfg: Config, device: torch.device) -> bool:
    """Unless told otherwise: on a GPU."""
    return device.type == "cuda" if cfg.train.compile is None else cfg.train.compile


def uses_bf16(cfg: Config, device: torch.device) -> bool:
    """Unless told otherwise: on a GPU, and on a CPU that has instructions for it (4.5 times fp32's matmuls there)."""
    if cfg.train.dtype is not None:
        return cfg.train.dtype == "bf16"
    return device.type == "cuda" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def autocast(cfg: Config, device: torch.device) -> contextlib.AbstractContextManager:
    """Matmuls in bf16 around fp32 weights, where bf16 is used."""
    return torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(cfg, device))


def device_name(device: torch.device) -> str:
    """Of the GPU, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


if __name__ == "__main__":
    config.run(lambda: main(config.parse_config(Config)))
