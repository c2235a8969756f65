"""metrics.py: rows survive a kill, numbers are what they say, every plot is drawn."""

import json
import math
import os

import pytest
from conftest import ROOT

import metrics
from config import run
from metrics import (
    MetricsLog,
    compare,
    ema,
    mfu,
    peak_flops,
    plot,
    plot_comparison,
    plot_stats,
    reached,
    read_metrics,
    summarize,
    write_summary,
)


def rows(n: int = 40, **more) -> list[dict]:
    return [
        {
            "step": s,
            "tokens": 100 * s,
            "loss": 5.0 - 0.05 * s,
            "lr": 1e-3,
            "grad_norm": 1.0,
            "tokens_per_s": 1e5,
            **more,
        }
        for s in range(1, n + 1)
    ]


def full(n: int = 40) -> list[dict]:
    evaluations = [{"step": s, "tokens": 100 * s, "val_loss": 4.5, "hellaswag_acc_norm": 0.3} for s in (10, 20, n)]
    return rows(n, mfu=0.4, memory_gb=3.0) + evaluations


def write_rows(folder, rows, end: str = ""):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + end)
    return folder


# ---- Rows ------------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read(tmp_path):
    log = MetricsLog(tmp_path, total_steps=10)
    log.write(1, 100, loss=2.5, val_loss=None)
    log.write(2, 200, loss=math.nan, grad_norm=math.inf)
    assert read_metrics(tmp_path) == read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 1, "tokens": 100, "loss": 2.5},
        {"step": 2, "tokens": 200, "loss": None, "grad_norm": None},
    ]  # fmt: skip
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text(), "NaN is no JSON"


def test_other_ranks_write_nothing(tmp_path, capsys):
    log = MetricsLog(tmp_path, total_steps=10, enabled=False)
    log.begin(0)
    log.report(1, 100, loss=2.5)
    log.rewind(0)
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == ""


