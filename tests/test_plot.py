"""tools/plot.py: one run or several are drawn, comparisons are right, mistakes are one line."""

import json
import os

import pytest
from test_metrics import is_png, make_full_rows, make_rows, record_panels, write_rows

from nano416 import metrics
from nano416.config import parse_config, run_cli
from tools import plot
from tools.plot import compare, plot_comparison, plot_stats, steps_to_loss


def run_command(*argv) -> None:
    run_cli(lambda: plot.main(parse_config(plot.PlotConfig, [str(arg) for arg in argv])))


def rows_with_losses(losses: list[float]) -> list[dict]:
    """A run evaluated every 10 steps of 100 tokens; step, tokens, FLOPs and hours grow at different rates."""
    rows = []
    for i, loss in enumerate(losses, 1):
        position = {"step": 10 * i, "tokens": 1000 * i}
        rows.append({**position, "loss": loss, "flops": 6e6 * i, "elapsed_s": 1800.0 * i * i})
        rows.append({**position, "val_loss": loss})
    return rows


# ---- Comparison ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("x", "expected"), [("step", 25), ("tokens", 2500), ("flops", 15e6), ("hours", 3.25)])
def test_where_a_loss_is_reached_is_interpolated_between_evaluations(x, expected):
    rows = rows_with_losses([5.0, 4.0, 3.0])
    assert steps_to_loss(rows, 3.5, x) == pytest.approx(expected)
    assert steps_to_loss(rows, 2.9, x) is None


def test_a_loss_below_which_a_run_starts_is_reached_at_its_first_evaluation():
    assert steps_to_loss(rows_with_losses([5.0, 4.0]), 6.0) == 10


def test_a_comparison_says_how_much_sooner_a_run_reaches_the_loss_of_the_first():
    runs = {"slow": rows_with_losses([5.0, 4.0, 3.5, 3.2]), "fast": rows_with_losses([4.0, 3.2, 3.0, 2.9])}
    assert compare(runs, "tokens").splitlines() == [
        "      validation loss   reaches 3.2000 after",
        "slow           3.2000   4000 tokens (1.00x)",
        "fast           2.9000   2000 tokens (0.50x)",
    ]


def test_runs_without_evaluations_are_compared_too():
    assert "nan" in compare({"a": make_rows(5), "b": make_rows(5)}, "tokens")


def test_losses_of_several_runs_are_drawn_in_two_panels(tmp_path, monkeypatch):
    panels = record_panels(monkeypatch)
    runs = {"a": make_full_rows(), "b": make_rows(20), "c": make_full_rows(30)}
    plot_comparison(runs, "tokens", tmp_path / "runs.png")
    assert is_png(tmp_path / "runs.png")
    assert {title: curves for title, (curves, _) in panels.items()} == {
        "Training loss, smoothed": 3,
        "Validation loss": 3,
    }


def test_runs_logged_without_hours_are_not_drawn_over_hours(tmp_path):
    with pytest.raises(ValueError, match="the runs were logged without hours; choose another --x"):
        plot_comparison({"a": make_rows(5)}, "hours", tmp_path / "runs.png")


def test_statistics_of_weights_are_drawn_as_four_maps(tmp_path, monkeypatch):
    panels = record_panels(monkeypatch)
    values = {"embed_tokens.weight": 1.0, "norm.weight": 0.0}
    stats = {"weight_norm": values, "grad_norm": values, "update_norm": values}
    rows = [{"step": 5, **stats}, {"step": 10, **stats, "grad_cosine": values}]
    (tmp_path / "stats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plot_stats(str(tmp_path), tmp_path / "stats.png")
    assert is_png(tmp_path / "stats.png")
    assert len([title for title in panels if title]) == 4


# ---- Command line ----------------------------------------------------------------------------------------------------


def test_the_command_draws_one_run_or_several(tmp_path, capsys):
    a = write_rows(tmp_path / "a", make_full_rows())
    b = write_rows(tmp_path / "b", make_rows())
    run_command(a)
    assert capsys.readouterr().out == f"{a / 'final_metrics.png'}\n"
    assert is_png(a / "final_metrics.png")
    run_command(a, b / "metrics.jsonl", f"--output={tmp_path / 'both.png'}")
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "both.png")
    assert is_png(tmp_path / "both.png")


def test_watching_draws_again_when_there_are_new_rows(tmp_path, monkeypatch):
    run_dir = write_rows(tmp_path / "run", make_rows(5))
    times = []

    def sleep(seconds):
        times.append((run_dir / "final_metrics.png").stat().st_mtime_ns)
        if len(times) == 2:
            write_rows(run_dir, make_rows(9))
            os.utime(run_dir / "metrics.jsonl", (0, 0))
        if len(times) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr("time.sleep", sleep)
    with pytest.raises(SystemExit):
        run_command(run_dir, "--watch")
    assert times[0] == times[1] != times[2] == times[3]


