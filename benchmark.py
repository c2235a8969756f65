"""How fast this machine does each part of the work, side by side with how others do it, as one table.

    python benchmark.py train --peers=peers           # tokens per second, beside other projects: see benchmark_train.py
    python benchmark.py data                          # text to shards, shards to batches, decontamination
    python benchmark.py data --output=data.json       # the same numbers for a program
    python benchmark.py data --source="my/*.jsonl.gz" --repeat=1
    python benchmark.py hellaswag                     # seconds per item, beside lm_eval and the seed's way
    python benchmark.py checkpoint                    # how long a save holds up training
    python benchmark.py decode --rounds=3             # tokens per second of the 416M shape, beside transformers and others
    python benchmark.py decode --checkpoint=runs/mine --source=data/mine   # what bf16 and int8 cost in validation loss

Everything of one table is measured in one run, best of --rounds: compare rows, not days. Reads the source (default: real
text beside the repository, or else the Python reference), writes only below a temporary folder.
"""

import contextlib
import copy
import functools
import gzip
import importlib.util
import io
import itertools
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

import config
from data_pipeline import _cores, decontaminate, find_files, prepare, read_chunks, verify
from shards import TokenLoader, load_tokenizer

TEXTBOOKS = Path(__file__).resolve().parent.parent / "shared" / "data" / "textbooks"
ITEMS = TEXTBOOKS.parent / "hellaswag_val_2000.jsonl"


def best(rounds: int, work: Callable[[], Any]) -> float:
    """Seconds of the fastest of `rounds` calls."""
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


NUMPY, SEED = "tiktoken to numpy, 1 core", "the seed's way"


# ---- data ------------------------------------------------------------------------------------------------------------


