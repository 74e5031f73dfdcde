"""What CUDA's reductions allocate in a traced program: the twin's rule (`galore_mem.memory.reductions`).

An `element` function gives the bytes of one partial result of an operand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from galore_mem.memory.reductions import launches
from galore_mem.simulate.kernels import RESULTS, Program, Rule
from galore_mem.simulate.tracing import branches

HALF = (torch.float16, torch.bfloat16)


def number(t: Tensor) -> int:
    """Sums are in the operand's format, 16-bit ones in float32."""
    return 4 if t.dtype in HALF else t.itemsize


def same(t: Tensor) -> int:
    """A value of the operand's own format: maxima, minima."""
    return t.itemsize


def pair(t: Tensor) -> int:
    """A value and where it is (thrust::pair with a 64-bit index)."""
    return 16


def truth(t: Tensor) -> int:
    """A boolean."""
    return 1


def reduce(element: Callable[[Tensor], int], *, wide: bool = False, place: int = 1) -> Rule:
    """The rule of a reduction. `wide`: numbers that are no floats are first copied in the result's format
    (ReduceOpsUtils.h, make_reduction). `place`: which argument the dimensions are."""

    def rule(args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Program | None:
        t, out = args[0], result if isinstance(result, Tensor) else result[0]
        if not t.numel():
            return None
        program: list[int] = []
        strides, itemsize, offset = t.stride(), t.itemsize, t.storage_offset()
        if wide and t.dtype != out.dtype and not t.is_floating_point():
            program.append(t.numel() * out.itemsize)
            itemsize, offset = out.itemsize, 0
        own = len(program)
        program.append(RESULTS)
        capability = branches.setup().compute_capability
        over = _over(args, kwargs, place)
        found = launches(tuple(t.shape), strides, itemsize, over, out.itemsize, element(t), capability, offset)
        if found.pieces > 1 and t.dtype in HALF and out.dtype == t.dtype:
            program.append(out.numel() * 4)  # AccumulationBuffer
            own += 1
        for one in found.scratch:
            program += [one.partial, one.counters, ~(own + 1), ~own]
            own += 2
        return tuple(program) if own else None

    return rule


def _over(args: tuple[Any, ...], kwargs: dict[str, Any], place: int) -> tuple[int, ...]:
    """The dimensions that a reduction is over: none for all."""
    said = args[place] if len(args) > place else kwargs.get("dim")
    return (said,) if isinstance(said, int) else tuple(said or ())