@pytest.mark.parametrize("torn", ['{"step": 41, "lo', '{"step"', "{"])
def test_a_last_line_torn_by_a_kill_is_left_out(torn, tmp_path):
    assert read_metrics(write_rows(tmp_path, rows(), end=torn)) == rows()


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    write_rows(tmp_path, rows(3), end='{"step": \n{"step": 5, "tokens": 1}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:4"):
        read_metrics(tmp_path)


def test_rewinding_forgets_what_came_after_the_checkpoint_and_the_torn_line(tmp_path):
    evaluation = {"step": 20, "tokens": 2000, "val_loss": 4.0}
    write_rows(tmp_path, [*rows(20), evaluation, *rows(40)[20:]], end='{"st')
    MetricsLog(tmp_path, total_steps=40).rewind(20)
    assert read_metrics(tmp_path) == rows(20)  # its evaluation is made again
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_resumed_log_reads_as_an_uninterrupted_one(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    write_rows(whole, rows(30))
    write_rows(cut, rows(25), end='{"step": 26, "tok')
    log = MetricsLog(cut, total_steps=30)
    log.rewind(20)
    for row in rows(30)[20:]:
        log.write(row["step"], row["tokens"], **{k: v for k, v in row.items() if k not in ("step", "tokens")})
    assert (cut / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()


def test_rewinding_to_the_start_leaves_nothing_and_needs_no_file(tmp_path):
    log = MetricsLog(tmp_path, total_steps=40)
    log.rewind(0)
    assert list(tmp_path.iterdir()) == []
    write_rows(tmp_path, rows())
    log.rewind(0)
    assert read_metrics(tmp_path) == []


def test_a_report_is_a_row_and_a_line_on_the_terminal_and_in_the_log(tmp_path, capsys):
    log = MetricsLog(tmp_path, total_steps=1000)
    log.begin(0)
    log.report(50, 5000, loss=2.5, lr=3e-4, grad_norm=1.25, tokens_per_s=12345.6, mfu=0.359, memory_gb=1.5)
    line = capsys.readouterr().out
    for word in (
        "step   50/1000",
        "loss 2.5000",
        "lr 3.00e-04",
        "norm 1.25",
        "12,346 tok/s",
        "mfu 35.9%",
        "1.50 GB",
        "eta ",
    ):
        assert word in line
    assert (tmp_path / "train.log").read_text() == line
    assert read_metrics(tmp_path)[0]["tokens_per_s"] == 12345.6
    for _ in range(2):
        log.once("said once")
        log.line("")
        log.report(51, 5100)
    assert capsys.readouterr().out == "said once\n" and len(read_metrics(tmp_path)) == 1


def test_a_loss_that_is_not_finite_can_be_reported(tmp_path, capsys):
    MetricsLog(tmp_path, total_steps=10).report(1, 10, loss=math.nan, mfu=None)
    assert "loss nan" in capsys.readouterr().out and read_metrics(tmp_path)[0] == {
        "step": 1,
        "tokens": 10,
        "loss": None,
    }


@pytest.mark.parametrize(("seconds", "step", "eta"), [(30, 10, "4m30s"), (3600, 10, "9h00m"), (5, 50, "0m05s")])
def test_the_time_left_is_that_of_the_steps_of_this_process(seconds, step, eta, tmp_path, monkeypatch):
    log = MetricsLog(tmp_path, total_steps=100)
    monkeypatch.setattr("time.monotonic", lambda: 1000.0)
    log.begin(0)
    monkeypatch.setattr("time.monotonic", lambda: 1000.0 + seconds)
    assert log.eta(step) == eta


# ---- Numbers ---------------------------------------------------------------------------------------------------------


def test_mfu_of_the_seeds_run():
    """358,218 tokens/s on 8 A100: the seed's 35.9% counts 6N; with attention it is 40.2%."""
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
def test_the_peak_is_that_of_the_gpu_with_this_name(name, peak):
    assert peak_flops(name) == peak


def test_the_moving_average_has_no_bias_at_its_start():
    assert ema([2.0, 2.0, 2.0], 0.9) == pytest.approx([2.0, 2.0, 2.0])
    assert ema([1.0, 0.0], 0.5) == pytest.approx([1.0, 1 / 3])
    assert ema([]) == []


def test_the_summary_holds_last_best_and_typical_values():
    log = [
        {"step": 1, "tokens": 10, "loss": 3.0, "tokens_per_s": 1.0},
        {"step": 2, "tokens": 20, "val_loss": 2.5},
        {"step": 3, "tokens": 30, "loss": 2.0, "tokens_per_s": 5.0},
        {"step": 4, "tokens": 40, "val_loss": 2.7, "loss": None, "tokens_per_s": 6.0},
    ]
    assert summarize(log) == {
        "step": 4, "tokens": 40, "loss": None, "val_loss": 2.7, "tokens_per_s": 6.0,
        "best_val_loss": 2.5, "median_tokens_per_s": 5.0,
    }  # fmt: skip
    assert summarize([]) == {"best_val_loss": None}


# ---- Plots -----------------------------------------------------------------------------------------------------------


def is_png(path) -> bool:
    data = path.read_bytes()
    return data.startswith(b"\x89PNG") and len(data) > 20_000


@pytest.fixture
def titles(monkeypatch):
    """What is drawn in each panel: {title: (curves, "not measured" or "")}, of the last figure."""
    import matplotlib.pyplot as plt

    panels = {}

    def close(figure):
        for axis in figure.axes:
            panels[axis.get_title()] = (len(axis.lines), "".join(text.get_text() for text in axis.texts))

    monkeypatch.setattr(plt, "close", close)
    return panels


def test_nine_panels_are_drawn(tmp_path, titles):
    plot("run", full(), tmp_path / "p.png")
    assert is_png(tmp_path / "p.png") and [p.name for p in tmp_path.iterdir()] == ["p.png"]
    assert len(titles) == 9 and all(curves and not text for curves, text in titles.values())
    assert titles["Loss"][0] == 3, "loss, its average, validation"


def test_what_was_not_measured_says_so(tmp_path, titles):
    plot("run", rows(), tmp_path / "p.png")
    assert is_png(tmp_path / "p.png")
    assert {title for title, (_, text) in titles.items() if text == "not measured"} == {
        "Model FLOPs utilisation",
        "Peak memory",
        "HellaSwag acc_norm",
    }


def test_losses_of_several_runs_are_compared_on_logarithmic_axes(tmp_path, titles):
    plot_comparison({"a": full(), "b": rows(20), "c": full(30)}, "tokens", tmp_path / "p.png")
    assert is_png(tmp_path / "p.png")
    assert {title: curves for title, (curves, _) in titles.items()} == {
        "Training loss, smoothed": 3,
        "Validation loss": 3,
    }


def timed(losses: list[float]) -> list[dict]:
    """A run evaluated every 10 steps of 100 tokens; step, tokens, FLOPs and time grow by different amounts."""
    log = []
    for i, loss in enumerate(losses, 1):
        log.append({"step": 10 * i, "tokens": 1000 * i, "loss": loss, "flops": 6e6 * i, "elapsed_s": 1800.0 * i * i})
        log.append({"step": 10 * i, "tokens": 1000 * i, "val_loss": loss})
    return log


@pytest.mark.parametrize(("x", "at"), [("step", 25), ("tokens", 2500), ("flops", 15e6), ("hours", 3.25)])
def test_where_a_loss_is_reached_lies_between_two_evaluations(x, at):
    assert reached(timed([5.0, 4.0, 3.0]), 3.5, x) == pytest.approx(at)
    assert reached(timed([5.0, 4.0, 3.0]), 2.9, x) is None


def test_a_comparison_says_how_much_sooner_a_run_reaches_the_loss_of_the_first():
    table = compare({"slow": timed([5.0, 4.0, 3.5, 3.2]), "fast": timed([4.0, 3.2, 3.0, 2.9])}, "tokens").splitlines()
    assert "(1.00x)" in table[1] and "2000 tokens (0.50x)" in table[2], table


def test_a_run_that_does_not_say_its_hours_is_named(tmp_path):
    with pytest.raises(ValueError, match="do not say their hours"):
        plot_comparison({"a": rows(5)}, "hours", tmp_path / "p.png")


def test_the_statistics_of_weights_are_drawn_as_four_maps(tmp_path, titles):
    names = {"embed_tokens.weight": 1.0, "norm.weight": 2.0}
    stats = {"weight_norm": names, "grad_norm": names, "update_norm": names, "grad_cosine": names}
    lines = [{"step": 5, **stats, "grad_cosine": {}}, {"step": 10, **stats}]
    (tmp_path / "stats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    plot_stats(tmp_path, tmp_path / "p.png")
    assert is_png(tmp_path / "p.png") and len([title for title in titles if title]) == 4


@pytest.mark.parametrize("log", [[], [{"step": 1, "tokens": 1, "loss": None}], rows(1), rows(2, val_loss=1e9)])
def test_short_and_diverged_runs_are_drawn(log, tmp_path):
    plot("run", log, tmp_path / "p.png")
    assert is_png(tmp_path / "p.png")


def test_the_summary_of_a_run_is_json_and_a_picture(tmp_path):
    write_rows(tmp_path, full())
    summary = write_summary(tmp_path, parameters=7)
    assert json.loads((tmp_path / "final_metrics.json").read_text()) == summary
    assert summary["parameters"] == 7 and summary["best_val_loss"] == 4.5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["final_metrics.json", "final_metrics.png", "metrics.jsonl"]
    assert is_png(tmp_path / "final_metrics.png")


# ---- Command line ----------------------------------------------------------------------------------------------------


def command(monkeypatch, *argv) -> None:
    monkeypatch.setattr("sys.argv", [str(ROOT / "metrics.py"), *map(str, argv)])
    run(metrics.main)


def test_the_command_draws_one_run_or_several(tmp_path, monkeypatch, capsys):
    a, b = write_rows(tmp_path / "a", full()), write_rows(tmp_path / "b", rows())
    command(monkeypatch, a)
    assert capsys.readouterr().out == f"{a / 'final_metrics.png'}\n" and is_png(a / "final_metrics.png")
    command(monkeypatch, a, b / "metrics.jsonl", "-o", tmp_path / "both.png")
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "both.png") and is_png(tmp_path / "both.png")


def test_watching_draws_again_when_there_are_new_rows(tmp_path, monkeypatch):
    run_dir, pictures = write_rows(tmp_path / "run", rows(5)), []

    def wait(seconds):
        pictures.append((run_dir / "final_metrics.png").stat().st_mtime_ns)
        if len(pictures) == 4:
            raise KeyboardInterrupt
        if len(pictures) == 2:
            write_rows(run_dir, rows(9))
            os.utime(run_dir / "metrics.jsonl", (0, 0))

    monkeypatch.setattr("time.sleep", wait)
    with pytest.raises(SystemExit):  # Ctrl-C
        command(monkeypatch, run_dir, "--watch")
    assert pictures[0] == pictures[1] != pictures[2] == pictures[3]


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        (["absent"], "cannot read absent: No such file or directory; give a run directory"),
        (["no_rows"], "no_rows has no rows yet"),
        (["run", "-o", "no/such/folder.png"], "cannot write no/such/folder.png"),
        (["run", "-o", "picture.xyz"], "cannot write picture.xyz: Format 'xyz' is not supported"),
        (["picture"], "cannot read picture: it is no text; give a run directory"),
        (["run", "--outputt=x"], "did you mean --output?"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(argv, hint, tmp_path, monkeypatch, capsys):
    write_rows(tmp_path / "run", rows())
    write_rows(tmp_path / "no_rows", [])
    (tmp_path / "picture").write_bytes(b"\x89PNG")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        command(monkeypatch, *argv)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and hint in error, error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["no_rows", "picture", "run"]
