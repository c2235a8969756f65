"""Speed on this machine: training, decoding, HellaSwag, data, checkpoints; each is compared with other projects.

    python -m tools.benchmark train --peers=peers             # tokens per second of optimizer steps, and MFU
    python -m tools.benchmark decode                          # tokens per second of the 416M shape in bf16 and int8
    python -m tools.benchmark decode --checkpoint=runs/mine --source=data/mine   # and what int8 costs in loss
    python -m tools.benchmark hellaswag --data=data/hellaswag_val.jsonl
    python -m tools.benchmark data --source="my/*.jsonl.gz"   # text to shards, shards to batches
    python -m tools.benchmark checkpoint                      # how long a save blocks training

The methods of a table take turns in one run, so that a busy minute slows them all; numbers are medians of the rounds
(lowest..highest). Compare the rows of one table, not those of two runs. transformers and lm_eval take part where they
are installed. Writes to a temporary folder, and the numbers to --output.
"""

import contextlib
import copy
import gzip
import importlib
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data_pipeline
import eval_hellaswag
from model import ModelConfig, Transformer
from nano416 import checkpoint, cpu_ops, devices, files, metrics, optimizers, quantize
from nano416.config import run_cli, run_subcommand
from nano416.dataloader import BatchLayout, DataConfig, Mixture, TokenLoader
from nano416.dataset import TokenDataset, read_shard
from nano416.evaluate import LossOptions, evaluate_loss
from nano416.generate import Sampling, decode_cached, generate
from nano416.tokenizer import load_tokenizer

GPT2_VOCAB = 50257
ROOT = Path(__file__).resolve().parent.parent


# ---- Measuring -------------------------------------------------------------------------------------------------------


