"""Shards written are shards read, every document once, every window once per epoch, the same for any number of ranks
and workers; what is malformed is one line."""

import bz2
import contextlib
import errno
import functools
import gzip
import hashlib
import http.server
import itertools
import json
import lzma
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from conftest import ROOT, shared
from processes import Process, python

import data_pipeline
import shards
from data_pipeline import find_files, prepare, sample
from shards import Dataset, Order, TokenLoader, load_tokenizer, permute, read_shard, validation_batches, write_shard

DOCUMENTS = [f"Document {i}: {'word ' * (i * 7 % 50)}ünïcode 猫 <|endoftext|>\n\nend {i}." for i in range(200)]


def write_jsonl(path: Path, documents: list[Any], key: str = "text") -> Path:
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in documents), encoding="utf-8")
    return path


def llm_c_reader(path: Path) -> np.ndarray:
    """The ten lines of someone who knows only the format."""
    data = path.read_bytes()
    magic, version, count = struct.unpack("<3i", data[:12])
    size, code = {(20240520, 1): (2, "<u2"), (20240801, 7): (4, "<u4")}[magic, version]
    assert len(data) == 1024 + count * size
    return np.frombuffer(data[1024:], dtype=code)


def all_tokens(folder: Path, split: str) -> np.ndarray:
    return np.concatenate([llm_c_reader(path) for path in sorted(folder.glob(f"{split}_*.bin"))])


def texts_of(folder: Path, split: str) -> list[str]:
    """The documents of a split made with the byte tokenizer."""
    raw = bytearray()
    for token in all_tokens(folder, split):
        raw += b"\x00" if token == 256 else bytes([token])
    assert raw.endswith(b"\x00")
    return raw.decode().split("\x00")[:-1]


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.bin"))}


def write_dataset(folder: Path, train: list[np.ndarray], val: list[np.ndarray] | None = None) -> Path:
    """Shards as another program would leave them: no meta.json, gpt2."""
    folder.mkdir()
    for split, parts in ("train", train), ("val", val or []):
        for number, tokens in enumerate(parts):
            write_shard(folder / f"{split}_{number:06d}.bin", tokens.astype(np.uint16))
    return folder


def cli(*arguments: object, **env: str) -> tuple[int, str, str]:
    """Exit code, what the command printed and what it complained of."""
    return python("data_pipeline.py", *map(str, arguments), **env)


# ---- Tokenizers


def test_bytes_are_their_own_tokens():
    tokenizer = load_tokenizer("bytes")
    text = "a é 猫 <|endoftext|>\x00"
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.encode_array(text).tolist() == list(text.encode())
    assert (tokenizer.vocab_size, tokenizer.eot_id) == (257, 256)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([0xE7, 0x8C]) == "\ufffd"
    assert tokenizer.byte_lengths().tolist() == [1] * 256 + [0]


def test_gpt2_is_tiktokens_and_text_never_becomes_its_end_of_text(monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared("tiktoken_cache")))
    tokenizer = load_tokenizer("gpt2")
    assert tokenizer.info() == shards.GPT2
    assert tokenizer.encode("Hello world<|endoftext|>")[:2] == [15496, 995]
    assert tokenizer.eot_id not in tokenizer.encode("<|endoftext|>")
    assert tokenizer.byte_lengths()[[15496, 995, 50256]].tolist() == [5, 6, 0]
    assert tokenizer.encode_array("a\ud800b").tolist() == tokenizer.encode("a\ufffdb")


def test_another_tokenizer_is_refused():
    with pytest.raises(ValueError, match=r"'bytes'.*000000000000"):
        load_tokenizer({"name": "bytes", "sha256": "0" * 64})


def test_offline_vocabulary_is_one_clear_line(tmp_path):
    blocked = {"https_proxy": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9"}
    source = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    code, _, error = cli(
        "prepare", f"--source={source}", f"--out_dir={tmp_path}/d", TIKTOKEN_CACHE_DIR=str(tmp_path), **blocked
    )
    assert (code, error.count("\n")) == (2, 1)
    assert "TIKTOKEN_CACHE_DIR" in error
    assert not (tmp_path / "d").exists()


def test_the_fast_encoder_gives_the_same_tokens(tmp_path, monkeypatch):
    pytest.importorskip("gigatoken")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared("tiktoken_cache")))
    source = str(shared("data/textbooks/val-00.jsonl.gz"))
    for fast in True, False:
        prepare(source, str(tmp_path / f"{fast}"), fast=fast, workers=1)
    assert hashes(tmp_path / "True") == hashes(tmp_path / "False")
    metas = [json.loads((tmp_path / name / "meta.json").read_text()) for name in ("True", "False")]
    assert [meta["encoder"].split()[0] for meta in metas] == ["gigatoken", "tiktoken"]


def test_a_fast_encoder_that_differs_is_not_used(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        data_pipeline, "fast_encoder", lambda tokenizer: lambda data: np.frombuffer(data[::-1], np.uint8)
    )
    path = write_jsonl(tmp_path / "x.jsonl", DOCUMENTS)
    prepare(str(path), str(tmp_path / "d"), tokenizer="bytes", val_tokens=0, workers=1)
    assert texts_of(tmp_path / "d", "train") == DOCUMENTS
    assert "disagree" in capsys.readouterr().err


def test_a_tokenizer_json_works_throughout_and_is_known_by_its_content(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|pad|>", "<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(DOCUMENTS, trainer)
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert (tokenizer.vocab_size, tokenizer.eot_id) == (made.get_vocab_size(), 1)
    for text in DOCUMENTS[:20]:
        tokens = tokenizer.encode(text)
        assert tokenizer.eot_id not in tokens  # though the text spells it
        assert tokenizer.decode(tokens) == text
        assert tokenizer.byte_lengths()[tokens].sum() == len(text.encode())
    path = write_jsonl(tmp_path / "x.jsonl", DOCUMENTS)
    prepare(str(path), str(tmp_path / "d"), tokenizer=str(tmp_path), val_tokens=0, workers=1)
    tokens = all_tokens(tmp_path / "d", "train")
    assert tokenizer.decode(tokens.tolist()) == "".join(text + "<|endoftext|>" for text in DOCUMENTS)
    info = Dataset(tmp_path / "d").tokenizer
    assert load_tokenizer(info).vocab_size == tokenizer.vocab_size
    made.add_tokens(["another"])
    made.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="was made with"):
        load_tokenizer(info)


# ---- Shards


@pytest.mark.parametrize(("dtype", "top"), [(np.uint16, 2**16), (np.uint32, 2**20)])
def test_shards_written_are_shards_read(tmp_path, dtype, top):
    tokens = np.random.default_rng(0).integers(0, top, 1234).astype(dtype)
    sha256 = write_shard(tmp_path / "x.bin", tokens)
    assert np.array_equal(llm_c_reader(tmp_path / "x.bin"), tokens)
    assert np.array_equal(read_shard(tmp_path / "x.bin"), tokens)
    assert hashlib.sha256((tmp_path / "x.bin").read_bytes()).hexdigest() == sha256


