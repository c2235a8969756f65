"""Text to token ids and back.

    tokenizer = load_tokenizer("gpt2")              # or bytes, cl100k_base, a tokenizer.json, a Hugging Face model id
    tokens = tokenizer.encode("Hello world")
    text = tokenizer.decode(tokens)

meta.json of a dataset and every checkpoint record `tokenizer.info()`; load_tokenizer takes that as well and refuses a
tokenizer whose tokens differ from it.
"""

import base64
import contextlib
import functools
import hashlib
import json
import re
import tempfile
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken

from nano416.hub import hub_errors

EOT = "<|endoftext|>"
# The info() of gpt2, spelled out so that its shards can be read without a vocabulary file.
GPT2 = {
    "name": "gpt2",
    "vocab_size": 50257,
    "eot_id": 50256,
    "sha256": "20940fd36bff2b33dff18da9a85f31f7eab5ea75375cf78fdb8b0bda1116d42e",
}
# How the tokenizer.json files of the common model families spell the end of a document.
END_TOKENS = (EOT, "<|end_of_text|>", "<|end▁of▁sentence|>", "</s>", "<eos>", "<|eot_id|>", "<|im_end|>")
# tiktoken encoding -> the splitting rule as gigatoken calls it.
GIGATOKEN_SCHEMES = {"gpt2": "gpt2", "r50k_base": "gpt2", "cl100k_base": "cl100k", "o200k_base": "o200k"}


