"""Turn text into token shards.

    python data_pipeline.py sample      # the Python reference inside every CPython, as bytes: no network, 1 second
    python data_pipeline.py download    # FineWeb-Edu, already tokenized: 100 shards = 10B tokens, 20 GB
    python data_pipeline.py prepare --source="my/*.jsonl.gz" --out_dir=data/mine    # your text or any HF dataset
    python data_pipeline.py verify --out_dir=data/mine    # every header, size, checksum and token
    python data_pipeline.py info --out_dir=data/mine      # what the dataset holds, and how it begins
    python data_pipeline.py prepare --help                # the options of one command

A dataset is a folder of llm.c shards (train_000000.bin ..., val_000000.bin ...) and meta.json, which is written last:
tokenizer, source, and tokens, documents, size and sha256 of each shard. Every document is followed by the eot token.
training.py reads it through nano416/dataset.py.

prepare is several times as fast with `pip install gigatoken isal orjson`: gigatoken encodes, after a check that it
gives tiktoken's tokens, isal unpacks .gz, orjson parses JSON.
"""

import functools
import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
from tqdm import tqdm
from tqdm.contrib.concurrent import thread_map

from nano416.config import differences, run_cli, run_subcommand, visible
from nano416.dataset import (
    HEADER_BYTES,
    MAX_SHARD_TOKENS,
    TokenDataset,
    read_meta,
    read_shard,
    token_dtype,
    write_shard,
)
from nano416.encode import (
    Encoded,
    Encoder,
    EncoderOptions,
    choose_encoder,
    encode_chunks,
    encoder_version,
    num_cores,
)
from nano416.files import locked, require_local, write_json
from nano416.hub import hub_errors
from nano416.sources import SplitFiles, assign_splits, find_files, first_names, shown
from nano416.text_files import START, Chunk, Position, read_chunks, text_format
from nano416.tokenizer import GPT2, Tokenizer, load_tokenizer

# ---- Writing shards, resumably ---------------------------------------------------------------------------------------


class ShardWriter:
    """Write tokens as shards of equal size.

    After each shard, progress.json records the shards so far and the position where the next one begins. If the run is
    killed, another one with the same `job` continues there. finish() replaces progress.json with meta.json.
    """

    def __init__(self, folder: Path, job: Mapping[str, Any], tokenizer: Mapping[str, Any], shard_tokens: int):
        self.folder = folder
        self.tokenizer = dict(tokenizer)
        new_progress = {"job": dict(job), "shards": [], "position": Position()}
        self.progress: dict[str, Any] = read_progress(folder, job) or new_progress
        self.is_finished = (folder / "meta.json").exists()
        # Left by runs that were killed while writing. Nobody else writes here: the caller holds the folder's lock.
        for path in folder.glob(".*.[0-9]*.tmp"):
            path.unlink()
        self.split = ""
        self._buffer = np.empty(shard_tokens, token_dtype(tokenizer["vocab_size"]))
        self._filled = 0

    def last_tokens(self, count: int) -> np.ndarray:
        """The last `count` tokens added by this run and those before it, or all if they are fewer."""
        parts = [self._buffer[max(0, self._filled - count) : self._filled]]
        count -= len(parts[0])
        for shard in reversed(self.progress["shards"]):
            if not count:
                break
            parts.insert(0, read_shard(self.folder / shard["file"])[-count:])
            count -= len(parts[0])
        return np.concatenate(parts)

    @property
    def position(self) -> Position:
        """Where to continue reading the source."""
        return Position(*self.progress["position"])

    def num_tokens(self, split: str) -> int:
        """Tokens added to a split so far, by this run and those before it."""
        written = sum(shard["tokens"] for shard in self.progress["shards"] if shard["split"] == split)
        return written + (self._filled if split == self.split else 0)

    def num_documents(self, split: str) -> int:
        """Ends of documents in a split so far."""
        written = sum(shard["documents"] for shard in self.progress["shards"] if shard["split"] == split)
        buffered = count_documents(self._buffer[: self._filled], self.tokenizer["eot_id"])
        return written + (buffered if split == self.split else 0)

    def add(self, split: str, tokens: np.ndarray, position: Position = START) -> None:
        """Append tokens that begin at `position` of the source. A change of split ends the current shard."""
        if not len(tokens):
            return
        if split != self.split:
            self.flush(position)
            self.split = split
        while len(tokens):
            count = min(len(tokens), len(self._buffer) - self._filled)
            self._buffer[self._filled : self._filled + count] = tokens[:count]
            self._filled += count
            tokens = tokens[count:]
            position = position._replace(token=position.token + count)
            if self._filled == len(self._buffer):
                self.flush(position)

    def flush(self, position: Position) -> None:
        """Write the buffered tokens as a shard; a later run continues at `position`."""
        if not self._filled:
            return
        tokens = self._buffer[: self._filled]
        self._filled = 0
        if not self.progress["shards"]:
            # Before the first shard: after a crash, a shard without progress.json would count as somebody else's.
            write_json(self.folder / "progress.json", self.progress)
        number = sum(shard["split"] == self.split for shard in self.progress["shards"])
        name = f"{self.split}_{number:06d}.bin"
        shard = {
            "file": name,
            "split": self.split,
            "tokens": len(tokens),
            "documents": count_documents(tokens, self.tokenizer["eot_id"]),
            "bytes": HEADER_BYTES + tokens.nbytes,
            "sha256": write_shard(self.folder / name, tokens),
        }
        self.progress["shards"].append(shard)
        self.progress["position"] = position
        write_json(self.folder / "progress.json", self.progress)

    def finish(self, metadata: Mapping[str, Any], end: Position = START) -> None:
        """Write the last, shorter shard and meta.json. `end` is the end of the source."""
        self.flush(end)
        write_meta(self.folder, self.progress, self.tokenizer, metadata)

    def discard(self) -> None:
        """Delete what was written."""
        for shard in self.progress["shards"]:
            (self.folder / shard["file"]).unlink()
        (self.folder / "progress.json").unlink(missing_ok=True)
        self.progress["shards"] = []


