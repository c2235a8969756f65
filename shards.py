"""Token shards to training batches: tokenizers, the file format, the order of training, the loader.

    tokenizer = load_tokenizer("gpt2")
    loader = TokenLoader({"data/edu": 0.7, "data/code": 0.3}, seq_len=1024, batch_size=40, batch_sequences=640)
    inputs, targets = loader.next()                                 # [40, 1024] each; targets are the next tokens
    for inputs, targets in validation_batches({"data/edu": 1.0}, seq_len=1024, batch_size=40): ...

A dataset is a folder of llm.c shards (train_000000.bin ..., val_000000.bin ...) and meta.json; data_pipeline.py makes it.
The order of training is arithmetic on (seed, data, position), the same for any number of ranks, and nothing is stored.
"""

import base64
import bisect
import hashlib
import itertools
import json
import os
import queue
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tiktoken

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
GIGATOKEN_SCHEMES = {"gpt2": "gpt2", "r50k_base": "gpt2", "cl100k_base": "cl100k", "o200k_base": "o200k"}
END_TOKENS = (EOT, "<|end_of_text|>", "<|end▁of▁sentence|>", "</s>", "<eos>", "<|eot_id|>", "<|im_end|>")


class Tokenizer:
    """Text to token ids and back. Text that spells a special token stays plain text."""

    def __init__(self, name: str, encoding: Any):
        self.name, self._encoding = name, encoding
        self.vocab_size, self.eot_id = int(encoding.n_vocab), int(encoding.eot_token)
        self.fast: Callable[[bytes], np.ndarray] | None = None  # another encoder of the same tokens

    def encode(self, text: str) -> list[int]:
        return self._encoding.encode_ordinary(text)

    def encode_array(self, text: str) -> np.ndarray:
        """The tokens of `text` as an array, without a Python list on the way."""
        try:
            return (
                self.fast(text.encode()) if self.fast else self._encoding.encode_to_numpy(text, disallowed_special=())
            )
        except UnicodeEncodeError:  # JSON can spell a lone surrogate, which is no text; tiktoken makes it U+FFFD, too
            return self.encode_array(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))

    def decode_bytes(self, tokens: Iterable[int]) -> bytes:
        return self._encoding.decode_bytes(tokens)

    def decode(self, tokens: Iterable[int]) -> str:
        return b"".join(map(self.spell, tokens)).decode("utf-8", errors="replace")

    def spell(self, token: int) -> bytes:
        """The bytes of one token; <token 7> for an id that no text has: some vocabularies and imported models hold such."""
        try:
            return self._encoding.decode_bytes([token])
        except KeyError:
            return b"<token %d>" % token

    def byte_lengths(self) -> np.ndarray:
        """[vocab_size] bytes of text per token, for bits per byte; special and unused ids count 0."""
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        for token, rank in self._encoding._mergeable_ranks.items():
            lengths[rank] = len(token)
        return lengths

    def info(self) -> dict[str, Any]:
        """What names this tokenizer in meta.json and in checkpoints; sha256 is over its ranks."""
        digest = hashlib.sha256()
        for token, rank in sorted(self._encoding._mergeable_ranks.items(), key=lambda item: item[1]):
            digest.update(b"%d %d " % (rank, len(token)) + token)
        sha256 = getattr(self._encoding, "sha256", digest.hexdigest())
        return {"name": self.name, "vocab_size": self.vocab_size, "eot_id": self.eot_id, "sha256": sha256}


