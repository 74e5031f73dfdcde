"""What torch's own CPU allocator did while a program ran."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Generic, TypeVar

import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Allocations(Generic[T]):
    """`live`: bytes allocated and not freed (negative when more was freed); `peak`: the most above the start;
    `steps`: of each allocation in order, its bytes and all live bytes after it."""

    value: T
    live: int
    peak: int
    steps: list[tuple[int, int]]


def allocations(run: Callable[[], T], *, ignore: int = 0, scratch: bool = True) -> Allocations[T]:
    """Runs a program and follows the allocator's events: every allocation, kernels' own buffers included.

    `ignore` leaves out allocations of at most so many bytes; `scratch=False` leaves out those that one kernel
    both makes and frees. What `run` returns is kept, so its bytes count as live; its local names are gone.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        value = run()
    live = 0
    steps = []
    for size in _sizes(prof, scratch):
        if abs(size) > ignore:
            live += size
            if size > 0:
                steps.append((size, live))
    return Allocations(value, live, max([0, *(total for _, total in steps)]), steps)


def _sizes(prof: profile, scratch: bool) -> list[int]:
    """Bytes of each allocation in order of time, negative where they are given back."""
    found = [(event.start_time_ns, event.extra_fields, inside) for event, inside in _events(prof)]
    found.sort(key=lambda entry: entry[0])
    dropped: set[int] = set()
    if not scratch:
        born: dict[int, tuple[int, tuple[int, ...]]] = {}
        for i, (_, fields, inside) in enumerate(found):
            if fields.alloc_size > 0:
                born[fields.ptr] = i, inside
            elif fields.ptr in born:
                start, kernels = born.pop(fields.ptr)
                if set(kernels) & set(inside):
                    dropped |= {start, i}
    return [fields.alloc_size for i, (_, fields, _) in enumerate(found) if i not in dropped]


def _events(prof: profile) -> Iterator[tuple[Any, tuple[int, ...]]]:
    """The allocator's events, each with the kernels that were running."""
    results = prof.profiler
    assert results is not None
    pending = [(event, ()) for event in results.kineto_results.experimental_event_tree()]
    while pending:
        event, inside = pending.pop()
        if event.tag == _EventType.Allocation:
            if event.extra_fields.device == torch.device("cpu"):
                yield event, inside
        else:
            within = (*inside, id(event)) if _is_kernel(event.name) else inside
            pending += [(child, within) for child in event.children]


@cache
def _is_kernel(name: str) -> bool:
    """An operator that computes, not one that only calls others (linear, softmax, dropout ...)."""
    if not name.startswith("aten::"):
        return False
    for overload in getattr(torch.ops.aten, name.removeprefix("aten::")).overloads():
        full = name if overload == "default" else f"{name}.{overload}"
        known = torch._C._dispatch_has_kernel(full) and not overload.endswith("out")
        if known and not torch._C._dispatch_has_kernel_for_dispatch_key(full, "CompositeImplicitAutograd"):
            return True
    return False
