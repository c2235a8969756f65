"""What a run survives: signals, clocks, kill switches, bad numbers, a second run beside it, full disks."""

import signal
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from processes import Process, ranks, start_ranks
from test_training import arguments, losses, run, same_weights

import training
from nano416 import checkpoint, config, fault_tolerance

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("no_plots")]

LONG = ["--max_steps=40", "--eval_every=20"]
EXIT = {"SIGTERM": 75, "SIGUSR1": 75, "SIGINT": 130}


@pytest.fixture(scope="module")
def undisturbed(no_plots, data, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "undisturbed"
    run(data, run_dir, *LONG)
    return run_dir


def command(data: Path, run_dir: Path, *extra: str) -> list[str]:
    return ["training.py", *arguments(data, run_dir, *LONG, *extra)]


def begin(data: Path, run_dir: Path, *extra: str) -> Process:
    return Process(command(data, run_dir, *extra))


def wait_for_step(lines: Iterable[str] | None, step: int) -> None:
    seen = []
    for line in lines or []:
        seen.append(line)
        if line.split("/")[0].split()[-1:] == [str(step)]:
            return
    raise AssertionError("".join(seen))


@pytest.mark.parametrize("name", EXIT)
def test_a_signal_saves_and_the_same_command_goes_on(data, tmp_path, undisturbed, name):
    process = begin(data, tmp_path, "--checkpoint_every=0")
    wait_for_step(process.lines(), 3)
    process.send_signal(getattr(signal, name))
    out, error = process.communicate(timeout=60)
    assert process.returncode == EXIT[name] and f"stopped by {name}" in out, out + error
    stopped = checkpoint.latest(tmp_path)
    assert stopped and 3 <= checkpoint.read(stopped)["step"] < 40 and stopped.name.startswith("temporary")
    run(data, tmp_path, *LONG, "--checkpoint_every=0")
    assert losses(tmp_path) == losses(undisturbed)
    assert [p.name for p in tmp_path.glob("*.pt")] == ["checkpoint_step_40.pt"]


def test_a_signal_to_one_of_two_ranks_stops_both_in_the_same_step(data, tmp_path):
    zero, one = start_ranks(2, command(data, tmp_path, "--checkpoint_every=0"))
    wait_for_step(zero.lines(), 3)
    one.send_signal(signal.SIGUSR1)
    out, error = zero.communicate()
    assert (zero.returncode, one.wait()) == (75, 75) and "stopped by SIGUSR1" in out and not error, out + error
    assert checkpoint.latest(tmp_path)


def test_the_time_limit_saves_and_leaves_with_75(data, tmp_path, undisturbed):
    with pytest.raises(SystemExit) as exit:
        run(data, tmp_path, *LONG, "--time_limit=0.001")
    assert exit.value.code == 75
    run(data, tmp_path, *LONG)
    assert losses(tmp_path) == losses(undisturbed)


def test_the_kill_switch_saves_and_leaves_with_0_and_then_refuses(data, tmp_path):
    switch = tmp_path / "stop"
    process = begin(data, tmp_path / "run", f"--kill_switch={switch}", "--checkpoint_every=0")
    wait_for_step(process.lines(), 2)
    switch.touch()
    out, error = process.communicate(timeout=60)
    assert process.returncode == 0 and "stopped by kill switch" in out, out + error
    again = begin(data, tmp_path / "run", f"--kill_switch={switch}")
    assert again.wait(60) == 2


def test_temporary_checkpoints_by_the_clock_lose_at_most_the_interval(data, tmp_path):
    process = begin(data, tmp_path, "--checkpoint_every=0", "--save_interval=0.01")
    wait_for_step(process.lines(), 20)
    process.kill()
    process.wait()
    saved = checkpoint.read_latest(tmp_path, print)
    assert saved and saved[1]["step"] >= 10, "saves come once per interval, and one is written at a time"
    assert len(list(tmp_path.glob("temporary_step_*.pt"))) <= 2


def test_a_second_run_in_the_same_directory_is_refused(data, tmp_path):
    process = begin(data, tmp_path, "--max_steps=100000", "--eval_every=0", "--checkpoint_every=0")
    wait_for_step(process.lines(), 1)
    second = begin(data, tmp_path)
    _, error = second.communicate(timeout=60)
    process.kill()
    process.wait()
    assert second.returncode == 2 and "another run" in error and error.count("\n") == 1


def poison(monkeypatch, steps: range) -> None:
    """Make the gradient of some steps not a number."""
    real, done = training.clip_grad_norm_, []

    def clip(model, max_norm):
        done.append(None)
        if len(done) - 1 in steps:
            next(model.parameters()).grad.fill_(float("nan"))
        return real(model, max_norm)

    monkeypatch.setattr(training, "clip_grad_norm_", clip)


def test_a_step_with_bad_numbers_changes_no_weight_and_is_counted(data, tmp_path, monkeypatch):
    run(data, tmp_path / "short", "--max_steps=2", "--schedule=constant", "--warmup_frac=0")
    poison(monkeypatch, range(2, 4))
    rows = run(data, tmp_path / "long", "--max_steps=4", "--schedule=constant", "--warmup_frac=0")
    assert same_weights(tmp_path / "short", tmp_path / "long", 2, 4)
    assert [row.get("skipped_steps") for row in rows if "loss" in row] == [None, None, 1, 1]


def test_five_bad_steps_in_a_row_stop_the_run_and_name_the_text(data, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, range(2, 100))
    cfg = config.parse_config(training.Config, arguments(data, tmp_path, *LONG))
    with pytest.raises(SystemExit) as exit:
        config.run_cli(lambda: training.main(cfg))
    error = capsys.readouterr().err
    assert exit.value.code == 1 and "5 bad steps in a row at step 7" in error and "train_000000.bin, token" in error
    saved = checkpoint.read_latest(tmp_path, print)
    assert saved and all(torch.isfinite(tensor).all() for tensor in saved[1]["model"].values())


def test_a_spike_is_judged_by_the_last_128_good_steps():
    guard = fault_tolerance.StepGuard(torch.device("cpu"), skip_spikes=True)
    noise = torch.Generator().manual_seed(0)
    calm = [guard.is_bad(3 + 0.1 * torch.randn((), generator=noise), torch.tensor(0.3)) for _ in range(200)]
    assert sum(calm) == 0
    assert guard.is_bad(torch.tensor(5.0), torch.tensor(0.3)) == 1  # 20 sigma
    assert guard.is_bad(torch.tensor(3.2), torch.tensor(0.3)) == 0
    assert guard.newly_skipped() == 1 and not guard.gave_up()


def test_few_steps_are_no_ground_to_call_a_spike():
    guard = fault_tolerance.StepGuard(torch.device("cpu"), skip_spikes=True)
    assert [float(guard.is_bad(torch.tensor(x), torch.tensor(1.0))) for x in (3.0, 3.0, 9.0)] == [0, 0, 0]


def test_the_guard_survives_a_resume():
    guard, other = fault_tolerance.StepGuard(torch.device("cpu")), fault_tolerance.StepGuard(torch.device("cpu"))
    for x in (1.0, float("nan"), 2.0, float("inf")):
        guard.is_bad(torch.tensor(x), torch.tensor(1.0))
    other.load_state_dict({name: tensor.clone() for name, tensor in guard.state_dict().items()})
    assert (int(other.skipped), int(other.in_a_row), other.newly_skipped()) == (2, 1, 0)


def test_a_full_disk_costs_a_checkpoint_not_the_run(data, tmp_path, monkeypatch, capsys):
    real, calls = checkpoint.write, []

    def write(path, state):
        calls.append(path)
        if len(calls) == 1:
            raise OSError(28, "No space left on device")
        real(path, state)

    monkeypatch.setattr(checkpoint, "write", write)
    run(data, tmp_path)
    out = capsys.readouterr().out
    assert "checkpoint_step_2.pt NOT written" in out and "No space left" in out
    assert [p.name for p in sorted(tmp_path.glob("*.pt"))] == ["checkpoint_step_4.pt", "checkpoint_step_6.pt"]


def test_a_last_checkpoint_that_cannot_be_written_is_a_failure(data, tmp_path, monkeypatch, capsys):
    def write(path, state):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write", write)
    cfg = config.parse_config(training.Config, arguments(data, tmp_path))
    with pytest.raises(SystemExit) as exit:
        config.run_cli(lambda: training.main(cfg))
    assert exit.value.code == 1 and "the last checkpoint is missing" in capsys.readouterr().err


def test_a_run_goes_on_with_another_number_of_processes(data, tmp_path):
    for processes, steps in ((2, 4), (1, 8), (4, 12)):
        ranks(processes, command(data, tmp_path, f"--max_steps={steps}", "--schedule=constant"))
    reference = tmp_path / "reference"
    run(data, reference, "--max_steps=12", "--schedule=constant")
    assert losses(tmp_path) == pytest.approx(losses(reference), abs=1e-4)


def test_second_signal_ends_a_process_that_hangs():
    code = (
        "import time\nfrom nano416.fault_tolerance import StopSignal\n"
        "with StopSignal():\n print('on', flush=True)\n time.sleep(60)\n time.sleep(60)"
    )
    process = Process(["-c", code])
    next(process.lines())
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == -signal.SIGINT
