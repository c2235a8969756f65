"""Faults that need a real process, disk or signal: a dying rank, a silent one, a full file system, missing files."""

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from processes import free_port, python, start_ranks
from test_fault_tolerance import LONG, begin, command, undisturbed, wait_for_step  # noqa: F401  # the fixture
from test_training import losses, run, same_weights

import data_pipeline
from nano416 import checkpoint, distributed, files, metrics

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("no_plots")]


def children(process: subprocess.Popen) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    return sorted(map(int, found.stdout.split()))


def torchrun(data: Path, run_dir: Path, processes: int, *extra: str, **env: str) -> subprocess.Popen:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    if env:
        launcher.append("--max_restarts=2")
    started = [*launcher, *command(data, run_dir, *extra)]
    return subprocess.Popen(
        started, cwd=ROOT, env=os.environ | env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_run_and_what_goes_on_is_the_same_to_the_last_bit(data, tmp_path):
    process = torchrun(data, tmp_path / "run", 4, "--save_interval=0.1")
    wait_for_step(process.stdout, 4)
    os.kill(children(process)[1], signal.SIGKILL)
    _, error = process.communicate(timeout=90)
    assert process.returncode != 0 and "SIGKILL" in error
    for run_dir in ("run", "undisturbed"):
        process = torchrun(data, tmp_path / run_dir, 4)
        _, error = process.communicate(timeout=90)
        assert process.returncode == 0, error
    assert losses(tmp_path / "run") == losses(tmp_path / "undisturbed")
    assert same_weights(tmp_path / "run", tmp_path / "undisturbed", 40, 40)


@pytest.mark.slow
def test_a_rank_that_hangs_is_named_within_the_timeout(data, tmp_path):
    process = torchrun(data, tmp_path, 2, "--timeout=5", "--max_steps=100000")
    wait_for_step(process.stdout, 4)
    rank_1, started = children(process)[1], time.monotonic()
    os.kill(rank_1, signal.SIGSTOP)
    try:
        while process.poll() is None and time.monotonic() - started < 60:
            time.sleep(0.2)
            if time.monotonic() - started > 25:  # torchrun ends the stopped rank with SIGTERM, which waits for it
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rank_1, signal.SIGCONT)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode != 0 and "rank 1 does not answer" in error, error[-3000:]


