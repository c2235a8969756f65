"""Questions about a device, one answer each.

device = pick_device()                          # cuda if there is one, else cpu
autocast(device, torch.bfloat16)                # matmuls in bf16 around fp32 weights
memory_gb(device); peak_memory_gb(device)       # GB = 1e9 bytes
free_host_memory_gb()                           # what this process can still get
"""

import contextlib
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

# Files of Linux; other systems have none of them.
MEMINFO = Path("/proc/meminfo")
CGROUP_MEMBERSHIP = Path("/proc/self/cgroup")
CGROUP_MOUNT = Path("/sys/fs/cgroup")


def pick_device(name: str | None = None) -> torch.device:
    """The device called `name`, or the first GPU, or the CPU. Raises ValueError if it cannot be used."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        # Naming a device proves nothing: torch.device("cuda:7") works on every machine. Nor does memory on "meta".
        torch.empty(1, device=name).cpu()
    # A torch built without CUDA raises AssertionError, without another backend ImportError.
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(f"device {name!r} cannot be used here: {str(error).splitlines()[0][:200]}") from error
    return torch.device(name)


def device_name(device: torch.device) -> str:
    """The GPU's name, such as "NVIDIA H100 80GB HBM3", or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def memory_gb(device: torch.device) -> float:
    """Total memory of this GPU, or for a CPU of this machine or of the container that this process runs in, in GB."""
    if device.type == "cuda":
        _, total = torch.cuda.mem_get_info(device)
        return total / 1e9
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([physical, *(limit for limit, _ in cgroup_memory())]) / 1e9


def free_host_memory_gb() -> float:
    """Host memory that this process can still get in GB: what is free on the machine and within every cgroup limit."""
    free = [1e9 * memory_gb(torch.device("cpu"))]
    free += [limit - used for limit, used in cgroup_memory()]
    if MEMINFO.exists():
        fields = dict(line.split(":") for line in MEMINFO.read_text().splitlines())
        # With what Linux would take from its file cache.
        free.append(1024 * int(fields["MemAvailable"].removesuffix("kB")))
    return max(0, min(free)) / 1e9


def cgroup_memory(membership: Path = CGROUP_MEMBERSHIP, mount: Path = CGROUP_MOUNT) -> list[tuple[int, int]]:
    """(limit, bytes in use) of this process's memory cgroup and of each one around it, where there is a limit.

    Containers and Slurm limit memory in this way: the kernel ends a process that takes more, whatever the machine has.
    """
    if not membership.exists():
        return []
    limits = []
    for line in membership.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            # Version 2: one tree. memory.high slows a process down until it gives memory back.
            limits += _read_limits(mount, path, ("memory.max", "memory.high"), "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes",)
            limits += _read_limits(mount / "memory", path, names, "memory.usage_in_bytes", "total_inactive_file")
    return limits


def _read_limits(
    root: Path, path: str, limit_names: tuple[str, ...], usage_name: str, cache_name: str
) -> Iterator[tuple[int, int]]:
    """(limit, bytes in use) of each cgroup from `root` down to `path` that has a limit."""
    # In a container `path` may be the host's name of a folder that is mounted as `root`.
    innermost = root / path.lstrip("/")
    for folder in [innermost, *(parent for parent in innermost.parents if parent.is_relative_to(root))]:
        limits = [_read_number(folder / name) for name in limit_names]
        limits = [limit for limit in limits if limit is not None]
        used = _read_number(folder / usage_name)
        if not limits or used is None:
            continue
        # File cache that was not used lately counts as used but is given back when needed; Kubernetes subtracts it too.
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        yield min(limits), used - int(statistics.get(cache_name, 0))


def _read_number(path: Path) -> int | None:
    """The number in a kernel file; None if it says `max` (no limit) or cannot be read."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return None if text == "max" else int(text)


def peak_memory_gb(device: torch.device) -> float:
    """The most memory reserved on this GPU so far, or resident in this process on a CPU, in GB."""
    if device.type == "cuda":
        # Reserved and not allocated: what torch's allocator holds is what other programs cannot have.
        return torch.cuda.max_memory_reserved(device) / 1e9
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def supports_bf16(device: torch.device) -> bool:
    """True where bf16 matmuls are faster than fp32's: on a GPU, and on a CPU with instructions for them (4.5x)."""
    if device.type == "cuda":
        return True
    # Private in torch 2.11 to 2.13, which have no public way to ask for a CPU's instructions.
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work. On a CPU nothing is pending, since calls return when it is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def autocast(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager:
    """Matmuls in `dtype` around fp32 weights; None changes nothing."""
    return torch.autocast(device.type, dtype) if dtype is not None else contextlib.nullcontext()
