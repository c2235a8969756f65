"""The only place that knows how many processes there are, and the only import of torch.distributed.

dist = distributed.init(strategy="fsdp")               # reads torchrun's environment; one process without it
raw_model = distributed.build(make_model, dist)        # the weights, whole or this rank's part of them
model = distributed.parallelize(raw_model, dist)       # what training calls
with distributed.no_sync(model, last=False): ...       # gradients stay local until the last micro-step
loss = distributed.mean(loss)                          # over ranks
distributed.shutdown()

How processes share the work (--parallel), with torch's own DistributedDataParallel, fully_shard and parallelize_module:

    ddp   every rank holds all weights and sees other data; gradients are averaged
    fsdp  weights, gradients and optimizer state are cut into as many parts as there are ranks; a layer's weights are
          together only while it is at work
    hsdp  the same within a node, copies of that on the nodes: slower links carry gradients only
    --tensor_parallel=N, with fsdp or hsdp: N neighbours share each matrix product of a layer and see the same data
"""

import contextlib
import functools
import gc
import inspect
import math
import os
import pickle
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as torch_dist
import torch.nn as nn
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

Strategy = Literal["ddp", "fsdp", "hsdp"]
Recompute = Literal["none", "selective", "full"]
DEAR = [  # results that selective recomputing keeps: matmuls and every kind of attention
    torch.ops.aten.mm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
]
_writers: Any = None  # a process group of its own for save_parts: the loop talks over the other one meanwhile
_neighbours = 1  # tensor_parallel of this process, beside torch's own state of the process group
TIMEOUT_S = 600.0  # a rank silent for longer is dead: NCCL's own default; gloo would wait 30 minutes