def take_turns(methods: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[tuple[float, Any]]]:
    """{name: (seconds, result) of each round} after one uncounted round to warm up."""
    timings: dict[str, list[tuple[float, Any]]] = {name: [] for name in methods}
    for i in range(rounds + 1):
        for name, method in methods.items():
            start = time.perf_counter()
            result = method()
            seconds = time.perf_counter() - start
            if i > 0:
                timings[name].append((seconds, result))
    return timings


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Median (lowest..highest)."""
    low, middle, high = (f"{value:,.{digits}f}" for value in (min(values), statistics.median(values), max(values)))
    return f"{middle} ({low}..{high})"


def report(title: str, columns: Sequence[str], rows: Mapping[str, Sequence[str]], output: str | None) -> None:
    """Print a table, and write it to `output` as JSON."""
    table = [("", *columns), *((name, *cells) for name, cells in rows.items())]
    # A method that failed has its error in the first cell, which would stretch the column for all.
    name_width = max(len(name) for name, *_ in table)
    widths = [max(map(len, column)) for column in zip(*(cells for _, *cells in table if cells[-1]), strict=True)]
    print(title)
    for name, *cells in table:
        print("  ".join([name.ljust(name_width), *map(str.rjust, cells, widths)]).rstrip())
    if output:
        values = {name: dict(zip(columns, cells, strict=True)) for name, cells in rows.items()}
        files.write_json(output, {"title": title, "rows": values})


def describe_machine(device: torch.device) -> str:
    name = devices.device_name(device)
    return f"{name}, {torch.get_num_threads()} threads" if device.type == "cpu" else name


# ---- train -----------------------------------------------------------------------------------------------------------

# The shape on a CPU; on a GPU it is the default model, 416M parameters.
CPU_SHAPE: dict[str, Any] = {"dim": 256, "n_layers": 4, "n_heads": 4, "seq_len": 256}
# In text few tokens are frequent, and a few rows of the embedding get most of the gradient; uniform tokens would hide
# what that costs. Token i has a probability in proportion to 1 / (i + 2.7).
ZIPF_SHIFT = 2.7
STEPS_PER_ROUND = 4


@dataclass(frozen=True)
class TrainBenchmark:
    """The options of `train`."""

    peers: str | None = None  # folder of other projects: nanogpt/model.py, nanochat/gpt.py, original/transformer.py
    vocab_size: int = GPT2_VOCAB  # tokens in the vocabulary
    rounds: int = 3  # rounds of 4 optimizer steps per method
    device: str | None = None  # none = a GPU if there is one
    output: str | None = None  # write the table to this .json file


class Workload(NamedTuple):
    """What every method trains on."""

    shape: ModelConfig
    batch_size: int
    grad_accum_steps: int
    device: torch.device


class Trainee(NamedTuple):
    """A network as its project trains it."""

    model: nn.Module
    optimizer: Any
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor]  # mean loss of (model, tokens, targets)
    compile: bool = True


def train(cfg: TrainBenchmark) -> None:
    """Measure optimizer steps, from copying the batch to the update, of this model and of others of the same shape."""
    device = devices.pick_device(cfg.device)
    on_gpu = device.type == "cuda"
    shape = ModelConfig(vocab_size=cfg.vocab_size, qk_norm=False, **({} if on_gpu else CPU_SHAPE))
    work = Workload(shape, batch_size=32 if on_gpu else 8, grad_accum_steps=2 if on_gpu else 1, device=device)
    batch_tokens = work.batch_size * work.grad_accum_steps * shape.seq_len
    peak_flops = metrics.peak_flops(devices.device_name(device))
    builders = training_methods(cfg.peers)
    rows: dict[str, list[str]] = {}
    # Each method runs in its own process. On a GPU one lives at a time, since each wants all of the memory.
    for group in [[name] for name in builders] if on_gpu else [list(builders)]:
        with contextlib.ExitStack() as stack:
            pipes = {name: stack.enter_context(start_worker(builders[name], work)) for name in group}
            ready = {name: pipe.recv() for name, pipe in pipes.items()}
            methods = {name: partial(request_round, pipes[name]) for name in group if "error" not in ready[name]}
            timings = take_turns(methods, cfg.rounds)
        for name in group:
            if name not in timings:
                rows[name] = [ready[name]["error"], "", "", "", "", ""]
                continue
            tokens_per_s = [STEPS_PER_ROUND * batch_tokens / seconds for seconds, _ in timings[name]]
            flops_per_s = statistics.median(tokens_per_s) * ready[name]["flops_per_token"]
            rows[name] = [
                f"{ready[name]['params'] / 1e6:.1f}M",
                spread(tokens_per_s, 0),
                f"{flops_per_s / 1e12:.3g}",
                f"{flops_per_s / peak_flops:.1%}" if peak_flops else "-",
                f"{timings[name][-1][1]:.2f}",
                f"{ready[name]['first_loss']:.3f}",
            ]
    machine = f"{describe_machine(device)}, torch {torch.__version__}"
    title = f"{machine}, {batch_tokens:,} tokens per step, vocabulary {cfg.vocab_size:,}, bf16"
    report(title, ["parameters", "tokens/s", "TFLOP/s", "MFU", "peak GB", "first loss"], rows, cfg.output)


def training_methods(peers: str | None) -> dict[str, Callable[[Workload], Trainee]]:
    """{row: builder}: ours, transformers where it is installed, and the projects in the folder `peers`."""
    methods: dict[str, Callable[[Workload], Trainee]] = {
        "ours": build_ours,
        "ours, default recipe": partial(build_ours, default_recipe=True),
        "ours, eager": partial(build_ours, compile=False),
    }
    if importlib.util.find_spec("transformers"):
        methods["transformers"] = build_llama
    peer_builders = {
        "nanogpt/model.py": build_nanogpt,
        "nanochat/gpt.py": build_nanochat,
        "original/transformer.py": build_original,
    }
    if peers is None:
        return methods
    present = [name for name in peer_builders if Path(peers, name).exists()]
    if not present:
        raise ValueError(f"--peers={peers} holds none of {', '.join(peer_builders)}; copy those files there")
    return methods | {name.split("/")[0]: partial(peer_builders[name], path=Path(peers, name)) for name in present}


@contextlib.contextmanager
def start_worker(build: Callable[[Workload], Trainee], work: Workload) -> Iterator[Any]:
    """A pipe to a new process that serves `request_round`."""
    context = multiprocessing.get_context("spawn")
    pipe, worker_pipe = context.Pipe()
    process = context.Process(target=serve_rounds, args=(worker_pipe, build, work), daemon=True)
    process.start()
    try:
        yield pipe
    finally:
        # None ends the worker's loop. A worker that failed has closed its pipe, and one that still compiles is killed.
        with contextlib.suppress(OSError):
            pipe.send(None)
        process.join(timeout=5)
        process.kill()


def request_round(pipe: Any) -> float:
    """Wait for a worker's STEPS_PER_ROUND optimizer steps; returns its peak memory in GB."""
    pipe.send("round")
    return pipe.recv()


