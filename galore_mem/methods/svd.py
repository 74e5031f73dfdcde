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
    listed under `not_counted`.
    """
    m, n = shape
    k = min(m, n)
    work = slot.new(shape, FLOAT32) if dtype is not FLOAT32 else None
    u, s, vh = slot.new((m, k), FLOAT32), slot.new((k,), FLOAT32), slot.new((k, n), FLOAT32)
    scratch = slot.new(shape, FLOAT32), slot.new((1,), INT32)
    del work, scratch
    return u, s, vh


SVD_WORKSPACE = "the SVD driver's own workspace (cuSOLVER gesvdj; its size is not public)"
