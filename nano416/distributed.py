"""Processes of a run: which rank this one is, how the ranks divide the model, how they talk.

    dist = distributed.init(strategy="fsdp")                # reads torchrun's environment; one process without it
    raw_model = distributed.build_model(make_model, dist)   # the weights, whole or this rank's shard of them
    model = distributed.apply_ddp(raw_model, dist)          # the module to call in training
    with distributed.no_sync(model, last=False): ...        # gradients stay local until the last micro-step
    loss = distributed.all_reduce_mean(loss)
    distributed.shutdown()

Strategies (--parallel), made of torch's DistributedDataParallel, fully_shard and parallelize_module:

    ddp   every rank holds all weights; gradients are averaged over the ranks
    fsdp  parameters, gradients and optimizer state are sharded; each layer is all-gathered just before use (ZeRO-3)
    hsdp  fsdp within a node, replicas on the other nodes: the slow links between nodes carry gradients only

With fsdp and hsdp, --tensor_parallel=N: N neighbouring ranks share each matrix product and see the same data.
Nothing else imports torch.distributed, except its checkpoint formats in the two checkpoint files.
"""

import contextlib
import functools
import gc
import inspect
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as torch_dist
import torch.nn as nn
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from nano416.config import Failure
from nano416.devices import pick_device

Strategy = Literal["ddp", "fsdp", "hsdp"]
Recompute = Literal["none", "selective", "full"]

# A rank silent for longer is dead. NCCL's own default; gloo would wait 30 minutes.
TIMEOUT_S = 600.0
# Results that selective activation checkpointing keeps, after torchtitan's list: matmuls and every kind of attention
# are expensive to compute again, the rest is limited by memory and cheap.
SAVED_OPS = [
    torch.ops.aten.mm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
]


