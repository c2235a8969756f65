"""Token shards: the llm.c file format, a folder of shards, the sequences in it.

    write_shard("data/mine/train_000000.bin", tokens)           # uint16 or uint32 numpy array -> sha256 of the file
    dataset = TokenDataset("data/mine")
    sequences = Sequences(dataset, "train", seq_len=1024)
    sequences.read(0)                                           # 1025 tokens

A dataset is a folder of llm.c shards (train_000000.bin ..., val_000000.bin ...) and meta.json; data_pipeline.py makes
it. A folder of llm.c shards without meta.json is taken as gpt2 tokens.
"""

import bisect
import hashlib
import itertools
import json
import os
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from nano416.files import Locked, atomic_write, locked
from nano416.tokenizer import GPT2

# Shards of a download that are shuffled together: training can start after 800 MB of FineWeb-Edu.
DOWNLOAD_GROUP_SHARDS = 4
# The name of a file in the same folder.
FILE_NAME = re.compile(r"(?!\.{1,2}$)[^/\0\ud800-\udfff]{1,200}")

# ---- Shards: the llm.c format ----------------------------------------------------------------------------------------

# 256 little-endian int32: magic, version, number of tokens, zeros.
HEADER_BYTES = 256 * 4
# (magic, version) of llm.c's data_common.py, for GPT-2 and for Llama 3.
FORMATS = {(20240520, 1): np.dtype("<u2"), (20240801, 7): np.dtype("<u4")}
# The header counts in int32.
MAX_SHARD_TOKENS = 2**31 - 1


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 where the vocabulary fits, else uint32."""
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


def write_shard(path: str | Path, tokens: np.ndarray) -> str:
    """Write uint16 or uint32 tokens as one shard, atomically. Returns the sha256 of the file."""
    if len(tokens) > MAX_SHARD_TOKENS:
        raise ValueError(f"{path}: {len(tokens):,} tokens, a shard holds at most {MAX_SHARD_TOKENS:,}; write several")
    magic, version = next(key for key, dtype in FORMATS.items() if dtype == tokens.dtype)
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(tokens)
    digest = hashlib.sha256()
    with atomic_write(path) as file:
        # A view, so that the tokens are not copied.
        for data in (header.tobytes(), np.ascontiguousarray(tokens).view(np.uint8).data):
            file.write(data)
            digest.update(data)
    return digest.hexdigest()


def open_shard(path: str | Path) -> BinaryIO:
    """The file of a shard. Raises ValueError if it is missing or no ordinary file."""
    if not os.path.isfile(path):
        # Opening a FIFO would wait for ever.
        reason = "not a file, or a link to nothing" if os.path.lexists(path) else "missing"
        raise ValueError(f"{path}: {reason}; make the dataset again or copy the shard back")
    # Unbuffered, because it is read at random places.
    return open(path, "rb", buffering=0)


def read_header(file: BinaryIO) -> tuple[np.dtype, int]:
    """Type and number of the tokens of an open shard. Raises ValueError if it is not exactly what its header says."""
    data = os.pread(file.fileno(), HEADER_BYTES, 0)
    header = np.frombuffer(data, "<i4") if len(data) == HEADER_BYTES else np.zeros(256, "<i4")
    dtype = FORMATS.get((int(header[0]), int(header[1])))
    if dtype is None:
        raise ValueError(f"{file.name}: not a token shard (no llm.c header); only shards may end in .bin here")
    n_tokens = int(header[2])
    size = os.fstat(file.fileno()).st_size
    expected = HEADER_BYTES + n_tokens * dtype.itemsize
    if size != expected:
        raise ValueError(
            f"{file.name}: {size:,} bytes, its header announces {expected:,}; prepare or download it again"
        )
    return dtype, n_tokens


def read_shard(path: str | Path) -> np.ndarray:
    """Memory map the tokens of a shard. Raises ValueError if the file is not exactly what its header says."""
    with open_shard(path) as file:
        dtype, n_tokens = read_header(file)
        # An empty part of a file cannot be mapped.
        return np.memmap(file, dtype, "r", HEADER_BYTES, (n_tokens,)) if n_tokens else np.zeros(0, dtype)


# ---- A dataset: a folder of shards -----------------------------------------------------------------------------------


class TokenDataset:
    """A folder of shards with their metadata. Raises ValueError if a header or a size is not what it should be.

    While `data_pipeline.py download` fills the folder, shards that are announced but absent count as present, and
    reading one waits for it.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.meta = read_meta(self.folder)
        self.tokenizer: dict[str, Any] = self.meta["tokenizer"]
        self.vocab_size: int = self.tokenizer["vocab_size"]
        self.dtype = token_dtype(self.vocab_size)
        # Of each shard that is there, by its name: a checksum of its beginning and its end.
        self.samples: dict[str, str] = {}
        for shard in self.meta["shards"]:
            if os.path.lexists(self.folder / shard["file"]) or not self.is_downloading:
                with self.open(shard) as file:
                    self.samples[shard["file"]] = _sample(file)
        # The commit identifies a download from its start, the checksums of the shards identify everything else.
        shards = [(s["file"], s["tokens"], s.get("origin") or s.get("sha256")) for s in self.meta["shards"]]
        identity = json.dumps([self.tokenizer, self.meta.get("revision"), shards])
        self.fingerprint = hashlib.sha256(identity.encode()).hexdigest()[:16]

    @property
    def is_downloading(self) -> bool:
        """Whether meta.json, which a download writes last, is still absent."""
        return "origin" in self.meta["shards"][0] and not (self.folder / "meta.json").exists()

    def shards(self, split: str) -> list[dict[str, Any]]:
        """The entries of meta.json for a split, "train" or "val"."""
        return [shard for shard in self.meta["shards"] if shard["split"] == split]

    def open(self, shard: Mapping[str, Any]) -> BinaryIO:
        """An open shard, whose tokens begin after HEADER_BYTES. Raises ValueError if it is not what meta.json says."""
        path = self.folder / shard["file"]
        if not path.exists() and self.is_downloading:
            self._wait_for(path)
        file = open_shard(path)
        dtype, n_tokens = read_header(file)
        if n_tokens != shard["tokens"] or dtype != self.dtype:
            raise ValueError(
                f"{path}: {n_tokens:,} {dtype} tokens, meta.json announces {shard['tokens']:,} {self.dtype}; "
                "shards of two datasets are mixed, prepare or download it again"
            )
        return file

    def read(self, shard: Mapping[str, Any]) -> np.ndarray:
        """Tokens of a shard, memory mapped."""
        self.open(shard).close()
        return read_shard(self.folder / shard["file"])

    def _wait_for(self, path: Path) -> None:
        # torchrun's variable and not distributed.rank(): data_pipeline.py reads datasets without importing torch.
        if os.environ.get("RANK", "0") == "0":
            print(f"waiting for the download of {path}", file=sys.stderr, flush=True)
        while not path.exists():
            try:
                with locked(self.folder):
                    # The lock is free, so no download is running.
                    if path.exists():
                        return
                    raise ValueError(f"{path} is missing and nothing downloads it; run the same download again")
            except Locked:
                time.sleep(1)


