"""What each tensor operation allocates, saves for backward, and allocates in its backward pass.

One function for each operation of eager PyTorch that the families use, under torch's name. The saved
tensors follow `tools/autograd/derivatives.yaml`, the backward formulas `FunctionsManual.cpp`, the
kernels' own buffers the file named beside them. `tests/test_ops.py` runs each beside torch.
"""

from __future__ import annotations

from galore_mem.dtypes import BOOL, FLOAT16, FLOAT32, DType
from galore_mem.memory.autocast import autocast, autocast_wide
from galore_mem.memory.matrices import add_, bmm, conv1d, linear, matmul, mm
from galore_mem.memory.pointwise import (
    add,
    dropout,
    gelu,
    gelu_new,
    mean_last,
    mul,
    pow,
    relu,
    rsqrt,
    scale,
    shift,
    silu,
    tanh,
)
from galore_mem.memory.tape import Grads, Shape, Storage, Tape, Tensor
from galore_mem.memory.views import (
    Incoming,
    Kept,
    cat,
    clone,
    contiguous,
    expand,
    first,
    narrow,
    pad_last,
    reshape,
    split,
    to,
    transpose,
    unsqueeze,
    view,
)

__all__ = [
    "add",
    "add_",
    "autocast",
    "autocast_wide",
    "bmm",
    "cat",
    "clone",
    "contiguous",
    "conv1d",
    "cross_entropy",
    "dropout",
    "embedding",
    "expand",
    "gelu",
    "gelu_new",
    "layer_norm",
    "linear",
    "log_softmax",
    "matmul",
    "mean_last",
    "mm",
    "mul",
    "narrow",
    "nll_loss",
    "pad_last",
    "pow",
    "relu",
    "reshape",
    "rsqrt",
    "safe_softmax",
    "scale",
    "shift",
    "silu",
    "softmax",
    "split",
    "tanh",
    "to",
    "transpose",
    "unsqueeze",
    "view",
]


def softmax(t: Tensor, dtype: DType | None = None) -> Tensor:
    """Softmax over the last dimension, in `dtype` if one is given (float32 under CUDA's autocast), saving its result.

    On CUDA a float16 input with dtype=float32 is one kernel; any other is cast first (native/SoftMax.cpp). The
    CUDA backward makes grad * output first, in the result's format (cuda/SoftMax.cu, softmax_backward_cuda_out).
    """
    tape = t.tape
    if dtype is None and tape.autocast is not None and tape.device == "cuda":
        dtype = FLOAT32
    dtype = dtype or t.dtype
    if not (tape.device == "cuda" and t.dtype is FLOAT16 and dtype is FLOAT32):
        t = to(t, dtype)
    return _softmax(t, "SoftmaxBackward", dtype, product=tape.device == "cuda")


def safe_softmax(t: Tensor) -> Tensor:
    """Softmax whose rows of nothing but -inf give zeros; to find them takes a boolean an element and one a row
    (transformers/attention.cpp, _safe_softmax)."""
    out = _softmax(t, "SafeSoftmaxBackward", t.dtype, product=t.tape.device == "cuda")
    masked = t.tape.empty(t.shape, BOOL)
    rows = t.tape.empty((*t.shape[:-1], 1), BOOL)
    del masked, rows
    return out


def log_softmax(t: Tensor) -> Tensor:
    """log-softmax over the last dimension, saving its result; backward makes one tensor."""
    return _softmax(t, "LogSoftmaxBackward", t.dtype, product=False)


def _softmax(t: Tensor, name: str, dtype: DType, *, product: bool) -> Tensor:
    tape, in_dtype = t.tape, t.dtype

    def backward(saved: Kept, grads: Incoming) -> Grads:
        grad = first(grads)
        inner = tape.empty(grad.shape, grad.dtype) if product else None
        result = tape.empty(grad.shape, in_dtype)
        del inner
        return (result,)

    node = tape.node(name, (t,), (), backward)
    out = tape.empty(t.shape, dtype)
    tape.bind(node, out)
    tape.save(node, (out,))
    return out