class Tokenizer:
    """A tiktoken encoding. Text that spells a special token is encoded as plain text."""

    def __init__(self, name: str, encoding: tiktoken.Encoding):
        self.name = name
        self.encoding = encoding
        self.vocab_size = encoding.n_vocab
        self.eot_id = encoding.eot_token

    def encode(self, text: str) -> list[int]:
        return self.encoding.encode_ordinary(text)

    def encode_array(self, text: str) -> np.ndarray:
        """Tokens [n] as uint32, without building a Python list."""
        text = utf8(text).decode()
        try:
            return self.encoding.encode_to_numpy(text, disallowed_special=())
        except ValueError:
            # tiktoken gives up at a million spaces before a word: "Max stack size exceeded for backtracking". Only the
            # last of them belongs to the word, for all of its encodings, so it may be cut off with the word.
            parts = re.split(r"(?<!\s)([ \t]{100000,})(?=[ \t]\S)", text)
            return np.concatenate([self.encoding.encode_to_numpy(part, disallowed_special=()) for part in parts])

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token; `<token 7>` for an unused id, which imported models may generate."""
        try:
            return self.encoding.decode_single_token_bytes(token)
        except KeyError:
            return b"<token %d>" % token

    def decode_bytes(self, tokens: Sequence[int]) -> bytes:
        try:
            return self.encoding.decode_bytes(tokens)
        except KeyError:
            # An unused id. One token at a time takes 14 times as long.
            return b"".join(map(self.token_bytes, tokens))

    def decode(self, tokens: Sequence[int]) -> str:
        """Text; bytes that are not UTF-8, such as half a character, become U+FFFD."""
        return self.decode_bytes(tokens).decode("utf-8", errors="replace")

    def vocabulary(self) -> list[tuple[int, bytes]]:
        """(id, bytes) of every token of ordinary text, by id. Special tokens are left out."""
        return _tiktoken_vocabulary(self.encoding)

    def byte_lengths(self) -> np.ndarray:
        """Bytes of text per token [vocab_size], for bits per byte. Special and unused ids have 0."""
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        for token_id, token in self.vocabulary():
            lengths[token_id] = len(token)
        return lengths

    def sha256(self) -> str:
        """Checksum of the vocabulary."""
        digest = hashlib.sha256()
        for token_id, token in self.vocabulary():
            digest.update(b"%d %d " % (token_id, len(token)) + token)
        return digest.hexdigest()

    def info(self) -> dict[str, Any]:
        """Name, vocab_size, eot_id and sha256: what identifies the tokenizer in meta.json and in checkpoints."""
        return {"name": self.name, "vocab_size": self.vocab_size, "eot_id": self.eot_id, "sha256": self.sha256()}


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json, read by the package `tokenizers`."""

    def __init__(self, name: str, may_download: bool = True):
        try:
            import tokenizers
        except ImportError as error:
            raise ValueError(f"tokenizer {name!r} needs a package: pip install tokenizers") from error
        self.name = name
        path = _find_tokenizer_json(name, may_download)
        try:
            self.json_text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"cannot load tokenizer {name!r}: {error}") from error
        with _rust_errors(f"cannot load tokenizer {name!r}"):
            self.backend = tokenizers.Tokenizer.from_str(self.json_text)
            vocab = self.backend.get_vocab()
        end_tokens = [token for token in END_TOKENS if token in vocab]
        if not end_tokens:
            raise ValueError(f"tokenizer {name!r} has no token to end documents with, none of {' '.join(END_TOKENS)}")
        self.eot_id = vocab[end_tokens[0]]
        data = json.loads(self.json_text)
        for token in data.get("added_tokens", []):
            if token["id"] == self.eot_id and not token["special"]:
                # encode_special_tokens below needs it, or a document would end where its text spells the token.
                token["special"] = True
                self.backend = tokenizers.Tokenizer.from_str(json.dumps(data))
        # The file may prescribe the sequence length of its model, but documents have any length.
        self.backend.no_truncation()
        self.backend.no_padding()
        # True: encode the text of a special token as plain text.
        self.backend.encode_special_tokens = True
        self.vocab_size = max(vocab.values()) + 1
        # Added tokens are stored as plain text, all others in the alphabet of byte-level BPE or SentencePiece.
        added = {token["content"]: token["special"] for token in data.get("added_tokens", [])}
        is_byte_level = "ByteLevel" in json.dumps([data.get("pre_tokenizer"), data.get("decoder")])
        to_bytes = _byte_level_bytes if is_byte_level else _sentencepiece_bytes
        try:
            self._bytes = {i: token.encode() if token in added else to_bytes(token) for token, i in vocab.items()}
        except KeyError as error:
            message = f"its vocabulary is not byte-level BPE: the character {error} stands for no byte"
            raise ValueError(f"cannot load tokenizer {name!r}: {message}") from error
        self._special_ids = {vocab[token] for token, is_special in added.items() if is_special}

    def encode(self, text: str) -> list[int]:
        with _rust_errors(f"tokenizer {self.name!r}"):
            return self.backend.encode(utf8(text).decode(), add_special_tokens=False).ids

    def encode_array(self, text: str) -> np.ndarray:
        return np.array(self.encode(text), np.uint32)

    def encode_after(self, before: str, text: str) -> np.ndarray:
        """Tokens [n] of a text that continues the text `before`."""
        first = self.encode_array(before)
        tokens = self.encode_array(before + text)
        # Unless a token reaches over the border.
        is_apart = np.array_equal(tokens[: len(first)], first)
        return tokens[len(first) :] if is_apart else self.encode_array(text)

    def token_bytes(self, token: int) -> bytes:
        return self._bytes.get(token, b"<token %d>" % token)

    def decode_bytes(self, tokens: Sequence[int]) -> bytes:
        return b"".join(map(self.token_bytes, tokens))

    def vocabulary(self) -> list[tuple[int, bytes]]:
        return sorted((i, token) for i, token in self._bytes.items() if i not in self._special_ids)

    def sha256(self) -> str:
        return hashlib.sha256(self.json_text.encode()).hexdigest()


@contextlib.contextmanager
def _rust_errors(what: str) -> Iterator[None]:
    """Turn what the package `tokenizers` raises into a ValueError: bare Exceptions, and panics of Rust."""
    try:
        yield
    except BaseException as error:
        # The class of panics cannot be imported. It is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{what}: {(str(error).splitlines() or [type(error).__name__])[0]}") from error


