"""The only place that knows how many processes there are, and the only import of torch.distributed.

dist = distributed.init()                              # reads torchrun's environment; one process without it
model = distributed.parallelize(raw_model, dist, "ddp")
with distributed.no_sync(model, last=False): ...       # gradients stay local until the last micro-step
loss = distributed.mean(loss)                          # over ranks
distributed.shutdown()
"""

import contextlib
import gc
import inspect
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as torch_dist
import torch.nn as nn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel as DDP

Strategy = Literal["ddp"]
TIMEOUT_S = 600.0  # a rank silent for longer is dead: NCCL's own default; gloo would wait 30 minutes


@dataclass(frozen=True)
class Dist:
    """Who this process is."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def init(timeout_s: float = TIMEOUT_S) -> Dist:
    """Join torchrun's process group if there is one, and pick this rank's device.

    timeout_s: a rank that keeps the others waiting for longer ends the run.
    """
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    present = [name for name in names if name in os.environ]
    if not present:
        return Dist(device=torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"))
    if missing := [name for name in names if name not in os.environ]:
        raise ValueError(f"{present[0]} is set but {', '.join(missing)} is not; start several processes with torchrun")
    rank, local_rank, world_size = (int(os.environ[name]) for name in names)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"local rank {local_rank} has no GPU: torchrun started more processes than the "
                f"{torch.cuda.device_count()} visible GPUs; lower --nproc_per_node"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    torch_dist.init_process_group(
        backend, timeout=timedelta(seconds=timeout_s), device_id=device if device.type == "cuda" else None
    )
    return Dist(rank, local_rank, world_size, device)


def shutdown(code: int | None = None) -> None:
    """Leave the process group. With `code`, end the process at once as well.

    Gloo aborts in a quarter of interpreter exits while DDP's reducer is still alive (torch 2.13), turning a finished
    run into a failure; collecting it first, or leaving without the interpreter's teardown, avoids that.
    """
    gc.unfreeze()
    gc.collect()
    if torch_dist.is_initialized():
        torch_dist.destroy_process_group()
        if code is not None:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


def silent_ranks(patience_s: float = 5.0) -> str:
    """After a collective failed: which ranks do not answer. Every rank that lives calls it and signs in at the store."""
    store = torch_dist.distributed_c10d._get_default_store()  # torchrun's, beside the broken connections
    store.set(f"alive-{rank()}", "yes")
    time.sleep(patience_s)
    silent = [str(other) for other in range(world_size()) if not store.check([f"alive-{other}"])]
    return f"rank {', '.join(silent)} does not answer" if silent else "a rank was late"


def parallelize(model: nn.Module, dist: Dist, strategy: Strategy) -> nn.Module:
    """The module to call for training: `model` itself in one process, wrapped otherwise."""
    if dist.world_size == 1:
        return model
    assert strategy == "ddp"
    device_ids = [dist.local_rank] if dist.device.type == "cuda" else None
    # The buffers are constants. torch 2.13 has renamed the option and warns about the old name.
    renamed = "forward_sync_buffers" in inspect.signature(DDP).parameters
    buffers: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    return DDP(model, device_ids=device_ids, gradient_as_bucket_view=True, **buffers)


def no_sync(model: nn.Module, last: bool) -> contextlib.AbstractContextManager:
    """Around forward and backward of one micro-step: gradients are averaged over ranks only in the last one."""
    return model.no_sync() if isinstance(model, DDP) and not last else contextlib.nullcontext()


def mean(value: Tensor) -> Tensor:
    """Average over ranks."""
    return total(value) / world_size()


def total(value: Tensor) -> Tensor:
    """Sum over ranks."""
    if torch_dist.is_initialized():
        value = value.clone()
        torch_dist.all_reduce(value)
    return value


def spread(work: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
    """work(batch) for a batch [n, ...] that all ranks hold and whose items do not depend on each other: each does its share."""
    if world_size() == 1:
        return work(batch)
    n, share = len(batch), -(-len(batch) // world_size())
    mine = batch[rank() * share : (rank() + 1) * share]
    done = batch.new_empty(share * world_size(), *batch.shape[1:])
    padded = torch.cat([work(mine) if len(mine) else mine, done.new_zeros(share - len(mine), *batch.shape[1:])])
    torch_dist.all_gather_into_tensor(done, padded)
    return done[:n]


def largest(value: int) -> int:
    """The largest value on any rank. Goes over the CPU, so it never waits for a GPU."""
    if not torch_dist.is_initialized():
        return value
    box = torch.tensor(value)
    torch_dist.all_reduce(box, op=torch_dist.ReduceOp.MAX)
    return int(box)


def broadcast(value: Any) -> Any:
    """Rank 0's picklable value, on every rank."""
    if not torch_dist.is_initialized():
        return value
    box = [value]
    torch_dist.broadcast_object_list(box, src=0)
    return box[0]


def gather(value: Any) -> list[Any]:
    """Every rank's picklable value, in rank order, on every rank."""
    if not torch_dist.is_initialized():
        return [value]
    values: list[Any] = [None] * torch_dist.get_world_size()
    torch_dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Wait for all ranks."""
    if torch_dist.is_initialized():
        torch_dist.barrier()


def rank() -> int:
    """This process's number, 0 without torchrun."""
    return torch_dist.get_rank() if torch_dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes, 1 without torchrun."""
    return torch_dist.get_world_size() if torch_dist.is_initialized() else 1