def nll_loss(log_probs: Tensor, target: Tensor) -> Tensor:
    """Mean negative log-likelihood: saves its inputs and the total weight; backward fills a tensor like log_probs."""
    log_probs = autocast_wide(log_probs)
    tape, shape, dtype = log_probs.tape, log_probs.shape, log_probs.dtype
    node = tape.node(
        "NllLossBackward",
        (log_probs,),
        (log_probs, target),
        lambda saved, grads: (tape.empty(shape, dtype),),
    )
    out, total_weight = tape.empty((), dtype), tape.empty((), dtype)
    tape.bind(node, out)
    tape.save(node, (total_weight,))
    return out


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy of rows of logits, in their own format. The CPU's autocast casts the logits to float32,
    CUDA's only the log-probabilities (autocast_mode.cpp: cross_entropy_loss, nll_loss)."""
    tape = logits.tape
    if tape.autocast is not None and tape.device == "cpu":
        logits = to(logits, FLOAT32)
    return nll_loss(log_softmax(logits), target)


def layer_norm(t: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Saves the input, the weights and each row's mean and reciprocal deviation; float32 under CUDA's autocast.

    Partial sums over rows for the weights' gradients (a CPU thread's, and CUDA's above 65,536 rows) are not counted.
    """
    bias, weight, t = autocast_wide(bias), autocast_wide(weight), autocast_wide(t)
    tape, shape, dtype = t.tape, t.shape, t.dtype
    wide, wide_dtype = weight.shape, weight.dtype
    for_weight, for_bias = weight.requires_grad, bias.requires_grad

    def backward(saved: Kept, grads: Incoming) -> Grads:
        grad_x = tape.empty(shape, dtype)
        grad_w = tape.empty(wide, wide_dtype) if for_weight else None
        return grad_x, grad_w, tape.empty(wide, wide_dtype) if for_bias else None

    node = tape.node("NativeLayerNormBackward", (t, weight, bias), (t, weight, bias), backward)
    out = tape.empty(shape, dtype)
    # float32 on CUDA (cuda/layer_norm_kernel.cu, acc_type), the weights' format on the CPU (layer_norm.cpp)
    stats = FLOAT32 if tape.device == "cuda" else wide_dtype
    mean, rstd = tape.empty((*shape[:-1], 1), stats), tape.empty((*shape[:-1], 1), stats)
    tape.bind(node, out)
    tape.save(node, (mean, rstd))
    return out


def embedding(weight: Tensor, ids: Tensor) -> Tensor:
    """Rows of a table: saves the ids; backward is a dense gradient of the whole table."""
    tape, table, tokens = weight.tape, weight.shape, ids.numel

    def backward(saved: Kept, grads: Incoming) -> Grads:
        indices = sorted_indices(tape, tokens)
        grad = tape.empty(table, first(grads).dtype)
        partial = partial_sums(tape, tokens, table)
        del indices, partial
        return (grad,)

    node = tape.node("EmbeddingBackward", (weight,), (ids,), backward)
    out = tape.empty((*ids.shape, table[1]), weight.dtype)
    tape.bind(node, out)
    return out


_UNSORTED = 3072  # tokens that CUDA's embedding backward handles without sorting them


def sorted_indices(tape: Tape, tokens: int) -> list[Storage]:
    """cuda/Embedding.cu, embedding_dense_backward_cuda: the ids and their places, sorted; a third buffer and the
    sort's own are gone when the sums begin."""
    if tape.device == "cpu" or tokens <= _UNSORTED:
        return []
    sorting = [tape.bytes(8 * tokens) for _ in range(3)]
    return sorting[:2]


def partial_sums(tape: Tape, tokens: int, table: Shape) -> list[Storage]:
    """cuda/EmbeddingBackwardKernel.cu: rows of one id are summed ten at a time, in float32, in room for as many sums
    as there could be, with four arrays that say where each begins."""
    if tape.device == "cpu" or tokens <= _UNSORTED:
        return []
    segments = min(tokens, table[0])
    sums = tokens // 10 + segments
    return [tape.bytes(n) for n in (8 * tokens, 8 * segments, 8 * segments, 8 * sums, 4 * sums * table[1])]