@dataclass(frozen=True)
class Dist:
    """Who this process is."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    shards: int = 1  # ranks among which fully_shard divides weights, gradients and optimizer state
    tensor_parallel: int = 1  # ranks that share each matrix product and see the same data
    sharded: bool = False  # by fully_shard, even if into one part

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def parts(self) -> int:
        """Into how many parts weights, gradients and optimizer state are cut; tensor_parallel cuts nearly all."""
        return self.shards * self.tensor_parallel

    @property
    def data_rank(self) -> int:
        """Which share of the data this rank sees, of `data_size`."""
        return self.rank // self.tensor_parallel

    @property
    def data_size(self) -> int:
        return self.world_size // self.tensor_parallel


def init(timeout_s: float = TIMEOUT_S, strategy: Strategy = "ddp", tensor_parallel: int = 1) -> Dist:
    """Join torchrun's process group if there is one, and pick this rank's device.

    timeout_s: a rank that keeps the others waiting for longer ends the run.
    """
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    present = [name for name in names if name in os.environ]
    check_layout(strategy, tensor_parallel, int(os.environ.get("WORLD_SIZE", 1)), _local_world_size())
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
    global _neighbours
    _neighbours = tensor_parallel
    parts = {"ddp": 1, "fsdp": world_size // tensor_parallel, "hsdp": _local_world_size() // tensor_parallel}[strategy]
    return Dist(rank, local_rank, world_size, device, parts, tensor_parallel, strategy != "ddp")


def check_layout(strategy: Strategy, tensor_parallel: int, world_size: int, local_world_size: int) -> None:
    """Raise ValueError unless so many processes can be arranged as asked."""
    if tensor_parallel > 1 and strategy == "ddp":
        raise ValueError(f"tensor_parallel ({tensor_parallel}) goes with --parallel=fsdp or hsdp, not with ddp")
    if local_world_size % tensor_parallel:  # its traffic is heavy: never between nodes
        raise ValueError(
            f"tensor_parallel ({tensor_parallel}) must divide the processes of a node ({local_world_size}); "
            "start more with torchrun --nproc_per_node"
        )
    if strategy == "hsdp" and world_size % local_world_size:
        raise ValueError(f"hsdp needs as many processes on every node; {world_size} are not nodes x {local_world_size}")


def _local_world_size() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", 1)))


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


def build(
    make: Callable[[], nn.Module], dist: Dist, dtype: torch.dtype | None = None, cpu_offload: bool = False
) -> nn.Module:
    """The model that `make` creates, on this rank's device: all of it, or this rank's part under fsdp and hsdp.

    Sharded, only rank 0 ever holds the whole, in its host's memory; the others' parts come from there.
    dtype: of the weights that the ranks exchange and multiply by; those they keep are fp32. cpu_offload: they keep them,
    gradients and optimizer state in host memory, and the optimizer steps there.
    """
    if cpu_offload and (not dist.sharded or dist.world_size == 1):
        raise ValueError("cpu_offload goes with --parallel=fsdp or hsdp and several processes")
    if not dist.sharded or dist.world_size == 1:
        return make().to(dist.device)
    with torch.device("meta"):
        model: Any = make()
    shard(model, dist, dtype, CPUOffloadPolicy(dist.device.type == "cuda") if cpu_offload else OffloadPolicy())
    model.to_empty(device="cpu" if cpu_offload else dist.device)
    with dist.device:
        model.build_tables()
    weights = make().state_dict() if dist.is_main else {}
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    return model


def shard(model: Any, dist: Dist, dtype: torch.dtype | None, offload: OffloadPolicy) -> None:
    """Cut a Transformer's weights in place: first across tensor_parallel neighbours, then across `dist.shards` ranks."""
    shape = (dist.data_size // dist.shards, dist.shards, dist.tensor_parallel)
    mesh = init_device_mesh(dist.device.type, shape, mesh_dim_names=("replicate", "shard", "tensor"))
    if dist.tensor_parallel > 1:
        for block in model.layers:
            split_products(block, mesh["tensor"])
    copies = mesh["replicate", "shard"] if shape[0] > 1 else mesh["shard"]
    narrow = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.layers:  # the gains stay with the root: in bf16 they would lose digits for nothing
        both = [block.self_attn, block.mlp]
        fully_shard(both, mesh=copies, mp_policy=narrow, offload_policy=offload, shard_placement_fn=_other_dim)
    fully_shard(model, mesh=copies, offload_policy=offload)


def split_products(block: Any, mesh: DeviceMesh) -> None:
    """Tensor parallelism of one block: each rank has some heads and some of the hidden units, sums meet at the outputs.

    What the block's norms hand on stays a DTensor: the gradients of the products behind it are added up, then reduced
    once. Four all-reduces of [B, T, D] per block and micro-step; one per product would be seven.
    """
    outputs = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    parallelize_module(block, mesh, {name: ColwiseParallel() for name in outputs})
    parallelize_module(block, mesh, {name: RowwiseParallel() for name in ("self_attn.o_proj", "mlp.down_proj")})
    for norm, placement in (
        (block.self_attn.q_norm, Shard(1)),  # [B, N, T, H]: this rank's heads
        (block.self_attn.k_norm, Shard(1)),
        (block.input_layernorm, Replicate()),
        (block.post_attention_layernorm, Replicate()),
    ):
        if norm is not None:
            leave = (lambda module, out, mesh: out.to_local()) if placement == Shard(1) else None
            distribute_module(norm, mesh, None, _enter(placement), leave)


def _enter(placement: Any) -> Callable:
    return lambda module, inputs, mesh: DTensor.from_local(inputs[0], mesh, [placement], run_check=False)


def _other_dim(parameter: nn.Parameter) -> Shard | None:
    """The dimension that tensor parallelism has left whole; None means the first."""
    split = isinstance(parameter, DTensor) and any(p.is_shard(0) for p in parameter.placements)
    return Shard(1) if split else None


def recompute(model: Any, policy: Recompute) -> None:
    """Keep less of each block for the backward pass, in place, and compute the rest again there.

    full: only the block's input is kept, for a third more computing. selective: also the results of matmuls and
    attention, so that only what is cheap is done twice (arXiv:2205.05198).
    """
    if policy == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # nothing in a block is random
    if policy == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, DEAR)
    for block in model.layers:
        block.forward = functools.partial(checkpoint, block.forward, **options)