@pytest.mark.slow
def test_torchrun_restarts_from_the_newest_checkpoint_by_itself(data, tmp_path, undisturbed):  # noqa: F811
    process = torchrun(data, tmp_path, 2, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    wait_for_step(process.stdout, 8)
    os.kill(children(process)[0], signal.SIGKILL)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0 and "resumed" in out, error[-3000:]
    assert losses(tmp_path) == pytest.approx(losses(undisturbed), abs=1e-5)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1.2 MB, where the machine lets us mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1200k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_file_system_costs_checkpoints_not_the_run(data, small_disk, capsys):
    process = begin(data, small_disk / "run", "--checkpoint_every=10")  # 0.45 MB each: the third does not fit
    out, error = process.communicate(timeout=90)
    assert process.returncode == 1 and "No space left on device" in out and "the last checkpoint is missing" in error
    assert "Traceback" not in error
    names = sorted(path.name for path in (small_disk / "run").glob("*.pt"))
    assert names == ["checkpoint_step_10.pt", "checkpoint_step_20.pt"]
    assert all(checkpoint.read(small_disk / "run" / name) for name in names)
    assert not list((small_disk / "run").glob(".*.tmp"))
    assert len(losses(small_disk / "run")) == 40, "training itself went on to its end"


def test_preparing_on_a_full_file_system_is_one_line(small_disk, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("All work and no play makes Jack a dull boy.\n" * 60_000)
    options = [f"--source={text}", "--tokenizer=bytes", f"--out_dir={small_disk}/data", "--shard_tokens=200000"]
    started = [sys.executable, "data_pipeline.py", "prepare", *options]
    done = subprocess.run(started, cwd=ROOT, capture_output=True, text=True, timeout=90)
    assert done.returncode == 1 and "No space left" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (small_disk / "data/meta.json").exists() and not list((small_disk / "data").glob("*.tmp"))


def test_a_damaged_newest_checkpoint_is_passed_over(data, tmp_path, undisturbed, capsys):  # noqa: F811
    shutil.copytree(undisturbed, tmp_path / "run")
    newest = tmp_path / "run/checkpoint_step_40.pt"
    raw = bytearray(newest.read_bytes())
    raw[len(raw) // 2] ^= 1
    newest.write_bytes(raw)
    run(data, tmp_path / "run", *LONG)
    out = capsys.readouterr().out
    assert "passed over" in out and "checkpoint_step_40.pt" in out and "at step 38" in out
    assert losses(tmp_path / "run") == losses(undisturbed) and checkpoint.read(newest)


def test_a_clock_that_jumps_changes_nothing(data, tmp_path, undisturbed, monkeypatch):  # noqa: F811
    jumps = iter([0, 1e9, -1e9] * 100_000)
    monkeypatch.setattr(time, "time", lambda: 1.7e9 + next(jumps))
    rows = run(data, tmp_path, *LONG, "--time_limit=10m")
    assert losses(tmp_path) == losses(undisturbed) and all(row.get("tokens_per_s", 1) > 0 for row in rows)


@pytest.mark.parametrize("position", range(0, 20_000, 4_000))
def test_verify_finds_a_flipped_bit_anywhere_in_a_shard(tmp_path, position):
    data_pipeline.sample(data_pipeline.SampleConfig(str(tmp_path / "data")))
    shard = tmp_path / "data/val_000000.bin"
    raw = bytearray(shard.read_bytes())
    raw[1024 + position] ^= 1 << (position // 4_000)
    shard.write_bytes(raw)
    code, said, _ = python("data_pipeline.py", "verify", f"--out_dir={tmp_path}/data")
    assert code == 1 and "val_000000.bin" in said


def test_a_read_only_run_directory_is_one_line(data, tmp_path):
    done = begin(data, Path("/proc/nowhere"))
    _, error = done.communicate(timeout=60)
    assert done.returncode == 2 and error.count("\n") == 1 and "/proc/nowhere" in error


def test_metrics_torn_by_a_kill_are_mended(data, tmp_path, undisturbed):  # noqa: F811
    shutil.copytree(undisturbed, tmp_path / "run")
    (tmp_path / "run/checkpoint_step_40.pt").unlink()
    with open(tmp_path / "run/metrics.jsonl", "a") as file:
        file.write('{"step": 41, "tok')
    run(data, tmp_path / "run", *LONG)
    assert losses(tmp_path / "run") == losses(undisturbed)
    assert all(json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    assert metrics.read_metrics(tmp_path / "run")[-1]["step"] == 40


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EBADF])
def test_a_file_system_without_locks_is_said_and_not_taken_for_another_run(tmp_path, monkeypatch, capsys, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.fcntl, "flock", flock)
    os.close(files.lock(tmp_path))
    error = capsys.readouterr().err
    assert "has no locks" in error and os.strerror(number) in error and error.count("\n") == 1


@pytest.mark.parametrize("number", [errno.EWOULDBLOCK, errno.EACCES])
def test_a_lock_that_another_process_holds_is_refused(tmp_path, monkeypatch, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.fcntl, "flock", flock)
    with pytest.raises(files.Locked, match="another process"):
        files.lock(tmp_path)


@pytest.mark.parametrize(
    "name, value",
    [
        *(("RANK", "x"), ("RANK", "3"), ("RANK", "-1"), ("RANK", ""), ("RANK", "1.0"), ("LOCAL_RANK", "2")),
        *(("WORLD_SIZE", "0"), ("WORLD_SIZE", "two"), ("WORLD_SIZE", "-2"), ("LOCAL_WORLD_SIZE", "0")),
        *(("LOCAL_WORLD_SIZE", "3"), ("LOCAL_RANK", "x"), ("MASTER_PORT", "http"), ("MASTER_PORT", "70000")),
    ],
)
@pytest.mark.parametrize("strategy", ["ddp", "hsdp"])
def test_a_variable_of_torchrun_that_makes_no_sense_is_named(monkeypatch, name, value, strategy):
    good = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "29500"}
    for variable, text in {**good, "MASTER_ADDR": "localhost", name: value}.items():
        monkeypatch.setenv(variable, text)
    with pytest.raises(ValueError, match=f"{name}={value}"):
        distributed.init(strategy=strategy)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_rank_that_comes_alone_says_so_within_the_timeout(data, tmp_path, rank):
    env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    code, _, error = python(*command(data, tmp_path, "--timeout=1"), **env, MASTER_PORT=str(free_port()))
    assert code == 1 and "Traceback" not in error
    # The C++ side of torch has its say before.
    assert error.splitlines()[-1].startswith(
        f"training.py: failed: rank {rank} of 2 did not meet the others at localhost"
    )


@pytest.mark.slow
def test_what_is_wrong_on_one_rank_alone_ends_all_with_one_line_and_code_2(data, tmp_path):
    process = begin(data, tmp_path, "--max_steps=100000", "--eval_every=0", "--checkpoint_every=0")
    wait_for_step(process.lines(), 1)
    # Rank 0 alone locks the directory.
    seconds = start_ranks(2, command(data, tmp_path))
    errors = [rank.communicate(timeout=90)[1] for rank in seconds]
    process.kill()
    process.wait()
    assert [rank.returncode for rank in seconds] == [2, 2]
    assert all(error.count("\n") == 1 and "another run" in error for error in errors), errors


@pytest.mark.slow
@pytest.mark.parametrize("restarts, code", [(0, 1), (2, 0)])
def test_torchrun_does_not_start_again_what_its_time_limit_has_ended(data, tmp_path, restarts, code):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--max_restarts={restarts}"]
    long = command(data, tmp_path, "--max_steps=1000000", "--time_limit=2s")
    done = subprocess.run(
        [*launcher, "--nproc_per_node=2", *long], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == code and done.stdout.count("stopped by time limit") == 1
