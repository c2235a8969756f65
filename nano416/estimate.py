"""What a run needs before it begins: micro-batches, memory, time and dollars, from numbers and data sheets.

estimate.split_batch(655_360, seq_len=1024, dp_size=8, max_batch_size=40)   # 40 sequences per micro-step
estimate.training_memory_gb(Workload(cfg.model, batch_size=16, ...))        # GB of one process
estimate.largest_batch_size(workload, memory_gb=80)                         # sequences per micro-step
estimate.tokens_per_s(flops_per_token, "NVIDIA H100", n_devices=8)          # None for an unknown device
"""

import math
from dataclasses import dataclass, replace

from model import ModelConfig
from nano416 import metrics

# What plain PyTorch reaches on recent GPUs, for plans only.
ASSUMED_MFU = 0.45
# A rented A100 or H100, 2026; for plans only.
DOLLARS_PER_GPU_HOUR = 2.0
# Beyond this many sequences per micro-step nothing gets faster.
MAX_BATCH_SIZE = 128
# Small, so that a micro-step stays in a CPU's caches.
CPU_BATCH_SIZE = 8
# How much of a GPU's memory a run may fill; the rest is the driver's and fragments.
USABLE_MEMORY_FRAC = 0.94
# Bytes of optimizer state per parameter. Muon and Lion keep one fp32 average, Adam and its kin two.
OPTIMIZER_BYTES = {"sgd": 4, "lion": 4, "muon": 4}
DEFAULT_OPTIMIZER_BYTES = 8
# fp32 weights and their gradients.
WEIGHT_AND_GRADIENT_BYTES = 8
# The bf16 copy that autocast keeps of the weights.
AUTOCAST_BYTES = 2


@dataclass(frozen=True)
class Workload:
    """What decides the memory of one training process."""

    model: ModelConfig
    batch_size: int  # sequences per micro-step
    optimizer: str = "muon"
    has_ema: bool = False
    bf16: bool = True
    compiled: bool = True
    recompute: str = "none"  # activation checkpointing: none, selective or full
    activation_memory_budget: float = 1.0  # fraction of the activations that a compiled step keeps
    shard_degree: int = 1  # ranks that share weights, gradients and optimizer state
    on_gpu: bool = True


def training_memory_gb(work: Workload) -> float:
    """Peak memory of one process in GB: weights, gradients, optimizer state and one micro-step's activations."""
    # The average of the weights is fp32.
    state_bytes = OPTIMIZER_BYTES.get(work.optimizer, DEFAULT_OPTIMIZER_BYTES) + (4 if work.has_ema else 0)
    bytes_per_param = WEIGHT_AND_GRADIENT_BYTES + AUTOCAST_BYTES + state_bytes
    layer_bytes = activation_bytes_per_layer(work.model)
    if work.recompute == "full":
        # Only each block's input, in fp32.
        layer_bytes = 4 * work.model.dim
    elif work.compiled:
        layer_bytes *= work.activation_memory_budget
    else:
        # Without the compiler every elementwise result is kept: 1.41 times as much (EXPERIMENTS.md, 2026-11-21).
        layer_bytes *= 1.5
    # A compiled GPU step holds all logits and their gradient in bf16; otherwise a chunk exists at a time.
    logits_bytes = 4 * work.model.vocab_size if work.compiled and work.on_gpu else 0
    bytes_per_token = work.model.n_layers * layer_bytes + logits_bytes
    if not work.bf16:
        # Not twice: the residual stream is fp32 either way.
        bytes_per_token *= 1.7
    # Python, torch and its libraries, before anything is built.
    process_bytes = 0 if work.on_gpu else 0.4e9
    parameter_bytes = bytes_per_param * work.model.num_params() / work.shard_degree
    return (process_bytes + parameter_bytes + bytes_per_token * work.batch_size * work.model.seq_len) / 1e9


def checkpoint_gb(work: Workload) -> float:
    """Size of one checkpoint in GB: weights, their average and the optimizer state, all fp32."""
    bytes_per_param = 4 + OPTIMIZER_BYTES.get(work.optimizer, DEFAULT_OPTIMIZER_BYTES) + (4 if work.has_ema else 0)
    return bytes_per_param * work.model.num_params() / 1e9