def serve_rounds(pipe: Any, build: Callable[[Workload], Trainee], work: Workload) -> None:
    """A worker: build and compile, report the first step or an error, then run a round per request."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    batches = zipf_batches(work)
    try:
        # Peers print while they are built.
        with contextlib.redirect_stdout(io.StringIO()):
            trainee = build(work)
        if trainee.compile:
            trainee.model.compile(dynamic=False)
        first_loss = float(optimizer_step(trainee, work, batches))
    except Exception as error:
        # A peer that does not run here is a row that says why.
        pipe.send({"error": f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"})
        return
    params = sum(parameter.numel() for parameter in trainee.model.parameters())
    flops_per_token = count_flops_per_token(trainee.model, work.shape)
    pipe.send({"params": params, "flops_per_token": flops_per_token, "first_loss": first_loss})
    while pipe.recv():
        for _ in range(STEPS_PER_ROUND):
            optimizer_step(trainee, work, batches)
        devices.synchronize(work.device)
        pipe.send(devices.peak_memory_gb(work.device))


def zipf_batches(work: Workload) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (tokens, targets), each [B, T], from eight different batches whose tokens follow Zipf's law."""
    generator = torch.Generator().manual_seed(0)
    weights = 1 / (torch.arange(work.shape.vocab_size) + ZIPF_SHIFT)
    n_tokens = 8 * work.batch_size * (work.shape.seq_len + 1)
    tokens = torch.multinomial(weights, n_tokens, replacement=True, generator=generator)
    batches = tokens.view(8, work.batch_size, -1)  # [8, B, T + 1]
    if work.device.type == "cuda":
        batches = batches.pin_memory()
    return itertools.cycle([(rows[:, :-1], rows[:, 1:]) for rows in batches])


