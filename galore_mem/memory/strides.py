"""Where the elements of a tensor lie: the arithmetic of shapes and strides.

Layout decides bytes: whether a reshape is a view or a copy, whether a gradient can be taken over as it is.
Everything here is a function of tuples, and cached.
"""

from __future__ import annotations

from functools import lru_cache

Shape = tuple[int, ...]

_cached = lru_cache(maxsize=4096)


@_cached
def contiguous_strides(shape: Shape) -> Shape:
    """Strides of elements that lie in order."""
    strides = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


@_cached
def is_contiguous(shape: Shape, strides: Shape) -> bool:
    step = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1:
            if stride != step:
                return False
            step *= size
    return True


@_cached
def is_dense(shape: Shape, strides: Shape) -> bool:
    """Some order of the dimensions is contiguous (TensorImpl.cpp, compute_non_overlapping_and_dense)."""
    step = 1
    for stride, size in sorted((stride, size) for stride, size in zip(strides, shape, strict=True) if size > 1):
        if stride != step:
            return False
        step *= size
    return True


@_cached
def view_strides(shape: Shape, strides: Shape, new: Shape) -> Shape | None:
    """Strides of the tensor seen in another shape, None when that needs a copy (TensorUtils.cpp, computeStride)."""
    if is_contiguous(shape, strides):
        return contiguous_strides(new)
    found = [0] * len(new)
    view_d = len(new) - 1
    chunk_stride = strides[-1]
    tensor_numel = view_numel = 1
    for d in range(len(shape) - 1, -1, -1):
        tensor_numel *= shape[d]
        if d == 0 or (shape[d - 1] != 1 and strides[d - 1] != tensor_numel * chunk_stride):
            while view_d >= 0 and (view_numel < tensor_numel or new[view_d] == 1):
                found[view_d] = view_numel * chunk_stride
                view_numel *= new[view_d]
                view_d -= 1
            if view_numel != tensor_numel:
                return None
            if d > 0:
                chunk_stride = strides[d - 1]
                tensor_numel = view_numel = 1
    return tuple(found) if view_d == -1 else None


@_cached
def broadcast(a: Shape, b: Shape) -> Shape:
    width = max(len(a), len(b))
    return tuple(max(x, y) for x, y in zip((1,) * (width - len(a)) + a, (1,) * (width - len(b)) + b, strict=True))


@_cached
def result_strides(shape: Shape, *operands: tuple[Shape, Shape]) -> Shape:
    """Strides of a new elementwise result: dense, in the order of dimensions of the first operand that has one
    (TensorIterator.cpp, reorder_dimensions; with one operand also ExpandUtils.cpp, infer_dense_strides)."""
    width = len(shape)
    strides = [_expanded(shape, *operand) for operand in operands]
    order = list(range(width - 1, -1, -1))  # fastest first
    for i in range(1, width):
        at = i
        for j in range(i - 1, -1, -1):
            comparison = _compare(shape, strides, order[j], order[at])
            if comparison < 0:
                break
            if comparison > 0:
                order[j], order[at] = order[at], order[j]
                at = j
    found = [0] * width
    step = 1
    for d in order:
        found[d] = step
        step *= shape[d]
    return tuple(found)


def _expanded(shape: Shape, own: Shape, strides: Shape) -> Shape:
    """The operand's strides over the result's dimensions, 0 where it is broadcast."""
    missing = len(shape) - len(own)
    kept = (0 if o == 1 != size else s for o, s, size in zip(own, strides, shape[missing:], strict=True))
    return (0,) * missing + tuple(kept)


def _compare(shape: Shape, operands: list[Shape], a: int, b: int) -> int:
    """Positive if dimension b is faster than a, negative if a is, 0 if no operand can tell."""
    for strides in operands:
        if not strides[a] or not strides[b]:
            continue
        if strides[a] != strides[b]:
            return -1 if strides[a] < strides[b] else 1
        if shape[a] > shape[b]:
            return 1
    return 0
