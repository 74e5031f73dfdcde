"""The casts that an autocast region inserts before operations."""

from __future__ import annotations

from typing import TypeVar

from galore_mem.dtypes import FLOAT32
from galore_mem.memory.tape import Tensor
from galore_mem.memory.views import to

Maybe = TypeVar("Maybe", Tensor, Tensor | None)


def autocast(t: Maybe) -> Maybe:
    """The tensor in the autocast region's format. Casts of trained leaves from float32 are made once and cached; a
    frozen weight is cast each time (autocast_mode.cpp, cached_cast). Callers cast an operation's arguments from the
    last to the first, as the compiled wrapper evaluates them."""
    if t is None:
        return t
    tape = t.tape
    if tape.autocast is None or not t.dtype.floating or t.dtype is tape.autocast:
        return t
    if t.node is None or t.node not in tape.leaves or t.dtype is not FLOAT32:
        return to(t, tape.autocast)
    cached = tape.autocast_cache.get(id(t.storage))
    if cached is None:
        cached = tape.autocast_cache[id(t.storage)] = to(t, tape.autocast)
    return cached


def autocast_wide(t: Tensor) -> Tensor:
    """The tensor in float32 inside a region, for operations on CUDA's float32 list (autocast_mode.h,
    AT_FORALL_FP32; the CPU's list has none of those modelled here but losses)."""
    return t if t.tape.autocast is None or t.tape.device == "cpu" else to(t, FLOAT32)
