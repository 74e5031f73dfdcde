"""Put an allocator into a state that was written down as segments and blocks."""

from __future__ import annotations

from collections.abc import Iterable

from galore_mem.allocator.blocks import ALLOCATED, FREE, HELD, UNMAPPED, Block, BlockPool, SegmentLayout
from galore_mem.allocator.caching import CachingAllocator
from galore_mem.allocator.expandable import AddressRange, ExpandableAllocator, cut
from galore_mem.errors import InputError
from galore_mem.units import round_up

_STATES = {"inactive": FREE, "active_allocated": ALLOCATED, "active_pending_free": HELD}


def restore(allocator: CachingAllocator, segments: Iterable[SegmentLayout]) -> dict[int, Block]:
    """Fill a new allocator with these segments; the blocks that are not free, by address.

    Peaks start at what there is. Raises `InputError` for expandable segments in an allocator without them, or of other
    pages than its own.
    """
    found: dict[int, Block] = {}
    runs: dict[tuple[bool, int], list[SegmentLayout]] = {}
    for segment in sorted(segments):
        if segment.expandable:
            runs.setdefault((segment.small, segment.stream), []).append(segment)
            continue
        head = Block(segment.address, segment.size, _pool(allocator, segment))
        allocator.heads[segment.address] = head
        allocator.stats.segments += 1
        _fill(allocator, head, segment, found)
    if runs and not isinstance(allocator, ExpandableAllocator):
        raise InputError("there are expandable segments, but the allocator has none; set expandable_segments:True")
    for mapped in runs.values():
        assert isinstance(allocator, ExpandableAllocator)
        _restore_range(allocator, mapped, found)
    allocator.stats.reset_peaks()
    return found


def _pool(allocator: CachingAllocator, segment: SegmentLayout) -> BlockPool:
    return (allocator.small if segment.small else allocator.large).pool(segment.stream)


def _restore_range(allocator: ExpandableAllocator, runs: list[SegmentLayout], found: dict[int, Block]) -> None:
    """One range that begins with the first mapped run; what lies before that was never recorded."""
    pool = _pool(allocator, runs[0])
    address = runs[0].address
    page = allocator.page_size(pool.family.small)
    wanted = max(allocator.range_size(page), runs[-1].address + runs[-1].size + page - address)
    area = AddressRange(address, round_up(wanted, page), page, pool)
    allocator.ranges.append(area)
    block = area.head
    for run in runs:
        if (run.address - address) % page or run.size % page:
            raise InputError(f"the expandable segment at {run.address:#x} is not made of whole pages of {page} bytes")
        if run.address > block.address:
            pool.unmapped.append(block)
            block = cut(block, run.address - block.address, UNMAPPED)
        rest = cut(block, run.size, UNMAPPED)
        _fill(allocator, block, run, found)
        block = rest
    pool.unmapped.append(block)


def _fill(allocator: CachingAllocator, block: Block, segment: SegmentLayout, found: dict[int, Block]) -> None:
    """Cut one block into those of the segment, and count them."""
    stats = allocator.stats
    stats.reserved += segment.size
    for i, wanted in enumerate(segment.blocks):
        rest = cut(block, wanted.size, FREE) if i + 1 < len(segment.blocks) else None
        block.state = _STATES[wanted.state]
        if block.state == FREE:
            block.pool.insert(block)
            if block.area is None and block.is_split:
                stats.inactive_split += block.size
        else:
            found[block.address] = block
            block.requested = wanted.requested
            stats.active += block.size
            stats.requested += block.requested
            if block.state == ALLOCATED:
                stats.allocated += block.size
            else:
                allocator.hold(block)
        if rest is not None:
            block = rest
