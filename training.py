"""Train a transformer on token shards: bf16, one process per GPU, checkpoints you can resume and chat with.

    python training.py configs/sample.toml                       # a CPU, two minutes (after: data_pipeline.py sample)
    torchrun --standalone --nproc_per_node=8 training.py         # the 416M run on 8 GPUs
    python training.py --sources=data/mine --dim=512 --n_layers=8 --max_tokens=500M --run_dir=runs/mine
    python training.py runs/mine/config.json                     # the same run again: resumes, or finds itself done

Reads shards written by data_pipeline.py; writes RUN_DIR/{config.json, metrics.jsonl, train.log,
checkpoint_step_<N>.pt, final_metrics.json, final_metrics.png}. The same command is the same run on any number of GPUs.
"""

import contextlib
import json
import math
import os
import shlex
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import config

if __name__ == "__main__":  # before torch is imported, which takes seconds
    sections = {"model": "model.py:ModelConfig", "data": "data_pipeline.py:DataConfig"}
    sections |= {"optim": "optimizers.py:OptimConfig", "train": "training.py:TrainConfig"}
    config.answer_help(__doc__, sections)

import torch
from torch import Tensor, nn

import checkpoint
import distributed
import eval_hellaswag
import metrics
from data_pipeline import DataConfig, Dataset, Tokenizer, TokenLoader, load_tokenizer, validation_batches
from distributed import Dist
from model import ModelConfig, Transformer, generate
from optimizers import OptimConfig, build_optimizer, clip_gradients, lr_at, set_lr

SAMPLE_TOKENS = 64  # length of the text sampled during training
GPT2_VOCAB = 50257  # for a plan without data
ASSUMED_MFU = 0.45  # for the plan's hours: what plain PyTorch reaches on one GPU generation or another


