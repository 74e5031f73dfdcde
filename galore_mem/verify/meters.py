"""Meters: how many bytes were allocated at the highest moment of each phase.

On the CPU, torch's own allocator events (every allocation, kernels' own buffers included), followed from before the
first tensor. On an accelerator, the allocator's counters, reset at the start of each phase.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import torch
from torch.profiler import ProfilerActivity, profile, record_function

MARK = "galore_mem.phase:"


class Peak(NamedTuple):
    """The highest number of allocated bytes in a phase, and of reserved ones where the allocator tells."""

    allocated: int
    reserved: int | None = None


class Meter(AbstractContextManager["Meter"], Protocol):
    """Used around a case's whole life. `enter(phase)` ends the phase before and starts another; a phase that is
    entered again has its highest moment of all. `peaks()` is asked after the end."""

    def enter(self, phase: str) -> None: ...

    def peaks(self) -> dict[str, Peak]: ...


class CpuMeter:
    """Follows the allocator's events through the profiler."""

    def __init__(self) -> None:
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._peaks: dict[str, Peak] = {}

    def __enter__(self) -> CpuMeter:
        self._profile.start()
        return self

    def enter(self, phase: str) -> None:
        with record_function(MARK + phase):
            pass

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self._profile.stop()
        if kind is None:
            self._peaks = self._read()

    def peaks(self) -> dict[str, Peak]:
        return self._peaks

    def _read(self) -> dict[str, Peak]:
        happened = sorted(_happened(self._profile), key=lambda one: one[0])
        live, phase = 0, "start"
        highest: dict[str, int] = {}
        for _, what in happened:
            if isinstance(what, str):
                phase = what
            else:
                live += what
            highest[phase] = max(highest.get(phase, 0), live)
        return {name: Peak(size) for name, size in highest.items() if name != "start"}


def _happened(recorded: profile) -> Iterator[tuple[int, str | int]]:
    """Phase marks and allocations (negative: given back) with their times."""
    from torch._C._profiler import _EventType

    results = recorded.profiler
    assert results is not None
    assert results.kineto_results is not None
    pending: list[Any] = list(results.kineto_results.experimental_event_tree())
    while pending:
        event = pending.pop()
        if event.tag == _EventType.Allocation:
            if event.extra_fields.device == torch.device("cpu"):
                yield event.start_time_ns, event.extra_fields.alloc_size
        else:
            if event.name.startswith(MARK):
                yield event.start_time_ns, event.name.removeprefix(MARK)
            pending += event.children


class CudaMeter:
    """Reads the caching allocator's counters. `cuda` is `torch.cuda`, or in tests what behaves like it."""

    def __init__(self, cuda: Any = torch.cuda) -> None:
        self._cuda = cuda
        self._phase: str | None = None
        self._peaks: dict[str, Peak] = {}

    def __enter__(self) -> CudaMeter:
        self._cuda.synchronize()
        self._cuda.empty_cache()
        self._cuda.reset_peak_memory_stats()
        return self

    def enter(self, phase: str) -> None:
        self._end()
        self._phase = phase
        self._cuda.reset_peak_memory_stats()

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self._end()

    def peaks(self) -> dict[str, Peak]:
        return self._peaks

    def _end(self) -> None:
        if self._phase is None:
            return
        self._cuda.synchronize()
        now = Peak(self._cuda.max_memory_allocated(), self._cuda.max_memory_reserved())
        before = self._peaks.get(self._phase, Peak(0, 0))
        self._peaks[self._phase] = Peak(
            max(now.allocated, before.allocated), max(now.reserved or 0, before.reserved or 0)
        )
        self._phase = None


METERS = {"cpu": CpuMeter, "cuda": CudaMeter}