def test_foreign_shards_are_read(tmp_path):
    tokens = np.arange(5000, dtype="<u2")
    for name in "fineweb_train_000001.bin", "fineweb_val_000000.bin":
        header = struct.pack("<256i", 20240520, 1, len(tokens), *[0] * 253)
        (tmp_path / name).write_bytes(header + tokens.tobytes())
    dataset = Dataset(tmp_path)
    assert dataset.tokenizer == shards.GPT2
    assert np.array_equal(dataset.read(dataset.shards("train")[0]), tokens)
    assert dataset.shards("val")[0]["file"] == "fineweb_val_000000.bin"


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        write_shard(tmp_path / "x.bin", np.zeros(10, np.uint16))
    assert not list(tmp_path.iterdir())


# ---- Prepare


@pytest.fixture
def source(tmp_path) -> Path:
    """Two compressed files and an uncompressed one."""
    folder = tmp_path / "source"
    folder.mkdir()
    lines = [json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(DOCUMENTS)]
    (folder / "a.jsonl.gz").write_bytes(gzip.compress("".join(lines[:80]).encode()))
    (folder / "b.jsonl").write_text("".join(lines[80:150]))
    (folder / "c.jsonl.bz2").write_bytes(bz2.compress("".join(lines[150:]).rstrip("\n").encode()))
    return folder


def test_every_document_once_each_followed_by_eot(source, tmp_path):
    prepare(str(source), str(tmp_path / "d"), tokenizer="bytes", shard_tokens=5000, val_tokens=1000, workers=1)
    val, train = texts_of(tmp_path / "d", "val"), texts_of(tmp_path / "d", "train")
    assert val + train == DOCUMENTS  # cut at a document, in order, nothing lost
    assert 1000 <= len(all_tokens(tmp_path / "d", "val")) < 1000 + max(map(len, DOCUMENTS)) * 2
    meta = json.loads((tmp_path / "d" / "meta.json").read_text())
    assert (meta["val"]["documents"], meta["train"]["documents"]) == (len(val), len(train))
    assert meta["train"]["tokens"] == len(all_tokens(tmp_path / "d", "train"))
    assert [s["tokens"] for s in meta["shards"] if s["split"] == "train"][:-1] == [5000] * (
        len(train and meta["shards"]) - 2
    )
    assert sorted(path.suffix for path in (tmp_path / "d").iterdir()) == [".bin"] * len(meta["shards"]) + [".json"]


def test_any_number_of_workers_writes_the_same_bytes(source, tmp_path, monkeypatch):
    monkeypatch.setattr(data_pipeline, "CHUNK_BYTES", 1000)
    for workers in 1, 2:
        prepare(str(source), str(tmp_path / f"{workers}"), tokenizer="bytes", shard_tokens=3000, workers=workers)
    assert hashes(tmp_path / "1") == hashes(tmp_path / "2")
    assert len(hashes(tmp_path / "1")) > 5


def test_real_text_becomes_the_tokens_of_gpt2(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared("tiktoken_cache")))
    path = shared("data/textbooks/val-00.jsonl.gz")
    prepare(str(path), str(tmp_path / "d"), workers=1)
    tokenizer = load_tokenizer("gpt2")
    expected = []
    for line in gzip.decompress(path.read_bytes()).splitlines():
        expected += [*tokenizer.encode(json.loads(line)["text"]), tokenizer.eot_id]
    found = np.concatenate([all_tokens(tmp_path / "d", "val"), all_tokens(tmp_path / "d", "train")])
    assert found.tolist() == expected


@pytest.mark.parametrize(
    "suffix", [".jsonl", ".json", ".jsonl.gz", ".jsonl.bz2", ".jsonl.xz", ".jsonl.zst", ".parquet"]
)
def test_every_format_gives_the_same_documents(tmp_path, suffix):
    path, text = tmp_path / f"x{suffix}", "".join(json.dumps({"text": t}) + "\n" for t in DOCUMENTS)
    if suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"text": DOCUMENTS, "n": range(200)}), path, row_group_size=64)
    elif suffix == ".jsonl.zst":
        import pyarrow

        half = [pyarrow.compress(part.encode(), "zstd", asbytes=True) for part in (text[:999], text[999:])]
        path.write_bytes(b"".join(half))  # two frames, as pzstd writes them
    elif suffix == ".json":
        path.write_text(json.dumps([{"text": t} for t in DOCUMENTS]))
    else:
        compress = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}.get(path.suffix, bytes)
        path.write_bytes(compress(text.encode()))
    prepare(str(path), str(tmp_path / "d"), tokenizer="bytes", workers=1)
    assert texts_of(tmp_path / "d", "val") + texts_of(tmp_path / "d", "train") == DOCUMENTS


def test_a_text_file_is_one_document_whatever_the_pieces(tmp_path, monkeypatch):
    text = "".join(f"line {i}\n" + "\n" * (i % 3) for i in range(3000))
    (tmp_path / "x.txt").write_text(text)
    for size in 1000, 2**20:
        monkeypatch.setattr(data_pipeline, "CHUNK_BYTES", size)
        prepare(str(tmp_path / "x.txt"), str(tmp_path / f"{size}"), tokenizer="bytes", val_tokens=500, workers=1)
        tokens = np.concatenate([all_tokens(tmp_path / f"{size}", split) for split in ("val", "train")])
        assert bytes(tokens[:-1].tolist()).decode() == text
        assert tokens[-1] == 256
        assert len(all_tokens(tmp_path / f"{size}", "val")) == 500


def test_pieces_of_a_text_give_the_tokens_of_the_whole(monkeypatch, tmp_path):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared("tiktoken_cache")))
    monkeypatch.setattr(data_pipeline, "CHUNK_BYTES", 5000)
    path = shared("data/tinyshakespeare.txt")
    prepare(str(path), str(tmp_path / "d"), val_tokens=1000, workers=1)
    tokens = np.concatenate([all_tokens(tmp_path / "d", split) for split in ("val", "train")])
    assert tokens[:-1].tolist() == load_tokenizer("gpt2").encode(path.read_text(encoding="utf-8"))


def test_val_files_of_a_folder_and_val_source(tmp_path):
    write_jsonl(tmp_path / "train-0.jsonl", DOCUMENTS[:150])
    write_jsonl(tmp_path / "val-0.jsonl", DOCUMENTS[150:])
    prepare(str(tmp_path), str(tmp_path / "d"), tokenizer="bytes", workers=1)
    prepare(
        f"{tmp_path}/train-0.jsonl", str(tmp_path / "e"), tokenizer="bytes", val_source=f"{tmp_path}/val*", workers=1
    )
    for folder in tmp_path / "d", tmp_path / "e":
        assert texts_of(folder, "train") == DOCUMENTS[:150]
        assert texts_of(folder, "val") == DOCUMENTS[150:]


