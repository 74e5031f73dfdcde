"""CUDA kernels' own buffers, from the twin's tables where it has them (`galore_mem.memory`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from galore_mem.memory import attention
from galore_mem.simulate.kernels import (
    RESULTS,
    Program,
    Recorder,
    Rule,
    changes_only,
    grouped_mm,
    nbytes,
    nf4,
    safe_softmax,
    sorting,
)
from galore_mem.simulate.kernels.reductions import number, pair, reduce, same, truth
from galore_mem.simulate.tracing import branches
from galore_mem.units import round_up

aten = torch.ops.aten
HALF = (torch.float16, torch.bfloat16)


def softmax_backward(args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Program:
    """cuda/SoftMax.cu, softmax_backward_cuda_out: grad * output, in the gradient's format."""
    return (nbytes(args[0]), RESULTS)


def embedding_backward(args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Program | None:
    """cuda/Embedding.cu."""
    return sorting.embedding_backward(args[1], result, branches.setup().compute_capability)


def index_put(args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Program | None:
    """cuda/Indexing.cu, index_put_with_sort_kernel."""
    return sorting.index_put(args, branches.setup().compute_capability)


def attention_backward(kernel: str) -> Rule:
    """Copies of operands whose rows are not in order, the gradients, then the kernel's buffers."""
    its_out = {"flash": 4, "efficient": 5}[kernel]

    def rule(args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Program:
        tape = Recorder("cuda")
        read = (args[0], args[its_out])
        copies = [tape.bytes(nbytes(t)) for t in read if not attention.rows_in_order(tape.like(t))]
        tape.program.append(RESULTS)
        scratch = attention.SCRATCH[kernel](tape.like(args[1]), tape.like(args[2]))
        program = tuple(tape.program)
        del copies, scratch
        return program

    return rule


def efficient_gradients(*args: Any, **kwargs: Any) -> Any:
    """torch 2.14's kernel takes fewer key heads than query heads; 2.13's rule for tensors without values would return
    gradients for all."""
    op = aten._scaled_dot_product_efficient_attention_backward.default
    q, k = args[1], args[2]
    found = op(*args, **kwargs)
    if q.shape[1] == k.shape[1]:
        return found
    _, h, s, d = k.shape
    grads = (torch.empty_strided(k.shape, (s * h * d, d, h * d, 1), dtype=k.dtype, device=k.device) for _ in "kv")
    return (found[0], *grads, found[3])


def efficient_forward(args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Program | None:
    """mem_eff_attention/kernel_forward.h, kNeedsOutputAccumulatorBuffer."""
    out = result[0]
    return (RESULTS, out.numel() * 4) if out.dtype in HALF and out.shape[-1] > 128 else None


def svd(args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Program:
    """cuda/linalg/BatchLinearAlgebraLib.cpp: status words, and the column-major copy that the driver destroys. (The
    driver's workspace is closed source.)"""
    matrices = args[0].numel() // (args[0].shape[-1] * args[0].shape[-2])
    return (RESULTS, 4 * matrices, nbytes(args[0]))


def grouped(args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Program | None:
    """cuda/GroupMM.cu, of bfloat16 on 9.0 and 10.x: pointers, strides and sizes of each group. (CUTLASS' workspace,
    some KiB, is left out.) Other cards and formats loop over the groups with cuBLAS (native/GroupedMMUtils.h)."""
    a, b, capability = args[0], args[1], branches.setup().compute_capability
    if capability is None or capability[0] not in (9, 10) or a.dtype is not torch.bfloat16:
        return None
    ragged = a.dim() == b.dim() == 2
    groups = args[2].shape[0] if ragged else (b if a.dim() == 2 else a).shape[0]
    return (RESULTS, 3 * 8 * round_up(groups, 2) + groups * (3 * 4 + 3 * 8))


RULES: dict[Any, Rule] = {
    aten._grouped_mm.default: grouped,
    aten.sum.default: reduce(number, wide=True),
    aten.sum.dim_IntList: reduce(number, wide=True),
    aten.mean.default: reduce(number),
    aten.mean.dim: reduce(number),
    aten.prod.default: reduce(number, wide=True),
    aten.prod.dim_int: reduce(number, wide=True),
    aten.linalg_vector_norm.default: reduce(number, place=2),
    aten.max.dim: reduce(pair),
    aten.min.dim: reduce(pair),
    aten.argmax.default: reduce(pair),
    aten.argmin.default: reduce(pair),
    aten.max.default: reduce(same),
    aten.min.default: reduce(same),
    aten.amax.default: reduce(same),
    aten.amin.default: reduce(same),
    aten.all.default: reduce(truth),
    aten.all.dim: reduce(truth),
    aten.any.default: reduce(truth),
    aten.any.dim: reduce(truth),
    aten.index_put_.default: index_put,
    aten._index_put_impl_.default: index_put,
    aten._softmax_backward_data.default: softmax_backward,
    aten.embedding_dense_backward.default: embedding_backward,
    aten._scaled_dot_product_flash_attention_backward.default: attention_backward("flash"),
    aten._scaled_dot_product_efficient_attention_backward.default: attention_backward("efficient"),
    aten._scaled_dot_product_efficient_attention.default: efficient_forward,
    aten._linalg_svd.default: svd,
    aten._safe_softmax.default: safe_softmax,
}
# the order in which results are made, where it is not the order in which they are returned; results that are not named
# lie in host memory (random states of the efficient kernel, outside of graph capture)
ORDER: dict[str, tuple[int, ...]] = {
    "aten._linalg_svd.default": (0, 2, 1),
    "aten._scaled_dot_product_efficient_attention.default": (0, 1),
    "bitsandbytes.quantize_4bit.default": (1, 0),
    "bitsandbytes.quantize_blockwise.default": (1, 0),
}
# operations whose results differ from those that torch gives for tensors without values
RUN: dict[Any, Any] = {
    aten._grouped_mm.default: grouped_mm("cuda"),
    aten._fused_sgd_.default: changes_only,
    aten._scaled_dot_product_efficient_attention_backward.default: efficient_gradients,
}
# kernels that are other operations, as functions of these
COMPOSED: dict[str, Callable[..., Any] | None] = {"bitsandbytes::gemm_4bit": nf4.gemm_4bit}
# products that cuBLAS does (cuda/Blas.cpp): a thread's first one makes its workspace
CUBLAS: frozenset[Any] = frozenset(
    (
        aten.mm,
        aten.addmm,
        aten._addmm_activation,
        aten.bmm,
        aten.baddbmm,
        aten.mv,
        aten.addmv,
        aten.dot,
        aten.vdot,
        aten._grouped_mm,
    )
)


def rule(op: Any) -> Rule | None:
    """The rule of an operation."""
    return RULES.get(op)