def load_tokenizer(identity: str | Mapping[str, Any]) -> Tokenizer:
    """ "gpt2", "bytes", any tiktoken encoding, or a tokenizer.json: its path, its folder, or a Hugging Face model id.

    Or what `info` says of one, as in meta.json and checkpoints: ValueError if its ranks are others here.
    """
    name, sha256 = (identity, None) if isinstance(identity, str) else (identity["name"], identity.get("sha256"))
    if name == "bytes":
        encoding = _bytes_encoding()
    else:
        encoding = HuggingFaceEncoding(name) if "/" in name or name.endswith(".json") else _tiktoken_encoding(name)
    tokenizer = Tokenizer(name, encoding)
    if sha256 is not None and sha256 != (found := tokenizer.info()["sha256"]):
        raise ValueError(
            f"tokenizer {name!r} here has the ranks {found[:12]}, the data or checkpoint was made with {sha256[:12]}; "
            "use the tokenizer it was made with"
        )
    return tokenizer


def _bytes_encoding() -> Any:
    """256 byte tokens and <|endoftext|>; the pattern only bounds the pieces that tiktoken looks at."""
    ranks = {bytes([i]): i for i in range(256)}
    return tiktoken.Encoding("bytes", pat_str=r"(?s:.{1,64})", mergeable_ranks=ranks, special_tokens={EOT: 256})


def _tiktoken_encoding(name: str) -> Any:
    names = tiktoken.list_encoding_names()
    if name not in names:
        raise ValueError(f"unknown tokenizer {name!r}; known are bytes, {', '.join(names)}, or a path or hub id with /")
    try:
        return tiktoken.get_encoding(name)
    except OSError as error:  # of the network, too: requests' errors are OSErrors
        raise ValueError(
            f"cannot fetch the vocabulary of tokenizer {name!r} ({type(error).__name__}); without network, set "
            "TIKTOKEN_CACHE_DIR to the tiktoken cache folder of a machine that has it, or use --tokenizer=bytes"
        ) from error


class HuggingFaceEncoding:
    """A tokenizer.json with the interface of tiktoken.Encoding."""

    def __init__(self, name: str):
        try:
            import tokenizers
        except ImportError as error:
            raise ValueError(f"tokenizer {name!r} needs a package: pip install tokenizers") from error
        try:
            text = _tokenizer_json(name).read_text(encoding="utf-8")
            self._fast = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # tokenizers raises bare Exception; the hub client has many
            raise ValueError(f"cannot load tokenizer {name!r}: {str(error).splitlines()[0]}") from error
        self._fast.encode_special_tokens = True  # as plain text
        self.text, self.sha256 = text, hashlib.sha256(text.encode()).hexdigest()
        data = json.loads(text)
        vocab = self._fast.get_vocab()
        special = {token["content"] for token in data["added_tokens"] if token["special"]}
        ends = [token for token in END_TOKENS if token in vocab]
        if not ends:
            raise ValueError(f"tokenizer {name!r} has no token to end documents with, none of {' '.join(END_TOKENS)}")
        self.n_vocab, self.eot_token = max(vocab.values()) + 1, vocab[ends[0]]
        spell = _from_byte_level if "ByteLevel" in json.dumps([data["pre_tokenizer"], data["decoder"]]) else _from_piece
        literal = {token["content"] for token in data["added_tokens"]}
        self._bytes = {i: token.encode() if token in literal else spell(token) for token, i in vocab.items()}
        self._mergeable_ranks = _Ranks((self._bytes[i], i) for token, i in vocab.items() if token not in special)

    def encode_ordinary(self, text: str) -> list[int]:
        return self._fast.encode(text, add_special_tokens=False).ids

    def encode_to_numpy(self, text: str, disallowed_special: Any = ()) -> np.ndarray:
        return np.array(self.encode_ordinary(text), np.uint32)

    def decode_bytes(self, tokens: Iterable[int]) -> bytes:
        return b"".join(self._bytes[token] for token in tokens)


class _Ranks(list[tuple[bytes, int]]):
    """(bytes, id) pairs; not a dict, since several ids may spell the same bytes."""

    def items(self) -> list[tuple[bytes, int]]:
        return self


def _tokenizer_json(name: str) -> Path:
    from huggingface_hub import hf_hub_download

    path = Path(name) / "tokenizer.json" if Path(name).is_dir() else Path(name)
    return path if path.exists() or name.endswith(".json") else Path(hf_hub_download(name, "tokenizer.json"))


