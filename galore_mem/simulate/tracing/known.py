"""Values that follow from shapes alone: positions, causal masks, what is made of nothing but numbers.

Of each storage that only such operations have written, how it is made is written down, and worked out, on the host, if
the program asks for a value, or for a shape that depends on values. Most programs never do. What `topk` chooses does
not follow from shapes; a router's choice of experts decides shapes all the same, where a program loops over them. If it
is asked for, all are chosen equally often, which is what routers are trained to do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from galore_mem.simulate.tracing.values import EVENLY, FINITE, Answer

aten = torch.ops.aten
HOST = torch.device("cpu")
LARGEST = 2**22  # elements that are worked out
CONSTANT = 16  # elements of a tensor with values that are remembered
# what they return has no values yet
EMPTY = {aten.empty, aten.empty_strided, aten.empty_like, aten.new_empty, aten.new_empty_strided, aten.empty_permuted}
MASKS = (torch.bool, torch.uint8)  # of indices
NOT_FINITE = {aten.isnan.default, aten.isinf.default, aten.isposinf.default, aten.isneginf.default}
REDUCING = {aten.any.default, aten.any.dim, aten.any.dims, aten.sum.default, aten.sum.dim_IntList, aten.max.default}
JOINING = {aten.bitwise_or.Tensor, aten.logical_or.default}
UNSCALE = aten._amp_foreach_non_finite_check_and_unscale_.default
FILLING = {aten.fill_.Scalar, aten.zero_.default, aten.fill_.Tensor, aten.copy_.default}


class Unknown(Exception):  # noqa: N818  # an answer, not a failure
    """A value does not follow from shapes, or is too large to be worked out."""


class View(NamedTuple):
    """A tensor on a storage that is known."""

    of: Made
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class Made:
    """How a storage's content is made: the `place`-th result of an operation, or its `place`-th argument after it. A
    constant has no operation."""

    __slots__ = ("args", "kwargs", "op", "place", "value", "written")

    def __init__(self, op: Any, args: Any, kwargs: Any, place: int, written: bool, value: Tensor | None = None) -> None:
        self.op, self.args, self.kwargs, self.place, self.written, self.value = op, args, kwargs, place, written, value

    def worked_out(self) -> Tensor:
        """A tensor on the host with the storage's content. Raises `Unknown`."""
        if self.value is None:
            args, kwargs = resolved(self.args), resolved(self.kwargs)
            found = self.op(*args, **kwargs)
            found = args[self.place] if self.written else found if isinstance(found, Tensor) else found[self.place]
            self.value = found
            self.args = self.kwargs = None
        return self.value


def resolved(value: Any) -> Any:
    """Arguments with values, on storages of their own."""
    if isinstance(value, View):
        whole = value.of.worked_out().untyped_storage().clone()
        last = value.offset + sum((n - 1) * step for n, step in zip(value.size, value.stride, strict=True))
        if 0 not in value.size and (last + 1) * value.dtype.itemsize > whole.nbytes():
            raise Unknown
        empty = torch.empty(0, dtype=value.dtype, device=HOST)
        return empty.set_(whole, value.offset, value.size, value.stride)
    if isinstance(value, list | tuple):
        return [resolved(one) for one in value]
    if isinstance(value, dict):
        return {key: resolved(one) for key, one in value.items()}
    if isinstance(value, torch.device):
        return HOST
    return value


