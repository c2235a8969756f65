"""Text to token shards, token shards to batches.

    python data_pipeline.py sample      # the Python reference inside every CPython, as bytes: no network, 1 second
    python data_pipeline.py download    # FineWeb-Edu, already tokenized: 100 shards = 10B tokens, 20 GB
    python data_pipeline.py prepare --source="my/*.jsonl.gz" --out_dir=data/mine    # your text or any HF dataset
    python data_pipeline.py verify --out_dir=data/mine    # every header, size, checksum and token
    python data_pipeline.py info --out_dir=data/mine      # what it holds, and how it begins
    python data_pipeline.py prepare --help                # the options of one command

A dataset is a folder of llm.c shards (train_000000.bin ..., val_000000.bin ...) and meta.json, which is written last:
tokenizer, source, and tokens, documents, size and sha256 of each shard. Every document is followed by the eot token.
training.py reads it through TokenLoader and validation_batches.
"""

import argparse
import dataclasses
import hashlib
import inspect
import json
import os
import queue
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import numpy as np
from tqdm import tqdm

import config

if TYPE_CHECKING:
    from torch import Tensor

# ---- Tokenizers ------------------------------------------------------------------------------------------------------

EOT = "<|endoftext|>"
GPT2 = {  # the identity of gpt2, spelled out: reading its shards needs no vocabulary file
    "name": "gpt2",
    "vocab_size": 50257,
    "eot_id": 50256,
    "sha256": "20940fd36bff2b33dff18da9a85f31f7eab5ea75375cf78fdb8b0bda1116d42e",
}


class Tokenizer:
    """Text to token ids and back, for any tiktoken encoding. Text that spells a special token stays plain text."""

    def __init__(self, name: str, encoding: Any):
        self.name, self._encoding = name, encoding
        self.vocab_size, self.eot_id = int(encoding.n_vocab), int(encoding.eot_token)

    def encode(self, text: str) -> list[int]:
        return self._encoding.encode_ordinary(text)

    def encode_array(self, text: str) -> np.ndarray:
        """The tokens of `text` as uint32, without a Python list on the way."""
        try:
            return self._encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:  # a lone surrogate, as JSON may spell one
            return np.array(self.encode(text), dtype=np.uint32)

    def decode_bytes(self, tokens: Iterable[int]) -> bytes:
        return self._encoding.decode_bytes(tokens)

    def decode(self, tokens: Iterable[int]) -> str:
        return self.decode_bytes(tokens).decode("utf-8", errors="replace")

    def byte_lengths(self) -> np.ndarray:
        """[vocab_size] bytes of text per token, for bits per byte; eot and unused ids count 0."""
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        for token, rank in self._encoding._mergeable_ranks.items():
            lengths[rank] = len(token)
        return lengths

    def info(self) -> dict[str, Any]:
        """What names this tokenizer in meta.json and in checkpoints; sha256 is over its ranks."""
        sha256 = _ranks_sha256(self._encoding._mergeable_ranks)
        return {"name": self.name, "vocab_size": self.vocab_size, "eot_id": self.eot_id, "sha256": sha256}


def load_tokenizer(name: str, sha256: str | None = None) -> Tokenizer:
    """ "gpt2", "bytes" or any tiktoken encoding; ValueError if `sha256` is given and is not that of its ranks."""
    tokenizer = Tokenizer(name, _bytes_encoding() if name == "bytes" else _tiktoken_encoding(name))
    if sha256 not in (None, found := tokenizer.info()["sha256"]):
        raise ValueError(
            f"tokenizer {name!r} here has the ranks {found[:12]}, the data or checkpoint was made with {sha256[:12]}; "
            "use the tokenizer it was made with"
        )
    return tokenizer


def _bytes_encoding() -> Any:
    """256 byte tokens and <|endoftext|>; the pattern only bounds the pieces that tiktoken looks at."""
    import tiktoken

    ranks = {bytes([i]): i for i in range(256)}
    return tiktoken.Encoding("bytes", pat_str=r"(?s:.{1,64})", mergeable_ranks=ranks, special_tokens={EOT: 256})


