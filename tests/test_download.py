"""data_pipeline.py download: what the Hub has, resumable, and training may begin with the first shards."""

import contextlib
import hashlib
import http.server
import json
import signal
import struct
import sys
import threading
import time
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from conftest import ROOT, changed, shared
from processes import Process, python
from shards import all_tokens, hashes, kill_20_times

from nano416.dataloader import BatchLayout, DataConfig, Mixture, TokenLoader


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hugging Face Hub as the client asks for."""

    files: ClassVar[dict[str, bytes]] = {}
    wrong: ClassVar[dict[str, list[bytes]]] = {}  # answers of a bad network, given first
    unavailable: ClassVar[dict[str, int]] = {}  # how many times a file is answered with 503
    announced_bytes: ClassVar[dict[str, int]] = {}  # sizes in the listing that are not the file's
    asked: ClassVar[list[str]] = []
    delay_s: ClassVar[float] = 0

    def do_HEAD(self) -> None:
        self.do_GET(body=False)

    def do_GET(self, body: bool = True) -> None:
        url = self.path.split("?")[0]
        if url == "/api/datasets/me/shards":
            siblings = []
            for name, data in self.files.items():
                lfs = {"size": len(data), "sha256": sha256_of(data), "pointerSize": 9}
                size = self.announced_bytes.get(name, len(data))
                siblings.append({"rfilename": name, "size": size, "lfs": lfs})
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
        if body and self.unavailable.get(name):
            self.unavailable[name] -= 1
            return self.send_error(503)
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


def shard_of_random_tokens(seed: int, n_tokens: int = 40_000) -> bytes:
    tokens = np.random.default_rng(seed).integers(0, 50257, n_tokens).astype("<u2")
    return struct.pack("<256i", 20240520, 1, n_tokens, *[0] * 253) + tokens.tobytes()


@pytest.fixture
def hub(tmp_path):
    """A local server with one val and three train shards; (environment for the command, its handler)."""
    Hub.files, Hub.wrong, Hub.unavailable, Hub.announced_bytes, Hub.asked, Hub.delay_s = {}, {}, {}, {}, [], 0
    for i, name in enumerate(["val_000000", "train_000001", "train_000002", "train_000003"]):
        Hub.files[f"edu_{name}.bin"] = shard_of_random_tokens(i)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    yield env | {"no_proxy": "127.0.0.1", "HF_HOME": str(tmp_path / "hf")}, Hub
    server.shutdown()


def download(hub_env: dict[str, str], folder: Path, *options: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command."""
    return python(
        "data_pipeline.py", "download", *changed(["--repo=me/shards", f"--out_dir={folder}"], *options), **hub_env
    )


def open_loader(folder: Path) -> TokenLoader:
    mixture = Mixture(DataConfig({str(folder): 1.0}), seq_len=100)
    return TokenLoader(mixture, BatchLayout(batch_sequences=50, batch_size=50))


def test_a_download_is_what_the_hub_has(hub, tmp_path):
    env, server = hub
    folder = tmp_path / "d"
    server.wrong["edu_train_000001.bin"] = [bytes(len(server.files["edu_train_000001.bin"]))]  # right size, wrong bytes
    code, _, error = download(env, folder, "--num_shards=2")
    assert code == 0, error
    assert hashes(folder) == {
        "train_000000.bin": sha256_of(server.files["edu_train_000001.bin"]),
        "train_000001.bin": sha256_of(server.files["edu_train_000002.bin"]),
        "val_000000.bin": sha256_of(server.files["edu_val_000000.bin"]),
    }
    assert len(server.asked) == 4  # three shards, one of them twice
    assert sorted(path.name for path in folder.iterdir() if path.suffix != ".bin") == ["meta.json"]
    (folder / "train_000001.bin").unlink()
    assert download(env, folder, "--num_shards=2")[0] == 0
    assert server.asked[4:] == ["edu_train_000002.bin"]  # what is there is not fetched again
    assert python("data_pipeline.py", "verify", f"--out_dir={folder}")[0] == 0
    assert open_loader(folder).mixture.tokens_per_epoch == 2 * 399 * 100


def test_the_shards_that_training_starts_with_are_fetched_first(hub, tmp_path):
    env, server = hub
    for i in range(4, 9):
        server.files[f"edu_train_{i:06}.bin"] = shard_of_random_tokens(i)
    server.delay_s = 0.3
    assert download(env, tmp_path / "d", "--num_shards=8")[0] == 0
    first_four = {"edu_val_000000.bin", *(f"edu_train_{i:06}.bin" for i in (1, 2, 3))}
    assert set(server.asked[:4]) == first_four


def test_a_server_error_is_tried_again(hub, tmp_path):
    env, server = hub
    server.unavailable["edu_train_000001.bin"] = 1
    code, _, error = download(env, tmp_path / "d", "--num_shards=1")
    assert code == 0, error


def test_rows_of_token_ids_are_prepared(hub, tmp_path):
    """As the original 416M recipe published its tokens: Arrow files of rows of 1,025 ids."""
    pyarrow = pytest.importorskip("pyarrow")
    env, server = hub
    rng = np.random.default_rng(0)
    rows = []
    server.files.clear()
    for part in range(2):
        ids = rng.integers(0, 50257, (300, 1025))
        table = pyarrow.table({"input_ids": ids.tolist()})
        sink = pyarrow.BufferOutputStream()
        with pyarrow.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=100)
        server.files[f"data-{part:05}-of-00002.arrow"] = sink.getvalue().to_pybytes()
        rows.append(ids.ravel())
    env |= {"TIKTOKEN_CACHE_DIR": str(shared("tiktoken_cache"))}
    code, _, error = download(env, tmp_path / "d")
    assert code == 0, error
    tokens = np.concatenate([all_tokens(tmp_path / "d", split) for split in ("val", "train")])
    assert np.array_equal(tokens, np.concatenate(rows))


