"""Text to token shards.

    python data_pipeline.py sample      # the Python reference inside every CPython, as bytes: no network, 1 second
    python data_pipeline.py download    # FineWeb-Edu, already tokenized: 100 shards = 10B tokens, 20 GB
    python data_pipeline.py prepare --source="my/*.jsonl.gz" --out_dir=data/mine    # your text or any HF dataset
    python data_pipeline.py verify --out_dir=data/mine    # every header, size, checksum and token
    python data_pipeline.py info --out_dir=data/mine      # what it holds, and how it begins
    python data_pipeline.py decontaminate --out_dir=data/mine --against=hellaswag    # copies of evaluation items in it
    python data_pipeline.py prepare --help                # the options of one command

A dataset is a folder of llm.c shards (train_000000.bin ..., val_000000.bin ...) and meta.json, which is written last:
tokenizer, source, and tokens, documents, size and sha256 of each shard. Every document is followed by the eot token.
training.py reads it through shards.py.

prepare is several times as fast with `pip install gigatoken isal orjson`: gigatoken is used only where it gives tiktoken's
tokens on a check, isal unpacks .gz, orjson reads JSON.
"""

import bisect
import bz2
import functools
import gzip
import hashlib
import importlib.metadata
import importlib.util
import io
import itertools
import json
import lzma
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from tqdm import tqdm

import config
from shards import (
    GPT2,
    HEADER_BYTES,
    U64,
    Dataset,
    HuggingFaceEncoding,
    fast_encoder,
    load_tokenizer,
    locked,
    mix,
    read_meta,
    read_shard,
    token_dtype,
    write_json,
    write_shard,
)

# ---- Making a dataset: tokens to shards, resumable -------------------------------------------------------------------


class ShardWriter:
    """Tokens in, full shards out. progress.json follows each shard, meta.json comes last, so that a run of the same
    `job` goes on where the one before stopped: at `position`, (file, record, tokens from that record on that shards
    already hold)."""

    def __init__(self, folder: Path, job: Mapping[str, Any], tokenizer: Mapping[str, Any], shard_tokens: int):
        self.folder, self.tokenizer, self.shard_tokens = folder, dict(tokenizer), shard_tokens
        self.progress: dict[str, Any] = {"job": dict(job), "shards": [], "position": [0, 0, 0]}
        self.progress = _begun(folder, job) or self.progress
        self.done = (folder / "meta.json").exists()
        self.split, self._fill = "", 0
        self._buffer = np.empty(shard_tokens, token_dtype(tokenizer["vocab_size"]))

    def tokens(self, split: str) -> int:
        written = sum(shard["tokens"] for shard in self.progress["shards"] if shard["split"] == split)
        return written + (self._fill if split == self.split else 0)

    @property
    def position(self) -> tuple[int, int, int]:
        file, record, taken = self.progress["position"]
        return file, record, taken

    def add(self, split: str, tokens: np.ndarray, position: tuple[int, int, int] = (0, 0, 0)) -> None:
        """Append to `split` tokens that begin at `position`."""
        if not len(tokens):
            return
        if split != self.split:
            self.flush(position)
            self.split = split
        file, record, taken = position
        while len(tokens):
            part, tokens = np.split(tokens, [self.shard_tokens - self._fill])
            self._buffer[self._fill : self._fill + len(part)] = part
            self._fill, taken = self._fill + len(part), taken + len(part)
            if self._fill == self.shard_tokens:
                self.flush((file, record, taken))

    def flush(self, position: tuple[int, int, int]) -> None:
        """Write what is there as a shard; a new run goes on at `position`."""
        if not self._fill:
            return
        tokens, self._fill = self._buffer[: self._fill], 0
        if not self.progress["shards"]:  # before the first shard, which would pass for foreign without it
            write_json(self.folder / "progress.json", self.progress)
        number = sum(shard["split"] == self.split for shard in self.progress["shards"])
        name = f"{self.split}_{number:06d}.bin"
        sha256 = write_shard(self.folder / name, tokens)
        facts = _describe(name, self.split, tokens, self.tokenizer["eot_id"], sha256)
        self.progress["shards"].append(facts)
        self.progress["position"] = position
        write_json(self.folder / "progress.json", self.progress)

    def finish(self, files: int, **facts: Any) -> None:
        """The rest as a last short shard, then meta.json; the source had `files` files, so all of them are done."""
        self.flush((files, 0, 0))
        _finish(self.folder, self.progress, self.tokenizer, **facts)

    def discard(self) -> None:
        """Leave nothing behind."""
        for shard in self.progress["shards"]:
            (self.folder / shard["file"]).unlink()
        (self.folder / "progress.json").unlink(missing_ok=True)
        self.progress["shards"] = []


def _finish(folder: Path, progress: Mapping[str, Any], tokenizer: Mapping[str, Any], **facts: Any) -> None:
    """meta.json in the place of progress.json: from here on the dataset exists."""
    meta: dict[str, Any] = {"version": 1, "tokenizer": dict(tokenizer), **facts}
    for split in ("train", "val"):
        shards = [shard for shard in progress["shards"] if shard["split"] == split]
        meta[split] = {key: sum(shard[key] for shard in shards) for key in ("tokens", "documents")}
    write_json(folder / "meta.json", meta | {"job": progress["job"], "shards": progress["shards"]})
    (folder / "progress.json").unlink(missing_ok=True)


def _documents(tokens: np.ndarray, eot_id: int) -> int:
    return int(np.count_nonzero(tokens == eot_id))


