"""Run a stream of events through the allocator: peaks for each phase and overall, when, and what is left."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass

from galore_mem.allocator.blocks import HELD, Block, SegmentLayout
from galore_mem.allocator.caching import CachingAllocator
from galore_mem.allocator.events import Alloc, EmptyCache, Event, Finish, Free, Mark, RecordStream
from galore_mem.allocator.oom import OutOfMemoryError
from galore_mem.allocator.settings import MAX_REQUEST
from galore_mem.allocator.stats import Stats
from galore_mem.errors import InputError
from galore_mem.spec.files import shown


@dataclass(frozen=True, slots=True)
class PhasePeaks:
    """A phase from one mark to the next: bytes at its start, its peaks, and the event at which each was reached.

    An index is that of the event in the stream; the mark's own where the phase began at its peak.
    """

    name: str
    start_allocated_bytes: int
    start_reserved_bytes: int
    peak_allocated_bytes: int
    peak_allocated_at: int
    peak_reserved_bytes: int
    peak_reserved_at: int


@dataclass(frozen=True, slots=True)
class Timeline:
    """Bytes after each event."""

    allocated: array[int]
    reserved: array[int]


@dataclass(frozen=True, slots=True)
class ReplayResult:
    """Peaks overall and by phase, the allocator's numbers and blocks at the end.

    The replay ends at the event `out_of_memory_at` if a request could not be served there. `stats` has the peaks since
    the last mark; the result's own peaks are those of the whole stream.
    """

    peak_allocated_bytes: int
    peak_allocated_at: int
    peak_reserved_bytes: int
    peak_reserved_at: int
    phases: tuple[PhasePeaks, ...]
    stats: Stats
    layout: tuple[SegmentLayout, ...]
    addresses: dict[int, int]  # of the blocks alive at the end, by id
    timeline: Timeline | None
    out_of_memory: OutOfMemoryError | None
    out_of_memory_at: int | None


class _Phase:
    """The peaks since a mark, and the events that reached them."""

    __slots__ = ("allocated", "allocated_at", "name", "reserved", "reserved_at", "start")

    def __init__(self, name: str, at: int, stats: Stats) -> None:
        stats.reset_peaks()
        self.name = name
        self.start = (stats.allocated, stats.reserved)
        self.allocated, self.reserved = self.start
        self.allocated_at = self.reserved_at = at

    def look(self, stats: Stats, at: int) -> None:
        """Note what the event `at` raised."""
        if stats.allocated_peak > self.allocated:
            self.allocated = stats.allocated_peak
            self.allocated_at = at
        if stats.reserved_peak > self.reserved:
            self.reserved = stats.reserved_peak
            self.reserved_at = at

    def peaks(self) -> PhasePeaks:
        return PhasePeaks(self.name, *self.start, self.allocated, self.allocated_at, self.reserved, self.reserved_at)


def _bad_size(size: object, at: int) -> InputError:
    return InputError(f"event {at} allocates {shown(size)} bytes; a size is a whole number from 0 to 2**60 - 1")


def _absent(what: str, id: object, at: int) -> InputError:
    return InputError(f"event {at} {what} block {shown(id)}, which is not allocated: unknown, or freed before")


class _Blocks:
    """Which block each id stands for, while it is allocated and while it waits for another stream."""

    def __init__(self, allocator: CachingAllocator) -> None:
        self.allocator = allocator
        self.allocated: dict[int, Block | None] = {}  # None: of size 0
        self.waiting: dict[int, tuple[Block, int]] = {}

    def free(self, id: int, at: int) -> None:
        try:
            block = self.allocated.pop(id)
        except KeyError:
            raise _absent("frees", id, at) from None
        if block is not None:
            self.allocator.free(block)
            if block.state == HELD:
                self.waiting[id] = block, self.allocator.held[block]

    def record_stream(self, event: RecordStream, at: int) -> None:
        if event.id not in self.allocated:
            raise _absent("records a stream for", event.id, at)
        block = self.allocated[event.id]
        if block is not None:
            self.allocator.record_stream(block, event.stream)

    def finish(self, id: int, at: int) -> None:
        """End the wait of a freed block, unless the allocator has waited for all streams since."""
        if id not in self.waiting:
            raise InputError(f"event {at} finishes block {shown(id)}, which no stream holds after a free")
        block, ticket = self.waiting.pop(id)
        if self.allocator.held.get(block) == ticket:
            self.allocator.finish(block)


def replay(events: Iterable[Event], allocator: CachingAllocator, *, timeline: bool = False) -> ReplayResult:
    """Serve the events; the allocator goes on from its state. `timeline`: with what was in use after each of them.

    Raises `InputError` for a stream that frees what is not there, or allocates an id twice or a size that is none.
    """
    stats = allocator.stats
    blocks = _Blocks(allocator)
    allocated = blocks.allocated
    phase = _Phase("", -1, stats)
    phases = [phase]
    line = Timeline(array("q"), array("q")) if timeline else None
    failure: OutOfMemoryError | None = None
    at = -1
    for at, event in enumerate(events):
        if type(event) is Alloc:
            id, size, stream = event
            if type(size) is not int or not 0 <= size < MAX_REQUEST:
                raise _bad_size(size, at)
            if id in allocated:
                raise InputError(f"event {at} allocates block {shown(id)}, which is allocated already")
            try:
                allocated[id] = allocator.malloc(size, stream) if size else None
            except OutOfMemoryError as error:
                failure = error
            if stats.allocated_peak > phase.allocated or stats.reserved_peak > phase.reserved:
                phase.look(stats, at)
            if failure is not None:
                break
        elif type(event) is Free:
            blocks.free(event.id, at)
        elif isinstance(event, Mark):
            phase = _Phase(event.name, at, stats)
            if at == 0:  # nothing happened before the first mark
                phases.clear()
            phases.append(phase)
        elif isinstance(event, EmptyCache):
            allocator.empty_cache()
        elif isinstance(event, RecordStream):
            blocks.record_stream(event, at)
        elif isinstance(event, Finish):
            blocks.finish(event.id, at)
        else:
            raise InputError(f"event {at} is {shown(event)}, not an event of galore_mem.allocator.events")
        if line is not None:
            line.allocated.append(stats.allocated)
            line.reserved.append(stats.reserved)
    peaks = [p.peaks() for p in phases]
    top_allocated = max(peaks, key=lambda p: p.peak_allocated_bytes)  # the first of equals
    top_reserved = max(peaks, key=lambda p: p.peak_reserved_bytes)
    return ReplayResult(
        peak_allocated_bytes=top_allocated.peak_allocated_bytes,
        peak_allocated_at=top_allocated.peak_allocated_at,
        peak_reserved_bytes=top_reserved.peak_reserved_bytes,
        peak_reserved_at=top_reserved.peak_reserved_at,
        phases=tuple(peaks),
        stats=stats.copy(),
        layout=allocator.layout(),
        addresses={id: block.address for id, block in allocated.items() if block is not None},
        timeline=line,
        out_of_memory=failure,
        out_of_memory_at=at if failure is not None else None,
    )
