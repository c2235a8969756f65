"""metrics.py: rows survive a kill, numbers are what they are called, the picture of a run shows what was measured."""

import json
import math
import os

import pytest
import torch

from nano416 import files
from nano416.files import append_text
from nano416.metrics import (
    RunLog,
    Timer,
    duration,
    mfu,
    new_figure,
    peak_flops,
    plot,
    read_metrics,
    save_figure,
    smooth,
    summarize,
    write_summary,
)


def make_rows(n: int = 40, **more) -> list[dict]:
    """n steps of training."""
    common = {"lr": 1e-3, "grad_norm": 1.0, "tokens_per_s": 1e5, **more}
    return [{"step": step, "tokens": 100 * step, "loss": 5.0 - 0.05 * step, **common} for step in range(1, n + 1)]


def make_full_rows(n: int = 40) -> list[dict]:
    """n steps with everything that a run can measure."""
    evaluations = [
        {"step": step, "tokens": 100 * step, "val_loss": 4.5, "hellaswag_acc_norm": 0.3} for step in (10, 20, n)
    ]
    return make_rows(n, mfu=0.4, memory_gb=3.0) + evaluations


def write_rows(folder, rows, end: str = ""):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + end)
    return folder


def values_of(row: dict) -> dict:
    return {key: value for key, value in row.items() if key not in ("step", "tokens")}


# ---- Rows and lines --------------------------------------------------------------------------------------------------


def test_rows_that_are_logged_are_read_back(tmp_path):
    log = RunLog(tmp_path, total_steps=10)
    log.metrics(1, 100, loss=2.5, val_loss=None)
    log.metrics(2, 200, loss=math.nan, grad_norm=math.inf)
    rows = [{"step": 1, "tokens": 100, "loss": 2.5}, {"step": 2, "tokens": 200, "loss": None, "grad_norm": None}]
    assert read_metrics(tmp_path) == read_metrics(tmp_path / "metrics.jsonl") == rows
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text(), "JSON has no NaN"


def test_a_row_is_also_a_line_on_the_terminal_and_in_the_log(tmp_path, capsys):
    log = RunLog(tmp_path, total_steps=1000)
    log.start(0)
    log.metrics(50, 5000, loss=2.5, lr=3e-4, grad_norm=1.25, tokens_per_s=12345.6, mfu=0.359, memory_gb=1.5)
    line = capsys.readouterr().out
    expected = "step   50/1000  loss 2.5000  lr 3.00e-04  norm 1.25  12,346 tok/s  mfu 35.9%  1.50 GB  eta 0m0"
    assert line.startswith(expected)
    assert (tmp_path / "train.log").read_text() == line
    assert read_metrics(tmp_path)[0]["tokens_per_s"] == 12345.6


def test_nothing_is_logged_for_no_values_and_no_text(tmp_path, capsys):
    log = RunLog(tmp_path, total_steps=10)
    log.metrics(1, 100)
    log.info("")
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_a_warning_is_logged_once(tmp_path, capsys):
    log = RunLog(tmp_path, total_steps=10)
    log.warn_once("disk is nearly full")
    log.warn_once("disk is nearly full")
    log.print("only on the terminal")
    assert capsys.readouterr().out == "disk is nearly full\nonly on the terminal\n"
    assert (tmp_path / "train.log").read_text() == "disk is nearly full\n"


def test_a_loss_of_nan_can_be_logged(tmp_path, capsys):
    RunLog(tmp_path, total_steps=10).metrics(1, 10, loss=math.nan, mfu=None)
    assert "loss nan" in capsys.readouterr().out
    assert read_metrics(tmp_path) == [{"step": 1, "tokens": 10, "loss": None}]


def test_ranks_other_than_0_write_and_print_nothing(tmp_path, capsys):
    log = RunLog(tmp_path, total_steps=10, enabled=False)
    log.start_tracker("wandb", {}, 0)
    log.start(0)
    log.metrics(1, 100, loss=2.5)
    log.append("stats.jsonl", {"step": 1})
    log.info("text")
    log.rewind(0)
    log.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("seconds", "step", "eta"), [(30, 10, "4m30s"), (3600, 10, "9h00m"), (5, 50, "0m05s")])
