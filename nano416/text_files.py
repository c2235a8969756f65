"""Read text files of all common formats as chunks of records, each of which a worker can encode by itself.

    for chunk in read_chunks(["a.jsonl.gz", "b.parquet"], text_key="text"): ...      # paths or URLs

read_chunks(paths, "text", start) resumes at any record of any file.

Why not `datasets` with streaming=True: it parses JSON in the reading process (1.4 s for 19 MB of .jsonl.gz, against
0.1 s here, where the workers parse); a field that changes its type from row to row is an error without file and line;
and a resumed stream reads its file from the beginning.
"""

import bz2
import codecs
import io
import json
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

from nano416.hub import remote_errors

CHUNK_BYTES = 2**20
# No document is longer: whole books and repositories are below 0.1 GB. But a damaged or hostile file of 2 MB can unpack
# to one line of 7 GB.
MAX_RECORD_BYTES = 2**30
TOO_LONG = f"longer than {MAX_RECORD_BYTES:,} bytes; split it into several documents"
# A text without a place to cut it is cut after so many bytes, see CUTS.
MAX_PIECE_BYTES = 2**20
FORMATS = (".jsonl", ".json", ".txt", ".md", ".parquet", ".arrow")
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")


class Position(NamedTuple):
    """A place in the source: `token` tokens after the beginning of a record of a file."""

    file: int = 0
    record: int = 0  # a line, a row, or a piece of a text file
    token: int = 0


START = Position()


class Chunk(NamedTuple):
    """Consecutive records of one file."""

    file: int
    record: int  # number of the first record
    # JSON lines, values of a column, a piece of a text file, its last piece.
    kind: Literal["json", "values", "piece", "end"]
    records: list[Any]  # or, instead of a record, the ValueError that says why there is none
    before: bytes = b""  # the end of the text before a piece
    bytes_read: int = 0  # bytes of the file read so far, for a progress bar


def text_format(name: str) -> str:
    """The suffix of a file name without its compression; "" if it cannot be read."""
    stem, suffix = os.path.splitext(name.lower())
    if suffix in COMPRESSIONS:
        suffix = os.path.splitext(stem)[1]
    return suffix if suffix in FORMATS else ""


# ---- Reading ---------------------------------------------------------------------------------------------------------


def read_chunks(paths: list[str], text_key: str, start: Position = START) -> Iterator[Chunk]:
    """The chunks of all files from the record of `start` on. Raises ValueError for a damaged file."""
    from fsspec.core import url_to_fs

    damage = _damage_errors()
    for file in range(start.file, len(paths)):
        first_record = start.record if file == start.file else 0
        with remote_errors(paths[file]):
            fs, name = url_to_fs(paths[file])
            try:
                with fs.open(name, "rb") as raw:
                    for chunk in _read_file(raw, paths[file], text_key, first_record):
                        # The position in the compressed file, because a progress bar knows only its size.
                        yield chunk._replace(file=file, bytes_read=raw.tell())
            except damage as error:
                # An error number or an answer of a server means that the disk or the network failed, the file may be
                # sound.
                if getattr(error, "errno", None) or hasattr(error, "response") or isinstance(error, TimeoutError):
                    raise
                raise ValueError(f"{paths[file]}: damaged or cut off ({error}); fetch it again") from error


def _damage_errors() -> tuple[Any, ...]:
    """What the decompressors raise for a damaged file."""
    errors = (EOFError, lzma.LZMAError, zlib.error, OSError)
    try:
        from isal.isal_zlib import IsalError
    except ImportError:
        return errors
    return *errors, IsalError


def _read_file(raw: Any, path: str, text_key: str, start: int) -> Iterator[Chunk]:
    suffix = text_format(path)
    stream = _decompress(raw, path)
    if suffix in (".parquet", ".arrow"):
        return _read_column(stream, text_key, start, is_parquet=suffix == ".parquet")
    # Buffered, so that read(n) gives n bytes: where a text is cut must not depend on the speed of a network.
    stream = io.BufferedReader(stream, CHUNK_BYTES)
    readers = {".jsonl": _read_lines, ".json": _read_json, ".txt": _read_text, ".md": _read_text}
    return readers[suffix](stream, start)


def _decompress(raw: Any, path: str) -> Any:
    from fsspec.compression import compr
    from fsspec.utils import infer_compression

    match os.path.splitext(path.lower())[1]:
        case ".zst":
            # For zstd fsspec needs one more package. pyarrow reads several frames in a row and notices a missing end.
            import pyarrow

            return pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd")
        case ".bz2":
            return _Decompressed(raw, bz2.BZ2Decompressor)
        case ".xz":
            return _Decompressed(raw, lzma.LZMADecompressor)
    # fsspec uses isal for .gz where it is installed: three times as fast as zlib.
    openers: dict[Any, Any] = compr
    return openers[infer_compression(path.lower())](raw, mode="rb")


