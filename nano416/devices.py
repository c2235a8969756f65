"""Questions about a device, one answer each.

device = pick_device()                          # cuda if there is one, else cpu
autocast(device, torch.bfloat16)                # matmuls in bf16 around fp32 weights
memory_gb(device); peak_memory_gb(device)       # GB = 1e9 bytes
"""

import contextlib
import os
import resource
import sys

import torch


def pick_device(name: str | None = None) -> torch.device:
    """The device called `name`, or the first GPU, or the CPU. Raises ValueError if it cannot be used."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        # Naming a device proves nothing: torch.device("cuda:7") works on every machine.
        torch.empty(1, device=name)
    # A torch built without CUDA raises AssertionError.
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return torch.device(name)


def device_name(device: torch.device) -> str:
    """The GPU's name, such as "NVIDIA H100 80GB HBM3", or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def memory_gb(device: torch.device) -> float:
    """Total memory of this GPU, or of this machine for a CPU, in GB."""
    if device.type == "cuda":
        _, total = torch.cuda.mem_get_info(device)
        return total / 1e9
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9


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