def _from_byte_level(token: str) -> bytes:
    """GPT-2 spells a byte that is no visible character as the next free one from U+0100 on."""
    return bytes(BYTE_OF[character] for character in token)


def _byte_of() -> dict[str, int]:
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


BYTE_OF = _byte_of()


def _from_piece(token: str) -> bytes:
    """SentencePiece: a low line for a space, <0x0A> for a byte."""
    byte = re.fullmatch(r"<0x([0-9A-F]{2})>", token)
    return bytes([int(byte[1], 16)]) if byte else token.replace("\u2581", " ").encode()


def fast_encoder(tokenizer: Tokenizer) -> Callable[[bytes], np.ndarray] | None:
    """A second, far faster encoder for tokenizers that gigatoken knows, where that package is installed."""
    if tokenizer.name == "bytes":
        return lambda data: np.frombuffer(data, np.uint8)
    scheme = GIGATOKEN_SCHEMES.get(tokenizer.name)
    if scheme is None:
        return None
    try:
        import gigatoken
    except ImportError:
        return None
    with tempfile.NamedTemporaryFile("wb", suffix=".tiktoken") as file:
        for token, rank in tokenizer._encoding._mergeable_ranks.items():
            file.write(base64.b64encode(token) + b" %d\n" % rank)
        file.flush()
        return gigatoken.Tokenizer.from_tiktoken(file.name, pretokenizer=scheme).encode


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
    return _write_atomic(Path(path), header.tobytes(), np.ascontiguousarray(tokens).view(np.uint8).data)


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
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(
            error.errno, f"cannot write {path}: {error.strerror}; mend that, then run the same again"
        ) from error
    return digest.hexdigest()


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    _write_atomic(path, json.dumps(data, indent=1).encode() + b"\n")


class Locked(ValueError):
    """Another process writes to the folder."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder against a second writer; the lock dies with its process, nothing is left on the disk."""
    import fcntl

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"out_dir={folder} is not a folder; choose another --out_dir") from error
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise Locked(f"another process is writing to {folder}; wait for it or choose another --out_dir") from error
    try:
        yield
    finally:
        if not os.listdir(folder):
            folder.rmdir()  # failed before the first shard: leave nothing behind
        os.close(handle)


# ---- Dataset: a folder of shards -------------------------------------------------------------------------------------


