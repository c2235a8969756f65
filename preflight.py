"""Before a long run: does every rank have the machine that the others have, and which one does not?

    torchrun --nnodes=2 ... training.py --preflight        # as the run itself will be started, half a minute

Each rank reports its host, GPU, driver and torch, its clock, the disk under run_dir, checksums of the shards (shared out
within a node, every byte is read once per node), the speed of a matmul, and of its links: to the next rank, and in an
all-reduce of all. Prints one line per rank, then what is odd; exits with 1 if anything is.
"""

import hashlib
import os
import shutil
import socket
import statistics
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

import distributed
from config import Failure
from shards import read_meta

SAME = ("device", "driver", "torch", "data", "run_dir_seen")  # must be the same on all ranks
CLOCK_S = 1.0  # clocks that differ by more make logs unreadable and certificates fail
SLOW = 0.75  # of the median speed: a throttled GPU, a bad cable, a busy core
MATMUL, MATMUL_CPU, EXCHANGED = 8192, 512, 2**28  # side of a square; bytes sent, as much as a bucket of large gradients
ROW = "{rank:>4}  {host:<14.14}  {device:<22.22}  {driver:<10}  {tflops:>8.2f}  {link_gb_s:>7.2f}  {disk_gb:>8.1f}  {data}"


def fly(dist: distributed.Dist, run_dir: str, sources: dict[str, float], disk_gb: float) -> None:
    """All ranks measure, rank 0 prints. Raises Failure naming what is odd. disk_gb: what the run will write."""
    facts = distributed.gather(measure(dist, run_dir, sources))
    speed = distributed.all_reduce_speed(dist.device, EXCHANGED if dist.device.type == "cuda" else EXCHANGED // 16)
    if dist.is_main:
        heads = {"tflops": "TFLOP/s", "link_gb_s": "GB/s", "disk_gb": "GB free"}
        names = ("rank", "host", "device", "driver", *heads, "data")
        print(ROW.replace(".2f", "").replace(".1f", "").format(**{name: heads.get(name, name) for name in names}))
        for row in facts:
            print(ROW.format(**row))
        print(f"all-reduce over {dist.world_size} ranks: {speed:.2f} GB/s per rank (bytes that cross each link)")
    if faults := oddities(facts, disk_gb):
        raise Failure("preflight: " + "; ".join(faults))
    if dist.is_main:
        print(f"{dist.world_size} ranks on {len({row['host'] for row in facts})} hosts agree")


def measure(dist: distributed.Dist, run_dir: str, sources: dict[str, float]) -> dict[str, Any]:
    """What one rank finds around itself."""
    folder = next(p for p in (Path(run_dir).absolute(), *Path(run_dir).absolute().parents) if p.exists())
    distributed.barrier()
    clock = time.time()
    return {
        "rank": dist.rank,
        "host": socket.gethostname(),
        "device": torch.cuda.get_device_name(dist.device) if dist.device.type == "cuda" else "cpu",
        "driver": driver(dist),
        "torch": str(torch.__version__),
        "clock_s": clock,
        "disk_gb": shutil.disk_usage(folder).free / 1e9,
        "run_dir_seen": str(folder),
        "data": "; ".join(checksums(source, dist) for source in sources),
        "tflops": matmul_tflops(dist.device),
        "link_gb_s": distributed.link_speed(dist.device, EXCHANGED if dist.device.type == "cuda" else EXCHANGED // 16),
    }


def driver(dist: distributed.Dist) -> str:
    """The GPU driver's version, "-" without one."""
    if dist.device.type != "cuda":
        return "-"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", f"--id={dist.local_rank}"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"none ({type(error).__name__})"


def checksums(source: str, dist: distributed.Dist) -> str:
    """Reads this rank's share of a node's shards. "sound" and what meta.json says, or the first fault."""
    try:
        meta = read_meta(Path(source))
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        faults = []
        for shard in meta["shards"][dist.local_rank :: ranks]:
            with open(Path(source, shard["file"]), "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != shard.get("sha256", found):
                faults.append(f"{source}/{shard['file']} is damaged")
    except (OSError, ValueError) as error:
        return f"{source}: {getattr(error, 'strerror', None) or error}"
    known = hashlib.sha256(str([(s["file"], s.get("sha256")) for s in meta["shards"]]).encode()).hexdigest()[:8]
    return faults[0] if faults else f"sound {known}"


def matmul_tflops(device: torch.device) -> float:
    """Speed of the best of ten matmuls, bf16 on a GPU."""
    n, dtype = (MATMUL, torch.bfloat16) if device.type == "cuda" else (MATMUL_CPU, torch.float32)
    a, times = torch.ones(n, n, device=device, dtype=dtype), []
    for _ in range(10):
        started = time.perf_counter()
        float((a @ a)[0, 0])  # waits for the device
        times.append(time.perf_counter() - started)
    return 2 * n**3 / min(times) / 1e12


def oddities(facts: list[dict[str, Any]], disk_gb: float) -> list[str]:
    """What sets single ranks apart, one line each: another machine than most have, a wrong clock, slowness, no room."""
    faults = []
    for key in SAME:
        usual = Counter(row[key] for row in facts).most_common(1)[0][0]
        faults += [f"{_who(row)} has {key} {row[key]}, most have {usual}" for row in facts if row[key] != usual]
    noon = statistics.median(row["clock_s"] for row in facts)
    for row in facts:
        if abs(row["clock_s"] - noon) > CLOCK_S:
            faults.append(f"{_who(row)}'s clock is {row['clock_s'] - noon:+.1f} s off the others'; start its NTP")
    for key, what in (("tflops", "multiplies at {:.2f} TFLOP/s"), ("link_gb_s", "is reached at {:.2f} GB/s")):
        usual = statistics.median(row[key] for row in facts)
        for row in facts:
            if row[key] < SLOW * usual:
                faults.append(f"{_who(row)} {what.format(row[key])}, the median is {usual:.2f}")
    if facts[0]["disk_gb"] < disk_gb:  # rank 0 writes
        faults.append(
            f"{_who(facts[0])} has {facts[0]['disk_gb']:.1f} GB free for run_dir, the run needs {disk_gb:.1f}"
        )
    broken = [row for row in facts if not row["data"].startswith("sound")]
    return faults or [f"{_who(row)}: {row['data']}" for row in broken]


def _who(row: dict[str, Any]) -> str:
    return f"rank {row['rank']} ({row['host']})"
