"""Operations that move nothing or only copy: views, reshapes, copies, joins."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from math import prod

from galore_mem.dtypes import DType, promote
from galore_mem.memory.strides import contiguous_strides, result_strides, view_strides
from galore_mem.memory.tape import Grads, Shape, Tensor

Kept = Sequence[Tensor]  # what a backward function receives: the tensors its operation saved,
Incoming = Sequence[Tensor | None]  # and one gradient for each of its outputs


def first(grads: Incoming) -> Tensor:
    """The gradient of an operation's only output."""
    grad = grads[0]
    assert grad is not None, "the engine runs no node without a gradient"
    return grad


# -- views: no bytes of their own ------------------------------------------------------------------


def _viewed(t: Tensor, name: str, shape: Shape, strides: Shape) -> Tensor:
    before = t.shape

    def backward(saved: Kept, grads: Incoming) -> Grads:
        return (_reshaped(first(grads), before),)

    node = t.tape.node(name, (t,), (), backward)
    out = t.like(shape, strides)
    t.tape.bind(node, out)
    return out


def _reshaped(t: Tensor, shape: Shape) -> Tensor:
    """reshape without the graph: a view where possible, otherwise a contiguous copy."""
    strides = view_strides(t.shape, t.strides, shape)
    return t.tape.empty(shape, t.dtype) if strides is None else t.like(shape, strides)


def view(t: Tensor, *shape: int) -> Tensor:
    """Another shape over the same storage. A single -1 is inferred."""
    full = _infer(t, shape)
    strides = view_strides(t.shape, t.strides, full)
    assert strides is not None, f"view of {t.shape} {t.strides} as {full} needs a copy; torch would raise"
    return _viewed(t, "ViewBackward", full, strides)


def reshape(t: Tensor, *shape: int) -> Tensor:
    """A view where strides allow it, otherwise a view of a contiguous copy."""
    full = _infer(t, shape)
    strides = view_strides(t.shape, t.strides, full)
    if strides is None:
        t = contiguous(t)
        strides = contiguous_strides(full)
    return _viewed(t, "ViewBackward", full, strides)


def _infer(t: Tensor, shape: Shape) -> Shape:
    if -1 not in shape:
        return shape
    known = -prod(shape)
    return tuple(t.numel // known if s == -1 else s for s in shape)


def transpose(t: Tensor, a: int, b: int) -> Tensor:
    """Two dimensions exchanged."""

    def swap(values: Shape) -> Shape:
        swapped = list(values)
        swapped[a], swapped[b] = swapped[b], swapped[a]
        return tuple(swapped)

    def backward(saved: Kept, grads: Incoming) -> Grads:
        grad = first(grads)
        return (grad.like(swap(grad.shape), swap(grad.strides)),)

    node = t.tape.node("TransposeBackward", (t,), (), backward)
    out = t.like(swap(t.shape), swap(t.strides))
    t.tape.bind(node, out)
    return out


def unsqueeze(t: Tensor, dim: int) -> Tensor:
    """A new dimension of size 1 at a non-negative position."""
    stride = t.strides[dim] * t.shape[dim] if dim < len(t.shape) else 1
    shape = (*t.shape[:dim], 1, *t.shape[dim:])
    return _viewed(t, "UnsqueezeBackward", shape, (*t.strides[:dim], stride, *t.strides[dim:]))


def expand(t: Tensor, *shape: int) -> Tensor:
    """Dimensions of size 1 repeated without copying; backward sums them. -1 keeps a size."""
    full = tuple(now if size == -1 else size for now, size in zip(t.shape, shape, strict=True))
    strides = tuple(s if now == size else 0 for now, size, s in zip(t.shape, full, t.strides, strict=True))
    node = t.tape.node("ExpandBackward", (t,), (), _pass_through)  # the engine sums it to the input's shape
    out = t.like(full, strides)
    t.tape.bind(node, out)
    return out


def _pass_through(saved: Kept, grads: Incoming) -> Grads:
    return (grads[0],)


def narrow(t: Tensor, dim: int, length: int) -> Tensor:
    """A slice along one dimension; backward writes into zeros of the full shape (slice_backward)."""
    dim %= len(t.shape)
    full = t.shape

    def backward(saved: Kept, grads: Incoming) -> Grads:
        grad = first(grads)
        return (grad.tape.empty(full, grad.dtype),)

    node = t.tape.node("SliceBackward", (t,), (), backward)
    out = t.like((*full[:dim], length, *full[dim + 1 :]), t.strides)
    t.tape.bind(node, out)
    return out


def split(t: Tensor, length: int, dim: int) -> list[Tensor]:
    """Slices of equal length along one dimension; backward joins their gradients in one new tensor, with zeros for
    a slice that nothing used (split_with_sizes_backward)."""
    dim %= len(t.shape)
    tape, full, dtype = t.tape, t.shape, t.dtype
    part = (*full[:dim], length, *full[dim + 1 :])

    def backward(saved: Kept, grads: Incoming) -> Grads:
        zeros = [tape.empty(part, dtype) for grad in grads if grad is None]
        joined = tape.empty(full, dtype)
        del zeros
        return (joined,)

    count = full[dim] // length
    node = tape.node("SplitBackward", (t,), (), backward, outputs=count)
    outs = [t.like(part, t.strides) for _ in range(count)]
    tape.bind(node, *outs)
    return outs


# -- copies ----------------------------------------------------------------------------------------


def contiguous(t: Tensor) -> Tensor:
    """The tensor itself when its elements lie in order, otherwise a copy in which they do."""
    return t if t.is_contiguous else _copy(t, "CloneBackward", t.dtype, None)


def clone(t: Tensor) -> Tensor:
    """A copy in the same order of dimensions."""
    return _copy(t, "CloneBackward", t.dtype, result_strides(t.shape, t.layout))


def to(t: Tensor, dtype: DType) -> Tensor:
    """A copy in another format; the tensor itself when it has it already."""
    return t if t.dtype is dtype else _copy(t, "ToCopyBackward", dtype, result_strides(t.shape, t.layout))


def _copy(t: Tensor, name: str, dtype: DType, strides: Shape | None) -> Tensor:
    node = t.tape.node(name, (t,), (), _pass_through)  # the engine casts back
    out = t.tape.empty(t.shape, dtype, strides=strides)
    t.tape.bind(node, out)
    return out


def pad_last(t: Tensor, size: int) -> Tensor:
    """Zeros added at the end of the last dimension: a contiguous copy; backward copies them off again
    (PadNd.cpp, constant_pad_nd)."""
    before = t.shape

    def backward(saved: Kept, grads: Incoming) -> Grads:
        grad = first(grads)
        return (grad.tape.empty(before, grad.dtype, strides=result_strides(before, (before, grad.strides))),)

    node = t.tape.node("ConstantPadBackward", (t,), (), backward)
    out = t.tape.empty((*before[:-1], size), t.dtype)
    t.tape.bind(node, out)
    return out


def cat(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Joined along one dimension; backward hands out views of the one gradient (cat_tensors_backward)."""
    dim %= len(parts[0].shape)
    shapes = [p.shape for p in parts]

    def backward(saved: Kept, grads: Incoming) -> Grads:
        grad = first(grads)
        return tuple(grad.like(shape, grad.strides) for shape in shapes)

    tape = parts[0].tape
    node = tape.node("CatBackward", parts, (), backward)
    shape = (*shapes[0][:dim], sum(s[dim] for s in shapes), *shapes[0][dim + 1 :])
    out = tape.empty(shape, reduce(promote, (p.dtype for p in parts)))
    tape.bind(node, out)
    return out
