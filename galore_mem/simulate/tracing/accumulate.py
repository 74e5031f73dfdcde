"""What autograd does in place, and does not while a dispatch mode looks on.

Where gradients meet, the engine adds to the first in place if nobody else holds it (input_buffer.cpp,
can_accumulate_inplace), and some derivatives write into a tensor of zeros. With a dispatch mode both make a new tensor
(isTensorSubclassLike). Who holds a tensor shows in its reference counts: they are compared with those of one that only
the engine holds.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

# modules whose code runs between autograd's engine and a dispatch mode
BETWEEN = ("galore_mem.simulate.", "torch._ops", "torch.library", "torch._compile", "torch._dynamo.eval_frame")


class Owners(NamedTuple):
    """References: to the tensor and to its storage in C++, to the tensor in Python."""

    tensor: int
    storage: int
    python: int


def owners(args: tuple[Any, ...]) -> Owners:
    """Of the first argument that a dispatch mode was given."""
    t: Tensor = args[0]
    return Owners(
        t._use_count(),  # type: ignore[attr-defined]  # not in torch's stubs
        torch._C._storage_Use_Count(t.untyped_storage()._cdata),
        sys.getrefcount(t),
    )


@cache
def sole() -> Owners:
    """How a gradient that only the engine holds looks."""
    found: list[Owners] = []

    class Look(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is aten.add.Tensor:
                found.append(owners(args))
            return func(*args, **(kwargs or {}))

    x = torch.empty(2, device="meta", requires_grad=True)
    with Look():  # type: ignore[no-untyped-call]  # untyped in torch
        y = x * 2
        (y * 3 * (y * 4)).sum().backward()
    return found[0]


# What formulas of derivatives do in place with a tensor of zeros that they have just made, and out of place while a
# dispatch mode looks on (FunctionsManual.cpp: value_selecting_reduction_backward, index_backward;
# TensorAdvancedIndexing.cpp: gather_backward, index_select_backward; take_backward).
INTO_ZEROS = {
    aten.scatter.src: aten.scatter_.src,
    aten.scatter_add.default: aten.scatter_add_.default,
    aten.index_add.default: aten.index_add_.default,
    aten.index_put.default: aten.index_put_.default,
    aten.put.default: aten.put_.default,
}


def in_place(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The operation that runs without a dispatch mode: this one, or in backward its twin that works in place."""
    if op is not aten.add.Tensor and op not in INTO_ZEROS:
        return op
    if kwargs or torch._C._current_graph_task_id() == -1 or torch.is_grad_enabled():
        return op
    held = owners(args)
    if op is aten.add.Tensor:
        same = isinstance(args[1], Tensor) and args[0].shape == args[1].shape
        return aten.add_.Tensor if same and held == sole() else op
    return INTO_ZEROS[op] if held.storage == sole().storage and _by_formula() else op


def _by_formula() -> bool:
    """Does one of torch's own derivatives run, and not a function or hook in Python? Then nothing but this package and
    torch's dispatcher is between here and where the engine was started."""
    frame = sys._getframe(1)
    while frame.f_globals.get("__name__", "").startswith(BETWEEN) and frame.f_back is not None:
        frame = frame.f_back
    return frame.f_code is _engine_run_backward.__code__