def test_globs_and_braces_find_their_files_in_order(tmp_path):
    for i in range(12):
        write_jsonl(tmp_path / f"part-{i:02}.jsonl", ["x"])
    assert [Path(f).name for f in find_files(f"{tmp_path}/part-{{08..10}}.jsonl")] == [
        "part-08.jsonl",
        "part-09.jsonl",
        "part-10.jsonl",
    ]
    assert len(find_files(f"{tmp_path}/part-0*.jsonl")) == 10
    assert [Path(f).name for f in find_files(f"{tmp_path}/part-0{{3,1}}.jsonl")] == ["part-03.jsonl", "part-01.jsonl"]


def test_a_hugging_face_id_is_the_files_behind_it(source, tmp_path, monkeypatch):
    import datasets

    files = {"train": [str(path) for path in sorted(source.iterdir())], "test": []}
    asked = []

    def builder(name: str, subset: str | None) -> Any:
        asked.append((name, subset))
        return types.SimpleNamespace(config=types.SimpleNamespace(data_files=files))

    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    prepare("me/corpus", str(tmp_path / "d"), subset="small", tokenizer="bytes", val_tokens=0, workers=1)
    assert asked == [("me/corpus", "small")]
    assert texts_of(tmp_path / "d", "train") == DOCUMENTS
    with pytest.raises(ValueError, match="has no split 'dev' in files, only train, test"):
        prepare("me/corpus", str(tmp_path / "e"), split="dev", tokenizer="bytes", workers=1)


