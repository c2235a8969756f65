"""Encode chunks of text files as tokens, in worker processes.

    options = EncoderOptions("gpt2", text_key="text")
    for chunk, encoded in encode_chunks(read_chunks(paths, "text"), options, workers=8): ...    # in order

The tokens are the same for any number of workers.
"""

import functools
import importlib.metadata
import json
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from nano416.dataset import token_dtype
from nano416.text_files import Chunk
from nano416.tokenizer import HuggingFaceTokenizer, Tokenizer, fast_encoder, load_tokenizer


@dataclass(frozen=True)
class EncoderOptions:
    """How to turn records into tokens."""

    tokenizer: str  # a name for load_tokenizer; passthrough:NAME and chunks:NAME take token ids instead of text
    text_key: str
    use_fast: bool = False  # use fast_encoder, if check_fast_encoder allows it


class Encoded(NamedTuple):
    """A chunk as tokens."""

    tokens: np.ndarray  # uint16 or uint32, each document followed by eot
    n_empty: int  # documents without text, left out
    faults: list[tuple[int, str]]  # (record, why it cannot be used)


class Encoder:
    """Encodes chunks of text, or checks chunks of token ids.

    With passthrough:NAME the ids of a record are a document. With chunks:NAME all records are one stream of ids, cut
    anywhere, which contains its eot tokens.
    """

    def __init__(self, options: EncoderOptions):
        self.id_mode, _, name = options.tokenizer.rpartition(":")
        if self.id_mode not in ("", "passthrough", "chunks"):
            raise ValueError(f"tokenizer {options.tokenizer!r}: token ids are passthrough:{name} or chunks:{name}")
        self.tokenizer = load_tokenizer(name)
        self.text_key = options.text_key
        fast = fast_encoder(self.tokenizer) if options.use_fast else None
        self.is_fast = fast is not None
        self.encode_text = fast or self.tokenizer.encode_array
        self.parse_json = _json_parser()
        self.dtype = token_dtype(self.tokenizer.vocab_size)
        self.eot = np.array([self.tokenizer.eot_id], np.uint32)

    def __call__(self, chunk: Chunk) -> Encoded:
        # Not empty, because np.concatenate needs at least one array.
        arrays = [np.zeros(0, np.uint32)]
        n_empty = 0
        faults = []
        for number, record in enumerate(chunk.records, start=chunk.record):
            # A blank line does not count as an empty document.
            if chunk.kind == "json" and not record.strip():
                continue
            try:
                value = self._value(record, chunk.kind)
                tokens = self._check_ids(value) if self.id_mode else self._encode(value)
            except (ValueError, RecursionError) as error:
                # One line of at most 200 characters: some parsers quote the whole record.
                faults.append((number, " ".join(str(error).split())[:200]))
                continue
            if not len(tokens):
                n_empty += 1
                continue
            arrays.append(tokens)
            # Token ids may have been stored with their eot; pieces of a text are not the end of a document.
            has_eot = self.id_mode == "passthrough" and tokens[-1] == self.tokenizer.eot_id
            if not (has_eot or self.id_mode == "chunks" or chunk.kind == "piece"):
                arrays.append(self.eot)
        return Encoded(np.concatenate(arrays).astype(self.dtype), n_empty, faults)

    def _value(self, record: Any, kind: str) -> Any:
        """The text or the ids of a record. Raises ValueError if it has none."""
        if kind == "values":
            return record
        if kind in ("piece", "end"):
            return record.decode("utf-8")
        row = self.parse_json(record.rstrip(b"\n"))
        if not isinstance(row, dict) or self.text_key not in row:
            keys = ", ".join(map(repr, row)) if isinstance(row, dict) else type(row).__name__
            raise ValueError(f"no {self.text_key!r} here, only {keys}; name the text with --text_key")
        return row[self.text_key]

    def _encode(self, text: Any) -> np.ndarray:
        if not isinstance(text, str):
            raise ValueError(f"{self.text_key!r} is a {type(text).__name__}, not text")
        return self.encode_text(text) if text.strip() else self.eot[:0]

    def _check_ids(self, ids: Any) -> np.ndarray:
        tokens = np.array([] if ids is None else ids, dtype=np.int64)
        if tokens.ndim != 1 or (tokens.size and not 0 <= tokens.min() <= tokens.max() < self.tokenizer.vocab_size):
            raise ValueError(f"not a list of token ids below {self.tokenizer.vocab_size}")
        return tokens.astype(np.uint32)


