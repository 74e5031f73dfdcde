"""A parameter in its group, and the state that is kept for it.

State: tensors under the names of the ledger (`galore_mem.methods`), and plain Python numbers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor

from galore_mem.errors import InputError
from galore_mem.methods.base import Buffer

State = dict[str, Any]
Group = dict[str, Any]

PENDING = "pending"  # a low-rank gradient of the micro-batches so far
MICRO = "micro_batches"


class Found(NamedTuple):
    """A parameter with its group, and its number in it."""

    p: Tensor
    group: Group
    i: int

    @property
    def name(self) -> str:
        """Its name where the optimizer was given names, else its number and shape."""
        named = self.group.get("param_names")
        return str(named[self.i]) if named else f"parameter {self.i} of its group, {tuple(self.p.shape)}"


def members(group: Group) -> Iterator[Found]:
    return (Found(p, group, i) for i, p in enumerate(group["params"]))


def fitted(at: Found, kept: Mapping[str, Any], buffers: tuple[Buffer, ...], more: Collection[str], owner: str) -> State:
    """A saved state as `owner` keeps it: tensors copied to the parameter's device, in the formats of `buffers`.

    `more` are tensors that may be there besides. Raises `InputError` where names, shapes or formats are others.
    """
    tensors = {k: v for k, v in kept.items() if isinstance(v, Tensor)}
    result: State = {k: deepcopy(v) for k, v in kept.items() if k not in tensors}
    if not tensors:
        return result
    if not isinstance(result.get("step"), int):
        raise InputError(f"{at.name}: this is no state of {owner}, which counts steps under 'step'")
    missing = [b.name for b in buffers if b.name not in tensors]
    if missing:
        raise InputError(f"{at.name}: the state has no {missing[0]!r}; it has {', '.join(tensors)}")
    expected = {b.name: b for b in buffers}
    for name, tensor in tensors.items():
        if name in expected:
            result[name] = _as_buffer(at, expected[name], tensor)
        elif name in more:
            result[name] = tensor.to(at.p.device, copy=True)
        else:
            raise InputError(f"{at.name}: the state has {name!r}, which {owner} does not keep")
    return result


def _as_buffer(at: Found, buffer: Buffer, tensor: Tensor) -> Tensor:
    packed = buffer.dtype.bits < 8  # two values per byte
    shape = (buffer.nbytes,) if packed else buffer.shape
    if tuple(tensor.shape) != shape:
        raise InputError(f"{at.name}: its {buffer.name} is {tuple(tensor.shape)} in the state, and {shape} here")
    dtype = torch.uint8 if packed else getattr(torch, buffer.dtype.name)
    if dtype != tensor.dtype and not (dtype.is_floating_point and tensor.is_floating_point()):
        raise InputError(f"{at.name}: its {buffer.name} is {tensor.dtype} in the state, and {dtype} here")
    return tensor.to(at.p.device, dtype, copy=True)