def test_any_fsspec_url_is_a_source(tmp_path):
    import fsspec

    for i in range(2):
        opened: Any = fsspec.open(f"memory://corpus/{i}.jsonl", "w")
        with opened as file:
            file.write("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS[i * 100 : i * 100 + 100]))
    prepare("memory://corpus/*.jsonl", str(tmp_path / "d"), tokenizer="bytes", val_tokens=0, workers=1)
    assert texts_of(tmp_path / "d", "train") == DOCUMENTS


@pytest.mark.slow
def test_a_document_of_100_mb(tmp_path):
    text = "a line of a very long book\n" * 4_000_000
    write_jsonl(tmp_path / "x.jsonl", ["before", text, "after"])
    prepare(str(tmp_path / "x.jsonl"), str(tmp_path / "d"), tokenizer="bytes", val_tokens=1, workers=2)
    tokens = all_tokens(tmp_path / "d", "train")
    assert np.flatnonzero(tokens == 256).tolist() == [len(text), len(text) + 6]


def test_a_full_disk_is_one_line_and_the_run_goes_on_later(source, tmp_path, monkeypatch, capsys):
    options = {"tokenizer": "bytes", "shard_tokens": 5000, "val_tokens": 1000, "workers": 1}
    prepare(str(source), str(tmp_path / "whole"), **options)
    fsync, calls = os.fsync, itertools.count()

    def full(handle: int) -> None:
        if next(calls) == 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    arguments = [
        "prepare",
        f"--source={source}",
        f"--out_dir={tmp_path}/d",
        *(f"--{k}={v}" for k, v in options.items()),
    ]
    monkeypatch.setattr(sys, "argv", ["data_pipeline.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        data_pipeline.main()
    assert stop.value.code == 1
    assert re.search(r"cannot write .*/d/.*: No space left on device; mend that", capsys.readouterr().err)
    assert not list((tmp_path / "d").glob("*.partial"))
    assert not list((tmp_path / "d").glob(".*"))
    data_pipeline.main()
    assert hashes(tmp_path / "d") == hashes(tmp_path / "whole")


def test_faulty_records_are_counted_with_file_and_line(tmp_path, capsys):
    lines = [
        b'{"text": "one"}',
        b"{broken",
        b'{"other": 1}',
        b"",
        b'{"text": "  "}',
        b'{"text": "\xff"}',
        b'{"text": 5}',
    ]
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\n".join([*lines, b'{"text": "two"}', b'{"text": "three"}']))
    with pytest.raises(ValueError, match=r"x\.jsonl:2: .*--on_error=skip"):
        prepare(str(path), str(tmp_path / "d"), tokenizer="bytes", val_tokens=1, workers=1)
    assert not (tmp_path / "d").exists()
    prepare(str(path), str(tmp_path / "d"), tokenizer="bytes", val_tokens=1, on_error="skip", workers=1)
    assert texts_of(tmp_path / "d", "val") + texts_of(tmp_path / "d", "train") == ["one", "two", "three"]
    skipped = json.loads((tmp_path / "d" / "meta.json").read_text())["skipped"]
    assert (skipped["empty"], skipped["faulty"]) == (1, 4)
    assert [line.split(": ")[0].rpartition(":")[2] for line in skipped["first"]] == ["2", "3", "6", "7"]


def test_big_vocabularies_need_32_bits(tmp_path, monkeypatch):
    encoding = load_tokenizer("bytes")._encoding
    wide = type(encoding)(
        "wide", pat_str=r"(?s:.)", mergeable_ranks=encoding._mergeable_ranks, special_tokens={"<|endoftext|>": 70000}
    )
    monkeypatch.setattr(shards, "_bytes_encoding", lambda: wide)
    prepare(str(write_jsonl(tmp_path / "x.jsonl", DOCUMENTS)), str(tmp_path / "d"), tokenizer="bytes", workers=1)
    tokens = all_tokens(tmp_path / "d", "train")
    assert (tokens.dtype, tokens[-1]) == (np.uint32, 70000)
    assert Dataset(tmp_path / "d").tokenizer["vocab_size"] == 70001


def test_ids_pass_through_untouched(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared("tiktoken_cache")))
    path = write_jsonl(tmp_path / "x.jsonl", [[1, 2, 3], [], [4, 50256], [5]], key="ids")
    prepare(str(path), str(tmp_path / "d"), tokenizer="passthrough:gpt2", text_key="ids", val_tokens=1, workers=1)
    found = [*all_tokens(tmp_path / "d", "val"), *all_tokens(tmp_path / "d", "train")]
    assert found == [1, 2, 3, 50256, 4, 50256, 5, 50256]
    prepare(str(path), str(tmp_path / "e"), tokenizer="chunks:gpt2", text_key="ids", val_tokens=0, workers=1)
    assert all_tokens(tmp_path / "e", "train").tolist() == [1, 2, 3, 4, 50256, 5]


def test_sample_is_text_and_the_same_every_time(tmp_path, capsys):
    sample(str(tmp_path / "a"))
    sample(str(tmp_path / "b"))
    sample(str(tmp_path / "b"))  # again: nothing to do
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")
    meta = json.loads((tmp_path / "a" / "meta.json").read_text())
    assert 0.03 < meta["val"]["tokens"] / meta["train"]["tokens"] < 0.25
    assert not set(texts_of(tmp_path / "a", "val")) & set(texts_of(tmp_path / "a", "train"))
    assert "statement" in capsys.readouterr().out


# ---- Download


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hugging Face hub as hf_hub_download asks for."""

    files: ClassVar[dict[str, bytes]] = {}
    wrong: ClassVar[dict[str, list[bytes]]] = {}  # answers of a bad network, given first
    asked: ClassVar[list[str]] = []
    delay_s: ClassVar[float] = 0

    def do_HEAD(self) -> None:
        self.do_GET(body=False)

    def do_GET(self, body: bool = True) -> None:
        url = self.path.split("?")[0]
        if url == "/api/datasets/me/shards":
            siblings = [
                {
                    "rfilename": name,
                    "size": len(data),
                    "lfs": {"size": len(data), "sha256": sha256_of(data), "pointerSize": 9},
                }
                for name, data in self.files.items()
            ]
            return self.answer(json.dumps({"id": "me/shards", "sha": "c0ffee", "siblings": siblings}).encode(), body)
        if url == "/api/datasets/me/shards/revision/c0ffee":
            return self.answer(json.dumps({"id": "me/shards", "sha": "c0ffee", "siblings": []}).encode(), body)
        if url.startswith("/api/datasets/me/shards/tree/c0ffee"):
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": sha256_of(data)}
                for name, data in self.files.items()
            ]
            return self.answer(json.dumps(tree).encode(), body)
        name = url.rpartition("/")[2]
        if not url.startswith("/datasets/me/shards/resolve/c0ffee/") or name not in self.files:
            return self.send_error(404)
        data = self.files[name]
        headers = {"ETag": f'"{sha256_of(data)}"', "X-Repo-Commit": "c0ffee"}
        if body:
            self.asked.append(name)
            time.sleep(self.delay_s)
            data = self.wrong[name].pop() if self.wrong.get(name) else data
        self.answer(data, body, **headers)

    def answer(self, data: bytes, body: bool, **headers: str) -> None:
        self.send_response(200)
        for key, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            with contextlib.suppress(ConnectionError):  # of a killed client
                self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def sha256_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def hub():
    """A local server with one val and three train shards; (environment for the command, the handler)."""
    Hub.files, Hub.wrong, Hub.asked, Hub.delay_s = {}, {}, [], 0
    for i, name in enumerate(["val_000000", "train_000001", "train_000002", "train_000003"]):
        tokens = np.random.default_rng(i).integers(0, 50257, 40_000).astype("<u2")
        Hub.files[f"edu_{name}.bin"] = struct.pack("<256i", 20240520, 1, len(tokens), *[0] * 253) + tokens.tobytes()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    yield env | {"no_proxy": "127.0.0.1"}, Hub
    server.shutdown()


def test_download_is_what_the_hub_has(hub, tmp_path):
    env, server = hub
    options = ["download", "--repo=me/shards", "--num_shards=2", f"--out_dir={tmp_path}/d"]
    server.wrong["edu_train_000001.bin"] = [bytes(len(server.files["edu_train_000001.bin"]))]  # right size, wrong bytes
    code, _, error = cli(*options, HF_HOME=str(tmp_path / "hf"), **env)
    assert code == 0, error
    assert hashes(tmp_path / "d") == {
        "train_000000.bin": sha256_of(server.files["edu_train_000001.bin"]),
        "train_000001.bin": sha256_of(server.files["edu_train_000002.bin"]),
        "val_000000.bin": sha256_of(server.files["edu_val_000000.bin"]),
    }
    assert len(server.asked) == 4  # three shards, one of them twice
    assert sorted(path.name for path in (tmp_path / "d").iterdir() if path.suffix != ".bin") == ["meta.json"]
    (tmp_path / "d" / "train_000001.bin").unlink()
    assert cli(*options, HF_HOME=str(tmp_path / "hf"), **env)[0] == 0
    assert server.asked[4:] == ["edu_train_000002.bin"]  # what is there is not fetched again
    assert cli("verify", f"--out_dir={tmp_path}/d")[0] == 0
    assert TokenLoader({f"{tmp_path}/d": 1.0}, seq_len=16, batch_size=1, batch_sequences=1).tokens_per_epoch == 79_968


def test_download_of_rows_of_ids_as_the_seed_published_them(hub, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    env, server = hub
    rng, rows = np.random.default_rng(0), []
    server.files.clear()
    for part in range(2):
        ids = rng.integers(0, 50257, (300, 1025))
        table, sink = pyarrow.table({"input_ids": ids.tolist()}), pyarrow.BufferOutputStream()
        with pyarrow.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=100)
        server.files[f"data-{part:05}-of-00002.arrow"] = sink.getvalue().to_pybytes()
        rows.append(ids.ravel())
    env |= {"TIKTOKEN_CACHE_DIR": str(shared("tiktoken_cache")), "HF_HOME": str(tmp_path / "hf")}
    command = [
        sys.executable,
        str(ROOT / "data_pipeline.py"),
        "download",
        "--repo=me/shards",
        f"--out_dir={tmp_path}/d",
    ]
    subprocess.run(command, env=os.environ | env, check=True, timeout=60)
    found = np.concatenate([all_tokens(tmp_path / "d", split) for split in ("val", "train")])
    assert np.array_equal(found, np.concatenate(rows))


def test_training_follows_a_download(hub, tmp_path):
    """The order of a run that starts with the first shards is the order of a run that finds them all."""
    env, server = hub
    for i in range(4, 13):
        server.files[f"edu_train_{i:06}.bin"] = server.files["edu_train_000001.bin"][:1024] + (
            np.random.default_rng(i).integers(0, 50257, 40_000).astype("<u2").tobytes()
        )
    server.delay_s = 0.3
    folder = tmp_path / "d"
    options = ["download", "--repo=me/shards", "--num_shards=12", f"--out_dir={folder}"]
    process = Process(["data_pipeline.py", *options], **env)
    while not list(folder.glob("train_*")):
        time.sleep(0.02)
    common: dict[str, Any] = {"seq_len": 100, "batch_size": 50, "batch_sequences": 50}
    followed = TokenLoader({str(folder): 1.0}, **common)
    assert not (folder / "meta.json").exists()
    assert len(list(folder.glob("train_*"))) < 12
    batches = [followed.next()[0] for _ in range(2 * 12 * 399 // 50)]
    assert process.wait() == 0
    found = TokenLoader({str(folder): 1.0}, **common)
    found.load_state_dict(followed.state_dict() | {"sequences": 0})  # the fingerprint is the same
    assert all((found.next()[0] == batch).all() for batch in batches)
    rows = [tuple(row.tolist()) for batch in batches for row in batch]
    assert len(set(rows[: 12 * 399])) == 12 * 399  # each window once in the first epoch
    for loader in followed, found:
        loader.close()


def test_a_download_that_stopped_does_not_hang_the_training(hub, tmp_path):
    env, server = hub
    server.wrong["edu_train_000003.bin"] = [b""] * 100
    options = ["download", "--repo=me/shards", "--num_shards=3", f"--out_dir={tmp_path}/d"]
    process = Process(["data_pipeline.py", *options], **env)
    while len(list((tmp_path / "d").glob("train_*"))) < 2:
        time.sleep(0.02)
    process.kill()
    process.wait()
    loader = TokenLoader({f"{tmp_path}/d": 1.0}, seq_len=100, batch_size=50, batch_sequences=50)
    with pytest.raises(ValueError, match=r"train_000002\.bin is missing and nothing downloads it"):
        for _ in range(3 * 399 // 50):
            loader.next()
    loader.close()


def test_a_download_that_cannot_be_is_one_line_and_leaves_nothing(hub, tmp_path):
    env, _ = hub
    for option, message in [
        ("--num_shards=9", "has 3 train and 1 val shards"),
        ("--repo=me/nothing", "me/nothing: Client error '404"),
    ]:
        code, _, error = cli("download", "--repo=me/shards", option, f"--out_dir={tmp_path}/d", **env)
        assert (code, error.count("\n")) == (2, 1), error
        assert message in error
        assert not (tmp_path / "d").exists()


# ---- Decontaminate


def test_planted_items_are_found_and_removed(tmp_path, monkeypatch, capsys):
    """All of 500 real HellaSwag items, re-spaced, re-cased and cut across shards, and nothing of 1,000 documents."""
    items = [json.loads(line) for line in shared("data/hellaswag_val_2000.jsonl").read_text().splitlines()[::4]]
    files = [shared(f"data/textbooks/train-0{i}.jsonl.gz") for i in range(4)]
    lines = [line for file in files for line in gzip.decompress(file.read_bytes()).splitlines()]
    clean = [json.loads(line)["text"][:6000] for line in lines[:1000]]
    planted = [
        f"{clean[i][:300]}\n\n{item['ctx'].upper()}\n  {item['endings'][int(item['label'])]} -- {clean[-i][:300]}"
        for i, item in enumerate(items)
    ]
    mixed = [text for pair in itertools.zip_longest(clean, planted) for text in pair if text is not None]
    source = write_jsonl(tmp_path / "x.jsonl", mixed)
    write_jsonl(tmp_path / "val.jsonl", planted[:5])
    options = {"tokenizer": "bytes", "val_source": str(tmp_path / "val.jsonl"), "shard_tokens": 700_000}
    prepare(str(source), str(tmp_path / "d"), workers=1, **options)
    data_pipeline.decontaminate(
        str(tmp_path / "d"), against=str(shared("data/hellaswag_val_2000.jsonl")), write=str(tmp_path / "e"), workers=2
    )
    assert "500 of 1,500 training documents" in capsys.readouterr().out
    assert texts_of(tmp_path / "e", "train") == clean
    assert texts_of(tmp_path / "e", "val") == planted[:5]
    assert cli("verify", f"--out_dir={tmp_path}/e")[0] == 0


def test_decontaminate_says_what_it_needs(tmp_path):
    sample(str(tmp_path / "d"))
    (tmp_path / "x.jsonl").write_text('{"ctx": "a", "endings": ["b"], "label": "3"}')
    for option, message in [
        ("--against=nowhere.jsonl", "nowhere.jsonl: no such file"),
        (f"--against={tmp_path}/x.jsonl", "x.jsonl:1: not an evaluation item"),
        ("--ngram=3", "ngram=3 is below 8"),
    ]:
        code, _, error = cli("decontaminate", f"--out_dir={tmp_path}/d", option)
        assert (code, error.count("\n")) == (2, 1)
        assert message in error


# ---- Loader


def windows_of(folder: Path, seq_len: int) -> list[tuple[int, ...]]:
    shards = [llm_c_reader(path) for path in sorted(folder.glob("train_*.bin"))]
    starts = [(s, i) for s in shards for i in range(0, len(s) - seq_len, seq_len)]
    return sorted(tuple(s[i : i + seq_len + 1].tolist()) for s, i in starts)


def run_ranks(
    sources: dict[str, float], batches: int, world_size: int, batch_size: int, skip: int = 0, **options
) -> list:
    """Sequences in run order, as `world_size` loaders see them together."""
    common: dict[str, Any] = {
        "seq_len": 16,
        "batch_size": batch_size,
        "batch_sequences": 24,
        "world_size": world_size,
    } | options
    loaders = [TokenLoader(sources, rank=rank, **common) for rank in range(world_size)]
    rows: list[tuple[int, ...]] = []
    for loader in loaders:
        loader.load_state_dict({"sequences": skip, "fingerprint": loader.fingerprint})
    for _ in range(batches):
        for loader in loaders:
            inputs, targets = loader.next()
            assert inputs.dtype.is_floating_point is False
            assert inputs.is_contiguous()
            assert (inputs[:, 1:] == targets[:, :-1]).all()
            rows += [(*row.tolist(), int(last)) for row, last in zip(inputs, targets[:, -1])]
    for loader in loaders:
        loader.close()
    return rows


@pytest.fixture
def data(tmp_path) -> Path:
    """Three shards of unlike length, 61 windows of 16 + 1 tokens: a prime number, so nothing divides."""
    tokens = np.arange(1200) % 50000
    return write_dataset(tmp_path / "data", [tokens[:400], tokens[400:405], tokens[405:1000]], [tokens[1000:1200]])


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_window_once_per_epoch(data, world_size):
    loader = TokenLoader({str(data): 1.0}, seq_len=16, batch_size=1, batch_sequences=1)
    assert loader.tokens_per_epoch == 16 * 61
    rows = run_ranks({str(data): 1.0}, 3 * 61, world_size, 1)
    epochs = [rows[start : start + 61] for start in range(0, 3 * 61, 61)]
    assert all(sorted(epoch) == windows_of(data, 16) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_the_order_is_the_same_for_any_number_of_ranks(data):
    layouts = [(1, 24, 10), (2, 6, 20), (4, 2, 30), (1, 1, 240)]
    orders = [run_ranks({str(data): 1.0}, batches, world, size) for world, size, batches in layouts]
    assert all(order[:240] == orders[0] for order in orders)


def test_where_ranks_do_not_divide_the_batch_each_sequence_is_still_seen_once(data):
    """24 sequences in micro-batches of 4 on 4 ranks: two rounds, half of the second is filler of weight 0."""
    common: dict[str, Any] = {"seq_len": 16, "batch_sequences": 24, "batch_size": 4}
    whole = TokenLoader({str(data): 1.0}, **common)
    wanted = [row for _ in range(12) for row in whole.next()[0].tolist()]
    loaders = [TokenLoader({str(data): 1.0}, **common, rank=rank, world_size=4) for rank in range(4)]
    seen, weights = [], []
    for _ in range(2 * 2):
        for loader in loaders:
            rows = loader.next()[0].tolist()
            weights.append(loader.weight)
            seen += rows if loader.weight else []
    assert seen == wanted and weights == [4 / 3] * 6 + [0] * 2 + [4 / 3] * 6 + [0] * 2
    assert loaders[3].state_dict() == whole.state_dict()
    for loader in (whole, *loaders):
        loader.close()


def test_resuming_is_going_on(data):
    whole = run_ranks({str(data): 1.0}, 30, 2, 3)
    assert run_ranks({str(data): 1.0}, 20, 2, 3, skip=60) == whole[60:]
    loader = TokenLoader({str(data): 1.0}, seq_len=16, batch_size=3, batch_sequences=24, world_size=2)
    for _ in range(4):
        loader.next()
    assert loader.state_dict() == {"sequences": 24, "fingerprint": loader.fingerprint}
    ahead = {"sequences": 24 * 10**9, "fingerprint": loader.fingerprint}
    loader.load_state_dict(ahead)  # O(1): a run of 24 billion sequences goes on at once
    loader.next()
    loader.close()


def test_other_data_are_not_resumed(data, tmp_path):
    state = TokenLoader({str(data): 1.0}, seq_len=16, batch_size=1, batch_sequences=1).state_dict()
    with pytest.raises(ValueError, match="data changed"):
        TokenLoader({str(data): 1.0}, seq_len=16, batch_size=1, batch_sequences=1, seed=1).load_state_dict(state)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_mixtures_are_exact_in_every_block(tmp_path, world_size):
    a = write_dataset(tmp_path / "a", [np.zeros(400)])
    b = write_dataset(tmp_path / "b", [np.ones(9000)])
    rows = run_ranks({str(a): 0.7, str(b): 0.3}, 3 * 1024 // (8 * world_size), world_size, 8, batch_sequences=1024)
    counts = [sum(row[0] == 0 for row in rows[start : start + 1024]) for start in range(0, 3072, 1024)]
    assert counts == [717, 717, 717]  # 0.7 of 1024, by largest remainder
    assert len({tuple(row[0] for row in rows[s : s + 1024]) for s in (0, 1024)}) == 2


def test_stages_change_the_weights_at_a_step(tmp_path):
    a, b, c = (str(write_dataset(tmp_path / n, [np.full(3000, i)])) for i, n in enumerate("abc"))
    options = {"stages": f"2: {b}=1; 4: {a}=0.5,{c}=0.5", "batch_sequences": 1024, "batch_size": 256}
    rows = run_ranks({a: 0.75, b: 0.25, c: 0.0}, 24, 1, **options)
    counts = [[sum(row[0] == i for row in rows[s : s + 1024]) for i in range(3)] for s in range(0, 6 * 1024, 1024)]
    assert counts == [[768, 256, 0]] * 2 + [[0, 1024, 0]] * 2 + [[512, 0, 512]] * 2
    assert (
        run_ranks({a: 0.75, b: 0.25, c: 0.0}, 6, 2, skip=3 * 1024, **options | {"batch_size": 128})[:1536]
        == (rows[3 * 1024 : 3 * 1024 + 1536])
    )


def test_stages_that_make_no_sense():
    for stages in "x", "5: a=1; 5: a=1", "5: b=1", "5: a=-1", "5: a=0", "5: a=x", "0: a=1":
        with pytest.raises(ValueError, match=r"stages|sources"):
            shards.DataConfig(sources={"a": 1.0}, stages=stages)


def test_unique_tokens_are_the_first_ones_every_epoch(data):
    windows = [tuple(range(i, i + 17)) for i in range(0, 20 * 16, 16)]
    rows = run_ranks({str(data): 1.0}, 60, 1, 1, unique_tokens=20 * 16 + 5)
    epochs = [rows[i : i + 20] for i in (0, 20, 40)]
    assert all(sorted(epoch) == windows for epoch in epochs)
    assert epochs[0] != epochs[1]
    with pytest.raises(ValueError, match=r"unique_tokens=9,999 means 624 sequences.* has 61"):
        TokenLoader({str(data): 1.0}, seq_len=16, batch_size=1, batch_sequences=1, unique_tokens=9999)


def test_each_source_of_a_mixture_has_exact_epochs():
    order = Order([np.array([0, 61]), np.array([0, 7])], [(0, [0.8, 0.2])], seed=3)
    sources, windows = map(np.array, order.locate(0, 5000))
    for source, count in enumerate((61, 7)):
        dealt = windows[sources == source]
        epochs = dealt[: len(dealt) // count * count].reshape(-1, count)
        assert (np.sort(epochs, axis=1) == np.arange(count)).all()
    again = [np.concatenate(part) for part in zip(*(order.locate(p, 100) for p in range(0, 5000, 100)))]
    assert np.array_equal(sources, again[0])
    assert np.array_equal(windows, again[1])


@pytest.mark.parametrize("n", [1, 2, 3, 5, 64, 1000, 1025, 65537])
def test_a_permutation_deals_every_number_once(n):
    key = shards.key_of(1, 2, n)
    assert np.array_equal(np.sort(permute(np.arange(n), n, key)), np.arange(n))


def test_permutation_is_as_random_as_numpy():
    """Serial correlation of 20 keys over 10,000 numbers; an affine round function gives |z| up to 10."""
    scores = []
    for key in range(20):
        x = permute(np.arange(10_000), 10_000, shards.key_of(key)).astype(float)
        scores.append(np.corrcoef(x[:-1], x[1:])[0, 1] * 100)
    assert max(map(abs, scores)) < 4


def test_weight_zero_only_validates(data, tmp_path):
    other = write_dataset(tmp_path / "other", [np.full(100, 7)], [np.full(33, 9)])
    sources = {str(data): 1.0, str(other): 0.0}
    rows = run_ranks(sources, 61, 1, 1)
    assert sorted(rows) == windows_of(data, 16)
    inputs = [batch for batch, _ in validation_batches({str(other): 0.0}, seq_len=16, batch_size=1)]
    assert len(inputs) == 2


def test_tokens_outside_the_vocabulary_are_named(data):
    write_shard(data / "train_000000.bin", np.full(400, 60000, np.uint16))
    loader = TokenLoader({str(data): 1.0}, seq_len=16, batch_size=61, batch_sequences=61)
    for _ in range(2):  # and again
        with pytest.raises(ValueError, match=r"train_000000\.bin has token 60000, .*=50257"):
            loader.next()
    loader.close()


def test_a_smaller_model_is_refused(data):
    with pytest.raises(ValueError, match=r"50257 tokens.*vocab_size is 257"):
        TokenLoader({str(data): 1.0}, seq_len=16, batch_size=1, batch_sequences=1, vocab_size=257)


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 4), (2, 3), (4, 1), (1, 100)])
def test_validation_sees_every_token_once(data, world_size, batch_size):
    options = {"seq_len": 16, "batch_size": batch_size, "world_size": world_size}
    ranks = [list(validation_batches({str(data): 1.0}, rank=rank, **options)) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    targets = [t for batches in zip(*ranks) for _, batch in batches for t in batch.flatten().tolist() if t != -100]
    assert targets == list(range(1001, 1200))  # 12 windows and 7 tokens more: the last one is padded
    assert all(batch.shape == (batch_size, 16) for batches in ranks for pair in batches for batch in pair)


def test_validation_stops_at_max_tokens(data):
    batches = list(validation_batches({str(data): 1.0}, seq_len=16, batch_size=2, max_tokens=64))
    assert sum(int((targets != -100).sum()) for _, targets in batches) == 64


# ---- What is malformed: one line, exit code 2, nothing half-written


def corrupt_meta(folder: Path, **changes: Any) -> None:
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | changes))


def bad_shard(folder: Path, data: bytes | None) -> None:
    path = folder / "train_000000.bin"
    path.unlink() if data is None else path.write_bytes(data)


DAMAGE = {
    "missing shard": (lambda d: bad_shard(d, None), "train_000000.bin: missing"),
    "truncated shard": (lambda d: os.truncate(d / "train_000000.bin", 5000), "5,000 bytes"),
    "wrong magic": (lambda d: bad_shard(d, b"\x00" * 4096), "no llm.c header"),
    "empty shard": (lambda d: bad_shard(d, b""), "no llm.c header"),
    "shard of another dataset": (lambda d: write_shard(d / "train_000000.bin", np.zeros(9, np.uint16)), "9 uint16"),
    "32-bit shard": (lambda d: write_shard(d / "train_000000.bin", np.zeros(9, np.uint32)), "9 uint32"),
    "torn meta.json": (lambda d: (d / "meta.json").write_text('{"version"'), "meta.json is damaged"),
    "meta.json of something else": (lambda d: (d / "meta.json").write_text("[1, 2]"), "meta.json is damaged"),
    "no shards": (lambda d: corrupt_meta(d, shards=[]), "meta.json is damaged"),
    "escaping name": (
        lambda d: corrupt_meta(d, shards=[{"file": "../x.bin", "split": "train", "tokens": 5}]),
        "outside its folder",
    ),
    "no dataset": (lambda d: [path.unlink() for path in d.iterdir()], "no dataset in"),
    "incomplete": (lambda d: (d / "meta.json").rename(d / "progress.json"), "is incomplete: run the same prepare"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_dataset_is_named_in_one_line(tmp_path, case):
    sample(str(tmp_path / "d"))
    damage, message = DAMAGE[case]
    damage(tmp_path / "d")
    with pytest.raises(ValueError, match=message) as error:
        TokenLoader({str(tmp_path / "d"): 1.0}, seq_len=16, batch_size=1, batch_sequences=1)
    assert "\n" not in str(error.value)


BAD_SOURCES = {
    "empty file": (b"", "x.jsonl", "holds no text"),
    "blank documents": (b'{"text": ""}\n' * 3, "x.jsonl", "holds no text"),
    "one document for val only": (b'{"text": "a"}\n', "x.jsonl", "lower val_tokens"),
    "wrong key": (b'{"content": "a"}\n', "x.jsonl", "no 'text' here, only 'content'"),
    "not JSON": (b"hello\n", "x.jsonl", r"x\.jsonl:1: Expecting value"),
    "not UTF-8": (b"caf\xe9", "x.txt", "can't decode byte"),
    "cut gzip": (gzip.compress(b'{"text": "a"}\n' * 999)[:-9], "x.jsonl.gz", "damaged or cut off"),
    "not gzip": (b'{"text": "a"}\n', "x.jsonl.gz", "damaged or cut off"),
    "cut zst": (b"\x28\xb5\x2f\xfd\x04\x00", "x.jsonl.zst", "damaged or cut off"),
    "not parquet": (b"PAR1 or so", "x.parquet", "damaged or cut off"),
    "torn json": (b'[{"text": "a"}, ', "x.json", "damaged or cut off"),
    "unknown kind": (b"\x89PNG", "x.png", "cannot read this kind of file"),
    "absent": (None, "x.jsonl", "no such file"),
}


@pytest.mark.parametrize("case", BAD_SOURCES)
def test_a_source_that_cannot_be_read_is_named_and_leaves_nothing(tmp_path, case):
    content, name, message = BAD_SOURCES[case]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        prepare(str(tmp_path / name), str(tmp_path / "d"), tokenizer="bytes", workers=1)
    assert not (tmp_path / "d").exists()


def test_bad_options_are_one_line(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", DOCUMENTS)
    (tmp_path / "file").write_text("")
    source = f"--source={path}"
    for arguments, message in [
        (["prepare", source, "--shard_tokens=0"], "shard_tokens=0 must be at least 1"),
        (["prepare", source, "--shard-tokens=many"], "shard_tokens expects int, got 'many'"),
        (["prepare", source, "--tokeniser=gpt2"], "did you mean --tokenizer?"),
        (["prepare", source, "--tokenizer=gpt3", f"--out_dir={tmp_path}/d"], "unknown tokenizer 'gpt3'"),
        (["prepare", source, "--tokenizer=bytes", f"--out_dir={tmp_path}/file"], "is not a folder"),
        (["download", "--num_shards=0"], "num_shards=0"),
        (["info", f"--out_dir={tmp_path}/nowhere"], "no dataset in"),
        (["fetch"], "invalid choice"),
    ]:
        code, _, error = cli(*arguments)
        assert (code, error.count("\n")) == (2, 1), (arguments, error)
        assert message in error
        assert not (tmp_path / "d").exists()


def test_a_folder_has_one_writer_and_one_job(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", DOCUMENTS)
    common = {"source": str(path), "out_dir": str(tmp_path / "d"), "tokenizer": "bytes", "workers": 1}
    with shards.locked(tmp_path / "d"), pytest.raises(ValueError, match="another process is writing"):
        prepare(**common)
    prepare(**common)
    before = hashes(tmp_path / "d")
    prepare(**common)  # done already
    with pytest.raises(ValueError, match=r"holds another dataset .*shard_tokens: 100000000 -> 77"):
        prepare(**common, shard_tokens=77)
    assert hashes(tmp_path / "d") == before


def test_tokenizers_of_two_sources_must_agree(data, tmp_path):
    sample(str(tmp_path / "s"))
    with pytest.raises(ValueError, match=r"gpt2 .*bytes"):
        TokenLoader({str(data): 1.0, str(tmp_path / "s"): 1.0}, seq_len=16, batch_size=1, batch_sequences=1)


def test_weights_that_make_no_sense(data):
    for weights in {}, {str(data): -1.0}, {str(data): 0.0}, {str(data): 1.0, "other": 1e-9}:
        with pytest.raises(ValueError, match="sources"):
            shards.DataConfig(sources=weights)


def test_seq_len_longer_than_any_shard(data):
    with pytest.raises(ValueError, match=r"seq_len \+ 1 = 1001"):
        TokenLoader({str(data): 1.0}, seq_len=1000, batch_size=1, batch_sequences=1)


def test_no_val_shard_says_how_to_make_one(tmp_path):
    folder = write_dataset(tmp_path / "d", [np.zeros(100)])
    with pytest.raises(ValueError, match="--val_tokens"):
        validation_batches({str(folder): 1.0}, seq_len=16, batch_size=1)


def test_verify_lists_what_is_damaged(tmp_path):
    sample(str(tmp_path / "d"))
    assert cli("verify", f"--out_dir={tmp_path}/d")[0] == 0
    path = tmp_path / "d" / "train_000000.bin"
    flipped = bytearray(path.read_bytes())
    flipped[5000:5002] = b"\xff\xff"
    path.write_bytes(flipped)
    os.truncate(tmp_path / "d" / "val_000000.bin", 2000)
    (tmp_path / "d" / "stray.bin").write_bytes(b"")
    code, said, _ = cli("verify", f"--out_dir={tmp_path}/d")
    assert code == 1
    for text in "train_000000.bin: sha256", "token 65535", "val_000000.bin: 2,000 bytes", "stray.bin: not in meta":
        assert text.split(": ")[0] in said
        assert text.split(": ")[-1] in said


def test_info_obeys_no_escape_sequences(tmp_path, capsys):
    path = write_jsonl(tmp_path / "x.jsonl", ["\x1b[31mred\u202e", "\x1b[0m", "more"])
    prepare(str(path), str(tmp_path / "d"), tokenizer="bytes", val_tokens=0, workers=1)
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert r"\x1b[31mred\x202e" in out


def test_help_is_fast_and_complete():
    _, said, _ = cli("prepare", "--help")
    for option in ("out_dir", "source", "val_source", "text_key", "tokenizer", "shard_tokens", "val_tokens", "workers"):
        assert f"--{option} " in said
    assert "--num_shards" in cli("download", "--help")[1]
    loaded = subprocess.run(
        [sys.executable, "-X", "importtime", str(ROOT / "data_pipeline.py"), "--help"], capture_output=True, text=True
    )
    assert " torch" not in loaded.stderr
    assert " datasets" not in loaded.stderr


# ---- Nothing is lost when a run is killed


class Killed(BaseException):
    """As good as SIGKILL for a writer of files: nothing after it runs but `finally`."""


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("every", [4, 5, 7])
def test_prepare_killed_at_renames_ends_with_the_same_bytes(source, tmp_path, monkeypatch, when, every):
    monkeypatch.setattr(data_pipeline, "CHUNK_BYTES", 4000)
    options = {"tokenizer": "bytes", "shard_tokens": 600, "val_tokens": 2500, "workers": 1}
    prepare(str(source), str(tmp_path / "whole"), **options)
    replace, renames = os.replace, 0

    def deadly(old: Path, new: Path) -> None:
        nonlocal renames
        renames += 1
        if when == "after":
            replace(old, new)
        if renames % every == 0:
            raise Killed
        if when == "before":
            replace(old, new)

    monkeypatch.setattr(os, "replace", deadly)
    for _ in range(400):
        try:
            prepare(str(source), str(tmp_path / "killed"), **options)
            break
        except Killed:
            if not (tmp_path / "killed" / "meta.json").exists():
                with pytest.raises(ValueError, match=r"incomplete|no dataset"):
                    Dataset(tmp_path / "killed")
    assert renames > 70
    whole, killed = ({p.name: p.read_bytes() for p in (tmp_path / d).iterdir()} for d in ("whole", "killed"))
    assert killed == whole


def kill_20_times(command: list[str], folder: Path, env: dict[str, str]) -> list[dict[str, str]]:
    """SIGKILL `command` at random moments of its run until that struck 20 times, each time going on in the same folder.
    The shards and meta.json of every run that came to its end, the last one undisturbed."""
    environment, moments, kills, seconds, results = os.environ | env, random.Random(0), 0, 0.0, []
    started = time.monotonic()
    run = functools.partial(subprocess.run, [*command, f"--out_dir={folder}"], env=environment, capture_output=True)
    while True:
        assert run().returncode == 0
        results.append(hashes(folder) | {"meta.json": (folder / "meta.json").read_text()})
        seconds = seconds or time.monotonic() - started
        if kills >= 20:
            return results
        shutil.rmtree(folder)
        for _ in range(4):
            process = subprocess.Popen(
                run.args[0], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            time.sleep(moments.uniform(0.3, 0.9) * seconds)
            kills += process.poll() is None
            process.kill()
            process.wait()


@pytest.mark.slow
def test_prepare_survives_20_kills(tmp_path):
    for part in range(3):
        texts = [f"{part} {i} " + "some words and more of them " * (i % 97) for i in range(6000)]
        (tmp_path / f"{part}.jsonl.gz").write_bytes(
            gzip.compress("".join(json.dumps({"text": t}) + "\n" for t in texts).encode(), 1)
        )
    command = [sys.executable, str(ROOT / "data_pipeline.py"), "prepare", f"--source={tmp_path}/*.gz"]
    command += ["--tokenizer=bytes", "--shard_tokens=150_000", "--workers=2"]
    results = kill_20_times(command, tmp_path / "d", {})
    assert all(result == results[0] for result in results)


@pytest.mark.slow
def test_download_survives_20_kills(hub, tmp_path):
    env, server = hub
    server.delay_s = 0.1
    command = [sys.executable, str(ROOT / "data_pipeline.py"), "download", "--repo=me/shards", "--num_shards=40"]
    for i in range(3, 40):
        server.files[f"edu_train_{i + 1:06}.bin"] = server.files[f"edu_train_{i % 3 + 1:06}.bin"]
    results = kill_20_times(command, tmp_path / "d", env)
    assert all(result == results[0] for result in results)
    assert list(hashes(tmp_path / "d").values()) == [
        sha256_of(server.files[name]) for name in sorted(server.files, key=lambda name: ("val" in name, name))
    ]
    assert cli("verify", f"--out_dir={tmp_path}/d")[0] == 0
    assert sorted(path.name for path in (tmp_path / "d").iterdir() if path.suffix != ".bin") == ["meta.json"]


ODD_LINES = {
    "plain": b'{"text": "a\\n\\u00e9 \xc3\xa9"}',
    "lone surrogate": b'{"text": "a \\ud800 b"}',
    "NaN beside it": b'{"score": NaN, "text": "a"}',
    "large number": b'{"id": 123456789012345678901234567890, "text": "a"}',
    "key twice": b'{"text": "a", "text": "b"}',
    "invalid UTF-8": b'{"text": "caf\xe9"}',
    "byte order mark": b'\xef\xbb\xbf{"text": "a"}',
    "control character": b'{"text": "a\x01"}',
    "torn": b'{"text": "a',
    "nested": b'{"x": ' + b"[" * 1500 + b"]" * 1500 + b', "text": "a"}',
    "a list": b'["a"]',
}


@pytest.mark.parametrize("case", ODD_LINES)
def test_orjson_changes_neither_documents_nor_faults(case):
    pytest.importorskip("orjson", reason="prepare reads with json alone")
    with_orjson, without = data_pipeline.Encoder("bytes", "text"), data_pipeline.Encoder("bytes", "text")
    without.parse = json.loads
    chunk = data_pipeline.Chunk(0, 0, "lines", ODD_LINES[case], 0)
    (tokens, *counts), (expected, *expected_counts) = with_orjson(chunk), without(chunk)
    assert (tokens.tolist(), counts) == (expected.tolist(), expected_counts)
