"""The preflight names the rank whose machine is unlike the others'."""

import shutil
from dataclasses import replace
from typing import Any

import pytest
from processes import python, ranks

from tools.preflight import Report, find_outliers

HEALTHY = Report(
    rank=0,
    host="",
    device="NVIDIA H100 80GB HBM3",
    driver="550.54",
    torch="2.13.0",
    clock_s=1.7e9,
    disk_gb=900.0,
    run_dir_seen="/shared",
    data="sound 1a2b3c4d",
    tflops=700.0,
    link_gb_s=45.0,
)


def reports(**changes: Any) -> list[Report]:
    """Eight ranks on two hosts; rank 5 differs."""
    rows = [replace(HEALTHY, rank=rank, host=f"node{rank // 4}") for rank in range(8)]
    rows[5] = replace(rows[5], **changes)
    return rows


def test_equal_machines_have_no_outliers():
    assert find_outliers(reports(), needed_gb=100) == []


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"device": "NVIDIA A100"}, "has device NVIDIA A100, most have NVIDIA H100"),
        ({"driver": "535.1"}, "has driver 535.1"),
        ({"clock_s": 1.7e9 + 7}, "'s clock is +7.0 s off"),
        ({"tflops": 310.0}, "multiplies at 310.00 TFLOP/s, the median is 700.00"),
        ({"link_gb_s": 3.0}, "is reached at 3.00 GB/s"),
        ({"data": "data/x: No such file or directory"}, "has data data/x: No such file"),
        ({"run_dir_seen": "/"}, "has run_dir_seen /"),
    ],
)
def test_the_rank_that_differs_is_named(changes, hint):
    (outlier,) = find_outliers(reports(**changes), needed_gb=100)
    assert outlier.startswith("rank 5 (node1)")
    assert hint in outlier


def test_what_all_ranks_lack_is_named_too():
    assert "needs 1000.0" in find_outliers(reports(), needed_gb=1000)[0]
    missing = [replace(row, data="data/x: No such file or directory") for row in reports()]
    assert len(find_outliers(missing, needed_gb=1)) == 8


PREFLIGHT = """
import time
import training
from nano416 import distributed
from nano416.config import parse_config, run_cli
from tools import preflight
preflight.SLOW_FRAC = 0  # other work on this machine must not make an outlier
real_time = time.time
time.time = lambda: real_time() + {late} * (distributed.rank() == 2)
run_cli(lambda: preflight.main(parse_config(training.Config)))
"""


def test_three_ranks_measure_each_other(data, tmp_path):
    command = ["-c", PREFLIGHT.format(late=0), f"--sources={data}", f"--run_dir={tmp_path / 'run'}"]
    lines = ranks(3, command).splitlines()
    assert [line.split()[0] for line in lines[:5]] == ["rank", "0", "1", "2", "all-reduce"]
    assert "3 ranks on 1 hosts agree" in lines[-1]
    assert all(float(word) > 0 for line in lines[1:4] for word in line.split()[4:7])
    assert not (tmp_path / "run").exists(), "something was written"


def test_a_clock_that_is_a_minute_late_is_named(data, tmp_path):
    command = ["-c", PREFLIGHT.format(late=60), f"--sources={data}", f"--run_dir={tmp_path / 'run'}"]
    with pytest.raises(AssertionError, match=r"rank 2 .*clock is \+60.0 s off"):
        ranks(3, command)


def test_a_damaged_shard_is_named(data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    shard = tmp_path / "data/train_000000.bin"
    content = bytearray(shard.read_bytes())
    content[5000] ^= 4
    shard.write_bytes(content)
    command = ["-c", PREFLIGHT.format(late=0), f"--sources={tmp_path / 'data'}", f"--run_dir={tmp_path}"]
    code, _, error = python(*command)
    assert code == 1
    assert "train_000000.bin is damaged" in error
    assert "Traceback" not in error