class Dataset:
    """A folder of shards, checked as far as headers and sizes go. Raises ValueError with what to do about it.

    While `download` fills the folder, shards that are announced but not there yet count as there; reading one waits.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.meta = read_meta(self.folder)
        self.tokenizer: dict[str, Any] = self.meta["tokenizer"]
        self.dtype = token_dtype(self.tokenizer["vocab_size"])
        for shard in self.meta["shards"]:
            if not (self.is_arriving and not (self.folder / shard["file"]).exists()):
                self.read(shard)
        # A download is known by its commit from the start; everything else by the checksums of its shards.
        shards = [(s["file"], s["tokens"], s.get("origin") or s.get("sha256")) for s in self.meta["shards"]]
        identity = json.dumps([self.tokenizer, self.meta.get("revision"), shards])
        self.fingerprint = hashlib.sha256(identity.encode()).hexdigest()[:16]

    @property
    def is_arriving(self) -> bool:
        return "origin" in self.meta["shards"][0] and not (self.folder / "meta.json").exists()

    def shards(self, split: str) -> list[dict[str, Any]]:
        return [shard for shard in self.meta["shards"] if shard["split"] == split]

    def read(self, shard: Mapping[str, Any]) -> np.ndarray:
        path = self.folder / shard["file"]
        if not path.exists() and self.is_arriving:
            self._wait_for(path)
        tokens = read_shard(path)
        if len(tokens) != shard["tokens"] or tokens.dtype != self.dtype:
            raise ValueError(
                f"{path}: {len(tokens):,} {tokens.dtype} tokens, meta.json announces {shard['tokens']:,} {self.dtype}; "
                "shards of two datasets are mixed, prepare or download it again"
            )
        return tokens

    def _wait_for(self, path: Path) -> None:
        if os.environ.get("RANK", "0") == "0":
            print(f"waiting for the download of {path}", file=sys.stderr, flush=True)
        while not path.exists():
            try:
                with locked(self.folder):  # free: nobody downloads
                    if path.exists():
                        return
                    raise ValueError(f"{path} is missing and nothing downloads it; run the same download again")
            except Locked:
                time.sleep(1)


def read_meta(folder: Path) -> dict[str, Any]:
    """meta.json, the announcement of a download that goes on, or what can be known of llm.c shards without either."""
    path = folder / "meta.json"
    if not path.exists():
        path = folder / "progress.json"
        if not path.exists():
            return _foreign_meta(folder)
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        if path.name == "progress.json":
            if "revision" not in meta:
                raise ValueError(f"{folder} is incomplete: run the same prepare again, it goes on where it stopped")
            meta["tokenizer"] = GPT2
        assert set(GPT2) <= set(meta["tokenizer"]), "no tokenizer"
        assert {"file", "split", "tokens"} <= set.intersection(*(set(shard) for shard in meta["shards"])), "no shards"
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AssertionError) as error:
        raise ValueError(f"{path} is damaged ({error}); prepare or download the dataset again") from error
    for shard in meta["shards"]:
        if not isinstance(shard["file"], str) or Path(shard["file"]).name != shard["file"]:
            raise ValueError(f"{path} names {shard['file']!r}, a file outside its folder; do not trust it")
    return meta


def _foreign_meta(folder: Path) -> dict[str, Any]:
    shards = [(path, read_shard(path)) for path in sorted(folder.glob("*.bin"))]
    if not shards:
        raise ValueError(f"no dataset in {folder}; make one: python data_pipeline.py sample|download|prepare")
    if any(tokens.dtype != token_dtype(GPT2["vocab_size"]) for _, tokens in shards):
        raise ValueError(f"{folder} has no meta.json and 32-bit tokens, so its tokenizer is unknown; prepare it again")
    files = [
        {"file": path.name, "split": "val" if "val" in path.name else "train", "tokens": len(tokens)}
        for path, tokens in shards
    ]
    return {"tokenizer": GPT2, "source": "llm.c shards without meta.json, taken as gpt2", "shards": files}


# ---- Order: sequence number -> (source, window), by arithmetic -------------------------------------------------------

BLOCK = 1024  # sequences in which a mixture has its exact counts
ARRIVING_SHARDS = 4  # that the first epoch of a download mixes at a time: 800 MB until training can start
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
        self.first = [0, *itertools.accumulate(counts)]
        self.count = self.first[-1]
        self.limit = dataset.tokenizer["vocab_size"]
        self._tokens: dict[int, np.ndarray] = {}

    def read(self, window: int) -> np.ndarray:
        shard = bisect.bisect_right(self.first, window) - 1
        if shard not in self._tokens:
            self._tokens[shard] = np.asarray(self.dataset.read(self.shards[shard]))  # slicing a memmap is slow
        start = (window - self.first[shard]) * self.seq_len
        return self._tokens[shard][start : start + self.seq_len + 1]

    def place(self, window: int) -> str:
        """Where a window begins: file and token."""
        shard = bisect.bisect_right(self.first, window) - 1
        start = (window - self.first[shard]) * self.seq_len
        return f"{self.dataset.folder / self.shards[shard]['file']}, token {start:,}"

    def check(self, window: int) -> None:
        """ValueError if a token of the window is outside the vocabulary."""
        if (largest := int(self.read(window).max())) >= self.limit:
            name = self.shards[bisect.bisect_right(self.first, window) - 1]["file"]
            limit = f"the limit is vocab_size={self.limit}: made with another tokenizer?"
            raise ValueError(f"{self.dataset.folder / name} has token {largest}, {limit}")

    def groups(self) -> np.ndarray:
        """Bounds within which the first epoch is shuffled: everything, or, for a download that training may follow,
        a few shards at a time in the order of their arrival."""
        step = ARRIVING_SHARDS if "origin" in self.shards[0] else len(self.shards)
        return np.array([*self.first[:-1:step], self.count])


class Order:
    """Sequence p of a run -> (source, window): the same for any number of ranks, nothing to store, O(1) to enter.

    A block of 1024 sequences has exact counts per source in a keyed order; a source deals its windows in a new keyed
    permutation per epoch, each window once per epoch. `stages` are (first block, weights), the first from block 0.
    """

    def __init__(self, groups: list[np.ndarray], stages: list[tuple[int, list[float]]], seed: int):
        self.groups, self.seed = groups, seed
        self.starts = [start for start, _ in stages]
        self.per_block = [mixture_counts(weights) for _, weights in stages]
        lengths = np.diff(self.starts)
        self.before = [sum((n * c for n, c in zip(lengths[:k], self.per_block)), 0) for k in range(len(stages))]
        self._cached: tuple[int, list[int], list[int]] = (-1, [], [])

    def locate(self, p: int, n: int) -> tuple[list[int], list[int]]:
        """(source, window) of the sequences p ... p + n - 1."""
        sources, windows = [], []
        while n > len(sources):
            number, start = divmod(p + len(sources), BLOCK)
            if self._cached[0] != number:
                self._cached = number, *self._block(number)
            end = start + n - len(sources)
            sources, windows = sources + self._cached[1][start:end], windows + self._cached[2][start:end]
        return sources, windows

    def _block(self, number: int) -> tuple[list[int], list[int]]:
        """(source, window) of each of the block's sequences."""
        stage = bisect.bisect_right(self.starts, number) - 1
        per_block = self.per_block[stage]
        first = self.before[stage] + (number - self.starts[stage]) * per_block
        slots = permute(np.arange(BLOCK), BLOCK, key_of(self.seed, 1, number))
        source, window = np.searchsorted(np.cumsum(per_block), slots, side="right"), np.zeros(BLOCK, np.int64)
        for s in np.flatnonzero(per_block):
            window[source == s] = self._window(int(s), first[s] + np.arange(int(per_block[s])))
        return source.tolist(), window.tolist()

    def _window(self, source: int, index: np.ndarray) -> np.ndarray:
        """The window that a source deals as its index-th."""
        groups = self.groups[source]
        epoch, i = np.divmod(index, groups[-1])
        first, count = np.zeros_like(i), np.full_like(i, groups[-1])
        if len(groups) > 2:
            group = np.searchsorted(groups, i, side="right") - 1
            first = np.where(epoch == 0, groups[group], 0)
            count = np.where(epoch == 0, groups[group + 1] - groups[group], groups[-1])
        window = np.empty_like(i)
        for n, offset in set(zip(count.tolist(), first.tolist())):
            at = np.flatnonzero((count == n) & (first == offset))
            key = key_of(self.seed, 2, source, epoch[at], offset)
            window[at] = offset + permute(i[at] - offset, n, key)
        return window