def test_the_eta_follows_from_the_steps_of_this_process(seconds, step, eta, tmp_path, monkeypatch):
    log = RunLog(tmp_path, total_steps=100)
    monkeypatch.setattr("time.monotonic", lambda: 1000.0)
    log.start(0)
    monkeypatch.setattr("time.monotonic", lambda: 1000.0 + seconds)
    assert log.eta(step) == eta


def test_a_closed_log_releases_the_run_directory_and_can_still_write_text(tmp_path):
    log = RunLog(tmp_path, total_steps=10, lock=files.lock(tmp_path))
    with pytest.raises(files.Locked):
        files.lock(tmp_path)
    log.close()
    log.close()
    log.info("stopped")
    assert (tmp_path / "train.log").read_text() == "stopped\n"
    log = RunLog(tmp_path, total_steps=10, lock=files.lock(tmp_path))
    del log  # as after an exception
    RunLog(tmp_path, total_steps=10, lock=files.lock(tmp_path)).close()


def test_a_tracker_gets_every_number_of_every_row(tmp_path, monkeypatch):
    from nano416 import trackers

    calls = []

    def open_list(run_dir, config, step):
        calls.append((run_dir, config, step))
        return trackers.Tracker(lambda values, step: calls.append((values, step)), lambda: calls.append("closed"))

    monkeypatch.setitem(trackers.TRACKERS, "list", open_list)
    log = RunLog(tmp_path, total_steps=10)
    log.start_tracker("list", {"train": {}}, 5)
    log.metrics(6, 600, loss=2.5, grad_norm=math.nan)
    log.close()
    assert calls == [(tmp_path, {"train": {}}, 5), ({"tokens": 600, "loss": 2.5}, 6), "closed"]


# ---- Reading and resuming --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("torn", ['{"step": 41, "lo', '{"step"', "{"])
def test_a_last_line_torn_by_a_kill_is_left_out(torn, tmp_path):
    assert read_metrics(write_rows(tmp_path, make_rows(), end=torn)) == make_rows()


DAMAGED_LINES = ['{"step": ', "[1]", "x" * 50, '{"step": "5", "tokens": 1}', '{"step": true}', "\x1b[2J", "[" * 100_000]


@pytest.mark.parametrize("line", DAMAGED_LINES)
def test_a_damaged_line_is_named_and_kept_aside_and_stops_nothing(tmp_path, capsys, line):
    write_rows(tmp_path, make_rows(3), end=line + "\n" + json.dumps(make_rows(4)[3]) + "\n")
    assert read_metrics(tmp_path) == make_rows(4)
    assert "metrics.jsonl:4 is not a row of metrics" in capsys.readouterr().err
    RunLog(tmp_path, total_steps=10).rewind(10)
    assert "metrics.jsonl: 1 damaged lines (line 4), moved to " in capsys.readouterr().out
    assert (tmp_path / "metrics.jsonl.damaged").read_text() == line + "\n"
    RunLog(tmp_path, total_steps=10).rewind(10)
    assert capsys.readouterr().out == "" and read_metrics(tmp_path) == make_rows(4)


def test_a_flipped_byte_and_a_block_of_zeros_stop_nothing(tmp_path):
    folder = write_rows(tmp_path, make_rows(3))
    data = (folder / "metrics.jsonl").read_bytes()
    (folder / "metrics.jsonl").write_bytes(data[:5] + b"\xff" + data[6:] + b"\0" * 4096)
    RunLog(folder, total_steps=10).rewind(10)
    assert read_metrics(folder) == make_rows(3)[1:]


def test_rows_that_the_disk_refuses_are_written_later_and_in_order(tmp_path, capsys, monkeypatch):
    log = RunLog(tmp_path / "run", total_steps=4)
    for step in (1, 2):
        log.metrics(step, step * 100, loss=2.0)
    assert capsys.readouterr().out.count("No such file or directory; the log is kept in memory") == 1
    (tmp_path / "run").mkdir()
    log.metrics(3, 300, loss=2.0)
    log.metrics(4, 400, loss=2.0)
    assert capsys.readouterr().out.count("can be written to again") == 1
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 2, 3, 4]
    assert len((tmp_path / "run" / "train.log").read_text().splitlines()) == 4


