"""The tensors that a value keeps alive, found through whatever Python holds them, and their storages."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor

CODE = (type, ModuleType, FunctionType, BuiltinFunctionType, MethodType, CodeType)
PLAIN = (str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device, torch.Size, torch.Generator)


def tensors(value: Any, name: str = "", without: Iterable[object] = ()) -> Iterator[tuple[str, Tensor]]:
    """Every plain tensor under `value` with its dotted path: inside tensor subclasses, containers and objects, but for
    the objects in `without` and what they hold."""
    yield from _walk(value, name, {id(one) for one in without})


def _walk(value: Any, name: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, (*PLAIN, *CODE)) or id(value) in seen:
        return
    seen.add(id(value))
    inner: Iterable[tuple[Any, Any]]
    if isinstance(value, Tensor) and hasattr(value, "__tensor_flatten__"):
        inner = [(key, getattr(value, key)) for key in value.__tensor_flatten__()[0]]
    elif isinstance(value, Tensor):
        yield name, value
        return
    elif isinstance(value, Mapping):
        inner = value.items()
    elif isinstance(value, list | tuple | set | frozenset | deque):
        inner = enumerate(value)
    else:
        slots = [s for kind in type(value).__mro__ for s in getattr(kind, "__slots__", ())]
        inner = {**getattr(value, "__dict__", {}), **{s: getattr(value, s, None) for s in slots}}.items()
    for key, one in inner:
        called = "(parameter)" if isinstance(key, Tensor) else str(key)
        yield from _walk(one, f"{name}.{called}" if name else called, seen)


def storage(t: Tensor) -> tuple[int, int]:
    """What tells a storage from others (one without memory, on `meta`, its object), and its bytes."""
    kept = t.untyped_storage()
    return kept.data_ptr() or kept._cdata, kept.nbytes()


def total(found: Iterable[Tensor], device: torch.device, known: set[int] | None = None) -> int:
    """Bytes of the storages on a device, each once. Those in `known` are left out; the others join it."""
    counted = set() if known is None else known
    size = 0
    for t in found:
        key, nbytes = storage(t)
        if t.device.type == device.type and nbytes and key not in counted:
            counted.add(key)
            size += nbytes
    return size