def _describe(name: str, split: str, tokens: np.ndarray, eot_id: int, sha256: str) -> dict[str, Any]:
    size = HEADER_BYTES + tokens.nbytes
    facts = {"file": name, "split": split, "tokens": len(tokens), "documents": _documents(tokens, eot_id)}
    return facts | {"bytes": size, "sha256": sha256}


def _begun(folder: Path, job: Mapping[str, Any]) -> dict[str, Any] | None:
    """What an earlier run of the same job left in meta.json or progress.json. ValueError if it was another job."""
    path = folder / ("meta.json" if (folder / "meta.json").exists() else "progress.json")
    if not path.exists():
        if strays := sorted(folder.glob("*.bin")):
            raise ValueError(f"{strays[0]} is not ours to overwrite; choose another --out_dir")
        return None
    try:
        progress = json.loads(path.read_text(encoding="utf-8"))
        differences = config.differences(progress["job"], job)
        shards = [folder / shard["file"] for shard in progress["shards"]]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete {folder} or choose another --out_dir") from error
    if path.name == "meta.json":
        (folder / "progress.json").unlink(missing_ok=True)  # killed between the two
    if differences:
        raise ValueError(
            f"{folder} holds another dataset ({'; '.join(differences)[:300]}); choose another --out_dir or delete it"
        )
    for shard in shards:
        if shard.exists() or "repo" not in job:  # a download fetches what is missing
            read_shard(shard)
    return progress


# ---- Sources: text in any of these files, in chunks that a worker can encode alone -----------------------------------

CHUNK_BYTES = 2**20
FORMATS_READ = (".jsonl", ".json", ".txt", ".md", ".parquet", ".arrow")
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")


class Chunk(NamedTuple):
    """Consecutive records of one file. The text of one chunk follows that of the one before, whoever encodes it."""

    file: int
    record: int  # number of the first one: a line, a row, a piece of a text file
    kind: str  # "lines" of JSON, "rows" (dicts), "values" (of the text column), a "piece" of a text or its "end"
    data: Any
    file_bytes: int  # read so far, for the progress bar


def find_files(source: str, subset: str | None = None, split: str = "train") -> list[str]:
    """A file, a folder, a URL, globs and {00..09} braces, or the id of a Hugging Face dataset -> paths, in order."""
    from fsspec.core import url_to_fs

    if Path(source).is_dir():
        files = [str(path) for path in sorted(Path(source).rglob("*")) if path.is_file() and _suffix(path.name)]
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not Path(source).exists() and not _suffix(source):
        files = _hub_files(source, subset, split)
    else:
        files = []
        for pattern in _expand_braces(source):
            fs, path = url_to_fs(pattern)
            found = sorted(fs.glob(path)) if re.search(r"[*?\[]", path) else [path] if fs.exists(path) else []
            files += [str(name) if fs.protocol[0] == "file" else fs.unstrip_protocol(name) for name in found]
    if not files:
        raise ValueError(f"source {source!r}: no such file, and no {' '.join(FORMATS_READ)} in such a folder")
    for file in files:
        if not _suffix(file):
            raise ValueError(f"{file}: cannot read this kind of file, only {' '.join(FORMATS_READ + COMPRESSED)}")
    return files


def _hub_files(name: str, subset: str | None, split: str) -> list[str]:
    """The files behind a Hugging Face dataset id, pinned to today's commit."""
    from datasets import load_dataset_builder

    try:
        files = load_dataset_builder(name, subset).config.data_files or {}
    except Exception as error:  # the hub client, its HTTP library and datasets each have their own
        raise ValueError(
            f"cannot open source {name!r}, neither as a file nor on the Hugging Face hub: {error}"
        ) from error
    if split not in files:
        raise ValueError(f"{name} has no split {split!r} in files, only {', '.join(map(str, files)) or 'none'}")
    return [str(file) for file in files[split]]


def _expand_braces(text: str) -> list[str]:
    """x{00..02} -> x00 x01 x02; x{a,b} -> xa xb."""
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", text)
    if not match:
        return [text]
    first, last, names = match.groups()
    words = names.split(",") if names else [f"{i:0{len(first)}}" for i in range(int(first), int(last) + 1)]
    return [whole for word in words for whole in _expand_braces(text[: match.start()] + word + text[match.end() :])]


def _suffix(name: str) -> str:
    """The format of a file name, compression set aside; "" if we cannot read it."""
    stem, suffix = os.path.splitext(name.lower())
    suffix = os.path.splitext(stem)[1] if suffix in COMPRESSED else suffix
    return suffix if suffix in FORMATS_READ else ""


def read_chunks(paths: list[str], text_key: str, file: int = 0, record: int = 0) -> Iterator[Chunk]:
    """Every chunk from record `record` of file number `file` on."""
    from fsspec.core import url_to_fs

    readers = {".jsonl": _read_lines, ".json": _read_json, ".txt": _read_text, ".md": _read_text}
    for number, path in list(enumerate(paths))[file:]:
        fs, name = url_to_fs(path)
        suffix, start = _suffix(path), record if number == file else 0
        read = readers.get(suffix) or functools.partial(_read_columns, text_key=text_key, suffix=suffix)
        try:
            with fs.open(name, "rb") as raw:
                for first, kind, data in read(_decompressed(raw, path), start):
                    yield Chunk(number, first, kind, data, raw.tell())
        except (EOFError, lzma.LZMAError, zlib.error, OSError) as error:
            if getattr(error, "errno", None):
                raise  # the disk's or the network's, not the file's
            raise ValueError(f"{path}: damaged or cut off ({error}); fetch it again") from error