def _tiktoken_encoding(name: str) -> Any:
    import tiktoken
    from requests.exceptions import RequestException

    names = tiktoken.list_encoding_names()
    if name not in names:
        raise ValueError(f"unknown tokenizer {name!r}; known are bytes, {', '.join(names)}")
    try:
        return tiktoken.get_encoding(name)
    except (RequestException, OSError) as error:
        raise ValueError(
            f"cannot fetch the vocabulary of tokenizer {name!r} ({type(error).__name__}); without network, set "
            "TIKTOKEN_CACHE_DIR to the tiktoken cache folder of a machine that has it, or use --tokenizer=bytes"
        ) from error


def _ranks_sha256(ranks: Mapping[bytes, int]) -> str:
    digest = hashlib.sha256()
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        digest.update(b"%d %d " % (rank, len(token)) + token)
    return digest.hexdigest()


# ---- Shards: the llm.c format, one writer and one reader -------------------------------------------------------------

HEADER_BYTES = 256 * 4
FORMATS = {(20240520, 1): np.dtype("<u2"), (20240801, 7): np.dtype("<u4")}  # (magic, version): token type


def token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


def write_shard(path: str | Path, tokens: np.ndarray) -> str:
    """Write uint16 or uint32 tokens as one shard, all or nothing; returns the sha256 of the file."""
    magic, version = {dtype: key for key, dtype in FORMATS.items()}[tokens.dtype]
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(tokens)
    return _write_atomic(Path(path), header.tobytes(), memoryview(np.ascontiguousarray(tokens)).cast("B"))


def read_shard(path: str | Path) -> np.ndarray:
    """Memory map the tokens of a shard. ValueError if the file is not exactly what its header announces."""
    path = Path(path)
    try:
        with open(path, "rb") as file:
            header = np.frombuffer(file.read(HEADER_BYTES), dtype="<i4")
        size = path.stat().st_size
    except FileNotFoundError as error:
        raise ValueError(f"{path}: missing; make the dataset again or copy the shard back") from error
    dtype = FORMATS.get((int(header[0]), int(header[1]))) if len(header) == 256 else None
    if dtype is None:
        raise ValueError(f"{path}: not a token shard (no llm.c header); only shards may end in .bin here")
    expected = HEADER_BYTES + int(header[2]) * dtype.itemsize
    if size != expected:
        raise ValueError(f"{path}: {size:,} bytes, its header announces {expected:,}; prepare or download it again")
    if header[2] == 0:
        return np.zeros(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=HEADER_BYTES)


