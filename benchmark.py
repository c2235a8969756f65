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
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

import config
from data_pipeline import _cores, decontaminate, find_files, prepare, read_chunks, verify
from shards import TokenLoader, load_tokenizer

TEXTBOOKS = Path(__file__).resolve().parent.parent / "shared" / "data" / "textbooks"
ITEMS = TEXTBOOKS.parent / "hellaswag_val_2000.jsonl"
NUMPY, NUMPY_EVERYWHERE, SEED = "tiktoken to numpy, 1 core", "tiktoken to numpy, all cores", "the seed's way"


def best(rounds: int, work: Callable[[], Any]) -> float:
    """Seconds of the fastest of `rounds` calls."""
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


def in_turns(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[tuple[float, Any]]]:
    """{way: (seconds, result) of each round}. In a round all take their turn, so that a busy minute hits them alike."""
    found: dict[str, list[tuple[float, Any]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            started = time.perf_counter()
            result = way()
            found[name].append((time.perf_counter() - started, result))
    return found


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
    with ProcessPoolExecutor(_cores(), multiprocessing.get_context("spawn")) as pool:
        everywhere = [some] * _cores()
        list(pool.map(_numpy_way, everywhere))  # starts the processes
        measure(NUMPY_EVERYWHERE, lambda: list(pool.map(_numpy_way, everywhere)), _cores() / repeat)
    measure(SEED, lambda: _seed_way(some, folder), 1 / repeat)
    measure("build-nanogpt's way", lambda: _build_nanogpt_way(some), 1 / repeat)
    for name, fast in ("tiktoken", False), ("fast encoder", True):
        work = functools.partial(_prepare, files, folder / "shards", fast)
        measure(f"prepare, {name}, .jsonl.gz to verified shards", work)
    rates["prepare_peak_gb"] = _peak_gb(files, folder)
    rates |= _loader_rates(folder / "shards", rounds)
    rates["decontaminate_tokens_per_s"] = _decontamination_rate(folder / "shards", folder, documents)
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


def _peak_gb(files: str, folder: Path) -> float:
    """Peak memory of `prepare` and 2 workers together, in GB (their shared pages counted once for each)."""
    code = (
        "import resource, sys; from data_pipeline import prepare; "
        "prepare(sys.argv[1], sys.argv[2], fast=True, shard_tokens=10_000_000, workers=2); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    command = [sys.executable, "-c", code, files, str(folder / "peak")]
    result = subprocess.run(command, cwd=Path(__file__).parent, check=True, capture_output=True, text=True)
    main, worker = map(int, result.stdout.splitlines()[-1].split())
    return (main + 2 * worker) / 1e6


def _numpy_way(documents: Iterable[str]) -> None:
    tokenizer = load_tokenizer("gpt2")
    np.concatenate([tokenizer.encode_array(text) for text in documents]).astype(np.uint16)


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
    print(f"  {'TokenLoader, batches of 40 x 1024':44} {ours:8.0f} /s = {ours * 40 * 1024 / 1e6:.0f}M tokens/s")
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


def data_report(rates: dict[str, float]) -> str:
    """The ratios that the project promises, and what they mean for 10B tokens (45 GB of text)."""
    slow, fast = (rates[f"prepare, {name}, .jsonl.gz to verified shards"] for name in ("tiktoken", "fast encoder"))
    cores, search = rates["cores"], rates["decontaminate_tokens_per_s"]
    lines = [
        f"prepare with tiktoken / (cores x its rate on one): {slow / cores / rates[NUMPY]:.2f}",
        f"... / what {cores:.0f} processes reach that only encode:       {slow / rates[NUMPY_EVERYWHERE]:.2f}",
        f"prepare with the fast encoder / the seed's way:    {fast / rates[SEED]:.1f}",
        f"peak memory of prepare with 2 workers:             {rates['prepare_peak_gb']:.2f} GB",
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

    turns = in_turns({"plain": plain, "blocked": ours, "waited": writer.wait}, rounds + 1)
    plain_s, blocked_s, waited_s = (np.array([seconds for seconds, _ in turn]) for turn in turns.values())
    times = {"plain_s": plain_s, "blocked_s": blocked_s, "written_s": blocked_s + waited_s}
    rates = {name: float(np.median(values[1:])) for name, values in times.items()}  # the first fills buffers
    rates["first_blocked_s"] = float(blocked_s[0])
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
    return {"items": len(items), "threads": torch.get_num_threads(), "ways": _scored(ways, len(items), rounds)}


def _scored(ways: dict[str, Callable[[], list[float]]], n: int, rounds: int) -> dict[str, dict[str, Any]]:
    """{way: seconds per item of each round, their median, largest difference of a log-likelihood from the first way's}."""
    turns = {name: turn[1:] for name, turn in in_turns(ways, rounds + 1).items()}  # the first is to warm up
    first = np.array(next(iter(turns.values()))[-1][1])
    return {
        name: {
            "seconds_per_item": statistics.median(seconds / n for seconds, _ in turn),
            "rounds": [seconds / n for seconds, _ in turn],
            "largest_difference": float(np.abs(np.array(turn[-1][1]) - first).max()),
        }
        for name, turn in turns.items()
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

    def way(dtype: str, batch_size: int) -> Callable[[], list[float]]:
        lm = harness.HFLM(pretrained=str(folder / "llama"), device="cpu", dtype=dtype, batch_size=batch_size)
        return functools.partial(score, lm)

    settings = (("fp32", "float32", 8), ("fp32", "float32", 1), ("bf16", "bfloat16", 8))
    return {f"lm_eval HFLM, {name}, batch {size}": way(dtype, size) for name, dtype, size in settings}


def _functions_of(file: str | None) -> dict[str, Callable[..., list[float]]]:
    """The public functions of a Python file, each (model, tokenizer, items) -> log-likelihoods; {} without a file."""
    if file is None:
        return {}
    if not Path(file).is_file():
        raise ValueError(f"--peers={file} is no Python file")
    from benchmark_train import load

    module = load(Path(file))
    own: list[Any] = [f for f in vars(module).values() if getattr(f, "__module__", None) == module.__name__]
    return {f.__name__: f for f in own if not f.__name__.startswith("_")}  # what it imports is left out


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


def decode_benchmark(rounds: int, n_tokens: int, device: str, peers: str | None = None, **shape: Any) -> dict[str, Any]:
    """New tokens per second, prompt of 32 included, of each way to decode the same random weights, one round after the other."""
    import torch

    import inference
    from model import ModelConfig, Transformer

    torch.manual_seed(0)
    model = Transformer(ModelConfig(**{"vocab_size": 50257, "qk_norm": False, **shape})).to(device).eval()
    prompt = torch.randint(0, 50257, (32,), generator=torch.Generator().manual_seed(0)).tolist()
    ways = _our_ways_to_decode(model, prompt) | _their_ways_to_decode(model, prompt, peers)
    for way in ways.values():  # warm up
        way(8)
    timed = {name: functools.partial(way, n_tokens) for name, way in ways.items()}
    turns = in_turns({**timed, "memory": lambda: inference.bandwidth(model.norm.weight.device)}, rounds)
    memory = max(bytes_per_s for _, bytes_per_s in turns.pop("memory"))
    found = {}
    for name, turn in turns.items():
        rates = [len(made) / seconds for seconds, made in turn]
        reads = inference.bytes_per_token(model, name.rpartition(", ")[2])
        speed = statistics.median(rates)
        found[name] = {"tokens_per_s": speed, "rounds": rates, "gb_per_s": speed * reads / 1e9}
    facts = {"parameters": model.num_params(), "new_tokens": n_tokens, "threads": torch.get_num_threads()}
    return {**facts, "device": device, "memory_gb_per_s": memory / 1e9, "ways": found}


def _our_ways_to_decode(model: Any, prompt: list[int]) -> dict[str, Callable[[int], list[int]]]:
    """{"what, dtype": way}. Random weights soon go round in circles, the text that repeats itself; drawn they never do."""
    import inference

    ways: dict[str, Callable[[int], list[int]]] = {}
    for dtype in ("fp32", "bf16", "int8"):
        ready = inference.prepare(copy.deepcopy(model), dtype)
        step = inference.Step(ready) if model.norm.weight.is_cuda else None
        if step is not None:
            step.compile(mode="reduce-overhead", fullgraph=True)
        ours = functools.partial(_our_way_to_decode, ready, prompt)
        drawn = functools.partial(ours, temperature=1.0, seed=0)
        ways[f"ours, {dtype}"] = functools.partial(ours, step=step)
        if dtype != "fp32":
            ways[f"ours, guessing ahead, {dtype}"] = functools.partial(ours, lookup=8)
            ways[f"ours, drawn, {dtype}"] = drawn
            ways[f"ours, drawn, guessing ahead, {dtype}"] = functools.partial(drawn, lookup=8)
            ways[f"ours, batch of 8, {dtype}"] = functools.partial(_our_batch, ready, prompt)
    return ways


def _their_ways_to_decode(model: Any, prompt: list[int], peers: str | None) -> dict[str, Callable[[int], list[int]]]:
    """{"whose, dtype": way}: the seed's, those of --peers, transformers' if it is installed."""
    import torch

    ways: dict[str, Callable[[int], list[int]]] = {}
    for dtype, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        plain = copy.deepcopy(model).to(kind)
        for name, way in {SEED: _seed_way_to_decode, **_functions_of(peers)}.items():
            ways[f"{name}, {dtype}"] = functools.partial(way, plain, prompt)
        for cache in ("dynamic", "static"):
            with contextlib.suppress(ImportError):
                ways[f"transformers, {cache} cache, {dtype}"] = _transformers_way(plain, prompt, cache)
    return ways


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
        one_by_one = not any(word in name for word in ("batch", "ahead"))  # each token reads all weights
        moved = f"{way['gb_per_s']:16.1f} {way['gb_per_s'] / memory:15.0%}" if one_by_one else ""
        lines.append(f"{name:42} {way['tokens_per_s']:8.1f} ({low:.1f}..{high:.1f}) {moved}")

    def ratio(one: str, *others: str) -> str:
        return f"{ways[one]['tokens_per_s'] / max(ways[name]['tokens_per_s'] for name in others):.2f}"

    peers = [name for name in ways if name.endswith("bf16") and not name.startswith("ours")]
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
        total, count, seq_len = 0.0, 0, model.config.seq_len
        with torch.inference_mode():
            for x, y in validation_batches({source: 1.0}, seq_len=seq_len, batch_size=4, max_tokens=n_tokens):
                total += float(model(x.to(device), y.to(device), reduction="sum"))
                count += int((y >= 0).sum())
        losses[dtype] = total / count
    return losses


def loss_report(losses: dict[str, float]) -> str:
    """One row per --dtype, and its difference from fp32."""
    rows = [f"{dtype}  validation loss {loss:.5f} ({loss - losses['fp32']:+.5f})" for dtype, loss in losses.items()]
    return "\n".join(rows)


# ---- command line ----------------------------------------------------------------------------------------------------


def main() -> None:
    parser = config.ArgumentParser()
    parser.add_argument(
        "section", choices=["train", "data", "checkpoint", "hellaswag", "decode"], help="what to measure"
    )
    parser.add_argument("--source", default="", help="JSONL files of text (default: ../shared/data/textbooks/train*)")
    parser.add_argument("--repeat", type=int, default=80, help="times to read the source, for enough text [80]")
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
    with tempfile.TemporaryDirectory() as name:
        rates, table = run_section(args, Path(name))
    print(table)
    if args.output:
        Path(args.output).write_text(json.dumps(rates, indent=1) + "\n")


def run_section(args: Any, folder: Path) -> tuple[dict[str, Any], str]:
    """The numbers of a section, and its table."""
    match args.section:
        case "train":
            import benchmark_train  # its processes import it too: torch at once

            rates = benchmark_train.train_benchmark(args.device, args.vocab_size, args.rounds, args.peers)
            return rates, benchmark_train.train_report(rates)
        case "data":
            source = args.source or (f"{TEXTBOOKS}/train*" if TEXTBOOKS.exists() else _reference(folder))
            rates = data_benchmark(source, args.repeat, args.rounds, folder)
            return rates, data_report(rates)
        case "hellaswag":
            rates = hellaswag_benchmark(args.data, args.num_examples, args.rounds, args.peers, folder)
            return rates, hellaswag_report(rates)
        case "decode" if args.checkpoint:
            losses = loss_benchmark(args.checkpoint, args.source, 50_000, args.device)
            return losses, loss_report(losses)
        case "decode":
            rates = decode_benchmark(args.rounds, args.new_tokens, args.device, args.peers)
            return rates, decode_report(rates)
        case _:  # checkpoint
            rates = checkpoint_benchmark(args.rounds, folder)
            return rates, checkpoint_report(rates)


def _reference(folder: Path) -> str:
    from pydoc_data.topics import topics

    lines = itertools.chain.from_iterable(itertools.repeat([json.dumps({"text": t}) for t in topics.values()], 40))
    (folder / "reference.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    return str(folder / "reference.jsonl.gz")


if __name__ == "__main__":
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as training does
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    config.run(main)
