"""nano416/dataset.py: shards written are shards read; a damaged dataset is one line."""

import hashlib
import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shards import llm_c_reader

from nano416 import tokenizer
from nano416.dataset import TokenDataset, read_shard, write_shard


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