# ---- Batches ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataConfig:
    """Where the training tokens come from."""

    sources: dict[str, float] = field(default_factory=lambda: {"data/fineweb_edu": 1.0})  # shard folders, a=0.7,b=0.3
    stages: str = ""  # other weights from a step on: "2000: a=0.5,b=0.5; 9000: b=1", rounded to 1024 sequences
    unique_tokens: int | None = None  # train on the first N tokens only, over and over; split by weight

    def __post_init__(self) -> None:
        parse_stages(self.stages, self.sources)
        if self.unique_tokens is not None and self.unique_tokens < 1:
            raise ValueError(f"unique_tokens={self.unique_tokens} must be at least 1, or none")


def parse_stages(text: str, sources: Mapping[str, float]) -> list[tuple[int, list[float]]]:
    """(step, one weight per source), from step 0 with the weights of `sources` on. ValueError if it makes no sense."""
    stages = [(0, dict(sources))]
    for part in filter(str.strip, text.split(";")):
        step, _, mixture = part.partition(":")
        try:
            pairs = [pair.rpartition("=") for pair in mixture.split(",")]
            stages.append((int(step), {name.strip(): float(weight) for name, _, weight in pairs}))
        except ValueError as error:
            raise ValueError(f'stages: cannot read {part.strip()!r}; write "STEP: FOLDER=WEIGHT,..."') from error
        if stages[-1][0] <= stages[-2][0] or not stages[-1][1].keys() <= sources.keys():
            known = ", ".join(sources)
            raise ValueError(f"stages: {part.strip()!r} needs a later step than the one before, and only {known}")
    for _, weights in stages:
        _check_weights(weights)
    return [(step, [weights.get(name, 0.0) for name in sources]) for step, weights in stages]


