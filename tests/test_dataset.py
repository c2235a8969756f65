"""nano416/dataset.py: shards written are shards read; a damaged dataset is one line."""

import hashlib
import json
import os
import shutil
import struct
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shards import llm_c_reader, write_dataset

from nano416 import tokenizer
from nano416.dataset import Sequences, TokenDataset, read_meta, read_shard, write_shard


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
    dataset = TokenDataset(tmp_path)
    assert dataset.tokenizer == tokenizer.GPT2
    assert np.array_equal(dataset.read(dataset.shards("train")[0]), tokens)
    assert dataset.shards("val")[0]["file"] == "fineweb_val_000000.bin"


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        write_shard(tmp_path / "x.bin", np.zeros(10, np.uint16))
    assert not list(tmp_path.iterdir())


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
def test_a_damaged_dataset_is_named_in_one_line(data, tmp_path, case):
    shutil.copytree(data, tmp_path / "d")
    damage, message = DAMAGE[case]
    damage(tmp_path / "d")
    with pytest.raises(ValueError, match=message) as error:
        TokenDataset(tmp_path / "d")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["train_000000.bin", "meta.json"])
@pytest.mark.parametrize("kind", ["FIFO", "folder", "device", "loop", "dangling link"])
def test_what_is_not_a_file_is_refused_at_once(data, tmp_path, name, kind):
    shutil.copytree(data, tmp_path / "d")
    path = tmp_path / "d" / name
    path.unlink()
    make = {
        "FIFO": lambda: os.mkfifo(path),
        "folder": path.mkdir,
        "device": lambda: path.symlink_to("/dev/zero"),
        "loop": lambda: path.symlink_to(path),
        "dangling link": lambda: path.symlink_to(tmp_path / "nowhere"),
    }
    make[kind]()
    errors = []

    def read() -> None:
        try:
            TokenDataset(tmp_path / "d")
        except ValueError as error:
            errors.append(str(error))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    assert len(errors) == 1 and name in errors[0] and "not a file" in errors[0]


# A key of meta.json, of its tokenizer or of its first shard -> values that it cannot have.
ODD_VALUES: dict[str, list[Any]] = {
    "tokenizer": [None, 5, "gpt2", [], {}],
    "tokenizer.name": [None, 5, []],
    "tokenizer.vocab_size": ["50257", 1.5, None, True, -1, 0, 10**30, 10**400, []],
    "tokenizer.eot_id": ["0", -1, 257, None, 1e300],
    "tokenizer.sha256": [None, 5],
    "shards": [None, {}, [], "train_000000.bin", [None], [5], [[]], [{}]],
    "shards.file": ["", ".", "..", "../x", "/etc/passwd", "a/b", "a\0b", "\ud800", "x" * 5000, None, 5, ["x"]],
    "shards.tokens": ["5", 1.0, -1, None, True, 2**31, 10**400, [], float("nan")],
    "shards.split": ["validation", None, 5, ["train"]],
    "shards.documents": ["5", [], 1.5],
    "shards.sha256": [5, []],
    "shards.origin": [5, {}],
}


@pytest.mark.parametrize("key", ODD_VALUES)
def test_a_meta_json_of_wrong_values_is_one_line(data, tmp_path, key):
    shutil.copytree(data, tmp_path / "d")
    for value in ODD_VALUES[key]:
        meta = json.loads((data / "meta.json").read_text())
        section, _, name = key.partition(".")
        target = meta["shards"][0] if section == "shards" and name else meta["tokenizer"] if name else meta
        target[name or section] = value
        (tmp_path / "d" / "meta.json").write_text(json.dumps(meta))
        with pytest.raises(ValueError, match=r"meta\.json is damaged") as error:
            TokenDataset(tmp_path / "d")
        assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_a_shard_that_is_listed_twice_is_refused(data, tmp_path):
    shutil.copytree(data, tmp_path / "d")
    meta = json.loads((data / "meta.json").read_text())
    corrupt_meta(tmp_path / "d", shards=[*meta["shards"], meta["shards"][0]])
    with pytest.raises(ValueError, match="twice"):
        TokenDataset(tmp_path / "d")


@pytest.mark.parametrize("content", [b"\xff", b"[" * 100_000, b"null", b"5", b'"x"', b"{}", b"1" * 5000])
@pytest.mark.parametrize("name", ["meta.json", "progress.json"])
def test_any_other_content_of_meta_json_is_one_line(content, name, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} is damaged|is incomplete") as error:
        read_meta(tmp_path)
    assert "\n" not in str(error.value)


def test_a_shard_of_more_tokens_than_its_header_can_count_is_refused_before_it_is_written(tmp_path):
    # A broadcast view takes no memory.
    tokens = np.broadcast_to(np.zeros(1, np.uint16), (2**31,))
    with pytest.raises(ValueError, match="2,147,483,648 tokens, a shard holds at most 2,147,483,647"):
        write_shard(tmp_path / "x.bin", tokens)
    assert not list(tmp_path.iterdir())


# ---- Shards that change while they are read --------------------------------------------------------------------------


def many_shards(folder: Path, count: int) -> Path:
    folder.mkdir()
    for number in range(count):
        write_shard(folder / f"train_{number:06d}.bin", np.arange(number, number + 33, dtype=np.uint16))
    return folder


def test_a_shard_that_is_cut_off_while_in_use_is_one_line(tmp_path):
    """With memory maps it ended the process with SIGBUS."""
    write_dataset(tmp_path / "d", [np.arange(50_000)])
    sequences = Sequences(TokenDataset(tmp_path / "d"), "train", seq_len=1000)
    before = sequences.read(40).tolist()
    os.truncate(tmp_path / "d" / "train_000000.bin", 5000)
    with pytest.raises(ValueError, match=r"train_000000\.bin, token 40,000: .*cut off while in use"):
        sequences.read(40)
    assert before == list(range(40_000, 41_001))
    assert sequences.read(0).tolist() == list(range(1001))


def test_few_shards_are_open_at_a_time(tmp_path):
    sequences = Sequences(TokenDataset(many_shards(tmp_path / "d", 100)), "train", 16, max_open_shards=3)
    order = np.random.default_rng(0).permutation(200).tolist()
    before = len(os.listdir("/proc/self/fd"))
    for index in order:
        shard, half = divmod(index, 2)
        assert sequences.read(index).tolist() == list(range(shard + 16 * half, shard + 16 * half + 17))
        assert len(os.listdir("/proc/self/fd")) <= before + 3
    del sequences
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_fraction_of_lost_tokens_is_that_of_the_ends_of_shards(tmp_path):
    write_dataset(tmp_path / "d", [np.zeros(500)] * 4)
    assert Sequences(TokenDataset(tmp_path / "d"), "train", 256).lost_frac == pytest.approx(1 - 256 / 500)
    assert Sequences(TokenDataset(tmp_path / "d"), "train", 499).lost_frac == pytest.approx(1 / 500)
    assert Sequences(TokenDataset(tmp_path / "d"), "val", 499).lost_frac == 0
