"""Before a long run: which ranks differ from the others in machine, data or speed?

    torchrun --standalone --nproc_per_node=8 -m tools.preflight configs/my.toml    # the options of training.py
    torchrun --nnodes=2 ... -m tools.preflight --run_dir=runs/mine --sources=data/mine

Takes the config file and the options of the run, on the ranks of the run, for half a minute. Each rank reports its
host, GPU, driver and torch, its clock, the disk under run_dir, the checksums of its part of the node's shards, the
speed of a matmul, and of its links: to the neighbouring ranks, and in an all-reduce of all. Prints a line per rank,
then the outliers; exits with 1 if there are any. Writes nothing.
"""

import hashlib
import math
import os
import shutil
import socket
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

import training
from nano416 import distributed
from nano416.config import Failure, parse_config, run_cli
from nano416.dataset import read_meta
from nano416.devices import device_name
from nano416.distributed import Dist

# What must be the same on all ranks.
EQUAL_FIELDS = ("device", "driver", "torch", "data", "run_dir_seen")
# Clocks further apart make logs unreadable and certificates fail.
MAX_CLOCK_SKEW_S = 1.0
# Fraction of the median speed below which a rank is slow: a throttled GPU, a bad cable, a busy core.
SLOW_FRAC = 0.75
# Sides of the square matrices.
MATMUL_SIZE_GPU = 8192
MATMUL_SIZE_CPU = 512
# Bytes per message: like the gradients of a large model, so that bandwidth and not latency counts.
MESSAGE_BYTES_GPU = 2**28
MESSAGE_BYTES_CPU = 2**24


@dataclass(frozen=True)
class Report:
    """What one rank has measured."""

    rank: int
    host: str
    device: str
    driver: str  # version of the GPU driver, "-" on a CPU
    torch: str
    clock_s: float  # when all ranks left a barrier
    disk_gb: float  # free space under run_dir
    run_dir_seen: str  # the part of run_dir that exists
    data: str  # "sound" and a fingerprint of the sources, or the first fault
    tflops: float
    link_gb_s: float

    @property
    def name(self) -> str:
        return f"rank {self.rank} ({self.host})"


def run(dist: Dist, run_dir: str, sources: list[str], needed_gb: float) -> None:
    """Measure on all ranks and print on rank 0. Raises Failure that names the outliers.

    needed_gb: disk space that the run will take.
    """
    reports = distributed.all_gather_object(measure(dist, run_dir, sources))
    speed = all_reduce_speed(dist)
    if dist.is_main:
        print(f"rank  {'host':<14}  {'device':<22}  {'driver':<10}   TFLOP/s     GB/s   GB free  data")
        for r in reports:
            print(
                f"{r.rank:>4}  {r.host:<14.14}  {r.device:<22.22}  {r.driver:<10}  {r.tflops:>8.2f}  "
                f"{r.link_gb_s:>7.2f}  {r.disk_gb:>8.1f}  {r.data}"
            )
        print(f"all-reduce over {dist.world_size} ranks: {speed:.2f} GB/s per rank (bytes that cross each link)")
    outliers = find_outliers(reports, needed_gb)
    if outliers:
        raise Failure("preflight: " + "; ".join(outliers))
    if dist.is_main:
        hosts = {report.host for report in reports}
        print(f"{dist.world_size} ranks on {len(hosts)} hosts agree")


def find_outliers(reports: list[Report], needed_gb: float) -> list[str]:
    """What sets single ranks apart, one line each, or what all of them lack."""
    outliers = []
    for field in EQUAL_FIELDS:
        usual = Counter(getattr(report, field) for report in reports).most_common(1)[0][0]
        for report in reports:
            value = getattr(report, field)
            if value != usual:
                outliers.append(f"{report.name} has {field} {value}, most have {usual}")
    clock = statistics.median(report.clock_s for report in reports)
    for report in reports:
        if abs(report.clock_s - clock) > MAX_CLOCK_SKEW_S:
            outliers.append(f"{report.name}'s clock is {report.clock_s - clock:+.1f} s off the others'; start its NTP")
    tflops = statistics.median(report.tflops for report in reports)
    for report in reports:
        if report.tflops < SLOW_FRAC * tflops:
            outliers.append(f"{report.name} multiplies at {report.tflops:.2f} TFLOP/s, the median is {tflops:.2f}")
    link_gb_s = statistics.median(report.link_gb_s for report in reports)
    for report in reports:
        if report.link_gb_s < SLOW_FRAC * link_gb_s:
            outliers.append(f"{report.name} is reached at {report.link_gb_s:.2f} GB/s, the median is {link_gb_s:.2f}")
    # Only rank 0 writes to run_dir.
    if reports[0].disk_gb < needed_gb:
        outliers.append(
            f"{reports[0].name} has {reports[0].disk_gb:.1f} GB free for run_dir, the run needs {needed_gb:.1f}"
        )
    # A fault that all ranks have makes none of them an outlier.
    return outliers or [f"{r.name}: {r.data}" for r in reports if not r.data.startswith("sound")]


# ---- Measuring -------------------------------------------------------------------------------------------------------


