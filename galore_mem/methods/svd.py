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


def orthonormal(slot: Slot, shape: Shape, given: Tensor) -> Tensor:
    """`torch.linalg.qr(given.float()).Q`: Q, R and tau beside the matrix given."""
    wide = in_float32(slot, given)
    del given
    fresh = slot.new(shape, FLOAT32)
    r, tau = slot.new((shape[1], shape[1]), FLOAT32), slot.new((shape[1],), FLOAT32)
    del r, tau, wide
    return fresh


def in_float32(slot: Slot, given: Tensor) -> Tensor:
    return given if given.dtype is FLOAT32 else slot.new(given.shape, FLOAT32, given)


def product(slot: Slot, shape: Shape, dtype: DType, basis: Tensor) -> Tensor:
    """A matrix of format `dtype` times a float32 basis, which is cast first."""
    return slot.new(shape, dtype, basis if dtype is FLOAT32 else slot.new(basis.shape, dtype))


def leading(slot: Slot, shape: Shape, dtype: DType, r: int, q: int, rounds: int) -> Tensor:
    """Our randomized projector (`galore_mem/optim/projection.py`) of a matrix long x short: short x r, float32.

    Each of the rounds multiplies a short x q basis by the matrix and back, and orthonormalizes it while the basis
    before is alive; then the products with the last basis are ordered by a q x q eigenproblem.
    """
    long, short = shape
    basis = slot.new((short, q), FLOAT32)
    for _ in range(rounds):
        basis = orthonormal(slot, (short, q), slot.new((short, q), dtype, product(slot, (long, q), dtype, basis)))
    image = in_float32(slot, product(slot, (long, q), dtype, basis))
    vectors = slot.new((q, q), FLOAT32, slot.new((q, q), FLOAT32))
    chosen = slot.new((short, r), FLOAT32, slot.new((q, r), FLOAT32))
    del basis, image, vectors
    return chosen


TILE = 60
QR_WORKSPACE = "the QR driver's workspace (its size is the library's)"
SVD_WORKSPACE = "the SVD driver's own workspace (cuSOLVER gesvdj; its size is not public)"
