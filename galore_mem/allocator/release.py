"""What the allocator gives back to the device, and when: on empty_cache, before out of memory, and above a threshold.

Sources, in c10/cuda/CUDACachingAllocator.cpp: release_cached_blocks, release_blocks, release_available_cached_blocks,
garbage_collect_cached_blocks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from galore_mem.allocator.blocks import Block, BlockPool
from galore_mem.allocator.settings import UNLIMITED

if TYPE_CHECKING:
    from galore_mem.allocator.caching import CachingAllocator


def release_cached(allocator: CachingAllocator) -> None:
    """Wait for all streams, then give back every segment that is free as a whole, and whole free pages of expandable
    ones: large before small, by stream, size and address."""
    allocator.stats.num_sync_all_streams += 1
    allocator.finish_all()
    for family in (allocator.large, allocator.small):
        blocks = list(family.free_blocks())
        for block in blocks:
            if _whole(block):
                allocator.release_segment(block)
        for block in blocks:
            if block.area is not None:
                allocator.unmap(block)


def release_available(allocator: CachingAllocator, pool: BlockPool, size: int) -> bool:
    """With max_split_size set: give back the smallest block that is too large to split and would suffice, or several
    from the largest down until they add up. True if that much was given back.

    Blocks of that size are whole segments in torch; a recording made under other settings may have others: they stay.
    """
    most = allocator.settings.max_split_size
    if most == UNLIMITED:
        return False
    wanted = max(size, most)
    i = pool.first_fit(wanted)
    if i < len(pool.blocks) and _whole(pool.blocks[i]):
        allocator.release_segment(pool.blocks[i])
        return True
    released = 0
    for block in reversed(pool.blocks[:i]):
        if released >= wanted or block.size < most:
            break
        if _whole(block):
            released += block.size
            allocator.release_segment(block)
    return released >= wanted


def _whole(block: Block) -> bool:
    """Is this free block all of a native segment?"""
    return block.area is None and not block.is_split


def garbage(allocator: CachingAllocator) -> list[Block]:
    """With a threshold and a limit set: the whole large segments that were not reused for longer than average, over and
    over until no more than the threshold would be reserved. A block's age is the number of searches since it became
    free."""
    limit = allocator.limit
    if limit is None:
        return []
    target = allocator.stats.reserved - int(allocator.settings.garbage_collection_threshold * float(limit))
    searches = allocator.large.searches
    blocks = [block for block in allocator.large.free_blocks() if not block.is_split]
    found: list[Block] = []
    reclaimed = 0
    old = blocks
    while reclaimed < target and old and blocks:
        # the only place that needs a fraction; torch has a double here
        average = sum(searches - block.age for block in blocks) / len(blocks)
        old = [block for block in blocks if block.area is None and searches - block.age >= average]
        blocks = [block for block in blocks if block not in old]
        reclaimed += sum(block.size for block in old)
        found += old
    return found


def collect_garbage(allocator: CachingAllocator) -> None:
    """Give back what `garbage` finds."""
    for block in garbage(allocator):
        allocator.release_segment(block)