@dataclass(frozen=True)
class TrainConfig:
    """The run: budget, batch, what happens how often, where it is written."""

    run_dir: str = "checkpoints"  # directory of the run
    seed: int = 42  # of the initial weights and of the order of the data
    max_tokens: int = 10_000_000_000  # tokens to train on
    max_steps: int | None = None  # optimizer steps; overrides max_tokens
    batch_tokens: int = 655_360  # tokens per optimizer step, over all GPUs and micro-steps
    batch_size: int = 40  # sequences per GPU and micro-step at most: as many as fit in memory
    log_every: int = 10  # steps between log lines, 0 = never
    eval_every: int = 250  # steps between validations, 0 = only at the end
    eval_tokens: int = 5_000_000  # validation tokens to use at most
    checkpoint_every: int = 2000  # steps between checkpoints, 0 = only at the end
    sample_every: int = 1000  # steps between samples of generated text, 0 = only at the end
    hellaswag: str | None = "data/hellaswag_val.jsonl"  # items scored at each checkpoint; none = never
    resume: str = "auto"  # auto = newest checkpoint of run_dir if there is one; never; or a checkpoint's path
    init_from: str | None = None  # checkpoint whose weights start a new run
    compile: bool | None = None  # torch.compile the model; none = on a GPU
    dtype: Literal["bf16", "fp32"] | None = None  # of activations and matmuls; none = bf16 on a GPU, else fp32
    parallel: distributed.Strategy = "ddp"  # how several processes share the work
    objective: Literal["ar"] = "ar"  # autoregressive: predict the next token
    dry_run: bool = False  # print the plan and leave
    dollars_per_gpu_hour: float = 2.0  # for the plan's cost

    def __post_init__(self):
        for name in ("max_tokens", "batch_tokens", "batch_size", "eval_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("log_every", "eval_every", "checkpoint_every", "sample_every", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError(f"max_steps must be at least 1, got {self.max_steps}")


@dataclass(frozen=True)
class Config:
    """Everything a run needs; each section belongs to the room that reads it."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


@dataclass(frozen=True)
class Plan:
    """What follows from a config and the number of processes."""

    steps: int
    batch_sequences: int  # per optimizer step, all ranks
    batch_size: int  # sequences per rank and micro-step
    micro_steps: int  # per optimizer step, each rank
    params: int
    flops_per_token: int


def make_plan(cfg: Config, world_size: int) -> Plan:
    """Derive steps and micro-steps. Raises ValueError with the nearest batch that works."""
    seq_len, batch_tokens = cfg.model.seq_len, cfg.train.batch_tokens
    unit = seq_len * world_size
    share = batch_tokens // unit  # sequences per rank and optimizer step
    batch_size = max((n for n in range(1, cfg.train.batch_size + 1) if share and share % n == 0), default=0)
    if batch_tokens % unit or (batch_size <= cfg.train.batch_size // 2 and share > cfg.train.batch_size):
        step = unit if batch_tokens % unit else unit * cfg.train.batch_size
        raise ValueError(
            f"batch_tokens ({batch_tokens}) does not split into micro-steps of about batch_size ({cfg.train.batch_size})"
            f" x seq_len ({seq_len}) x processes ({world_size}); try --batch_tokens={max(1, round(batch_tokens / step)) * step}"
        )
    steps = cfg.train.max_steps or cfg.train.max_tokens // batch_tokens
    if not steps:
        raise ValueError(f"max_tokens ({cfg.train.max_tokens}) is less than one step of batch_tokens ({batch_tokens})")
    with torch.device("meta"):
        shape = Transformer(cfg.model)
    sequences = batch_tokens // seq_len
    return Plan(steps, sequences, batch_size, share // batch_size, shape.num_params(), shape.flops_per_token())


def describe(plan: Plan, cfg: Config, dist: Dist) -> str:
    """The plan as text: what will be trained, how much of it, what it takes."""
    tokens = plan.steps * cfg.train.batch_tokens
    flops = plan.flops_per_token * tokens
    saves = 1 + (plan.steps - 1) // cfg.train.checkpoint_every if cfg.train.checkpoint_every else 1
    on = f"{dist.world_size} x {device_name(dist.device)}"
    lines = [
        f"model      {plan.params:,} parameters, {plan.flops_per_token / 1e9:.3g} GFLOP per token",
        f"batch      {cfg.train.batch_tokens:,} tokens = {plan.batch_size} sequences x {cfg.model.seq_len} tokens x "
        f"{plan.micro_steps} micro-steps x {dist.world_size} processes",
        f"run        {plan.steps:,} steps, {tokens:,} tokens ({tokens / plan.params:.1f} per parameter), {flops:.3g} FLOP",
        f"memory     {16 * plan.params / 1e9:.2f} GB per process for weights, gradients and AdamW, plus activations",
        f"disk       {saves} checkpoints of {12 * plan.params / 1e9:.2f} GB in {cfg.train.run_dir}",
    ]
    if peak := metrics.peak_flops(device_name(dist.device)):
        hours = flops / (peak * ASSUMED_MFU * dist.world_size) / 3600
        dollars = hours * dist.world_size * cfg.train.dollars_per_gpu_hour
        lines.append(f"time       {hours:.1f} h, ${dollars:,.0f} on {on} at an assumed {ASSUMED_MFU:.0%} MFU")
    else:
        lines.append(f"time       not known in advance on {on}; the log shows an ETA")
    return "\n".join(lines)


def main(cfg: Config) -> None:
    """Train as `cfg` says, in this process or as one rank of torchrun."""
    dist = distributed.init()
    if cfg.train.dry_run:
        there = Path(next(iter(cfg.data.sources))).exists()  # a plan needs no data
        cfg = with_vocabulary(cfg, data_vocabulary(cfg) if there else None)
        if dist.is_main:
            print(describe(make_plan(cfg, dist.world_size), cfg, dist))
    else:
        train(cfg, dist)
    distributed.shutdown()


def train(cfg: Config, dist: Dist) -> None:
    """The run: set up, then measure, save, stop, learn, report."""
    cfg = with_vocabulary(cfg, data_vocabulary(cfg))
    plan = make_plan(cfg, dist.world_size)
    source = choose_checkpoint(cfg)
    state = read_state(source, cfg) if source else None
    if state and finished(cfg, plan, state):
        return print("\n".join([*changed_options(state, cfg), outcome(cfg)])) if dist.is_main else None
    loader = open_loader(cfg, plan, state, dist)
    log = open_run_dir(cfg, dist, plan.steps)
    torch.manual_seed(cfg.train.seed)
    torch.set_float32_matmul_precision("high")
    raw_model = Transformer(cfg.model).to(dist.device)
    optimizer = build_optimizer(raw_model, cfg.optim)
    step, tokens = start(state, cfg, raw_model, optimizer, log)
    write_config(cfg, dist)
    tokenizer = tokenizer_if_there(loader, log)
    if cfg.train.compile if cfg.train.compile is not None else dist.device.type == "cuda":
        raw_model.compile(dynamic=False)
    model = distributed.parallelize(raw_model, dist, cfg.train.parallel)
    log.line(describe(plan, cfg, dist))
    log.begin(step)
    first_step, watch = step, Stopwatch(dist.device, tokens)
    while True:
        last = step >= plan.steps
        if step > first_step and (last or every(step, cfg.train.checkpoint_every)):
            with watch.paused():  # before evaluating: what fails there must not cost the weights
                save(cfg, step, tokens, raw_model, optimizer, loader, log)
        if last or every(step, cfg.train.eval_every):
            with watch.paused():
                log.report(step, tokens, **validate(raw_model, tokenizer, cfg, dist))
        if last or (step and every(step, cfg.train.checkpoint_every)):
            with watch.paused():
                log.report(step, tokens, **hellaswag(raw_model, tokenizer, cfg, dist, log))
        if last or (step and every(step, cfg.train.sample_every)):
            with watch.paused():
                log.line(sample_text(raw_model, tokenizer, dist))
        if last:
            break
        lr = lr_at(step, plan.steps, cfg.optim)
        set_lr(optimizer, lr)
        loss, grad_norm = train_step(model, optimizer, loader, plan.micro_steps, cfg, dist)
        step, tokens = step + 1, tokens + cfg.train.batch_tokens
        log.advance(step)
        if every(step, cfg.train.log_every):
            loss = distributed.mean(loss).item()  # the one synchronisation with the GPU
            tokens_per_s = watch.lap(tokens)
            log.report(
                step,
                tokens,
                loss=loss,
                lr=lr,
                grad_norm=grad_norm.item(),
                tokens_per_s=tokens_per_s,
                mfu=metrics.mfu(plan.flops_per_token, tokens_per_s, device_name(dist.device), dist.world_size),
                memory_gb=metrics.peak_memory_gb(),
            )
    finish(cfg, plan, dist, log)
    loader.close()


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, loader: TokenLoader, micro_steps: int, cfg: Config, dist: Dist
) -> tuple[Tensor, Tensor]:
    """One optimizer step. Returns this rank's mean loss and the gradient's norm as tensors on the device."""
    loss_sum = torch.zeros((), device=dist.device)
    for micro_step in range(micro_steps):
        inputs, targets = (x.to(dist.device, non_blocking=True) for x in loader.next())
        with distributed.no_sync(model, last=micro_step == micro_steps - 1):  # forward too, or DDP would reduce
            with autocast(cfg, dist.device):
                loss = model(inputs, targets)
            (loss / micro_steps).backward()
        loss_sum += loss.detach()
    grad_norm = clip_gradients(model, cfg.optim.grad_clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss_sum / micro_steps, grad_norm


@torch.no_grad()
def validate(model: Transformer, tokenizer: Tokenizer | None, cfg: Config, dist: Dist) -> dict[str, float | None]:
    """Loss (nats per token) and bits per byte over the first eval_tokens validation tokens, on all ranks."""
    batches = validation_batches(
        cfg.data.sources,
        seq_len=cfg.model.seq_len,
        batch_size=cfg.train.batch_size,
        rank=dist.rank,
        world_size=dist.world_size,
        max_tokens=cfg.train.eval_tokens,
    )
    lengths = torch.from_numpy(tokenizer.byte_lengths()) if tokenizer else None
    sums = torch.zeros(3, dtype=torch.float64)  # loss, tokens, bytes
    for inputs, targets in batches:
        counted = targets >= 0
        if not counted.any():  # filler, so that all ranks make as many steps; still a forward pass for sharded models
            targets = inputs
        with autocast(cfg, dist.device):
            loss = model(inputs.to(dist.device), targets.to(dist.device))
        n = int(counted.sum())
        n_bytes = int(lengths[targets[counted]].sum()) if lengths is not None else 0
        sums += torch.tensor([loss.item() * n, n, n_bytes], dtype=torch.float64)
    loss_sum, n_tokens, n_bytes = distributed.total(sums.to(dist.device)).tolist()
    bpb = loss_sum / n_bytes / math.log(2) if n_bytes else None
    return {"val_loss": loss_sum / n_tokens, "val_bpb": bpb}


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
    """Text that the model writes from nothing, as one quoted line; rank 0 only."""
    if tokenizer is None or not dist.is_main:
        return ""
    tokens = generate(model, [tokenizer.eot_id], SAMPLE_TOKENS * 3, temperature=0.8, top_k=50, seed=0)
    return f"sample: {tokenizer.decode(list(tokens))[:400]!r}"


def save(cfg: Config, step: int, tokens: int, model, optimizer, loader: TokenLoader, log) -> None:
    """Write the checkpoint of `step`."""
    path = checkpoint.save(
        cfg.train.run_dir,
        step=step,
        tokens=tokens,
        model=model,
        optimizer=optimizer,
        loader=loader.state_dict(),
        config=config.to_dict(cfg),
        tokenizer=loader.tokenizer,
        metrics={},
    )
    log.line(f"saved {path}")


def with_vocabulary(cfg: Config, data_vocab: int | None) -> Config:
    """The config with vocab_size filled in from the data. Raises ValueError where the model's is too small for it."""
    given = cfg.model.vocab_size
    if given is not None and data_vocab is not None and given < data_vocab:
        raise ValueError(
            f"vocab_size ({given}) is smaller than the {data_vocab} tokens of the data's tokenizer; "
            "leave it out, or prepare the data with another --tokenizer"
        )
    return replace(cfg, model=replace(cfg.model, vocab_size=given or data_vocab or GPT2_VOCAB))


def data_vocabulary(cfg: Config) -> int:
    """Vocabulary size of the first source's tokenizer (the loader checks that all have the same)."""
    return Dataset(next(iter(cfg.data.sources))).tokenizer["vocab_size"]


def open_loader(cfg: Config, plan: Plan, state: dict[str, Any] | None, dist: Dist) -> TokenLoader:
    """This rank's training batches, from where `state` left off."""
    loader = TokenLoader(
        cfg.data.sources,
        seq_len=cfg.model.seq_len,
        batch_size=plan.batch_size,
        batch_sequences=plan.batch_sequences,
        rank=dist.rank,
        world_size=dist.world_size,
        seed=cfg.train.seed,
        vocab_size=cfg.model.vocab_size,
        pin_memory=dist.device.type == "cuda",
    )
    if state:
        loader.load_state_dict(state["loader"])
    return loader


def tokenizer_if_there(loader: TokenLoader, log: metrics.MetricsLog) -> Tokenizer | None:
    """Training itself needs no tokenizer; bits per byte, samples and HellaSwag do."""
    try:
        return load_tokenizer(loader.tokenizer["name"], loader.tokenizer.get("sha256"))
    except ValueError as error:
        log.line(f"no val_bpb, samples and HellaSwag: {error}")
        return None


def open_run_dir(cfg: Config, dist: Dist, steps: int) -> metrics.MetricsLog:
    """Create the run directory and prove that it can be written to, before anything has been computed."""
    folder = Path(cfg.train.run_dir)
    if dist.is_main:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise ValueError(f"cannot write to run_dir {folder}: {error.strerror}; choose another --run_dir") from error
    distributed.barrier()
    return metrics.MetricsLog(folder, steps, enabled=dist.is_main)


def write_config(cfg: Config, dist: Dist) -> None:
    """RUN_DIR/config.json, itself a config file."""
    if dist.is_main:
        metrics.write_text(Path(cfg.train.run_dir, "config.json"), json.dumps(config.to_dict(cfg), indent=2) + "\n")


def choose_checkpoint(cfg: Config) -> Path | None:
    """Where the run continues from, or None for a fresh start. Raises ValueError rather than ignore a wish."""
    run_dir, resume = cfg.train.run_dir, cfg.train.resume
    there = checkpoint.latest(run_dir)
    if resume == "never" and there:
        raise ValueError(f"--resume=never, but {there} exists; choose another --run_dir or remove it first")
    path = {"auto": there, "never": None}[resume] if resume in ("auto", "never") else checkpoint.find(resume)
    if path and cfg.train.init_from:
        if resume == "auto":
            return path  # the weights it started from are long inside
        raise ValueError("--resume and --init_from exclude each other: continue a run, or start a new one from weights")
    return path


def read_state(path: Path, cfg: Config) -> dict[str, Any]:
    """The checkpoint to continue from. Raises ValueError where it does not fit this run."""
    state = checkpoint.read(path)
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
    return [f"  {line}" for name in ("data", "optim", "train") for line in config.differences(old[name], new[name])]


def start(state: dict[str, Any] | None, cfg: Config, model, optimizer, log: metrics.MetricsLog) -> tuple[int, int]:
    """Fill model and optimizer from `state`, or the model from init_from, or nothing. Returns steps and tokens done."""
    if state:
        checkpoint.restore(state, model, optimizer, state["path"])
        log.rewind(state["step"])
        log.line("\n".join([f"resumed {state['path']} at step {state['step']:,}", *changed_options(state, cfg)]))
        return state["step"], state["tokens"]
    log.rewind(0)
    if cfg.train.init_from:
        path = checkpoint.find(cfg.train.init_from)
        weights = checkpoint.read(path)
        same_model(weights, cfg, path)
        checkpoint.load_weights(model, weights["model"], path)
        log.line(f"weights from {path}")
    return 0, 0


def finished(cfg: Config, plan: Plan, state: dict[str, Any]) -> bool:
    """True if the run directory already holds the outcome of this plan."""
    there = Path(cfg.train.run_dir, "final_metrics.json").exists()
    return there and state["path"] == checkpoint.path_of(cfg.train.run_dir, plan.steps)


def finish(cfg: Config, plan: Plan, dist: Dist, log: metrics.MetricsLog) -> None:
    """Write final_metrics.json and .png, and say where everything lies."""
    log.end()
    if dist.is_main:
        facts = {"parameters": plan.params, "device": device_name(dist.device), "n_devices": dist.world_size}
        metrics.write_summary(cfg.train.run_dir, **facts, torch=str(torch.__version__))
        log.line(outcome(cfg))


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
    """Speed of training, without the time that `paused` covers."""

    def __init__(self, device: torch.device, tokens: int):
        self.device, self.since, self.tokens = device, time.monotonic(), tokens

    @contextlib.contextmanager
    def paused(self):
        """Evaluation and checkpoints are not training; what the GPU has yet to do of it is."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        began = time.monotonic()
        yield
        self.since += time.monotonic() - began

    def lap(self, tokens: int) -> float:
        """Tokens per second since the last lap."""
        now = time.monotonic()
        speed = (tokens - self.tokens) / (now - self.since)
        self.since, self.tokens = now, tokens
        return speed


def every(step: int, period: int) -> bool:
    """True at multiples of `period`; a period of 0 means never."""
    return period > 0 and step % period == 0


def uses_bf16(cfg: Config, device: torch.device) -> bool:
    """bf16 unless told otherwise on a GPU, fp32 unless told otherwise on a CPU."""
    return cfg.train.dtype == "bf16" or (cfg.train.dtype is None and device.type == "cuda")


def autocast(cfg: Config, device: torch.device) -> contextlib.AbstractContextManager:
    """Matmuls in bf16 around fp32 weights, where bf16 is used."""
    return torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(cfg, device))


def device_name(device: torch.device) -> str:
    """Of the GPU, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


if __name__ == "__main__":
    config.run(lambda: main(config.parse_config(Config)))