# What a tokenizer may lose -> a text that shows it.
PROBES = {
    "spaces": " two  spaces,   three, and one at the end ",
    "line breaks and tabs": "one\n\ntwo\r\n\tthree\n",
    "indentation": "if x:\n    for i in y:\n        z[i] += 1  # so\n",
    "capitals": "NASA and McDonald",
    "accents": "caf\u00e9 na\u00efve \u00c5ngstr\u00f6m \u0130stanbul cafe\u0301",
    "digits": "1234567890 3.14159 1,000,000 0x1F",
    "punctuation": "\"so\" 'so' (a) [b] {c} <d> a/b\\c @#$%^&*_-+=|~`?!;: don't we'll I'M",
    "typographic characters": "\u201cso\u201d \u2018so\u2019 \u2014 \u2026 \ufb01 \u00b2 \u2167 \u00a0 \u3000 \uff21",
    "other scripts": "\u732b\u3092 \u041f\u0440\u0438 \u0645\u0631 \u0939\u093f\u0928\u094d\u0926\u0940 \ud55c\uad6d",
    "emoji": "\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467 \u2764\ufe0f",
}


def check_lossless(tokenizer: Tokenizer) -> None:
    """Raise ValueError for a tokenizer whose tokens are not the text, or in whose text documents end by themselves.

    Allowed are a space before the text, as Llama 2 has it, and other code points for the same characters (Unicode NFC,
    as Qwen has it).
    """
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        return
    name = tokenizer.name
    for what, text in PROBES.items():
        decoded = tokenizer.decode(tokenizer.encode(text))
        allowed = [unicodedata.normalize("NFC", space + text) for space in ("", " ")]
        if unicodedata.normalize("NFC", decoded) not in allowed:
            raise ValueError(
                f"tokenizer {name!r} loses {what}: {text!r} comes back as {decoded!r}; use one that keeps any text, "
                "such as gpt2 or another byte-level BPE"
            )
    end = tokenizer.token_bytes(tokenizer.eot_id).decode("utf-8", "replace")
    for text in (end, f"a {end} b", f"a{end}b", f"a\n{end}\n"):
        if tokenizer.eot_id in tokenizer.encode(text):
            raise ValueError(f"tokenizer {name!r} ends a document where its text spells {end!r}; use another one")


def load_tokenizer(source: str | Mapping[str, Any]) -> Tokenizer:
    """Load a tokenizer by its name, or by the info() that meta.json and checkpoints record.

    A name is gpt2, bytes, any other tiktoken encoding, or a tokenizer.json: its path, its folder or a Hugging Face
    model id. Raises ValueError if it does not exist, or if its vocabulary is not the one that the info() names. A model
    id in an info() is looked up on this machine only: the author of a file must not learn when somebody opens it.
    """
    name = source if isinstance(source, str) else source["name"]
    if name == "bytes":
        tokenizer = Tokenizer(name, _bytes_encoding())
    elif "/" in name or name.endswith(".json"):
        tokenizer = HuggingFaceTokenizer(name, may_download=isinstance(source, str))
    else:
        tokenizer = Tokenizer(name, _tiktoken_encoding(name))
    expected = None if isinstance(source, str) else source.get("sha256")
    if expected is not None and tokenizer.sha256() != expected:
        raise ValueError(
            f"tokenizer {name!r} here has the vocabulary {tokenizer.sha256()[:12]}, the data or checkpoint was made "
            f"with {expected[:12]}; use the tokenizer it was made with"
        )
    return tokenizer


