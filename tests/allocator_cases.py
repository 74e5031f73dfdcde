"""What the allocator's tests share: a tape of what it did, random programs, and what must hold of its blocks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from random import Random
from typing import NamedTuple

from galore_mem.allocator.blocks import FREE, UNMAPPED, Block
from galore_mem.allocator.caching import CachingAllocator
from galore_mem.allocator.device import Device
from galore_mem.allocator.events import Alloc, EmptyCache, Event, Finish, Free, RecordStream
from galore_mem.allocator.expandable import ExpandableAllocator, new_allocator
from galore_mem.allocator.settings import AllocatorSettings
from galore_mem.units import KIB, MIB

# sizes around every boundary of the algorithm
SIZES = (
    1, 511, 512, 513, 4 * KIB, 100 * KIB, MIB - 512, MIB - 1, MIB, MIB + 1, 2 * MIB, 5 * MIB, 9 * MIB + 512,
    10 * MIB - 1, 10 * MIB, 10 * MIB + 1, 12 * MIB, 19 * MIB - 1, 19 * MIB, 20 * MIB, 21 * MIB, 40 * MIB, 55 * MIB,
)  # fmt: skip

Trace = list[tuple[str, int, int, int]]


class Taped(NamedTuple):
    """An allocator and the list that it fills with (action, address, size, stream)."""

    allocator: CachingAllocator
    trace: Trace

    def actions(self, *kinds: str) -> list[tuple[str, int]]:
        """(action, size) of the events whose action begins with one of the kinds, in order."""
        return [(action, size) for action, _, size, _ in self.trace if action.startswith(kinds)]


def taped(settings: AllocatorSettings | None = None, capacity: int | None = None, other: int = 0) -> Taped:
    trace: Trace = []

    def observe(action: str, address: int, size: int, stream: int) -> None:
        trace.append((action, address, size, stream))

    return Taped(new_allocator(settings, Device(capacity, other), observe), trace)


def chain(head: Block) -> list[Block]:
    """The blocks of a segment from left to right."""
    blocks = [head]
    while blocks[-1].next is not None:
        blocks.append(blocks[-1].next)
    return blocks


def pieces(allocator: CachingAllocator) -> list[list[tuple[int, int, str]]]:
    """For each segment, by address: (offset, size, state) of its blocks."""
    return [[(b.address - s.address, b.size, b.state) for b in s.blocks] for s in allocator.layout()]


def check(allocator: CachingAllocator) -> None:
    """What holds after every operation, whatever the program did."""
    stats = allocator.stats
    segments = allocator.layout()
    for a, b in pairwise(segments):
        assert a.address + a.size <= b.address  # segments do not overlap
    for segment in segments:
        at = segment.address
        for block in segment.blocks:  # blocks tile their segment: none overlaps, no byte is lost
            assert block.address == at
            assert block.size > 0
            assert block.requested <= block.size
            at += block.size
        assert at == segment.address + segment.size
    total = dict.fromkeys(("inactive", "active_allocated", "active_pending_free"), 0)
    for segment in segments:
        for block in segment.blocks:
            total[block.state] += block.size
    assert stats.allocated == total["active_allocated"]
    assert stats.active == stats.allocated + total["active_pending_free"]
    assert stats.reserved == sum(s.size for s in segments) == sum(total.values())
    assert stats.allocated <= stats.active <= stats.reserved
    assert stats.requested <= stats.active
    split = sum(
        b.size for s in segments if not s.expandable for b in s.blocks if b.state == "inactive" and len(s.blocks) > 1
    )
    assert stats.inactive_split == split
    assert stats.segments == sum(not s.expandable for s in segments)
    for name in ("allocated", "reserved", "requested", "active", "inactive_split"):
        assert getattr(stats, name) <= getattr(stats, f"{name}_peak")
    free: set[int] = set()
    for head in allocator.chains():
        blocks = chain(head)
        for a, b in pairwise(blocks):
            assert b.previous is a
            assert a.pool is b.pool  # so no segment serves two streams
            assert not (a.state == b.state and a.state in (FREE, UNMAPPED))  # coalescing is complete
        free |= {id(b) for b in blocks if b.state == FREE}
    pooled = [b for family in (allocator.small, allocator.large) for pool in family.pools.values() for b in pool.blocks]
    assert {id(b) for b in pooled} == free
    for family in (allocator.small, allocator.large):
        for pool in family.pools.values():
            assert [(b.size, b.address) for b in pool.blocks] == sorted((b.size, b.address) for b in pool.blocks)
            assert len(pool.keys) == len(pool.blocks)
    if isinstance(allocator, ExpandableAllocator):
        for area in allocator.ranges:
            for block in chain(area.head):
                if block.state == UNMAPPED:  # memory comes and goes by pages
                    assert (block.address - area.address) % area.page == 0
                    assert block.size % area.page == 0
    if allocator.device.capacity is not None:
        assert stats.reserved + allocator.device.other <= allocator.device.capacity


def program(
    choices: Sequence[tuple[int, int]], sizes: Sequence[int] = SIZES, streams: Sequence[int] = (0, 7)
) -> list[Event]:
    """The events that pairs of numbers stand for: (what, which). About half allocate, most others free; now and then a
    block is used on another stream, a wait ends, the cache is emptied."""
    events: list[Event] = []
    alive: list[int] = []
    used: set[int] = set()  # on another stream
    waiting: list[int] = []
    for i, (what, which) in enumerate(choices):
        if what < 50 or not alive:
            stream = streams[which // len(sizes) % len(streams)]
            events.append(Alloc(i, sizes[which % len(sizes)], stream))
            alive.append(i)
        elif what < 90:
            gone = alive.pop(which % len(alive))
            events.append(Free(gone))
            if gone in used:
                waiting.append(gone)
        elif what < 94:
            block = alive[which % len(alive)]
            used.add(block)
            events.append(RecordStream(block, 99))
        elif what < 98 and waiting:
            events.append(Finish(waiting.pop(which % len(waiting))))
        else:
            events.append(EmptyCache())
    return events


def random_program(
    count: int, seed: int, sizes: Sequence[int] = SIZES, streams: Sequence[int] = (0, 7), live: int = 40
) -> list[Event]:
    """A program of so many events that keeps about `live` blocks alive."""
    random = Random(seed)
    choices = []
    level = 0
    for _ in range(count):
        what = random.randrange(50) if level < random.randrange(2 * live) else 50 + random.randrange(50)
        level += 1 if what < 50 else -(what < 90)
        choices.append((what, random.randrange(2**30)))
    return program(choices, sizes, streams)