# ---- The processes ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dist:
    """Rank and device of this process, and how the processes divide the work."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    sharded: bool = False  # fsdp or hsdp, even with a single shard
    fsdp_size: int = 1  # ranks among which fully_shard divides weights, gradients and optimizer state
    tp_size: int = 1  # neighbouring ranks that share each matrix product and see the same data
    store: Any = field(default=None, compare=False, repr=False)  # torchrun's key-value store

    @property
    def is_main(self) -> bool:
        """True on rank 0, the one that prints and writes."""
        return self.rank == 0

    @property
    def shard_degree(self) -> int:
        """Number of shards of weights, gradients and optimizer state. Tensor parallelism leaves only norms whole."""
        return self.fsdp_size * self.tp_size

    @property
    def dp_rank(self) -> int:
        """Which part of the data this rank sees, below dp_size."""
        return self.rank // self.tp_size

    @property
    def dp_size(self) -> int:
        """Number of parts into which the data are divided."""
        return self.world_size // self.tp_size


# What init returned. torch keeps the process group in a global as well, and silent_ranks, shard_list and all_gather_dp
# need to know the rest. Only init and shutdown assign it.
_dist = Dist()


def init(timeout_s: float = TIMEOUT_S, strategy: Strategy = "ddp", tp_size: int = 1) -> Dist:
    """Join torchrun's process group, if there is one, and pick this rank's device.

    timeout_s: a rank that keeps the others waiting for longer ends the run. Raises ValueError if the processes cannot
    be laid out as asked, or if only some of torchrun's environment variables are set.
    """
    variables = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    missing = [name for name in variables if name not in os.environ]
    if missing and len(missing) < len(variables):
        present = next(name for name in variables if name in os.environ)
        raise ValueError(f"{present} is set but {', '.join(missing)} is not; start several processes with torchrun")
    if missing:
        check_layout(strategy, tp_size, 1, 1)
        return Dist(device=pick_device())
    world_size = _torchrun_variable("WORLD_SIZE", 1, 2**31 - 1)
    local_world_size = _torchrun_variable("LOCAL_WORLD_SIZE", 1, world_size, default=world_size)
    check_layout(strategy, tp_size, world_size, local_world_size)
    rank = _torchrun_variable("RANK", 0, world_size - 1)
    local_rank = _torchrun_variable("LOCAL_RANK", 0, local_world_size - 1)
    _torchrun_variable("MASTER_PORT", 0, 65535, default=0)
    device = _local_device(local_rank)
    timeout = timedelta(seconds=timeout_s)
    try:
        # init_process_group could do this, too, but would not hand out the store, which silent_ranks needs.
        store, _, _ = next(rendezvous("env://", timeout=timeout))
        # gloo as well as NCCL: what the ranks decide together is exchanged between CPUs, so that it never waits for a
        # GPU.
        torch_dist.init_process_group(
            backend="cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=timeout,
            device_id=device if device.type == "cuda" else None,
        )
    except torch_dist.DistError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        # A stack of C++ calls follows.
        reason = str(error).partition("\n")[0]
        raise Failure(f"rank {rank} of {world_size} did not meet the others at {where}: {reason}") from error
    if device.type == "cpu":
        # That gloo has no all-to-all, once per rank: torch falls back, and nobody can change it.
        logging.getLogger("torch.distributed.tensor._collective_utils").setLevel(logging.ERROR)
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if local_rank == 0 and restart != "0":
        print(f"restart {restart} of {os.environ['TORCHELASTIC_MAX_RESTARTS']}", file=sys.stderr, flush=True)
    global _dist
    _dist = Dist(
        rank=rank,
        local_rank=local_rank,
        world_size=world_size,
        device=device,
        sharded=strategy != "ddp",
        fsdp_size={"ddp": 1, "fsdp": world_size // tp_size, "hsdp": local_world_size // tp_size}[strategy],
        tp_size=tp_size,
        store=store,
    )
    return _dist


def _torchrun_variable(name: str, low: int, high: int, default: int | None = None) -> int:
    """An integer that torchrun has put into the environment. Raises ValueError if it is none or out of range."""
    text = os.environ.get(name, str(default))
    try:
        value = int(text)
    except ValueError:
        value = low - 1
    if not low <= value <= high:
        raise ValueError(f"{name}={text} must be an integer from {low} to {high}; torchrun sets it")
    return value


def check_layout(strategy: Strategy, tp_size: int, world_size: int, local_world_size: int) -> None:
    """Raise ValueError unless `world_size` processes, `local_world_size` on each node, can be laid out as asked."""
    if tp_size > 1 and strategy == "ddp":
        raise ValueError(f"tensor_parallel ({tp_size}) needs --parallel=fsdp or hsdp, not ddp")
    # Tensor parallelism communicates in every layer, which only links within a node can carry.
    if local_world_size % tp_size:
        raise ValueError(
            f"tensor_parallel ({tp_size}) must divide the processes of a node ({local_world_size}); "
            "start more with torchrun --nproc_per_node"
        )
    if strategy == "hsdp" and world_size % local_world_size:
        raise ValueError(
            f"hsdp needs equally many processes on every node; {world_size} are not a multiple of {local_world_size}"
        )


def _local_device(local_rank: int) -> torch.device:
    """This rank's GPU, made current, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"local rank {local_rank} has no GPU: torchrun started more processes than the "
            f"{torch.cuda.device_count()} visible GPUs; lower --nproc_per_node"
        )
    device = torch.device("cuda", local_rank)
    # Calls that name no device, such as torch.cuda.synchronize(), mean the current GPU.
    torch.cuda.set_device(device)
    return device


def shutdown() -> None:
    """Leave the process group, once all ranks have come here."""
    # torchrun ends the other ranks when one has left with an exit code, and rank 0 may still be writing.
    barrier()
    # Gloo aborts in a quarter of interpreter exits while DDP's reducer is alive (torch 2.13), which would make a
    # finished run a failed one. The reducer is in a reference cycle, and training has frozen the garbage collector.
    gc.unfreeze()
    gc.collect()
    if torch_dist.is_initialized():
        torch_dist.destroy_process_group()
    global _dist
    _dist = Dist()


def silent_ranks(patience_s: float = 5.0) -> str:
    """Name the ranks that do not answer, after a collective has failed on all of them. Every living rank calls it.

    Each rank signs in at torchrun's store, which still works when the connections between ranks are broken.
    """
    if _dist.store is None:
        return "a rank was late"
    try:
        _dist.store.set(f"nano416/alive/{rank()}", "yes")
        # The other living ranks may notice the failure a little later.
        time.sleep(patience_s)
        silent = [str(other) for other in range(world_size()) if not _dist.store.check([f"nano416/alive/{other}"])]
    except torch_dist.DistError:
        # Without torchrun's agent, or with TORCH_DISABLE_SHARE_RDZV_TCP_STORE, rank 0 holds the store.
        silent = ["0"]
    return f"rank {', '.join(silent)} does not answer" if silent else "a rank was late"


# ---- The model -------------------------------------------------------------------------------------------------------