def data_benchmark(source: str, repeat: int, rounds: int, folder: Path) -> dict[str, float]:
    """Rates in MB/s of text (gpt2 tokens to uint16), batches/s and tokens/s."""
    files, documents = _corpus(source, repeat, folder)
    megabytes = sum(len(text.encode()) for text in documents) / 1e6
    print(f"{megabytes:.0f} MB of text in {len(documents):,} documents, {_cores()} cores", flush=True)
    rates: dict[str, float] = {"text_mb": megabytes, "cores": _cores()}

    def measure(name: str, work: Callable[[], Any], share: float = 1.0) -> None:
        rates[name] = megabytes * share / best(rounds, work)
        print(f"  {name:44} {rates[name]:8.1f} MB/s", flush=True)

    some = documents[: len(documents) // repeat]  # in-memory text, to arrays; one copy of it shows their rate
    load_tokenizer("gpt2")
    measure(NUMPY, lambda: _numpy_way(some), 1 / repeat)
    measure("nanoGPT's way", lambda: _nanogpt_way(some, folder), 1 / repeat)
    measure(SEED, lambda: _seed_way(some, folder), 1 / repeat)
    measure("build-nanogpt's way", lambda: _build_nanogpt_way(some), 1 / repeat)
    for name, fast in ("tiktoken", False), ("fast encoder", True):
        shards = folder / f"fast_{fast}"
        measure(f"prepare, {name}, .jsonl.gz to verified shards", functools.partial(_prepare, files, shards, fast))
        rates[f"prepare_{fast}_peak_gb"] = _peak_gb(files, folder, fast)
    rates |= _loader_rates(folder / "fast_True", rounds)
    rates["decontaminate_tokens_per_s"] = _decontamination_rate(folder / "fast_True", folder, documents)
    return rates


def _corpus(source: str, repeat: int, folder: Path) -> tuple[str, list[str]]:
    """(pattern of `repeat` links to each file of the source, the documents they hold)."""
    links, texts = folder / "source", []
    links.mkdir()
    for i, path in enumerate(find_files(source)):
        texts += [json.loads(line)["text"] for c in read_chunks([path], "text") for line in c.data.split(b"\n") if line]
        for r in range(repeat):
            (links / f"{r:03}-{i:03}{''.join(Path(path).suffixes)}").symlink_to(Path(path).resolve())
    return f"{links}/*", texts * repeat


def _prepare(files: str, shards: Path, fast: bool) -> None:
    shutil.rmtree(shards, ignore_errors=True)
    with contextlib.redirect_stdout(io.StringIO()):
        prepare(files, str(shards), fast=fast, shard_tokens=10_000_000, val_tokens=100_000)
        verify(str(shards))


def _peak_gb(files: str, folder: Path, fast: bool) -> float:
    """Peak memory of `prepare` and its workers together, in GB (their shared pages counted once for each)."""
    code = (
        "import resource, sys; from data_pipeline import prepare; "
        "prepare(sys.argv[1], sys.argv[2], fast=sys.argv[3] == 'True', shard_tokens=10_000_000, workers=2); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    command = [sys.executable, "-c", code, files, str(folder / f"peak_{fast}"), str(fast)]
    result = subprocess.run(command, cwd=Path(__file__).parent, check=True, capture_output=True, text=True)
    main, worker = map(int, result.stdout.splitlines()[-1].split())
    return (main + 2 * worker) / 1e6


def _numpy_way(documents: Iterable[str]) -> None:
    tokenizer = load_tokenizer("gpt2")
    np.concatenate([tokenizer.encode_array(text) for text in documents]).astype(np.uint16)


def _nanogpt_way(documents: list[str], folder: Path) -> None:
    """datasets.map, one document at a time, then a memory map filled in 1,024 batches."""
    import tiktoken
    from datasets import Dataset

    encoding = tiktoken.get_encoding("gpt2")

    def process(example: dict[str, Any]) -> dict[str, Any]:
        ids = encoding.encode_ordinary(example["text"])
        ids.append(encoding.eot_token)
        return {"ids": ids, "len": len(ids)}

    dataset = Dataset.from_dict({"text": documents})
    tokenized = dataset.map(process, remove_columns=["text"], num_proc=_cores())
    total = int(np.sum(tokenized["len"], dtype=np.uint64))
    array, at = np.memmap(folder / "nanogpt.bin", dtype=np.uint16, mode="w+", shape=(total,)), 0
    for index in range(min(1024, len(tokenized))):
        shard = tokenized.shard(min(1024, len(tokenized)), index, contiguous=True).with_format("numpy")
        ids = np.concatenate(shard["ids"])
        array[at : at + len(ids)] = ids
        at += len(ids)
    array.flush()


def _seed_way(documents: list[str], folder: Path) -> None:
    """datasets.map in batches of 1,000 to rows of one token, a second map to rows of 1,025, save_to_disk."""
    import tiktoken
    from datasets import Dataset

    encoding = tiktoken.get_encoding("gpt2")

    def tokenize(batch: dict[str, list[str]]) -> dict[str, list[int]]:
        tokens: list[int] = []
        for text in batch["text"]:
            tokens.extend([*encoding.encode(text, disallowed_special=()), encoding.eot_token])
        return {"input_ids": tokens}

    def chunk(batch: dict[str, list[int]]) -> dict[str, list[list[int]]]:
        ids = batch["input_ids"]
        return {"input_ids": [ids[i : i + 1025] for i in range(0, len(ids) - 1024, 1025)]}

    dataset = Dataset.from_dict({"text": documents})
    flat = dataset.map(tokenize, batched=True, batch_size=1000, remove_columns=["text"], num_proc=_cores())
    flat.map(chunk, batched=True, batch_size=1025 * 2000, num_proc=_cores()).save_to_disk(folder / "seed")


def _build_nanogpt_way(documents: list[str]) -> None:
    """A pool of processes, one document per call, one numpy array back."""
    with multiprocessing.get_context("fork").Pool(_cores()) as pool:
        list(pool.imap(_tokenize_document, documents, chunksize=16))


def _tokenize_document(text: str) -> np.ndarray:
    import tiktoken

    encoding = tiktoken.get_encoding("gpt2")
    tokens = [encoding.eot_token, *encoding.encode_ordinary(text)]
    return np.array(tokens).astype(np.uint16)


def _loader_rates(shards: Path, rounds: int) -> dict[str, float]:
    """Batches of 40 x 1024 per second: ours, and nanoGPT's random crops of one memory map."""
    import torch

    loader = TokenLoader({str(shards): 1.0}, seq_len=1024, batch_size=40, batch_sequences=40)
    ours = 300 / best(rounds, lambda: [loader.next() for _ in range(300)])
    loader.close()
    tokens = np.memmap(shards / "train_000000.bin", dtype=np.uint16, mode="r", offset=1024)

    def crops() -> None:
        for _ in range(100):
            starts = torch.randint(len(tokens) - 1024, (40,))
            for shift in 0, 1:
                torch.stack([torch.from_numpy(tokens[i + shift : i + shift + 1024].astype(np.int64)) for i in starts])

    theirs = 100 / best(rounds, crops)
    print(
        f"  {'TokenLoader, batches of 40 x 1024':44} {ours:8.0f} /s = {ours * 40 * 1024 / 1e6:.0f}M tokens/s",
        flush=True,
    )
    print(f"  {'nanoGPT random crops':44} {theirs:8.0f} /s", flush=True)
    return {"loader_batches_per_s": ours, "nanogpt_batches_per_s": theirs}


def _decontamination_rate(shards: Path, folder: Path, documents: list[str]) -> float:
    """Tokens/s of one process per core, against 2,000 items cut from other text of the corpus's kind."""
    words = " ".join(documents[:200]).split()
    items = [" ".join(reversed(words[i : i + 40])) for i in range(0, min(len(words), 80_000), 40)]
    (folder / "items.jsonl").write_text("".join(json.dumps({"text": item}) + "\n" for item in items))
    tokens = sum(s["tokens"] for s in json.loads((shards / "meta.json").read_text())["shards"] if s["split"] == "train")
    with contextlib.redirect_stdout(io.StringIO()):
        rate = tokens / best(1, lambda: decontaminate(str(shards), against=str(folder / "items.jsonl")))
    print(f"  {'decontaminate':44} {rate / 1e6:8.2f}M tokens/s", flush=True)
    return rate


def report(rates: dict[str, float]) -> str:
    """The ratios that the project promises, and what they mean for 10B tokens (45 GB of text)."""
    slow, fast = (rates[f"prepare, {name}, .jsonl.gz to verified shards"] for name in ("tiktoken", "fast encoder"))
    cores, search = rates["cores"], rates["decontaminate_tokens_per_s"]
    lines = [
        f"prepare with tiktoken / (cores x its rate on one): {slow / cores / rates[NUMPY]:.2f}",
        f"prepare with the fast encoder / the seed's way:    {fast / rates[SEED]:.1f}",
        f"peak memory of prepare with 2 workers:             {rates['prepare_True_peak_gb']:.2f} GB",
        f"10B tokens on {cores:.0f} cores like these:              {45e3 / fast / 60:.0f} minutes",
        f"10B tokens decontaminated on 64 such cores:        {10e9 / (search / cores * 64) / 60:.0f} minutes",
    ]
    return "\n".join(lines)


# ---- checkpoint ------------------------------------------------------------------------------------------------------


def checkpoint_benchmark(rounds: int, folder: Path) -> dict[str, float]:
    """Seconds that a save keeps the training loop waiting: plain torch.save against checkpoint.Writer; medians."""
    import torch

    import checkpoint
    from model import ModelConfig, Transformer
    from optimizers import OptimConfig, build_optimizer

    model = Transformer(ModelConfig(dim=512, n_layers=8, n_heads=8, vocab_size=50257, seq_len=256))
    optimizer = build_optimizer(model, OptimConfig())
    tokens = torch.randint(0, 50257, (1, 64))
    model(tokens, tokens).backward()
    optimizer.step()

    def plain() -> None:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder / "plain.pt")

    writer = checkpoint.Writer(folder)

    def ours() -> None:
        writer.save(step=1, model=model, optimizer=optimizer, permanent=True)

    times: dict[str, list[float]] = {"plain": [], "blocked": [], "written": []}
    for _ in range(rounds + 1):
        times["plain"].append(best(1, plain))
        times["blocked"].append(best(1, ours))
        times["written"].append(times["blocked"][-1] + best(1, writer.wait))
    rates = {f"{name}_s": statistics.median(values[1:]) for name, values in times.items()}  # the first fills buffers
    rates["first_blocked_s"] = times["blocked"][0]
    return {"state_gb": (folder / "plain.pt").stat().st_size / 1e9, **rates}


def checkpoint_report(rates: dict[str, float]) -> str:
    """The promise: a save blocks at most a quarter of what torch.save does."""
    return "\n".join(
        [
            f"state                              {rates['state_gb']:.2f} GB",
            f"plain torch.save blocks            {rates['plain_s'] * 1e3:.0f} ms",
            f"checkpoint.Writer.save blocks      {rates['blocked_s'] * 1e3:.0f} ms"
            f" ({rates['blocked_s'] / rates['plain_s']:.1%}); the first save {rates['first_blocked_s'] * 1e3:.0f} ms",
            f"on the disk, fsync included, after {rates['written_s'] * 1e3:.0f} ms",
        ]
    )


# ---- hellaswag -------------------------------------------------------------------------------------------------------


def hellaswag_benchmark(data: str, n_items: int, rounds: int, peers: str | None, folder: Path) -> dict[str, Any]:
    """Seconds per item of each way to score the same items with the same 48.5M weights, one round after the other."""
    import torch

    import eval_hellaswag
    from model import ModelConfig, Transformer

    torch.manual_seed(0)
    shape = ModelConfig(dim=512, n_layers=6, n_heads=8, ffn_dim=1792, vocab_size=50257, qk_norm=False)
    model, tokenizer = Transformer(shape).eval(), load_tokenizer("gpt2")
    items = eval_hellaswag.load_items(data, n_items)
    ways: dict[str, Callable[[], list[float]]] = {
        f"ours, {name}": functools.partial(_our_way, model, tokenizer, items, dtype)
        for name, dtype in (("fp32", None), ("bf16", torch.bfloat16))
    }
    ways["the seed's way, bf16 autocast"] = functools.partial(_one_by_one_way, model, tokenizer, items)
    ways["build-nanogpt's way, fp32"] = functools.partial(_four_by_four_way, model, tokenizer, items)
    with contextlib.suppress(ImportError):
        ways |= _harness_ways(model, tokenizer, items, folder)
    for name, way in _functions_of(peers).items():
        ways[name] = functools.partial(way, model, tokenizer, items)
    return {"items": len(items), "threads": torch.get_num_threads(), "ways": _timed(ways, len(items), rounds)}


def _timed(ways: dict[str, Callable[[], list[float]]], n: int, rounds: int) -> dict[str, dict[str, Any]]:
    """{way: seconds per item of each round, their median, largest difference of a log-likelihood from the first way's}."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    sums: dict[str, list[float]] = {}
    for _ in range(rounds + 1):  # the first is to warm up
        for name, way in ways.items():
            started = time.perf_counter()
            sums[name] = way()
            seconds[name].append((time.perf_counter() - started) / n)
    first = np.array(next(iter(sums.values())))
    return {
        name: {
            "seconds_per_item": statistics.median(values[1:]),
            "rounds": values[1:],
            "largest_difference": float(np.abs(np.array(sums[name]) - first).max()),
        }
        for name, values in seconds.items()
    }


def _our_way(model: Any, tokenizer: Any, items: list[Any], dtype: Any) -> list[float]:
    import eval_hellaswag

    scores = eval_hellaswag.evaluate(model, tokenizer, items, dtype=dtype)
    return [value for item in scores["items"] for value in item["logprob_sums"]]


def _pairs(tokenizer: Any, item: Any) -> list[tuple[list[int], int]]:
    """[(all tokens, how many of them are the context's)] of the four endings."""
    n_context = len(tokenizer.encode(item.context.rstrip()))
    return [(tokenizer.encode(f"{item.context} {ending}"), n_context) for ending in item.endings]


def _one_by_one_way(model: Any, tokenizer: Any, items: list[Any]) -> list[float]:
    """One forward pass per ending, all logits."""
    import torch

    sums = []
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        for tokens, n in (pair for item in items for pair in _pairs(tokenizer, item)):
            logprobs = model(torch.tensor([tokens[:-1]]))[0].float().log_softmax(-1)  # [T, V]
            sums.append(float(logprobs[n - 1 :].gather(-1, torch.tensor(tokens[n:])[:, None]).sum()))
    return sums


def _four_by_four_way(model: Any, tokenizer: Any, items: list[Any]) -> list[float]:
    """The four endings of an item padded to one length, all logits, then the loss where the ending is."""
    import torch

    sums: list[float] = []
    with torch.inference_mode():
        for pairs in (_pairs(tokenizer, item) for item in items):
            tokens = torch.zeros(4, max(len(ids) for ids, _ in pairs), dtype=torch.long)
            targets = torch.full_like(tokens, -100)
            for row, (ids, n) in enumerate(pairs):
                tokens[row, : len(ids)], targets[row, n : len(ids)] = torch.tensor(ids), torch.tensor(ids[n:])
            logits = model(tokens)[:, :-1].flatten(0, 1)  # [4*(T-1), V]
            loss = torch.nn.functional.cross_entropy(logits, targets[:, 1:].flatten(), reduction="none")
            sums += (-loss.view(4, -1).sum(-1)).tolist()
    return sums


def _harness_ways(model: Any, tokenizer: Any, items: list[Any], folder: Path) -> dict[str, Callable[[], list[float]]]:
    """lm-evaluation-harness on the exported weights: in batches of 8, of 1 (its default), and of 8 in bf16."""
    from lm_eval.api.instance import Instance
    from lm_eval.models import huggingface

    import convert_hf

    harness: Any = huggingface  # a decorator hides the class's arguments from type checkers
    (folder / "llama").mkdir()
    convert_hf.write_folder(folder / "llama", model, tokenizer, {})
    pairs = [(item.context, f" {ending}") for item in items for ending in item.endings]

    def score(lm: Any) -> list[float]:
        requests: Any = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
        with contextlib.redirect_stderr(io.StringIO()):
            return [float(answer[0]) for answer in lm.loglikelihood(requests, disable_tqdm=True)]

    settings: Any = {
        f"lm_eval HFLM, {dtype}, batch {size}": {
            "batch_size": size,
            "dtype": {"fp32": "float32", "bf16": "bfloat16"}[dtype],
        }
        for dtype, size in (("fp32", 8), ("fp32", 1), ("bf16", 8))
    }
    return {
        name: functools.partial(score, harness.HFLM(pretrained=str(folder / "llama"), device="cpu", **options))
        for name, options in settings.items()
    }


def _functions_of(file: str | None) -> dict[str, Callable[..., list[float]]]:
    """The public functions of a Python file, each (model, tokenizer, items) -> log-likelihoods; {} without a file."""
    if file is None:
        return {}
    spec = importlib.util.spec_from_file_location("peers", file)
    if spec is None or spec.loader is None or not Path(file).is_file():
        raise ValueError(f"--peers={file} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    own: list[Any] = [f for f in vars(module).values() if callable(f) and getattr(f, "__module__", None) == "peers"]
    return {f.__name__: f for f in own if not f.__name__.startswith("_")}


def hellaswag_report(rates: dict[str, Any]) -> str:
    """One row per way; how many times as fast the fp32 and bf16 rows of ours are."""
    ways = rates["ways"]
    fp32, bf16 = (ways[f"ours, {name}"]["seconds_per_item"] for name in ("fp32", "bf16"))
    lines = [f"{'':32} s/item (min..max)          ours fp32  ours bf16  largest difference, nats"]
    for name, way in ways.items():
        s, all_s = way["seconds_per_item"], way["rounds"]
        lines.append(
            f"{name:32} {s:.4f} ({min(all_s):.4f}..{max(all_s):.4f})  {s / fp32:8.1f}x {s / bf16:9.1f}x"
            f"  {way['largest_difference']:.5f}"
        )
    return "\n".join(lines)


# ---- decode ----------------------------------------------------------------------------------------------------------

SHAPE_124M: dict[str, Any] = {"dim": 768, "n_layers": 12, "n_heads": 12, "ffn_dim": 2048, "vocab_size": 50257}


def decode_benchmark(rounds: int, n_tokens: int, device: str, peers: str | None = None, **shape: Any) -> dict[str, Any]:
    """New tokens per second, prompt of 32 included, of each way to decode the same random weights, one round after the other."""
    import torch

    import inference
    from model import ModelConfig, Transformer

    torch.manual_seed(0)
    model = Transformer(ModelConfig(**{"vocab_size": 50257, "qk_norm": False, **shape})).to(device).eval()
    prompt = torch.randint(0, 50257, (32,), generator=torch.Generator().manual_seed(0)).tolist()
    ways: dict[str, Callable[[int], list[int]]] = {}
    reads: dict[str, int] = {}

    def add(name: str, dtype: str, way: Callable[[int], list[int]], network: Any = model) -> None:
        ways[f"{name}, {dtype}"], reads[f"{name}, {dtype}"] = way, inference.bytes_per_token(network, dtype)

    for dtype in ("fp32", "bf16", "int8"):
        ready = inference.prepare(copy.deepcopy(model), dtype)
        step = inference.Step(ready) if device.startswith("cuda") else None
        if step is not None:
            step.compile(mode="reduce-overhead", fullgraph=True)
        ours = functools.partial(_our_way_to_decode, ready, prompt)
        add("ours", dtype, functools.partial(ours, step=step))
        if (
            dtype != "fp32"
        ):  # random weights soon go round in circles, the text that repeats itself; drawn they never do
            add("ours, guessing ahead", dtype, functools.partial(ours, lookup=8))
            add("ours, drawn", dtype, functools.partial(ours, temperature=1.0, seed=0))
            add("ours, drawn, guessing ahead", dtype, functools.partial(ours, temperature=1.0, seed=0, lookup=8))
            add("ours, batch of 8", dtype, functools.partial(_our_batch, ready, prompt))
    for dtype, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        plain = copy.deepcopy(model).to(kind)
        for name, way in {SEED: _seed_way_to_decode, **_functions_of(peers)}.items():
            add(name, dtype, functools.partial(way, plain, prompt))
        for cache in ("dynamic", "static"):
            with contextlib.suppress(ImportError):
                add(f"transformers, {cache} cache", dtype, _transformers_way(plain, prompt, cache))
        if not shape:
            small = Transformer(ModelConfig(**SHAPE_124M, qk_norm=False)).to(device, kind).eval()
            way = functools.partial(_our_way_to_decode, small, prompt, use_cache=False)
            add("nanoGPT's way (no cache), 124M", dtype, way, small)
    memory = inference.bandwidth(torch.device(device))
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):  # the first is to warm up
        for name, way in ways.items():
            started = time.perf_counter()
            made = len(way(n_tokens if turn else 8))
            rates[name] += [made / (time.perf_counter() - started)] if turn else []
        memory = max(memory, inference.bandwidth(torch.device(device)))
    found = {
        name: {"tokens_per_s": statistics.median(r), "rounds": r, "gb_per_s": statistics.median(r) * reads[name] / 1e9}
        for name, r in rates.items()
    }
    facts = {"parameters": model.num_params(), "new_tokens": n_tokens, "threads": torch.get_num_threads()}
    return {**facts, "device": device, "memory_gb_per_s": memory / 1e9, "ways": found}


def _seed_way_to_decode(model: Any, prompt: list[int], n_tokens: int) -> list[int]:
    """Weights as they come, all logits, the cache beforehand, text and tokens glued on the device."""
    import torch

    from model import KVCache

    tokens = new = torch.tensor([prompt], device=model.embed_tokens.weight.device)
    cache = KVCache(len(prompt) + n_tokens)
    with torch.inference_mode():
        for _ in range(n_tokens):
            new = model(new, cache=cache)[:, -1].argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, new], dim=1)
    return tokens[0, len(prompt) :].tolist()


def _our_way_to_decode(model: Any, prompt: list[int], n_tokens: int, **options: Any) -> list[int]:
    from model import generate

    return list(generate(model, prompt, n_tokens, **{"temperature": 0.0, **options}))


def _our_batch(model: Any, prompt: list[int], n_tokens: int) -> list[int]:
    from model import generate_batch

    return [token for row in generate_batch(model, [prompt] * 8, n_tokens, temperature=0.0) for token in row]


def _transformers_way(model: Any, prompt: list[int], cache: str) -> Callable[[int], list[int]]:
    """transformers' generate on the same weights in memory."""
    import torch
    import transformers

    import convert_hf

    config = transformers.LlamaConfig(**{**convert_hf.hf_config(model.config), "torch_dtype": model.norm.weight.dtype})
    with torch.device("meta"):
        network: Any = transformers.LlamaForCausalLM(config)
    weights = convert_hf.to_hf(model)
    network.load_state_dict({"lm_head.weight": weights["model.embed_tokens.weight"], **weights}, assign=True)
    network.model.rotary_emb = type(network.model.rotary_emb)(config)
    network.to(model.norm.weight.device).eval()
    ids = torch.tensor([prompt], device=model.norm.weight.device)
    options: Any = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}
    options |= {"cache_implementation": "static", "disable_compile": True} if cache == "static" else {}

    def run(n: int) -> list[int]:
        with torch.inference_mode():
            text = network.generate(ids, max_new_tokens=n, min_new_tokens=n, **options)
        return text[0, len(prompt) :].tolist()

    return run


