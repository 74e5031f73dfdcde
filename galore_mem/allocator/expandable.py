"""Expandable segments: one long address range for each stream and pool, with memory mapped into it page by page.

Follows struct ExpandableSegment and find_expandable_block, map_block, try_allocate_expandable_block, unmap_block of
c10/cuda/CUDACachingAllocator.cpp. The blocks of a range tile it; those without memory are UNMAPPED, and begin and end
at page boundaries.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator

from galore_mem.allocator.blocks import FREE, MERGED, UNMAPPED, Block, BlockPool
from galore_mem.allocator.caching import CachingAllocator, Observer
from galore_mem.allocator.device import Device
from galore_mem.allocator.settings import MIN_BLOCK, SMALL_BUFFER, UNLIMITED, AllocatorSettings
from galore_mem.units import round_up


class AddressRange:
    """A range of addresses of `size` bytes whose pages get memory when they are needed. `head` is its first block."""

    __slots__ = ("address", "head", "page", "size")

    def __init__(self, address: int, size: int, page: int, pool: BlockPool) -> None:
        self.address = address
        self.size = size
        self.page = page
        self.head = Block(address, size, pool, self)
        self.head.state = UNMAPPED

    def down(self, address: int) -> int:
        """The page boundary at or below an address."""
        return address - (address - self.address) % self.page

    def up(self, address: int) -> int:
        """The page boundary at or above an address."""
        return address + (self.address - address) % self.page


def _address(block: Block) -> int:
    return block.address


def cut(block: Block, size: int, state: int) -> Block:
    """Cut `block` after `size` bytes; the rest becomes a new block in `state`, which no pool knows yet."""
    rest = Block(block.address + size, block.size - size, block.pool, block.area)
    rest.state = state
    rest.previous = block
    rest.next = block.next
    if rest.next is not None:
        rest.next.previous = rest
    block.next = rest
    block.size = size
    return rest


def _absorb_next(block: Block) -> None:
    """Merge the next block, which no pool knows any more, into this one."""
    gone = block.next
    assert gone is not None
    gone.state = MERGED
    block.size += gone.size
    block.next = gone.next
    if block.next is not None:
        block.next.previous = block


class ExpandableAllocator(CachingAllocator):
    """The caching allocator where new memory is mapped into expandable segments, if the settings say so.

    With `expandable_segments` off it still knows the ranges that a recording began with, and leaves them alone.
    """

    def __init__(
        self,
        settings: AllocatorSettings | None = None,
        device: Device | None = None,
        observer: Observer | None = None,
    ) -> None:
        super().__init__(settings, device, observer)
        self.ranges: list[AddressRange] = []
        self._expands = self.settings.expandable_segments
        if self._expands:  # every remainder of 512 bytes is split off, whatever the pool (should_split)
            self.small.keep = self.large.keep = MIN_BLOCK - 1
            self._splits_below = UNLIMITED

    def page_size(self, small: bool) -> int:
        return SMALL_BUFFER if small else self.settings.large_segment_size

    def new_range(self, pool: BlockPool) -> AddressRange:
        """An unmapped range for 9/8 of the device's memory, so that pages can move to its end."""
        page = self.page_size(pool.family.small)
        size = self.range_size(page)
        found = AddressRange(self.device.addresses.reserve(size), size, page, pool)
        self.ranges.append(found)
        insort(pool.unmapped, found.head, key=_address)
        return found

    def range_size(self, page: int) -> int:
        """Bytes of address space in a new range."""
        return round_up(self.device.total + self.device.total // 8, page)

    def chains(self) -> Iterator[Block]:
        yield from super().chains()
        for found in self.ranges:
            yield found.head

    # --- best fit ------------------------------------------------------------

    def _take(self, pool: BlockPool, size: int) -> Block | None:
        """As without expandable segments, but a block counts with the unmapped room behind it."""
        i = pool.first_fit(size)
        blocks = pool.blocks
        if i < len(blocks) and blocks[i].area is not None:
            i = self._least_room(blocks, i) if self._expands else _first_native(blocks, i)
        if i == len(blocks) or not self._acceptable(blocks[i].size, size):
            return None
        del pool.keys[i]
        return blocks.pop(i)

    @staticmethod
    def _least_room(blocks: list[Block], i: int) -> int:
        """From block i on, as long as the next has less room to grow than this one."""
        while blocks[i].area is not None and i + 1 < len(blocks) and _room(blocks[i + 1]) < _room(blocks[i]):
            i += 1
        return i

    # --- map -----------------------------------------------------------------

    def _grow(self, pool: BlockPool, rounded: int) -> Block | None:
        if not self._expands:
            return super()._grow(pool, rounded)
        if not self.may_reserve(self.settings.segment_size(rounded)):
            return None
        block = self._find(pool, rounded) or self.new_range(pool).head
        if block.state == UNMAPPED:
            mapped = self._map(block, min(block.size, rounded))
            if mapped is None:
                return None
            block = mapped
        while block.size < rounded:
            unmapped = block.next
            assert unmapped is not None
            mapped = self._map(unmapped, min(rounded - block.size, unmapped.size))
            if mapped is None:
                return None
            block = mapped
        pool.remove(block)
        return block

    def _new_memory(self, pool: BlockPool, rounded: int) -> int:
        if not self._expands:
            return super()._new_memory(pool, rounded)
        block = self._find(pool, rounded)
        if block is None:
            return round_up(rounded, self.page_size(pool.family.small))
        room = needed = 0
        while room < rounded:
            assert block is not None
            if block.state == UNMAPPED:
                assert block.area is not None
                end = block.address + min(block.size, rounded - room)
                needed += block.area.up(end) - block.address
            room += block.size
            block = block.next
        return needed

    def _find(self, pool: BlockPool, size: int) -> Block | None:
        """The lowest block from which free and unmapped blocks in a row have room for `size` bytes."""
        for unmapped in pool.unmapped:
            before = unmapped.previous
            start = before if before is not None and before.state == FREE else unmapped
            room = 0
            block: Block | None = start
            while room < size and block is not None and block.state in (FREE, UNMAPPED):
                room += block.size
                block = block.next
            if room >= size:
                return start
        return None

    def _map(self, block: Block, size: int) -> Block | None:
        """Map whole pages for the first `size` bytes of an unmapped block; the free block that holds them, or None."""
        area = block.area
        assert area is not None
        pool = block.pool
        mapped = area.up(block.address + size) - block.address
        if not self.device.fits(self.stats.reserved, mapped):
            return None
        address = block.address
        pool.unmapped.remove(block)
        block.state = FREE
        if mapped < block.size:
            insort(pool.unmapped, cut(block, mapped, UNMAPPED), key=_address)
        if block.next is not None and block.next.state == FREE:
            pool.remove(block.next)
            _absorb_next(block)
        before = block.previous
        if before is not None and before.state == FREE:
            pool.remove(before)
            _absorb_next(before)
            block = before
        pool.insert(block)
        self.count_reserved("segment_map", address, mapped, pool.stream)
        return block

    # --- unmap ---------------------------------------------------------------

    def unmap(self, block: Block) -> None:
        """Give back the whole pages inside a free block; what sticks out on either side stays free."""
        area = block.area
        assert area is not None
        pool = block.pool
        start = area.up(block.address)
        size = area.down(block.address + block.size) - start
        if size <= 0:
            return
        pool.remove(block)
        if start > block.address:
            before = block
            block = cut(before, start - before.address, UNMAPPED)
            pool.insert(before)
        if size < block.size:
            pool.insert(cut(block, size, FREE))
        block.state = UNMAPPED
        after = block.next
        if after is not None and after.state == UNMAPPED:
            pool.unmapped.remove(after)
            _absorb_next(block)
        previous = block.previous
        if previous is not None and previous.state == UNMAPPED:
            pool.unmapped.remove(previous)
            _absorb_next(previous)
            block = previous
        insort(pool.unmapped, block, key=_address)
        self.count_returned("segment_unmap", start, size, pool.stream)
        if block.previous is None and block.next is None:  # nothing is mapped any more: the addresses go back, too
            pool.unmapped.remove(block)
            self.ranges.remove(area)


def _room(block: Block) -> int:
    after = block.next
    return block.size + (after.size if after is not None and after.state == UNMAPPED else 0)


def _first_native(blocks: list[Block], i: int) -> int:
    """The first block after i that is in no expandable segment; may be past the end."""
    i += 1
    while i < len(blocks) and blocks[i].area is not None:
        i += 1
    return i


def new_allocator(
    settings: AllocatorSettings | None = None,
    device: Device | None = None,
    observer: Observer | None = None,
) -> CachingAllocator:
    """The allocator that these settings ask for."""
    kind = ExpandableAllocator if settings is not None and settings.expandable_segments else CachingAllocator
    return kind(settings, device, observer)