def build_model(
    make: Callable[[], nn.Module], dist: Dist, dtype: torch.dtype | None = None, cpu_offload: bool = False
) -> nn.Module:
    """The Transformer that `make` creates, on this rank's device: whole, or this rank's shard of it (fsdp, hsdp).

    dtype: what sharded weights are cast to before ranks exchange them and compute; the shards themselves are fp32.
    cpu_offload: shards, their gradients and optimizer state stay in host memory, and the optimizer steps there.
    """
    if not dist.sharded or dist.world_size == 1:
        if cpu_offload:
            raise ValueError("cpu_offload needs --parallel=fsdp or hsdp and several processes")
        return make().to(dist.device)
    with torch.device("meta"):
        model: Any = make()
    offload = CPUOffloadPolicy(pin_memory=dist.device.type == "cuda") if cpu_offload else OffloadPolicy()
    apply_fsdp(model, dist, dtype, offload)
    model.to_empty(device="cpu" if cpu_offload else dist.device)
    with dist.device:
        model.init_buffers()
    # Only rank 0 initializes the whole model, in host memory, and sends the other ranks their shards.
    weights = make().state_dict() if dist.is_main else {}
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    return model


def apply_fsdp(model: Any, dist: Dist, dtype: torch.dtype | None, offload: OffloadPolicy) -> None:
    """Shard a Transformer's weights in place: first for tensor parallelism, then among `dist.fsdp_size` ranks."""
    replicas = dist.dp_size // dist.fsdp_size
    mesh = init_device_mesh(
        dist.device.type, (replicas, dist.fsdp_size, dist.tp_size), mesh_dim_names=("replicate", "shard", "tensor")
    )
    if dist.tp_size > 1:
        for block in model.layers:
            apply_tp(block, mesh["tensor"])
    fsdp_mesh = mesh["replicate", "shard"] if replicas > 1 else mesh["shard"]
    # Gradients are summed in fp32: in bf16 the error would grow with the number of ranks.
    mixed_precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.layers:
        # A block's norms stay with the root, in fp32: bf16 would cost them digits and save next to nothing.
        fully_shard(
            [block.self_attn, block.mlp],
            mesh=fsdp_mesh,
            mp_policy=mixed_precision,
            offload_policy=offload,
            shard_placement_fn=_fsdp_placement,
        )
    fully_shard(model, mesh=fsdp_mesh, offload_policy=offload)


def _fsdp_placement(parameter: nn.Parameter) -> Shard | None:
    """The dimension to shard: the second where tensor parallelism has sharded the first, else the first (None)."""
    is_split = isinstance(parameter, DTensor) and any(placement.is_shard(0) for placement in parameter.placements)
    return Shard(1) if is_split else None


def apply_tp(block: Any, mesh: DeviceMesh) -> None:
    """Tensor parallelism of one block: each rank has some heads and some hidden units; o_proj and down_proj sum.

    The norms return DTensors, so that the gradients of all projections that read a norm's output are added up before
    they are reduced: four all-reduces of [B, T, D] per block and micro-step instead of seven.
    """
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
        parallelize_module(block, mesh, {name: ColwiseParallel()})
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        parallelize_module(block, mesh, {name: RowwiseParallel()})
    for norm in (block.input_layernorm, block.post_attention_layernorm):
        distribute_module(norm, mesh, None, _to_dtensor(Replicate()))
    for norm in (block.self_attn.q_norm, block.self_attn.k_norm):
        if norm is not None:
            # [B, N, T, H]: this rank's heads
            distribute_module(norm, mesh, None, _to_dtensor(Shard(1)), lambda module, output, mesh: output.to_local())


def _to_dtensor(placement: Shard | Replicate) -> Callable:
    # run_check would make the ranks communicate in every call.
    return lambda module, inputs, mesh: DTensor.from_local(inputs[0], mesh, [placement], run_check=False)


def apply_ac(model: Any, policy: Recompute, has_dropout: bool = False) -> None:
    """Activation checkpointing, in place: keep less of each block for the backward pass and recompute the rest.

    full: keep only the block's input, for a third more compute. selective: also keep the results of matmuls and
    attention, so that only cheap operations run twice (arXiv:2205.05198). has_dropout: blocks draw random numbers,
    which must be the same the second time.
    """
    if policy == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": has_dropout}
    if policy == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, SAVED_OPS)
    for block in model.layers:
        # A wrapper module would change the parameters' names.
        block.forward = functools.partial(checkpoint, block.forward, **options)