def decode_report(rates: dict[str, Any]) -> str:
    """One row per way, and how the promised ratios came out."""
    ways, memory = rates["ways"], rates["memory_gb_per_s"]
    lines = [
        f"{rates['parameters'] / 1e6:.0f}M parameters, 32 + {rates['new_tokens']} tokens, {rates['device']}, "
        f"{rates['threads']} threads, memory {memory:.1f} GB/s",
        f"{'':42} tokens/s (min..max)   GB/s of weights  of the memory's",
    ]
    for name, way in ways.items():
        low, high = min(way["rounds"]), max(way["rounds"])
        share = (
            "" if any(word in name for word in ("batch", "ahead", "no cache")) else f"{way['gb_per_s'] / memory:.0%}"
        )
        moved = f"{way['gb_per_s']:16.1f} {share:>15}" if share else ""
        lines.append(f"{name:42} {way['tokens_per_s']:8.1f} ({low:.1f}..{high:.1f}) {moved}")

    def ratio(one: str, *others: str) -> str:
        return f"{ways[one]['tokens_per_s'] / max(ways[name]['tokens_per_s'] for name in others):.2f}"

    peers = [name for name in ways if name.endswith("bf16") and not name.startswith(("ours", "nanoGPT"))]
    lines += [
        f"bf16 / the best peer's bf16 (1.2 promised):     {ratio('ours, bf16', *peers)}",
        f"int8 / our bf16 (1.6):                          {ratio('ours, int8', 'ours, bf16')}",
        f"int8 / the seed's fp32 (3.5):                   {ratio('ours, int8', f'{SEED}, fp32')}",
    ]
    for dtype in ("bf16", "int8"):
        loop = ratio(f"ours, guessing ahead, {dtype}", f"ours, {dtype}")
        other = ratio(f"ours, drawn, guessing ahead, {dtype}", f"ours, drawn, {dtype}")
        lines.append(f"{dtype}, guessing ahead, in a loop / else (1.3 / 1): {loop} / {other}")
    return "\n".join(lines)


