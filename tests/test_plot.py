"""tools/plot.py: one run or several are drawn, comparisons are right, mistakes are one line."""

import json
import os

import pytest
from test_metrics import is_png, make_full_rows, make_rows, record_panels, write_rows

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
        (["picture"], "cannot read picture: it is not text; give a run directory"),
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
