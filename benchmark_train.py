"""How fast this machine trains, beside other projects' models: the section `train` of benchmark.py.

    python benchmark.py train                                # a small shape on a CPU, the 416M model on a GPU
    python benchmark.py train --peers=peers --vocab_size=512

--peers is a folder with their own files, as far as you have them: seed/transformer.py (language-model-pretraining),
nanogpt/model.py, nanochat/ (the package). transformers' Llama takes part where transformers is installed.
Every row is a process of its own; tokens follow Zipf's law; a step is everything from copying the batch to the update.
"""

import contextlib
import importlib
import importlib.util
import io
import itertools
import multiprocessing
import sys
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import config
import convert_hf
import metrics
import training
from model import ModelConfig

SMALL: dict[str, Any] = {"dim": 256, "n_layers": 4, "n_heads": 4, "seq_len": 256}  # for a CPU
ZIPF_SHIFT = 2.7  # uniform tokens would hide that a few rows of the embedding get most of the gradients
WARM_UP, STEPS = 3, 4  # optimizer steps before, and of each round
PEERS = {"the seed": "seed/transformer.py", "nanoGPT": "nanogpt/model.py", "nanochat": "nanochat/gpt.py"}
LLAMA = "transformers' Llama"
Batches = Iterator[tuple[Tensor, Tensor]]
Step = Callable[[], Tensor]
Way = tuple[str, dict[str, Any]]  # whose model, settings
Pipe = Any  # of multiprocessing, whose type depends on the platform


def train_benchmark(device: str, vocab_size: int, rounds: int, peers: str | None) -> dict[str, Any]:
    """Seconds of optimizer steps of this model and of the peers found.

    On a CPU they take turns, since neighbours disturb; on a GPU one lives at a time, since each wants the memory.
    """
    ways = find_ways(device, peers)
    shape = ModelConfig(**{**({} if device == "cuda" else SMALL), "vocab_size": vocab_size, "qk_norm": False})
    batch, micro_steps = (32, 2) if device == "cuda" else (8, 1)
    results: dict[str, dict[str, Any]] = {}
    for group in [[name] for name in ways] if device == "cuda" else [list(ways)]:
        with contextlib.ExitStack() as stack:
            pipes = {name: stack.enter_context(worker(ways[name], shape, batch, micro_steps, device)) for name in group}
            for name, pipe in pipes.items():
                results[name] = pipe.recv() | {"seconds": []}
                state = results[name].get("error") or f"ready after {results[name]['start_s']:.0f} s"
                print(f"  {name:32} {state}", flush=True)
            for name in [name for _ in range(rounds) for name in group if "error" not in results[name]]:
                pipes[name].send(STEPS)
                answer = pipes[name].recv()
                results[name]["seconds"] += answer["seconds"]
                results[name]["peak_gb"] = answer["peak_gb"]
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "torch": str(torch.__version__),
        "batch_tokens": batch * micro_steps * shape.seq_len,
        "shape": asdict(shape),
        "ceiling": {name: matmul_flops_per_s(device, dtype) for name, dtype in DTYPES.items()},
        "ways": {name: result for name, result in results.items() if "error" not in result},
        "errors": {name: result["error"] for name, result in results.items() if "error" in result},
    }


def find_ways(device: str, peers: str | None) -> dict[str, Way]:
    """{row: way}; everything is compiled, but for one row of ours on a CPU, where training.py does without."""
    found = {kind: path for kind, name in PEERS.items() if peers and (path := Path(peers, name)).exists()}
    if peers and not found:
        raise ValueError(f"--peers={peers} holds none of {', '.join(PEERS.values())}; copy those files there")
    llama = {"compile": True, "optimizer": "adamw"}  # as the peers
    ways: dict[str, Way] = {"ours": ("ours", llama), "ours, the default": ("ours", {"compile": True, "qk_norm": True})}
    if device == "cpu":
        ways["ours, not compiled"] = "ours", llama | {"compile": False}
    if importlib.util.find_spec("transformers"):
        ways[LLAMA] = LLAMA, {}
    return ways | {kind: (kind, {"path": path}) for kind, path in found.items()}


