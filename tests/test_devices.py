"""Memory as a process has it: of the machine, or of the container that it runs in."""

from pathlib import Path

import pytest
import torch

from nano416 import devices

GB = 10**9


def write_files(folder: Path, **contents: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in contents.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


@pytest.fixture
def mount(tmp_path) -> Path:
    return tmp_path / "sys"


def limits(mount: Path, membership: str) -> list[tuple[int, int]]:
    path = mount.parent / "cgroup"
    path.write_text(membership)
    return devices.cgroup_memory(path, mount)


def test_every_cgroup_around_a_process_limits_it(mount):
    """Version 2: a job with a limit in a slice with another, in a root without."""
    cache = "anon 1\ninactive_file 1000000000"
    write_files(mount, memory__current=90 * GB, memory__stat=cache)
    write_files(mount / "slice", memory__max=64 * GB, memory__high="max", memory__current=9 * GB, memory__stat=cache)
    write_files(
        mount / "slice/job", memory__max="max", memory__high=32 * GB, memory__current=5 * GB, memory__stat=cache
    )
    assert limits(mount, "0::/slice/job\n") == [(32 * GB, 4 * GB), (64 * GB, 8 * GB)]
    assert limits(mount, "0::/slice\n") == [(64 * GB, 8 * GB)]
    assert limits(mount, "0::/\n") == []


def test_a_container_whose_cgroup_is_mounted_as_the_root_is_limited_too(mount):
    write_files(mount, memory__max=8 * GB, memory__current=3 * GB, memory__stat="inactive_file 0")
    for membership in ("0::/\n", "0::/docker/0123456789ab\n", "0::/../../other\n"):
        assert limits(mount, membership) == [(8 * GB, 3 * GB)]


def test_version_1_has_a_tree_per_controller(mount):
    files = {"memory.usage_in_bytes": 3 * GB, "memory.stat": f"total_inactive_file {GB}"}
    files["memory.limit_in_bytes"] = 16 * GB
    write_files(mount / "memory/slurm/job_7", **{name.replace(".", "__"): value for name, value in files.items()})
    assert limits(mount, "12:cpu,cpuacct:/x\n5:memory:/slurm/job_7\n0::/\n") == [(16 * GB, 2 * GB)]


def test_a_system_without_cgroups_has_the_memory_of_the_machine(tmp_path):
    assert devices.cgroup_memory(tmp_path / "absent", tmp_path) == []


def test_the_smallest_limit_counts(monkeypatch):
    cpu = torch.device("cpu")
    machine = devices.memory_gb(cpu)
    assert 0 < devices.free_host_memory_gb() <= machine
    monkeypatch.setattr(devices, "cgroup_memory", lambda: [(2 * 10**8, 10**8), (3 * 10**8, 25 * 10**7)])
    assert devices.memory_gb(cpu) == pytest.approx(0.2)
    assert devices.free_host_memory_gb() == pytest.approx(0.05)
    monkeypatch.setattr(devices, "cgroup_memory", lambda: [(2 * 10**8, 3 * 10**8)])
    assert devices.free_host_memory_gb() == 0