def loss_benchmark(path: str, source: str, n_tokens: int, device: str) -> dict[str, float]:
    """Validation loss of a checkpoint, nats per token, with the weights that each --dtype of chat.py makes of it."""
    import torch

    import checkpoint
    import inference
    from shards import validation_batches

    losses = {}
    for dtype in ("fp32", "bf16", "int8"):
        model = inference.prepare(checkpoint.load_model(path, device)[0], dtype)
        total, count = 0.0, 0
        with torch.inference_mode():
            for inputs, targets in validation_batches(
                {source: 1.0}, seq_len=model.config.seq_len, batch_size=4, max_tokens=n_tokens
            ):
                total += float(model(inputs.to(device), targets.to(device), reduction="sum"))
                count += int((targets >= 0).sum())
        losses[dtype] = total / count
        print(
            f"{dtype}  validation loss {losses[dtype]:.5f} over {count:,} tokens ({losses[dtype] - losses['fp32']:+.5f})"
        )
    return losses


# ---- command line ----------------------------------------------------------------------------------------------------


def main() -> None:
    parser = config.ArgumentParser()
    parser.add_argument(
        "section", choices=["train", "data", "checkpoint", "hellaswag", "decode"], help="what to measure"
    )
    parser.add_argument("--source", default="", help="JSONL files of text (default: ../shared/data/textbooks/train*)")
    parser.add_argument("--repeat", type=int, default=40, help="times to read the source, for enough text [40]")
    parser.add_argument("--rounds", type=int, default=2, help="measurements of which the best counts [2]")
    parser.add_argument("--data", default=str(ITEMS), help="HellaSwag items (.jsonl) (default: ../shared/data)")
    parser.add_argument("--num_examples", type=int, default=150, help="the first N of them [150]")
    parser.add_argument(
        "--peers",
        help="a .py file of other ways: functions of (model, tokenizer, items); decode: of (model, prompt, n_tokens); "
        "train: a folder of other projects' files",
    )
    parser.add_argument("--new_tokens", type=int, default=128, help="decode: tokens to write [128]")
    parser.add_argument("--vocab_size", type=int, default=50257, help="train: size of the vocabulary [50257]")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="train and decode: cpu or cuda [cpu]")
    parser.add_argument("--checkpoint", help="decode: measure validation loss instead, on the shards in --source")
    parser.add_argument("--output", help="write the numbers to this .json file")
    args = parser.parse_args()
    if args.section == "train":
        import benchmark_train  # its processes import it too: torch at once
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.section == "train":
            rates = benchmark_train.train_benchmark(args.device, args.vocab_size, args.rounds, args.peers)
            print(benchmark_train.train_report(rates))
        elif args.section == "data":
            source = args.source or (f"{TEXTBOOKS}/train*" if TEXTBOOKS.exists() else _reference(folder))
            rates = data_benchmark(source, args.repeat, args.rounds, folder)
            print(report(rates))
        elif args.section == "hellaswag":
            rates = hellaswag_benchmark(args.data, args.num_examples, args.rounds, args.peers, folder)
            print(hellaswag_report(rates))
        elif args.section == "decode" and args.checkpoint:
            rates = loss_benchmark(args.checkpoint, args.source, 50_000, args.device)
        elif args.section == "decode":
            rates = decode_benchmark(args.rounds, args.new_tokens, args.device, args.peers)
            print(decode_report(rates))
        else:
            rates = checkpoint_benchmark(args.rounds, folder)
            print(checkpoint_report(rates))
    if args.output:
        Path(args.output).write_text(json.dumps(rates, indent=1) + "\n")


def _reference(folder: Path) -> str:
    from pydoc_data.topics import topics

    lines = itertools.chain.from_iterable(itertools.repeat([json.dumps({"text": t}) for t in topics.values()], 40))
    (folder / "reference.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    return str(folder / "reference.jsonl.gz")


if __name__ == "__main__":
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as training does
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    config.run(main)