def _decompressed(raw: Any, path: str) -> Any:
    if path.endswith(".zst"):
        import pyarrow  # reads several frames, and notices a missing end

        return pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd")
    if path.endswith(".gz") and importlib.util.find_spec("isal"):
        from isal import igzip  # optional; three times as fast

        return igzip.open(raw)
    open_compressed = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(os.path.splitext(path)[1])
    return open_compressed(raw) if open_compressed else raw


def _read_lines(stream: Any, start: int) -> Iterator[tuple[int, str, Any]]:
    record, parts = 0, []
    while data := stream.read(CHUNK_BYTES):
        cut = data.rfind(b"\n") + 1
        if cut:
            block, parts = b"".join([*parts, data[:cut]]), []
            lines = block.count(b"\n")
            if record + lines > start:
                skipped = max(0, start - record)
                yield record + skipped, "lines", block.split(b"\n", skipped)[skipped]
            record += lines
        parts.append(data[cut:])
    if (rest := b"".join(parts)).strip() and record >= start:
        yield record, "lines", rest


def _read_json(stream: Any, start: int) -> Iterator[tuple[int, str, Any]]:
    """One list of objects; or, as often under this name, one object per line."""
    data = stream.read()
    if not data.lstrip().startswith(b"["):
        yield from _read_lines(io.BytesIO(data), start)
        return
    try:
        rows = json.loads(data)
    except ValueError as error:
        raise EOFError(f"not JSON: {error}") from error
    for first in range(start, len(rows), 1000):
        yield first, "rows", rows[first : first + 1000]


def _read_text(stream: Any, start: int) -> Iterator[tuple[int, str, Any]]:
    """A file is one document, in pieces cut after a lone newline between letters, where tokenizers cut, too."""
    piece, rest = 0, b""
    while data := stream.read(CHUNK_BYTES):
        before, rest = max(0, len(rest) - 2), rest + data
        cuts = [before + match.end() for match in re.finditer(rb"[!-~]\n(?=[!-~])", rest[before:])]
        if cuts:
            if piece >= start:
                yield piece, "piece", rest[: cuts[-1]]
            piece, rest = piece + 1, rest[cuts[-1] :]
    if piece >= start:
        yield piece, "end", rest


def _read_columns(stream: Any, start: int, text_key: str, suffix: str) -> Iterator[tuple[int, str, Any]]:
    """Parquet, or the Arrow streams that datasets.save_to_disk writes."""
    import pyarrow
    from pyarrow import ipc, parquet

    try:
        table = parquet.ParquetFile(stream) if suffix == ".parquet" else None
        batches = ipc.open_stream(stream) if table is None else table.iter_batches(1000)
        names = (batches.schema if table is None else table.schema_arrow).names
        if text_key not in names:
            raise ValueError(f"{text_key!r} is not among the columns {', '.join(names)}; name one with --text_key")
        first = 0
        for batch in batches if table is None else table.iter_batches(1000, columns=[text_key]):
            if first + len(batch) > start:
                skipped = max(0, start - first)
                column = batch.column(text_key)[skipped:]
                yield first + skipped, "values", column.to_pylist()
            first += len(batch)
    except pyarrow.ArrowInvalid as error:
        raise EOFError(error) from error


# ---- Prepare: chunks to workers, tokens back in order ----------------------------------------------------------------


class Encoded(NamedTuple):
    """What a worker makes of a chunk."""

    tokens: np.ndarray  # uint16 or uint32, each document followed by eot
    empty: int  # documents without text, left out
    faults: list[tuple[int, str]]  # (record, why it cannot be used)


class Encoder:
    """Chunk -> Encoded. Each worker process has one."""

    def __init__(self, tokenizer: str, text_key: str, fast: bool = False):
        self.ids, _, name = tokenizer.rpartition(":")
        self.tokenizer, self.text_key = load_tokenizer(name), text_key
        self.tokenizer.fast = fast_encoder(self.tokenizer) if fast else None
        self.eot = np.array([self.tokenizer.eot_id], np.uint32)
        self.parse = _json_parser()

    def __call__(self, chunk: Chunk) -> Encoded:
        arrays, empty, faults = [np.zeros(0, np.uint32)], 0, []
        for number, record in enumerate(self._records(chunk), start=chunk.record):
            if chunk.kind == "lines" and not record.strip():
                continue  # a blank line is no document
            try:
                document = self._tokens(self._value(record, chunk.kind))
            except (ValueError, RecursionError) as error:
                faults.append((number, " ".join(str(error).split())[:200]))
                continue
            if not len(document):
                empty += 1
                continue
            ended = chunk.kind == "piece" or self.ids == "chunks" or (self.ids and document[-1] == self.eot[0])
            arrays += [document] if ended else [document, self.eot]
        return Encoded(np.concatenate(arrays).astype(token_dtype(self.tokenizer.vocab_size)), empty, faults)

    def _records(self, chunk: Chunk) -> list[Any]:
        if chunk.kind == "lines":
            return chunk.data.split(b"\n")
        return [chunk.data] if chunk.kind in ("piece", "end") else chunk.data

    def _value(self, record: Any, kind: str) -> Any:
        """The text of a record. ValueError says why there is none."""
        if kind == "values":
            return record
        if kind in ("piece", "end"):
            return record.decode("utf-8")
        row = self.parse(record) if kind == "lines" else record
        if not isinstance(row, dict) or self.text_key not in row:
            found = ", ".join(map(repr, row)) if isinstance(row, dict) else type(row).__name__
            raise ValueError(f"no {self.text_key!r} here, only {found}; name the text with --text_key")
        return row[self.text_key]

    def _tokens(self, value: Any) -> np.ndarray:
        if self.ids:
            document = np.array(value if value is not None else [], dtype=np.int64)
            if document.ndim != 1 or (
                len(document) and not 0 <= document.min() <= document.max() < self.tokenizer.vocab_size
            ):
                raise ValueError(f"not a list of token ids below {self.tokenizer.vocab_size}")
            return document.astype(np.uint32)
        if not isinstance(value, str):
            raise ValueError(f"{self.text_key!r} is a {type(value).__name__}, not text")
        return self.tokenizer.encode_array(value) if value.strip() else self.eot[:0]