def write_meta(
    folder: Path, progress: Mapping[str, Any], tokenizer: Mapping[str, Any], metadata: Mapping[str, Any]
) -> None:
    """Replace progress.json with meta.json: from here on the dataset is complete."""
    meta: dict[str, Any] = {"version": 1, "tokenizer": dict(tokenizer), **metadata}
    for split in ("train", "val"):
        shards = [shard for shard in progress["shards"] if shard["split"] == split]
        meta[split] = {key: sum(shard[key] for shard in shards) for key in ("tokens", "documents")}
    meta["job"] = progress["job"]
    meta["shards"] = progress["shards"]
    write_json(folder / "meta.json", meta)
    (folder / "progress.json").unlink(missing_ok=True)


def read_progress(folder: Path, job: Mapping[str, Any]) -> dict[str, Any] | None:
    """meta.json or progress.json of an earlier run of the same job, None in a new folder.

    Raises ValueError if the folder holds another dataset, shards of unknown origin, or damaged files.
    """
    is_finished = (folder / "meta.json").exists()
    path = folder / ("meta.json" if is_finished else "progress.json")
    if not path.exists():
        shards = sorted(folder.glob("*.bin"))
        if shards:
            raise ValueError(f"{shards[0]} was not made by this command; choose another --out_dir")
        return None
    try:
        progress = json.loads(path.read_text(encoding="utf-8"))
        changes = differences(progress["job"], job)
        shards = [folder / shard["file"] for shard in progress["shards"]]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete {folder} or choose another --out_dir") from error
    if is_finished:
        # A run that was killed while replacing progress.json with meta.json leaves both.
        (folder / "progress.json").unlink(missing_ok=True)
    if changes:
        raise ValueError(
            f"{folder} holds another dataset ({'; '.join(changes)[:300]}); choose another --out_dir or delete it"
        )
    for shard in shards:
        # Only a download may lack shards, since it can fetch a single one again.
        if shard.exists() or "repo" not in job:
            read_shard(shard)
    return progress


def count_documents(tokens: np.ndarray, eot_id: int) -> int:
    return int(np.count_nonzero(tokens == eot_id))


# ---- prepare ---------------------------------------------------------------------------------------------------------

