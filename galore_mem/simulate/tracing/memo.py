"""What operations return on tensors without values, remembered: shapes, strides and formats do not change.

torch works an operation's result out anew each time it is called on a meta tensor, which takes up to 0.15 ms where it
does so in Python. A program of training repeats few operations on few shapes. Operations that return new tensors, or
only change those they are given, are remembered by what they were given; views are cheap and always run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from galore_mem.simulate.kernels import Program

Op = Any  # an overload, as torch hands it to a dispatch mode
SCALARS = (int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
ALIGNED = 4  # elements that a kernel loads at once: where a tensor begins decides whether it may (`reductions`)
FRESH, IN_PLACE, RUN = "returns new tensors", "changes what it is given", "has to run"


class NotRemembered(Exception):  # noqa: N818  # a turn, not a failure
    """An argument that a result cannot be remembered by."""


class Result(NamedTuple):
    """What an operation returned, and what its kernel allocates besides."""

    value: Any
    program: Program | None


class Known(NamedTuple):
    """How to make an operation's result again (None: it returns its first argument, or nothing)."""

    make: Callable[[], Any] | None
    program: Program | None


class Memo:
    """Runs operations, from memory where it can. `program` says what a kernel allocates for itself; `instead` has
    functions to run in the place of some operations."""

    def __init__(self, program: Callable[[Op, Any, Any, Any], Program | None], instead: Mapping[Op, Any]) -> None:
        self._program = program
        self._instead = instead
        self._known: dict[Any, Known] = {}
        self._kinds: dict[Op, str] = {}

    def run(self, op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Result:
        how = self._kinds.get(op)
        if how is None:
            how = self._kinds[op] = kind(op)
        if how is RUN:
            value = op(*args, **kwargs)
            return Result(value, self._program(op, args, kwargs, value))
        try:
            default = torch.get_default_dtype()  # of what is made without a format
            key: Any = (op, described(args), described(tuple(kwargs.items())) if kwargs else (), default)
        except NotRemembered:
            key = None
        known = self._known.get(key) if key is not None else None
        if known is None:
            return self._first(op, args, kwargs, how, key)
        if known.make is not None:
            return Result(known.make(), known.program)
        return Result(args[0] if op._schema.returns else None, known.program)

    def _first(self, op: Op, args: tuple[Any, ...], kwargs: dict[str, Any], how: str, key: Any) -> Result:
        value = self._instead.get(op, op)(*args, **kwargs)
        program = self._program(op, args, kwargs, value)
        if key is not None and any(t.is_meta for t in flat((args, kwargs, value))):  # others have values, and must run
            make = maker(value, args, kwargs) if how is FRESH else None
            if make is not None or how is IN_PLACE:
                self._known[key] = Known(make, program)
        return Result(value, program)


def kind(op: Op) -> str:
    """How an operation can be remembered, by its schema."""
    schema = op._schema
    if op.namespace != "aten" or torch.Tag.inplace_view in op.tags or torch.Tag.dynamic_output_shape in op.tags:
        return RUN
    returned = [r.alias_info for r in schema.returns]
    changed = [i for i, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write]
    if not changed:
        return FRESH if returned and all(alias is None for alias in returned) else RUN
    if op._opname.endswith("_") and changed[0] == 0 and len(returned) <= 1:
        return IN_PLACE
    return RUN


def described(value: Any) -> Any:
    """An argument as part of a key. Raises `NotRemembered` for what has none."""
    if isinstance(value, Tensor):
        if value.layout is not torch.strided:
            raise NotRemembered
        return value.shape, value.stride(), value.dtype, value.is_meta, value.storage_offset() % ALIGNED
    if isinstance(value, SCALARS):
        return value.__class__, value
    if isinstance(value, list | tuple):
        return tuple([described(one) for one in value])
    raise NotRemembered


def flat(values: Any) -> Iterator[Tensor]:
    """All tensors in nested lists and dictionaries."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, Mapping):
        yield from flat(list(values.values()))
    elif isinstance(values, list | tuple):
        for one in values:
            yield from flat(one)


def maker(result: Any, args: Any, kwargs: Any) -> Callable[[], Any] | None:
    """A function that makes the like of a result; None where it cannot be made from shapes. (The function must not keep
    the result itself alive.)"""
    given = {t.untyped_storage()._cdata for t in flat((args, kwargs))}
    if isinstance(result, Tensor):
        return _like(result, given)
    if isinstance(result, list | tuple):
        parts = [_like(r, given) if isinstance(r, Tensor) else _constant(r) for r in result]
        made = [part for part in parts if part is not None]
        if len(made) < len(parts):
            return None
        container = type(result)
        return lambda: container([m() for m in made])
    return None


def _constant(value: Any) -> Callable[[], Any] | None:
    return (lambda: value) if isinstance(value, SCALARS) else None


def _like(t: Tensor, given: set[int]) -> Callable[[], Tensor] | None:
    """For a plain tensor that fills a storage of its own."""
    if not t.is_meta or t.layout is not torch.strided or type(t) is not Tensor:
        return None
    size, stride, dtype = t.shape, t.stride(), t.dtype
    storage, again = t.untyped_storage(), torch.empty_strided(size, stride, dtype=dtype, device="meta")
    if storage._cdata in given or storage.nbytes() != again.untyped_storage().nbytes():
        return None
    return lambda: torch.empty_strided(size, stride, dtype=dtype, device="meta")
