"""data_pipeline.py: every document once, the same shards for any number of workers and kills; bad input is one line."""

import bz2
import contextlib
import errno
import gzip
import itertools
import json
import lzma
import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken
from conftest import ROOT, shared
from processes import python
from shards import DOCUMENTS, all_tokens, hashes, kill_20_times, prepare, texts_of, write_jsonl

import data_pipeline
from data_pipeline import SampleConfig, sample
from nano416 import encode, files, text_files, tokenizer
from nano416.config import run_cli, run_subcommand
from nano416.dataset import TokenDataset
from nano416.sources import find_files
from nano416.tokenizer import load_tokenizer


def cli(*arguments: object, **env: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of data_pipeline.py."""
    return python("data_pipeline.py", *map(str, arguments), **env)


def run(*arguments: str) -> None:
    """data_pipeline.py in this process; errors are raised."""
    run_subcommand(data_pipeline.prepare, data_pipeline.download, data_pipeline.info, argv=arguments)


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
    prepare(source, tmp_path / "d", shard_tokens=5000, val_tokens=1000)
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
    monkeypatch.setattr(text_files, "CHUNK_BYTES", 1000)
    for workers in 1, 2:
        prepare(source, tmp_path / f"{workers}", shard_tokens=3000, workers=workers)
    assert hashes(tmp_path / "1") == hashes(tmp_path / "2")
    assert len(hashes(tmp_path / "1")) > 5


def test_real_text_becomes_the_tokens_of_gpt2(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared("tiktoken_cache")))
    path = shared("data/textbooks/val-00.jsonl.gz")
    prepare(path, tmp_path / "d", tokenizer="gpt2")
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
    prepare(path, tmp_path / "d")
    assert texts_of(tmp_path / "d", "val") + texts_of(tmp_path / "d", "train") == DOCUMENTS


def test_a_text_file_is_one_document_whatever_the_pieces(tmp_path, monkeypatch):
    text = "".join(f"line {i}\n" + "\n" * (i % 3) for i in range(3000))
    (tmp_path / "x.txt").write_text(text)
    for size in 1000, 2**20:
        monkeypatch.setattr(text_files, "CHUNK_BYTES", size)
        prepare(tmp_path / "x.txt", tmp_path / f"{size}", val_tokens=500)
        tokens = np.concatenate([all_tokens(tmp_path / f"{size}", split) for split in ("val", "train")])
        assert bytes(tokens[:-1].tolist()).decode() == text
        assert tokens[-1] == 256
        assert 250 <= len(all_tokens(tmp_path / f"{size}", "val")) <= 750
        assert (tmp_path / f"{size}/val_000000.bin").read_bytes()[-4:] == b"\n\0\n\0"


def test_pieces_of_a_text_give_the_tokens_of_the_whole(monkeypatch, tmp_path):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared("tiktoken_cache")))
    monkeypatch.setattr(text_files, "CHUNK_BYTES", 5000)
    path = shared("data/tinyshakespeare.txt")
    prepare(path, tmp_path / "d", tokenizer="gpt2", val_tokens=1000)
    tokens = np.concatenate([all_tokens(tmp_path / "d", split) for split in ("val", "train")])
    assert tokens[:-1].tolist() == load_tokenizer("gpt2").encode(path.read_text(encoding="utf-8"))


def paragraphs(n_lines: int) -> str:
    """A text of paragraphs of one to three lines, 23 bytes each."""
    return "".join(f"line {i:06} of the text\n" + "\n" * (i % 3 == 0) for i in range(n_lines))


@pytest.mark.parametrize("chunk_bytes", [1000, 2**20])
@pytest.mark.parametrize(
    ("sizes", "val_tokens", "whole_books", "cut"),
    [
        ([1000], None, 0, ("0.txt", "paragraphs")),
        ([1000, 1000], None, 0, ("0.txt", "paragraphs")),
        ([10, 1000, 10], 1000, 1, ("1.txt", "paragraphs")),
        ([40, 1000, 10], 1000, 1, None),
        ([20] * 30, None, 1, None),
        ([20] * 30, 1000, 3, None),
        ([100, 100], 1000, 1, None),
        ([100, 1000], 6000, 1, ("1.txt", "paragraphs")),
    ],
)
def test_books_validate_whole_or_are_cut_between_paragraphs(
    tmp_path, monkeypatch, capsys, chunk_bytes, sizes, val_tokens, whole_books, cut
):
    monkeypatch.setattr(text_files, "CHUNK_BYTES", chunk_bytes)
    (tmp_path / "books").mkdir()
    for number, n_lines in enumerate(sizes):
        (tmp_path / f"books/{number}.txt").write_text(paragraphs(n_lines))
    prepare(tmp_path / "books", tmp_path / "d", val_tokens=val_tokens)
    val, train = ("".join(map(chr, all_tokens(tmp_path / "d", split))).split("\u0100") for split in ("val", "train"))
    assert val[:-1] == [paragraphs(n_lines) for n_lines in sizes[:whole_books]]
    assert "\u0100".join(val) + "\u0100".join(train) == "".join(paragraphs(n_lines) + "\u0100" for n_lines in sizes)
    said = json.loads((tmp_path / "d/meta.json").read_text()).get("val_cut")
    if cut is None:
        assert (val[-1], said) == ("", None)
    else:
        wanted = val_tokens or sum(map(len, map(paragraphs, sizes))) // 100
        assert abs(len(all_tokens(tmp_path / "d", "val")) - wanted) <= max(100, wanted // 2)
        assert val[-1].endswith("\n\n") and train[0].startswith("line")
        assert all(word in said for word in cut)
        assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "place", "end"),
    [
        ("a line\n" * 3000, "at the end of a line", "\n"),
        ("one line " * 3000, "in the middle of a line", ""),
        ("猫" * 8000, "in the middle of a line", "猫"),
        ("a line\r\n" * 3 + "\r\n" + "b line\r\n" * 3000, "at the end of a line", "\r\n"),
        ("a\r\n\r\n" * 3000, "between two paragraphs", "\r\n\r\n"),
    ],
)
def test_a_text_without_paragraphs_is_cut_at_the_next_best_place(tmp_path, text, place, end):
    (tmp_path / "x.txt").write_bytes(text.encode())
    prepare(tmp_path / "x.txt", tmp_path / "d", val_tokens=6000)
    val = bytes(all_tokens(tmp_path / "d", "val").tolist())
    assert 3000 <= len(val) <= 9000
    assert val.decode().endswith(end)
    assert place in json.loads((tmp_path / "d/meta.json").read_text())["val_cut"]


def test_a_document_in_several_chunks_is_not_cut(tmp_path, monkeypatch):
    """Rows of ids are cut anywhere: the val split ends with a document, wherever the rows end."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared("tiktoken_cache")))
    monkeypatch.setattr(text_files, "CHUNK_BYTES", 400)
    stream = [50256 if i % 150 == 149 else i % 99 for i in range(3000)]
    path = write_jsonl(tmp_path / "x.jsonl", [stream[i : i + 10] for i in range(0, 3000, 10)], key="ids")
    prepare(path, tmp_path / "d", tokenizer="chunks:gpt2", text_key="ids", val_tokens=910)
    val = all_tokens(tmp_path / "d", "val").tolist()
    assert (len(val), val + all_tokens(tmp_path / "d", "train").tolist()) == (1050, stream)


def test_val_files_of_a_folder_and_val_source(tmp_path):
    write_jsonl(tmp_path / "train-0.jsonl", DOCUMENTS[:150])
    write_jsonl(tmp_path / "val-0.jsonl", DOCUMENTS[150:])
    prepare(tmp_path, tmp_path / "d")
    prepare(f"{tmp_path}/train-0.jsonl", tmp_path / "e", val_source=f"{tmp_path}/val*")
    for folder in tmp_path / "d", tmp_path / "e":
        assert texts_of(folder, "train") == DOCUMENTS[:150]
        assert texts_of(folder, "val") == DOCUMENTS[150:]


def test_globs_and_braces_find_their_files_in_order(tmp_path):
    for i in range(12):
        write_jsonl(tmp_path / f"part-{i:02}.jsonl", ["x"])
    assert [file.name for file in find_files(f"{tmp_path}/part-{{08..10}}.jsonl").files] == [
        "part-08.jsonl",
        "part-09.jsonl",
        "part-10.jsonl",
    ]
    assert len(find_files(f"{tmp_path}/part-0*.jsonl").files) == 10
    assert [file.name for file in find_files(f"{tmp_path}/part-0{{3,1}}.jsonl").files] == [
        "part-03.jsonl",
        "part-01.jsonl",
    ]


def test_a_hugging_face_id_is_the_files_behind_it(source, tmp_path, monkeypatch):
    import datasets

    files = {"train": [str(path) for path in sorted(source.iterdir())], "test": []}
    asked = []

    def builder(name: str, subset: str | None) -> Any:
        asked.append((name, subset))
        return types.SimpleNamespace(config=types.SimpleNamespace(data_files=files))

    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    prepare("me/corpus", tmp_path / "d", subset="small", val_tokens=0)
    assert asked == [("me/corpus", "small")]
    assert texts_of(tmp_path / "d", "train") == DOCUMENTS
    with pytest.raises(ValueError, match="has no split 'dev' in files, only train, test"):
        prepare("me/corpus", tmp_path / "e", split="dev")


def test_any_fsspec_url_is_a_source(tmp_path):
    import fsspec

    for i in range(2):
        opened: Any = fsspec.open(f"memory://corpus/{i}.jsonl", "w")
        with opened as file:
            file.write("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS[i * 100 : i * 100 + 100]))
    prepare("memory://corpus/*.jsonl", tmp_path / "d", val_tokens=0)
    assert texts_of(tmp_path / "d", "train") == DOCUMENTS


@pytest.mark.slow
def test_a_document_of_100_mb(tmp_path):
    text = "a line of a very long book\n" * 4_000_000
    write_jsonl(tmp_path / "x.jsonl", ["before", text, "after"])
    prepare(tmp_path / "x.jsonl", tmp_path / "d", val_tokens=1, workers=2)
    tokens = all_tokens(tmp_path / "d", "train")
    assert np.flatnonzero(tokens == 256).tolist() == [len(text), len(text) + 6]


def test_a_full_disk_is_one_line_and_the_same_command_continues_later(source, tmp_path, monkeypatch, capsys):
    options = {"shard_tokens": 5000, "val_tokens": 1000}
    prepare(source, tmp_path / "whole", **options)
    fsync, calls = os.fsync, itertools.count()

    def full(handle: int) -> None:
        if next(calls) == 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    arguments = ["prepare", f"--source={source}", f"--out_dir={tmp_path}/d", "--tokenizer=bytes", "--workers=1"]
    arguments += [f"--{name}={value}" for name, value in options.items()]
    with pytest.raises(SystemExit) as stop:
        run_cli(lambda: run(*arguments))
    assert stop.value.code == 1
    assert re.search(r"cannot write .*/d/.*: No space left on device", capsys.readouterr().err)
    assert not list((tmp_path / "d").glob(".*"))
    run(*arguments)
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
        prepare(path, tmp_path / "d", val_tokens=1)
    assert not (tmp_path / "d").exists()
    prepare(path, tmp_path / "d", val_tokens=1, on_error="skip")
    assert texts_of(tmp_path / "d", "val") + texts_of(tmp_path / "d", "train") == ["one", "two", "three"]
    skipped = json.loads((tmp_path / "d" / "meta.json").read_text())["skipped"]
    assert (skipped["empty"], skipped["faulty"]) == (1, 4)
    assert [line.split(": ")[0].rpartition(":")[2] for line in skipped["first"]] == ["2", "3", "6", "7"]


def test_big_vocabularies_need_32_bits(tmp_path, monkeypatch):
    ranks = {bytes([i]): i for i in range(256)}
    special = {"<|endoftext|>": 70000}
    wide = tiktoken.Encoding("wide", pat_str=r"(?s:.)", mergeable_ranks=ranks, special_tokens=special)
    monkeypatch.setattr(tokenizer, "_bytes_encoding", lambda: wide)
    prepare(write_jsonl(tmp_path / "x.jsonl", DOCUMENTS), tmp_path / "d")
    tokens = all_tokens(tmp_path / "d", "train")
    assert (tokens.dtype, tokens[-1]) == (np.uint32, 70000)
    assert TokenDataset(tmp_path / "d").tokenizer["vocab_size"] == 70001


def test_ids_pass_through_untouched(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared("tiktoken_cache")))
    path = write_jsonl(tmp_path / "x.jsonl", [[1, 2, 3], [], [4, 50256], [5]], key="ids")
    prepare(path, tmp_path / "d", tokenizer="passthrough:gpt2", text_key="ids", val_tokens=1)
    found = [*all_tokens(tmp_path / "d", "val"), *all_tokens(tmp_path / "d", "train")]
    assert found == [1, 2, 3, 50256, 4, 50256, 5, 50256]
    prepare(path, tmp_path / "e", tokenizer="chunks:gpt2", text_key="ids", val_tokens=0)
    assert all_tokens(tmp_path / "e", "train").tolist() == [1, 2, 3, 4, 50256, 5]


def test_sample_is_text_and_the_same_every_time(tmp_path, capsys):
    sample(SampleConfig(str(tmp_path / "a")))
    sample(SampleConfig(str(tmp_path / "b")))
    sample(SampleConfig(str(tmp_path / "b")))  # again: nothing to do
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")
    meta = json.loads((tmp_path / "a" / "meta.json").read_text())
    assert 0.03 < meta["val"]["tokens"] / meta["train"]["tokens"] < 0.25
    assert not set(texts_of(tmp_path / "a", "val")) & set(texts_of(tmp_path / "a", "train"))
    assert "statement" in capsys.readouterr().out


def test_the_fast_encoder_writes_the_same_shards(tmp_path, monkeypatch):
    pytest.importorskip("gigatoken")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared("tiktoken_cache")))
    source = shared("data/textbooks/val-00.jsonl.gz")
    for fast, package in (True, "gigatoken"), (False, "tiktoken"):
        prepare(source, tmp_path / f"{fast}", tokenizer="gpt2", fast=fast)
        meta = json.loads((tmp_path / f"{fast}" / "meta.json").read_text())
        assert meta["encoder"].split()[0] == package
    assert hashes(tmp_path / "True") == hashes(tmp_path / "False")


