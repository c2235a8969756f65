"""200 SIGKILLs at random moments of one short run: it always resumes and ends with the weights of the undisturbed one.

So does a run of two ranks whose checkpoints are folders, of which random bits are flipped between the kills.

tests/run.sh -m faults -s -k soak       # prints the counts
"""

import os
import random
import re
import shutil
import signal
import time
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from processes import free_port
from test_training import arguments, losses, same_weights

import data_pipeline
import training
from nano416 import checkpoint, config, metrics, sharded_checkpoint

KILLS, STEPS, INTERVAL = 200, 1000, 20
OPTIONS = [f"--max_steps={STEPS}", f"--checkpoint_every={INTERVAL * 10}", "--eval_every=1000", "--save_interval=0.1"]


def fork_a_run(data: Path, run_dir: Path) -> int:
    """Start training in a child process, without the seconds that importing torch takes."""
    if pid := os.fork():
        return pid
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    code = 1
    try:
        training.main(config.parse_config(training.Config, arguments(data, run_dir, *OPTIONS)))
        code = 0
    finally:
        os._exit(code)


def steps_done(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return max((row["step"] for row in metrics.read_metrics(path) if "loss" in row), default=0) if path.exists() else 0


@pytest.mark.faults
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_that_is_killed_200_times_ends_as_the_undisturbed_one(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "plot", lambda *_: None)
    data = tmp_path / "data"
    data_pipeline.sample(data_pipeline.SampleConfig(str(data)))
    reference = tmp_path / "undisturbed"
    os.waitpid(fork_a_run(data, reference), 0)
    dice, run_dir = random.Random(416), tmp_path / "killed-0"
    kills = runs = resumes = repeated = worst = lost = torn = 0
    permanent: set[str] = set()
    while True:
        pid = fork_a_run(data, run_dir)
        time.sleep(dice.uniform(0.1, 1.5) if kills < KILLS else 0)
        if kills >= KILLS or os.waitpid(pid, os.WNOHANG)[0]:
            if kills >= KILLS:
                os.waitpid(pid, 0)
            same(run_dir, reference)
            runs, permanent, run_dir = runs + 1, set(), tmp_path / f"killed-{runs + 1}"
            if kills >= KILLS:
                break
            continue
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        kills += 1
        files = {path.name for path in run_dir.glob("checkpoint_step_*.pt")}
        lost, permanent = lost + len(permanent - files), permanent | files
        torn += len(list(run_dir.glob(".*.tmp")))
        if found := checkpoint.read_latest(run_dir, lambda text: pytest.fail(f"not readable: {text}")):
            resumes += 1
            again = max(0, steps_done(run_dir) - found[1]["step"])
            repeated, worst = repeated + again, max(worst, again)
    print(
        f"\nkills {kills}, resumes {resumes}, runs finished {runs}, permanent checkpoints lost {lost}, writes torn {torn}, "
        f"steps repeated {repeated} (at most {worst} at once)"
    )
    assert lost == 0 and runs and resumes > KILLS / 2


def same(run_dir: Path, reference: Path) -> None:
    assert losses(run_dir) == losses(reference)
    assert same_weights(run_dir, reference, STEPS, STEPS)


# ---- Folders ---------------------------------------------------------------------------------------------------------

SHARDED_STEPS = 100
SHARDED_OPTIONS = [f"--max_steps={SHARDED_STEPS}", "--checkpoint_every=20", "--eval_every=1000", "--save_interval=0.2"]


def fork_two_ranks(data: Path, run_dir: Path, log: Path) -> list[int]:
    """Start two ranks that write folders, without the seconds that importing torch takes. What they say is in `log`."""
    common = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    pids = []
    for rank in ("0", "1"):
        pid = os.fork()
        if not pid:
            os.environ.update(common, RANK=rank, LOCAL_RANK=rank)
            train_as_rank(data, run_dir, log)
        pids.append(pid)
    return pids


def train_as_rank(data: Path, run_dir: Path, log: Path) -> NoReturn:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    checkpoint.fits_in_host_memory = lambda n_params: False
    options = arguments(data, run_dir, "--sample_tokens=0", "--parallel=fsdp", *SHARDED_OPTIONS)
    code = 1
    try:
        config.run_cli(lambda: training.main(config.parse_config(training.Config, options)))
        code = 0
    finally:
        os._exit(code)


def wait(pids: list[int]) -> list[int]:
    """Exit codes; -9 of a process that was killed."""
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def folder_weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return sharded_checkpoint.read_weights(checkpoint.checkpoint_path(run_dir, SHARDED_STEPS), "")


def flip_a_bit(run_dir: Path, dice: random.Random) -> Path | None:
    """Flip a random bit of a random file of a random checkpoint, and return the checkpoint."""
    folders = [path for _, path in checkpoint.list_checkpoints(run_dir)]
    if not folders:
        return None
    folder = dice.choice(folders)
    path = dice.choice(sorted(folder.iterdir()))
    contents = bytearray(path.read_bytes())
    contents[dice.randrange(len(contents))] ^= 1 << dice.randrange(8)
    path.write_bytes(contents)
    return folder


def identity(folder: Path) -> tuple[Path, int, int]:
    """Another one when the folder has been written again."""
    return folder, folder.stat().st_ino, folder.stat().st_mtime_ns


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kills_wanted", [4, pytest.param(KILLS, marks=pytest.mark.faults)])
def test_a_sharded_run_survives_kills_and_flipped_bits(kills_wanted, data, tmp_path, monkeypatch):
    """Each start resumes from the newest checkpoint whose bits are those written, or says that there is none."""
    monkeypatch.setattr(metrics, "plot", lambda *_: None)
    reference = tmp_path / "undisturbed"
    started = time.monotonic()
    assert wait(fork_two_ranks(data, reference, tmp_path / "undisturbed.log")) == [0, 0]
    duration_s = time.monotonic() - started
    dice = random.Random(416)
    starts = kills = flips = passed_over = refused = runs = 0
    run_dir = tmp_path / "run-0"
    damaged: set[tuple[Path, int, int]] = set()
    while kills < kills_wanted or not runs:
        folders = [path for _, path in checkpoint.list_checkpoints(run_dir)]
        intact = [path for path in folders if identity(path) not in damaged]
        log = tmp_path / f"{starts}.log"
        starts += 1
        pids = fork_two_ranks(data, run_dir, log)
        if kills < kills_wanted:
            time.sleep(dice.uniform(0.3, 0.8) * duration_s)
            for pid in pids:
                # Until it is waited for, the id of a process that has ended is not given to another.
                os.kill(pid, signal.SIGKILL)
        codes = wait(pids)
        said = log.read_text() if log.exists() else ""
        # A rank that is killed a moment later than the other may see it go.
        assert "Traceback" not in said or codes[0] == -signal.SIGKILL, said
        passed_over += said.count("passed over")
        began = re.findall(r"^resumed (.*) at step", said, re.MULTILINE)
        assert began in ([], [str(path) for path in intact[:1]]), said
        if codes[0] == 2:
            assert folders and not intact and "no readable checkpoint" in said, said
            refused += 1
            # As its owner would: there is nothing to continue from.
            shutil.rmtree(run_dir)
        elif codes[0] == 0:
            assert not folders or not re.search(r"^step +1/", said, re.MULTILINE), "a run was started over"
            assert losses(run_dir) == losses(reference)
            weights = folder_weights(run_dir)
            assert all(torch.equal(tensor, weights[name]) for name, tensor in folder_weights(reference).items())
            runs += 1
            run_dir = tmp_path / f"run-{runs}"
        else:
            assert codes[0] == -signal.SIGKILL, (codes, said)
            kills += 1
            folder = flip_a_bit(run_dir, dice) if dice.random() < 0.5 else None
            if folder:
                damaged.add(identity(folder))
                flips += 1
    print(
        f"\nkills {kills}, starts {starts}, bits flipped {flips}, checkpoints passed over {passed_over}, none left "
        f"{refused}, runs finished {runs}, {(time.monotonic() - started) / kills:.1f} s per kill"
    )
    assert kills_wanted < KILLS or (passed_over and runs > 1)