def test_a_log_that_is_never_written_says_how_much_is_lost(tmp_path, capsys):
    log = RunLog(tmp_path / "run", total_steps=4)
    log.metrics(1, 100, loss=2.0)
    log.close()
    assert "2 lines of the log could not be written" in capsys.readouterr().out


def test_a_full_disk_leaves_no_half_of_a_line(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    append_text(path, "first\n")
    real_write = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: real_write(handle, data[:3]))
    with pytest.raises(OSError, match="No space left"):
        append_text(path, "second\n")
    monkeypatch.undo()
    append_text(path, "third\n")
    assert path.read_text() == "first\nthird\n"


def test_rewinding_drops_rows_after_the_checkpoint_and_its_evaluation(tmp_path):
    evaluation = {"step": 20, "tokens": 2000, "val_loss": 4.0}
    write_rows(tmp_path, [*make_rows(20), evaluation, *make_rows(40)[20:]], end='{"st')
    (tmp_path / "stats.jsonl").write_text('{"step": 20}\n{"step": 40}\n')
    RunLog(tmp_path, total_steps=40).rewind(20)
    assert read_metrics(tmp_path) == make_rows(20)
    assert read_metrics(tmp_path / "stats.jsonl") == [{"step": 20}]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "stats.jsonl"]


def test_a_resumed_log_equals_an_uninterrupted_one(tmp_path):
    uninterrupted = write_rows(tmp_path / "uninterrupted", make_rows(30))
    resumed = write_rows(tmp_path / "resumed", make_rows(25), end='{"step": 26, "tok')
    log = RunLog(resumed, total_steps=30)
    log.rewind(20)
    for row in make_rows(30)[20:]:
        log.metrics(row["step"], row["tokens"], **values_of(row))
    assert (resumed / "metrics.jsonl").read_text() == (uninterrupted / "metrics.jsonl").read_text()


def test_rewinding_to_the_start_leaves_no_rows_and_needs_no_file(tmp_path):
    log = RunLog(tmp_path, total_steps=40)
    log.rewind(0)
    assert list(tmp_path.iterdir()) == []
    write_rows(tmp_path, make_rows())
    log.rewind(0)
    assert read_metrics(tmp_path) == []


# ---- Time ------------------------------------------------------------------------------------------------------------


def test_evaluations_do_not_count_as_training_time(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    timer = Timer(torch.device("cpu"), tokens=5000, elapsed_s=1000.0)
    clock[0] += 10
    with timer.exclude("validation"):
        clock[0] += 30
    assert timer.tokens_per_s(6000) == 100.0
    clock[0] += 5
    with timer.exclude("validation"):
        clock[0] += 1
    with timer.exclude("saving"):
        clock[0] += 2
    assert timer.tokens_per_s(7000) == 200.0
    assert timer.elapsed_s() == 1048.0
    assert timer.seconds() == {"training": 15.0, "validation": 31.0, "saving": 2.0}


def test_durations_are_written_in_words():
    assert [duration(seconds) for seconds in (5.9, 125, 5400, 100_000)] == ["0m05s", "2m05s", "1h30m", "27h46m"]


# ---- Numbers ---------------------------------------------------------------------------------------------------------


def test_mfu_of_the_original_416m_run():
    """358,218 tokens/s on 8 A100: it reported 35.9% from 6N FLOPs per token; with attention they are 40.2%."""
    assert mfu(6 * 416_417_792, 358_218, "NVIDIA A100-SXM4-40GB", 8) == pytest.approx(0.3586, abs=1e-4)
    assert mfu(2_800_496_640, 358_218, "NVIDIA A100-SXM4-40GB", 8) == pytest.approx(0.4019, abs=1e-4)
    assert mfu(1e9, 1e5, "cpu", 1) is None


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA A100-PCIE-40GB", 312e12),
        ("NVIDIA RTX A6000", 155e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("Quadro P400", None),
        ("cpu", None),
    ],
)
def test_the_peak_follows_from_the_name_of_the_gpu(name, peak):
    assert peak_flops(name) == peak