def test_training_follows_a_download(hub, tmp_path):
    """The order of a run that starts with the first shards is the order of a run that finds them all."""
    env, server = hub
    for i in range(4, 13):
        server.files[f"edu_train_{i:06}.bin"] = shard_of_random_tokens(i)
    server.delay_s = 0.3
    folder = tmp_path / "d"
    options = ["download", "--repo=me/shards", "--num_shards=12", f"--out_dir={folder}"]
    process = Process(["data_pipeline.py", *options], **env)
    while not list(folder.glob("train_*")):
        time.sleep(0.02)
    following = open_loader(folder)
    assert not (folder / "meta.json").exists()
    assert len(list(folder.glob("train_*"))) < 12
    batches = [following.next_batch().tokens for _ in range(2 * 12 * 399 // 50)]
    process.communicate(timeout=60)
    assert process.returncode == 0
    complete = open_loader(folder)
    complete.load_state_dict(following.state_dict() | {"sequences": 0})  # the fingerprint is the same
    assert all((complete.next_batch().tokens == batch).all() for batch in batches)
    rows = [tuple(row.tolist()) for batch in batches for row in batch]
    assert len(set(rows[: 12 * 399])) == 12 * 399  # each sequence once in the first epoch
    for loader in following, complete:
        loader.close()


def test_training_does_not_wait_for_a_download_that_stopped(hub, tmp_path):
    env, server = hub
    server.wrong["edu_train_000003.bin"] = [b""] * 100
    options = ["download", "--repo=me/shards", "--num_shards=3", f"--out_dir={tmp_path}/d"]
    process = Process(["data_pipeline.py", *options], **env)
    while len(list((tmp_path / "d").glob("train_*"))) < 2:
        time.sleep(0.02)
    process.kill()
    process.communicate()
    loader = open_loader(tmp_path / "d")
    with pytest.raises(ValueError, match=r"train_000002\.bin is missing and nothing downloads it"):
        for _ in range(3 * 399 // 50):
            loader.next_batch()
    loader.close()


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_is_one_line_at_once_and_the_download_continues(hub, tmp_path, number, exit_code):
    env, server = hub
    server.delay_s = 2
    options = ["download", "--repo=me/shards", "--num_shards=3", f"--out_dir={tmp_path}/d"]
    process = Process(["data_pipeline.py", *options], **env)
    while not server.asked:
        time.sleep(0.02)
    started = time.monotonic()
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert time.monotonic() - started < 1.5
    name = signal.Signals(number).name
    assert error.strip() == f"data_pipeline.py: stopped by {name}; run the same command again to continue"
    assert process.returncode == exit_code
    server.delay_s = 0
    assert download(env, tmp_path / "d", "--num_shards=3")[0] == 0
    assert len(hashes(tmp_path / "d")) == 4


def test_a_repository_without_tokens_is_refused(hub, tmp_path):
    env, server = hub
    server.files.clear()
    server.files["README.md"] = b"# Nothing"
    code, _, error = download(env, tmp_path / "d")
    assert (code, error.count("\n")) == (2, 1), error
    assert "me/shards holds neither llm.c shards (.bin) nor rows of token ids (.arrow, .parquet)" in error
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--num_shards=9", "has 3 train and 1 val shards"),
        ("--repo=me/nothing", "me/nothing: the Hub says 404"),
        ("--repo=a/b/c", "'a/b/c' is not the name of a Hub repository; write USER/NAME"),
    ],
)
def test_a_download_that_is_refused_is_one_line_and_leaves_nothing(hub, tmp_path, option, message):
    env, _ = hub
    code, _, error = download(env, tmp_path / "d", option)
    assert (code, error.count("\n")) == (2, 1), error
    assert message in error
    assert not (tmp_path / "d").exists()


def test_a_hub_that_cannot_be_reached_is_one_line_and_leaves_nothing(tmp_path):
    code, _, error = download({"HF_HUB_OFFLINE": "1"}, tmp_path / "d")
    assert (code, error.count("\n")) == (1, 1), error
    assert "me/shards: the Hub cannot be reached" in error
    assert not (tmp_path / "d").exists()


def test_a_full_disk_is_said_before_the_first_byte(hub, tmp_path, monkeypatch):
    env, server = hub
    name = "edu_train_000001.bin"
    server.announced_bytes[name] = 10**18
    code, _, error = download(env, tmp_path / "d", "--num_shards=1")
    assert code == 1 and "me/shards needs 1000000000.0 GB" in error
    assert not server.asked and not (tmp_path / "d").exists()


@pytest.mark.slow
def test_a_download_survives_20_kills(hub, tmp_path):
    env, server = hub
    server.delay_s = 0.1
    for i in range(4, 41):
        server.files[f"edu_train_{i:06}.bin"] = server.files[f"edu_train_{i % 3 + 1:06}.bin"]
    command = [sys.executable, str(ROOT / "data_pipeline.py"), "download", "--repo=me/shards", "--num_shards=40"]
    results = kill_20_times(command, tmp_path / "d", env)
    assert all(result == results[0] for result in results)
    assert list(hashes(tmp_path / "d").values()) == [
        sha256_of(server.files[name]) for name in sorted(server.files, key=lambda name: ("val" in name, name))
    ]
    assert python("data_pipeline.py", "verify", f"--out_dir={tmp_path}/d")[0] == 0
    assert sorted(path.name for path in (tmp_path / "d").iterdir() if path.suffix != ".bin") == ["meta.json"]
