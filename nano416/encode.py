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
import unicodedata
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from nano416.dataset import token_dtype
from nano416.text_files import Chunk
from nano416.tokenizer import HuggingFaceTokenizer, Tokenizer, check_lossless, fast_encoder, load_tokenizer


@dataclass(frozen=True)
class EncoderOptions:
    """How to turn records into tokens."""

    tokenizer: str  # a name for load_tokenizer; passthrough:NAME and chunks:NAME take token ids instead of text
    text_key: str
    use_fast: bool = False  # use fast_encoder; set by choose_encoder
    slow_characters: str = ""  # but not for texts with one of these


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
        if not self.id_mode:
            check_lossless(self.tokenizer)
        self.text_key = options.text_key
        fast = fast_encoder(self.tokenizer, options.slow_characters) if options.use_fast else None
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
            if chunk.kind == "json" and isinstance(record, bytes) and not record.strip():
                continue
            # A blank piece of a text is not an empty document either.
            is_part = chunk.kind == "piece" or (chunk.kind == "end" and number > 0)
            try:
                value = self._value(record, chunk.kind)
                if self.id_mode:
                    tokens = self._check_ids(value)
                else:
                    tokens = self._encode_part(value, chunk.before) if is_part else self._encode(value)
            except (ValueError, RecursionError) as error:
                # One line of at most 200 characters: some parsers quote the whole record.
                faults.append((number, " ".join(str(error).split())[:200]))
                # Without its last piece a text still ends.
                tokens = self.eot[:0]
                if not (chunk.kind == "end" and is_part):
                    continue
            if not len(tokens) and not is_part:
                n_empty += 1
                continue
            arrays.append(tokens)
            # Token ids may have been stored with their eot; pieces of a text are not the end of a document.
            has_eot = self.id_mode == "passthrough" and tokens[-1:] == self.eot
            if not (has_eot or self.id_mode == "chunks" or chunk.kind == "piece"):
                arrays.append(self.eot)
        # Converted on the way, because a copy of a long document would be in the way.
        return Encoded(np.concatenate(arrays, dtype=self.dtype, casting="unsafe"), n_empty, faults)

    def _value(self, record: Any, kind: str) -> Any:
        """The text or the ids of a record. Raises ValueError if it has none."""
        if isinstance(record, ValueError):
            raise record
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

    def _encode_part(self, text: str, before: bytes) -> np.ndarray:
        """Tokens of a piece of a text, which may be blank, where `before` is the end of the text before it."""
        if before and isinstance(self.tokenizer, HuggingFaceTokenizer):
            # It may put a space before every text.
            return self.tokenizer.encode_after(before.decode("utf-8", "ignore"), text)
        return self.encode_text(text)

    def _check_ids(self, ids: Any) -> np.ndarray:
        ids = [] if ids is None else ids
        # By type, because numpy would convert 1.9, "12" and true.
        if not isinstance(ids, list) or set(map(type, ids)) - {int}:
            raise ValueError("not a list of token ids, which are whole numbers")
        if ids and not 0 <= min(ids) <= max(ids) < self.tokenizer.vocab_size:
            largest = self.tokenizer.vocab_size - 1
            raise ValueError(f"not a list of token ids from 0 to {largest}: {min(ids)} to {max(ids)}")
        return np.array(ids, np.uint32)


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


def choose_encoder(options: EncoderOptions, probe: Iterable[Chunk]) -> EncoderOptions:
    """`options` with the fast encoder, if it is available and gives the same tokens as the slow one.

    They are compared on strings chosen to be difficult, on English prose, and on `probe`, the beginning of the text.
    """
    from pydoc_data.topics import topics

    slow = Encoder(replace(options, use_fast=False))
    fast = Encoder(replace(options, use_fast=True))
    if fast.id_mode or not fast.is_fast:
        return options
    fast_options = replace(options, use_fast=True, slow_characters=find_disagreements(fast, slow))
    fast = Encoder(fast_options)
    # All rotations, so that each part of it also occurs at the beginning and at the end of a text.
    texts = [TRICKY_TEXT[i:] + TRICKY_TEXT[:i] for i in range(len(TRICKY_TEXT))]
    for chunk in (Chunk(0, 0, "values", [*texts, *topics.values()]), *probe):
        if not np.array_equal(fast(chunk).tokens, slow(chunk).tokens):
            print(f"the fast encoder disagrees on {options.tokenizer} and is not used", file=sys.stderr)
            return options
    return fast_options


def find_disagreements(fast: Encoder, slow: Encoder) -> str:
    """The characters that only one of two encoders knows as letters or digits: they have different versions of Unicode.

    gigatoken 0.10 and tiktoken 0.14 disagree on 4,657, all of Unicode 16 and 17.
    """
    if slow.tokenizer.name == "bytes":
        return ""
    # Those of Unicode 3.2 of 2002 are known to all. Planes 4 to 13 are empty.
    all_characters = "".join(map(chr, range(0x40000)))
    categories = map(unicodedata.ucd_3_2_0.category, all_characters)
    characters = [character for character, category in zip(all_characters, categories) if category == "Cn"]
    # 's is a token of its own after a letter or digit only.
    text = "'s\n".join([*characters, ""])
    (newline,) = slow.tokenizer.encode("\n")
    n_tokens = [np.diff(np.flatnonzero(encoder.encode_text("\n" + text) == newline)) for encoder in (fast, slow)]
    if len(n_tokens[0]) != len(n_tokens[1]):
        # Too different to be compared: choose_encoder will find the same.
        return ""
    return "".join(characters[i] for i in np.flatnonzero(n_tokens[0] != n_tokens[1]))


def encoder_version(tokenizer: Tokenizer, use_fast: bool) -> str:
    """Name and version of the package that encodes, for meta.json."""
    if use_fast:
        package = "numpy" if tokenizer.name == "bytes" else "gigatoken"
    else:
        package = "tokenizers" if isinstance(tokenizer, HuggingFaceTokenizer) else "tiktoken"
    return f"{package} {importlib.metadata.version(package)}"


# ---- Worker processes ------------------------------------------------------------------------------------------------


def encode_chunks(chunks: Iterator[Chunk], options: EncoderOptions, workers: int) -> Generator[tuple[Chunk, Encoded]]:
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
            # A worker that this starts inherits the mask: a terminal sends Ctrl-C to all processes, and the main one
            # handles it for the workers.
            previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            future = pool.submit(_encode_in_worker, options, chunk)
            signal.pthread_sigmask(signal.SIG_SETMASK, previous)
            pending.append((chunk._replace(records=[]), future))
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
