"""The state in which a recording begins, rebuilt from its end.

The events are run backwards from the final segments. Where a block that was freed meanwhile ends is not recorded: only
the request is. In the small pool, and in expandable segments, it follows (every remainder is split off). A block of the
large pool may keep up to 1 MiB more than it asked for; then other facts decide:
 - a free block of the large pool is larger than 1 MiB, so a gap up to that belongs to the block before it;
 - as long as the block lives, the first allocation behind it begins where it ends.
What still is open is left at the least size, and said (`StartState.open_blocks`).
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import pairwise
from typing import NamedTuple

from galore_mem.allocator.blocks import BlockLayout, SegmentLayout
from galore_mem.allocator.regions import Live, Memory, Region, memory_at_start
from galore_mem.allocator.settings import SMALL_SIZE, AllocatorSettings
from galore_mem.allocator.snapshot import DeviceRecording, TraceEvent


class StartState(NamedTuple):
    """Segments before the first event, and the blocks (address -> least and largest size) whose size is not known."""

    segments: tuple[SegmentLayout, ...]
    open_blocks: dict[int, tuple[int, int]]


def start_state(recording: DeviceRecording, settings: AllocatorSettings) -> StartState:
    """The state before the first event. Raises `InputError` where the events contradict the final segments."""
    memory = memory_at_start(recording)
    ends = _first_allocations_behind(recording.events, memory)
    open_blocks: dict[int, tuple[int, int]] = {}
    segments = []
    for region in memory.regions:
        laid: list[BlockLayout] = []
        at = region.start
        addresses = memory.live_in(region.start, region.end)
        for address, limit in pairwise([*addresses, region.end]):
            block = memory.live[address]
            if address > at:
                laid.append(BlockLayout(at, address - at, 0, "inactive"))
            size = block.size
            if size is None:
                least, most = _bounds(block, region, limit - address, settings)
                size = least
                if address in ends and least <= ends[address] - address <= limit - address:
                    size = ends[address] - address
                elif least < most:
                    open_blocks[address] = least, most
            state = "active_pending_free" if block.held else "active_allocated"
            laid.append(BlockLayout(address, size, block.requested, state))
            at = address + size
        if at < region.end:
            laid.append(BlockLayout(at, region.end - at, 0, "inactive"))
        size = region.end - region.start
        segments.append(SegmentLayout(region.start, size, region.stream, region.small, region.expandable, tuple(laid)))
    return StartState(tuple(segments), open_blocks)


def _bounds(block: Live, region: Region, room: int, settings: AllocatorSettings) -> tuple[int, int]:
    """Least and largest size of a block of which only the request is known; `room` bytes to what follows."""
    least = min(settings.round_size(max(block.requested, 1)), room)
    if region.small or region.expandable or settings.expandable_segments:
        return least, least
    if least >= settings.max_split_size or room - least <= SMALL_SIZE:
        return room, room  # never split; or what is left is no block of its own
    return least, min(least + SMALL_SIZE, room - SMALL_SIZE - 512)


def _first_allocations_behind(events: list[TraceEvent], memory: Memory) -> dict[int, int]:
    """Where blocks of unknown size end, by the first allocation behind each in its lifetime: address -> end."""
    waiting = {  # address of the block -> what follows it at the start
        address: limit
        for region in memory.regions
        for address, limit in pairwise([*memory.live_in(region.start, region.end), region.end])
        if memory.live[address].size is None
    }
    ends: dict[int, int] = {}
    starts = sorted(waiting)

    for event in events:
        if event.action == "alloc":
            i = bisect_left(starts, event.address) - 1
            if i >= 0:
                address = starts[i]
                if event.address < waiting[address]:
                    ends[address] = event.address
                    del starts[i], waiting[address]
        elif event.action == "free_requested" and event.address in waiting:
            del waiting[event.address]
            del starts[bisect_left(starts, event.address)]
    return ends
