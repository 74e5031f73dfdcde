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
    """The most bytes in a phase; all but the first only where the allocator or the driver tells.

    `allocated`: blocks in use, on CUDA multiples of 512 bytes, with up to 1 MiB more in a block that was not worth
    splitting (CUDACachingAllocator.cpp, should_split). `reserved`: segments taken from the device. `requested`: what
    was asked for, without either rounding. `device_used`: what the device had less free, at the phase's end, than
    before the first tensor: segments, kernels loaded and libraries' own memory since then, and whatever other processes
    took meanwhile (the driver tells of the device, not of a process). The context was there before.
    """

    allocated: int
    reserved: int | None = None
    requested: int | None = None
    device_used: int | None = None


COUNTERS = ("allocated_bytes.all.peak", "reserved_bytes.all.peak", "requested_bytes.all.peak")


class Meter(AbstractContextManager["Meter"], Protocol):
    """Used around a case's whole life. `enter(phase)` ends the phase before and starts another; a phase that is
    entered again has its highest moment of all. The rest is asked after the end. `workspaces`: bytes of `allocated`,
    in every phase after the first, that libraries keep (None: not known)."""

    @property
    def workspaces(self) -> int | None: ...

    def enter(self, phase: str) -> None: ...

    def peaks(self) -> dict[str, Peak]: ...


class CpuMeter:
    """Follows the allocator's events through the profiler."""

    workspaces = None

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


class AcceleratorMeter:
    """Reads the counters of the accelerator's caching allocator, and how much of its memory the driver calls free.

    The counters are the host's: they change when a tensor is made or dropped, not when its kernel has run. They are
    read after waiting for the device all the same, so that a kernel's error belongs to its own phase. A phase's peak
    starts at what is allocated when it begins; what is reserved also holds what earlier phases let go of, as in any
    training run. Recording the allocator's history takes host memory only and changes none of this.

    `accelerator` is `torch.accelerator`, or in tests what behaves like it.
    """

    def __init__(self, accelerator: Any = torch.accelerator) -> None:
        self._accelerator = accelerator
        self._phase: str | None = None
        self._most: dict[str, tuple[int, ...]] = {}
        self._free = 0
        self.workspaces: int | None = None

    def __enter__(self) -> AcceleratorMeter:
        self._accelerator.synchronize()
        self._accelerator.empty_cache()
        self._free, _ = self._accelerator.get_memory_info()
        return self

    def enter(self, phase: str) -> None:
        self._end()
        self._phase = phase
        self._accelerator.reset_peak_memory_stats()

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self._end()
            self.workspaces = self._cleared()

    def peaks(self) -> dict[str, Peak]:
        """(`requested` is 0 where the allocator does not tell, as cudaMallocAsync.)"""
        return {phase: Peak(a, r, q or None, used) for phase, (a, r, q, used) in self._most.items()}

    def _end(self) -> None:
        if self._phase is None:
            return
        self._accelerator.synchronize()
        stats, (free, _) = self._accelerator.memory_stats(), self._accelerator.get_memory_info()
        now = (*(int(stats.get(counter, 0)) for counter in COUNTERS), self._free - free)
        self._most[self._phase] = tuple(map(max, now, self._most.get(self._phase, now)))
        self._phase = None

    def _cleared(self) -> int | None:
        """Bytes that go when torch gives up cuBLAS' workspaces (aten/src/ATen/cuda/CublasHandlePool.cpp: one for each
        thread and stream that has multiplied matrices, kept for good)."""
        clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
        if clear is None:
            return None
        before = self._accelerator.memory_allocated()
        clear()
        return int(before - self._accelerator.memory_allocated())


METERS: dict[str, type[CpuMeter] | type[AcceleratorMeter]] = {"cpu": CpuMeter, "cuda": AcceleratorMeter}
