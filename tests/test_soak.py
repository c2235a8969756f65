"""200 SIGKILLs at random moments of one short run: it always resumes and ends with the weights of the undisturbed one.

tests/run.sh -m faults -s -k soak       # prints the counts
"""

import os
import random
import signal
import time
from pathlib import Path

import pytest
from test_training import arguments, losses, same_weights

import data_pipeline
import training
from nano416 import checkpoint, config, metrics

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
