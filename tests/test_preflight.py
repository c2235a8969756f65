"""The preflight names the rank whose machine is unlike the others'."""

import shutil
from typing import Any

import pytest
from processes import python, ranks

import preflight

WELL = {"device": "NVIDIA H100 80GB HBM3", "driver": "550.54", "torch": "2.13.0", "data": "sound 1a2b3c4d"}
WELL |= {"run_dir_seen": "/shared", "clock_s": 1.7e9, "disk_gb": 900.0, "tflops": 700.0, "link_gb_s": 45.0}


def fleet(**odd: Any) -> list[dict[str, Any]]:
    """Eight ranks on two hosts; rank 5 differs."""
    facts = [{**WELL, "rank": rank, "host": f"node{rank // 4}"} for rank in range(8)]
    facts[5].update(odd)
    return facts


def test_equal_machines_have_no_oddities():
    assert preflight.oddities(fleet(), disk_gb=100) == []


@pytest.mark.parametrize(
    ("odd", "hint"),
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
def test_the_odd_one_out_is_named(odd, hint):
    (fault,) = preflight.oddities(fleet(**odd), disk_gb=100)
    assert fault.startswith("rank 5 (node1)")
    assert hint in fault


def test_what_all_lack_is_said_too():
    assert "needs 1000.0" in preflight.oddities(fleet(), disk_gb=1000)[0]
    missing = [{**row, "data": "data/x: No such file or directory"} for row in fleet()]
    assert len(preflight.oddities(missing, disk_gb=1)) == 8


FAULTY = """
import time, distributed, preflight, training
from config import parse_config, run
preflight.SLOW = 0  # other work on this machine must not be an oddity
real = time.time
time.time = lambda: real() + {late} * (distributed.rank() == 2)
run(lambda: training.main(parse_config(training.Config)))
"""


@pytest.mark.parametrize("late", [0, 60])
def test_three_ranks_measure_each_other(data, tmp_path, late):
    shutil.copytree(data, tmp_path / "data")
    command = [
        "-c",
        FAULTY.format(late=late),
        "--preflight",
        f"--sources={tmp_path / 'data'}",
        f"--run_dir={tmp_path / 'r'}",
    ]
    if late:
        with pytest.raises(AssertionError, match=r"rank 2 .*clock is \+60.0 s off"):
            ranks(3, command)
        return
    said = ranks(3, command).splitlines()
    assert [line.split()[0] for line in said[:5]] == [
        "rank",
        "0",
        "1",
        "2",
        "all-reduce",
    ] and "3 ranks on 1 hosts agree" in said[-1]
    assert all(float(word) > 0 for line in said[1:4] for word in line.split()[4:7])
    assert not (tmp_path / "r").exists(), "nothing is written"


def test_a_damaged_shard_is_named(data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    shard = tmp_path / "data/train_000000.bin"
    raw = bytearray(shard.read_bytes())
    raw[5000] ^= 4
    shard.write_bytes(raw)
    code, _, error = python("training.py", "--preflight", f"--sources={tmp_path / 'data'}", f"--run_dir={tmp_path}")
    assert code == 1 and "train_000000.bin is damaged" in error and "Traceback" not in error