def optimizer_step(trainee: Trainee, work: Workload, batches: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
    """One optimizer step, as all these projects write it; returns its mean loss."""
    loss = torch.zeros((), device=work.device)
    for _ in range(work.grad_accum_steps):
        tokens, targets = next(batches)
        tokens = tokens.to(work.device, non_blocking=True)
        targets = targets.to(work.device, non_blocking=True)
        with torch.autocast(work.device.type, torch.bfloat16):
            micro_loss = trainee.loss(trainee.model, tokens, targets) / work.grad_accum_steps
        micro_loss.backward()
        loss += micro_loss.detach()
    nn.utils.clip_grad_norm_(trainee.model.parameters(), 1.0)
    trainee.optimizer.step()
    trainee.optimizer.zero_grad(set_to_none=True)
    return loss


def build_ours(work: Workload, default_recipe: bool = False, compile: bool = True) -> Trainee:
    """This project's model with AdamW, as the peers have it, or with its own defaults: QK-norm and Muon."""
    if work.device.type == "cpu":
        cpu_ops.retain_freed_memory()
    model = Transformer(replace(work.shape, qk_norm=default_recipe)).to(work.device)
    optim = optimizers.OptimConfig() if default_recipe else optimizers.OptimConfig(optimizer="adamw")
    optimizer = optimizers.build_optimizer(model, optim)
    return Trainee(model, optimizer, lambda model, tokens, targets: model(tokens, targets), compile)


def build_llama(work: Workload) -> Trainee:
    """transformers' LlamaForCausalLM, which shifts its labels itself, with torch's fused AdamW."""
    model = transformers_model(work.shape).to(work.device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    return Trainee(model, optimizer, lambda model, tokens, _: model(tokens, labels=tokens).loss)


def build_original(work: Workload, path: Path) -> Trainee:
    """The original 416M recipe's model (language-model-pretraining): activation checkpointing, the loss outside."""
    extra = {"ffn_hidden_mult": work.shape.ffn_dim / work.shape.dim, "gradient_checkpointing": True}
    model = load_module(path).Transformer(types.SimpleNamespace(**asdict(work.shape), **extra)).to(work.device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=work.device.type == "cuda")

    def loss(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(model(tokens)[0].flatten(0, 1), targets.flatten())

    return Trainee(model, optimizer, loss)


def build_nanogpt(work: Workload, path: Path) -> Trainee:
    """nanoGPT with its own AdamW; the vocabulary is padded to a multiple of 64, as it recommends."""
    module = load_module(path)
    shape = work.shape
    sizes = {"n_layer": shape.n_layers, "n_head": shape.n_heads, "n_embd": shape.dim, "block_size": shape.seq_len}
    vocab_size = math.ceil(shape.vocab_size / 64) * 64
    model = module.GPT(module.GPTConfig(vocab_size=vocab_size, dropout=0.0, bias=False, **sizes)).to(work.device)
    optimizer = model.configure_optimizers(0.1, 3e-4, (0.9, 0.95), work.device.type)
    return Trainee(model, optimizer, lambda model, tokens, targets: model(tokens, targets.contiguous())[1])


def build_nanochat(work: Workload, path: Path) -> Trainee:
    """nanochat's model with full attention in every layer and its own Muon."""
    sys.path.insert(0, str(path.parent.parent))
    module = importlib.import_module("nanochat.gpt")
    shape = work.shape
    sizes = {"n_layer": shape.n_layers, "n_head": shape.n_heads, "n_kv_head": shape.n_heads, "n_embd": shape.dim}
    cfg = module.GPTConfig(sequence_len=shape.seq_len, vocab_size=shape.vocab_size, window_pattern="L", **sizes)
    model = module.GPT(cfg).to(work.device)
    model.init_weights()
    return Trainee(model, model.setup_optimizer(), lambda model, tokens, targets: model(tokens, targets.contiguous()))


def load_module(path: Path) -> Any:
    """The module in a Python file."""
    spec = importlib.util.spec_from_file_location(f"peer_{path.parent.name}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    # Before it runs: dataclasses look up their module here.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def count_flops_per_token(model: nn.Module, shape: ModelConfig) -> int:
    """Training FLOPs per token: 6 per matmul parameter and 12 L D T for attention, for every project alike."""
    if isinstance(model, Transformer):
        return model.config.flops_per_token()
    matmul_params = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    return 6 * matmul_params + 12 * shape.n_layers * shape.dim * shape.seq_len


def transformers_model(shape: ModelConfig) -> Any:
    """transformers' Llama, or Qwen3 for a model with QK-norm, of this shape with random weights."""
    import transformers

    family = "Qwen3" if shape.qk_norm else "Llama"
    cfg = getattr(transformers, f"{family}Config")(
        hidden_size=shape.dim,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads,
        num_key_value_heads=shape.n_kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.ffn_dim,
        vocab_size=shape.vocab_size,
        max_position_embeddings=shape.seq_len,
        rms_norm_eps=shape.norm_eps,
        rope_theta=shape.rope_theta,
        tie_word_embeddings=shape.tie_embeddings,
    )
    return getattr(transformers, f"{family}ForCausalLM")(cfg)


# ---- decode ----------------------------------------------------------------------------------------------------------

PROMPT_TOKENS = 32


@dataclass(frozen=True)
class DecodeBenchmark:
    """The options of `decode`."""

    checkpoint: str | None = None  # model to decode; none = random weights in the 416M shape
    source: str | None = None  # shard folder: also measure the validation loss of each dtype of --checkpoint there
    new_tokens: int = 128  # tokens per round, after a prompt of 32
    rounds: int = 3  # rounds per method
    device: str | None = None  # none = a GPU if there is one
    output: str | None = None  # write the table to this .json file

    def __post_init__(self):
        if self.source and not self.checkpoint:
            raise ValueError("--source measures the loss of a checkpoint; give --checkpoint, too")


def decode(cfg: DecodeBenchmark) -> None:
    """Measure greedy decoding in bf16 and int8, prefill included, against transformers on the same weights."""
    device = devices.pick_device(cfg.device)
    torch.manual_seed(0)
    if cfg.checkpoint:
        model, _ = checkpoint.load_model(cfg.checkpoint, device)
    else:
        model = Transformer(ModelConfig(vocab_size=GPT2_VOCAB, qk_norm=False)).to(device).eval()
    prompt = torch.randint(0, model.config.vocab_size, (PROMPT_TOKENS,)).tolist()
    methods: dict[str, Callable[[], list[int]]] = {}
    losses = {"fp32": validation_loss(model, cfg.source)}
    for dtype in ("bf16", "int8"):
        # A copy, because quantize_ changes its model.
        ready = quantize.quantize_(copy.deepcopy(model), dtype)
        losses[dtype] = validation_loss(ready, cfg.source)
        decoder = quantize.CompiledDecoder(ready).decode if device.type == "cuda" else decode_cached
        methods[f"ours, {dtype}"] = partial(decode_ours, ready, prompt, cfg.new_tokens, decoder)
    if importlib.util.find_spec("transformers"):
        methods["transformers, bf16"] = partial(decode_transformers, to_transformers(model), prompt, cfg.new_tokens)
    rows = {}
    for name, timings in take_turns(methods, cfg.rounds).items():
        dtype = name.split(", ")[1]
        rates = [len(tokens) / seconds for seconds, tokens in timings]
        gb_per_s = statistics.median(rates) * quantize.bytes_per_token(model, dtype) / 1e9
        loss = f"{losses[dtype]:.4f} ({losses[dtype] - losses['fp32']:+.4f})" if name.startswith("ours") else ""
        rows[name] = [spread(rates), f"{gb_per_s:.1f}", loss]
    title = (
        f"{describe_machine(device)}, memory {quantize.memory_bandwidth(device) / 1e9:.1f} GB/s, "
        f"{model.config.num_params() / 1e6:.0f}M parameters, {PROMPT_TOKENS} + {cfg.new_tokens} tokens"
    )
    report(title, ["tokens/s", "GB/s of weights", "validation loss (minus fp32's)"], rows, cfg.output)


def decode_ours(model: Transformer, prompt: list[int], n_tokens: int, decoder: Any) -> list[int]:
    return list(generate(model, prompt, n_tokens, Sampling(temperature=0), decoder))


def to_transformers(model: Transformer) -> Any:
    """transformers' network with the weights of `model` in bf16."""
    # Names differ by a prefix, and transformers' tables have no padding rows.
    peer = transformers_model(model.config)
    weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    table = weights["model.embed_tokens.weight"]
    weights["lm_head.weight"] = weights.pop("model.lm_head.weight", table)[: model.config.vocab_size]
    weights["model.embed_tokens.weight"] = table[: model.config.vocab_size]
    peer.load_state_dict(weights)
    return peer.to(model.norm.weight.device, torch.bfloat16).eval()


def decode_transformers(peer: Any, prompt: list[int], n_tokens: int) -> list[int]:
    tokens = torch.tensor([prompt], device=peer.device)
    lengths = {"min_new_tokens": n_tokens, "max_new_tokens": n_tokens}
    output = peer.generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=False, pad_token_id=0, **lengths)
    return output[0, len(prompt) :].tolist()


def validation_loss(model: Transformer, source: str | None) -> float:
    """Nats per token on 50,000 validation tokens of a shard folder, NaN without one."""
    if source is None:
        return math.nan
    layout = BatchLayout(batch_sequences=4, batch_size=4)
    row = evaluate_loss(model, {source: TokenDataset(source)}, None, layout, LossOptions(max_tokens=50_000))
    return row["val_loss"] or math.nan


# ---- hellaswag -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HellaswagBenchmark:
    """The options of `hellaswag`."""

    data: str = "data/hellaswag_val.jsonl"  # HellaSwag items
    num_examples: int = 150  # the first N of them
    rounds: int = 3  # rounds per method
    device: str | None = None  # none = a GPU if there is one
    output: str | None = None  # write the table to this .json file


def hellaswag(cfg: HellaswagBenchmark) -> None:
    """Measure seconds per item with the same 48.5M random weights, against lm-evaluation-harness."""
    device = devices.pick_device(cfg.device)
    torch.manual_seed(0)
    shape = ModelConfig(dim=512, n_layers=6, n_heads=8, vocab_size=GPT2_VOCAB, qk_norm=False)
    model = Transformer(shape).to(device).eval()
    tokenizer = load_tokenizer("gpt2")
    items = eval_hellaswag.load_items(cfg.data, cfg.num_examples)

    def ours(dtype: torch.dtype | None) -> list[float]:
        scores = eval_hellaswag.evaluate(model, tokenizer, items, dtype=dtype)
        return [logprob for item in scores["items"] for logprob in item["logprob_sums"]]

    methods = {"ours, fp32": partial(ours, None), "ours, bf16": partial(ours, torch.bfloat16)}
    with tempfile.TemporaryDirectory() as folder:
        if importlib.util.find_spec("lm_eval") and importlib.util.find_spec("transformers"):
            methods |= harness_methods(model, tokenizer, items, Path(folder))
        timings = take_turns(methods, cfg.rounds)
    reference = np.array(timings["ours, fp32"][-1][1])
    rows = {}
    for name, rounds in timings.items():
        difference = np.abs(np.array(rounds[-1][1]) - reference).max()
        rows[name] = [spread([seconds / len(items) for seconds, _ in rounds], 4), f"{difference:.5f}"]
    title = f"{describe_machine(device)}, {len(items)} items"
    report(title, ["seconds per item", "largest difference in nats"], rows, cfg.output)


def harness_methods(
    model: Transformer, tokenizer: Any, items: list[Any], folder: Path
) -> dict[str, Callable[[], list[float]]]:
    """lm-evaluation-harness on the same weights, which tools.convert_hf exports."""
    from lm_eval.api.instance import Instance
    from lm_eval.models import huggingface

    metadata = {"config": {"model": asdict(model.config)}, "tokenizer": tokenizer.info(), "step": 0, "tokens": 0}
    state = {"format": checkpoint.FORMAT, **metadata, "model": model.state_dict()}
    checkpoint.write(folder / "model.pt", state)
    # As a command, because tools do not import each other.
    export = [sys.executable, "-m", "tools.convert_hf", "export", str(folder / "model.pt"), str(folder / "llama")]
    subprocess.run(export, cwd=ROOT, check=True, capture_output=True)
    pairs = [(item.context, f" {ending}") for item in items for ending in item.endings]

    def score(lm: Any) -> list[float]:
        requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
        with contextlib.redirect_stderr(io.StringIO()):
            return [float(logprob) for logprob, _ in lm.loglikelihood(requests, disable_tqdm=True)]

    # Any, because a decorator hides the arguments of its class from type checkers.
    harness: Any = huggingface
    methods = {}
    for name, dtype in {"fp32": "float32", "bf16": "bfloat16"}.items():
        device = str(model.norm.weight.device)
        lm = harness.HFLM(pretrained=str(folder / "llama"), device=device, dtype=dtype, batch_size=8)
        methods[f"lm_eval, {name}, batches of 8"] = partial(score, lm)
    return methods


# ---- data ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataBenchmark:
    """The options of `data`."""

    source: str | None = None  # text as `data_pipeline.py prepare` reads it; none = the sample corpus, repeated
    megabytes: int = 30  # how much of the sample corpus
    rounds: int = 2  # rounds per method
    output: str | None = None  # write the table to this .json file


def data(cfg: DataBenchmark) -> None:
    """Measure text to gpt2 shards against tiktoken alone, and shards to batches against nanoGPT's random crops."""
    n_cores = len(os.sched_getaffinity(0))
    with (
        tempfile.TemporaryDirectory() as name,
        ProcessPoolExecutor(n_cores, multiprocessing.get_context("spawn")) as pool,
    ):
        folder = Path(name)
        source = cfg.source or write_sample_text(folder / "text.jsonl.gz", cfg.megabytes)
        prepare(source, folder / "shards", False)
        # Read back from the shards, so that all methods encode the same text.
        documents = read_documents(folder / "shards")
        parts = [documents[i::n_cores] for i in range(n_cores)]
        methods = {
            "tiktoken to numpy, 1 core": partial(tokenize, documents),
            f"tiktoken to numpy, {n_cores} cores": lambda: list(pool.map(tokenize, parts)),
            "prepare, tiktoken": partial(prepare, source, folder / "shards", False),
            "prepare, fast encoder": partial(prepare, source, folder / "shards", True),
        }
        megabytes = sum(len(document.encode()) for document in documents) / 1e6
        timings = take_turns(methods, cfg.rounds)
        rows = {name: [spread([megabytes / s for s, _ in rounds]), ""] for name, rounds in timings.items()}
        rows |= {name: ["", rate] for name, rate in loader_rates(folder / "shards", cfg.rounds).items()}
    title = f"{n_cores} cores, {megabytes:.0f} MB of text in {len(documents):,} documents"
    report(title, ["MB/s", "batches of 40 x 1024 per s"], rows, cfg.output)


def write_sample_text(path: Path, megabytes: int) -> str:
    """Write the sample corpus again and again, until there are `megabytes` of it."""
    train, val = data_pipeline.sample_documents()
    lines = "".join(json.dumps({"text": text}) + "\n" for text in train + val).encode()
    path.write_bytes(gzip.compress(lines * math.ceil(megabytes * 1e6 / len(lines)), compresslevel=1))
    return str(path)


def prepare(source: str, shards: Path, fast: bool) -> None:
    """Text to verified shards."""
    options: dict[str, Any] = {"shard_tokens": 10_000_000, "val_tokens": 100_000, "fast": fast}
    for path in shards.glob("*"):
        path.unlink()
    with contextlib.redirect_stdout(io.StringIO()):
        data_pipeline.prepare(data_pipeline.PrepareConfig(source, str(shards), **options))
        data_pipeline.verify(data_pipeline.DatasetConfig(str(shards)))


def read_documents(shards: Path) -> list[str]:
    """The text of all documents in a folder of gpt2 shards."""
    tokenizer = load_tokenizer("gpt2")
    tokens = np.concatenate([read_shard(path) for path in sorted(shards.glob("*.bin"))])
    documents = np.split(tokens, np.flatnonzero(tokens == tokenizer.eot_id))
    return [tokenizer.decode(document[1:].tolist()) for document in documents if len(document) > 1]


def tokenize(documents: Sequence[str]) -> int:
    """Tokens in the documents, from gpt2 tokens as one numpy array."""
    tokenizer = load_tokenizer("gpt2")
    return len(np.concatenate([tokenizer.encode_array(text) for text in documents]).astype(np.uint16))


def loader_rates(shards: Path, rounds: int) -> dict[str, str]:
    """{name: batches per second}."""
    n_batches = 100
    layout = BatchLayout(batch_sequences=40, batch_size=40)
    loader = TokenLoader(Mixture(DataConfig({str(shards): 1.0}), seq_len=1024), layout)
    tokens = read_shard(shards / "train_000000.bin")

    def crops() -> None:
        """nanoGPT's get_batch."""
        for _ in range(n_batches):
            starts = torch.randint(len(tokens) - 1024, (40,))
            for shift in (0, 1):
                torch.stack([torch.from_numpy(tokens[i + shift : i + shift + 1024].astype(np.int64)) for i in starts])

    methods = {"TokenLoader": lambda: [loader.next_batch() for _ in range(n_batches)], "nanoGPT's random crops": crops}
    timings = take_turns(methods, rounds)
    loader.close()
    return {name: spread([n_batches / seconds for seconds, _ in turns], 0) for name, turns in timings.items()}


# ---- checkpoint ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CheckpointBenchmark:
    """The options of `checkpoint`."""

    rounds: int = 3  # saves per method
    device: str | None = None  # none = a GPU if there is one
    output: str | None = None  # write the table to this .json file


def checkpoint_(cfg: CheckpointBenchmark) -> None:
    """Measure how long a save blocks training and when it is on the disk, against torch.save of the same state."""
    device = devices.pick_device(cfg.device)
    model = Transformer(ModelConfig(dim=512, n_layers=8, n_heads=8, vocab_size=GPT2_VOCAB, seq_len=256)).to(device)
    optimizer = optimizers.build_optimizer(model, optimizers.OptimConfig())
    # One step, so that the optimizer has a state to save.
    tokens = torch.randint(0, GPT2_VOCAB, (1, 64), device=device)
    model(tokens, tokens).backward()
    optimizer.step()
    no_state = types.SimpleNamespace(state_dict=dict)
    state = checkpoint.TrainState(model, optimizer, loader=no_state, guard=no_state)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        writer = checkpoint.CheckpointWriter(folder)
        metadata = {"tokens": 0, "config": {}, "tokenizer": {}}
        methods = {
            "torch.save": lambda: torch.save([model.state_dict(), optimizer.state_dict()], folder / "plain.pt"),
            "save": lambda: writer.save(1, state, metadata, permanent=True),
            "wait": writer.wait,
        }
        timings = {name: [seconds for seconds, _ in turns] for name, turns in take_turns(methods, cfg.rounds).items()}
        state_gb = (folder / "plain.pt").stat().st_size / 1e9
    on_disk = [saving + waiting for saving, waiting in zip(timings["save"], timings["wait"], strict=True)]
    rows = {
        "torch.save": [spread(timings["torch.save"], 3), "not flushed"],
        "CheckpointWriter.save": [spread(timings["save"], 3), spread(on_disk, 3)],
    }
    title = f"{describe_machine(device)}, {state_gb:.2f} GB of weights and optimizer state"
    report(title, ["seconds that training waits", "seconds until it is on the disk"], rows, cfg.output)


if __name__ == "__main__":
    # By default idle OpenMP threads spin for a while, which slows down the other processes of `train`.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    run_cli(lambda: run_subcommand(train, decode, hellaswag, data, checkpoint_))