def parallelize(model: nn.Module, dist: Dist) -> nn.Module:
    """The module to call for training: `model` itself in one process or sharded, wrapped under ddp."""
    if dist.world_size == 1 or dist.sharded:
        return model
    device_ids = [dist.local_rank] if dist.device.type == "cuda" else None
    # The buffers are constants. torch 2.13 has renamed the option and warns about the old name.
    renamed = "forward_sync_buffers" in inspect.signature(DDP).parameters
    buffers: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    return DDP(model, device_ids=device_ids, gradient_as_bucket_view=True, **buffers)


def save_parts(tensors: dict[str, Any], folder: Path) -> Any:
    """Begin to write every rank's part of (sharded) tensors into a folder: a copy now, the rest in the background.

    Returns a future; when rank 0's is done all ranks' parts are on the disk.
    """
    global _writers
    _writers = _writers or torch_dist.new_group(backend="gloo")
    return state_dict_saver.async_save(tensors, checkpoint_id=folder, process_group=_writers)


def load_parts(tensors: dict[str, Any], folder: Path) -> None:
    """Fill (sharded) tensors in place with what any number of ranks wrote; each rank reads only what it holds."""
    shapes = shapes_of_parts(folder)
    if wrong := [name for name, tensor in tensors.items() if shapes.get(name) != tensor.shape]:
        raise ValueError(f"{folder} does not fit the model: {', '.join(wrong[:4])} differ ({len(wrong)} in all)")
    state_dict_loader.load(tensors, checkpoint_id=folder, no_dist=True)


def shapes_of_parts(folder: Path) -> dict[str, torch.Size]:
    """Name and whole shape of the tensors that `save_parts` wrote. ValueError for an index that is not one."""
    try:
        with open(folder / ".metadata", "rb") as file:
            stored = _Index(file).load().state_dict_metadata
    except Exception as error:  # whatever a damaged pickle raises
        raise ValueError(f"cannot read checkpoint {folder}: {getattr(error, 'strerror', None) or error}") from error
    return {name: item.size for name, item in stored.items() if hasattr(item, "size")}


class _Index(pickle.Unpickler):
    """torch would unpickle the index without looking: this reads it first, and knows only what belongs in one."""

    def find_class(self, module: str, name: str) -> Any:
        data_types = module in ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
        harmless = isinstance(getattr(torch, name, None), torch.dtype) or name in ("Size", "_get_layout", "PosixPath")
        if (data_types and "." not in name) or (module in ("torch", "torch.serialization", "pathlib") and harmless):
            return super().find_class(module, name)
        raise ValueError(f"its index names {module}.{name}, which could run code")


def no_sync(model: nn.Module, last: bool) -> contextlib.AbstractContextManager:
    """Around forward and backward of one micro-step: gradients are averaged over ranks only in the last one.

    Sharded gradients meet in every micro-step, or each rank would hold them whole; hsdp's nodes meet in the last one.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(last)
    return model.no_sync() if isinstance(model, DDP) and not last else contextlib.nullcontext()


@contextlib.contextmanager
def evaluating(model: nn.Module, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Inside, parts of the model (`hidden`, `head`) may be called by themselves, as often on every rank.

    dtype: what `build` was given. Blocks that are compiled for training's shape run uncompiled.
    """
    if not isinstance(model, FSDPModule):
        yield
        return
    model.unshard()
    narrow = torch.autocast(next(model.parameters()).device.type, dtype) if dtype else contextlib.nullcontext()
    with torch.compiler.set_stance("force_eager"), narrow:
        yield
    model.reshard()  # the next step will have other weights


def is_sharded(model: nn.Module) -> bool:
    """True if each rank holds a part of the weights."""
    return isinstance(model, FSDPModule)


def whole(value: Any) -> Any:
    """Nested state with its sharded tensors put together, in rank 0's host memory; all ranks call it."""
    if isinstance(value, DTensor):
        full = value.full_tensor()
        return full.cpu() if rank() == 0 else None
    return {name: whole(item) for name, item in value.items()} if isinstance(value, dict) else value


def part_like(full: Tensor, like: Tensor) -> Tensor:
    """A copy of a tensor that all ranks hold, placed and cut as `like` is."""
    full = full.detach().to(like.device, copy=True)
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None) if isinstance(like, DTensor) else full  # fmt: skip


def mean(value: Tensor) -> Tensor:
    """Average over ranks."""
    return total(value) / world_size()