def _sample(file: BinaryIO) -> str:
    """Checksum of the first and the last 4 KB of a shard: two reads tell it from one with other text."""
    handle = file.fileno()
    end = max(0, os.fstat(handle).st_size - 4096)
    return hashlib.sha256(os.pread(handle, 4096, 0) + os.pread(handle, 4096, end)).hexdigest()[:16]


def read_meta(folder: Path) -> dict[str, Any]:
    """The contents of meta.json, or of a running download's progress.json, or metadata of bare llm.c shards.

    Raises ValueError if they are not what the rest of the program relies on.
    """
    path = folder / "meta.json"
    if not os.path.lexists(path):
        path = folder / "progress.json"
    if not os.path.lexists(path):
        return _llmc_meta(folder)
    if not path.is_file():
        # Opening a FIFO would wait for ever.
        raise ValueError(f"{path}: not a file, or a link to nothing; prepare or download the dataset again")
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); prepare or download the dataset again") from error
    if path.name == "progress.json" and isinstance(meta, dict):
        # Only a download names a revision and announces all of its shards; a prepare knows them at its end.
        if "revision" not in meta:
            raise ValueError(f"{folder} is incomplete: run the same prepare again, it continues where it stopped")
        meta["tokenizer"] = GPT2
    fault = _meta_fault(meta)
    if fault:
        raise ValueError(f"{path} is damaged ({fault}); prepare or download the dataset again")
    return meta


def _meta_fault(meta: Any) -> str | None:
    """What is wrong with the contents of a meta.json, if anything."""
    if not isinstance(meta, dict) or not isinstance(meta.get("tokenizer"), dict):
        return "no tokenizer"
    tokenizer = meta["tokenizer"]
    for key, example in GPT2.items():
        # Not isinstance: true is an int too.
        if type(tokenizer.get(key)) is not type(example):
            return f"tokenizer: {key} is {tokenizer.get(key)!r:.50}"
    if not 0 <= tokenizer["eot_id"] < tokenizer["vocab_size"] <= 2**31:
        return f"tokenizer: eot_id {tokenizer['eot_id']!r:.30} of vocab_size {tokenizer['vocab_size']!r:.30}"
    if not isinstance(meta.get("shards"), list) or not meta["shards"]:
        return "no shards"
    names = set()
    for shard in meta["shards"]:
        fault = _shard_fault(shard)
        if fault:
            return f"shards: {fault}"
        if shard["file"] in names:
            return f"shards: {shard['file']!r} twice"
        names.add(shard["file"])
    return None


def _shard_fault(shard: Any) -> str | None:
    """What is wrong with the entry of a shard in meta.json, if anything."""
    if not isinstance(shard, dict):
        return f"{shard!r:.50} does not describe a shard"
    name = shard.get("file")
    # A downloaded meta.json must not make us read or write other files.
    if not isinstance(name, str) or not FILE_NAME.fullmatch(name):
        return f"{name!r:.100} is not a file name, or names a file outside its folder; do not trust it"
    if shard.get("split") not in ("train", "val"):
        return f"{name}: split is {shard.get('split')!r:.50}"
    if type(shard.get("tokens")) is not int or not 0 <= shard["tokens"] <= MAX_SHARD_TOKENS:
        return f"{name}: tokens is {shard.get('tokens')!r:.50}"
    # These may be absent, or null in an unfinished download.
    for key, kind in {"documents": int, "bytes": int, "sha256": str, "origin": str}.items():
        if shard.get(key) is not None and type(shard[key]) is not kind:
            return f"{name}: {key} is {shard[key]!r:.50}"
    return None


