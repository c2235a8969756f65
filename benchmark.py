"""How fast this machine does each part of the work, side by side with how others do it, as one table.

    python benchmark.py data                          # text to shards, shards to batches, decontamination
    python benchmark.py data --output=data.json       # the same numbers for a program
    python benchmark.py data --source="my/*.jsonl.gz" --repeat=1
    python benchmark.py checkpoint                    # how long a save holds up training

Everything of one table is measured in one run, best of --rounds: compare rows, not days. Reads the source (default: real
text beside the repository, or else the Python reference), writes only below a temporary folder.
"""

import contextlib
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
from pathlib import Path
from typing import Any

import numpy as np

import config
from data_pipeline import _cores, decontaminate, find_files, prepare, read_chunks, verify
from shards import TokenLoader, load_tokenizer

TEXTBOOKS = Path(__file__).resolve().parent.parent / "shared" / "data" / "textbooks"


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


# ---- command line ----------------------------------------------------------------------------------------------------


def main() -> None:
    parser = config.ArgumentParser()
    parser.add_argument("section", choices=["data", "checkpoint"], help="what to measure")
    parser.add_argument("--source", default="", help="JSONL files of text (default: ../shared/data/textbooks/train*)")
    parser.add_argument("--repeat", type=int, default=40, help="times to read the source, for enough text [40]")
    parser.add_argument("--rounds", type=int, default=2, help="measurements of which the best counts [2]")
    parser.add_argument("--output", help="write the numbers to this .json file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.section == "data":
            source = args.source or (f"{TEXTBOOKS}/train*" if TEXTBOOKS.exists() else _reference(folder))
            rates = data_benchmark(source, args.repeat, args.rounds, folder)
            print(report(rates))
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
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    config.run(main)
