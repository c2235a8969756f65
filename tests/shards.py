"""Datasets for tests: how they are made, and how someone who knows only the format reads them."""

import hashlib
import json
import os
import random
import shutil
import struct
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline import PrepareConfig
from data_pipeline import prepare as prepare_command
from nano416.dataset import write_shard

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


def prepare(source: object, out_dir: object, **options: Any) -> None:
    """`data_pipeline.py prepare` in this process: with the byte tokenizer and without workers unless `options` differ."""
    prepare_command(PrepareConfig(str(source), str(out_dir), **{"tokenizer": "bytes", "workers": 1, **options}))


def kill_20_times(command: list[str], folder: Path, env: dict[str, str]) -> list[dict[str, str]]:
    """SIGKILL `command` at random moments until 20 kills hit it running, continuing in the same folder.

    Returns the checksums of the shards and the meta.json of every run that reached its end.
    """
    environment = os.environ | env
    command = [*command, f"--out_dir={folder}"]
    moments = random.Random(0)
    kills = 0
    duration_s = None
    results = []
    while True:
        started = time.monotonic()
        subprocess.run(command, env=environment, capture_output=True, check=True)
        duration_s = duration_s or time.monotonic() - started
        results.append({**hashes(folder), "meta.json": (folder / "meta.json").read_text()})
        if kills >= 20:
            return results
        shutil.rmtree(folder)
        for _ in range(4):
            process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            time.sleep(moments.uniform(0.3, 0.9) * duration_s)
            kills += process.poll() is None
            process.kill()
            process.wait()