def test_a_fast_encoder_that_differs_is_not_used(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(encode, "fast_encoder", lambda *_: lambda text: np.frombuffer(text.encode()[::-1], np.uint8))
    prepare(write_jsonl(tmp_path / "x.jsonl", DOCUMENTS), tmp_path / "d", val_tokens=0)
    assert texts_of(tmp_path / "d", "train") == DOCUMENTS
    assert "disagree" in capsys.readouterr().err


# ---- Bad input


BAD_SOURCES = {
    "empty file": (b"", "x.jsonl", "holds no text"),
    "blank documents": (b'{"text": ""}\n' * 3, "x.jsonl", "holds no text"),
    "one document for val only": (b'{"text": "a"}\n', "x.jsonl", "all 2 tokens are for validation, lower val_tokens"),
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
        prepare(tmp_path / name, tmp_path / "d")
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("prepare --shard_tokens=0", "shard_tokens=0 must be at least 1"),
        ("prepare --workers=0", "workers=0 must be at least 1"),
        ("prepare --shard_tokens=1e18", "shard_tokens=1000000000000000000 must be at most 2147483647"),
        ("prepare --shard_tokens=2147483648", "shard_tokens=2147483648 must be at most 2147483647"),
        ("prepare --source= --out_dir={}/d --tokenizer=bytes", "source '' is empty"),
        ("prepare --source={}/x.jsonl --val_source= --out_dir={}/d --tokenizer=bytes", "source '' is empty"),
        ("prepare --source={}/x.jsonl --out_dir=", "out_dir is empty"),
        ("prepare --workers=1e6", "workers=1000000 must be at most"),
        (
            "prepare --source={}/x.jsonl --out_dir={}/d --tokenizer=bytes --val_tokens=1e18",
            "is more than the source holds",
        ),
        ("prepare --val_tokens=-1", "val_tokens=-1 must be at least 0"),
        ("prepare --val_tokens=1 --val_source=x", "val_source=x is used whole"),
        ("prepare --shard-tokens=many", "shard_tokens expects int, got 'many'"),
        ("prepare --tokeniser=gpt2", "did you mean --tokenizer?"),
        ("prepare --source={}/x.jsonl --out_dir={}/d --tokenizer=gpt3", "unknown tokenizer 'gpt3'"),
        ("prepare --source={}/x.jsonl --out_dir={}/d --tokenizer=ids:gpt2", "passthrough:gpt2 or chunks:gpt2"),
        ("prepare --source={}/x.jsonl --out_dir={}/x.jsonl --tokenizer=bytes", "is not a folder"),
        ("download --num_shards=0", "num_shards=0 must be at least 1"),
        ("info --out_dir={}/nowhere", "no dataset in"),
        ("fetch", "unknown command fetch"),
    ],
)
def test_bad_options_are_named(tmp_path, arguments, message):
    write_jsonl(tmp_path / "x.jsonl", DOCUMENTS)
    with pytest.raises(ValueError) as error:
        run(*(argument.format(tmp_path) for argument in arguments.split()))
    assert message in str(error.value)
    assert not (tmp_path / "d").exists()


