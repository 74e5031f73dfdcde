"""How torch walks over the operands of a reduction: dimensions in the order of strides, and merged where they can be.

Follows aten/src/ATen/TensorIterator.cpp (reorder_dimensions, coalesce_dimensions, with_32bit_indexing) for one result
and one operand. Strides are in bytes; dimension 0 is the fastest, and those that are summed over come first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

INT_MAX = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Reduction:
    """Sizes of the dimensions, and the strides of the result (0 in what is summed over) and of the operand.
    `itemsize` and `offset` (in elements) are the operand's."""

    shape: tuple[int, ...]
    result: tuple[int, ...]
    operand: tuple[int, ...]
    itemsize: int
    offset: int = 0

    @property
    def summed(self) -> int:
        """How many dimensions are summed over."""
        return self.result.count(0)

    @property
    def outputs(self) -> int:
        return prod(n for n, stride in zip(self.shape, self.result, strict=True) if stride)

    def parts(self) -> list[Reduction]:
        """Pieces whose bytes can be counted with 32 bits."""
        if prod(self.shape) <= INT_MAX and all(self._reach(s) <= INT_MAX for s in (self.result, self.operand)):
            return [self]
        extents = [
            (n - 1) * max(a, b) for n, a, b in zip(self.shape, self.result, self.operand, strict=True)
        ]  # fmt: skip
        widest = max(range(len(extents)), key=lambda dim: (extents[dim], dim))
        half = self.shape[widest] // 2
        low, high = self._narrowed(widest, half), self._narrowed(widest, self.shape[widest] - half)
        return [*low.parts(), *high.parts()]

    def _reach(self, strides: Sequence[int]) -> int:
        return 1 + sum((n - 1) * stride for n, stride in zip(self.shape, strides, strict=True))

    def _narrowed(self, dim: int, size: int) -> Reduction:
        return replace(self, shape=(*self.shape[:dim], size, *self.shape[dim + 1 :]))


def reduction(
    shape: Sequence[int], strides: Sequence[int], itemsize: int, over: Sequence[int], out_itemsize: int, offset: int = 0
) -> Reduction:
    """Of an operand (shape; strides and offset in elements) over some of its dimensions (none given: over all). The
    result is contiguous."""
    gone = {dim % max(len(shape), 1) for dim in over} or set(range(len(shape)))
    result, step = [0] * len(shape), out_itemsize
    for dim in reversed(range(len(shape))):
        if dim not in gone:
            result[dim] = step
            step *= shape[dim]
    rows = list(zip(shape, result, (stride * itemsize for stride in strides), strict=True))
    merged = _merged([rows[dim] for dim in _order(rows)])
    columns = list(zip(*merged, strict=True)) or [(), (), ()]
    return Reduction(columns[0], columns[1], columns[2], itemsize, offset)


Row = tuple[int, int, int]  # of a dimension: size, and the strides of the result and of the operand


def _order(rows: Sequence[Row]) -> list[int]:
    """Insertion sort, in which ambiguous pairs are passed over."""
    order = list(reversed(range(len(rows))))
    for i in range(1, len(rows)):
        here = i
        for before in reversed(range(i)):
            comes = _compared(rows[order[before]], rows[order[here]])
            if comes > 0:
                order[before], order[here] = order[here], order[before]
                here = before
            elif comes < 0:
                break
    return order


def _compared(a: Row, b: Row) -> int:
    """1 where dimension a should come after b, -1 where before, 0 where it is not clear."""
    if (a[1] == 0) != (b[1] == 0):
        return 1 if b[1] == 0 else -1
    for of_a, of_b in ((a[1], b[1]), (a[2], b[2])):
        if 0 in (of_a, of_b):
            continue
        if of_a != of_b:
            return -1 if of_a < of_b else 1
        if a[0] > b[0]:
            return 1
    return 0


def _merged(rows: Sequence[Row]) -> list[Row]:
    """Neighbors become one where the second goes on where the first ends, or one of them has a single element."""
    found: list[Row] = []
    for row in rows:
        if found and _goes_on(found[-1], row):
            size, result, operand = found[-1]
            found[-1] = (size * row[0], *(row[1:] if size == 1 else (result, operand)))
        else:
            found.append(row)
    return found


def _goes_on(a: Row, b: Row) -> bool:
    return 1 in (a[0], b[0]) or (a[0] * a[1] == b[1] and a[0] * a[2] == b[2])