def _json_parser() -> Callable[[bytes], Any]:
    """json.loads; three times as fast where orjson is installed."""
    try:
        import orjson
    except ImportError:
        return json.loads

    def parse(line: bytes) -> Any:
        try:
            return orjson.loads(line)
        except ValueError:  # the other one takes more, NaN and lone surrogates, or says what is wrong
            return json.loads(line)

    return parse


_encoder: Encoder  # of a worker process


def _start_worker(*setup: Any) -> None:
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to answer
    threading.Thread(target=_follow_parent, daemon=True).start()
    _encoder = Encoder(*setup)


def _follow_parent() -> None:
    """A killed parent cannot stop its workers; without this they would wait for its chunks for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode(chunk: Chunk) -> Encoded:
    return _encoder(chunk)


ODD = (
    "I'm you'll WE'VE don't 3.14159 1,000,000 2\u00b2 x=[i**2 for i in range(10)]; \n\n\n  \t\r\n \u00a0\u3000 caf\u00e9 cafe\u0301 "
    "\u732b\u3092\u98fc\u3046 \u0645\u0631\u062d\u0628\u0627 \ud55c\uad6d\uc5b4 \U0001f468\u200d\U0001f469\u200d\U0001f467 \x00\x1b[0m <|endoftext|> https://a.b/?c=d&e=%20#f _x_ "
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa          !!!??? \ufeff\ufffd \u01c5 \u2167 \u0e44\u0e17\u0e22 end  "
)


def choose_encoder(tokenizer: str, text_key: str, probe: Iterable[Chunk]) -> tuple[bool, str]:
    """(fast?, name): the fast encoder only where it gives the tokens of the slow one, on odd strings, on prose and on
    the beginning of the text itself."""
    from pydoc_data.topics import topics

    fast, slow = Encoder(tokenizer, text_key, fast=True), Encoder(tokenizer, text_key)
    package = "tokenizers" if isinstance(slow.tokenizer._encoding, HuggingFaceEncoding) else "tiktoken"
    name = f"{package} {importlib.metadata.version(package)}"
    if fast.ids or fast.tokenizer.fast is None:
        return False, name
    odd = Chunk(0, 0, "values", [ODD[i:] + ODD[:i] for i in range(len(ODD))] + list(topics.values()), 0)
    for chunk in (odd, *probe):
        if not np.array_equal(fast(chunk).tokens, slow(chunk).tokens):
            print(f"the fast encoder and {package} disagree on {tokenizer}; using {package}", file=sys.stderr)
            return False, name
    return True, "numpy" if tokenizer == "bytes" else f"gigatoken {importlib.metadata.version('gigatoken')}"


def _encode_all(chunks: Iterator[Chunk], setup: tuple[str, str, bool], workers: int) -> Iterator[tuple[Chunk, Encoded]]:
    """In the order of the chunks, whatever the number of workers; at most 8 chunks per worker are in memory."""
    if workers == 1:
        encoder = Encoder(*setup)
        yield from ((chunk._replace(data=None), encoder(chunk)) for chunk in chunks)
        return
    context = multiprocessing.get_context("spawn")  # fork is unsafe beside threads
    pool = ProcessPoolExecutor(workers, context, _start_worker, setup)
    waiting: deque[tuple[Chunk, Future[Encoded]]] = deque()
    try:
        for chunk in chunks:
            waiting.append((chunk._replace(data=None), pool.submit(_encode, chunk)))
            if len(waiting) > 8 * workers:
                yield waiting[0][0], waiting.popleft()[1].result()
        while waiting:
            yield waiting[0][0], waiting.popleft()[1].result()
    except BrokenProcessPool as error:
        raise ChildProcessError("a worker process died, most likely for want of memory; try fewer --workers") from error
    finally:
        pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class Source:
    """Files to tokenize. The first `val_files` of them, or else the first `val_tokens` tokens, are the val split."""

    paths: list[str]
    sizes: list[int]
    val_files: int
    val_tokens: int

    @property
    def one_text(self) -> bool:  # a single document, which has to be cut to leave something for both splits
        return len(self.paths) == 1 and _suffix(self.paths[0]) in (".txt", ".md")


def _find_source(source: str, subset: str | None, split: str, val_source: str | None, val_tokens: int | None) -> Source:
    if val_source and val_tokens is not None:
        raise ValueError(f"val_source={val_source} is used whole; leave out val_tokens")
    files = find_files(source, subset, split)
    val_files = find_files(val_source, subset, split) if val_source else []
    if not val_source and val_tokens is None and len(files) > 1:  # val-00.jsonl beside train-00.jsonl says what it is
        val_files = [file for file in files if os.path.basename(file).startswith("val")]
        files = [file for file in files if file not in val_files]
    sizes = [_size(file) for file in val_files + files]
    if val_tokens is None:
        val_tokens = 0 if val_files else min(10_000_000, max(1, sum(sizes) // 100))
    return Source(val_files + files, sizes, len(val_files), val_tokens)


def _size(path: str) -> int:
    from fsspec.core import url_to_fs

    fs, name = url_to_fs(path)
    return fs.size(name) or 0


def _tokenize(writer: ShardWriter, source: Source, encoded: Iterator[tuple[Chunk, Encoded]], skip_faults: bool) -> None:
    """The encoded chunks into the writer, which knows how many tokens of the first one it already has."""
    skipped = writer.progress.setdefault("skipped", {"empty": 0, "faulty": 0, "first": []})
    taken = writer.position[2]
    with tqdm(total=sum(source.sizes), unit="B", unit_scale=True, desc="prepare", disable=None) as bar:
        for chunk, (tokens, empty, faults) in encoded:
            where = [f"{source.paths[chunk.file]}:{number + 1}: {reason}" for number, reason in faults]
            if where and not skip_faults:
                raise ValueError(f"{where[0]} (--on_error=skip leaves such records out and counts them)")
            done, taken = min(taken, len(tokens)), max(0, taken - len(tokens))
            cut = done + _val_cut(writer, source, chunk.file, tokens[done:])
            writer.add("val", tokens[done:cut], (chunk.file, chunk.record, done))
            writer.progress["val_full"] = cut < len(tokens)
            writer.add("train", tokens[cut:], (chunk.file, chunk.record, cut))
            skipped["empty"] += empty
            skipped["faulty"] += len(faults)
            skipped["first"] += where[: 20 - len(skipped["first"])]
            bar.update(sum(source.sizes[: chunk.file]) + chunk.file_bytes - bar.n)
            bar.set_postfix_str(f"{len(writer.progress['shards'])} shards")


def _val_cut(writer: ShardWriter, source: Source, file: int, tokens: np.ndarray) -> int:
    """How many of these tokens still belong to the val split: whole documents, until it is full."""
    if source.val_files or writer.progress.get("val_full"):
        return len(tokens) if file < source.val_files else 0
    missing = source.val_tokens - writer.tokens("val")
    last = np.arange(len(tokens)) if source.one_text else np.flatnonzero(tokens == writer.tokenizer["eot_id"])
    cuts = np.append(0, last + 1)
    return int(cuts[np.searchsorted(cuts, missing)]) if cuts[-1] >= missing else len(tokens)


# ---- Commands --------------------------------------------------------------------------------------------------------

FINEWEB_EDU = "HuggingFaceFW/fineweb-edu"


def prepare(
    source: str = FINEWEB_EDU,  # files, folder, globs, {00..09} braces, URL, or a Hugging Face dataset id
    out_dir: str = "data/fineweb_edu",  # folder of the dataset
    subset: str | None = None,  # of a Hugging Face dataset (sample-10BT for FineWeb-Edu)
    split: str = "train",  # of a Hugging Face dataset
    text_key: str = "text",  # key or column that holds the text
    tokenizer: str = "gpt2",  # gpt2, bytes, any tiktoken name; passthrough:gpt2 takes lists of gpt2 ids
    val_source: str | None = None,  # validation text; without it, val* files of a folder, or the first val_tokens
    val_tokens: int | None = None,  # first tokens that validate, whole documents (1% of the bytes, at most 10M)
    shard_tokens: int = 100_000_000,  # tokens per shard
    fast: bool = True,  # encode with the package gigatoken, where it is installed and agrees with tiktoken
    on_error: Literal["stop", "skip"] = "stop",  # at a record without text; skip counts and shows them
    workers: int | None = None,  # processes, the result is the same for any number (one per core)
) -> None:
    """Tokenize text into a dataset. The same command again goes on where a killed one stopped."""
    for name, value, least in (
        ("shard_tokens", shard_tokens, 1),
        ("val_tokens", val_tokens, 0),
        ("workers", workers, 1),
    ):
        if value is not None and value < least:
            raise ValueError(f"{name}={value} must be at least {least}")
    if source == FINEWEB_EDU and subset is None:
        subset = "sample-10BT"
    identity = Encoder(tokenizer, text_key).tokenizer.info()  # an absent vocabulary stops here, before any file
    found = _find_source(source, subset, split, val_source, val_tokens)
    listing = hashlib.sha256(json.dumps([found.paths, found.sizes]).encode()).hexdigest()[:16]
    job = {"source": source, "files": len(found.paths), "bytes": sum(found.sizes), "listing": listing}
    job |= {"tokenizer": tokenizer, "text_key": text_key, "val_tokens": found.val_tokens, "shard_tokens": shard_tokens}
    with locked(Path(out_dir)):
        writer = ShardWriter(Path(out_dir), job, identity, shard_tokens)
        if not writer.done:
            probe = itertools.islice(read_chunks(found.paths, text_key), 1)
            fast, encoder = choose_encoder(tokenizer, text_key, probe) if fast else (False, "tiktoken")
            chunks = read_chunks(found.paths, text_key, *writer.position[:2])
            setup = tokenizer, text_key, fast
            _tokenize(writer, found, _encode_all(chunks, setup, workers or _cores()), on_error == "skip")
            if not writer.tokens("train"):
                have = writer.tokens("val")
                writer.discard()
                missing = f"all {have:,} tokens are for validation, lower val_tokens" if have else "it holds no text"
                raise ValueError(f"source {source!r} leaves nothing to train on: {missing}")
            writer.finish(len(found.paths), source=source, encoder=encoder, skipped=writer.progress["skipped"])
    info(out_dir)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def download(
    out_dir: str = "data/fineweb_edu",  # folder of the dataset
    repo: str = "karpathy/fineweb-edu-100B-gpt2-token-shards",  # Hugging Face dataset: llm.c shards, or input_ids
    num_shards: int = 100,  # train shards; 100 of FineWeb-Edu are 10B tokens
) -> None:
    """Fetch a tokenized dataset. The same command again goes on where a killed one stopped."""
    if num_shards < 1:
        raise ValueError(f"num_shards={num_shards} must be at least 1")
    folder, job = Path(out_dir), {"repo": repo, "num_shards": num_shards}
    with locked(folder):
        progress = _begun(folder, job) or _plan_download(folder, job)
        whole = (folder / "meta.json").exists() and all((folder / s["file"]).exists() for s in progress["shards"])
        if progress["shards"] and not whole:
            _fetch_all(folder, progress)
            for shard in progress["shards"]:  # of an earlier, killed run
                shard.setdefault("documents", _documents(read_shard(folder / shard["file"]), GPT2["eot_id"]))
            _finish(folder, progress, GPT2, source=repo, revision=progress["revision"])
    if not progress["shards"]:  # no llm.c shards there: Arrow or parquet rows of gpt2 tokens, as the seed published
        source = f"hf://datasets/{repo}@{progress['revision']}/**/*.{{arrow,parquet}}"
        return prepare(source, out_dir, text_key="input_ids", tokenizer="chunks:gpt2")
    info(out_dir)


def _plan_download(folder: Path, job: Mapping[str, Any]) -> dict[str, Any]:
    """progress.json with every shard announced: size and sha256 as the hub knows them, at one commit."""
    from huggingface_hub import HfApi

    repo, num_shards = job["repo"], job["num_shards"]
    listing = _from_hub(lambda: HfApi().repo_info(repo, repo_type="dataset", files_metadata=True), repo)
    files = {
        s.rfilename: s for s in sorted(listing.siblings, key=lambda s: s.rfilename) if s.rfilename.endswith(".bin")
    }
    val, train = ([name for name in files if ("val" in Path(name).name) == wanted] for wanted in (True, False))
    if files and (not val or len(train) < num_shards):
        raise ValueError(f"num_shards={num_shards}, but {repo} has {len(train)} train and {len(val)} val shards")
    shards = []
    for split, names in ("val", val), ("train", train[:num_shards]):
        for number, name in enumerate(names):
            size, sha256 = files[name].size, files[name].lfs and files[name].lfs.sha256
            tokens = (size - HEADER_BYTES) // token_dtype(GPT2["vocab_size"]).itemsize
            shards.append({"file": f"{split}_{number:06d}.bin", "split": split, "tokens": tokens, "bytes": size})
            shards[-1] |= {"sha256": sha256, "origin": name}
    needed, free = sum(shard["bytes"] for shard in shards), shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(f"{repo} needs {needed / 1e9:.1f} GB, {folder} has {free / 1e9:.1f} GB free; lower --num_shards")
    progress = {"job": dict(job), "revision": listing.sha, "shards": shards}
    if shards:
        write_json(folder / "progress.json", progress)
    return progress


def _fetch_all(folder: Path, progress: dict[str, Any]) -> None:
    """The shards that are not there yet, four at a time; each gets its name when its checksum is right."""
    parts = folder / ".download"
    shutil.rmtree(parts, ignore_errors=True)  # of a killed download: the hub client cannot go on inside a file
    missing = [shard for shard in progress["shards"] if not (folder / shard["file"]).exists()]
    total = sum(shard["bytes"] for shard in progress["shards"])
    here = total - sum(shard["bytes"] for shard in missing)
    fetch = functools.partial(_fetch, folder, progress["job"]["repo"], progress["revision"], parts)
    bar = tqdm(total=total, initial=here, unit="B", unit_scale=True, desc="download", disable=None)
    with bar, ThreadPoolExecutor(4) as pool:
        try:
            for shard in pool.map(fetch, missing):
                bar.update(shard["bytes"])
        finally:
            pool.shutdown(cancel_futures=True)
    shutil.rmtree(parts, ignore_errors=True)


def _fetch(folder: Path, repo: str, revision: str, parts: Path, shard: dict[str, Any]) -> dict[str, Any]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()  # one bar for everything instead

    def attempt() -> None:
        name = hf_hub_download(repo, shard["origin"], repo_type="dataset", revision=revision, local_dir=parts)
        path = Path(name)
        with open(path, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if path.stat().st_size != shard["bytes"] or sha256 != (shard["sha256"] or sha256):
            path.unlink()
            raise ConnectionError(f"{shard['origin']} of {repo} arrived damaged")
        shard["sha256"], shard["documents"] = sha256, _documents(read_shard(path), GPT2["eot_id"])
        os.replace(path, folder / shard["file"])

    _from_hub(attempt, repo)
    return shard


def _from_hub(call: Callable[[], Any], repo: str) -> Any:
    """Ask the Hugging Face hub, five times if need be. ValueError if it says no, ConnectionError if it is silent."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    for pause_s in (1, 2, 4, 8, None):
        try:
            return call()
        except Exception as error:  # the hub client's, its HTTP library's, ours
            status, reason = getattr(getattr(error, "response", None), "status_code", 0), str(error).splitlines()[0]
            if isinstance(error, ValueError) or (400 <= status < 500 and status not in (408, 429)):
                hint = (
                    " (gated or private: accept its terms on the hub, then `hf auth login`)"
                    if status in (401, 403)
                    else ""
                )
                raise ValueError(f"{repo}: {reason}{hint}") from error
            if pause_s is None or isinstance(error, OfflineModeIsEnabled):
                raise ConnectionError(f"cannot fetch {repo}: {reason}; the same command again goes on") from error
            time.sleep(pause_s)