def test_smoothing_has_no_bias_at_the_start():
    assert smooth([2.0, 2.0, 2.0]) == pytest.approx([2.0, 2.0, 2.0])
    assert smooth([1.0, 0.0], 0.5) == pytest.approx([1.0, 1 / 3])
    assert smooth([]) == []


def test_the_summary_holds_last_best_and_median_values():
    rows = [
        {"step": 1, "tokens": 10, "loss": 3.0, "tokens_per_s": 1.0},
        {"step": 2, "tokens": 20, "val_loss": 2.5},
        {"step": 3, "tokens": 30, "loss": 2.0, "tokens_per_s": 5.0},
        {"step": 4, "tokens": 40, "val_loss": 2.7, "loss": None, "tokens_per_s": 6.0},
    ]
    last = {"step": 4, "tokens": 40, "loss": None, "val_loss": 2.7, "tokens_per_s": 6.0}
    assert summarize(rows) == {**last, "best_val_loss": 2.5, "median_tokens_per_s": 5.0}
    assert summarize([]) == {"best_val_loss": None}


# ---- Pictures --------------------------------------------------------------------------------------------------------


def is_png(path) -> bool:
    data = path.read_bytes()
    return data.startswith(b"\x89PNG") and len(data) > 20_000


def record_panels(monkeypatch) -> dict[str, tuple[int, str]]:
    """What the figures that are saved from now on show: {title: (number of curves, text inside)}."""
    import matplotlib.pyplot as plt

    panels = {}

    def close(figure):
        for axis in figure.axes:
            panels[axis.get_title()] = (len(axis.lines), "".join(text.get_text() for text in axis.texts))

    monkeypatch.setattr(plt, "close", close)
    return panels


def test_nine_panels_are_drawn(tmp_path, monkeypatch):
    panels = record_panels(monkeypatch)
    plot("run", make_full_rows(), tmp_path / "run.png")
    assert is_png(tmp_path / "run.png")
    assert [path.name for path in tmp_path.iterdir()] == ["run.png"]
    assert len(panels) == 9
    assert all(curves and not text for curves, text in panels.values())
    assert panels["Loss"][0] == 3, "training, its average, validation"


def test_a_panel_without_values_says_so(tmp_path, monkeypatch):
    panels = record_panels(monkeypatch)
    plot("run", make_rows(), tmp_path / "run.png")
    empty = {title for title, (_, text) in panels.items() if text == "not measured"}
    assert empty == {"Model FLOPs utilization", "Peak memory", "HellaSwag acc_norm"}


@pytest.mark.parametrize(
    "rows", [[], [{"step": 1, "tokens": 1, "loss": None}], make_rows(1), make_rows(2, val_loss=1e9)]
)
def test_short_and_diverged_runs_are_drawn(rows, tmp_path):
    plot("run", rows, tmp_path / "run.png")
    assert is_png(tmp_path / "run.png")


def test_the_summary_of_a_run_is_a_json_file_and_a_picture(tmp_path):
    write_rows(tmp_path, make_full_rows())
    summary = write_summary(tmp_path, parameters=7)
    assert json.loads((tmp_path / "final_metrics.json").read_text()) == summary
    assert summary["parameters"] == 7
    assert summary["best_val_loss"] == 4.5
    assert is_png(tmp_path / "final_metrics.png")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["final_metrics.json", "final_metrics.png", "metrics.jsonl"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent/run.png", "cannot write .*: No such file"),
        ("run.xyz", "cannot write .*: Format 'xyz' is not supported"),
    ],
)
def test_a_picture_that_cannot_be_written_is_a_clear_error(name, message, tmp_path):
    figure, _ = new_figure(1, 1)
    with pytest.raises(ValueError, match=message):
        save_figure(figure, tmp_path / name)
    assert list(tmp_path.iterdir()) == []
