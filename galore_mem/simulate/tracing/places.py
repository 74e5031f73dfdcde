"""Where the tensors of a program of one's own are: on the simulated device, or, with a card, in host memory.

torch knows one kind of tensors without values, on `meta`, and both are of it. A storage in host memory is remembered
here; all others are the device's. What the program asks (`tensor.device`) and says (`device="cuda"`) is translated;
torch itself sees `meta` alone. Small tensors in host memory are real ones, with values, as a program's data, indices
and random orders are; parameters never are.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from galore_mem.simulate.tracing.memo import flat

aten = torch.ops.aten
META, HOST = torch.device("meta"), torch.device("cpu")
CARD = torch.device("cuda", 0)
SMALL = 2**20  # elements of a tensor in host memory that has values
NO_CODE = torch._C._disabled_torch_dispatch_impl
# operations that take tensors from both sides (TensorIteratorConfig.allow_cpu_scalars is for all others' scalars)
ACROSS = {
    aten.copy_,
    aten._foreach_copy_,
    aten.set_,
    aten.index,
    aten.index_put_,
    aten.index_put,
    aten._index_put_impl_,
}
WHOLE = {aten.randint, aten.randperm, aten.tril_indices, aten.triu_indices}


class Mixed(RuntimeError):  # noqa: N818  # a program's failure, by what it did
    """An operation on tensors of two devices."""


class Places:
    """Of one traced program; `device` is the simulated one, cuda or cpu."""

    def __init__(self, device: str) -> None:
        self.has_card = device == "cuda"
        self.in_host = False  # is the result of the operation that runs now in host memory?
        self.mixed = False  # has it operands with values and without?
        self.compiled = False  # has the program asked for torch.compile?
        self.used = False  # has the program put something on the device?
        self._host: dict[int, weakref.ref[Any]] = {}
        self.on_gone: Callable[[int], None] = lambda key: None  # is told storages in host memory that are no more
        self._below = 0  # inside of torch, which is told the truth
        self._device: Any = torch._C.TensorBase.device

    # -- questions -----------------------------------------------------------------------------------------

    def holds(self, t: Tensor) -> bool:
        """Is this tensor in host memory, beside a card?"""
        if not self.has_card:
            return False
        return not t.is_meta or (bool(self._host) and t.untyped_storage()._cdata in self._host)

    def named(self, t: Tensor) -> torch.device:
        """What the program is told of a tensor's device."""
        found: torch.device = self._device.__get__(t)
        if self._below or found.type != "meta":
            return found
        if not self.has_card or (type(t).__torch_dispatch__ is NO_CODE and self.holds(t)):
            return HOST
        return CARD

    @contextmanager
    def below(self) -> Iterator[None]:
        """What runs inside is torch's own code, and ours."""
        self._below += 1
        try:
            yield
        finally:
            self._below -= 1

    def keeps(self, t: Tensor) -> bool:
        """Is the storage of a new tensor in host memory? (It is remembered.)"""
        if not t.is_meta:
            return False
        storage = t.untyped_storage()
        key = storage._cdata
        if self.in_host and key not in self._host:
            self._host[key] = weakref.ref(storage, lambda _: self._gone(key))
        self.used = self.used or key not in self._host
        return key in self._host

    def _gone(self, key: int) -> None:
        del self._host[key]
        self.on_gone(key)

    # -- operations ----------------------------------------------------------------------------------------

    def placed(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The named arguments of an operation with a device that torch has here; decides where its result is. Raises
        `Mixed`."""
        if takes_device(op):
            self.mixed = False
            given = next(flat(args), None)
            device = kwargs.get("device")
            if device is None and given is not None:
                self.in_host = self.holds(given)
                return kwargs
            to_host = device is None or device.type == "cpu"
            self.in_host = self.has_card and to_host
            if op is aten._to_copy.default and to_host:
                return kwargs  # which the values are asked for first
            if given is not None:
                real = to_host and not given.is_meta
            else:  # (beside floats without values, which the device's are, C++ would find some with to be elsewhere)
                real = to_host and elements(op, args) <= SMALL and (self.has_card or not floating(op, args, kwargs))
            kwargs = {**kwargs, "device": HOST if real else META}
            kwargs.pop("pin_memory", None)
            return kwargs
        self._of_operands(op, args, kwargs)
        return kwargs

    def _of_operands(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = list(flat((args, kwargs) if kwargs else args))
        metas = [t.is_meta for t in given]
        self.mixed = True in metas and False in metas
        self.in_host = False
        if not given or not self.has_card or not (self._host or False in metas):
            return
        there = [self.holds(t) for t in given]
        sides = {side for side, t in zip(there, given, strict=True) if t.dim()}
        if len(sides) == 2 and op.overloadpacket not in ACROSS:
            raise Mixed(str(op))
        self.in_host = there[0] if len(sides) != 1 else True in sides  # (indices may come from the host)

    def alike(self, args: Any, known: dict[int, Tensor]) -> Any:
        """Arguments with a tensor without values in the place of each with some; `known` tells which stands for which,
        by its identity."""
        if isinstance(args, Tensor):
            if args.is_meta or type(args).__torch_dispatch__ is not NO_CODE:
                return args
            like = torch.empty_strided(args.shape, args.stride(), dtype=args.dtype, device=META)
            known[id(like)] = args
            return like
        if isinstance(args, list | tuple):
            return type(args)(self.alike(one, known) for one in args)
        if isinstance(args, dict):
            return {key: self.alike(one, known) for key, one in args.items()}
        return args


@cache
def takes_device(op: Any) -> bool:
    """Can an operation be told where to make its result?"""
    return any(a.name == "device" for a in op._schema.arguments)


def floating(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Does an operation without tensors make floating-point numbers?"""
    if kwargs.get("dtype") is not None:
        return bool(kwargs["dtype"].is_floating_point)
    if op.overloadpacket in WHOLE:
        return False
    if op.overloadpacket in (aten.arange, aten.full, aten.scalar_tensor):
        return any(isinstance(one, float) for one in args)
    return True


def elements(op: Any, args: tuple[Any, ...]) -> int:
    """Of what an operation without tensors makes, at most."""
    sizes = [one for one in args if isinstance(one, list | tuple | torch.Size)]
    if sizes:
        return torch.Size(n for n in sizes[0] if isinstance(n, int)).numel()
    numbers = [abs(one) for one in args if isinstance(one, int | float)]
    if op.overloadpacket in (aten.eye, aten.tril_indices, aten.triu_indices):
        return int(max(numbers, default=0)) ** 2
    return int(sum(numbers))