@contextlib.contextmanager
def worker(way: Way, shape: ModelConfig, batch: int, micro_steps: int, device: str) -> Iterator[Pipe]:
    """A pipe to a fresh process that makes optimizer steps on request."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=work, args=(theirs, way, shape, batch, micro_steps, device), daemon=True)
    process.start()
    try:
        yield pipe
    finally:
        process.kill()
        process.join()


def work(pipe: Pipe, way: Way, shape: ModelConfig, batch: int, micro_steps: int, device: str) -> None:
    """The fresh process: builds and warms up, then answers each number of steps with their seconds."""
    kind, settings = way
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    started = time.perf_counter()
    try:
        batches = zipf_batches(batch, shape, pin=device == "cuda")
        build = our_step if kind == "ours" else peer_step
        step, facts = build(kind, settings, shape, batches, micro_steps, device)
        losses = [float(step()) for _ in range(WARM_UP)]
    except Exception as error:  # a peer that does not run here is a row that says so
        return pipe.send({"error": f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"})
    pipe.send({**facts, "first_loss": losses[0], "start_s": time.perf_counter() - started})
    while True:
        seconds = []
        for _ in range(pipe.recv()):
            started = time.perf_counter()
            step()
            wait()
            seconds.append(time.perf_counter() - started)
        pipe.send({"seconds": seconds, "peak_gb": metrics.peak_memory_gb()})


def zipf_batches(batch: int, shape: ModelConfig, pin: bool) -> Batches:
    """(inputs, targets) [B, T] without end, from eight different batches."""
    assert shape.vocab_size
    generator = torch.Generator().manual_seed(0)
    weights = 1 / (torch.arange(shape.vocab_size) + ZIPF_SHIFT)
    tokens = torch.multinomial(weights, 8 * batch * (shape.seq_len + 1), replacement=True, generator=generator)
    pairs = [(rows[:, :-1].contiguous(), rows[:, 1:].contiguous()) for rows in tokens.view(8, batch, -1)]
    return itertools.cycle([(x.pin_memory(), y.pin_memory()) for x, y in pairs] if pin else pairs)


def our_step(
    kind: str, settings: dict[str, Any], shape: ModelConfig, batches: Batches, micro_steps: int, device: str
) -> tuple[Step, dict[str, Any]]:
    """training.py's own step."""
    options = [f"--{key}={value}" for key, value in {**asdict(shape), **settings, "dtype": "bf16"}.items()]
    cfg = config.parse_config(training.Config, [option for option in options if not option.endswith("=None")])
    dist = training.Dist(device=torch.device(device))
    model = training.Transformer(cfg.model).to(device)
    training.compile_model(model, cfg, dist)
    if device == "cpu":
        training.keep_memory()
    optimizer, guard = training.build_optimizer(model, cfg.optim), training.safety.Guard(dist.device)
    loader: Any = types.SimpleNamespace(next=lambda: next(batches), numbers=lambda: range(0), weight=1.0)

    def step() -> Tensor:
        unwatched = contextlib.nullcontext()
        return training.train_step(model, optimizer, guard, loader, micro_steps, cfg, dist, unwatched)[0]

    return step, {"parameters": model.num_params(), "flops_per_token": model.flops_per_token()}


def peer_step(
    kind: str, settings: dict[str, Any], shape: ModelConfig, batches: Batches, micro_steps: int, device: str
) -> tuple[Step, dict[str, Any]]:
    """A step as these projects write it: autocast, backward, clip, update. Their FLOPs are counted as ours are."""
    with contextlib.redirect_stdout(io.StringIO()):
        model, optimizer, loss_of = BUILDERS[kind](shape, device, settings.get("path"))
    model.compile(dynamic=False)

    def step() -> Tensor:
        total = torch.zeros((), device=device)
        for _ in range(micro_steps):
            x, y = (tokens.to(device, non_blocking=True) for tokens in next(batches))
            with torch.autocast(device, torch.bfloat16):
                loss = loss_of(model, x, y) / micro_steps
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    matmuls = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    flops = 6 * matmuls + 12 * shape.n_layers * shape.dim * shape.seq_len
    return step, {"parameters": sum(p.numel() for p in model.parameters()), "flops_per_token": flops}


def build_llama(shape: ModelConfig, device: str, path: None) -> tuple[nn.Module, Any, Any]:
    """LlamaForCausalLM, which shifts its labels itself, and torch's fused AdamW."""
    import transformers

    model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**convert_hf.hf_config(shape)))
    model.to(device)
    return model, torch.optim.AdamW(model.parameters(), fused=True), lambda model, x, y: model(x, labels=x).loss


def build_seed(shape: ModelConfig, device: str, path: Path) -> tuple[nn.Module, Any, Any]:
    """The seed's model as its training.py runs it: activation checkpointing, the loss outside, AdamW fused on GPUs."""
    assert shape.ffn_dim
    more = {"ffn_hidden_mult": shape.ffn_dim / shape.dim, "gradient_checkpointing": True}
    model = load(path).Transformer(types.SimpleNamespace(**asdict(shape), **more)).to(device)
    loss_of = lambda model, x, y: F.cross_entropy(model(x)[0].flatten(0, 1), y.flatten())
    return model, torch.optim.AdamW(model.parameters(), fused=device == "cuda"), loss_of