def measure(dist: Dist, run_dir: str, sources: list[str]) -> Report:
    """This rank's report. All ranks call it."""
    run_path = Path(run_dir).absolute()
    existing = next(path for path in (run_path, *run_path.parents) if path.exists())
    distributed.barrier()
    clock_s = time.time()
    return Report(
        rank=dist.rank,
        host=socket.gethostname(),
        device=device_name(dist.device),
        driver=driver_version(dist),
        torch=str(torch.__version__),
        clock_s=clock_s,
        disk_gb=shutil.disk_usage(existing).free / 1e9,
        run_dir_seen=str(existing),
        data="; ".join(check_shards(source, dist) for source in sources),
        tflops=matmul_tflops(dist.device),
        link_gb_s=link_speed(dist),
    )


def driver_version(dist: Dist) -> str:
    """The GPU driver's version, "-" on a CPU."""
    if dist.device.type != "cuda":
        return "-"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", f"--id={dist.local_rank}"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"none ({type(error).__name__})"


def check_shards(source: str, dist: Dist) -> str:
    """Read this rank's part of a folder's shards, so that a node reads all of them once. Returns Report.data."""
    damaged = []
    try:
        shards = read_meta(Path(source))["shards"]
        local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        for shard in shards[dist.local_rank :: local_world_size]:
            with open(Path(source, shard["file"]), "rb") as file:
                checksum = hashlib.file_digest(file, "sha256").hexdigest()
            if checksum != shard.get("sha256", checksum):
                damaged.append(f"{source}/{shard['file']} is damaged")
    except (OSError, ValueError) as error:
        return f"{source}: {getattr(error, 'strerror', None) or error}"
    if damaged:
        return damaged[0]
    identity = [(shard["file"], shard.get("sha256")) for shard in shards]
    return f"sound {hashlib.sha256(str(identity).encode()).hexdigest()[:8]}"


def fastest(work: Callable[[], torch.Tensor], tries: int, start: Callable[[], None] = lambda: None) -> float:
    """Seconds of the fastest of several calls that return a tensor. The first ones connect and allocate."""
    times = []
    for _ in range(tries):
        start()
        started = time.perf_counter()
        # Reading an element waits for the device.
        work().flatten()[0].item()
        times.append(time.perf_counter() - started)
    return min(times)


def matmul_tflops(device: torch.device) -> float:
    """Speed of a matmul, bf16 on a GPU and fp32 on a CPU."""
    on_gpu = device.type == "cuda"
    n = MATMUL_SIZE_GPU if on_gpu else MATMUL_SIZE_CPU
    a = torch.ones(n, n, device=device, dtype=torch.bfloat16 if on_gpu else torch.float32)
    return 2 * n**3 / fastest(lambda: a @ a, tries=10) / 1e12


def link_speed(dist: Dist) -> float:
    """GB/s at which this rank sends and receives at once, with the better of its two neighbours; inf for one rank.

    The better one, because a slow rank is slow with both, and a neighbour of a slow rank only with that one.
    """
    message = _message(dist.device)
    speeds = []
    # First the pairs (0, 1), (2, 3), ..., then (1, 2), (3, 4), ..., (n - 1, 0).
    for shift in (0, 1):
        is_left = (dist.rank + shift) % 2 == 0
        neighbour = (dist.rank + (1 if is_left else -1)) % dist.world_size
        # With an odd number of ranks, one at the end of the row has no partner.
        alone = dist.world_size % 2 == 1 and dist.rank == (0 if shift else dist.world_size - 1)
        if not alone:
            seconds = fastest(partial(distributed.exchange, message, neighbour), tries=3)
            speeds.append(message.nbytes / seconds / 1e9)
    return max(speeds, default=math.inf)


def all_reduce_speed(dist: Dist) -> float:
    """GB/s over each link during an all-reduce (NCCL's "bus bandwidth"); inf for one rank."""
    if dist.world_size == 1:
        return math.inf
    message = _message(dist.device)
    seconds = fastest(lambda: distributed.all_reduce_sum_(message), tries=4, start=distributed.barrier)
    # A ring moves 2 (n - 1) / n of the bytes over each link.
    return 2 * (dist.world_size - 1) / dist.world_size * message.nbytes / seconds / 1e9


def _message(device: torch.device) -> torch.Tensor:
    n_bytes = MESSAGE_BYTES_GPU if device.type == "cuda" else MESSAGE_BYTES_CPU
    return torch.zeros(n_bytes // 4, device=device)


def main(cfg: training.Config) -> None:
    """Check the ranks for a run with this config."""
    dist = distributed.init(cfg.train.timeout, cfg.train.parallel, cfg.train.tensor_parallel)
    # Two checkpoints, the newest and the one before it: weights and two moments in fp32.
    model = replace(cfg.model, vocab_size=cfg.model.vocab_size or training.GPT2_VOCAB_SIZE)
    needed_gb = 2 * 12 * model.num_params() / 1e9
    try:
        run(dist, cfg.train.run_dir, list(cfg.data.sources), needed_gb)
    except RuntimeError as error:
        is_collective = any(backend in str(error).lower() for backend in ("gloo", "nccl"))
        if dist.world_size == 1 or not is_collective:
            raise
        raise Failure(f"preflight: {distributed.silent_ranks()} (--timeout={cfg.train.timeout:g})") from error
    distributed.shutdown()


if __name__ == "__main__":
    run_cli(lambda: main(parse_config(training.Config)))