def _json_parser() -> Callable[[bytes], Any]:
    """json.loads, or orjson where it is installed: three times as fast."""
    try:
        import orjson
    except ImportError:
        return json.loads

    def parse(line: bytes) -> Any:
        try:
            return orjson.loads(line)
        except ValueError:
            # json accepts more, such as NaN and lone surrogates, and says what is wrong with the rest.
            return json.loads(line)

    return parse


# ---- The fast encoder ------------------------------------------------------------------------------------------------

# Contractions, numbers, code, whitespace, combining characters, scripts without spaces, emoji, control characters.
TRICKY_TEXT = (
    "I'm you'll WE'VE don't 3.14159 1,000,000 2\u00b2 x=[i**2 for i in range(10)]; \n\n\n  \t\r\n \u00a0\u3000 "
    "caf\u00e9 cafe\u0301 \u732b\u3092\u98fc\u3046 \u0645\u0631\u062d\u0628\u0627 \ud55c\uad6d\uc5b4 "
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \x00\x1b[0m <|endoftext|> https://a.b/?c=d&e=%20#f _x_ "
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa          !!!??? \ufeff\ufffd \u01c5 \u2167 "
    "\u0e44\u0e17\u0e22 end  "
)


def check_fast_encoder(options: EncoderOptions, probe: Iterable[Chunk]) -> bool:
    """True if the fast encoder is available and gives the same tokens as the slow one.

    They are compared on strings chosen to be difficult, on English prose, and on `probe`, the beginning of the text.
    """
    from pydoc_data.topics import topics

    fast = Encoder(replace(options, use_fast=True))
    slow = Encoder(replace(options, use_fast=False))
    if fast.id_mode or not fast.is_fast:
        return False
    # All rotations, so that each part of it also occurs at the beginning and at the end of a text.
    texts = [TRICKY_TEXT[i:] + TRICKY_TEXT[:i] for i in range(len(TRICKY_TEXT))]
    for chunk in (Chunk(0, 0, "values", [*texts, *topics.values()]), *probe):
        if not np.array_equal(fast(chunk).tokens, slow(chunk).tokens):
            print(f"the fast encoder disagrees on {options.tokenizer} and is not used", file=sys.stderr)
            return False
    return True


def encoder_version(tokenizer: Tokenizer, use_fast: bool) -> str:
    """Name and version of the package that encodes, for meta.json."""
    if use_fast:
        package = "numpy" if tokenizer.name == "bytes" else "gigatoken"
    else:
        package = "tokenizers" if isinstance(tokenizer, HuggingFaceTokenizer) else "tiktoken"
    return f"{package} {importlib.metadata.version(package)}"


# ---- Worker processes ------------------------------------------------------------------------------------------------


def encode_chunks(chunks: Iterator[Chunk], options: EncoderOptions, workers: int) -> Iterator[tuple[Chunk, Encoded]]:
    """Yield each chunk, without its records, and its tokens, in order. At most 8 chunks per worker are in memory."""
    if workers == 1:
        encoder = Encoder(options)
        for chunk in chunks:
            yield chunk._replace(records=[]), encoder(chunk)
        return
    # spawn, because fork is unsafe in a process with threads.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker)
    pending: deque[tuple[Chunk, Future[Encoded]]] = deque()
    try:
        for chunk in chunks:
            pending.append((chunk._replace(records=[]), pool.submit(_encode_in_worker, options, chunk)))
            # Enough chunks to keep the other workers busy while the oldest one is still being encoded.
            if len(pending) > 8 * workers:
                oldest, future = pending.popleft()
                yield oldest, future.result()
        while pending:
            oldest, future = pending.popleft()
            yield oldest, future.result()
    except BrokenProcessPool as error:
        raise ChildProcessError("a worker process died, most likely out of memory; try fewer --workers") from error
    finally:
        pool.shutdown(cancel_futures=True)


# Cached, so that a worker loads the vocabulary once and not for each chunk.
@functools.cache
def _worker_encoder(options: EncoderOptions) -> Encoder:
    return Encoder(options)


def _encode_in_worker(options: EncoderOptions, chunk: Chunk) -> Encoded:
    return _worker_encoder(options)(chunk)


def _start_worker() -> None:
    # A terminal sends Ctrl-C to all processes; the main one handles it for the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """Exit when the parent is gone: a killed one cannot stop its workers, which would wait for chunks forever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
