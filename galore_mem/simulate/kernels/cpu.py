"""The CPU kernels' own buffers, with one thread and without oneDNN (`galore_mem.verify.kernels`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from galore_mem.simulate.kernels import (
    RESULTS,
    Program,
    Rule,
    changes_only,
    convolution,
    grouped_mm,
    lapack,
    nbytes,
    safe_softmax,
)

aten = torch.ops.aten
HALF = (torch.float16, torch.bfloat16)
TILE = 60  # aten/src/ATen/native/Copy.cpp, copy_same_type_transpose_


def pointwise(args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Program | None:
    """TensorIterator.cpp, compute_types: operands of another format than the common one are copied first, and results
    of another format are computed in a copy."""
    operands = [a for a in args if isinstance(a, Tensor)]
    numbers = [a for a in args if isinstance(a, int | float) and not isinstance(a, bool)]
    if not operands:
        return None
    common = operands[0].dtype
    for other in operands[1:]:
        common = torch.result_type(_like(operands[0], common), other) if other is not operands[0] else common
    if numbers and not common.is_floating_point:
        for number in numbers:
            common = torch.result_type(_like(operands[0], common), number)
    if isinstance(result, Tensor) and result.dtype.is_floating_point and not common.is_floating_point:
        common = result.dtype
    casts = [t.numel() * common.itemsize for t in operands if t.dtype != common]
    changed = isinstance(result, Tensor) and operands and result is operands[0]
    if changed and result.dtype != common:
        casts.insert(0, result.numel() * common.itemsize)
    return (*casts, RESULTS) if casts else None


def where(args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
    """The condition stays as it is; the others are converted by operations of their own (TensorCompare.cpp, and
    TensorAdvancedIndexing.cpp: masked_fill)."""
    return


def _like(t: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=dtype, device="meta")


def sums(args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Program | None:
    """ReduceOps.cpp: what is summed in another format is copied in it first."""
    t = args[0]
    return (t.numel() * result.dtype.itemsize, RESULTS) if t.dtype != result.dtype else None


def mean(args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Program | None:
    """ReduceOps.cpp, mean_out: a 16-bit mean is a sum in float32, cast back."""
    t = args[0]
    return (t.numel() * 4, result.numel() * 4, RESULTS) if t.dtype in HALF else None


def attention(args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Program:
    """cpu/FlashAttentionKernel.cpp, cpu_flash_attention: scores, two columns of sums and a tile of the output in
    float32; 16-bit formats copy the scores."""
    q, k = args[0], args[1]
    rows, columns = _tiles(q.shape[2], k.shape[2])
    more = (rows * columns * q.dtype.itemsize,) if q.dtype in HALF else ()
    return (RESULTS, 4 * (rows * columns + 2 * rows + rows * q.shape[-1]), *more)


def attention_backward(args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Program:
    """cpu_flash_attention_backward: a copy of an incoming gradient whose rows are not in order, scores and their
    gradient in float32, 16-bit copies of both, and a sum a row."""
    grad, q, k = args[:3]
    copied = () if grad.transpose(1, 2).is_contiguous() else (nbytes(grad),)
    rows, columns = _tiles(q.shape[2], k.shape[2])
    more = (2 * rows * columns * q.dtype.itemsize,) if q.dtype in HALF else ()
    return (RESULTS, *copied, 2 * 4 * rows * columns, *more, 4 * rows)


def _tiles(queries: int, keys: int) -> tuple[int, int]:
    """Rows and columns of a tile (flash_attention_kernel_impl)."""
    rows = 256 if queries >= 768 else 64 if queries >= 192 else 32
    return min(rows, queries), min(512, keys)


def layer_norm_backward(args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Program:
    """cpu/layer_norm_kernel.cpp, LayerNormBackwardKernelImpl: a thread's sums for weight and bias."""
    size = 1
    for n in args[2]:
        size *= n
    weight = args[5]
    return (RESULTS, 2 * size * (args[1] if weight is None else weight).dtype.itemsize)


