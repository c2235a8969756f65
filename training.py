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
import ctypes
import gc
import json
import math
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import config

if __name__ == "__main__":  # before torch is imported, which takes seconds
    sections = {"model": "model.py:ModelConfig", "data": "shards.py:DataConfig"}
    sections |= {"optim": "optimizers.py:OptimConfig", "train": "plan.py:TrainConfig"}
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
from distributed import Dist
from model import ModelConfig, Transformer, generate
from optimizers import Average, Statistics, apply, build_optimizer, clip_gradients, lr_at, set_lr, swapped_in
from plan import (
    CPU_AUTO,
    MEMORY_SHARE,
    Config,
    Plan,
    describe,
    device_name,
    expected_memory_gb,
    expected_to_fit,
    expected_tokens_per_s,
    make_plan,
    memory_gb,
    uses_bf16,
    uses_compiler,
    with_vocabulary,
)
from shards import Dataset, Tokenizer, TokenLoader, load_tokenizer, validation_batches

SAMPLE_PROMPT, SAMPLE_TOKENS = "The", 200  # the text sampled during training
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's numbers


def main(cfg: Config) -> None:
    """Train as `cfg` says, in this process or as one rank of torchrun. Exits with a code of safety.py if stopped."""
    if not torch.cuda.is_available():
        keep_memory()
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


def keep_memory() -> None:
    """Training on a CPU frees and takes the same large blocks in each step. glibc returns those above 32 MB to the system
    at once, whose fresh pages cost a sixth of the time; other C libraries are left as they are."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 2**30)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


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
    size, states = plan.batch_size, 20 * plan.params / dist.parts  # bytes of AdamW's or Muon's state to come
    room = 1e9 * MEMORY_SHARE * memory_gb(dist.device) - states
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
    tokenizer = load_tokenizer(meta["tokenizer"])
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
        return load_tokenizer(loader.tokenizer)
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


def autocast(cfg: Config, device: torch.device) -> contextlib.AbstractContextManager:
    """Matmuls in bf16 around fp32 weights, where bf16 is used."""
    return torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(cfg, device))


if __name__ == "__main__":
    config.run(lambda: main(config.parse_config(Config)))
