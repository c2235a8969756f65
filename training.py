"""Train a transformer on token shards: bf16, one process per GPU, checkpoints to resume from and to chat with.

    python training.py configs/sample.toml                       # a CPU, two minutes (after: data_pipeline.py sample)
    torchrun --standalone --nproc_per_node=8 training.py         # the 416M run on 8 GPUs
    python training.py --sources=data/mine --dim=512 --n_layers=8 --max_tokens=500M --run_dir=runs/mine
    python training.py runs/mine/config.json                     # the same run again: resumes it, or reports its end
    python training.py --dry_run                                 # the plan: steps, memory, hours, dollars

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
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch._functorch.config as functorch_config
from torch import nn

import eval_hellaswag
from model import ModelConfig, Transformer
from nano416 import (
    ablations,
    branches,
    checkpoint,
    devices,
    diffusion,
    distributed,
    estimate,
    fault_tolerance,
    files,
    metrics,
)
from nano416.ablations import AblationConfig
from nano416.branches import ResumePoint
from nano416.checkpoint import CheckpointWriter, TrainState
from nano416.config import Failure, differences, final_exit_code, from_dict, parse_config, run_cli, to_dict, visible
from nano416.cpu_ops import retain_freed_memory
from nano416.dataloader import Batch, BatchLayout, DataConfig, Mixture, TokenLoader
from nano416.devices import autocast
from nano416.diffusion import DiffusionConfig
from nano416.distributed import Dist, all_reduce_mean, no_sync
from nano416.estimate import Workload
from nano416.evaluate import LossOptions, evaluate_loss
from nano416.fault_tolerance import Abandoned, StepGuard, StopSignal
from nano416.generate import Sampling, generate
from nano416.metrics import RunLog, Timer
from nano416.optimizers import EMA, OptimConfig, ParamStats, build_optimizer, clip_grad_norm_, optimizer_step, set_lr
from nano416.scoring import ScoringConfig
from nano416.tokenizer import Tokenizer, load_tokenizer

# For a plan without data.
GPT2_VOCAB_SIZE = 50257
# What text samples during training begin with.
SAMPLE_PROMPT = "The"
# More would overflow 64 bits.
MAX_TOKENS = 2**62
# Steps between looks at the guard of a run without log lines; a look waits for the GPU.
GUARD_EVERY = 10


@dataclass(frozen=True)
class TrainConfig:
    """The run: its length, its batch, how often it is evaluated and saved, and where."""

    run_dir: str = "checkpoints"  # directory of the run
    seed: int = 42  # random seed for weights and data order
    max_tokens: int = 10_000_000_000  # tokens to train on
    epochs: float | None = None  # passes over the data (or over its unique_tokens); overrides max_tokens
    max_steps: int | None = None  # optimizer steps; overrides epochs and max_tokens
    batch_tokens: int = 655_360  # tokens per optimizer step, over all GPUs and micro-steps
    batch_size: int | Literal["auto"] = "auto"  # sequences per GPU and micro-step, at most; auto = what fits in memory
    log_every: int = 10  # steps between log lines, 0 = never
    eval_every: int = 250  # steps between validations, 0 = only at the end
    eval_tokens: int = 5_000_000  # most validation tokens per source
    checkpoint_every: int = 2000  # steps between permanent checkpoints, 0 = only at the end
    keep_every: int | None = None  # keep only the last permanent checkpoint and those at multiples of this; none = all
    save_interval: float | None = 900.0  # seconds (15m) between temporary checkpoints; none = no temporary ones
    sample_every: int = 1000  # steps between samples of generated text, 0 = only at the end
    sample_tokens: int = 200  # tokens per sample, 0 = no samples
    stats_every: int = 0  # steps between norms of every weight, gradient and update in stats.jsonl; 0 = never
    hellaswag: str | None = "data/hellaswag_val.jsonl"  # items to score at each checkpoint; none = never
    time_limit: float | None = None  # seconds (3h50m) after which to save and exit with code 75
    kill_switch: str | None = None  # file whose existence stops the run: it saves and exits with code 0
    skip_spikes: bool = False  # skip steps whose loss or gradient norm is beyond 6 sigma of the last 128
    timeout: float = 600.0  # seconds (10m) that the other ranks wait for a silent one before they give up
    resume: str = "auto"  # auto = newest checkpoint of run_dir, if there is one; never; or the path of a checkpoint
    init_from: str | None = None  # checkpoint whose weights start a new run
    compile: bool | None = None  # torch.compile the model; none = on a GPU
    activation_memory_budget: float = 1.0  # fraction of activations that a compiled step keeps; the rest is recomputed
    dtype: Literal["bf16", "fp32"] | None = None  # bf16 or fp32 activations and matmuls; none = bf16 where it is faster
    parallel: distributed.Strategy = "ddp"  # ddp, fsdp (shard parameters) or hsdp (shard in a node, replicate across)
    cpu_offload: bool = False  # keep weights and optimizer state in host memory, with fsdp or hsdp; slow
    recompute: distributed.Recompute = "none"  # activation checkpointing: none, selective (keep matmuls) or full
    tensor_parallel: int = 1  # GPUs of a node that share each matrix product, with fsdp or hsdp
    objective: Literal["ar", "mdm"] = "ar"  # ar = predict the next token; mdm = masked diffusion, restore masked tokens
    tracker: Literal["wandb", "tensorboard", "trackio"] | None = None  # also send the metrics to this service
    dry_run: bool = False  # print the plan and exit

    # One of these on the command line replaces what a config file says about the others.
    alternatives: ClassVar = (("max_tokens", "epochs", "max_steps"),)
    # Options of 0.1 and the values with which they had no effect.
    retired: ClassVar = {"zero_init": False, "eval_only": None, "preflight": False, "dollars_per_gpu_hour": 2.0}

    def __post_init__(self):
        for name in ("max_tokens", "batch_tokens", "batch_size", "eval_tokens", "tensor_parallel"):
            if getattr(self, name) != "auto" and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        periods = ("log_every", "eval_every", "checkpoint_every", "sample_every", "stats_every")
        for name in (*periods, "sample_tokens", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("max_steps", "epochs", "keep_every", "save_interval", "time_limit", "timeout"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if not 0 < self.activation_memory_budget <= 1:
            raise ValueError(f"activation_memory_budget must be in (0, 1], got {self.activation_memory_budget}")
        if self.seed >= 2**63:
            raise ValueError(f"seed must be below 2^63, got {self.seed}")
        if self.init_from and self.resume not in ("auto", "never"):
            raise ValueError("--resume continues a run and --init_from starts one from weights; give only one of them")
        for name in ("run_dir", "resume", "init_from", "hellaswag", "kill_switch"):
            files.require_local(name, getattr(self, name))
        if (self.max_steps or 1) * self.batch_tokens > MAX_TOKENS or self.max_tokens > MAX_TOKENS:
            raise ValueError(f"the run is longer than {MAX_TOKENS:,} tokens; lower max_steps or max_tokens")
        if self.tracker and not importlib.util.find_spec(self.tracker):
            raise ValueError(f"--tracker={self.tracker} needs a package: pip install {self.tracker}, or leave it out")


@dataclass(frozen=True)
class Config:
    """Everything a run needs; each section belongs to the file that reads it."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    ablation: AblationConfig = field(default_factory=AblationConfig)

    def __post_init__(self):
        self.diffusion.validate_for(self.train.objective)
        self.ablation.validate_for(self.train.objective)
        if self.train.objective == "mdm":
            # The dataclass is frozen for everybody else.
            object.__setattr__(self, "model", replace(self.model, causal=False))
        elif not self.model.causal:
            raise ValueError("a bidirectional model (causal = false) is trained with --objective=mdm")


