"""Scaled dot-product attention: which kernel runs, and what each allocates and saves.

Query is (batch, heads, length, head_dim), key and value have their own number of heads.
"""

from __future__ import annotations

from collections.abc import Sequence

from galore_mem.dtypes import BFLOAT16, BOOL, FLOAT16, FLOAT32, INT64
from galore_mem.memory.ops import autocast
from galore_mem.memory.tape import Grads, Shape, Storage, Tensor
from galore_mem.units import round_up


def sdpa_kernel(q: Tensor, mask: Tensor | None, capability: tuple[int, int] | None) -> str:
    """Which kernel `F.scaled_dot_product_attention` takes (cuda/sdp_utils.cpp): `flash`, `efficient` or `cpu`.

    Flash needs a 16-bit format, no mask, a head of at most 256 and compute capability 8.0; without a
    stated capability a card of that age is assumed.
    """
    if q.tape.device == "cpu":
        return "cpu"
    flash = q.dtype in (FLOAT16, BFLOAT16) and mask is None and q.shape[-1] <= 256
    return "flash" if flash and (capability is None or capability >= (8, 0)) else "efficient"


def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    kernel: str | None,
    dropout: float = 0.0,
    causal: bool = True,
) -> Tensor:
    """Attention without materialised scores. Saves query, key, value, the output and a log-sum-exp per row.

    The output's memory order is (batch, length, heads, head_dim), as each kernel writes it. Fewer key and
    value heads than query heads are read in place (`enable_gqa`).
    """
    q, k, v = autocast(q), autocast(k), autocast(v)
    tape = q.tape
    if mask is not None:
        # a boolean mask becomes an additive one, anew in each call (attention.cpp, convert_boolean_attn_mask)
        mask = tape.empty(mask.shape, q.dtype) if mask.dtype is BOOL else autocast(mask)
    kernel = kernel or sdpa_kernel(q, mask, None)
    shapes, dtype = (q.shape, k.shape, v.shape), q.dtype

    def backward(saved: Sequence[Tensor], grads: Sequence[Tensor | None]) -> Grads:
        outs = tuple(tape.empty(shape, dtype, strides=_heads_last(shape)) for shape in shapes)
        scratch = _BACKWARD_SCRATCH[kernel](q_shape=shapes[0], k_shape=shapes[1], tensor=outs[0])
        del scratch
        return outs

    saved = (q, k, v) if mask is None else (q, k, v, mask)
    node = tape.node("ScaledDotProductAttentionBackward", (q, k, v), saved, backward)
    b, h, s, _ = q.shape
    shape = (*q.shape[:-1], v.shape[-1])
    out = tape.empty(shape, dtype, strides=_heads_last(shape))
    rows = round_up(s, 32) if kernel == "efficient" else s
    lse = tape.empty((b, h, rows), FLOAT32)
    keep = [out, lse]
    if kernel != "cpu":
        keep += [tape.empty((2,), INT64), tape.empty((), INT64)]  # philox seed and offset
    tape.bind(node, out)
    tape.save(node, keep)
    return out


def _heads_last(shape: Shape) -> Shape:
    _, h, s, d = shape
    return (s * h * d, d, h * d, 1)


def _flash_scratch(q_shape: Shape, k_shape: Shape, tensor: Tensor) -> list[Storage]:
    """flash_attn/flash_api.cpp, mha_bwd: softmax_d and a float32 accumulator for dq over rows rounded to 128 and
    heads rounded to 32; with fewer key heads, dk and dv expanded to all heads."""
    b, h, s, d = q_shape
    rows, width = round_up(s, 128), round_up(d, 32)
    tape = tensor.tape
    scratch = [tape.bytes(b * h * rows * 4), tape.bytes(b * rows * h * width * 4)]
    if k_shape[1] != h:
        scratch += [tape.bytes(tensor.dtype.nbytes((b, k_shape[2], h, d))) for _ in range(2)]
    return scratch


def _efficient_scratch(q_shape: Shape, k_shape: Shape, tensor: Tensor) -> list[Storage]:
    """mem_eff_attention/kernel_backward.h: delta per row; 16-bit formats accumulate dq in a float32 workspace with 256
    bytes of counters a head (rows rounded to 64; checked against a recorded 8,396,800 bytes)."""
    b, h, s, d = q_shape
    tape = tensor.tape
    scratch = [tape.bytes(b * h * s * 4)]
    if tensor.dtype is not FLOAT32:
        scratch.append(tape.bytes(b * h * (round_up(s, 64) * d * 4 + 256)))
    return scratch


def _cpu_scratch(q_shape: Shape, k_shape: Shape, tensor: Tensor) -> list[Storage]:
    """cpu/FlashAttentionKernel.cpp: per-thread tiles, which depend on the machine and are not counted."""
    return []


_BACKWARD_SCRATCH = {"flash": _flash_scratch, "efficient": _efficient_scratch, "cpu": _cpu_scratch}