FINEWEB_EDU = "HuggingFaceFW/fineweb-edu"
# A wanted validation part may cut a text file larger than this many bytes per wanted token, about twice its size in
# English, and leaves smaller ones whole.
CUT_BYTES_PER_TOKEN = 10
# No compression makes a text a thousand times smaller, and no token is less than a byte.
MAX_TOKENS_PER_BYTE = 1000


@dataclass(frozen=True)
class PrepareConfig:
    source: str = FINEWEB_EDU  # files, folders, globs, {00..09}, {a,b}, URLs, lists of these; a Hugging Face dataset id
    out_dir: str = "data/fineweb_edu"  # folder of the dataset
    subset: str | None = None  # of a Hugging Face dataset (sample-10BT for FineWeb-Edu)
    split: str = "train"  # of a Hugging Face dataset
    text_key: str = "text"  # key or column that holds the text
    tokenizer: str = "gpt2"  # gpt2, bytes, any tiktoken name, tokenizer.json, Hub id; passthrough:gpt2 takes ids
    val_source: str | None = None  # validation text; without it, files marked val or dev, or the first val_tokens
    val_tokens: int | None = None  # first tokens that validate, whole documents (1% of the bytes, at most 10M)
    shard_tokens: int = 100_000_000  # tokens per shard
    fast: bool = True  # encode with the package gigatoken, where it is installed and agrees with tiktoken
    on_error: Literal["stop", "skip"] = "stop"  # at a record without text; skip counts and shows them
    workers: int | None = None  # processes, the result is the same for any number (one per core)

    def __post_init__(self) -> None:
        require_local("out_dir", self.out_dir)
        if self.shard_tokens < 1:
            raise ValueError(f"shard_tokens={self.shard_tokens} must be at least 1")
        if self.shard_tokens > MAX_SHARD_TOKENS:
            raise ValueError(f"shard_tokens={self.shard_tokens} must be at most {MAX_SHARD_TOKENS}")
        if self.val_tokens is not None and self.val_tokens < 0:
            raise ValueError(f"val_tokens={self.val_tokens} must be at least 0")
        # More only take memory, 0.1 GB each.
        max_workers = max(64, 2 * num_cores())
        if self.workers is not None and self.workers > max_workers:
            raise ValueError(f"workers={self.workers} must be at most {max_workers} on this machine")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers={self.workers} must be at least 1")
        if self.val_source is not None and self.val_tokens is not None:
            raise ValueError(f"val_source={self.val_source} is used whole; leave out val_tokens")


@dataclass(frozen=True)
class Source:
    """Files to tokenize. The val split is files.val, or else the first val_tokens tokens of files.train."""

    files: SplitFiles
    val_tokens: int

    @functools.cached_property
    def paths(self) -> list[str]:
        """Of all files in reading order, those of the val split first."""
        return [file.path for file in self.files.val + self.files.train]

    @functools.cached_property
    def sizes(self) -> list[int]:
        return [file.size for file in self.files.val + self.files.train]

    def may_be_cut(self, file: int) -> bool:
        """Whether the val split may end inside this file: a text that is the last one, or much larger than wanted."""
        is_last = file == len(self.paths) - 1
        is_large = self.sizes[file] > CUT_BYTES_PER_TOKEN * self.val_tokens
        return text_format(self.paths[file]) in (".txt", ".md") and (is_last or is_large)