def _llmc_meta(folder: Path) -> dict[str, Any]:
    """Metadata for a folder of uint16 llm.c shards without meta.json: such shards hold gpt2 tokens by convention."""
    entries = []
    for path in sorted(folder.glob("*.bin")):
        with open_shard(path) as file:
            dtype, n_tokens = read_header(file)
        if dtype != token_dtype(GPT2["vocab_size"]):
            raise ValueError(
                f"{folder} has no meta.json and 32-bit tokens, so its tokenizer is unknown; prepare it again"
            )
        entries.append({"file": path.name, "split": "val" if "val" in path.name else "train", "tokens": n_tokens})
    if not entries:
        raise ValueError(f"no dataset in {folder}; make one: python data_pipeline.py sample|download|prepare")
    return {"tokenizer": GPT2, "source": "llm.c shards without meta.json, taken as gpt2", "shards": entries}


class Sequences:
    """The sequences of seq_len + 1 tokens of one split: sequence i of a shard begins at token i * seq_len.

    The last token of a sequence is a target there and the first input of the next one, so every token is a target once.
    """

    def __init__(
        self, dataset: TokenDataset, split: str, seq_len: int, keep_partial: bool = False, max_open_shards: int = 16
    ):
        self.dataset = dataset
        self.max_open_shards = max_open_shards
        self.seq_len = seq_len
        self.shards = dataset.shards(split)
        # With keep_partial the rest at the end of a shard, shorter than seq_len, is a sequence too.
        rounding = seq_len - 1 if keep_partial else 0
        # The last token of a shard is only a target, hence the - 1.
        counts = [max(0, (shard["tokens"] - 1 + rounding) // seq_len) for shard in self.shards]
        self.first_of_shard = [0, *itertools.accumulate(counts)]
        self.count = self.first_of_shard[-1]
        # Open shards by their number, in the order of their last use.
        self._files: dict[int, BinaryIO] = {}

    @property
    def lost_frac(self) -> float:
        """Fraction of the tokens that no sequence reaches: those at the ends of shards that do not fill one."""
        tokens = sum(shard["tokens"] for shard in self.shards)
        return 1 - self.count * self.seq_len / tokens if tokens else 0.0

    def read(self, index: int) -> np.ndarray:
        """Tokens [seq_len + 1] of a sequence, fewer for a partial one."""
        shard, start = self._locate(index)
        dtype = self.dataset.dtype
        n_tokens = min(self.seq_len + 1, self.shards[shard]["tokens"] - start)
        # Not memory maps: if the file is truncated, reading one ends the process with SIGBUS.
        handle = self._open(shard).fileno()
        data = os.pread(handle, n_tokens * dtype.itemsize, HEADER_BYTES + start * dtype.itemsize)
        if len(data) != n_tokens * dtype.itemsize:
            raise ValueError(f"{self.describe(index)}: the file was cut off while in use; put the shard back")
        return np.frombuffer(data, dtype)

    def _open(self, shard: int) -> BinaryIO:
        """The file of a shard. The last max_open_shards stay open."""
        file = self._files.pop(shard, None) or self.dataset.open(self.shards[shard])
        self._files[shard] = file
        if len(self._files) > self.max_open_shards:
            oldest = next(iter(self._files))
            self._files.pop(oldest).close()
        return file

    def describe(self, index: int) -> str:
        """Where a sequence begins, for messages: file and token."""
        shard, start = self._locate(index)
        return f"{self.dataset.folder / self.shards[shard]['file']}, token {start:,}"

    def check(self, index: int) -> None:
        """Raise ValueError if a token is outside the vocabulary."""
        largest = int(self.read(index).max())
        if largest >= self.dataset.vocab_size:
            limit = f"the limit is vocab_size={self.dataset.vocab_size}: made with another tokenizer?"
            raise ValueError(f"{self.describe(index)}: token id {largest}, {limit}")

    def shuffle_groups(self) -> np.ndarray:
        """Bounds [0, ..., count] within which the first epoch is shuffled.

        One group, except for a download. Training may begin before it ends, so its shards are shuffled a few at a time.
        Complete downloads are treated alike, or the order would depend on when training began.
        """
        shards_per_group = DOWNLOAD_GROUP_SHARDS if "origin" in self.shards[0] else len(self.shards)
        return np.array([*self.first_of_shard[:-1:shards_per_group], self.count])

    def _locate(self, index: int) -> tuple[int, int]:
        """(shard, first token) of a sequence."""
        shard = bisect.bisect_right(self.first_of_shard, index) - 1
        return shard, (index - self.first_of_shard[shard]) * self.seq_len
