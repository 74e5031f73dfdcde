"""What eager kernels allocate besides their result, where the CPU and CUDA differ.

CUDA kernels convert between formats element by element. CPU kernels work on whole tensors of one
format, so that mixed operands, and means of half-precision tensors, pass through float32 copies.
"""

from __future__ import annotations

from galore_mem.dtypes import FLOAT32, DType
from galore_mem.memory.reductions import reduce
from galore_mem.memory.tape import Shape, Tensor
from galore_mem.methods.base import Job, Slot


def as_float32(slot: Slot, tensor: Tensor | None) -> Tensor | None:
    """`tensor.float()`: the same tensor when it is float32 already, else a float32 copy."""
    if tensor is None or tensor.dtype is FLOAT32:
        return tensor
    return slot.new(tensor.shape, FLOAT32, tensor)


def converted(slot: Slot, tensor: Tensor, dtype: DType) -> Tensor:
    """`tensor.to(dtype)`: the same tensor when it has that format already."""
    return tensor if tensor.dtype is dtype else slot.new(tensor.shape, dtype, tensor)


def left(shape: Shape, over: int | None, *, keep: bool = False) -> Shape:
    """What a reduction over one dimension (None: over all) leaves of a shape; `keep`: as a dimension of size 1."""
    if over is None:
        return ()
    over %= len(shape)
    return (*shape[:over], *((1,) if keep else ()), *shape[over + 1 :])


def norm(slot: Slot, shape: Shape, dtype: DType, over: int | None, *, keep: bool = False) -> Tensor:
    """`torch.linalg.vector_norm(t, dim=over)` (or a sum) of a contiguous tensor of this shape: the result, and CUDA's
    scratch for it, which is gone when it is there."""
    result = slot.new(left(shape, over, keep=keep), dtype)
    if slot.tape.device == "cuda":
        reduce(Tensor(slot.tape.bytes(0), shape, dtype), () if over is None else (over,))
    return result


def mean(slot: Slot, job: Job, shape: Shape, dtype: DType, over: int, *, keep: bool = False) -> Tensor:
    """`t.mean(over)` of a tensor of this shape.

    On the CPU a half-precision mean is `t.to(float32).sum(dim).div_(size).to(dtype)`, the copy alive to
    the end (aten/src/ATen/native/ReduceOps.cpp, mean_out).
    """
    if job.device == "cpu" and dtype is not FLOAT32:
        reduced = left(shape, over, keep=keep)
        wide, total = slot.new(shape, FLOAT32), slot.new(reduced, FLOAT32)
        result = slot.new(reduced, dtype, wide, total)
        del wide, total
        return result
    return norm(slot, shape, dtype, over, keep=keep)


def add_float32(slot: Slot, job: Job) -> None:
    """`weight.add_(update)` with a float32 update.

    On the CPU a narrower weight is updated through two float32 copies of it, one read and one written
    (aten/src/ATen/TensorIterator.cpp, compute_types: common dtype of inputs and of outputs).
    """
    if job.device == "cpu" and slot.param.dtype is not FLOAT32:
        written, read = slot.new(slot.param.shape, FLOAT32), slot.new(slot.param.shape, FLOAT32)
        del written, read