def _write_atomic(path: Path, *chunks: bytes | memoryview) -> str:
    """Under a temporary name, to the disk, then renamed: a crash leaves the old file or the new one, never a half."""
    partial, digest = path.with_name(f".{path.name}.partial"), hashlib.sha256()
    try:
        with open(partial, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
                digest.update(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    return digest.hexdigest()


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    _write_atomic(path, json.dumps(data, indent=1).encode() + b"\n")


# ---- Dataset: a folder of shards -------------------------------------------------------------------------------------


class Dataset:
    """A folder of shards, checked as far as headers and sizes go. Raises ValueError with what to do about it."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.meta = _read_meta(self.folder)
        self.tokenizer: dict[str, Any] = self.meta["tokenizer"]
        self.dtype = token_dtype(self.tokenizer["vocab_size"])
        for shard in self.meta["shards"]:
            self.read(shard)
        identity = [self.tokenizer, [(s["file"], s["tokens"], s.get("sha256")) for s in self.meta["shards"]]]
        self.fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]

    def shards(self, split: str) -> list[dict[str, Any]]:
        return [shard for shard in self.meta["shards"] if shard["split"] == split]

    def read(self, shard: Mapping[str, Any]) -> np.ndarray:
        path = self.folder / shard["file"]
        tokens = read_shard(path)
        if len(tokens) != shard["tokens"] or tokens.dtype != self.dtype:
            raise ValueError(
                f"{path}: {len(tokens):,} {tokens.dtype} tokens, meta.json announces {shard['tokens']:,} {self.dtype}; "
                "shards of two datasets are mixed, prepare or download it again"
            )
        return tokens


def _read_meta(folder: Path) -> dict[str, Any]:
    """meta.json, or what can be known about a folder of llm.c shards without one."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        shards, tokenizer = meta["shards"], meta["tokenizer"]
        assert {"file", "split", "tokens"} <= set.intersection(*(set(shard) for shard in shards))
        assert set(GPT2) <= set(tokenizer)
    except FileNotFoundError:
        return _foreign_meta(folder)
    except OSError as error:
        raise ValueError(f"cannot read {folder}/meta.json: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise ValueError(f"{folder}/meta.json is damaged ({error}); prepare or download the dataset again") from error
    for shard in shards:
        if not isinstance(shard["file"], str) or Path(shard["file"]).name != shard["file"]:
            raise ValueError(f"{folder}/meta.json names {shard['file']!r}, a file outside its folder; do not trust it")
    return meta


def _foreign_meta(folder: Path) -> dict[str, Any]:
    paths = sorted(folder.glob("*.bin"))
    if (folder / "progress.json").exists():
        raise ValueError(f"{folder} is incomplete: run the same prepare or download again, it goes on where it stopped")
    if not paths:
        raise ValueError(f"no dataset in {folder}; make one: python data_pipeline.py sample|download|prepare")
    shards = [(path, read_shard(path)) for path in paths]
    if any(tokens.dtype != token_dtype(GPT2["vocab_size"]) for _, tokens in shards):
        raise ValueError(f"{folder} has no meta.json and 32-bit tokens, so its tokenizer is unknown; prepare it again")
    files = [
        {"file": path.name, "split": "val" if "val" in path.name else "train", "tokens": len(tokens)}
        for path, tokens in shards
    ]
    return {"tokenizer": GPT2, "source": "llm.c shards without meta.json, taken as gpt2", "shards": files}


# ---- Order: sequence number -> (source, window), by arithmetic -------------------------------------------------------

BLOCK = 1024  # sequences in which a mixture has its exact counts
U64 = np.uint64


def mix(x: np.ndarray, key: np.ndarray | np.uint64) -> np.ndarray:
    """splitmix64 finalizer: every input bit moves every output bit (an affine round leaves visible structure)."""
    x = x + key
    x = (x ^ (x >> U64(30))) * U64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> U64(27))) * U64(0x94D049BB133111EB)
    return x ^ (x >> U64(31))


def key_of(*parts: int | np.ndarray) -> np.ndarray:
    """One 64-bit key per element from integers, e.g. (seed, source, epoch)."""
    key = np.zeros(1, U64)
    for part in parts:
        key = mix(key, np.asarray(part).astype(U64) + U64(0x9E3779B97F4A7C15))
    return key


def permute(i: np.ndarray, n: int, key: np.ndarray) -> np.ndarray:
    """Bijection of [0, n), nothing stored: a 4-round Feistel network on the next even power of two; what falls
    outside n is mapped again until it is inside. `key` has one element, or one per i."""
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    shift, low = U64(half), U64((1 << half) - 1)
    out, keys = np.array(i, U64), np.broadcast_to(key, np.shape(i))
    todo = np.arange(len(out))
    while len(todo):
        left, right, round_key = out[todo] >> shift, out[todo] & low, keys[todo]
        for _ in range(4):
            round_key = mix(round_key, U64(0x9E3779B97F4A7C15))
            left, right = right, left ^ (mix(right, round_key) & low)
        out[todo] = left << shift | right
        todo = todo[out[todo] >= n]
    return out.astype(np.int64)


def mixture_counts(weights: Iterable[float]) -> np.ndarray:
    """Sequences of each source per BLOCK, by largest remainder, so that they sum to BLOCK exactly."""
    share = np.array(list(weights), dtype=np.float64)
    share *= BLOCK / share.sum()
    counts = np.floor(share).astype(np.int64)
    counts[np.argsort(counts - share, kind="stable")[: BLOCK - counts.sum()]] += 1
    return counts


class Windows:
    """The windows of seq_len + 1 tokens of one split; neighbours share one token, which is target, then input."""

    def __init__(self, dataset: Dataset, split: str, seq_len: int, partial: bool = False):
        self.dataset, self.split, self.seq_len = dataset, split, seq_len
        self.shards = dataset.shards(split)
        extra = seq_len - 1 if partial else 0  # partial: the short rest of a shard counts as a window, too
        counts = [max(0, (shard["tokens"] - 1 + extra) // seq_len) for shard in self.shards]
        self.first = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self.count = int(self.first[-1])
        self.limit = dataset.tokenizer["vocab_size"]
        self._tokens: dict[int, np.ndarray] = {}

    def read(self, window: int) -> np.ndarray:
        shard = int(np.searchsorted(self.first, window, side="right")) - 1
        if shard not in self._tokens:
            self._tokens[shard] = self.dataset.read(self.shards[shard])
        start = (window - int(self.first[shard])) * self.seq_len
        tokens = self._tokens[shard][start : start + self.seq_len + 1]
        if tokens.max() >= self.limit:
            name = self.dataset.folder / self.shards[shard]["file"]
            raise ValueError(f"{name} has token {tokens.max()}, the limit is vocab_size={self.limit}: other tokenizer?")
        return tokens


class Order:
    """Sequence p of a run -> (source, window): the same for any number of ranks, nothing to store, O(1) to enter.

    A block of 1024 sequences has exact counts per source in a keyed order; a source deals its windows in a new keyed
    permutation per epoch, each window once per epoch.
    """

    def __init__(self, counts: list[int], weights: Iterable[float], seed: int):
        self.counts, self.seed, self.per_block = counts, seed, mixture_counts(weights)
        self._cached: tuple[int, np.ndarray, np.ndarray] = (-1, np.zeros(0), np.zeros(0))

    def _block(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(source, running number within its source) of each of the block's sequences."""
        if self._cached[0] != number:
            slots = permute(np.arange(BLOCK), BLOCK, key_of(self.seed, 1, number))
            source, index = np.searchsorted(np.cumsum(self.per_block), slots, side="right"), np.zeros(BLOCK, np.int64)
            for s in np.unique(source):
                index[source == s] = np.arange(self.per_block[s])
            self._cached = number, source, index
        return self._cached[1:]

    def locate(self, p: int, n: int) -> tuple[np.ndarray, np.ndarray]:
        """(source, window) of the sequences p ... p + n - 1."""
        sources, windows = np.empty(n, np.int64), np.empty(n, np.int64)
        done = 0
        while done < n:
            number, start = divmod(p + done, BLOCK)
            source, index = (part[start : start + n - done] for part in self._block(number))
            index = index + number * self.per_block[source]
            for s in np.unique(source):
                at = np.flatnonzero(source == s)
                windows[done + at] = self._window(int(s), index[at])
            sources[done : done + len(source)] = source
            done += len(source)
        return sources, windows

    def _window(self, source: int, index: np.ndarray) -> np.ndarray:
        epoch, i = np.divmod(index, self.counts[source])
        return permute(i, self.counts[source], key_of(self.seed, 2, source, epoch))


# ---- Batches ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataConfig:
    """Where the training tokens come from."""

    sources: dict[str, float] = field(default_factory=lambda: {"data/fineweb_edu": 1.0})  # shard folders, or a=0.7,b=0.3

    def __post_init__(self) -> None:
        _check_weights(self.sources)


def _check_weights(sources: Mapping[str, float]) -> None:
    if not sources or min(sources.values()) < 0 or sum(sources.values()) <= 0:
        raise ValueError(f"sources={dict(sources)} needs one folder or more, with weights >= 0 and one above 0")
    for (name, weight), count in zip(sources.items(), mixture_counts(sources.values())):
        if weight and not count:
            raise ValueError(f"sources: weight {weight:g} of {name} is less than one sequence in {BLOCK}; raise it or 0")


def _open_sources(sources: Mapping[str, float], vocab_size: int | None) -> list[Dataset]:
    """The datasets, which must share one tokenizer that fits the model's vocabulary."""
    _check_weights(sources)
    datasets = [Dataset(folder) for folder in sources]
    first = datasets[0]
    for other in datasets[1:]:
        if other.tokenizer != first.tokenizer:
            raise ValueError(
                f"{first.folder} was made with tokenizer {_identity(first)}, {other.folder} with {_identity(other)}; "
                "prepare them with the same one"
            )
    if vocab_size is not None and first.tokenizer["vocab_size"] > vocab_size:
        raise ValueError(
            f"{first.folder}: tokenizer {first.tokenizer['name']} has {first.tokenizer['vocab_size']} tokens, the "
            f"model's vocab_size is {vocab_size}; leave vocab_size out or prepare the data with another --tokenizer"
        )
    return datasets


def _identity(dataset: Dataset) -> str:
    return f"{dataset.tokenizer['name']} ({dataset.tokenizer['sha256'][:12]})"


class TokenLoader:
    """Endless training batches of one rank. Sequence p of the run is the same for any number of ranks:
    p = step * batch_sequences + (micro_step * world_size + rank) * batch_size + row."""

    def __init__(
        self,
        sources: dict[str, float],
        *,
        seq_len: int,
        batch_size: int,
        batch_sequences: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        vocab_size: int | None = None,
        pin_memory: bool = False,
    ):
        assert batch_sequences % (batch_size * world_size) == 0, (batch_sequences, batch_size, world_size)
        self.seq_len, self.batch_size, self.rank, self.pin_memory = seq_len, batch_size, rank, pin_memory
        self._stride = batch_size * world_size  # sequences of all ranks per next()
        datasets = _open_sources(sources, vocab_size)
        self.tokenizer: dict[str, Any] = datasets[0].tokenizer
        weighted = [dataset for dataset, weight in zip(datasets, sources.values()) if weight]
        weights = [weight for weight in sources.values() if weight]
        self._windows = [Windows(dataset, "train", seq_len) for dataset in weighted]
        for windows in self._windows:
            if not windows.count:
                tokens = sum(shard["tokens"] for shard in windows.shards)
                raise ValueError(
                    f"{windows.dataset.folder}: no train shard holds a sequence of seq_len + 1 = {seq_len + 1} tokens "
                    f"({tokens:,} in all); lower seq_len or add data"
                )
        counts = [windows.count for windows in self._windows]
        self.tokens_per_epoch = seq_len * sum(counts)
        self._order = Order(counts, weights, seed)
        identity = [seq_len, seed, weights, [dataset.fingerprint for dataset in weighted]]
        self.fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
        self._sequences, self._thread, self._stop = 0, None, threading.Event()
        if rank == 0:
            for dataset in weighted:
                if "sha256" not in dataset.meta["shards"][0]:
                    print(f"{dataset.folder}: {dataset.meta['source']}", file=sys.stderr)

    def next(self) -> tuple["Tensor", "Tensor"]:
        """(inputs, targets), int64 [batch_size, seq_len]; targets are the next tokens."""
        if self._thread is None:
            self._queue: queue.Queue[Any] = queue.Queue(maxsize=4)
            self._stop = threading.Event()
            arguments = self._sequences, self._queue, self._stop
            self._thread = threading.Thread(target=self._fill, args=arguments, daemon=True, name="TokenLoader")
            self._thread.start()
        item = self._queue.get()
        if isinstance(item, BaseException):
            self._queue.put(item)  # the next call meets it, too
            raise item
        self._sequences += self._stride
        return item

    def state_dict(self) -> dict[str, Any]:
        """Sequences that all ranks together have consumed, and what they came from."""
        return {"sequences": self._sequences, "fingerprint": self.fingerprint}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after `state`, at once. ValueError if it counts sequences of other data."""
        if state["fingerprint"] != self.fingerprint:
            raise ValueError(
                "the data changed since the checkpoint (sources, weights, seed, seq_len or the shards themselves): "
                "put them back, or start a new run from its weights with --init_from"
            )
        self.close()
        self._sequences = int(state["sequences"])

    def close(self) -> None:
        """Stop the prefetching thread; next() starts it again."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _fill(self, p: int, batches: "queue.Queue[Any]", stop: threading.Event) -> None:
        item: Any = None
        while not stop.is_set() and not isinstance(item, BaseException):
            try:
                item = self._batch(p + self.rank * self.batch_size)
            except BaseException as error:  # raised again by next(), in the thread of the training loop
                item = error
            p += self._stride
            while not stop.is_set():
                try:
                    batches.put(item, timeout=0.1)
                    break
                except queue.Full:
                    pass

    def _batch(self, p: int) -> tuple["Tensor", "Tensor"]:
        import torch

        pair = np.empty((2, self.batch_size, self.seq_len), np.int64)  # two arrays: both halves stay contiguous
        for row, (source, window) in enumerate(zip(*self._order.locate(p, self.batch_size))):
            tokens = self._windows[source].read(int(window))
            pair[0, row], pair[1, row] = tokens[:-1], tokens[1:]
        batch = torch.from_numpy(pair)
        batch = batch.pin_memory() if self.pin_memory else batch
        return batch[0], batch[1]


def validation_batches(
    sources: dict[str, float],
    *,
    seq_len: int,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    max_tokens: int | None = None,
) -> Iterator[tuple["Tensor", "Tensor"]]:
    """The val splits once, in order: (inputs, targets) int64 [batch_size, seq_len], the same number of batches on
    every rank. Targets beyond the data are -100, so a mean over the others is exact."""
    splits = [Windows(dataset, "val", seq_len, partial=True) for dataset in _open_sources(sources, None)]
    rows: list[tuple[Windows, int]] = []
    for split in splits:
        if not split.count:
            raise ValueError(f"{split.dataset.folder} has no val shard; prepare it with --val_tokens or --val_source")
        limit = split.count if max_tokens is None else max(1, max_tokens // (seq_len * len(splits)))
        rows += [(split, window) for window in range(min(split.count, limit))]
    return _fixed_batches(rows, seq_len, batch_size, rank, world_size)


def _fixed_batches(
    rows: list[tuple[Windows, int]], seq_len: int, batch_size: int, rank: int, world_size: int
) -> Iterator[tuple["Tensor", "Tensor"]]:
    import torch

    for start in range(0, len(rows), batch_size * world_size):
        pair = np.stack([np.zeros((batch_size, seq_len), np.int64), np.full((batch_size, seq_len), -100, np.int64)])
        mine = start + rank * batch_size
        for row, (windows, window) in enumerate(rows[mine : mine + batch_size]):
            tokens = windows.read(window)
            pair[0, row, : len(tokens) - 1], pair[1, row, : len(tokens) - 1] = tokens[:-1], tokens[1:]
        batch = torch.from_numpy(pair)
        yield batch[0], batch[1]


# ---- Making a dataset: tokens to shards, resumable -------------------------------------------------------------------


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder against a second writer; the lock dies with its process, nothing is left on the disk."""
    import fcntl

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"out_dir={folder} is not a folder; choose another --out_dir") from error
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise ValueError(f"another process is writing to {folder}; wait for it or choose another --out_dir") from error
    finally:
        os.close(handle)


class ShardWriter:
    """Tokens in, full shards out. progress.json follows each shard, meta.json comes last, so that a run of the same
    `job` goes on where the one before stopped. `position` is the caller's, opaque here: where the next token of a
    new run comes from."""

    def __init__(self, folder: Path, job: Mapping[str, Any], tokenizer: Mapping[str, Any], shard_tokens: int):
        self.folder, self.tokenizer, self.shard_tokens = folder, dict(tokenizer), shard_tokens
        self.progress: dict[str, Any] = {"job": dict(job), "shards": [], "position": None}
        self.done = (folder / "meta.json").exists()
        known = folder / ("meta.json" if self.done else "progress.json")
        if known.exists():
            self.progress = _read_progress(known, dict(job))
        elif strays := sorted(folder.glob("*.bin")):
            raise ValueError(f"{strays[0]} is not ours to overwrite; choose another --out_dir")
        self.split, self._fill = "", 0
        self._buffer = np.empty(shard_tokens, token_dtype(tokenizer["vocab_size"]))

    def tokens(self, split: str) -> int:
        written = sum(shard["tokens"] for shard in self.progress["shards"] if shard["split"] == split)
        return written + (self._fill if split == self.split else 0)

    def add(self, split: str, tokens: np.ndarray, position: Callable[[int], Any] = lambda taken: None) -> None:
        """Append to `split`; `position(n)` is where to go on when n of these tokens are safe on the disk."""
        if split != self.split:
            self.flush(position(0))
            self.split = split
        taken = 0
        while taken < len(tokens):
            part = tokens[taken : taken + self.shard_tokens - self._fill]
            self._buffer[self._fill : self._fill + len(part)] = part
            self._fill += len(part)
            taken += len(part)
            if self._fill == self.shard_tokens:
                self.flush(position(taken))

    def flush(self, position: Any = None) -> None:
        if self._fill:
            tokens, self._fill = self._buffer[: self._fill], 0
            number = sum(shard["split"] == self.split for shard in self.progress["shards"])
            name = f"{self.split}_{number:06d}.bin"
            sha256 = write_shard(self.folder / name, tokens)
            documents = int(np.count_nonzero(tokens == self.tokenizer["eot_id"]))
            size = HEADER_BYTES + tokens.nbytes
            self.progress["shards"].append(
                {"file": name, "split": self.split, "tokens": len(tokens), "documents": documents, "bytes": size}
                | {"sha256": sha256}
            )
        self.progress["position"] = position
        _write_json(self.folder / "progress.json", self.progress)

    def finish(self, **facts: Any) -> None:
        """The rest as a last short shard, then meta.json: from here on the dataset exists."""
        self.flush()
        shards = self.progress["shards"]
        totals = {
            split: {key: sum(s[key] for s in shards if s["split"] == split) for key in ("tokens", "documents")}
            for split in ("train", "val")
        }
        meta = {"version": 1, "tokenizer": self.tokenizer, **facts, **totals, "job": self.progress["job"]}
        _write_json(self.folder / "meta.json", meta | {"shards": shards})
        (self.folder / "progress.json").unlink(missing_ok=True)


def _read_progress(path: Path, job: dict[str, Any]) -> dict[str, Any]:
    try:
        progress = json.loads(path.read_text(encoding="utf-8"))
        differences = config.differences(progress["job"], job)
        for shard in progress["shards"]:
            read_shard(path.parent / shard["file"])
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete {path.parent} or choose another --out_dir") from error
    if differences:
        raise ValueError(
            f"{path.parent} holds another dataset ({'; '.join(differences)[:300]}); choose another --out_dir or delete it"
        )
    return progress


# ---- Commands --------------------------------------------------------------------------------------------------------


def sample(
    out_dir: str = "data/sample",  # folder of the dataset
) -> None:
    """The language reference inside every CPython (pydoc_data.topics), as bytes: 0.45 MB of English, no network."""
    train, val = _sample_documents()
    text = "".join(train + val)
    job = {"source": "pydoc_data.topics", "sha256": hashlib.sha256(text.encode()).hexdigest()}
    tokenizer, folder = load_tokenizer("bytes"), Path(out_dir)
    with _locked(folder):
        writer = ShardWriter(folder, job, tokenizer.info(), 2**24)
        if not writer.done:
            for split, documents in ("val", val), ("train", train):
                for document in documents:
                    writer.add(split, np.append(tokenizer.encode_array(document), tokenizer.eot_id))
            writer.finish(source="pydoc_data.topics, the Python language reference")
    info(out_dir)


def _sample_documents() -> tuple[list[str], list[str]]:
    """(train, val): about 1 topic in 15 validates, chosen by its name; paragraphs that topics share leave train."""
    from pydoc_data.topics import topics

    names = sorted(topics)
    held_out = {name for name in names if int(hashlib.sha256(name.encode()).hexdigest(), 16) % 15 == 0}
    val = [topics[name] for name in names if name in held_out]
    seen = {paragraph for text in val for paragraph in text.split("\n\n")}
    train = [
        "\n\n".join(paragraph for paragraph in topics[name].split("\n\n") if paragraph not in seen)
        for name in names
        if name not in held_out
    ]
    return train, val


def verify(
    out_dir: str = "data/fineweb_edu",  # folder of the dataset
) -> None:
    """Read every byte: header, size, sha256, token range, documents. Exit 1 with the list of damaged shards."""
    folder = Path(out_dir)
    meta = _read_meta(folder)
    damaged = []
    for shard in tqdm(meta["shards"], desc="verify", unit="shard", disable=None):
        try:
            faults = _shard_faults(folder, shard, meta["tokenizer"])
        except (ValueError, OSError) as error:
            faults = [str(error)]
        damaged += [f"{shard['file']}: {fault}" for fault in faults]
    known = {shard["file"] for shard in meta["shards"]}
    damaged += [f"{path.name}: not in meta.json" for path in sorted(folder.glob("*.bin")) if path.name not in known]
    for line in damaged:
        print(_printable(line))
    print(f"{folder}: {len(known)} shards, " + (f"{len(damaged)} faults" if damaged else "all sound"))
    if damaged:
        sys.exit(1)


def _shard_faults(folder: Path, shard: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> list[str]:
    tokens = read_shard(folder / shard["file"])
    documents = int(np.count_nonzero(tokens == tokenizer["eot_id"]))
    with open(folder / shard["file"], "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    largest = int(tokens.max()) if len(tokens) else 0
    found = {"tokens": len(tokens), "documents": documents, "sha256": sha256}
    faults = [f"{key} is {found[key]}, meta.json says {shard[key]}" for key in found if shard.get(key, found[key]) != found[key]]
    if largest >= tokenizer["vocab_size"]:
        faults.append(f"token {largest} with a vocabulary of {tokenizer['vocab_size']}")
    if len(tokens) > 100_000 and not 0 < documents <= len(tokens) / 4:
        faults.append(f"{documents} documents in {len(tokens):,} tokens: not the eot token {tokenizer['eot_id']}?")
    return faults


def info(
    out_dir: str = "data/fineweb_edu",  # folder of the dataset
) -> None:
    """What a dataset holds, and its first 100 tokens as text."""
    dataset = Dataset(out_dir)
    name, vocab_size = dataset.tokenizer["name"], dataset.tokenizer["vocab_size"]
    print(f"{out_dir}: {dataset.meta.get('source', 'unknown source')}")
    print(f"  tokenizer {name}, {vocab_size:,} tokens, {dataset.dtype.name}")
    for split in ("train", "val"):
        shards = dataset.shards(split)
        documents = f"{sum(s['documents'] for s in shards):,} documents" if "documents" in dataset.meta["shards"][0] else ""
        print(f"  {split:5} {sum(s['tokens'] for s in shards):>15,} tokens in {len(shards)} shards  {documents}")
    first = dataset.read((dataset.shards("train") or dataset.meta["shards"])[0])[:100]
    try:
        text = load_tokenizer(name, dataset.tokenizer["sha256"]).decode(first.tolist())
    except ValueError as error:  # the shards are fine without the vocabulary
        text = f"(text not shown: {error})"
    print("  begins: " + _printable(text))


def _printable(text: str) -> str:
    """Shown, not obeyed: escape sequences and other control characters of foreign text."""
    return "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text)


COMMANDS: dict[str, Callable[..., None]] = {f.__name__: f for f in (sample, verify, info)}


def main() -> None:
    names = "|".join(COMMANDS)
    first = config.ArgumentParser(usage=f"%(prog)s {names} [--name=value ...]")
    first.add_argument("command", choices=COMMANDS, metavar=names)
    command = COMMANDS[first.parse_args(sys.argv[1:2] or ["--help"]).command]
    options = _options(command, sys.argv[2:])
    try:
        command(**options)
    except OSError as error:  # disk full, no permission, network: not the user's input, but no traceback either
        config.die(f"{first.prog}: error: {error}", 1)


def _options(command: Callable[..., None], argv: list[str]) -> dict[str, Any]:
    """A command's options are its parameters; the comment on a parameter's line is its --help text."""
    parameters, hints = inspect.signature(command).parameters, get_type_hints(command)
    prog = f"data_pipeline.py {command.__name__}"
    parser = config.ArgumentParser(prog=prog, usage=f"{prog} [--name=value ...]", description=command.__doc__)
    comments = dict(re.findall(r"^\s+(\w+): .*?  # (.+)$", inspect.getsource(command), re.MULTILINE))
    for name, parameter in parameters.items():
        text = f"{comments[name]} [{'none' if parameter.default is None else parameter.default}]"
        parser.add_argument(f"--{name}", default=argparse.SUPPRESS, help=text.replace("%", "%%"))
    values = vars(parser.parse_args(argv))
    schema = dataclasses.make_dataclass("Options", [(name, hints[name], p.default) for name, p in parameters.items()])
    return vars(config.from_dict(schema, values))


if __name__ == "__main__":
    config.run(main)