class _Decompressed(io.RawIOBase):
    """The bytes of the .bz2 or .xz streams of a file, one after another.

    bz2.open and lzma.open take anything else that follows a stream for the end of the file; here it is an error.
    """

    def __init__(self, raw: Any, new_decompressor: Callable[[], Any]):
        self._raw = raw
        self._new_decompressor = new_decompressor
        self._decompressor = new_decompressor()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        output = b""
        while not output:
            data = b""
            if self._decompressor.eof:
                data = self._next_stream()
                if not data:
                    return 0
                self._decompressor = self._new_decompressor()
            elif self._decompressor.needs_input:
                data = self._raw.read(CHUNK_BYTES)
                if not data:
                    raise EOFError("it ends inside a compressed stream")
            output = self._decompressor.decompress(data, len(buffer))
        buffer[: len(output)] = output
        return len(output)

    def _next_stream(self) -> bytes:
        """The first bytes after the end of a stream, b"" at the end of the file."""
        data = self._decompressor.unused_data
        # Zeros may pad .xz files.
        while not data.strip(b"\0"):
            data = self._raw.read(CHUNK_BYTES)
            if not data:
                return b""
        return data.lstrip(b"\0")


def _read_lines(stream: io.BufferedReader, start: int) -> Iterator[Chunk]:
    number = 0
    # The beginning of a line whose end has not been read.
    parts = [b""]
    size = 0
    is_end = False
    while not is_end:
        data = stream.read(CHUNK_BYTES)
        is_end = not data
        lines: list[Any] = data.split(b"\n")
        size += len(lines[0])
        if size <= MAX_RECORD_BYTES:
            parts.append(lines[0])
        elif parts:
            # Said at once, because the end of a bomb is far away. The rest of the line is read and forgotten.
            parts = []
            if number >= start:
                yield Chunk(0, number, "json", [ValueError(TOO_LONG)])
        if len(lines) == 1 and not is_end:
            continue
        if size > MAX_RECORD_BYTES:
            del lines[0]
            number += 1
        else:
            lines[0] = b"".join(parts)
        if is_end and not size:
            return
        # What follows the last newline is the beginning of another line.
        parts = [] if is_end else [lines.pop()]
        size = sum(map(len, parts))
        skipped = max(0, start - number)
        if skipped < len(lines):
            yield Chunk(0, number + skipped, "json", lines[skipped:])
        number += len(lines)


def _read_json(stream: io.BufferedReader, start: int) -> Iterator[Chunk]:
    """One list of objects, or one object per line: both are common under this name."""
    if not stream.peek(1).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        yield from _read_lines(stream, start)
        return
    number = 0
    rows: list[bytes] = []
    size = 0
    try:
        for number, element in enumerate(_json_elements(stream), start=1):
            if number <= start:
                continue
            rows.append(element.encode())
            size += len(rows[-1])
            if size >= CHUNK_BYTES:
                yield Chunk(0, number - len(rows), "json", rows)
                rows = []
                size = 0
    except (ValueError, RecursionError) as error:
        # read_chunks adds the name of the file to an EOFError.
        raise EOFError(f"not JSON after element {number:,}: {error}") from error
    if rows:
        yield Chunk(0, number - len(rows), "json", rows)


def _json_elements(stream: io.BufferedReader) -> Iterator[str]:
    """The elements of a JSON list, as text, with one of them in memory. Raises ValueError if it is not a list."""
    parse = json.JSONDecoder().raw_decode
    decode = codecs.getincrementaldecoder("utf-8-sig")().decode
    text = ""
    position = 0
    while True:
        try:
            # Of the [ before the first element, of the comma before another, or of the ] after the last.
            mark = _skip_space(text, position)
            if text[mark] == "]":
                break
            begin = _skip_space(text, mark + 1)
            if text[mark] == "[" and text[begin] == "]":
                mark = begin
                break
            end = parse(text, begin)[1]
            following = text[_skip_space(text, end)]
            if following not in ",]" and len(text) - end > 2:
                raise ValueError(f"{following!r} after an element")
            if following not in ",]":
                # What has been read may end inside a number: 1 of 1.5, 1 of 1e-5.
                raise IndexError(f"{following!r} after an element")
        except (IndexError, json.JSONDecodeError) as error:
            # What has been read may end inside an element. An error in its middle is one, except for a string's end.
            is_in_middle = isinstance(error, json.JSONDecodeError) and error.pos < len(text) - 10
            if is_in_middle and "Unterminated" not in str(error):
                raise
            # As much again, since an element is parsed from its beginning each time.
            data = stream.read(max(CHUNK_BYTES, len(text) - position))
            if not data:
                raise ValueError(f"it is cut off or no list of objects ({error})") from error
            text = text[position:] + decode(data)
            position = 0
            # Of characters, which take up to 4 bytes each.
            if len(text) > MAX_RECORD_BYTES // 4:
                raise ValueError(f"an element has more than {MAX_RECORD_BYTES // 4:,} characters") from error
            continue
        yield text[begin:end]
        position = end
    rest = text[mark + 1 :].encode()
    while rest:
        if rest.strip():
            raise ValueError("something follows the list")
        rest = stream.read(CHUNK_BYTES)