def _check_weights(sources: Mapping[str, float]) -> None:
    if not sources or min(sources.values()) < 0 or not 0 < sum(sources.values()) < np.inf:
        raise ValueError(f"sources={dict(sources)} needs one folder or more, with weights >= 0 and one above 0")
    for (name, weight), count in zip(sources.items(), mixture_counts(sources.values())):
        if weight and not count:
            raise ValueError(f"sources: weight {weight:g} of {name} gives it not one sequence in {BLOCK}; raise it")


def _open_sources(sources: Mapping[str, float], vocab_size: int | None) -> list[Dataset]:
    """The datasets, which must share one tokenizer that fits the model's vocabulary."""
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


def _train_groups(windows: Windows) -> np.ndarray:
    if not windows.count:
        tokens = sum(shard["tokens"] for shard in windows.shards)
        raise ValueError(
            f"{windows.dataset.folder}: no train shard holds a sequence of seq_len + 1 = {windows.seq_len + 1} tokens "
            f"({tokens:,} in all); lower seq_len or add data"
        )
    return windows.groups()


def _first_tokens(
    windows: list[Windows], groups: list[np.ndarray], weights: list[float], unique_tokens: int
) -> list[np.ndarray]:
    """The groups cut off after each source's share of the first `unique_tokens`."""
    cut = []
    for source, bounds, weight in zip(windows, groups, weights):
        count = int(unique_tokens * weight / sum(weights)) // source.seq_len
        if not 0 < count <= source.count:
            raise ValueError(
                f"unique_tokens={unique_tokens:,} means {count:,} sequences of {source.dataset.folder}, "
                f"which has {source.count:,}; choose another number"
            )
        cut.append(np.append(bounds[bounds < count], count))
    return cut