def apply_ddp(model: nn.Module, dist: Dist) -> nn.Module:
    """The module to call in training: wrapped in DDP, or `model` itself in one process and with sharded weights."""
    if dist.world_size == 1 or dist.sharded:
        return model
    # The buffers are constants. torch 2.13 has renamed the option that copies them and warns about the old name.
    renamed = "forward_sync_buffers" in inspect.signature(DDP).parameters
    options: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    # The gradients are views of DDP's buckets instead of copies: 4 bytes less per parameter.
    device_ids = [dist.local_rank] if dist.device.type == "cuda" else None
    return DDP(model, device_ids=device_ids, gradient_as_bucket_view=True, **options)


def no_sync(model: nn.Module, last: bool) -> contextlib.AbstractContextManager:
    """Wrap forward and backward of one micro-step: ranks average their gradients in the last one only.

    fsdp reduces gradients in every micro-step, since otherwise each rank would hold all of them; hsdp reduces them
    between its replicas in the last one only.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(last)
    if isinstance(model, DDP) and not last:
        return model.no_sync()
    return contextlib.nullcontext()


@contextlib.contextmanager
def eval_mode(model: nn.Module, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Inside the block parts of a sharded model (`hidden`, `head`) may be called, equally often on every rank.

    dtype: the one that build_model was given.
    """
    if not isinstance(model, FSDPModule):
        yield
        return
    # fully_shard gathers weights in a module's forward, which `hidden` and `head` do not pass through.
    model.unshard()
    device_type = next(model.parameters()).device.type
    autocast = torch.autocast(device_type, dtype) if dtype else contextlib.nullcontext()
    # The blocks are compiled for training's shape alone.
    try:
        with torch.compiler.set_stance("force_eager"), autocast:
            yield
    finally:
        # Also when the evaluation is abandoned: the model is saved afterwards.
        model.reshard()


# ---- Sharded tensors -------------------------------------------------------------------------------------------------


def is_sharded(model: nn.Module) -> bool:
    """True if each rank holds a shard of the weights."""
    return isinstance(model, FSDPModule)


def full_state(value: Any) -> Any:
    """Nested state with its sharded tensors gathered in rank 0's host memory (None elsewhere). All ranks call it."""
    if isinstance(value, DTensor):
        full = value.full_tensor()
        return full.cpu() if rank() == 0 else None
    if isinstance(value, dict):
        return {name: full_state(item) for name, item in value.items()}
    return value


