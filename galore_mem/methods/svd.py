"""The tensors torch's allocator holds while a projector is computed."""

from __future__ import annotations

from galore_mem.dtypes import FLOAT32, INT32, DType
from galore_mem.memory.tape import Shape, Tensor
from galore_mem.methods.base import Slot


def full_svd(slot: Slot, shape: Shape, dtype: DType) -> tuple[Tensor, Tensor, Tensor]:
    """`torch.linalg.svd(a.float(), full_matrices=False)`: U (m x k), S (k), Vh (k x n), in float32.

    Alive together: the float32 copy of a narrower input, the column-major copy that the driver destroys,
    U, S, Vh and the status word (torch/aten BatchLinearAlgebraKernel.cpp and
    cuda/linalg/BatchLinearAlgebraLib.cpp). The driver's own workspace is closed source on CUDA and is
    listed under `not_counted`; LAPACK's does not come from torch's allocator.
    """
    m, n = shape
    k = min(m, n)
    work = slot.new(shape, FLOAT32) if dtype is not FLOAT32 else None
    u, s, vh = slot.new((m, k), FLOAT32), slot.new((k,), FLOAT32), slot.new((k, n), FLOAT32)
    scratch = slot.new((1,), INT32), column_major(slot, shape)
    del work, scratch
    return u, s, vh


def column_major(slot: Slot, shape: Shape) -> Tensor:
    """A float32 copy in column-major order. On the CPU a transposing copy of 3600 elements or more goes
    through a tile of 60 x 60 (aten/src/ATen/native/Copy.cpp, copy_same_type_transpose_)."""
    copy = slot.new(shape, FLOAT32)
    if slot.tape.device == "cpu" and copy.numel >= TILE * TILE:
        slot.new((TILE, TILE), FLOAT32)
    return copy


def low_rank_svd(slot: Slot, shape: Shape, dtype: DType, q: int) -> tuple[Tensor, Tensor]:
    """`torch.svd_lowrank(a.float(), q)`, two power iterations: U (m x q) and V (n x q) (torch/_lowrank.py).

    The matrix is transposed to be tall, l x c. Each orthogonalization of an l x q or c x q product X makes Q, R
    and tau while the random matrix, X and the previous Q are alive.
    """
    long, short = max(shape), min(shape)
    work = slot.new(shape, FLOAT32) if dtype is not FLOAT32 else None
    random = slot.new((short, q), FLOAT32)
    basis: Tensor | None = None
    for rows in (long, short, long, short, long):
        product = slot.new((rows, q), FLOAT32)
        fresh, r, tau = slot.new((rows, q), FLOAT32), slot.new((q, q), FLOAT32), slot.new((q,), FLOAT32)
        del r, tau
        basis = fresh
        del fresh
    del random, product
    small = slot.new((q, short), FLOAT32)
    u, s, vh = full_svd(slot, (q, short), FLOAT32)
    u = slot.new((long, q), FLOAT32, u)
    del work, basis, small, s
    v = vh.like((short, q))
    return (u, v) if shape[0] >= shape[1] else (v, u)


TILE = 60
QR_WORKSPACE = "the QR driver's workspace (its size is the library's)"
SVD_WORKSPACE = "the SVD driver's own workspace (cuSOLVER gesvdj; its size is not public)"