def utf8(text: str) -> bytes:
    """The bytes of a text. A lone surrogate, which JSON can express, becomes U+FFFD, as in tiktoken."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


def _bytes_encoding() -> tiktoken.Encoding:
    """256 byte tokens and <|endoftext|>."""
    ranks = {bytes([i]): i for i in range(256)}
    # Without merges the pattern decides nothing; it only limits the pieces that tiktoken works on.
    return tiktoken.Encoding("bytes", pat_str=r"(?s:.{1,64})", mergeable_ranks=ranks, special_tokens={EOT: 256})


def _tiktoken_encoding(name: str) -> tiktoken.Encoding:
    names = tiktoken.list_encoding_names()
    if name not in names:
        raise ValueError(f"unknown tokenizer {name!r}; known are bytes, {', '.join(names)}, or a path or hub id with /")
    try:
        return tiktoken.get_encoding(name)
    except OSError as error:
        # Network errors as well: those of `requests` are OSErrors.
        raise ValueError(
            f"cannot fetch the vocabulary of tokenizer {name!r} ({type(error).__name__}); without network, set "
            "TIKTOKEN_CACHE_DIR to the tiktoken cache folder of a machine that has it, or use --tokenizer=bytes"
        ) from error


# Cached because it takes 50 ms for gpt2.
@functools.cache
def _tiktoken_vocabulary(encoding: tiktoken.Encoding) -> list[tuple[int, bytes]]:
    return sorted((encoding.encode_single_token(token), token) for token in encoding.token_byte_values())


def _find_tokenizer_json(name: str, may_download: bool) -> Path:
    path = Path(name)
    if path.is_dir():
        path = path / "tokenizer.json"
    if path.is_file():
        return path
    if path.exists():
        # Reading a pipe or /dev/zero would never end.
        raise ValueError(f"cannot load tokenizer {name!r}: {path} is not a file")
    # A path that exists or ends in .json is not looked up as a repository of the Hub.
    if name.endswith(".json") or Path(name).exists():
        raise ValueError(f"cannot load tokenizer {name!r}: {path} does not exist")
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    with hub_errors(name):
        if may_download:
            return Path(hf_hub_download(name, "tokenizer.json"))
        cached = try_to_load_from_cache(name, "tokenizer.json")
    if not isinstance(cached, str):
        raise ValueError(
            f"tokenizer {name!r}, which the data or checkpoint was made with, is not on this machine; if you trust its "
            f"source, fetch it with: hf download {name} tokenizer.json"
        )
    return Path(cached)


def _gpt2_byte_alphabet() -> dict[str, int]:
    """Visible bytes stand for themselves, the other 68 for the characters from U+0100 on (GPT-2's encoder.py)."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


# Character of a byte-level vocabulary -> the byte it stands for.
BYTE_OF = _gpt2_byte_alphabet()


def _byte_level_bytes(token: str) -> bytes:
    return bytes(BYTE_OF[character] for character in token)


def _sentencepiece_bytes(token: str) -> bytes:
    """SentencePiece writes U+2581 for a space and <0x0A> for a byte."""
    byte = re.fullmatch(r"<0x([0-9A-F]{2})>", token)
    return bytes([int(byte[1], 16)]) if byte else token.replace("\u2581", " ").encode()


def fast_encoder(tokenizer: Tokenizer, slow_characters: str = "") -> Callable[[str], np.ndarray] | None:
    """A much faster encode_array, or None: numpy for bytes, gigatoken for tiktoken's encodings if it is installed.

    A text with one of the `slow_characters` is left to encode_array. Callers first check the tokens against those of
    encode_array, see encode.choose_encoder.
    """
    if tokenizer.name == "bytes":
        return lambda text: np.frombuffer(utf8(text), np.uint8)
    encode_bytes = (
        None if isinstance(tokenizer, HuggingFaceTokenizer) else _gigatoken(tokenizer.name, tokenizer.encoding)
    )
    if encode_bytes is None:
        return None
    # The first byte of such characters -> their other bytes.
    slow: dict[bytes, set[bytes]] = {}
    for character in slow_characters:
        data = character.encode()
        slow.setdefault(data[:1], set()).add(data[1:])

    def is_slow(data: bytes) -> bool:
        for first, others in slow.items():
            # A search for one byte costs next to nothing, where a regular expression would take half of the time.
            if first in data:
                length = len(next(iter(others)))
                if not others.isdisjoint([part[:length] for part in data.split(first)]):
                    return True
        return False

    def encode(text: str) -> np.ndarray:
        data = utf8(text)
        if is_slow(data):
            return tokenizer.encode_array(text)
        return encode_bytes(data)

    return encode


# Cached because it takes 0.2 s for gpt2.
@functools.cache
def _gigatoken(name: str, encoding: tiktoken.Encoding) -> Callable[[bytes], np.ndarray] | None:
    """gigatoken's version of a tiktoken encoding; None if it has none or is not installed."""
    if name not in GIGATOKEN_SCHEMES:
        return None
    try:
        import gigatoken
    except ImportError:
        return None
    # tiktoken's own file format: the base64 of a token and its rank.
    with tempfile.NamedTemporaryFile("wb", suffix=".tiktoken") as file:
        for token_id, token in _tiktoken_vocabulary(encoding):
            file.write(base64.b64encode(token) + b" %d\n" % token_id)
        file.flush()
        return gigatoken.Tokenizer.from_tiktoken(file.name, pretokenizer=GIGATOKEN_SCHEMES[name]).encode
