"""A run on its device: which bytes of its allocator each allocation takes, and the highest moment of each phase."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from galore_mem.allocator.device import Addresses, AscendingAddresses, Device
from galore_mem.allocator.events import Alloc, EmptyCache, Event, Free
from galore_mem.allocator.events import Mark as Begins
from galore_mem.allocator.expandable import new_allocator
from galore_mem.allocator.replay import ReplayResult, replay
from galore_mem.allocator.settings import AllocatorSettings
from galore_mem.simulate.addresses import DriverAddresses
from galore_mem.simulate.trace import Moment, Trace

LINUX = "linux"
# how the card's driver hands out addresses, which decide between free blocks of one size (docs/recordings.md)
PLATFORMS: dict[str, type[Addresses]] = {LINUX: DriverAddresses, "windows": AscendingAddresses}


@dataclass(frozen=True, slots=True)
class Run:
    """A run that its device could serve. `blocks` are the bytes that each allocation took of the allocator, by its
    number; `reserved` what the allocator held of the device after each event. (On the CPU a tensor's bytes, and
    nothing is kept.)"""

    trace: Trace
    blocks: Mapping[int, int]
    reserved: array[int] | None = None
    replayed: ReplayResult | None = None
    platform: str = LINUX

    def moments(self) -> Iterator[tuple[int, str, list[int]]]:
        """(number of the event before, phase, live bytes by category), as of the trace, in the allocator's blocks."""
        return self.trace.moments(self.blocks)

    def highest(self) -> dict[str, Moment]:
        """The highest moment of each phase, the first of equal ones."""
        return self.trace.peaks(self.blocks)

    def most_reserved(self) -> dict[str, int]:
        """The most that was reserved in each phase; nothing on the CPU."""
        found: dict[str, int] = {}
        for phase in () if self.replayed is None else self.replayed.phases:
            found[phase.name] = max(found.get(phase.name, 0), phase.peak_reserved_bytes)
        return found

    def slack(self, at: int) -> int:
        """Bytes of the blocks that live after event number `at` which no tensor's own (rounded) bytes fill."""
        return sum(self.blocks[i] - self.trace.nbytes(i) for i in self.trace.alive(at))


def on_cpu(trace: Trace) -> Run:
    return Run(trace, {i: trace.nbytes(i) for i in trace.events if i >= 0})


def card(capacity: int | None = None, other: int = 0, platform: str = LINUX) -> Device:
    """A card of so many bytes (None: no limit), `other` of which are taken, whose driver hands out addresses as on a
    platform."""
    return Device(capacity, other, PLATFORMS[platform]())


def on_cuda(
    trace: Trace, settings: AllocatorSettings, capacity: int | None = None, other: int = 0, platform: str = LINUX
) -> Run:
    """The run through the caching allocator of a device, `other` bytes of which are taken. `replayed` tells whether it
    could serve all of it; if not, the run is what happened until then."""
    stream = list(requests(trace))
    result = replay(stream, new_allocator(settings, card(capacity, other, platform)), timeline=True)
    assert result.timeline is not None
    blocks: dict[int, int] = {}
    reserved, before = array("q"), 0
    for event, allocated, held in zip(stream, *(result.timeline.allocated, result.timeline.reserved), strict=False):
        if isinstance(event, Begins | EmptyCache):
            continue
        if isinstance(event, Alloc):
            blocks[event.id] = allocated - before
        reserved.append(held)
        before = allocated
    return Run(trace, blocks, reserved, result, platform)


def requests(trace: Trace) -> Iterator[Event]:
    """A trace as the allocator's events. A cache that is emptied where a phase begins is emptied before it does: what
    the phase reserves at its highest is without it."""
    emptied = frozenset(trace.emptied)
    phases = iter(trace.marks)
    upcoming = next(phases, None)
    for at, event in enumerate(trace.events):
        if at in emptied:
            yield EmptyCache()
        while upcoming is not None and upcoming.at == at:
            yield Begins(upcoming.phase)
            upcoming = next(phases, None)
        yield Alloc(event, trace.allocations[event].nbytes) if event >= 0 else Free(~event)


def refused_at(run: Run) -> int | None:
    """The number of the event that the device could not serve."""
    return None if run.replayed is None or run.replayed.out_of_memory is None else len(run.reserved or ())