def copy(args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Program | None:
    """Copy.cpp, copy_transpose_valid: a matrix is transposed through a tile."""
    source = args[1] if isinstance(args[1] if len(args) > 1 else None, Tensor) else args[0]
    transposed = (
        source.dim() == 2
        and source.numel() >= TILE * TILE
        and source.stride() == (1, source.shape[0])
        and result.is_contiguous()
        and not source.is_contiguous()
        and source.shape == result.shape
        and source.dtype == result.dtype
    )
    return (RESULTS, TILE * TILE * source.dtype.itemsize) if transposed else None


def embedding(args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Program | None:
    """Embedding.cpp: the tokens in one row, which is a copy where they are expanded."""
    return None if args[1].is_contiguous() else (nbytes(args[1]), RESULTS)


def embedding_backward(args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Program | None:
    """Embedding.cpp, embedding_dense_backward_cpu: tokens, and a gradient that is a part of another, in order."""
    copies = [nbytes(t) for t in (args[1], args[0]) if not t.is_contiguous()]
    return (RESULTS, *copies) if copies else None


def scattered(args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Program | None:
    """cpu/ScatterGatherKernel.cpp, create_acc_buffer: formats of 16 bits are scattered and gathered in float32."""
    return (RESULTS, 4 * result.numel()) if result.dtype in HALF else None


def svd(args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Program:
    """BatchLinearAlgebra.cpp: status words, and the column-major copy that LAPACK destroys; a copy that transposes goes
    through a tile (Copy.cpp)."""
    t = args[0]
    matrices = t.numel() // (t.shape[-1] * t.shape[-2])
    transposed = t.stride(-1) == 1 and t.shape[-1] * t.shape[-2] >= TILE * TILE
    return (RESULTS, 4 * matrices, nbytes(t), *((TILE * TILE * t.dtype.itemsize, ~2) if transposed else ()))


def qr(args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Program | None:
    """BatchLinearAlgebra.cpp, linalg_qr_out, for one matrix: factors of the reflections, and LAPACK's workspaces."""
    t, mode = args[0], args[1] if len(args) > 1 else "reduced"
    if t.dim() != 2 or mode == "r":
        return None
    m, n = t.shape
    rows = result[0].shape[1]
    factors = min(m, n) * t.dtype.itemsize
    decomposing, making = lapack.geqrf(m, n, t.dtype), lapack.orgqr(m, rows, min(m, n), t.dtype)
    return (RESULTS, factors, decomposing, ~1, making, ~2) if decomposing and making else (RESULTS, factors)


def eigh(args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Program | None:
    """BatchLinearAlgebraKernel.cpp, apply_lapack_eigh, for one matrix."""
    if args[0].dim() != 2:
        return None
    work, integers = lapack.syevd(args[0].shape[0], args[0].dtype)
    return (RESULTS, work, integers, ~1, ~0) if work and integers else None


RULES: dict[Any, Rule] = {
    aten.where.self: where,
    **dict.fromkeys(
        (aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.masked_fill_.Scalar, aten.masked_fill_.Tensor), where
    ),
    aten.sum.default: sums,
    aten.sum.dim_IntList: sums,
    aten.cumsum.default: sums,
    aten.mean.dim: mean,
    aten.mean.default: mean,
    aten._scaled_dot_product_flash_attention_for_cpu.default: attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: attention_backward,
    aten.native_layer_norm_backward.default: layer_norm_backward,
    aten.embedding.default: embedding,
    aten.embedding_dense_backward.default: embedding_backward,
    **dict.fromkeys(
        (
            aten.gather.default,
            aten.scatter.src,
            aten.scatter.value,
            aten.scatter_.src,
            aten.scatter_.value,
            aten.scatter_add.default,
            aten.scatter_add_.default,
        ),
        scattered,
    ),
    aten.convolution.default: convolution.forward,
    aten.convolution_backward.default: convolution.backward,
    aten._linalg_svd.default: svd,
    aten.linalg_qr.default: qr,
    aten._linalg_eigh.default: eigh,
    aten._safe_softmax.default: safe_softmax,
    aten._to_copy.default: copy,
    aten.clone.default: copy,
    aten.copy_.default: copy,
}
# the order in which results are made, where it is not the order in which they are returned
ORDER: dict[str, tuple[int, ...]] = {
    "aten.convolution_backward.default": (0, 2, 1),
    "aten._linalg_svd.default": (0, 2, 1),
    "aten._linalg_eigh.default": (1, 0),
    "bitsandbytes.quantize_blockwise.default": (1, 0),
}


def layer_norm(t: Tensor, shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float) -> list[Tensor]:
    """layer_norm.cpp: means and reciprocal deviations in the weights' format."""
    out, mean, rstd = aten.native_layer_norm.default(t, shape, weight, bias, eps)
    wanted = (t if weight is None else weight).dtype
    return [out, *(kept if kept.dtype == wanted else torch.empty_like(kept, dtype=wanted) for kept in (mean, rstd))]


# operations whose results differ from those that torch gives for tensors without values
RUN: dict[Any, Any] = {
    aten.native_layer_norm.default: layer_norm,
    aten._grouped_mm.default: grouped_mm("cpu"),
    aten._fused_sgd_.default: changes_only,
}

# kernels written in Python, of other operations (bitsandbytes 0.50, backends/cpu/ops.py, backends/default/ops.py): they
# run, and what they allocate is seen. None: torch's dispatcher finds the function
COMPOSED: dict[str, Callable[..., Any] | None] = dict.fromkeys(
    f"bitsandbytes::{name}"
    for name in ("optimizer_update_8bit_blockwise", "optimizer_update_32bit", "gemm_4bit", "quantize_4bit")
)
CUBLAS: frozenset[Any] = frozenset()


def rule(op: Any) -> Rule | None:
    """The rule of an operation."""
    found = RULES.get(op)
    if found is None and torch.Tag.pointwise in op.tags:
        return pointwise
    return found