def find_source(cfg: PrepareConfig) -> Source:
    """The files of --source and --val_source and how they are split."""
    subset = "sample-10BT" if cfg.source == FINEWEB_EDU and cfg.subset is None else cfg.subset
    listing = find_files(cfg.source, subset, cfg.split, cfg.out_dir)
    if cfg.val_source is not None:
        val_listing = find_files(cfg.val_source, subset, cfg.split, cfg.out_dir)
        files = assign_splits(listing, val_listing, "val_source")
    else:
        files = assign_splits(listing, val_option="" if cfg.val_tokens is None else "val_tokens")
    if not files.train:
        names = first_names([file.name for file in listing.files])
        raise ValueError(
            f"source {cfg.source!r} leaves nothing to train on, its files are for validation or test: {names}; "
            "to train on some of them nevertheless, name them alone"
        )
    n_bytes = sum(file.size for file in files.train)
    val_tokens = cfg.val_tokens
    if val_tokens is None:
        val_tokens = 0 if files.val else min(10_000_000, max(1, n_bytes // 100))
    if 0 < n_bytes * MAX_TOKENS_PER_BYTE < val_tokens:
        raise ValueError(f"val_tokens={val_tokens} is more than the source holds: {n_bytes:,} bytes; lower it")
    return Source(files, val_tokens)


def prepare(cfg: PrepareConfig) -> None:
    """Tokenize text into a dataset. The same command again continues where a killed one stopped."""
    options = EncoderOptions(cfg.tokenizer, cfg.text_key)
    # Load the vocabulary first, so that a failure leaves no folder behind.
    tokenizer = Encoder(options).tokenizer
    source = find_source(cfg)
    print("\n".join(source.files.summary()), flush=True)
    # Stands for the list of files in the job: another list is another dataset.
    listing = hashlib.sha256(json.dumps([source.paths, source.sizes]).encode()).hexdigest()[:16]
    job = {
        "source": cfg.source,
        "files": len(source.paths),
        "bytes": sum(source.sizes),
        "listing": listing,
        "tokenizer": cfg.tokenizer,
        "text_key": cfg.text_key,
        "val_tokens": source.val_tokens,
        "shard_tokens": cfg.shard_tokens,
    }
    with locked(Path(cfg.out_dir)):
        writer = ShardWriter(Path(cfg.out_dir), job, tokenizer.info(), cfg.shard_tokens)
        if not writer.is_finished:
            first_chunk = itertools.islice(read_chunks(source.paths, cfg.text_key), 1)
            if cfg.fast:
                options = choose_encoder(options, first_chunk)
            chunks = read_chunks(source.paths, cfg.text_key, writer.position)
            encoded = encode_chunks(chunks, options, cfg.workers or num_cores())
            write_splits(writer, source, stoppable(encoded), cfg.on_error)
            if not writer.num_tokens("train"):
                val_tokens = writer.num_tokens("val")
                writer.discard()
                reason = f"all {val_tokens:,} tokens are for validation, lower val_tokens"
                raise ValueError(
                    f"source {cfg.source!r} leaves nothing to train on: {reason if val_tokens else 'it holds no text'}"
                )
            metadata = {
                "source": cfg.source,
                "files": source.files.record(),
                "encoder": encoder_version(tokenizer, options.use_fast),
                "skipped": writer.progress["skipped"],
            }
            if "val_cut" in writer.progress:
                metadata["val_cut"] = writer.progress["val_cut"]
            writer.finish(metadata, end=Position(file=len(source.paths)))
        if "val_cut" in writer.progress:
            print(shown(writer.progress["val_cut"]))
    info(DatasetConfig(cfg.out_dir))


def stoppable(encoded: Generator[tuple[Chunk, Encoded]]) -> Iterator[tuple[Chunk, Encoded]]:
    """The same chunks, until SIGTERM or Ctrl-C: then the workers are ended in order, and so is this process."""
    received: list[int] = []

    def note(number: int, _frame: object) -> None:
        received.append(number)
        # From now on the default applies, so that a second signal ends a process that hangs.
        signal.signal(number, signal.SIG_DFL)

    # An exception here, as Ctrl-C raises one, could interrupt any line, also one of a library that cannot cope with it.
    previous = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for item in encoded:
            if received:
                break
            yield item
    except ChildProcessError:
        # The signal may have gone to the workers as well.
        if not received:
            raise
    finally:
        encoded.close()
        for number, handler in previous.items():
            signal.signal(number, handler)
    if received:
        sys.exit(say_stopped(received[0]))


def write_splits(
    writer: ShardWriter, source: Source, encoded: Iterator[tuple[Chunk, Encoded]], on_error: Literal["stop", "skip"]
) -> None:
    """Write the tokens as val and train shards. `encoded` begins at the record of writer.position."""
    skipped = writer.progress.setdefault("skipped", {"empty": 0, "faulty": 0, "first": []})
    bytes_before = [0, *itertools.accumulate(source.sizes)]
    # Tokens of that record, and perhaps of later ones, that earlier runs have written.
    n_written = writer.position.token
    written = writer.last_tokens(n_written)
    with tqdm(total=bytes_before[-1], unit="B", unit_scale=True, desc="prepare", disable=None) as bar:
        for chunk, (tokens, n_empty, faults) in encoded:
            path = source.paths[chunk.file]
            messages = [f"{path}:{record + 1}: {reason}" for record, reason in faults]
            if messages and on_error == "stop":
                raise ValueError(f"{messages[0]} (--on_error=skip leaves such records out and counts them)")
            begin = min(n_written, len(tokens))
            n_written -= begin
            if not np.array_equal(written[:begin], tokens[:begin]):
                raise ValueError(f"{path} has changed since this run began; delete {writer.folder} to start over")
            written = written[begin:]
            val_end = max(begin, find_val_end(writer, source, chunk, tokens, begin))
            writer.add("val", tokens[begin:val_end], Position(chunk.file, chunk.record, begin))
            if val_end < len(tokens):
                # Not before, or a run killed in between would put the rest of this val part into train.
                writer.progress["val_full"] = True
            writer.add("train", tokens[val_end:], Position(chunk.file, chunk.record, val_end))
            skipped["empty"] += n_empty
            skipped["faulty"] += len(faults)
            # Twenty are enough to see what is wrong with a source.
            skipped["first"] += messages[: 20 - len(skipped["first"])]
            bar.update(bytes_before[chunk.file] + chunk.bytes_read - bar.n)
            # Without refresh, which would draw the bar for each of a million small files.
            bar.set_postfix_str(f"{len(writer.progress['shards'])} shards", refresh=False)


def find_val_end(writer: ShardWriter, source: Source, chunk: Chunk, tokens: np.ndarray, begin: int) -> int:
    """How many tokens of a chunk belong to the val split: whole documents until it is full.

    The first `begin` of them are written already. The answer is the same for any `begin`.
    """
    if source.files.val:
        return len(tokens) if chunk.file < len(source.files.val) else 0
    if writer.progress.get("val_full"):
        return 0
    eot_id = writer.tokenizer["eot_id"]
    missing = source.val_tokens - writer.num_tokens("val") + begin
    previous = writer.last_tokens(1)
    begins_document = begin == 0 and (not len(previous) or previous[0] == eot_id)
    # Ids of chunks:NAME may be a single document.
    has_no_end = chunk.kind in ("json", "values") and eot_id not in tokens and not writer.num_documents("val")
    may_be_cut = has_no_end or source.may_be_cut(chunk.file)
    # Of a wanted size the split may miss half at either side.
    tolerance = source.val_tokens // 2
    if begins_document and missing <= (tolerance if may_be_cut else 0):
        val_end = 0
    elif may_be_cut:
        text = tokens[:-1] if len(tokens) and tokens[-1] == eot_id else tokens
        if len(text) <= missing:
            return len(tokens)
        val_end, place = cut_text(load_tokenizer(writer.tokenizer), text, max(0, missing), tolerance)
        n_val_tokens = source.val_tokens - missing + val_end
        name = (source.files.val + source.files.train)[chunk.file].name
        writer.progress["val_cut"] = f"val ends inside {name}, {place}, after {n_val_tokens:,} tokens"
    else:
        ends = np.flatnonzero(tokens == eot_id) + 1
        ends = ends[ends >= missing]
        if not len(ends):
            return len(tokens)
        val_end = int(ends[0])
    return val_end


# Where a text may be cut, best first: after a match of the pattern.
CUTS = {
    "between two paragraphs": rb"\n(?:[ \t\r]*\n)+",
    "at the end of a line": rb"\n",
    "in the middle of a line": rb"(?=[^\x80-\xbf])",  # not within a character of UTF-8
}


def cut_text(tokenizer: Tokenizer, tokens: np.ndarray, wanted: int, tolerance: int) -> tuple[int, str]:
    """(number of tokens, which of CUTS) for a cut near `wanted` tokens, at most `tolerance` away from it."""
    first = max(0, wanted - tolerance)
    pieces = [tokenizer.token_bytes(token) for token in tokens[first : wanted + tolerance].tolist()]
    # Bytes before each token.
    offsets = np.cumsum([0, *map(len, pieces)])[:-1]
    for place, pattern in CUTS.items():
        ends = [match.end() for match in re.finditer(pattern, b"".join(pieces))]
        cuts = first + np.flatnonzero(np.isin(offsets, ends))
        if len(cuts):
            return int(cuts[np.argmin(np.abs(cuts - wanted))]), place
    return wanted, place


# ---- download --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DownloadConfig:
    out_dir: str = "data/fineweb_edu"  # folder of the dataset
    repo: str = "karpathy/fineweb-edu-100B-gpt2-token-shards"  # Hugging Face dataset: llm.c shards, or input_ids
    num_shards: int = 100  # train shards; 100 of FineWeb-Edu are 10B tokens

    def __post_init__(self) -> None:
        require_local("out_dir", self.out_dir)
        if self.num_shards < 1:
            raise ValueError(f"num_shards={self.num_shards} must be at least 1")


def download(cfg: DownloadConfig) -> None:
    """Fetch a tokenized dataset. The same command again continues where a killed one stopped.

    Training may start with the first shards: progress.json lists all of them, and each appears when it is complete.
    """
    folder = Path(cfg.out_dir)
    job = {"repo": cfg.repo, "num_shards": cfg.num_shards}
    with locked(folder):
        progress = read_progress(folder, job) or announce_shards(folder, job)
        shards = progress["shards"]
        missing = [shard for shard in shards if not (folder / shard["file"]).exists()]
        if missing or (shards and not (folder / "meta.json").exists()):
            fetch_shards(folder, progress, missing)
            for shard in shards:
                # A run that was killed has not recorded the documents of its shards.
                if "documents" not in shard:
                    shard["documents"] = count_documents(read_shard(folder / shard["file"]), GPT2["eot_id"])
            write_meta(folder, progress, GPT2, {"source": cfg.repo, "revision": progress["revision"]})
    if shards:
        info(DatasetConfig(cfg.out_dir))
    else:
        # No llm.c shards: Arrow or parquet rows of gpt2 tokens, as the original 416M recipe published them.
        files = f"hf://datasets/{cfg.repo}@{progress['revision']}/**/*"
        source = ", ".join(files + suffix for suffix in progress["row_formats"])
        prepare(PrepareConfig(source, cfg.out_dir, text_key="input_ids", tokenizer="chunks:gpt2"))


def announce_shards(folder: Path, job: Mapping[str, Any]) -> dict[str, Any]:
    """Write progress.json with every shard of the download: size and sha256 as the Hub has them, at one commit."""
    from huggingface_hub import HfApi

    repo = job["repo"]
    num_shards = job["num_shards"]
    with hub_errors(repo):
        listing = HfApi().dataset_info(repo, files_metadata=True)
    files = [file for file in listing.siblings or [] if file.rfilename.endswith(".bin")]
    files.sort(key=lambda file: file.rfilename)
    val_files = [file for file in files if "val" in Path(file.rfilename).name]
    train_files = [file for file in files if file not in val_files]
    row_formats = sorted({Path(file.rfilename).suffix for file in listing.siblings or []} & {".arrow", ".parquet"})
    if not files and not row_formats:
        raise ValueError(f"{repo} holds neither llm.c shards (.bin) nor rows of token ids (.arrow, .parquet)")
    if files and (not val_files or len(train_files) < num_shards):
        raise ValueError(
            f"num_shards={num_shards}, but {repo} has {len(train_files)} train and {len(val_files)} val shards"
        )
    # In the order of the download: the val shard first, which training needs from the start.
    shards = []
    for split, split_files in (("val", val_files), ("train", train_files[:num_shards])):
        for number, file in enumerate(split_files):
            shard = {
                "file": f"{split}_{number:06d}.bin",
                "split": split,
                "tokens": ((file.size or 0) - HEADER_BYTES) // token_dtype(GPT2["vocab_size"]).itemsize,
                "bytes": file.size or 0,
                "sha256": file.lfs.sha256 if file.lfs else None,
                "origin": file.rfilename,
            }
            shards.append(shard)
    needed = sum(shard["bytes"] for shard in shards)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(f"{repo} needs {needed / 1e9:.1f} GB, {folder} has {free / 1e9:.1f} GB free; lower --num_shards")
    progress = {"job": dict(job), "revision": listing.sha, "shards": shards, "row_formats": row_formats}
    if shards:
        write_json(folder / "progress.json", progress)
    return progress


def fetch_shards(folder: Path, progress: Mapping[str, Any], missing: list[dict[str, Any]]) -> None:
    """Download the missing shards, four at a time, in order."""
    from huggingface_hub.utils import disable_progress_bars

    temporary = folder / ".download"
    # The Hub client cannot resume inside a file that a killed process left.
    shutil.rmtree(temporary, ignore_errors=True)
    # thread_map shows one bar for all shards instead.
    disable_progress_bars()
    fetch = functools.partial(fetch_shard, folder, progress["job"]["repo"], progress["revision"])
    # Not snapshot_download: it fetches the files in any order, under their own names, and checks only their sizes. Here
    # training can start as soon as val_000000 and train_000000 have arrived.
    thread_map(fetch, missing, max_workers=4, desc="download", unit="shard", disable=None)
    shutil.rmtree(temporary, ignore_errors=True)


def fetch_shard(folder: Path, repo: str, revision: str, shard: dict[str, Any]) -> None:
    """Download one shard, check it and move it to its place. Adds sha256 and documents to `shard`."""
    from huggingface_hub import hf_hub_download

    # The Hub client retries lost connections itself, but not answers like 503.
    for pause_s in (1, 4, 16, None):
        try:
            with hub_errors(repo):
                name = shard["origin"]
                path = Path(
                    hf_hub_download(repo, name, repo_type="dataset", revision=revision, local_dir=folder / ".download")
                )
                sha256 = file_sha256(path)
                # Files that the Hub keeps outside LFS have no checksum there: only their size can be checked.
                if path.stat().st_size != shard["bytes"] or sha256 != (shard["sha256"] or sha256):
                    path.unlink()
                    raise ConnectionError(f"{name} arrived damaged")
            break
        except ConnectionError:
            if pause_s is None:
                raise
            time.sleep(pause_s)
    shard["sha256"] = sha256
    shard["documents"] = count_documents(read_shard(path), GPT2["eot_id"])
    os.replace(path, folder / shard["file"])


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- sample ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SampleConfig:
    out_dir: str = "data/sample"  # folder of the dataset

    def __post_init__(self) -> None:
        require_local("out_dir", self.out_dir)


def sample(cfg: SampleConfig) -> None:
    """Write the language reference inside every CPython (pydoc_data.topics) as bytes: 0.45 MB of English."""
    train, val = sample_documents()
    text = "".join(train + val)
    job = {"source": "pydoc_data.topics", "sha256": hashlib.sha256(text.encode()).hexdigest()}
    tokenizer = load_tokenizer("bytes")
    folder = Path(cfg.out_dir)
    with locked(folder):
        writer = ShardWriter(folder, job, tokenizer.info(), 2**24)
        if not writer.is_finished:
            # After a killed run it starts over, which takes no time.
            writer.discard()
            for split, documents in (("val", val), ("train", train)):
                for document in documents:
                    writer.add(split, np.append(tokenizer.encode_array(document), tokenizer.eot_id))
            writer.finish({"source": "pydoc_data.topics, the Python language reference"})
    info(DatasetConfig(cfg.out_dir))


def sample_documents() -> tuple[list[str], list[str]]:
    """(train, val) topics: about 1 in 15 validates, chosen by the hash of its name."""
    from pydoc_data.topics import topics

    # By a hash, so that a topic is in the same split with every version of Python.
    names = sorted(topics)
    val_names = {name for name in names if int(hashlib.sha256(name.encode()).hexdigest(), 16) % 15 == 0}
    val = [topics[name] for name in names if name in val_names]
    # Topics repeat each other's paragraphs. Those in the val split are removed from the train split.
    val_paragraphs = {paragraph for text in val for paragraph in text.split("\n\n")}
    train = []
    for name in names:
        if name not in val_names:
            paragraphs = [paragraph for paragraph in topics[name].split("\n\n") if paragraph not in val_paragraphs]
            train.append("\n\n".join(paragraphs))
    return train, val


# ---- verify, info ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DatasetConfig:
    out_dir: str = "data/fineweb_edu"  # folder of the dataset

    def __post_init__(self) -> None:
        require_local("out_dir", self.out_dir)


def verify(cfg: DatasetConfig) -> None:
    """Read every byte: header, size, sha256, token range, documents. Exit code 1 and a list if something is wrong."""
    folder = Path(cfg.out_dir)
    meta = read_meta(folder)
    faults = []
    for shard in tqdm(meta["shards"], desc="verify", unit="shard", disable=None):
        faults += [f"{shard['file']}: {fault}" for fault in find_faults(folder, shard, meta["tokenizer"])]
    names = {shard["file"] for shard in meta["shards"]}
    faults += [f"{path.name}: not in meta.json" for path in sorted(folder.glob("*.bin")) if path.name not in names]
    for fault in faults:
        print(shown(fault))
    print(f"{shown(folder)}: {len(names)} shards, " + (f"{len(faults)} faults" if faults else "all sound"))
    if faults:
        sys.exit(1)


def find_faults(folder: Path, shard: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> list[str]:
    """What is wrong with a shard, compared with its entry in meta.json."""
    path = folder / shard["file"]
    try:
        tokens = read_shard(path)
        actual = {
            "tokens": len(tokens),
            "documents": count_documents(tokens, tokenizer["eot_id"]),
            "sha256": file_sha256(path),
        }
    except (ValueError, OSError) as error:
        return [str(error)]
    # Shards from elsewhere, without a meta.json, have no "documents" and "sha256" to compare with.
    faults = [
        f"{key} is {value}, meta.json says {shard[key]}"
        for key, value in actual.items()
        if shard.get(key, value) != value
    ]
    if len(tokens) and tokens.max() >= tokenizer["vocab_size"]:
        faults.append(f"token {tokens.max()} with a vocabulary of {tokenizer['vocab_size']}")
    return faults


def info(cfg: DatasetConfig) -> None:
    """Print what a dataset holds, and its first 100 tokens as text."""
    dataset = TokenDataset(cfg.out_dir)
    print(f"{shown(cfg.out_dir)}: {shown(dataset.meta.get('source', 'unknown source'))}")
    print(f"  tokenizer {shown(dataset.tokenizer['name'])}, {dataset.vocab_size:,} tokens, {dataset.dtype.name}")
    for split in ("train", "val"):
        shards = dataset.shards(split)
        tokens = sum(shard["tokens"] for shard in shards)
        line = f"  {split:5} {tokens:>15,} tokens in {len(shards)} shards"
        # Shards from elsewhere and unfinished downloads have no numbers of documents.
        if all("documents" in shard for shard in dataset.meta["shards"]):
            line += f"  {sum(shard['documents'] for shard in shards):,} documents"
        print(line)
    first_shard = (dataset.shards("train") or dataset.meta["shards"])[0]
    first_tokens = dataset.read(first_shard)[:100].tolist()
    try:
        text = load_tokenizer(dataset.tokenizer).decode(first_tokens)
    except (ValueError, ConnectionError) as error:
        # Training needs no vocabulary, so a missing one is no error here.
        text = f"(text not shown: {error})"
    print("  begins: " + visible(text))


def say_stopped(number: int) -> int:
    """Say on stderr which signal stopped the command. Returns the exit code, the same as training.py's."""
    message = f"data_pipeline.py: stopped by {signal.Signals(number).name}; run the same command again to continue"
    # Not print: the signal may have interrupted one.
    os.write(sys.stderr.fileno(), f"\n{message}\n".encode())
    return 130 if number == signal.SIGINT else 75


def stop(number: int, _frame: object) -> NoReturn:
    # Not sys.exit, which would wait for the threads of a download. Everything here survives a kill.
    os._exit(say_stopped(number))


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    run_cli(lambda: run_subcommand(sample, download, prepare, verify, info))