ODD_VALUES = ["x", [], [1], {"a": 1}, True]


@pytest.mark.parametrize("key", ["tokens", "loss", "val_loss", "elapsed_s", "grad_norm", "mfu", "hellaswag_acc_norm"])
def test_a_row_of_odd_types_is_named(key, tmp_path):
    for value in ODD_VALUES:
        rows = [*make_full_rows(), {"step": 99, "tokens": 99, key: value}]
        run = write_rows(tmp_path / "run", rows)
        with pytest.raises(ValueError, match=rf"run: row {len(rows)} has {key} = .*, which is not a number"):
            plot.read_runs([str(run)])


@pytest.mark.parametrize("position", [{"step": 5}, {"step": 5, "tokens": None}])
def test_a_row_without_its_place_is_named(position, tmp_path):
    run = write_rows(tmp_path / "run", [{**position, "loss": 1.0}])
    with pytest.raises(ValueError, match="row 1 lacks the number of its step or of its tokens"):
        plot.read_runs([str(run)])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 10**400, None, 0, -1, 1e-320])
def test_numbers_that_cannot_be_drawn_leave_a_picture_and_no_traceback(value, tmp_path, capsys):
    keys = ("loss", "val_loss", "grad_norm", "tokens_per_s", "elapsed_s", "flops")
    rows = [{"step": i, "tokens": 10 * i, **dict.fromkeys(keys, value)} for i in range(3)]
    a = write_rows(tmp_path / "a", rows)
    b = write_rows(tmp_path / "b", make_full_rows())
    run_command(a)
    run_command(a, b, f"--output={tmp_path / 'ab.png'}")
    assert is_png(a / "final_metrics.png") and is_png(tmp_path / "ab.png")


def test_names_are_drawn_and_printed_as_they_are(tmp_path, capsys):
    """$...$ would be a formula, names that begin with _ would be missing from the legend."""
    names = ["a$b$", "$\\x$", "_c", "esc\x1b[2J"]
    runs = [write_rows(tmp_path / name, make_full_rows()) for name in names]
    run_command(runs[0])
    run_command(*runs, f"--output={tmp_path / 'all.png'}")
    assert "\x1b" not in capsys.readouterr().out
    assert [metrics.plain_label(name) for name in names] == [r"a\$b\$", r"\$\x\$", " _c", r"esc\x1b[2J"]


def test_relative_and_absolute_paths_can_be_compared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "a", make_rows())
    write_rows(tmp_path / "b", make_rows())
    assert list(plot.read_runs(["a", str(tmp_path / "b")])) == ["a", "b"]


ODD_STATS = [
    {"step": 1},
    {"step": 1, "weight_norm": {}},
    {"step": 1, "weight_norm": 5},
    {"step": 1, "weight_norm": {"a": "x"}},
    {"step": 1, "weight_norm": {"a": 1.0}, "grad_norm": [1]},
    {"step": 1, "weight_norm": {"a": 1.0}, "grad_norm": {"a": [1]}},
]


@pytest.mark.parametrize("row", ODD_STATS)
def test_odd_statistics_are_named(row, tmp_path):
    (tmp_path / "stats.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=r"stats\.jsonl"):
        plot_stats(str(tmp_path), tmp_path / "stats.png")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 10**400, None, 0.0])
def test_statistics_that_cannot_be_drawn_leave_a_picture(value, tmp_path):
    rows = [{"step": step, "weight_norm": {"$a$_b": value}, "grad_norm": None} for step in ("x$y$", 1, None)]
    (tmp_path / "stats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plot_stats(str(tmp_path), tmp_path / "stats.png")
    assert is_png(tmp_path / "stats.png")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: run_dirs"),
        (["absent"], "cannot read absent: No such file or directory; give a run directory"),
        (["no_rows"], "no_rows has no rows yet"),
        (["run", "--stats"], "cannot read run/stats.jsonl"),
        (["run", "no_rows", "--stats"], "--stats draws one run"),
        (["run", "--output=no/such/folder.png"], "cannot write no/such/folder.png: No such file"),
        (["run", "--output=picture.xyz"], "cannot write picture.xyz: Format 'xyz' is not supported"),
        (["picture"], "picture holds no rows of metrics; give a run directory"),
        (["run", "--outputt=x"], "did you mean --output?"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(argv, message, tmp_path, monkeypatch, capsys):
    write_rows(tmp_path / "run", make_rows())
    write_rows(tmp_path / "no_rows", [])
    (tmp_path / "picture").write_bytes(b"\x89PNG")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        run_command(*argv)
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.count("\n") == 1
    assert message in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["no_rows", "picture", "run"]