class TokenLoader:
    """Endless training batches of one rank. Sequence p of the run is the same for any number of ranks:
    p = step * batch_sequences + (micro_step * world_size + rank) * batch_size + row.

    Where the ranks do not divide the micro-batches of a step, some get filler in its last round: `weight` is then 0, and
    above 1 for the others, so that the mean over ranks and micro-steps of weight * loss is the mean over the batch."""

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
        stages: str = "",
        unique_tokens: int | None = None,
    ):
        mixtures = parse_stages(stages, sources)
        self.batch_sequences, self.weight = batch_sequences, 1.0
        self.seq_len, self.rank, self.world_size, self.pin_memory = seq_len, rank, world_size, pin_memory
        self.resize(batch_size)
        datasets = _open_sources(sources, vocab_size)
        self.tokenizer: dict[str, Any] = datasets[0].tokenizer
        used = [any(weights[i] for _, weights in mixtures) for i in range(len(sources))]  # the others only validate
        mixtures = [(step, [w for w, use in zip(weights, used) if use]) for step, weights in mixtures]
        weighted = [dataset for dataset, use in zip(datasets, used) if use]
        self._windows = [Windows(dataset, "train", seq_len) for dataset in weighted]
        self._groups = [_train_groups(windows) for windows in self._windows]
        if unique_tokens is not None:
            self._groups = _first_tokens(self._windows, self._groups, mixtures[0][1], unique_tokens)
        self.tokens_per_epoch = seq_len * sum(int(groups[-1]) for groups in self._groups)
        blocks = [(-(-step * batch_sequences // BLOCK), weights) for step, weights in mixtures]
        self._order = Order(self._groups, blocks, seed)
        identity = [seq_len, seed, blocks, unique_tokens, [dataset.fingerprint for dataset in weighted]]
        self.fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
        self._sequences, self._last, self._thread, self._stop = 0, 0, None, threading.Event()
        if rank == 0:
            for dataset in weighted:
                if not {"sha256", "origin"} & dataset.meta["shards"][0].keys():
                    print(f"{dataset.folder}: {dataset.meta['source']}", file=sys.stderr)

    def resize(self, batch_size: int) -> None:
        """Another micro-batch, before the first next(): the sequences and their order stay the same."""
        assert self.batch_sequences % batch_size == 0, (self.batch_sequences, batch_size)
        self.batch_size = batch_size
        self._stride = batch_size * self.world_size  # sequences of all ranks per next()

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
        self._last, self._sequences = self._sequences, self._after(self._sequences)
        micro_steps = -(-self.batch_sequences // self._stride)
        mine = self._first(self._last) is not None
        self.weight = mine * (micro_steps * self._stride / self.batch_sequences)
        return item

    def _first(self, p: int) -> int | None:
        """Number of this rank's first sequence in the round that begins with sequence p; None if it has none."""
        first = p + self.rank * self.batch_size
        return first if first // self.batch_sequences == p // self.batch_sequences else None

    def _after(self, p: int) -> int:
        """With which sequence the round after that begins: a step's last round may be a short one."""
        return min(p + self._stride, (p // self.batch_sequences + 1) * self.batch_sequences)

    def numbers(self) -> range:
        """The numbers p of the sequences of this rank's last batch; filler is the round's first batch again."""
        p = self._first(self._last)
        p = self._last if p is None else p
        return range(p, p + self.batch_size)

    def where(self) -> str:
        """The places at which the sequences of this rank's last batch begin, for a message about it."""
        places = zip(*self._order.locate(self.numbers().start, self.batch_size))
        return "; ".join(self._windows[source].place(window) for source, window in list(places)[:4])

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
                first = self._first(p)
                item = self._batch(p if first is None else first)  # filler is data, too: finite, and of weight 0
            except BaseException as error:  # raised again by next(), in the thread of the training loop
                item = error
            p = self._after(p)
            while not stop.is_set():
                try:
                    batches.put(item, timeout=0.1)
                    break
                except queue.Full:
                    pass

    def _batch(self, p: int) -> tuple["Tensor", "Tensor"]:
        import torch

        pair = np.empty((2, self.batch_size, self.seq_len), np.int64)  # two arrays: both halves stay contiguous
        places = list(zip(*self._order.locate(p, self.batch_size)))
        for row, (source, window) in enumerate(places):
            tokens = self._windows[source].read(window)
            pair[0, row], pair[1, row] = tokens[:-1], tokens[1:]
        if pair.max() >= self.tokenizer["vocab_size"]:  # on a GPU it would be an assert that kills the process
            for source, window in places:
                self._windows[source].check(window)
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
            windows.check(window)
            tokens = windows.read(window)
            pair[0, row, : len(tokens) - 1], pair[1, row, : len(tokens) - 1] = tokens[:-1], tokens[1:]
        batch = torch.from_numpy(pair)
        yield batch[0], batch[1]