def total(value: Tensor) -> Tensor:
    """Sum over ranks."""
    if torch_dist.is_initialized():
        value = value.clone()
        torch_dist.all_reduce(value)
    return value


def spread(work: Callable[[Tensor], Tensor], batch: Tensor, like: Tensor | None = None) -> Tensor:
    """work(batch) for a batch [n, ...] whose items do not depend on each other: each rank does its share of them.

    All ranks hold the batch, or the part of each item that they hold of `like`; the result is cut in the same way.
    """
    if world_size() == 1:
        return work(batch)
    if isinstance(like, DTensor):
        return _spread_parts(work, batch, like)
    n, share = len(batch), -(-len(batch) // world_size())
    mine = batch[rank() * share : (rank() + 1) * share]
    done = batch.new_empty(share * world_size(), *batch.shape[1:])
    padded = torch.cat([work(mine) if len(mine) else mine, done.new_zeros(share - len(mine), *batch.shape[1:])])
    torch_dist.all_gather_into_tensor(done, padded)
    return done[:n]


def _spread_parts(work: Callable[[Tensor], Tensor], parts: Tensor, like: DTensor) -> Tensor:
    """Parts of all items become some items as a whole (all-to-all), `work`, and back."""
    shape = torch.Size((len(parts), *like.shape))
    stride = torch.empty(shape, device="meta").stride()
    within = [Shard(p.dim + 1) if isinstance(p, Shard) else p for p in like.placements]  # dimension 0 counts items
    batch = DTensor.from_local(parts, like.device_mesh, within, shape=shape, stride=stride, run_check=False)
    items = batch.redistribute(placements=[Shard(0)] * len(within))
    mine = items.to_local()
    done = work(mine) if len(mine) else mine
    done = DTensor.from_local(done, items.device_mesh, items.placements, shape=shape, stride=stride, run_check=False)
    return done.redistribute(placements=within).to_local()


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


def share(items: list, filler: Any) -> list:
    """This rank's share of a list, in turn, as long as every other rank's; tensor_parallel neighbours have the same."""
    n = world_size() // _neighbours
    return [*items, *[filler] * (-len(items) % n)][rank() // _neighbours :: n]


def gather_shares(value: Any) -> list[Any]:
    """`gather`, with one value of the ranks that have the same share."""
    return gather(value)[::_neighbours]


def link_speed(device: torch.device, n_bytes: int) -> float:
    """GB/s at which this rank sends and receives at once, with the better of its two neighbours: a slow rank is slow
    with both. Infinite for a single rank."""
    if world_size() == 1:
        return math.inf
    speeds = []
    for shift in (0, 1):  # pairs (0, 1), (2, 3), ...; then (1, 2), ..., (n - 1, 0)
        other = (rank() + (1 if (rank() + shift) % 2 == 0 else -1)) % world_size()
        alone = world_size() % 2 and rank() == (world_size() - 1 if not shift else 0)
        speeds.append(0.0 if alone else _exchange(device, n_bytes, other))
    return max(speeds)


def _exchange(device: torch.device, n_bytes: int, other: int) -> float:
    sent, received = (torch.zeros(n_bytes // 4, device=device) for _ in range(2))
    times = []
    for _ in range(3):  # the first one connects
        started = time.perf_counter()
        moves = [torch_dist.P2POp(torch_dist.isend, sent, other), torch_dist.P2POp(torch_dist.irecv, received, other)]
        for work in torch_dist.batch_isend_irecv(moves):
            work.wait()
        received[0].item()  # waits for the device
        times.append(time.perf_counter() - started)
    return n_bytes / min(times) / 1e9


def all_reduce_speed(device: torch.device, n_bytes: int) -> float:
    """GB/s over each link during an all-reduce: a ring moves 2 (n - 1) / n of the bytes (NCCL's "bus bandwidth")."""
    if world_size() == 1:
        return math.inf
    values, times = torch.zeros(n_bytes // 4, device=device), []
    for _ in range(4):
        barrier()
        started = time.perf_counter()
        torch_dist.all_reduce(values)
        values[0].item()
        times.append(time.perf_counter() - started)
    return 2 * (world_size() - 1) / world_size() * n_bytes / min(times) / 1e9


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
