"""Scaled dot-product attention: which kernel runs, and what each allocates and saves.

Query is (batch, heads, length, head_dim), key and value may have fewer heads. Files are those of
aten/src/ATen/native/transformers; what is said of CUDA was read there, not measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from galore_mem.dtypes import BFLOAT16, BOOL, FLOAT16, FLOAT32, INT64
from galore_mem.memory.attention_math import sdpa_math
from galore_mem.memory.autocast import autocast
from galore_mem.memory.strides import is_contiguous, result_strides
from galore_mem.memory.tape import Grads, Shape, Storage, Tensor
from galore_mem.memory.views import first, narrow, pad_last
from galore_mem.units import ceil_div, round_up

HALF = (FLOAT16, BFLOAT16)


def sdpa_kernel(
    q: Tensor,
    mask: Tensor | None,
    capability: tuple[int, int] | None,
    k: Tensor | None = None,
    dropout: float = 0.0,
    *,
    efficient_groups: bool = False,
) -> str:
    """Which kernel `F.scaled_dot_product_attention` takes: `flash`, `efficient`, `math` or `cpu` (cuda/sdp_utils.cpp
    and sdp_utils_cpp.cpp).

    Flash needs a 16-bit format, no mask, a head of at most 256 and compute capability 8.0 (without a stated one, a
    card of that age is assumed); efficient needs as many key heads as query heads (unless `efficient_groups`: torch
    2.14 lifts that), rows of 16 bytes, and 8.0 for bfloat16. On 9.0 and 10.x a torch built with cuDNN 9.15.1 prefers
    cuDNN's kernel, which saves what flash does; the size of its workspace is not public, and flash stands for it.
    """
    if q.tape.device == "cpu":
        return "math" if dropout else "cpu"
    ampere = capability is None or capability >= (8, 0)
    if ampere and mask is None and q.dtype in HALF and q.shape[-1] <= 256:
        return "flash"
    grouped = k is not None and k.shape[1] != q.shape[1] and not efficient_groups
    aligned = q.dtype.nbytes((q.shape[-1],)) % 16 == 0
    return "efficient" if aligned and not grouped and (ampere or q.dtype is not BFLOAT16) else "math"


def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    kernel: str | None,
    dropout: float = 0.0,
    causal: bool = True,
) -> Tensor:
    """Attention without materialised scores, unless the kernel is `math`. Saves query, key, value, mask, the output
    and a log-sum-exp per row. Fewer key and value heads than query heads mean `enable_gqa`."""
    mask, v, k, q = autocast(mask), autocast(v), autocast(k), autocast(q)
    if kernel is None:
        kernel = sdpa_kernel(q, mask, None, k, dropout)
    q.tape.kernels.add(kernel)
    if mask is not None and mask.dtype is BOOL:
        # made additive anew in each call, where it was expanded at its full size (attention.cpp,
        # convert_boolean_attn_mask)
        mask = q.tape.empty(mask.shape, q.dtype)
    if kernel == "math":
        with q.tape.autocast_region(None):  # autocast casts the arguments and runs what is inside without it
            return sdpa_math(q, k, v, mask, dropout, causal=causal)
    if kernel == "flash" and q.shape[-1] % 8:  # attention.cpp, pad_last_dim<8>
        width = round_up(q.shape[-1], 8)
        padded = _fused(pad_last(q, width), pad_last(k, width), pad_last(v, width), mask, kernel)
        return narrow(padded, -1, q.shape[-1])
    if kernel == "efficient" and mask is not None and mask.shape[-1] % 8:  # attention.cpp, preprocess_mask
        mask = pad_last(mask, round_up(mask.shape[-1], 8))
    return _fused(q, k, v, mask, kernel)


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, kernel: str) -> Tensor:
    tape, dtype = q.tape, q.dtype
    layouts = tuple((t.shape, _gradient_strides(t, kernel)) for t in (q, k, v))
    scratch = SCRATCH[kernel]

    def backward(saved: Sequence[Tensor], grads: Sequence[Tensor | None]) -> Grads:
        read = () if kernel == "cpu" else (first(grads), saved[inputs])
        copies = [tape.bytes(dtype.nbytes(t.shape)) for t in read if not rows_in_order(t)]
        outs = tuple(tape.empty(shape, dtype, strides=strides) for shape, strides in layouts)
        buffers = scratch(outs[0], outs[1])
        del copies, buffers
        return outs

    saved = (q, k, v) if mask is None else (q, k, v, mask)
    inputs = len(saved)
    node = tape.node("ScaledDotProductAttentionBackward", (q, k, v), saved, backward)
    b, h, s, _ = q.shape
    shape = (*q.shape[:-1], v.shape[-1])
    # flash and the CPU make `empty_like(query)`, efficient rows of all heads
    strides = _heads_last(shape) if kernel == "efficient" else result_strides(shape, (shape, q.strides))
    out = tape.empty(shape, dtype, strides=strides)
    rows = round_up(s, 32) if kernel == "efficient" else s  # kernel_forward.h, kAlignLSE
    keep = [out, tape.empty((b, h, rows), FLOAT32)]
    if kernel == "flash":  # random state on the device, dropout or not (cuda/flash_attn/flash_api.cpp, mha_fwd)
        keep += [tape.empty((2,), INT64), tape.empty((), INT64)]
    accumulator = None
    if kernel == "efficient" and dtype in HALF and shape[-1] > 128:  # kernel_forward.h, kNeedsOutputAccumulatorBuffer
        accumulator = tape.empty(shape, FLOAT32)
    del accumulator
    tape.bind(node, out)
    tape.save(node, keep)
    return out


def _heads_last(shape: Shape) -> Shape:
    _, h, s, d = shape
    return (s * h * d, d, h * d, 1)


def _gradient_strides(t: Tensor, kernel: str) -> Shape:
    """Flash makes gradients like query, key and value; the others as rows of all heads."""
    return result_strides(t.shape, t.layout) if kernel == "flash" else _heads_last(t.shape)


def rows_in_order(t: Tensor) -> bool:
    """(batch, length, heads, head_dim) is contiguous; a kernel copies what is not."""
    b, h, s, d = t.shape
    return is_contiguous((b, s, h, d), tuple(t.strides[i] for i in (0, 2, 1, 3)))


# -- buffers of the backward kernels ---------------------------------------------------------------


def _flash_scratch(q: Tensor, k: Tensor) -> list[Storage]:
    """cuda/flash_attn/flash_api.cpp, mha_bwd: softmax_d and a float32 accumulator for dq over rows rounded to 128 and
    heads rounded to 32 (64 above 128); with fewer key heads, dk and dv for all heads."""
    b, h, s, d = q.shape
    rows, width = round_up(s, 128), round_up(d, 32 if d <= 128 else 64)
    tape = q.tape
    scratch = [tape.bytes(b * h * rows * 4), tape.bytes(b * rows * h * width * 4)]
    if k.shape[1] != h:
        scratch += [tape.bytes(q.dtype.nbytes((b, k.shape[2], h, d))) for _ in range(2)]
    return scratch


def _efficient_scratch(q: Tensor, k: Tensor) -> list[Storage]:
    """cuda/attention_backward.cu and mem_eff_attention/kernel_backward.h: delta per row, which float32 makes from a
    whole product; 16-bit formats accumulate dq in float32 tiles, each with 16 bytes of locks.

    A tile is 64 x 64 for heads up to 64 (checked against a recorded 8,396,800 bytes), else 128 x 128. Cards with less
    shared memory (7.5, 8.6, 8.9) keep to 64 x 64 for these wider heads and accumulate dk and dv too: not counted.
    """
    b, h, s, d = q.shape
    tape = q.tape
    if q.dtype is FLOAT32:
        product, summed = tape.bytes(b * h * s * d * 4), tape.bytes(b * h * s * 4)
        delta = tape.bytes(b * h * s * 4)
        del product, summed
        return [delta]
    tile = 64 if d <= 64 else 128
    tiles = ceil_div(s, tile) * ceil_div(d, tile)
    return [tape.bytes(b * h * s * 4), tape.bytes(b * h * tiles * (tile * tile * 4 + 16))]


def _cpu_scratch(q: Tensor, k: Tensor) -> list[Storage]:
    """cpu/FlashAttentionKernel.cpp: tiles of each thread, which depend on the machine, are not counted."""
    return []


SCRATCH: dict[str, Callable[[Tensor, Tensor], list[Storage]]] = {
    "flash": _flash_scratch,
    "efficient": _efficient_scratch,
    "cpu": _cpu_scratch,
}