@dataclass(frozen=True)
class Progress:
    """How far a run has come: optimizer steps, and the tokens they were made with."""

    step: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Plan:
    """What follows from a config, its data, the number of processes and what is done already."""

    total_steps: int
    layout: BatchLayout
    tokens_per_epoch: int | None  # None where the data are unknown
    schedule_tokens: int | None  # length of the learning rate schedule; None = total_steps (--max_steps)

    def schedule_position(self, step: int, tokens: int, batch_tokens: int) -> tuple[float, int]:
        """(where the learning rate schedule is, its length), in steps of today's batch.

        It follows the tokens, so that the learning rate does not jump when a run is resumed with another batch.
        """
        if self.schedule_tokens is None:
            return step, self.total_steps
        return tokens / batch_tokens, self.schedule_tokens // batch_tokens


# ---- The loop --------------------------------------------------------------------------------------------------------


def train(cfg: Config, dist: Dist) -> str | None:
    """Run the training loop. Returns why it stopped early, or None if it is done."""
    # Each line needs only those above it: data -> vocabulary -> model -> micro-batch size -> plan -> loader -> resume.
    with distributed.shared_errors():
        mixture = Mixture(cfg.data, cfg.model.seq_len)
    cfg = resolve_vocab_size(cfg, mixture.tokenizer["vocab_size"])
    mixture.require_validation()
    point = find_resume_point(cfg, dist)
    done = progress_of(point, cfg)
    if point and is_finished(cfg, mixture, point, dist):
        return None
    log = open_run_dir(cfg, dist, count_steps(cfg, mixture.tokens_per_epoch, done))
    dtype = compute_dtype(cfg, dist.device)
    torch.manual_seed(cfg.train.seed)
    # raw_model has the weights, model is what the loop calls.
    raw_model = build_model(cfg, dist, mixture.tokenizer, log)
    plan = make_plan(cfg, dist, mixture.tokens_per_epoch, find_batch_size(raw_model, cfg, dist), done)
    layout = plan.layout
    model = distributed.apply_ddp(raw_model, dist)
    if dist.world_size > 1:
        # DDP reorders its gradient buckets after the first backward pass, which changes the last bit of sums over
        # three or more ranks: without this, the first step after a resume would differ from the uninterrupted run's.
        dummy_forward_backward(model, cfg, layout.batch_size, dist)
    optimizer = build_optimizer(raw_model, cfg.optim, distributed.map_sharded)
    ema = EMA(raw_model, cfg.optim.ema) if cfg.optim.ema else None
    guard = StepGuard(dist.device, cfg.train.skip_spikes)
    loader = TokenLoader(mixture, layout, cfg.train.seed, dist.device)
    loader.check_stages(done.tokens // cfg.model.seq_len + (plan.total_steps - done.step) * layout.batch_sequences)
    tokenizer = try_load_tokenizer(mixture.tokenizer, log)
    hellaswag_items = load_hellaswag(cfg, tokenizer, log)
    check_disk(cfg, plan, dist, done)
    state = TrainState(raw_model, optimizer, loader, guard, ema)
    elapsed_s = resume(state, point, cfg, log)
    step = done.step
    branch = point.branch if point else None
    # A step is saved once, and not where the run begins, unless it ends there without its last checkpoint.
    saved_step = step
    if point and step == plan.total_steps and point.path != final_path(cfg, step):
        saved_step = -1
    # It maps the whole checkpoint file into memory.
    del point
    if dist.is_main:
        files.write_json(Path(cfg.train.run_dir, "config.json"), to_dict(cfg))
        mixture.warn_about_shards()
    writer = CheckpointWriter(cfg.train.run_dir, log.print, cfg.train.keep_every)
    param_stats = ParamStats(raw_model, cfg.train.stats_every, lambda row: log.append("stats.jsonl", row))
    stop = StopSignal(cfg.train.time_limit, cfg.train.kill_switch, cfg.train.save_interval)
    # Evaluations are left when it is time to stop.
    loss_options = LossOptions(cfg.train.eval_tokens, dtype, cfg.diffusion.num_mc, stop.abandon)
    scoring = ScoringConfig(between_batches=stop.abandon)
    timer = Timer(dist.device, done.tokens, elapsed_s)
    log.info(describe(plan, cfg, dist, done))
    if cfg.train.tracker:
        log.start_tracker(cfg.train.tracker, to_dict(cfg), step)
    log.start(step)
    # Everything so far lives as long as the run. Scanned by the garbage collector it costs about 500 ms each time
    # (nanochat's base_train.py).
    gc.collect()
    gc.freeze()

    @contextlib.contextmanager
    def evaluating(name: str) -> Iterator[None]:
        """Inside, the model has its averaged and unsharded weights, and the time counts as `name`, not as training."""
        averaged = ema.swapped() if ema else contextlib.nullcontext()
        with timer.exclude(name), averaged, distributed.eval_mode(raw_model, dtype):
            yield

    with stop:
        while True:
            is_last = step >= plan.total_steps
            # All ranks must agree on this: one all-reduce on the CPU, which does not wait for the GPU.
            stop_reason, save_due = stop.check()
            # Not step * batch_tokens: the run may have been resumed with another batch.
            tokens = loader.tokens

            # Save before evaluating: what fails in an evaluation must not cost the weights.
            is_permanent = is_last or every(step, cfg.train.checkpoint_every)
            if step != saved_step and (is_permanent or stop_reason or save_due):
                saved_step = step
                if guard.in_bad_streak() and not is_last:
                    # What diverges must not replace the last good checkpoint, nor be resumed from.
                    log.info(f"not saved at step {step:,}: its loss or gradient is NaN, infinite or a spike")
                else:
                    with timer.exclude("saving"):
                        metadata = {"tokens": tokens, "config": to_dict(cfg), "tokenizer": mixture.tokenizer}
                        metadata |= {"metrics": {"elapsed_s": timer.elapsed_s()}, "branch": branch}
                        log.info(f"saving {writer.save(step, state, metadata, is_permanent)}")
            if stop_reason:
                break

            try:
                if is_last or every(step, cfg.train.eval_every):
                    with evaluating("validation"):
                        row = evaluate_loss(raw_model, mixture.datasets, tokenizer, layout, loss_options)
                        log.metrics(step, tokens, **row)
                # At step 0 the validation loss tells whether model and data are sound; HellaSwag and text would be
                # random.
                if is_last or (step and every(step, cfg.train.checkpoint_every)):
                    with evaluating("HellaSwag"):
                        row = evaluate_hellaswag(raw_model, tokenizer, hellaswag_items, dtype, scoring)
                        log.metrics(step, tokens, **row)
                if is_last or (step and every(step, cfg.train.sample_every)):
                    with evaluating("sampling"):
                        log.info(sample_text(raw_model, tokenizer, cfg, dist))
            except Abandoned:
                # The next pass saves, unless this step is saved, and ends. A resumed run evaluates this step again.
                continue
            if is_last:
                break

            # One optimizer step: accumulate gradients over micro-batches, clip, update.
            lr = set_lr(optimizer, *plan.schedule_position(step, tokens, cfg.train.batch_tokens), cfg.optim)
            loss = torch.zeros((), device=dist.device)
            for micro_step in range(layout.grad_accum_steps):
                batch = loader.next_batch()
                if cfg.train.objective == "mdm":
                    # The first id after the vocabulary.
                    mask_id = cfg.model.vocab_size
                    batch = diffusion.mask_batch(batch, cfg.diffusion, mask_id, cfg.train.seed, layout.batch_sequences)
                if cfg.ablation.is_active:
                    batch = ablations.apply(batch, cfg.ablation, cfg.train.seed)
                # Around the forward pass too, or DDP would reduce the gradients of every micro-step.
                with no_sync(model, last=micro_step == layout.grad_accum_steps - 1):
                    with autocast(dist.device, dtype):
                        micro_loss = model(**batch.inputs, z_loss=cfg.optim.z_loss)
                    # batch.weight is 1 unless the ranks do not divide the batch, see TokenLoader.
                    micro_loss = micro_loss * batch.weight / layout.grad_accum_steps
                    micro_loss.backward()
                loss += micro_loss.detach()
            # On all ranks, so that the guard below decides alike on all of them.
            loss = all_reduce_mean(loss)
            grad_norm = clip_grad_norm_(raw_model, cfg.optim.grad_clip)
            with param_stats.record(step + 1):
                # NaN and spikes are skipped. The decision is made on the GPU, so nothing waits for it.
                optimizer_step(optimizer, skip=guard.is_bad(loss, grad_norm))
            optimizer.zero_grad(set_to_none=True)
            if ema:
                ema.update()
            step += 1
            log.advance(step)

            if every(step, cfg.train.log_every):
                # .item() waits for the GPU, as do the guard's answers: only once per log line.
                values = {"loss": loss.item(), "lr": lr, "grad_norm": grad_norm.item()}
                values |= timer.speed(loader.tokens, cfg.model.flops_per_token(), dist.world_size)
                log.metrics(step, loader.tokens, **values, skipped_steps=guard.newly_skipped() or None)
            # Also where nothing is logged.
            if (every(step, cfg.train.log_every or GUARD_EVERY) or step == plan.total_steps) and guard.gave_up():
                raise Failure(fault_tolerance.bad_steps_message(step, loader.describe(batch)))

        # Still inside: a signal must not end the process while it writes.
        writer.wait()
        loader.close()
        log.close()
        if writer.failed:
            raise Failure(f"the last checkpoint is missing: {writer.failed}")
        if not stop_reason:
            write_summary(cfg, plan, dist, log, timer)
            return None
        log.info(f"stopped by {stop_reason} at step {step:,} of {plan.total_steps:,}; the same command resumes it")
        return stop_reason


def every(step: int, period: int) -> bool:
    """True at multiples of `period`; a period of 0 means never."""
    return period > 0 and step % period == 0


# ---- Setting up ------------------------------------------------------------------------------------------------------


def resolve_vocab_size(cfg: Config, data_vocab_size: int) -> Config:
    """The config with vocab_size filled in. Raises ValueError if it is given and too small for the data."""
    vocab_size = cfg.model.vocab_size
    if vocab_size is not None and vocab_size < data_vocab_size:
        raise ValueError(
            f"vocab_size ({vocab_size}) is smaller than the {data_vocab_size} tokens of the data's tokenizer; "
            "leave it out, or prepare the data with another --tokenizer"
        )
    return replace(cfg, model=replace(cfg.model, vocab_size=vocab_size or data_vocab_size))


def compute_dtype(cfg: Config, device: torch.device) -> torch.dtype | None:
    """torch.bfloat16, or None for fp32: the dtype of activations and matmuls."""
    uses_bf16 = devices.supports_bf16(device) if cfg.train.dtype is None else cfg.train.dtype == "bf16"
    return torch.bfloat16 if uses_bf16 else None


def uses_compile(cfg: Config, device: torch.device) -> bool:
    """Whether the model is compiled: --compile, by default on a GPU."""
    return device.type == "cuda" if cfg.train.compile is None else cfg.train.compile


def build_model(cfg: Config, dist: Dist, tokenizer: dict[str, Any], log: RunLog) -> Transformer:
    """The Transformer on this rank's device, sharded and compiled as configured, with the weights of init_from."""
    # TF32 for the matmuls that stay in fp32.
    torch.set_float32_matmul_precision("high")
    dtype = compute_dtype(cfg, dist.device)
    model = distributed.build_model(lambda: Transformer(cfg.model), dist, dtype, cfg.train.cpu_offload)
    assert isinstance(model, Transformer), "sharding makes a subclass"
    if cfg.train.init_from:
        path = checkpoint.resolve(cfg.train.init_from)
        source = checkpoint.read(path)
        check_initial_weights(source, cfg, tokenizer, path)
        checkpoint.load_weights(model, checkpoint.inference_weights(source, path), path)
        log.info(f"weights from {path}")
    distributed.apply_ac(model, cfg.train.recompute, has_dropout=cfg.ablation.attention_dropout > 0)
    if uses_compile(cfg, dist.device):
        # torch 2.11-2.13 has no public name for this setting.
        functorch_config.activation_memory_budget = cfg.train.activation_memory_budget
        # In place: torch.compile(model) would put _orig_mod. into the parameter names. A sharded model is compiled by
        # block, since each block's weights are gathered just before it.
        for module in model.layers if dist.sharded else [model]:
            module.compile(dynamic=False)
    elif cfg.train.activation_memory_budget < 1:
        raise ValueError("activation_memory_budget has no effect without --compile")
    return model


def estimate_batch_size(cfg: Config, dist: Dist) -> int:
    """Most sequences per micro-step: --batch_size, or for auto what fits in memory by the estimate."""
    if cfg.train.batch_size != "auto":
        return cfg.train.batch_size
    return estimate.largest_batch_size(workload(cfg, dist), devices.memory_gb(dist.device))


def find_batch_size(model: nn.Module, cfg: Config, dist: Dist) -> int:
    """estimate_batch_size, which for auto is lowered until a trial step fits on every rank's GPU."""
    limit = estimate_batch_size(cfg, dist)
    if cfg.train.batch_size != "auto" or dist.device.type != "cuda":
        return limit
    # The optimizer's state comes later: two fp32 tensors per parameter at most.
    optimizer_gb = 8e-9 * cfg.model.num_params() / dist.shard_degree
    room_gb = estimate.USABLE_MEMORY_FRAC * devices.memory_gb(dist.device) - optimizer_gb
    # Every size tried is compiled anew, so the search begins at the estimate and skips what does not divide the batch.
    batch_size = split_batch(cfg, dist.dp_size, limit)
    while batch_size > 1:
        torch.cuda.reset_peak_memory_stats()
        try:
            dummy_forward_backward(model, cfg, batch_size, dist)
            is_too_large = torch.cuda.max_memory_allocated() / 1e9 > room_gb
        except torch.OutOfMemoryError:
            is_too_large = True
        # A pass that ran out of memory leaves gradients behind.
        model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        # Too large for one rank is too large for all.
        if not distributed.all_reduce_max([int(is_too_large)])[0]:
            break
        batch_size = split_batch(cfg, dist.dp_size, batch_size - 1)
    return batch_size


def dummy_forward_backward(model: nn.Module, cfg: Config, batch_size: int, dist: Dist) -> None:
    """One forward and backward pass on zeros, which leaves the random state as it was and no gradients."""
    tokens = torch.zeros(batch_size, cfg.model.seq_len, dtype=torch.long, device=dist.device)
    # The arguments are those of training, or the compiler would build the step twice.
    loss_weights = torch.ones(tokens.shape, device=dist.device) if cfg.train.objective == "mdm" else None
    batch = Batch(tokens, tokens, range(batch_size), loss_weights=loss_weights)
    cuda_devices = [dist.device] if dist.device.type == "cuda" else []
    with torch.random.fork_rng(cuda_devices), autocast(dist.device, compute_dtype(cfg, dist.device)):
        loss = model(**batch.inputs, z_loss=cfg.optim.z_loss)
    loss.backward()
    model.zero_grad(set_to_none=True)


def open_run_dir(cfg: Config, dist: Dist, total_steps: int) -> RunLog:
    """Create and lock the run directory and prove that it can be written to, before anything is computed."""
    run_dir = Path(cfg.train.run_dir)
    lock = None
    with distributed.shared_errors():
        if dist.is_main:
            try:
                files.make_folder(run_dir)
                lock = files.lock(run_dir)
                with tempfile.TemporaryFile(dir=run_dir):
                    pass
            except OSError as error:
                raise ValueError(f"cannot write to {run_dir}: {error.strerror}; choose another --run_dir") from error
            except files.Locked as error:
                raise ValueError(f"another run is writing to {run_dir}; wait, or choose another --run_dir") from error
    return RunLog(run_dir, total_steps, enabled=dist.is_main, lock=lock)


def try_load_tokenizer(identity: dict[str, Any], log: RunLog) -> Tokenizer | None:
    """The data's tokenizer, or None where it cannot be loaded: bits per byte, samples and HellaSwag are left out."""
    try:
        return load_tokenizer(identity)
    except ValueError as error:
        log.info(f"no val_bpb, samples and HellaSwag: {error}")
        return None


# ---- The plan --------------------------------------------------------------------------------------------------------


def make_plan(
    cfg: Config, dist: Dist, tokens_per_epoch: int | None, max_batch_size: int, done: Progress = Progress()
) -> Plan:
    """Derive the number of steps and how each is split. Raises ValueError with the nearest batch that can be split."""
    batch_size = split_batch(cfg, dist.dp_size, max_batch_size)
    layout = BatchLayout(cfg.train.batch_tokens // cfg.model.seq_len, batch_size, dist.dp_rank, dist.dp_size)
    schedule_tokens = None if cfg.train.max_steps else count_tokens(cfg, tokens_per_epoch)
    return Plan(count_steps(cfg, tokens_per_epoch, done), layout, tokens_per_epoch, schedule_tokens)


def count_tokens(cfg: Config, tokens_per_epoch: int | None) -> int:
    """Tokens to train on: epochs, else max_tokens."""
    if not cfg.train.epochs or not tokens_per_epoch:
        return cfg.train.max_tokens
    return int(min(cfg.train.epochs * tokens_per_epoch, MAX_TOKENS))


def count_steps(cfg: Config, tokens_per_epoch: int | None, done: Progress = Progress()) -> int:
    """Optimizer steps of the whole run: max_steps, else those done and as many more as epochs or max_tokens allow.

    Raises ValueError if that is less than one step, or less than is done already.
    """
    batch_tokens = cfg.train.batch_tokens
    if cfg.train.max_steps:
        steps = cfg.train.max_steps
        budget = f"max_steps={steps:,}"
    else:
        tokens = count_tokens(cfg, tokens_per_epoch)
        steps = done.step + (tokens - done.tokens) // batch_tokens
        budget = f"epochs={cfg.train.epochs:g}" if cfg.train.epochs else f"max_tokens={tokens:,}"
    if not steps:
        raise ValueError(f"{budget} is less than one step of batch_tokens={batch_tokens:,}; train on more tokens")
    if steps < done.step:
        raise ValueError(
            f"{cfg.train.run_dir} has {done.step:,} steps on {done.tokens:,} tokens already, which {budget} does not "
            "allow; allow more, or choose another --run_dir"
        )
    return steps


def split_batch(cfg: Config, dp_size: int, max_batch_size: int) -> int:
    """Sequences per rank and micro-step, at most max_batch_size."""
    is_auto = cfg.train.batch_size == "auto"
    return estimate.split_batch(cfg.train.batch_tokens, cfg.model.seq_len, dp_size, max_batch_size, is_auto)


def workload(cfg: Config, dist: Dist, batch_size: int = 1) -> Workload:
    """What estimate.py needs to know of one process of this run."""
    return Workload(
        model=cfg.model,
        batch_size=batch_size,
        optimizer=cfg.optim.optimizer,
        has_ema=cfg.optim.ema is not None,
        bf16=compute_dtype(cfg, dist.device) is not None,
        compiled=uses_compile(cfg, dist.device),
        recompute=cfg.train.recompute,
        activation_memory_budget=cfg.train.activation_memory_budget,
        shard_degree=dist.shard_degree,
        on_gpu=dist.device.type == "cuda",
    )


def describe(plan: Plan, cfg: Config, dist: Dist, done: Progress = Progress()) -> str:
    """The plan as text: what will be trained, on how much, and what it takes."""
    layout = plan.layout
    params = cfg.model.num_params()
    flops_per_token = cfg.model.flops_per_token()
    tokens = done.tokens + (plan.total_steps - done.step) * cfg.train.batch_tokens
    epochs = f", {tokens / plan.tokens_per_epoch:.3g} epochs" if plan.tokens_per_epoch else ""
    memory_gb = estimate.training_memory_gb(workload(cfg, dist, layout.batch_size))
    n_saves = count_saves(cfg, plan.total_steps, done)
    checkpoint_gb = estimate.checkpoint_gb(workload(cfg, dist))
    micro_batch = f"{layout.batch_size} sequences x {cfg.model.seq_len} tokens"
    lines = {
        "model": f"{params:,} parameters, {flops_per_token / 1e9:.3g} GFLOP per token",
        "batch": f"{cfg.train.batch_tokens:,} tokens = {micro_batch} x {layout.grad_accum_steps} micro-steps x "
        f"{layout.dp_size} processes",
        "run": f"{plan.total_steps:,} steps, {tokens:,} tokens ({tokens / params:.1f} per parameter{epochs}), "
        f"{flops_per_token * tokens:.3g} FLOP",
        "memory": f"{memory_gb:.1f} GB per process of {devices.memory_gb(dist.device):.0f} GB here",
        "disk": f"{n_saves} checkpoints of {checkpoint_gb:.2f} GB in {cfg.train.run_dir}",
        "time": estimate.describe_time(tokens, flops_per_token, devices.device_name(dist.device), dist.world_size),
    }
    return "\n".join(f"{name:<10} {text}" for name, text in lines.items())


def count_saves(cfg: Config, total_steps: int, done: Progress = Progress()) -> int:
    """Permanent checkpoints that the rest of the run leaves behind."""
    # The last step is saved in any case.
    if not cfg.train.checkpoint_every:
        return 1
    period = math.lcm(cfg.train.checkpoint_every, cfg.train.keep_every or 1)
    return 1 + (total_steps - 1) // period - done.step // period


def check_disk(cfg: Config, plan: Plan, dist: Dist, done: Progress) -> None:
    """Raise ValueError if not even one checkpoint fits on the disk; say so if the planned ones do not."""
    if not dist.is_main:
        return
    free_gb = shutil.disk_usage(cfg.train.run_dir).free / 1e9
    checkpoint_gb = estimate.checkpoint_gb(workload(cfg, dist))
    planned_gb = count_saves(cfg, plan.total_steps, done) * checkpoint_gb
    if checkpoint_gb > free_gb:
        raise ValueError(
            f"{cfg.train.run_dir} has {free_gb:.2f} GB free, a checkpoint needs {checkpoint_gb:.2f} GB; make room or "
            "choose another --run_dir"
        )
    if planned_gb > free_gb:
        print(
            f"{cfg.train.run_dir} has {free_gb:.2f} GB free, the planned checkpoints need {planned_gb:.2f} GB: make "
            "room, or keep fewer with --keep_every",
            file=sys.stderr,
        )


def dry_run(cfg: Config, dist: Dist) -> None:
    """Print the plan. The data are needed only to count the tokens of an epoch."""
    tokens_per_epoch = cfg.data.unique_tokens
    vocab_size = cfg.model.vocab_size or GPT2_VOCAB_SIZE
    if Path(next(iter(cfg.data.sources))).exists() or (cfg.train.epochs and not tokens_per_epoch):
        mixture = Mixture(cfg.data, cfg.model.seq_len)
        tokens_per_epoch = mixture.tokens_per_epoch
        vocab_size = mixture.tokenizer["vocab_size"]
    cfg = resolve_vocab_size(cfg, vocab_size)
    plan = make_plan(cfg, dist, tokens_per_epoch, estimate_batch_size(cfg, dist))
    if dist.is_main:
        print(describe(plan, cfg, dist))


# ---- Resuming --------------------------------------------------------------------------------------------------------


def find_resume_point(cfg: Config, dist: Dist) -> ResumePoint | None:
    """Where the run continues; None for a new run. Raises ValueError if options contradict the checkpoint."""
    warn = print if dist.is_main else lambda _: None
    point = branches.find_resume_point(cfg.train.run_dir, cfg.train.resume, warn)
    if point is None:
        return None
    check_same_model(point.state, cfg, point.path)
    if "optimizer" not in point.state:
        raise ValueError(f"{point.path} has no optimizer state; start from its weights with --init_from={point.path}")
    return point


def progress_of(point: ResumePoint | None, cfg: Config) -> Progress:
    """The steps and tokens of a checkpoint."""
    if point is None:
        return Progress()
    return Progress(point.state["step"], point.state["loader"]["sequences"] * cfg.model.seq_len)


def check_same_model(state: dict[str, Any], cfg: Config, path: Path) -> None:
    """Raise ValueError if a checkpoint's model is not the configured one, with the differences."""
    changes = model_changes(state, cfg.model)
    if changes:
        raise ValueError(
            f"{path} has another model ({'; '.join(changes)}); give its shape, or another --run_dir"
            + (f" with --init_from={path}" if len(changes) == 1 and changes[0].startswith("seq_len") else "")
        )


def check_initial_weights(source: dict[str, Any], cfg: Config, tokenizer: dict[str, Any], path: Path) -> None:
    """Raise ValueError unless the weights of `source` fit the configured model and the data's tokenizer."""
    # Positions have no weights, so the sequences may be longer or shorter.
    changes = model_changes(source, replace(cfg.model, seq_len=source["config"]["model"]["seq_len"]))
    if changes:
        raise ValueError(f"--init_from: {path} has another model ({'; '.join(changes)}); give its shape")
    theirs = source["tokenizer"]
    if theirs["sha256"] != tokenizer["sha256"]:
        raise ValueError(
            f"--init_from: {path} was trained with tokenizer {theirs['name']} ({theirs['sha256'][:12]}), the data were "
            f"made with {tokenizer['name']} ({tokenizer['sha256'][:12]}); prepare them with the same one"
        )


def model_changes(state: dict[str, Any], model: ModelConfig) -> list[str]:
    """How `model` differs from a checkpoint's model."""
    # Through ModelConfig, which fills in what older checkpoints do not have.
    saved = to_dict(from_dict(ModelConfig, state["config"]["model"]))
    return differences(saved, to_dict(model))


def changed_options(state: dict[str, Any], cfg: Config) -> list[str]:
    """How this run's options differ from those a checkpoint was trained with, one line each."""
    changes = []
    for section, new in to_dict(cfg).items():
        if section != "model":
            # Another version may have written the checkpoint: options that only one of the two has are left out.
            old = {name: value for name, value in state["config"].get(section, {}).items() if name in new}
            changes += differences({**new, **old}, new)
    return [f"  {change}" for change in changes]


def is_finished(cfg: Config, mixture: Mixture, point: ResumePoint, dist: Dist) -> bool:
    """True if the run directory already holds the result of this config; then print where."""
    # With a larger max_tokens the last checkpoint is not the end, and the run continues.
    total_steps = count_steps(cfg, mixture.tokens_per_epoch, progress_of(point, cfg))
    if point.path != final_path(cfg, total_steps) or read_summary(cfg).get("step") != total_steps:
        return False
    if dist.is_main:
        print(visible("\n".join([*changed_options(point.state, cfg), next_steps(cfg)])))
    return True


def final_path(cfg: Config, step: int) -> Path:
    """Where the run saves its last step."""
    return checkpoint.checkpoint_path(cfg.train.run_dir, step)


def resume(state: TrainState, point: ResumePoint | None, cfg: Config, log: RunLog) -> float:
    """Restore the run from a checkpoint, if there is one. Returns the seconds spent so far."""
    if point is None:
        # Removes the rows of a run that was killed before its first checkpoint.
        log.rewind(0)
        return 0.0
    checkpoint.restore(point.state, state, point.path)
    step = point.state["step"]
    if point.starts_branch and log.enabled:
        log.info(branches.set_aside_others(point, cfg.train.run_dir))
    log.rewind(step)
    log.info("\n".join([f"resumed {point.path} at step {step:,}", *changed_options(point.state, cfg)]))
    n_ranks = len(point.state["rng"])
    if n_ranks != distributed.world_size():
        log.info(f"  processes: {n_ranks} -> {distributed.world_size()} (random state starts anew)")
    return point.state["metrics"].get("elapsed_s", 0.0)


# ---- Evaluating ------------------------------------------------------------------------------------------------------


def load_hellaswag(cfg: Config, tokenizer: Tokenizer | None, log: RunLog) -> list[eval_hellaswag.Item]:
    """The items to score at each checkpoint, read before the first step; [] to score none.

    Raises ValueError for a damaged file, and for one that --hellaswag names and that does not exist.
    """
    path = cfg.train.hellaswag
    if path is None or tokenizer is None:
        return []
    if not Path(path).exists() and path == TrainConfig.hellaswag:
        log.info(f"no HellaSwag items at {path}: not scored (eval_hellaswag.py --download fetches them)")
        return []
    return eval_hellaswag.load_items(path)


def evaluate_hellaswag(
    model: Transformer,
    tokenizer: Tokenizer | None,
    items: list[eval_hellaswag.Item],
    dtype: torch.dtype | None,
    scoring: ScoringConfig,
) -> dict[str, float]:
    """Accuracy on all items, on all ranks; {} without items or tokenizer."""
    if not items or tokenizer is None:
        return {}
    scores = eval_hellaswag.evaluate(model, tokenizer, items, dtype, scoring)
    return {f"hellaswag_{key}": scores[key] for key in ("acc", "acc_norm", "acc_norm_stderr")}


def sample_text(model: Transformer, tokenizer: Tokenizer | None, cfg: Config, dist: Dist) -> str:
    """How the model continues SAMPLE_PROMPT, as one quoted line; "" on ranks that need not take part."""
    if tokenizer is None or not cfg.train.sample_tokens or not (dist.is_main or dist.sharded):
        return ""
    # In the training data a document begins after an end-of-text token.
    prompt = [tokenizer.eot_id, *tokenizer.encode(SAMPLE_PROMPT)]
    continue_text = diffusion.generate if cfg.train.objective == "mdm" else generate
    # Without a stop token, so that all ranks of a sharded model make the same number of forward passes.
    sampling = Sampling(temperature=0.8, top_k=50, seed=0)
    try:
        tokens = list(continue_text(model, prompt, cfg.train.sample_tokens, sampling))
    except (RuntimeError, ValueError) as error:
        # A model that has diverged: its probabilities are NaN.
        return f"no sample: {str(error).splitlines()[0]}"
    if tokenizer.eot_id in tokens:
        tokens = tokens[: tokens.index(tokenizer.eot_id)]
    return f"sample: {SAMPLE_PROMPT + tokenizer.decode(tokens)!r}"


# ---- Reporting -------------------------------------------------------------------------------------------------------


def write_summary(cfg: Config, plan: Plan, dist: Dist, log: RunLog, timer: Timer) -> None:
    """Write final_metrics.json and .png, and log how the plan came out and where everything is."""
    if not dist.is_main:
        return
    name = devices.device_name(dist.device)
    summary = metrics.write_summary(
        cfg.train.run_dir,
        parameters=cfg.model.num_params(),
        unique_tokens=plan.tokens_per_epoch,
        device=name,
        n_devices=dist.world_size,
        planned_memory_gb=estimate.training_memory_gb(workload(cfg, dist, plan.layout.batch_size)),
        planned_tokens_per_s=estimate.tokens_per_s(cfg.model.flops_per_token(), name, dist.world_size),
        seconds=timer.seconds(),
        torch=str(torch.__version__),
    )
    log.info(metrics.compare_with_plan(summary))
    log.info(next_steps(cfg))


def next_steps(cfg: Config) -> str:
    """Where the files of a finished run are and what to do with them."""
    run_dir = cfg.train.run_dir
    # launch_training.sh makes a .venv that the user's shell has not activated.
    in_project = Path(sys.executable).is_relative_to(Path.cwd())
    python = os.path.relpath(sys.executable) if in_project else "python"
    summary = read_summary(cfg)
    # None: the model has diverged.
    val_loss = math.nan if summary["val_loss"] is None else summary["val_loss"]
    return (
        f"done: {summary['step']:,} steps, {summary['tokens']:,} tokens, validation loss {val_loss:.4f}\n"
        f"  checkpoint  {final_path(cfg, summary['step'])}\n"
        f"  numbers     {run_dir}/metrics.jsonl, {run_dir}/final_metrics.json\n"
        f"  picture     {run_dir}/final_metrics.png\n"
        f"  talk to it  {python} chat.py {shlex.quote(run_dir)}"
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the host had no memory for a tensor."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def read_summary(cfg: Config) -> dict[str, Any]:
    """What final_metrics.json holds; {} if it is absent or damaged, in which case the run ends once more."""
    try:
        summary = json.loads(Path(cfg.train.run_dir, "final_metrics.json").read_text(encoding="utf-8"))
        return summary if {"step", "tokens", "val_loss"} <= summary.keys() else {}
    except (OSError, ValueError, AttributeError):
        return {}


def main(cfg: Config) -> None:
    """Train as `cfg` says, in this process or as one rank of torchrun. Exit codes are in fault_tolerance.py."""
    if not torch.cuda.is_available():
        retain_freed_memory()
    if cfg.train.kill_switch and Path(cfg.train.kill_switch).exists():
        # A launcher that restarts the run would have it stop again and again.
        raise ValueError(f"the kill switch {cfg.train.kill_switch} exists; remove it to train")
    dist = distributed.init(cfg.train.timeout, cfg.train.parallel, cfg.train.tensor_parallel)
    try:
        stop_reason = dry_run(cfg, dist) if cfg.train.dry_run else train(cfg, dist)
        # Not after an exception: it would wait for ranks that may be gone.
        distributed.shutdown()
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise Failure("out of memory; lower --batch_size, or choose --recompute=full or --parallel=fsdp") from error
        # When a rank dies, communication fails on all others; the error should name the rank that died.
        is_collective = any(backend in str(error).lower() for backend in ("gloo", "nccl"))
        if dist.world_size == 1 or not is_collective:
            raise
        silent = distributed.silent_ranks()
        message = f"{silent} (--timeout={cfg.train.timeout:g}); the same command resumes from the last save"
        raise Failure(message) from error
    code = fault_tolerance.EXIT_CODES.get(stop_reason, fault_tolerance.EXIT_RESUME) if stop_reason else 0
    code = final_exit_code(code)
    if code:
        sys.exit(code)


if __name__ == "__main__":
    run_cli(lambda: main(parse_config(Config)))
