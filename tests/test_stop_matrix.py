"""Cells of the table in stop_matrix.py: one run each, started as a user would and stopped from outside."""

import pytest
import stop_matrix
from stop_matrix import Cell

QUICK = ["script2 USR1 training"]
CORE = [
    *("script1 TERM evaluating", "script1 worker training", "script2 INT saving", "script2 parent training"),
    *("script2 limit training", "script2 bad startup", "script2 TERM startup", "script2 worker evaluating"),
    *("nodes TERM training", "nodes switch training", "nodes limit training", "nodes bad startup"),
    *("elastic worker training", "slurm1 USR1 training", "slurm2 USR1 training", "slurm2 TERM evaluating"),
    *("torchrun TERM training", "torchrun USR1 training", "torchrun parent training", "torchrun limit training"),
]
pytestmark = [pytest.mark.faults]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return stop_matrix.make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in CORE)])
def test_a_run_stops_as_documented(inputs, tmp_path, name):
    launcher, stop, phase = name.split()
    cell = stop_matrix.measure(Cell(launcher, stop, phase, tmp_path / "cell"), *inputs)
    assert not cell.problems, f"{cell.problems}\n{(cell.folder / 'output').read_text()[-3000:]}"
    if stop in ("TERM", "USR1", "INT", "switch"):
        assert cell.seconds < 30