def build_nanogpt(shape: ModelConfig, device: str, path: Path) -> tuple[nn.Module, Any, Any]:
    """nanoGPT with its own optimizer, its vocabulary padded to a multiple of 64 as it recommends."""
    module, vocab_size = load(path), -(-(shape.vocab_size or 0) // 64) * 64
    sizes = {"n_layer": shape.n_layers, "n_head": shape.n_heads, "n_embd": shape.dim, "block_size": shape.seq_len}
    model = module.GPT(module.GPTConfig(vocab_size=vocab_size, dropout=0.0, bias=False, **sizes)).to(device)
    optimizer = model.configure_optimizers(0.1, 3e-4, (0.9, 0.95), device)
    return model, optimizer, lambda model, x, y: model(x, y)[1]


def build_nanochat(shape: ModelConfig, device: str, path: Path) -> tuple[nn.Module, Any, Any]:
    """nanochat's model, full attention in every layer, with its own Muon."""
    sys.path.insert(0, str(path.parent.parent))
    module = importlib.import_module("nanochat.gpt")
    sizes = {"n_layer": shape.n_layers, "n_head": shape.n_heads, "n_kv_head": shape.n_heads, "n_embd": shape.dim}
    cfg = module.GPTConfig(sequence_len=shape.seq_len, vocab_size=shape.vocab_size, window_pattern="L", **sizes)
    model = module.GPT(cfg).to(device)
    model.init_weights()
    return model, model.setup_optimizer(), lambda model, x, y: model(x, y)


BUILDERS: dict[str, Callable[[ModelConfig, str, Any], tuple[nn.Module, Any, Any]]] = {
    LLAMA: build_llama,
    "the seed": build_seed,
    "nanoGPT": build_nanogpt,
    "nanochat": build_nanochat,
}


def load(path: Path) -> Any:
    """The module in a Python file."""
    spec = importlib.util.spec_from_file_location(f"peer_{path.parent.name}", path)
    assert spec and spec.loader
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def matmul_flops_per_s(device: str, dtype: torch.dtype) -> float:
    """What large square matmuls reach on this machine: the best of ten."""
    n, seconds = 8192 if device == "cuda" else 2048, []
    matrix = torch.randn(n, n, device=device, dtype=dtype)
    for _ in range(11):
        started = time.perf_counter()
        torch.mm(matrix, matrix)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return 2 * n**3 / min(seconds[1:])


def train_report(rates: dict[str, Any]) -> str:
    """One row per way, then the promised ratios to the fastest peer: tokens per second, and FLOPs of each one's model."""
    ways, batch, peak = rates["ways"], rates["batch_tokens"], metrics.peak_flops(rates["device"])
    ceiling = rates["ceiling"]["bf16"]
    lines = [
        f"{rates['device']}, torch {rates['torch']}, {batch:,} tokens a step, vocabulary {rates['shape']['vocab_size']:,}; "
        f"bf16 matmuls reach {ceiling / 1e12:.3g} TFLOP/s, fp32 {rates['ceiling']['fp32'] / 1e12:.3g}",
        f"{'':28} parameters  tokens/s (p10..p90)     TFLOP/s  of matmuls{'    MFU' if peak else ''}  peak GB    loss",
    ]
    speeds, flops = {}, {}
    for name, way in ways.items():
        low, speeds[name], high = (batch / s for s in np.quantile(way["seconds"], (0.9, 0.5, 0.1)))
        flops[name] = speeds[name] * way["flops_per_token"]
        between = f"{speeds[name]:9,.0f} ({low:,.0f}..{high:,.0f})"
        mfu = f" {flops[name] / peak:6.1%}" if peak else ""
        lines.append(
            f"{name:28} {way['parameters'] / 1e6:9.1f}M {between:26} {flops[name] / 1e12:6.3g} "
            f"{flops[name] / ceiling:10.1%}{mfu} {way['peak_gb']:8.2f} {way['first_loss']:7.3f}"
        )
    lines += [f"{name:28} {error}" for name, error in rates["errors"].items()]
    if others := [name for name in ways if not name.startswith("ours")]:
        for what, values in {"tokens/s": speeds, "FLOP/s": flops}.items():
            ours = max((name for name in ways if name.startswith("ours")), key=values.__getitem__)
            peer = max(others, key=values.__getitem__)
            lines.append(f"{what} of {ours} / {peer}: {values[ours] / values[peer]:.2f}")
    return "\n".join(lines)
