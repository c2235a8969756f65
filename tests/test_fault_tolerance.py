"""What a run survives: signals, clocks, kill switches, bad numbers, a second run beside it, full disks."""

import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from conftest import changed
from processes import Process, ranks, start_ranks
from test_training import arguments, losses, run, same_weights

import training
from nano416 import checkpoint, config, evaluate, fault_tolerance, metrics, scoring

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("no_plots")]

LONG = ["--max_steps=40", "--eval_every=20"]
EXIT = {"SIGTERM": 75, "SIGUSR1": 75, "SIGINT": 130}


@pytest.fixture(scope="module")
def undisturbed(no_plots, data, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "undisturbed"
    run(data, run_dir, *LONG)
    return run_dir


def command(data: Path, run_dir: Path, *extra: str) -> list[str]:
    return ["training.py", *arguments(data, run_dir, *changed(LONG, *extra))]


def begin(data: Path, run_dir: Path, *extra: str) -> Process:
    return Process(command(data, run_dir, *extra))


def wait_for_line(lines: Iterable[str], start: str) -> None:
    assert any(line.startswith(start) for line in lines)


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


@pytest.fixture
def many_items(items, tmp_path) -> Path:
    """HellaSwag items for several batches."""
    path = tmp_path / "many.jsonl"
    path.write_text(items.read_text() * 40)
    return path


@pytest.mark.parametrize(
    "function, call", [("score_batch", 2), ("score_batch", 9), ("validation", 60), ("validation", 100)]
)
def test_an_evaluation_is_left_for_a_signal_and_repeated_by_the_next_run(
    data, tmp_path, many_items, monkeypatch, function, call
):
    often = ["--eval_every=20", "--eval_tokens=5000", "--checkpoint_every=20", f"--hellaswag={many_items}"]
    run(data, tmp_path / "undisturbed", "--max_steps=40", *often)
    module, name = (scoring, "score_batch") if function == "score_batch" else (evaluate, "autocast")
    real, calls = getattr(module, name), []

    def interrupted(*arguments):
        calls.append(None)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    monkeypatch.setattr(module, name, interrupted)
    with pytest.raises(SystemExit) as exit:
        run(data, tmp_path / "run", "--max_steps=40", *often)
    assert exit.value.code == 75 and len(calls) == call, "the next batch is not evaluated"
    stopped = checkpoint.list_checkpoints(tmp_path / "run")
    assert len({step for step, _ in stopped}) == len(stopped), "one save"
    rows = metrics.read_metrics(tmp_path / "run")
    run(data, tmp_path / "run", "--max_steps=40", *often)
    for key in ("loss", "val_loss", "hellaswag_acc", "hellaswag_acc_norm"):
        first, second = (
            [(row["step"], row[key]) for row in metrics.read_metrics(tmp_path / name) if key in row]
            for name in ("undisturbed", "run")
        )
        assert first == second, key
    assert not any(
        row["step"] == stopped[0][0] and ("val_loss" in row) == (function == "validation") for row in rows[-1:]
    )


def test_a_signal_to_one_of_two_ranks_ends_the_evaluation_of_both(data, tmp_path, items):
    many = tmp_path / "many.jsonl"
    many.write_text(items.read_text() * 5000)
    zero, one = start_ranks(2, command(data, tmp_path, "--checkpoint_every=2", "--eval_every=0", f"--hellaswag={many}"))
    wait_for_line(zero.lines(), "saving")
    time.sleep(1)
    one.send_signal(signal.SIGTERM)
    out, error = zero.communicate(timeout=60)
    assert (zero.returncode, one.wait()) == (75, 75) and "stopped by SIGTERM at step 2" in out and not error, (
        out + error
    )
    assert [path.name for path in tmp_path.glob("*.pt")] == ["checkpoint_step_2.pt"]


def test_the_time_limit_counts_from_the_start_of_the_launcher(monkeypatch):
    monkeypatch.setenv("NANO416_START_TIME", str(time.monotonic() - 100))
    assert fault_tolerance.StopSignal(time_limit=99).check()[0] == "time limit"
    assert fault_tolerance.StopSignal(time_limit=200).check()[0] is None


@pytest.mark.parametrize("variable, reason", [("TORCHELASTIC_RUN_ID", fault_tolerance.LAUNCHER_GONE), ("TERM", None)])
def test_only_a_run_that_was_launched_ends_with_its_parent(monkeypatch, variable, reason):
    monkeypatch.setenv(variable, "x")
    stop = fault_tolerance.StopSignal()
    assert stop.check()[0] is None
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert stop.check()[0] == reason


def test_an_evaluation_does_not_use_up_the_save_that_is_due():
    stop = fault_tolerance.StopSignal(save_interval=1e-9)
    stop.abandon()
    assert stop.check() == (None, True)


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


def test_a_run_without_log_lines_stops_after_bad_steps_too(data, tmp_path, monkeypatch):
    poison(monkeypatch, range(2, 100))
    with pytest.raises(config.Failure, match="5 bad steps in a row at step 10"):
        run(data, tmp_path, *LONG, "--log_every=0")
    poison(monkeypatch, range(100))
    with pytest.raises(config.Failure, match="5 bad steps in a row at step 7"):
        run(data, tmp_path / "short", "--max_steps=7", "--log_every=0")


def test_what_diverges_does_not_replace_the_last_good_checkpoint(data, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, range(4, 100))
    # Every step is a chance to save by the clock.
    options = ["--max_steps=20", "--checkpoint_every=6", "--save_interval=1e-9", "--log_every=0"]
    with pytest.raises(config.Failure, match="10"):
        run(data, tmp_path, *options)
    assert "not saved at step 6: its loss or gradient is NaN" in capsys.readouterr().out
    assert [path.name for path in tmp_path.glob("*.pt")] == ["temporary_step_4.pt"]


def test_a_model_of_nan_ends_without_a_traceback(data, tmp_path, monkeypatch, capsys):
    """Weights that overflow in the last step leave a loss, a picture and a checkpoint to look at."""
    real = training.optimizer_step

    def overflow(optimizer, skip):
        real(optimizer, skip)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.data.fill_(float("nan"))

    monkeypatch.setattr(training, "optimizer_step", overflow)
    run(data, tmp_path, "--max_steps=1", "--sample_every=1")
    out = capsys.readouterr().out
    assert "no sample: " in out and "done: 1 steps" in out and "validation loss nan" in out
    run(data, tmp_path, "--max_steps=1")
    assert "done: 1 steps" in capsys.readouterr().out


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


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_second_signal_ends_a_process_that_hangs(second):
    code = (
        "import time\nfrom nano416.fault_tolerance import StopSignal\n"
        "with StopSignal() as stop:\n stop.check(), stop.check()\n print('on', flush=True)\n time.sleep(60)\n time.sleep(60)"
    )
    process = Process(["-c", code])
    next(process.lines())
    process.send_signal(signal.SIGINT)
    # Once more at once: from a process manager, and from the launcher.
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    time.sleep(fault_tolerance.SAME_SIGNAL_S)
    assert process.poll() is None
    process.send_signal(second)
    assert process.wait(10) == -second


@pytest.mark.parametrize("name", EXIT)
def test_before_the_first_step_is_done_a_signal_ends_the_run_at_once(name):
    """Compiling it may take minutes, and there is nothing to save."""
    code = (
        "import time\nfrom nano416.fault_tolerance import StopSignal\n"
        "with StopSignal() as stop:\n stop.check()\n print('on', flush=True)\n time.sleep(60)"
    )
    process = Process(["-c", code])
    next(process.lines())
    process.send_signal(getattr(signal, name))
    assert process.wait(10) == EXIT[name]