def sample(
    out_dir: str = "data/sample",  # folder of the dataset
) -> None:
    """The language reference inside every CPython (pydoc_data.topics), as bytes: 0.45 MB of English, no network."""
    train, val = _sample_documents()
    text = "".join(train + val)
    job = {"source": "pydoc_data.topics", "sha256": hashlib.sha256(text.encode()).hexdigest()}
    tokenizer, folder = load_tokenizer("bytes"), Path(out_dir)
    with locked(folder):
        writer = ShardWriter(folder, job, tokenizer.info(), 2**24)
        if not writer.done:
            writer.discard()  # of a killed run; starting over takes no time
            for split, documents in ("val", val), ("train", train):
                for document in documents:
                    writer.add(split, np.append(tokenizer.encode_array(document), tokenizer.eot_id))
            writer.finish(0, source="pydoc_data.topics, the Python language reference")
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
    meta = read_meta(folder)
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
    documents = _documents(tokens, tokenizer["eot_id"])
    with open(folder / shard["file"], "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    largest = int(tokens.max()) if len(tokens) else 0
    found = {"tokens": len(tokens), "documents": documents, "sha256": sha256}
    faults = [
        f"{key} is {found[key]}, meta.json says {shard[key]}"
        for key in found
        if shard.get(key, found[key]) != found[key]
    ]
    if largest >= tokenizer["vocab_size"]:
        faults.append(f"token {largest} with a vocabulary of {tokenizer['vocab_size']}")
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
        documents = (
            f"{sum(s['documents'] for s in shards):,} documents" if "documents" in dataset.meta["shards"][0] else ""
        )
        print(f"  {split:5} {sum(s['tokens'] for s in shards):>15,} tokens in {len(shards)} shards  {documents}")
    first = dataset.read((dataset.shards("train") or dataset.meta["shards"])[0])[:100]
    try:
        text = load_tokenizer(dataset.tokenizer).decode(first.tolist())
    except ValueError as error:  # the shards are fine without the vocabulary
        text = f"(text not shown: {error})"
    print("  begins: " + _printable(text))


def _printable(text: str) -> str:
    """Shown, not obeyed: escape sequences and other control characters of foreign text."""
    return "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text)


# ---- Decontaminate: training documents that share long word sequences with evaluation items --------------------------

WORD = re.compile(rb"[a-z0-9\x80-\xff]+")  # of lower-case bytes; punctuation and spacing do not hide a copy
SHORTEST = 8  # items of fewer words are too common to search for


class Ngrams:
    """The n-grams of evaluation items as sorted 64-bit hashes. An item of fewer than n words is one shorter n-gram."""

    def __init__(self, items: list[list[bytes]], n: int):
        self.number: dict[bytes, int] = {}  # of a word; 0 for words that no item has
        grams: dict[int, dict[int, int]] = {}
        for item, words in enumerate(items):
            ids = np.array([self.number.setdefault(word, len(self.number) + 1) for word in words])
            if len(ids) >= SHORTEST:
                length = min(n, len(ids))
                grams.setdefault(length, {}).update(dict.fromkeys(_rolling(ids, length).tolist(), item))
        self.tables = [(length, *_sorted_table(table)) for length, table in grams.items()]

    def find(self, text: bytes) -> int | None:
        """The item that `text` shares an n-gram with."""
        ids = np.array([self.number.get(word, 0) for word in WORD.findall(text.lower())])
        for length, hashes, items in self.tables:
            found = _rolling(ids, length)
            at = np.searchsorted(hashes, found).clip(max=len(hashes) - 1)
            if (hits := np.flatnonzero(hashes[at] == found)).size:
                return int(items[at[hits[0]]])
        return None


def _rolling(ids: np.ndarray, n: int) -> np.ndarray:
    """One hash per n consecutive ids."""
    count = max(0, len(ids) - n + 1)
    hashes = np.zeros(count, U64)
    for k in range(n):
        hashes = mix(hashes, ids[k : k + count].astype(U64))
    return hashes


def _sorted_table(table: dict[int, int]) -> tuple[np.ndarray, np.ndarray]:
    hashes, items = np.array(list(table), U64), np.array(list(table.values()))
    order = np.argsort(hashes)
    return hashes[order], items[order]


def _item_words(path: str) -> list[list[bytes]]:
    """The words of each item of a JSONL file: HellaSwag's context and right ending, or all strings of another kind."""
    items = []
    try:
        for line in Path(path).read_bytes().splitlines():
            item = json.loads(line)
            ending = [item["ctx"], item["endings"][int(item["label"])]] if "endings" in item else []
            text = " ".join(ending or [value for value in item.values() if isinstance(value, str)])
            items.append(WORD.findall(text.lower().encode()))
    except FileNotFoundError as error:
        fetch = "fetch it with: python eval_hellaswag.py --download" if path == HELLASWAG else "check --against"
        raise ValueError(f"{path}: no such file; {fetch}") from error
    except (ValueError, KeyError, IndexError, AttributeError) as error:
        raise ValueError(f"{path}:{len(items) + 1}: not an evaluation item ({error})") from error
    return items


def _contaminated(dataset: Dataset, number: int, ngrams: Ngrams) -> tuple[int, list[tuple[int, int, int]]]:
    """(documents that begin in train shard `number`, [(begin, end, item)] of the contaminated ones, in tokens)."""
    tokenizer, eot_id = load_tokenizer(dataset.tokenizer), dataset.tokenizer["eot_id"]
    shards = dataset.shards("train")
    before = read_shard(dataset.folder / shards[number - 1]["file"])[-1] if number else eot_id
    tokens = dataset.read(shards[number])
    ends = (np.flatnonzero(tokens == eot_id) + 1).tolist()
    begins = ([0] if before == eot_id else []) + [end for end in ends if end < len(tokens)]
    hits = []
    for begin in begins:
        place = bisect.bisect_right(ends, begin)
        end = ends[place] if place < len(ends) else len(tokens)
        document = [*tokens[begin:end].tolist()]
        for shard in shards[number + 1 :] if end == len(tokens) and document[-1] != eot_id else []:
            more = dataset.read(shard)
            stop = np.flatnonzero(more == eot_id)
            document += more[: stop[0] + 1 if len(stop) else None].tolist()
            if len(stop):
                break
        item = ngrams.find(tokenizer.decode_bytes(document))
        if item is not None:
            hits.append((begin, begin + len(document), item))
    return len(begins), hits


HELLASWAG = "data/hellaswag_val.jsonl"


def decontaminate(
    out_dir: str = "data/fineweb_edu",  # folder of the dataset
    against: str = "hellaswag",  # hellaswag, or a JSONL file of evaluation items
    ngram: int = 13,  # words in a row that make a document contaminated
    write: str | None = None,  # folder for a copy without the contaminated documents (none: only report)
    workers: int | None = None,  # processes (one per core)
) -> None:
    """Count, and with --write leave out, training documents that share n-grams with evaluation items."""
    if ngram < SHORTEST:
        raise ValueError(f"ngram={ngram} is below {SHORTEST}: common phrases would count as copies")
    items = _item_words(HELLASWAG if against == "hellaswag" else against)
    dataset, ngrams = Dataset(out_dir), Ngrams(items, ngram)
    shards, started = dataset.shards("train"), time.perf_counter()
    search = functools.partial(_contaminated, dataset, ngrams=ngrams)
    with ProcessPoolExecutor(workers or _cores(), multiprocessing.get_context("spawn")) as pool:
        found = list(tqdm(pool.map(search, range(len(shards))), total=len(shards), desc="search", disable=None))
    seconds, tokens = time.perf_counter() - started, sum(shard["tokens"] for shard in shards)
    documents, hits = sum(count for count, _ in found), [hit for _, hits in found for hit in hits]
    short = sum(len(words) < SHORTEST for words in items)
    print(
        f"{out_dir}: {len(hits):,} of {documents:,} training documents ({len(hits) / documents:.4%}) share {ngram} words"
    )
    print(
        f"  in a row with at least {len({item for *_, item in hits}):,} of {len(items):,} items of {against}; {short} items too short"
    )
    print(f"  {tokens / seconds / 1e6:.2f}M tokens/s with {workers or _cores()} processes")
    if write is not None:
        _write_without(dataset, Path(write), [hits for _, hits in found], {"against": against, "ngram": ngram})


def _write_without(
    dataset: Dataset, folder: Path, hits: list[list[tuple[int, int, int]]], facts: dict[str, Any]
) -> None:
    """Copy the dataset but for the documents `hits`, which are (begin, end, item) per train shard."""
    train = dataset.shards("train")
    first = [0, *itertools.accumulate(shard["tokens"] for shard in train)]
    keep = [np.ones(shard["tokens"], bool) for shard in train]
    for number, found in enumerate(hits):
        for begin, end, _ in found:  # a document may end some shards after its own
            for k in range(number, len(train)):
                offset = first[number] - first[k]
                keep[k][max(0, begin + offset) : max(0, end + offset)] = False
    job = {"copy_of": str(dataset.folder), "fingerprint": dataset.fingerprint, **facts}
    with locked(folder):
        writer = ShardWriter(folder, job, dataset.tokenizer, max(shard["tokens"] for shard in dataset.meta["shards"]))
        if not writer.done:
            writer.discard()
            for shard in dataset.shards("val"):
                writer.add("val", np.asarray(dataset.read(shard)))
            for shard, kept in zip(train, keep):
                writer.add("train", dataset.read(shard)[kept])
            removed = sum(map(len, hits))
            writer.finish(0, source=f"{dataset.meta.get('source')} less {removed:,} documents", removed=removed)
    info(str(folder))


# ---- Command line ----------------------------------------------------------------------------------------------------


def main() -> None:
    try:
        config.call((sample, download, prepare, verify, info, decontaminate))
    except BrokenPipeError:
        raise
    except OSError as error:  # disk full, no permission, network: not the user's input, but no traceback either
        config.die(f"{Path(sys.argv[0]).name}: error: {error}", 1)


if __name__ == "__main__":
    config.run(main)
