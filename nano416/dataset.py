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
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nano416.files import Locked, atomic_write, locked
from nano416.tokenizer import GPT2

# Shards of a download that are shuffled together: training can start after 800 MB of FineWeb-Edu.
DOWNLOAD_GROUP_SHARDS = 4

# ---- Shards: the llm.c format ----------------------------------------------------------------------------------------

# 256 little-endian int32: magic, version, number of tokens, zeros.
HEADER_BYTES = 256 * 4
# (magic, version) of llm.c's data_common.py, for GPT-2 and for Llama 3.
FORMATS = {(20240520, 1): np.dtype("<u2"), (20240801, 7): np.dtype("<u4")}


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 where the vocabulary fits, else uint32."""
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


def write_shard(path: str | Path, tokens: np.ndarray) -> str:
    """Write uint16 or uint32 tokens as one shard, atomically. Returns the sha256 of the file."""
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


def read_shard(path: str | Path) -> np.ndarray:
    """Memory map the tokens of a shard. Raises ValueError if the file is not exactly what its header says."""
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
    n_tokens = int(header[2])
    expected = HEADER_BYTES + n_tokens * dtype.itemsize
    if size != expected:
        raise ValueError(f"{path}: {size:,} bytes, its header announces {expected:,}; prepare or download it again")
    if n_tokens == 0:
        # An empty part of a file cannot be mapped.
        return np.zeros(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=HEADER_BYTES)


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
        for shard in self.meta["shards"]:
            if (self.folder / shard["file"]).exists() or not self.is_downloading:
                self.read(shard)
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

    def read(self, shard: Mapping[str, Any]) -> np.ndarray:
        """Tokens of a shard, memory mapped."""
        path = self.folder / shard["file"]
        if not path.exists() and self.is_downloading:
            self._wait_for(path)
        tokens = read_shard(path)
        if len(tokens) != shard["tokens"] or tokens.dtype != self.dtype:
            raise ValueError(
                f"{path}: {len(tokens):,} {tokens.dtype} tokens, meta.json announces {shard['tokens']:,} {self.dtype}; "
                "shards of two datasets are mixed, prepare or download it again"
            )
        return tokens

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


def read_meta(folder: Path) -> dict[str, Any]:
    """The contents of meta.json, or of a running download's progress.json, or metadata of bare llm.c shards."""
    path = folder / "meta.json"
    if not path.exists():
        path = folder / "progress.json"
    if not path.exists():
        return _llmc_meta(folder)
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        if path.name == "progress.json":
            # Only a download names a revision and announces all of its shards; a prepare knows them at its end.
            if "revision" not in meta:
                raise ValueError(f"{folder} is incomplete: run the same prepare again, it continues where it stopped")
            meta["tokenizer"] = GPT2
        if not set(GPT2) <= set(meta["tokenizer"]):
            raise TypeError("no tokenizer")
        if not meta["shards"] or not all({"file", "split", "tokens"} <= set(shard) for shard in meta["shards"]):
            raise TypeError("no shards")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); prepare or download the dataset again") from error
    for shard in meta["shards"]:
        # A downloaded meta.json must not make us read or write other files.
        if not isinstance(shard["file"], str) or Path(shard["file"]).name != shard["file"]:
            raise ValueError(f"{path} names {shard['file']!r}, a file outside its folder; do not trust it")
    return meta


def _llmc_meta(folder: Path) -> dict[str, Any]:
    """Metadata for a folder of uint16 llm.c shards without meta.json: such shards hold gpt2 tokens by convention."""
    shards = {path: read_shard(path) for path in sorted(folder.glob("*.bin"))}
    if not shards:
        raise ValueError(f"no dataset in {folder}; make one: python data_pipeline.py sample|download|prepare")
    if any(tokens.dtype != token_dtype(GPT2["vocab_size"]) for tokens in shards.values()):
        raise ValueError(f"{folder} has no meta.json and 32-bit tokens, so its tokenizer is unknown; prepare it again")
    entries = [
        {"file": path.name, "split": "val" if "val" in path.name else "train", "tokens": len(tokens)}
        for path, tokens in shards.items()
    ]
    return {"tokenizer": GPT2, "source": "llm.c shards without meta.json, taken as gpt2", "shards": entries}


class Sequences:
    """The sequences of seq_len + 1 tokens of one split: sequence i of a shard begins at token i * seq_len.

    The last token of a sequence is a target there and the first input of the next one, so every token is a target once.
    """

    def __init__(self, dataset: TokenDataset, split: str, seq_len: int, keep_partial: bool = False):
        self.dataset = dataset
        self.seq_len = seq_len
        self.shards = dataset.shards(split)
        # With keep_partial the rest at the end of a shard, shorter than seq_len, is a sequence too.
        rounding = seq_len - 1 if keep_partial else 0
        # The last token of a shard is only a target, hence the - 1.
        counts = [max(0, (shard["tokens"] - 1 + rounding) // seq_len) for shard in self.shards]
        self.first_of_shard = [0, *itertools.accumulate(counts)]
        self.count = self.first_of_shard[-1]
        # Memory maps of the shards read so far, by their number.
        self._tokens: dict[int, np.ndarray] = {}

    def read(self, index: int) -> np.ndarray:
        """Tokens [seq_len + 1] of a sequence, fewer for a partial one."""
        shard, start = self._locate(index)
        if shard not in self._tokens:
            # asarray: slicing a numpy memmap object is ten times as slow as slicing an array on the same memory.
            self._tokens[shard] = np.asarray(self.dataset.read(self.shards[shard]))
        return self._tokens[shard][start : start + self.seq_len + 1]

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
