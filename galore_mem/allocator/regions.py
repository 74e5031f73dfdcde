"""Memory of a device as a set of disjoint regions, and the blocks alive in it, run backwards through a recording."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass, replace

from galore_mem.allocator.settings import SMALL_BUFFER
from galore_mem.allocator.snapshot import DeviceRecording, TraceEvent
from galore_mem.errors import InputError
from galore_mem.units import MIB

_LARGE_PAGE = 20 * MIB  # pages of expandable segments of the large pool, unless large_segment_size_mb says otherwise


@dataclass(frozen=True, slots=True)
class Region:
    """A native segment, or a contiguous mapped run of an expandable one."""

    start: int
    end: int
    stream: int
    small: bool
    expandable: bool


@dataclass(slots=True)
class Live:
    """A block that is allocated, or held after its free; `size` is None where only the request is known."""

    requested: int
    size: int | None
    held: bool


class Memory:
    """Regions by address, live blocks by address; every change is checked."""

    def __init__(self, recording: DeviceRecording) -> None:
        segments = recording.segments
        self.regions = [Region(s.address, s.address + s.size, s.stream, s.small, s.expandable) for s in segments]
        self._starts = [r.start for r in self.regions]
        self.live: dict[int, Live] = {}
        for segment in segments:
            for b in segment.blocks:
                if b.state != "inactive":
                    self.live[b.address] = Live(b.requested, b.size, held=b.state != "active_allocated")
        self._addresses = sorted(self.live)

    # --- look up -------------------------------------------------------------

    def region_at(self, address: int) -> Region | None:
        i = bisect_right(self._starts, address) - 1
        return self.regions[i] if i >= 0 and address < self.regions[i].end else None

    def live_in(self, start: int, end: int) -> list[int]:
        """Addresses of live blocks that begin in [start, end)."""
        return self._addresses[bisect_left(self._addresses, start) : bisect_left(self._addresses, end)]

    # --- change --------------------------------------------------------------

    def _put(self, region: Region) -> None:
        i = bisect_left(self._starts, region.start)
        self.regions.insert(i, region)
        self._starts.insert(i, region.start)

    def _take(self, region: Region) -> None:
        i = bisect_left(self._starts, region.start)
        del self.regions[i]
        del self._starts[i]

    def add(self, start: int, size: int, stream: int, small: bool, expandable: bool) -> bool:
        """Add a region, joined with mapped neighbors if it is expandable. False if it overlaps another."""
        end = start + size
        i = bisect_left(self._starts, end)
        if not size or (i and self.regions[i - 1].end > start):
            return False
        before = self.region_at(start - 1)
        after = self.region_at(end)
        joined = Region(start, end, stream, small, expandable)
        if expandable and before is not None and before.expandable and before.stream == stream:
            self._take(before)
            joined = replace(joined, start=before.start, small=before.small)
        if expandable and after is not None and after.expandable and after.stream == stream:
            self._take(after)
            joined = replace(joined, end=after.end, small=after.small)
        self._put(joined)
        return True

    def drop(self, start: int, size: int, expandable: bool) -> bool:
        """Take memory out. False if it is not there, only a part of a native segment, or in use."""
        end = start + size
        region = self.region_at(start)
        if region is None or region.expandable != expandable or end > region.end or self._in_use(start, end):
            return False
        if not expandable and (start, end) != (region.start, region.end):
            return False
        self._take(region)
        if region.start < start:
            self._put(replace(region, end=start))
        if end < region.end:
            self._put(replace(region, start=end))
        return True

    def _in_use(self, start: int, end: int) -> bool:
        i = bisect_left(self._addresses, end)
        if not i:
            return False
        address = self._addresses[i - 1]
        return address >= start or address + max(self._least(address), 1) > start

    def _least(self, address: int) -> int:
        block = self.live[address]
        return block.requested if block.size is None else block.size

    def revive(self, address: int, requested: int) -> bool:
        """A block comes alive, held. False if it lies outside all memory or over another block."""
        region = self.region_at(address)
        end = address + max(requested, 1)
        if region is None or end > region.end or self._in_use(address, end):
            return False
        self._addresses.insert(bisect_left(self._addresses, address), address)
        self.live[address] = Live(requested, None, held=True)
        return True

    def forget(self, address: int) -> None:
        """A block is not there yet."""
        del self._addresses[bisect_left(self._addresses, address)]
        del self.live[address]


def _undo(memory: Memory, event: TraceEvent) -> str | None:
    """Undo one event; what is wrong with it, if it cannot be."""
    action, address, size, stream = event
    block = memory.live.get(address)
    fits = block is not None and block.requested == size
    if action == "alloc":
        if block is None or block.held or not fits:
            return "allocates what is neither freed later nor there at the end"
        memory.forget(address)
    elif action == "free_requested":
        if block is None or not block.held or not fits:
            return "frees what is freed again later, or never completes"
        block.held = False
    elif action == "free_completed":
        if not memory.revive(address, size):
            return "frees what cannot have been there: freed twice, or never allocated"
    elif action in ("segment_alloc", "segment_map"):
        if not memory.drop(address, size, action == "segment_map"):
            return "adds memory that is not there afterwards, or in which blocks were alive before"
    elif action in ("segment_free", "segment_unmap"):
        small = size == SMALL_BUFFER if action == "segment_free" else size % _LARGE_PAGE != 0
        if not memory.add(address, size, stream, small, action == "segment_unmap"):
            return "takes away memory that is there afterwards"
    return None


def memory_at_start(recording: DeviceRecording) -> Memory:
    """What there was before the first event. Raises `InputError` where the events contradict the final segments."""
    memory = Memory(recording)
    for i in range(len(recording.events) - 1, -1, -1):
        wrong = _undo(memory, recording.events[i])
        if wrong is not None:
            e = recording.events[i]
            raise InputError(
                f"device {recording.device}, event {i} ({e.action} of {e.size} bytes at {e.address:#x}) {wrong}"
            )
    return memory