def test_an_error_is_one_line_and_exit_code_2():
    code, _, error = cli("prepare", "--shard_tokens=0")
    assert (code, error) == (2, "data_pipeline.py: error: shard_tokens=0 must be at least 1\n")


def test_without_network_a_vocabulary_is_one_clear_line(tmp_path):
    blocked = {"https_proxy": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9"}
    source = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    arguments = ["prepare", f"--source={source}", f"--out_dir={tmp_path}/d"]
    code, _, error = cli(*arguments, TIKTOKEN_CACHE_DIR=str(tmp_path), **blocked)
    assert (code, error.count("\n")) == (2, 1)
    assert "TIKTOKEN_CACHE_DIR" in error
    assert not (tmp_path / "d").exists()


def test_a_folder_has_one_writer_and_one_job(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", DOCUMENTS)
    common = {"source": path, "out_dir": tmp_path / "d"}
    with files.locked(tmp_path / "d"), pytest.raises(ValueError, match="another process is writing"):
        prepare(**common)
    prepare(**common)
    before = hashes(tmp_path / "d")
    prepare(**common)  # done already
    with pytest.raises(ValueError, match=r"holds another dataset .*shard_tokens: 100000000 -> 77"):
        prepare(**common, shard_tokens=77)
    assert hashes(tmp_path / "d") == before


def test_verify_lists_what_is_damaged(tmp_path):
    sample(SampleConfig(str(tmp_path / "d")))
    assert cli("verify", f"--out_dir={tmp_path}/d")[0] == 0
    path = tmp_path / "d" / "train_000000.bin"
    flipped = bytearray(path.read_bytes())
    flipped[5000:5002] = b"\xff\xff"
    path.write_bytes(flipped)
    os.truncate(tmp_path / "d" / "val_000000.bin", 2000)
    (tmp_path / "d" / "stray.bin").write_bytes(b"")
    code, said, _ = cli("verify", f"--out_dir={tmp_path}/d")
    assert code == 1
    for pattern in (
        "train_000000.bin: sha256 is",
        "train_000000.bin: token 65535 with a vocabulary of 257",
        "val_000000.bin: 2,000 bytes",
        "stray.bin: not in meta.json",
        "2 shards, 4 faults",
    ):
        assert pattern in said


def test_info_obeys_no_escape_sequences(tmp_path, capsys):
    path = write_jsonl(tmp_path / "x.jsonl", ["\x1b[31mred\u202e", "\x1b[0m", "more"])
    prepare(path, tmp_path / "d", val_tokens=0)
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert r"\x1b[31mred\u202e" in out


def test_nothing_from_a_file_is_obeyed_by_the_terminal(tmp_path, capsys):
    (tmp_path / "s").mkdir()
    for name in ("a\x1b[2J\na lie.jsonl", "b\u202e.jsonl", "c\x9b1m.csv"):
        write_jsonl(tmp_path / "s" / name, ["one", "two"])
    prepare(tmp_path / "s", tmp_path / "d", val_tokens=1)
    meta = json.loads((tmp_path / "d/meta.json").read_text())
    (tmp_path / "d/meta.json").write_text(json.dumps({**meta, "source": "evil\x1b]0;title\x07\n  val 1 token"}))
    run("info", f"--out_dir={tmp_path}/d")
    (tmp_path / "d/\x1b[31m.bin").touch()
    with pytest.raises(SystemExit):
        data_pipeline.verify(data_pipeline.DatasetConfig(str(tmp_path / "d")))
    out = capsys.readouterr().out
    assert not set(out) & set("\x1b\x07\x9b\u202e")
    assert r"\x1b[2J\na lie.jsonl" in out and r"evil\x1b]0;title\x07\n" in out


def test_help_names_every_option_and_needs_neither_torch_nor_datasets():
    _, said, _ = cli("prepare", "--help")
    for option in ("out_dir", "source", "val_source", "text_key", "tokenizer", "shard_tokens", "val_tokens", "workers"):
        assert f"--{option} " in said
    assert "--num_shards" in cli("download", "--help")[1]
    loaded = subprocess.run(
        [sys.executable, "-X", "importtime", str(ROOT / "data_pipeline.py"), "--help"], capture_output=True, text=True
    )
    assert " torch" not in loaded.stderr
    assert " datasets" not in loaded.stderr


# ---- A killed run


class Killed(BaseException):
    """As good as SIGKILL for a writer of files: nothing after it runs but `finally`."""


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("every", [4, 5, 7])
def test_prepare_killed_at_renames_ends_with_the_same_bytes(source, tmp_path, monkeypatch, when, every):
    monkeypatch.setattr(text_files, "CHUNK_BYTES", 4000)
    options = {"shard_tokens": 600, "val_tokens": 2500}
    prepare(source, tmp_path / "whole", **options)
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
    (tmp_path / "killed").mkdir()
    # What SIGKILL leaves of a file that another process was writing.
    (tmp_path / "killed" / ".train_000000.bin.1.tmp").write_bytes(b"half a shard")
    for _ in range(400):
        try:
            prepare(source, tmp_path / "killed", **options)
            break
        except Killed:
            if not (tmp_path / "killed" / "meta.json").exists():
                with pytest.raises(ValueError, match=r"incomplete|no dataset"):
                    TokenDataset(tmp_path / "killed")
    assert renames > 70
    whole, killed = ({p.name: p.read_bytes() for p in (tmp_path / d).iterdir()} for d in ("whole", "killed"))
    assert killed == whole


BOOKS = {
    "one": ([200], None),
    "cut in the second": ([3, 400, 20], 1000),
    "whole ones": ([20] * 9, 700),
    "a long one": ([90, 90, 90], 2000),
    "long documents of one file": ([90, 90, 90], 2000),
}


@pytest.mark.parametrize("case", BOOKS)
def test_prepare_of_books_killed_at_renames_ends_with_the_same_bytes(tmp_path, monkeypatch, case):
    sizes, val_tokens = BOOKS[case]
    monkeypatch.setattr(text_files, "CHUNK_BYTES", 1500)
    # The device's own speed is not the question here.
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    (tmp_path / "books").mkdir()
    if case == "long documents of one file":
        write_jsonl(tmp_path / "books/x.jsonl", list(map(paragraphs, sizes)))
    else:
        for number, n_lines in enumerate(sizes):
            (tmp_path / f"books/{number}.txt").write_text(paragraphs(n_lines))
    options = {"shard_tokens": 170, "val_tokens": val_tokens}
    prepare(tmp_path / "books", tmp_path / "whole", **options)
    replace, renames = os.replace, itertools.count(1)

    def deadly(old: Path, new: Path) -> None:
        replace(old, new)
        if next(renames) % 5 == 0:
            raise Killed

    monkeypatch.setattr(os, "replace", deadly)
    for _ in range(400):
        with contextlib.suppress(Killed):
            prepare(tmp_path / "books", tmp_path / "killed", **options)
            break
    whole, killed = ({p.name: p.read_bytes() for p in (tmp_path / d).iterdir()} for d in ("whole", "killed"))
    assert killed == whole


def interrupted(source: Path, folder: Path, monkeypatch, **options: Any) -> None:
    """prepare that is killed after some shards."""
    with monkeypatch.context() as patch:
        replace, renames = os.replace, itertools.count(1)

        def deadly(old: Path, new: Path) -> None:
            replace(old, new)
            if next(renames) == 8:
                raise Killed

        patch.setattr(os, "replace", deadly)
        with pytest.raises(Killed):
            prepare(source, folder, **options)


def test_a_source_replaced_by_another_text_of_its_size_is_noticed(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "x.jsonl", DOCUMENTS)
    text = path.read_text()
    options = {"shard_tokens": 1000, "val_tokens": 1500}
    interrupted(path, tmp_path / "d", monkeypatch, **options)
    path.write_text(text.replace("word", "text"))
    with pytest.raises(ValueError, match=r"x\.jsonl has changed since this run began; delete .*/d to start over"):
        prepare(path, tmp_path / "d", **options)
    # A copy is the same text, whatever its time.
    path.unlink()
    path.write_text(text)
    os.utime(path, (0, 0))
    prepare(path, tmp_path / "d", **options)
    assert texts_of(tmp_path / "d", "val") + texts_of(tmp_path / "d", "train") == DOCUMENTS


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_signal_is_one_line_and_leaves_no_worker(tmp_path, number, exit_code, workers):
    source = tmp_path / "x.txt"
    source.write_text(paragraphs(250_000))
    options = [f"--source={source}", f"--out_dir={tmp_path}/d", "--tokenizer=bytes", "--shard_tokens=100K"]
    # In a session of its own, as behind a terminal, whose Ctrl-C reaches all of its processes.
    command = [sys.executable, str(ROOT / "data_pipeline.py"), "prepare", *options, f"--workers={workers}"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not (tmp_path / "d/train_000003.bin").exists():
        time.sleep(0.01)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    error = process.communicate(timeout=60)[1]
    name = signal.Signals(number).name
    assert error.strip() == f"data_pipeline.py: stopped by {name}; run the same command again to continue"
    assert process.returncode == exit_code
    # The process that multiprocessing keeps for its semaphores ends a moment later.
    deadline = time.monotonic() + 10
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(process.pid, 0)
            time.sleep(0.1)
    assert not (tmp_path / "d/meta.json").exists()
    assert cli("prepare", *options, "--workers=1")[0] == 0
    prepare(source, tmp_path / "whole", shard_tokens=100_000)
    assert hashes(tmp_path / "d") == hashes(tmp_path / "whole")


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
    options = encode.EncoderOptions("bytes", "text")
    with_orjson, without = encode.Encoder(options), encode.Encoder(options)
    without.parse_json = json.loads
    chunk = text_files.Chunk(0, 0, "json", [ODD_LINES[case]])
    (tokens, *counts), (expected, *expected_counts) = with_orjson(chunk), without(chunk)
    assert (tokens.tolist(), counts) == (expected.tolist(), expected_counts)