class Known:
    """What is known of the storages that live, by where they are (`StorageImpl`)."""

    def __init__(self) -> None:
        self.guessed: Answer = ""  # what an answer has rested on besides shapes
        self._finite: set[int] = set()  # storages that say where something is NaN or infinite: nowhere
        self._made: dict[int, Made] = {}

    def forget(self, key: int) -> None:
        self._made.pop(key, None)
        self._finite.discard(key)

    def note(self, op: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], value: Any) -> None:
        """What an operation that has run tells about the storages that it made or wrote."""
        if op is aten.topk.default and value[1].is_meta:
            self._keep(value[1], Made(self._spread, (tuple(value[1].shape), _width(*args)), {}, 0, written=False))
            return
        if self._says_finite(op, args, value):
            return
        writes = written_by(op)
        if writes:
            self._written(op, args, kwargs, writes)
        elif follows(op):
            self._returned(op, args, kwargs, value)

    def _returned(self, op: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], value: Any) -> None:
        first = args[0] if args else None
        if isinstance(first, Tensor) and first.is_meta and not self._has(first):
            return
        made = value if isinstance(value, list | tuple) else (value,)
        if not any(isinstance(t, Tensor) and t.is_meta for t in made):
            return
        try:
            given, named = self._described(args), self._described(dict(kwargs))
        except Unknown:
            return
        inside = {t.untyped_storage()._cdata for t in tensors((args, kwargs))}
        for place, t in enumerate(made):
            if isinstance(t, Tensor) and t.is_meta and t.untyped_storage()._cdata not in inside:
                self._keep(t, Made(op, given, named, place, written=False))

    def _written(
        self, op: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], writes: tuple[tuple[int, str], ...]
    ) -> None:
        targets = [t for i, name in writes for t in tensors(args[i] if i < len(args) else kwargs.get(name))]
        if op not in FILLING and not any(self._has(t) for t in targets):
            return
        made: Made | None = None
        if len(targets) == 1 and writes[0][0] == 0 and follows(op):
            (t,) = targets
            if t.is_meta:
                try:
                    whole = op in FILLING and t.numel() * t.itemsize == t.untyped_storage().nbytes()
                    first = self._blank(t) if whole else self._described(t)
                    rest = self._described(tuple(args[1:]))
                    made = Made(op, (first, *rest), self._described(dict(kwargs)), 0, written=True)
                except Unknown:
                    made = None
        for t in targets:
            self.forget(t.untyped_storage()._cdata)
        if made is not None:
            self._keep(targets[0], made)

    def _has(self, t: Tensor) -> bool:
        return t.untyped_storage()._cdata in self._made or not t.numel()

    def _keep(self, t: Tensor, made: Made) -> None:
        """(Of storages without bytes nobody tells when they go.)"""
        storage = t.untyped_storage()
        if 0 < storage.nbytes() <= LARGEST * 8:
            self._made[storage._cdata] = made

    def _spread(self, shape: Sequence[int], width: int) -> Tensor:
        """Indices into `width` things, each chosen equally often; those of a row differ."""
        self.guessed = EVENLY
        return (torch.arange(torch.Size(shape).numel(), device=HOST) % width).view(tuple(shape))

    def _says_finite(self, op: Any, args: tuple[Any, ...], value: Any) -> bool:
        """Does an operation ask where something is NaN or infinite, or how often? Nowhere, never."""
        if op is UNSCALE:
            for t in args[0]:
                self.forget(t.untyped_storage()._cdata)
            return True
        joined = op in JOINING and all(t.untyped_storage()._cdata in self._finite for t in args)
        if joined or op in NOT_FINITE or (op is aten.ne.Tensor and args[0] is args[1]):
            self._finite.add(value.untyped_storage()._cdata)
        elif op not in REDUCING or args[0].untyped_storage()._cdata not in self._finite:
            return False
        if value.is_meta:
            self._keep(value, Made(self._none, (tuple(value.shape), value.dtype), {}, 0, written=False))
        return True

    def _none(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        self.guessed = FINITE
        return torch.zeros(tuple(shape), dtype=dtype, device=HOST)

    def _blank(self, t: Tensor) -> View:
        """A tensor that is about to be filled."""
        args = (tuple(t.shape), tuple(t.stride()))
        empty = Made(aten.empty_strided.default, args, {"dtype": t.dtype}, 0, written=False)
        return View(empty, t.dtype, tuple(t.shape), tuple(t.stride()), 0)

    def _described(self, value: Any) -> Any:
        """Arguments with a `View` in the place of each tensor. Raises `Unknown`."""
        if isinstance(value, Tensor):
            return self._view(value)
        if isinstance(value, list | tuple):
            return [self._described(one) for one in value]
        if isinstance(value, dict):
            return {key: self._described(one) for key, one in value.items()}
        return value

    def _view(self, t: Tensor) -> View:
        if not t.is_meta:
            if t.numel() > CONSTANT or t.device.type != "cpu":
                raise Unknown
            one = Made(None, None, None, 0, written=False, value=t.detach().clone())
            return View(one, t.dtype, tuple(t.shape), tuple(one.worked_out().stride()), 0)
        if not t.numel():
            return self._blank(t)
        made = self._made.get(t.untyped_storage()._cdata)
        if made is None or t.numel() > LARGEST:
            raise Unknown
        return View(made, t.dtype, tuple(t.shape), tuple(t.stride()), int(t.storage_offset()))

    # -- questions -----------------------------------------------------------------------------------------

    def values(self, t: Tensor) -> Tensor:
        """A tensor's values. Raises `Unknown`."""
        found: Tensor = resolved(self._view(t))
        return found

    def shaped(self, op: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What an operation whose result has a shape that depends on values returns, without values. Raises
        `Unknown`."""
        if op is aten.index.Tensor:
            if not any(i is not None and i.dtype in MASKS for i in args[1]):
                raise Unknown  # its shape depends on no values
            return op(args[0], [part for i in args[1] for part in self._places(i)])
        found = op(*resolved(self._described(args)), **resolved(self._described(dict(kwargs))))
        parts = (found,) if isinstance(found, Tensor) else found
        like = tuple(torch.empty_strided(p.shape, p.stride(), dtype=p.dtype, device="meta") for p in parts)
        for p, t in zip(parts, like, strict=True):
            self._keep(t, Made(None, None, None, 0, written=False, value=p))
        return like[0] if isinstance(found, Tensor) else like

    def _places(self, index: Tensor | None) -> Iterator[Tensor | None]:
        """A mask as indices (TensorAdvancedIndexing: expandTensors)."""
        if index is None or index.dtype not in MASKS:
            yield index
            return
        for place in self.values(index).nonzero().t():
            yield torch.empty_like(place, device="meta")


def _width(t: Tensor, k: int, dim: int = -1, *more: Any) -> int:
    """Among how many `topk` chooses."""
    return t.shape[dim]


@cache
def written_by(op: Any) -> tuple[tuple[int, str], ...]:
    """Which of its arguments an operation writes."""
    listed = enumerate(op._schema.arguments)
    return tuple((i, a.name) for i, a in listed if a.alias_info is not None and a.alias_info.is_write)


@cache
def follows(op: Any) -> bool:
    """Does what the operation makes follow from what it is given?"""
    if op.namespace != "aten" or op.overloadpacket in EMPTY or torch.Tag.inplace_view in op.tags:
        return False
    return torch.Tag.nondeterministic_seeded not in op.tags


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from tensors(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from tensors(one)


ANSWERS: dict[Any, Callable[..., Any]] = {
    aten._local_scalar_dense.default: lambda known, t: known.values(t).item(),
    aten.equal.default: lambda known, a, b: torch.equal(known.values(a), known.values(b)),
}


@cache
def may_ask(op: Any) -> bool:
    """Can an operation ask for values?"""
    return op in ANSWERS or op is aten._to_copy.default or torch.Tag.dynamic_output_shape in op.tags


def told(known: Known, op: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What an operation that asks for values of tensors without them gives. Raises `Unknown`, for any other operation
    too."""
    copied = op is aten._to_copy.default
    if (copied and kwargs.get("device") != HOST) or not any(t.is_meta for t in tensors(args)):
        raise Unknown
    try:
        if op in ANSWERS:
            return ANSWERS[op](known, *args)
        if copied:
            return known.values(args[0]).to(kwargs.get("dtype") or args[0].dtype)
        return known.shaped(op, args, kwargs)
    except (RuntimeError, NotImplementedError, IndexError, ValueError) as error:
        raise Unknown from error
