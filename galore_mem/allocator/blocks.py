"""Blocks, the sorted lists of free ones, and how a layout of them is written down.

A segment is what the device handed out. It is cut into blocks that tile it, linked both ways; only neighbors of one
segment are ever merged. Names follow c10/cuda/CUDACachingAllocator.cpp (struct Block, struct BlockPool).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from galore_mem.allocator.settings import MIN_BLOCK, SMALL_SIZE

if TYPE_CHECKING:
    from galore_mem.allocator.expandable import AddressRange

# states of a block: HELD was freed while another stream may still use it, UNMAPPED is address space without memory
FREE, ALLOCATED, HELD, UNMAPPED, MERGED = range(5)
STATE_NAMES = {FREE: "inactive", ALLOCATED: "active_allocated", HELD: "active_pending_free"}

ADDRESS_BITS = 64


class Block:
    """A piece of a segment: address and size in bytes, neighbors, and the pool (and thereby the stream) it is of."""

    __slots__ = ("address", "age", "area", "next", "pool", "previous", "requested", "size", "state", "streams")

    def __init__(self, address: int, size: int, pool: BlockPool, area: AddressRange | None = None) -> None:
        self.address = address
        self.size = size
        self.requested = 0
        self.state = FREE
        self.previous: Block | None = None
        self.next: Block | None = None
        self.pool = pool
        self.area = area  # the address range it lies in, if that is expandable
        self.streams: set[int] | None = None  # other streams that used it; while HELD, those not yet known to be done
        self.age = 0  # the family's count of searches when the block became free

    @property
    def is_split(self) -> bool:
        return self.previous is not None or self.next is not None


class Family:
    """What the pools of all streams share: are they the small ones, and how often were they searched?"""

    __slots__ = ("keep", "pools", "searches", "small")

    def __init__(self, small: bool) -> None:
        self.small = small
        # more than this left over is split off: a remainder of 512 bytes, or one above 1 MiB
        self.keep = MIN_BLOCK - 1 if small else SMALL_SIZE
        self.pools: dict[int, BlockPool] = {}
        self.searches = 0

    def pool(self, stream: int) -> BlockPool:
        pool = self.pools.get(stream)
        if pool is None:
            pool = self.pools[stream] = BlockPool(self, stream)
        return pool

    def in_order(self) -> list[BlockPool]:
        """Pools by stream, as one set ordered by (stream, size, address) would list them."""
        return [self.pools[stream] for stream in sorted(self.pools)]

    def free_blocks(self) -> Iterator[Block]:
        for pool in self.in_order():
            yield from pool.blocks


class BlockPool:
    """The free blocks of one stream and family, by size and then address, and the unmapped ones by address.

    `keys[i]` is size and address of `blocks[i]` in one integer, so that the search compares integers only.
    """

    __slots__ = ("blocks", "family", "keys", "stream", "unmapped")

    def __init__(self, family: Family, stream: int) -> None:
        self.family = family
        self.stream = stream
        self.keys: list[int] = []
        self.blocks: list[Block] = []
        self.unmapped: list[Block] = []  # sorted by address

    def insert(self, block: Block) -> None:
        key = block.size << ADDRESS_BITS | block.address
        i = bisect_left(self.keys, key)
        self.keys.insert(i, key)
        self.blocks.insert(i, block)
        block.age = self.family.searches

    def remove(self, block: Block) -> None:
        i = bisect_left(self.keys, block.size << ADDRESS_BITS | block.address)
        del self.keys[i]
        del self.blocks[i]

    def first_fit(self, size: int) -> int:
        """Index of the smallest block of `size` bytes or more, the lowest among equals; may be past the end."""
        return bisect_left(self.keys, size << ADDRESS_BITS)


class BlockLayout(NamedTuple):
    """A block as a snapshot shows it; `requested` is 0 for a free one."""

    address: int
    size: int
    requested: int
    state: str


class SegmentLayout(NamedTuple):
    """Memory of the device and the blocks that tile it; one contiguous mapped run if the range is expandable."""

    address: int
    size: int
    stream: int
    small: bool
    expandable: bool
    blocks: tuple[BlockLayout, ...]


def layout_from(head: Block) -> Iterator[SegmentLayout]:
    """The segments of the chain of blocks that begins with `head`: one, or one for each mapped run."""
    run: list[BlockLayout] = []
    block: Block | None = head
    while block is not None:
        if block.state != UNMAPPED:
            requested = 0 if block.state == FREE else block.requested
            run.append(BlockLayout(block.address, block.size, requested, STATE_NAMES[block.state]))
        if run and (block.state == UNMAPPED or block.next is None):
            size = sum(b.size for b in run)
            small = block.pool.family.small
            yield SegmentLayout(run[0].address, size, block.pool.stream, small, block.area is not None, tuple(run))
            run = []
        block = block.next
