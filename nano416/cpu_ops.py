"""What only a CPU needs to be fast, behind one call each.

A reader who trains on GPUs can skip this file.

    loss = linear_cross_entropy(hidden, weight, targets, weights, vocab_size, z_loss)   # for model.py; no logits kept
    retain_freed_memory()                             # once per process, before training
    PackedLinear(weight)                              # for quantize.py, where the processor supports it
    Int8PackedLinear(*quantize_int8(weight))
    choose_threads(lambda: next_logits(model, [0]))   # for chat.py
"""

# Tensor dimensions: R rows (tokens), D dim, V vocabulary (padded)

import ctypes
import math
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

# Logits that exist at once in `linear_cross_entropy`: 128 MB in bf16.
CHUNK_ELEMENTS = 2**26
# On a CPU, how many of them are converted to fp32 at once for the softmax: 8 MB, which fits its caches.
BLOCK_ELEMENTS = 2**21
# glibc's numbers for mallopt.
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3


def retain_freed_memory() -> None:
    """Make glibc keep freed memory instead of returning it to the system.

    Each training step frees and allocates the same large blocks. By default glibc maps blocks above 32 MB anew, and the
    fresh zeroed pages cost a sixth of a step (EXPERIMENTS.md, 2026-11-21). Other C libraries are left as they are.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 2**30)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, target_weights: Tensor, vocab_size: int, z_loss: float
) -> Tensor:
    """Sum over rows of target_weights x cross entropy of hidden @ weight.T, in nats, without keeping the logits.

    hidden [R, D], weight [V, D], targets [R], target_weights [R]. Columns from vocab_size on are padding. z_loss
    adds the gradient of z_loss x logsumexp^2 (PaLM, arXiv:2204.02311) but not its value.
    """
    needs_grad = torch.is_grad_enabled()
    return _linear_cross_entropy(hidden, weight, targets, target_weights, vocab_size, z_loss, needs_grad)[0]


# A custom operator, which the compiler leaves alone: it would materialize all logits in fp32 on a CPU.
@torch.library.custom_op("nano416::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    target_weights: Tensor,
    vocab_size: int,
    z_loss: float,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, gradient of hidden, gradient of weight). Backward would have to compute the logits once more."""
    head = weight.to(hidden.dtype)
    # A custom operator always returns tensors: empty ones if no gradient is needed.
    hidden_grad = torch.empty_like(hidden if needs_grad else hidden[:0])
    weight_grad = torch.empty_like(weight if needs_grad else weight[:0], dtype=torch.float32)
    chunk_grad = torch.empty_like(head if needs_grad else head[:0])
    # At least 64 rows, whatever the vocabulary, or the matmuls would be slow.
    chunk_rows = min(len(hidden), max(64, CHUNK_ELEMENTS // len(weight)))
    block_rows = chunk_rows
    if hidden.device.type == "cpu":
        block_rows = min(chunk_rows, max(8, BLOCK_ELEMENTS // len(weight)))
    # Both buffers are reused: a fresh one would be pages that the system has to zero first, in every chunk.
    chunk_buffer = hidden.new_empty(chunk_rows, len(weight))
    block_buffer = chunk_buffer.new_empty(block_rows, len(weight), dtype=torch.float32)
    loss = torch.zeros((), device=hidden.device)
    for start in range(0, len(hidden), chunk_rows):
        chunk = hidden[start : start + chunk_rows]
        logits = torch.mm(chunk, head.T, out=chunk_buffer[: len(chunk)])
        for first in range(0, len(chunk), block_rows):
            block = logits[first : first + block_rows]
            rows = slice(start + first, start + first + len(block))
            target = targets[rows, None]
            target_weight = target_weights[rows, None]
            probs = block_buffer[: len(block)].copy_(block)
            probs[:, vocab_size:] = -math.inf
            target_logits = probs.gather(1, target)
            max_logits = probs.amax(1, keepdim=True)
            torch.softmax(probs, 1, out=probs)
            # The largest probability is exp(0) / sum(exp(logits - max)): the logsumexp needs no further pass.
            logsumexp = max_logits - probs.amax(1, keepdim=True).log()
            loss += ((logsumexp - target_logits) * target_weight).sum()
            if needs_grad:
                # d loss / d logits = weight x (softmax - one_hot(target)), and the z-loss adds 2 z logsumexp x softmax.
                probs.mul_(target_weight * (1 + 2 * z_loss * logsumexp)).scatter_add_(1, target, -target_weight)
                # Over the logits, which are no longer needed.
                block.copy_(probs)
        if needs_grad:
            # `logits` holds their gradient now.
            torch.mm(logits, head, out=hidden_grad[start : start + chunk_rows])
            torch.mm(logits.T, chunk, out=chunk_grad)
            # Added up in fp32: in bf16 the sum over the chunks would lose digits.
            if start == 0:
                weight_grad.copy_(chunk_grad)
            else:
                weight_grad.add_(chunk_grad)
    return loss, hidden_grad, weight_grad


# Shapes and dtypes of the results, for the compiler.
@_linear_cross_entropy.register_fake
def _(hidden, weight, targets, target_weights, vocab_size, z_loss, needs_grad):
    hidden_like = hidden if needs_grad else hidden[:0]
    weight_like = weight if needs_grad else weight[:0]
    loss = hidden.new_empty((), dtype=torch.float32)
    return loss, torch.empty_like(hidden_like), weight_like.float().contiguous()


def _save_gradients(ctx, inputs, output) -> None:
    """Called after the forward pass, with what it took and returned."""
    ctx.save_for_backward(*output[1:])


@torch.autograd.function.once_differentiable
def _backward(ctx, grad_loss: Tensor, *_):
    # Not scaled in place: the graph may be walked twice. The last five arguments have no gradient.
    hidden_grad, weight_grad = ctx.saved_tensors
    return hidden_grad * grad_loss, weight_grad * grad_loss, None, None, None, None, None


_linear_cross_entropy.register_autograd(_backward, setup_context=_save_gradients)


class PackedLinear(nn.Module):
    """A linear layer in bf16 or fp32 whose weight [out, in] is kept in oneDNN's own layout.

    Decoding multiplies one row at a time. On 2 cores of an EPYC a packed [50304, 768] head is read at 25 GB/s, the
    plain one at 18 GB/s in bf16 and 13 in fp32; a 124M-parameter model decodes 1.6 times as fast in fp32.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__()
        # Private operators of torch 2.11 to 2.13, the ones that Inductor uses for frozen weights. The public
        # torch.utils.mkldnn.to_mkldnn converts each input and output as well and is slower than the plain layer.
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1)
        self.bias = None if bias is None else bias.to(weight.dtype)

    @staticmethod
    def is_supported(dtype: torch.dtype) -> bool:
        """True if oneDNN multiplies this type on this processor."""
        if not torch.backends.mkldnn.is_available():
            return False
        # Private in torch 2.11 to 2.13: there is no public question about bf16.
        return dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


class Int8PackedLinear(nn.Module):
    """A linear layer that multiplies int8 by int8 with fbgemm, which x86 processors have.

    Activations are rounded too, with one scale per token. The sums are integers, so that the result for a token does
    not depend on how many others are computed with it.
    """

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None = None):
        """weight [out, in] in int8, its scale [out] in fp32."""
        super().__init__()
        zero_points = torch.zeros(len(scale), dtype=torch.long)
        with warnings.catch_warnings():
            # torch 2.13 warns that a later version removes quantized tensors (pytorch issue 184982).
            warnings.simplefilter("ignore")
            quantized = torch.quantize_per_channel(weight * scale[:, None], scale, zero_points, 0, torch.qint8)
        self.packed_weight = torch.ops.quantized.linear_prepack(quantized, None)
        self.bias = bias

    @staticmethod
    def is_supported() -> bool:
        """True if this processor and this version of torch have the kernel."""
        has_kernel = hasattr(torch.ops.quantized, "linear_with_input_q_dq_qweight_dq_output_fp32")
        has_tensors = hasattr(torch, "quantize_per_channel")
        return has_kernel and has_tensors and "fbgemm" in torch.backends.quantized.supported_engines

    def forward(self, x: Tensor) -> Tensor:
        row_max = x.abs().amax(-1, keepdim=True).clamp(min=1e-12)
        # Rows now lie in [-1, 1], so one scale of 1/127 and a zero point of 128 serve all of them.
        matmul = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
        out = matmul(x / row_max, 1 / 127, 128, self.packed_weight).mul_(row_max)
        return out if self.bias is None else out.add_(self.bias)


def choose_threads(run: Callable[[], Any]) -> int:
    """Set and return the number of threads with which `run` is fastest right now, at most today's number.

    Threads wait for each other dozens of times per token. Where other programs use the cores, one thread can be faster
    than all.
    """
    seconds: dict[int, float] = {}
    n_threads = torch.get_num_threads()
    while n_threads >= 1:
        torch.set_num_threads(n_threads)
        seconds[n_threads] = min(elapsed(run) for _ in range(4))
        n_threads //= 2
    fastest = min(seconds, key=lambda n: seconds[n])
    torch.set_num_threads(fastest)
    return fastest


def elapsed(run: Callable[[], Any]) -> float:
    """Seconds that one call of `run` takes."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started
