"""PyTorch's CUDA caching allocator, native backend, one device.

Follows class DeviceCachingAllocator of c10/cuda/CUDACachingAllocator.cpp (late 2025; constants as in torch 2.13). Not
modeled: private pools (CUDA graphs, MemPool) and free-memory callbacks. Two things are done otherwise, without a
difference in addresses, sizes or order: of two merged blocks the left one lives on, and of a split block the left part
keeps its object, so that the first block of a segment is the same object for as long as the segment exists.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator

from galore_mem.allocator.blocks import (
    ADDRESS_BITS,
    ALLOCATED,
    FREE,
    HELD,
    MERGED,
    Block,
    BlockPool,
    Family,
    SegmentLayout,
    layout_from,
)
from galore_mem.allocator.device import Device
from galore_mem.allocator.oom import OutOfMemoryError
from galore_mem.allocator.release import collect_garbage, garbage, release_available, release_cached
from galore_mem.allocator.settings import MIN_BLOCK, SMALL_SIZE, UNLIMITED, AllocatorSettings
from galore_mem.allocator.stats import Stats
from galore_mem.errors import InputError

# (action, address, size, stream) as TraceEntry records them: sizes of blocks are the requested ones; `oom` has the
# device's free bytes instead of an address and the rounded request
Observer = Callable[[str, int, int, int], None]


class CachingAllocator:
    """Hands out blocks of cached segments, and asks the device for a new segment only when none fits."""

    def __init__(
        self,
        settings: AllocatorSettings | None = None,
        device: Device | None = None,
        observer: Observer | None = None,
    ) -> None:
        """`observer` sees every event."""
        self.settings = settings or AllocatorSettings()
        self.device = device or Device()
        self.observer = observer
        self.stats = Stats()
        self.small = Family(small=True)
        self.large = Family(small=False)
        self.heads: dict[int, Block] = {}  # first block of each native segment, by address
        self.held: dict[Block, int] = {}  # freed, but in use by other streams, in the order of the frees: their number
        self._holds = 0
        self.limit = self._limit()
        self.collects = self.limit is not None and self.settings.garbage_collection_threshold > 0
        self._rounds_to_512 = not any(d > 1 for d in self.settings.roundup_power2_divisions)
        self._splits_below = self.settings.max_split_size
        self._splits_all = self.settings.max_split_size == UNLIMITED

    def _limit(self) -> int | None:
        """Bytes the allocator may reserve, when per_process_memory_fraction says so (setMemoryFraction)."""
        fraction = self.settings.per_process_memory_fraction
        if fraction >= 1:
            return None
        if self.device.capacity is None:
            raise InputError("per_process_memory_fraction needs the device's capacity; give it")
        return int(fraction * float(self.device.capacity))

    # --- allocate ------------------------------------------------------------

    def malloc(self, size: int, stream: int = 0) -> Block:
        """A block for `size` > 0 bytes, used on `stream`. Raises `OutOfMemoryError`; the allocator stays usable."""
        if size < 1:
            raise InputError(f"cannot allocate {size} bytes; torch takes no block for an empty tensor")
        rounded = -(-size // MIN_BLOCK) * MIN_BLOCK if self._rounds_to_512 else self.settings.round_size(size)
        family = self.small if rounded <= SMALL_SIZE else self.large
        pool = family.pools.get(stream) or family.pool(stream)
        if self.collects:
            family.searches += 1
        block = self._take(pool, rounded)
        if block is None:
            block = self._take_new(pool, rounded, size)
        remaining = block.size - rounded
        stats = self.stats
        native = block.area is None
        after = block.next
        was_split = after is not None or block.previous is not None
        if remaining > family.keep and rounded < self._splits_below:
            rest = Block(block.address + rounded, remaining, pool, block.area)
            rest.previous = block
            rest.next = after
            if after is not None:
                after.previous = rest
            block.next = rest
            block.size = rounded
            pool.insert(rest)
            if native:
                if was_split:
                    stats.inactive_split -= rounded
                else:
                    stats.inactive_split += remaining
                    if stats.inactive_split > stats.inactive_split_peak:
                        stats.inactive_split_peak = stats.inactive_split
        elif was_split and native:
            stats.inactive_split -= block.size
        block.state = ALLOCATED
        block.requested = size
        stats.allocated += block.size
        if stats.allocated > stats.allocated_peak:
            stats.allocated_peak = stats.allocated
        stats.active += block.size
        if stats.active > stats.active_peak:
            stats.active_peak = stats.active
        stats.requested += size
        if stats.requested > stats.requested_peak:
            stats.requested_peak = stats.requested
        if self.observer is not None:
            self.observer("alloc", block.address, size, stream)
        return block

    def _take(self, pool: BlockPool, size: int) -> Block | None:
        """The best fitting free block, taken out of the pool, or None (get_free_block)."""
        i = bisect_left(pool.keys, size << ADDRESS_BITS)
        if i == len(pool.keys) or not (self._splits_all or self._acceptable(pool.blocks[i].size, size)):
            return None
        del pool.keys[i]
        return pool.blocks.pop(i)

    def _acceptable(self, available: int, size: int) -> bool:
        """Blocks of max_split_size or more serve only requests of that order, which may waste a bounded rest."""
        if size < self.settings.max_split_size:
            return available < self.settings.max_split_size
        return available < size + self.settings.max_non_split_rounding

    def _take_new(self, pool: BlockPool, rounded: int, size: int) -> Block:
        """A block of new memory, releasing cached memory if the device has none left. Raises `OutOfMemoryError`."""
        if self.collects:
            collect_garbage(self)
        block = self._grow(pool, rounded)
        if block is None and release_available(self, pool, rounded):
            block = self._grow(pool, rounded)
        if block is None:
            release_cached(self)
            self.stats.num_alloc_retries += 1
            block = self._grow(pool, rounded)
        if block is None:
            raise self._out_of_memory(pool.stream, rounded, size)
        return block

    def _grow(self, pool: BlockPool, rounded: int) -> Block | None:
        """A new segment as one block, or None where the device or the limit refuses it (alloc_block)."""
        size = self.settings.segment_size(rounded)
        stats = self.stats
        if not self.may_reserve(size) or not self.device.fits(stats.reserved, size):
            return None
        block = Block(self.device.addresses.segment(size), size, pool)
        self.heads[block.address] = block
        stats.segments += 1
        self.count_reserved("segment_alloc", block.address, size, pool.stream)
        return block

    def may_reserve(self, size: int) -> bool:
        return self.limit is None or self.stats.reserved + size <= self.limit

    def count_reserved(self, action: str, address: int, size: int, stream: int) -> None:
        """Count memory that the device gave."""
        stats = self.stats
        stats.reserved += size
        stats.reserved_peak = max(stats.reserved, stats.reserved_peak)
        stats.num_device_alloc += 1
        if self.observer is not None:
            self.observer(action, address, size, stream)

    def count_returned(self, action: str, address: int, size: int, stream: int) -> None:
        """Count memory that went back to the device."""
        self.stats.reserved -= size
        self.stats.num_device_free += 1
        if self.observer is not None:
            self.observer(action, address, size, stream)

    def _out_of_memory(self, stream: int, rounded: int, size: int) -> OutOfMemoryError:
        self.stats.num_ooms += 1
        free = self.device.free(self.stats.reserved)
        if self.observer is not None:
            self.observer("oom", free, rounded, stream)
        return OutOfMemoryError(
            requested=size,
            tried=self.settings.segment_size(rounded),
            stream=stream,
            capacity=self.device.total,
            free=free,
            outside=self.device.other,
            allocated=self.stats.allocated,
            reserved=self.stats.reserved,
            allowed=self.limit,
        )

    # --- free ----------------------------------------------------------------

    def record_stream(self, block: Block, stream: int) -> None:
        """Another stream uses the block: after its free it is held until that stream is done (`finish`)."""
        if block.state != ALLOCATED:
            raise InputError(f"the block at {block.address:#x} is not allocated, so no stream can use it")
        if stream != block.pool.stream:
            block.streams = (block.streams or set()) | {stream}

    def free(self, block: Block) -> None:
        """Give a block back. Raises `InputError` for one that is not allocated (freed twice)."""
        if block.state != ALLOCATED:
            raise InputError(f"the block at {block.address:#x} is not allocated; it was freed before")
        self.stats.allocated -= block.size
        if self.observer is not None:
            self.observer("free_requested", block.address, block.requested, block.pool.stream)
        if block.streams:
            block.state = HELD
            self.hold(block)
        else:
            self._free(block)

    def hold(self, block: Block) -> None:
        """Remember a block that waits for other streams. The number tells this wait from a later one."""
        self._holds += 1
        self.held[block] = self._holds

    def finish(self, block: Block) -> None:
        """The other streams are done with a held block: now it is free."""
        if block.state != HELD:
            raise InputError(f"the block at {block.address:#x} is not waiting for another stream")
        del self.held[block]
        block.streams = None
        self._free(block)

    def finish_all(self) -> None:
        """All streams are done with all held blocks."""
        for block in list(self.held):
            self.finish(block)

    def _free(self, block: Block) -> None:
        """Merge the block with free neighbors and put the result into its pool (free_block)."""
        stats = self.stats
        pool = block.pool
        if self.observer is not None:
            self.observer("free_completed", block.address, block.requested, pool.stream)
        stats.active -= block.size
        stats.requested -= block.requested
        gained = 0  # change of inactive_split
        before = block.previous
        after = block.next
        if after is not None and after.state == FREE:
            pool.remove(after)
            gained -= after.size
            after.state = MERGED
            block.size += after.size
            after = block.next = after.next
            if after is not None:
                after.previous = block
        if before is not None and before.state == FREE:
            pool.remove(before)
            gained -= before.size
            block.state = MERGED
            before.size += block.size
            before.next = after
            if after is not None:
                after.previous = before
            block = before
        block.state = FREE
        pool.insert(block)
        if block.area is None:
            if after is not None or block.previous is not None:
                gained += block.size
            stats.inactive_split += gained
            if stats.inactive_split > stats.inactive_split_peak:
                stats.inactive_split_peak = stats.inactive_split

    # --- cached memory -------------------------------------------------------

    def empty_cache(self) -> None:
        """torch.cuda.empty_cache: wait for all streams, then give back what is free and not split."""
        release_cached(self)

    def release_segment(self, block: Block) -> None:
        """cudaFree a native segment that is one free block (release_block)."""
        block.pool.remove(block)
        block.state = MERGED
        del self.heads[block.address]
        self.stats.segments -= 1
        self.count_returned("segment_free", block.address, block.size, block.pool.stream)

    def unmap(self, block: Block) -> None:
        """Give back the memory under a free block of an expandable segment (ExpandableAllocator has them)."""
        raise NotImplementedError

    def missing(self, size: int, stream: int = 0) -> int:
        """Bytes the device would have to give for a malloc of this size; 0 if a cached block serves it."""
        rounded = self.settings.round_size(size)
        pool = (self.small if rounded <= SMALL_SIZE else self.large).pool(stream)
        i = pool.first_fit(rounded)
        if i < len(pool.blocks) and self._acceptable(pool.blocks[i].size, rounded):
            return 0
        return self._new_memory(pool, rounded)

    def serves(self, pool: BlockPool, available: int, size: int, stream: int) -> bool:
        """Would a free block of `available` bytes in this pool do for a request?"""
        rounded = self.settings.round_size(size)
        family = self.small if rounded <= SMALL_SIZE else self.large
        return pool is family.pool(stream) and available >= rounded and self._acceptable(available, rounded)

    def would_release(self, size: int, stream: int = 0) -> bool:
        """Would a malloc of this size have to give back memory first? Asking changes nothing."""
        missing = self.missing(size, stream)
        return missing > 0 and (
            (self.collects and bool(garbage(self)))
            or not self.may_reserve(self.settings.segment_size(self.settings.round_size(size)))
            or not self.device.fits(self.stats.reserved, missing)
        )

    def _new_memory(self, pool: BlockPool, rounded: int) -> int:
        """Bytes that the device must have for a block that no cached one can serve."""
        return self.settings.segment_size(rounded)

    # --- what there is -------------------------------------------------------

    def chains(self) -> Iterator[Block]:
        """The first block of every segment."""
        yield from self.heads.values()

    def layout(self) -> tuple[SegmentLayout, ...]:
        """All segments by address, each with the blocks that tile it."""
        return tuple(sorted(segment for head in self.chains() for segment in layout_from(head)))