def local_shard(tensor: Tensor) -> tuple[Tensor, list[int]]:
    """This rank's shard of a tensor, sharing its memory, and the index in the whole tensor where it begins."""
    offsets = [0] * tensor.dim()
    if not isinstance(tensor, DTensor):
        return tensor, offsets
    assert all(type(placement) in (Shard, Replicate) for placement in tensor.placements)
    for mesh_dim, placement in enumerate(tensor.placements):
        if isinstance(placement, Shard):
            # No dimension is sharded twice. As torch.chunk divides: equal shards, the last ones smaller or empty.
            size = tensor.shape[placement.dim]
            shard_size = -(-size // tensor.device_mesh.size(mesh_dim))
            offsets[placement.dim] = min(size, shard_size * tensor.device_mesh.get_local_rank(mesh_dim))
    return tensor.to_local(), offsets


def distribute_like(full: Tensor, like: Tensor) -> Tensor:
    """A copy of a full tensor that all ranks hold, on the device and with the sharding of `like`."""
    copy = full.detach().to(like.device, copy=True)
    if isinstance(like, DTensor):
        # None: no communication, since each rank has the full tensor to cut its shard from.
        return distribute_tensor(copy, like.device_mesh, like.placements, src_data_rank=None)
    return copy


def map_sharded(work: Callable[[Tensor], Tensor], batch: Tensor, like: Tensor | None = None) -> Tensor:
    """work(batch) for a batch [n, ...] of independent items, with the items divided among the ranks.

    All ranks hold the whole batch or, with a sharded `like`, their shards of every item, placed as in `like`. The same
    holds for the result.
    """
    if world_size() == 1:
        return work(batch)
    if isinstance(like, DTensor):
        return _map_dtensor(work, batch, like)
    n = len(batch)
    # all_gather needs equal parts: the last ones are padded with zeros.
    per_rank = -(-n // world_size())
    results = batch.new_empty(per_rank * world_size(), *batch.shape[1:])
    mine = batch[rank() * per_rank : (rank() + 1) * per_rank]
    padding = batch.new_zeros(per_rank - len(mine), *batch.shape[1:])
    done = torch.cat([work(mine), padding]) if len(mine) else padding  # [per_rank, ...]
    # torch 2.13 has renamed all_gather_into_tensor and warns about the old name.
    gather = getattr(torch_dist, "all_gather_single", None) or torch_dist.all_gather_into_tensor
    gather(results, done)
    return results[:n]


def _map_dtensor(work: Callable[[Tensor], Tensor], shards: Tensor, like: DTensor) -> Tensor:
    """Exchange shards of all items [n, ...] for some whole items (all-to-all), apply `work`, and exchange them back."""
    shape = torch.Size((len(shards), *like.shape))
    options: dict[str, Any] = {
        "shape": shape,
        "stride": torch.empty(shape, device="meta").stride(),
        "run_check": False,
    }
    # Dimension 0 counts the items, so that the dimensions of `like` come one later.
    by_shard = [Shard(p.dim + 1) if isinstance(p, Shard) else p for p in like.placements]
    by_item = [Shard(0)] * len(by_shard)
    batch = DTensor.from_local(shards, like.device_mesh, by_shard, **options)
    mine = batch.redistribute(placements=by_item).to_local()
    if len(mine):
        mine = work(mine)
    return DTensor.from_local(mine, like.device_mesh, by_item, **options).redistribute(placements=by_shard).to_local()


# ---- Communication; without a process group there is one rank --------------------------------------------------------


def rank() -> int:
    """This process's number, 0 without torchrun."""
    return torch_dist.get_rank() if torch_dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes, 1 without torchrun."""
    return torch_dist.get_world_size() if torch_dist.is_initialized() else 1


def barrier() -> None:
    """Wait for all ranks."""
    if torch_dist.is_initialized():
        torch_dist.barrier()


@contextlib.contextmanager
def shared_errors() -> Iterator[None]:
    """A ValueError inside the block on any rank is raised on all ranks, which end it together.

    The block must not communicate. Otherwise the other ranks would wait for one that has left.
    """
    message = None
    try:
        yield
    except ValueError as error:
        message = str(error)
    messages = [text for text in all_gather_object(message) if text is not None]
    if messages:
        raise ValueError(messages[0])


def all_reduce_mean(value: Tensor) -> Tensor:
    """Average over the ranks."""
    return all_reduce_sum(value) / world_size()


def all_reduce_sum(value: Tensor) -> Tensor:
    """Sum over the ranks."""
    return all_reduce_sum_(value.clone())


def all_reduce_sum_(value: Tensor) -> Tensor:
    """Sum over the ranks, in place."""
    if torch_dist.is_initialized():
        torch_dist.all_reduce(value)
    return value


def all_reduce_max(values: list[int]) -> list[int]:
    """The largest value of any rank, for each of several: one all-reduce on the CPU, which never waits for a GPU."""
    if not torch_dist.is_initialized():
        return values
    tensor = torch.tensor(values)
    torch_dist.all_reduce(tensor, op=torch_dist.ReduceOp.MAX)
    return tensor.tolist()


def all_gather_object(value: Any, group: Any = None) -> list[Any]:
    """Every rank's picklable value, in rank order, on every rank. group: what new_cpu_group returned."""
    if not torch_dist.is_initialized():
        return [value]
    values: list[Any] = [None] * torch_dist.get_world_size()
    torch_dist.all_gather_object(values, value, group=group)
    return values


def all_gather_dp(value: Any) -> list[Any]:
    """all_gather_object with one value per dp_rank: tensor-parallel neighbours have equal ones."""
    return all_gather_object(value)[:: _dist.tp_size]


def shard_list(items: list, filler: Any) -> list:
    """Every dp_size-th item, from dp_rank on, padded with `filler` to the same length on every rank."""
    dp_size = world_size() // _dist.tp_size
    padded = [*items, *[filler] * (-len(items) % dp_size)]
    return padded[rank() // _dist.tp_size :: dp_size]


def exchange(tensor: Tensor, other: int) -> Tensor:
    """Send a tensor to another rank and return the one of the same shape that it sends."""
    received = torch.empty_like(tensor)
    # Both at once: two ranks that first send and then receive would wait for each other.
    requests = torch_dist.batch_isend_irecv(
        [torch_dist.P2POp(torch_dist.isend, tensor, other), torch_dist.P2POp(torch_dist.irecv, received, other)]
    )
    for request in requests:
        request.wait()
    return received


def new_cpu_group() -> Any:
    """A second gloo group of all ranks, for communication in a background thread; None in a single process."""
    return torch_dist.new_group(backend="gloo") if torch_dist.is_initialized() else None