def activation_bytes_per_layer(model: ModelConfig) -> float:
    """Bytes per token and layer that compiled bf16 training keeps for the backward pass, without recomputation."""
    # The residual stream before attention and before the MLP, in fp32; all else is bf16.
    residual = 2 * 4 * model.dim
    # Three more vectors of that width, such as the outputs of the norms.
    others = 3 * 2 * model.dim
    # Queries and attention's output, keys and values.
    attention = 2 * 2 * (model.n_heads + model.n_kv_heads) * model.head_dim
    # gate, up and their product.
    swiglu = 3 * 2 * model.ffn_dim
    return residual + others + attention + swiglu


def largest_batch_size(work: Workload, memory_gb: float) -> int:
    """Most sequences per micro-step that fit in a GPU of `memory_gb`, at least 1; on a CPU always the same number."""
    if not work.on_gpu:
        return CPU_BATCH_SIZE
    usable_gb = USABLE_MEMORY_FRAC * memory_gb
    for batch_size in range(MAX_BATCH_SIZE, 1, -1):
        if training_memory_gb(replace(work, batch_size=batch_size)) < usable_gb:
            return batch_size
    return 1


def split_batch(batch_tokens: int, seq_len: int, dp_size: int, max_batch_size: int, is_auto: bool = True) -> int:
    """Sequences per rank and micro-step: the largest divisor of each rank's sequences per step up to max_batch_size.

    Raises ValueError with the nearest batch_tokens that can be split. is_auto: max_batch_size is only a limit;
    otherwise the user asked for it, and half of it or less is refused, since it would be slow.
    """
    unit = seq_len * dp_size
    if batch_tokens % unit == 0:
        per_rank = batch_tokens // unit
        batch_size = max(n for n in range(1, max_batch_size + 1) if per_rank % n == 0)
        if is_auto or batch_size > max_batch_size // 2 or per_rank <= max_batch_size:
            return batch_size
        unit *= max_batch_size
    elif batch_tokens > unit and batch_tokens % seq_len == 0:
        return _uneven_batch_size(batch_tokens // seq_len, dp_size, max_batch_size)
    nearest = max(1, round(batch_tokens / unit)) * unit
    raise ValueError(
        f"batch_tokens ({batch_tokens}) does not split into micro-steps of about batch_size ({max_batch_size}) x "
        f"seq_len ({seq_len}) x processes ({dp_size}); try --batch_tokens={nearest}"
    )


def _uneven_batch_size(sequences: int, dp_size: int, max_batch_size: int) -> int:
    """Micro-batch size where the ranks do not divide the batch, as when an elastic run has three of its four nodes.

    In the last micro-step some ranks get filler. Returns the divisor of `sequences` with the least filler, the largest
    one of equals.
    """
    limit = min(max_batch_size, math.ceil(sequences / dp_size))
    sizes = [n for n in range(1, limit + 1) if sequences % n == 0]
    # Smaller micro-steps are slow.
    sizes = [n for n in sizes if n >= min(max_batch_size, 8)] or sizes

    def sequences_per_rank(batch_size: int) -> int:
        return batch_size * math.ceil(sequences / (batch_size * dp_size))

    return min(sizes, key=lambda n: (sequences_per_rank(n), -n))


def tokens_per_s(flops_per_token: float, device_name: str, n_devices: int) -> float | None:
    """Tokens per second of all devices together at ASSUMED_MFU; None for a device not in metrics.PEAK_FLOPS."""
    peak = metrics.peak_flops(device_name)
    return peak * ASSUMED_MFU * n_devices / flops_per_token if peak else None


def describe_time(tokens: int, flops_per_token: float, device_name: str, n_devices: int) -> str:
    """Hours and price of training on `tokens` tokens, as text."""
    device = f"{n_devices} x {device_name}"
    speed = tokens_per_s(flops_per_token, device_name, n_devices)
    if speed is None:
        return f"not known in advance on {device}; the log shows an ETA"
    hours = tokens / speed / 3600
    dollars = hours * n_devices * DOLLARS_PER_GPU_HOUR
    return f"{hours:.1f} h, ${dollars:,.0f} on {device}: {speed:,.0f} tokens/s at an assumed {ASSUMED_MFU:.0%} MFU"