def _skip_space(text: str, position: int) -> int:
    """Index of the next character that is not white space of JSON. Raises IndexError at the end of the text."""
    while text[position] in " \t\r\n":
        position += 1
    return position


# Where a text may be cut, best first: the splitting rules of gpt2, cl100k_base and o200k_base (and of Llama 3, Qwen and
# DeepSeek) begin a new token there, whatever stands further left and right.
CUTS = [
    re.compile(rb"(?s:.*)" + pattern)  # the greedy .* finds the last place
    for pattern in (
        # After a single newline between two visible characters. Not before "/": o200k_base has tokens like "!\n/".
        rb"[!-~]\n(?=[!-.0-~])",
        # Before white space after an ASCII letter or digit: CRLF, blank lines, a text in one line.
        rb"[0-9A-Za-z](?=[ \t\r\n])",
        # Before a space after a character of any script. Without the last bytes of U+0085, U+00A0, U+1680,
        # U+2000-200A, U+2028, U+2029, U+202F, U+205F and U+3000, which are white space too.
        rb"[!-~\x8b-\x9e\xa1-\xa7\xaa-\xae\xb0-\xbf](?=[ \t])",
        # Before punctuation, except for the apostrophe of 's, after an ASCII letter or digit.
        rb"[0-9A-Za-z](?=[!-&(-/:-@\[-`{-~])",
        # Before one of the full-width 、。，！：；？ after an ideograph from U+5000 to U+8FFF or a hiragana.
        rb"(?:[\xe5-\xe8][\x80-\xbf]|\xe3\x81)[\x81-\xbf](?=\xe3\x80[\x81\x82]|\xef\xbc[\x81\x8c\x9a\x9b\x9f])",
    )
]


def _read_text(stream: io.BufferedReader, start: int) -> Iterator[Chunk]:
    """A text file is one document, read in pieces that give the tokens of the whole."""
    piece = 0
    before = b""
    rest = b""
    while data := stream.read(CHUNK_BYTES):
        if not piece and not rest:
            if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or data.count(0) > len(data) // 4:
                yield Chunk(0, 0, "end", [ValueError("UTF-16 or no text at all; save it as UTF-8")])
                return
            data = data.removeprefix(codecs.BOM_UTF8)
        # Both sides of a cut have 6 bytes at most, and the second may be in the new data.
        searched = max(0, len(rest) - 5)
        rest += data
        cut = find_cut(rest, searched)
        if not cut:
            continue
        if piece >= start:
            yield Chunk(0, piece, "piece", [rest[:cut]], before)
        piece += 1
        # A few words, for tokenizers that treat the beginning of a text in a special way.
        before = rest[max(0, cut - 64) : cut]
        rest = rest[cut:]
    if piece >= start:
        yield Chunk(0, piece, "end", [rest], before)


def find_cut(text: bytes, start: int) -> int:
    """The last place after `start` where the text may be cut, 0 if there is none and it is not longer than a piece.

    A text of more than MAX_PIECE_BYTES without such a place (spaces, letters or digits alone) is cut between two
    characters; the tokens around such a cut may differ from those of the whole text.
    """
    for pattern in CUTS:
        match = pattern.match(text, start)
        if match:
            return match.end()
    if len(text) <= MAX_PIECE_BYTES:
        return 0
    cut = MAX_PIECE_BYTES
    # Back to the first byte of a character.
    while cut > MAX_PIECE_BYTES - 4 and text[cut] & 0xC0 == 0x80:
        cut -= 1
    return cut


def _read_column(stream: Any, text_key: str, start: int, is_parquet: bool) -> Iterator[Chunk]:
    """One column of a parquet file, or of an Arrow stream as datasets.save_to_disk writes it."""
    from pyarrow import ArrowException, ArrowMemoryError, ipc, parquet

    file: Any
    try:
        if is_parquet:
            file = parquet.ParquetFile(stream, page_checksum_verification=True)
            names = file.schema_arrow.names
        else:
            file = ipc.open_stream(stream)
            names = file.schema.names
        if names.count(text_key) != 1:
            raise ValueError(f"{text_key!r} is not one of the columns {', '.join(names)}; name one with --text_key")
        first = 0
        for batch in file.iter_batches(1000, columns=[text_key]) if is_parquet else file:
            skipped = max(0, start - first)
            if skipped < len(batch):
                yield Chunk(0, first + skipped, "values", _column_values(batch.column(text_key)[skipped:]))
            first += len(batch)
    except ArrowMemoryError:
        raise
    except ArrowException as error:
        raise EOFError(error) from error


def _column_values(column: Any) -> list[Any]:
    """The values of an Arrow array; a ValueError instead of one that cannot be read."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        # Arrow does not check that strings are UTF-8. One at a time takes five times as long.
        return [_column_value(value) for value in column]


def _column_value(value: Any) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        return ValueError(str(error))
