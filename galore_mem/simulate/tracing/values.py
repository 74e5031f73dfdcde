"""Questions about values, which tensors without values cannot answer: what is assumed instead."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

aten = torch.ops.aten
Answer = int | float | bool | str
EVENLY = "a top-k that chooses each equally often"
FINITE = "nothing is NaN or infinite"


class Assumed(NamedTuple):
    """A value that the program asked for, where, and what it was told."""

    module: str
    dtype: str
    answer: Answer


def answer(t: Tensor) -> int | float | bool:
    """What `t.item()` gives: True (all is finite, some are chosen), or 1."""
    if t.dtype is torch.bool:
        return True
    return 1.0 if t.dtype.is_floating_point else 1


def assumed(op: Any, args: tuple[Any, ...]) -> int | float | bool | None:
    """The answer to an operation that asks for a value of a tensor without one; None for any other operation."""
    if op is aten._local_scalar_dense.default and args[0].is_meta:
        return answer(args[0])
    if op is aten.equal.default and (args[0].is_meta or args[1].is_meta):
        return True
    return None
