"""Each rule of the native allocator on a case small enough to follow by hand. Sizes in the comments are MiB."""

from __future__ import annotations

import pytest
from allocator_cases import check, pieces, taped
from spec_inputs import line

from galore_mem.allocator.caching import CachingAllocator
from galore_mem.allocator.device import Device
from galore_mem.allocator.settings import AllocatorSettings
from galore_mem.units import KIB, MIB

FREE, USED, HELD = "inactive", "active_allocated", "active_pending_free"


# --- pools and segments ------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "segment", "small"),
    [
        (1, 2, True),
        (MIB - 1, 2, True),
        (MIB, 2, True),
        (MIB + 1, 20, False),  # rounded to 1 MiB + 512: the rounded size decides
        (10 * MIB - 512, 20, False),
        (10 * MIB - 511, 10, False),  # rounded to 10 MiB
        (10 * MIB + 1, 12, False),
        (22 * MIB, 22, False),
    ],
)
def test_pool_and_segment_of_a_first_request(size: int, segment: int, small: bool) -> None:
    allocator, trace = taped()
    block = allocator.malloc(size)
    assert [(action, bytes_) for action, _, bytes_, _ in trace] == [("segment_alloc", segment * MIB), ("alloc", size)]
    [found] = allocator.layout()
    assert (found.size, found.small) == (segment * MIB, small)
    assert block.address == found.address
    assert allocator.stats.reserved == segment * MIB


def test_small_and_large_requests_never_share_a_segment() -> None:
    allocator = taped().allocator
    allocator.malloc(2 * MIB)  # leaves 18 free in a large segment
    allocator.malloc(MIB)
    assert [s.size for s in allocator.layout()] == [20 * MIB, 2 * MIB]


def test_streams_never_share() -> None:
    allocator = taped().allocator
    first = allocator.malloc(12 * MIB, stream=1)
    allocator.free(first)
    other = allocator.malloc(12 * MIB, stream=2)
    assert other.address != first.address
    assert allocator.stats.reserved == 24 * MIB
    assert allocator.malloc(12 * MIB, stream=1).address == first.address


# --- split -------------------------------------------------------------------


def test_the_small_pool_splits_off_512_bytes() -> None:
    """1 MiB, then 1 MiB - 512 of the other half of the 2 MiB segment: exactly 512 bytes are left, and are a block."""
    allocator = taped().allocator
    allocator.malloc(MIB)
    allocator.malloc(MIB - 512)
    assert pieces(allocator) == [[(0, MIB, USED), (MIB, MIB - 512, USED), (2 * MIB - 512, 512, FREE)]]
    allocator.malloc(512)  # nothing is left over
    assert pieces(allocator)[0][2] == (2 * MIB - 512, 512, USED)
    assert allocator.stats.inactive_split == 0


@pytest.mark.parametrize(
    ("size", "block"),
    [
        (19 * MIB - 512, 19 * MIB - 512),  # 1 MiB + 512 are left: split off
        (19 * MIB, 20 * MIB),  # 1 MiB is left: it stays in the block
        (20 * MIB - 1, 20 * MIB),
    ],
)
def test_the_large_pool_splits_off_more_than_1_mib(size: int, block: int) -> None:
    allocator = taped().allocator
    allocator.free(allocator.malloc(20 * MIB))
    allocator.malloc(size)
    assert pieces(allocator)[0][0] == (0, block, USED)
    assert allocator.stats.allocated == block  # the slack counts as allocated
    assert allocator.stats.requested == size
    assert allocator.stats.reserved == 20 * MIB


# --- best fit ----------------------------------------------------------------


def free_segments(allocator: CachingAllocator, *sizes: int) -> list[int]:
    """Addresses of free segments of these sizes (MiB, from 10 on), which ascend."""
    blocks = [allocator.malloc(size * MIB) for size in sizes]
    for block in blocks:
        allocator.free(block)
    return [block.address for block in blocks]


def test_the_smallest_block_that_fits_is_taken() -> None:
    allocator = taped().allocator
    _, middle, _ = free_segments(allocator, 16, 14, 12)
    assert allocator.malloc(13 * MIB).address == middle
    assert allocator.stats.reserved == 42 * MIB


def test_the_lowest_address_among_equals_is_taken() -> None:
    allocator = taped().allocator
    blocks = [allocator.malloc(12 * MIB) for _ in range(3)]
    for block in reversed(blocks):  # the order of the frees does not matter
        allocator.free(block)
    assert [allocator.malloc(12 * MIB).address for _ in range(3)] == sorted(block.address for block in blocks)


def test_an_equal_size_fits() -> None:
    allocator = taped().allocator
    lower, upper = free_segments(allocator, 14, 12)
    assert allocator.malloc(12 * MIB).address == upper
    assert allocator.malloc(14 * MIB).address == lower


# --- coalescing --------------------------------------------------------------


@pytest.mark.parametrize(
    ("order", "sizes"),
    [
        ((0,), [(5, FREE), (5, USED), (5, USED), (5, USED)]),
        ((0, 1), [(10, FREE), (5, USED), (5, USED)]),  # with the left neighbor
        ((1, 0), [(10, FREE), (5, USED), (5, USED)]),  # with the right one
        ((0, 2, 1), [(15, FREE), (5, USED)]),  # with both
        ((0, 2), [(5, FREE), (5, USED), (5, FREE), (5, USED)]),  # not across a block in use
        ((3, 1, 2, 0), [(20, FREE)]),
    ],
)
def test_free_neighbors_become_one_block(order: tuple[int, ...], sizes: list[tuple[int, str]]) -> None:
    allocator = taped().allocator
    blocks = [allocator.malloc(5 * MIB) for _ in range(4)]
    for i in order:
        allocator.free(blocks[i])
    [found] = pieces(allocator)
    assert [(size // MIB, state) for _, size, state in found] == sizes
    free = sum(size for size, state in sizes if state == FREE)
    assert allocator.stats.inactive_split == (0 if len(sizes) == 1 else free * MIB)
    check(allocator)


def test_segments_that_touch_are_not_joined() -> None:
    """The addresses of two 12 MiB segments follow each other, yet a request of 24 needs a new one."""
    allocator = taped().allocator
    first, second = free_segments(allocator, 12, 12)
    assert second == first + 12 * MIB
    assert allocator.malloc(24 * MIB).address == second + 12 * MIB
    assert allocator.stats.reserved == 48 * MIB


def test_a_freed_block_is_used_again() -> None:
    allocator, trace = taped()
    first = allocator.malloc(3 * MIB)
    address = first.address
    allocator.free(first)
    assert allocator.malloc(3 * MIB).address == address
    assert [action for action, *_ in trace] == ["segment_alloc", "alloc", "free_requested", "free_completed", "alloc"]


# --- max_split_size ----------------------------------------------------------

SPLIT_32 = AllocatorSettings(max_split_size=32 * MIB, max_non_split_rounding=20 * MIB)


def test_a_small_request_does_not_cut_a_block_of_max_split_size() -> None:
    allocator = taped(SPLIT_32).allocator
    free_segments(allocator, 32)
    allocator.malloc(5 * MIB)  # takes a new segment of 20
    assert [s.size // MIB for s in allocator.layout()] == [32, 20]


def test_a_small_request_cuts_a_block_below_max_split_size() -> None:
    allocator = taped(SPLIT_32).allocator
    [address] = free_segments(allocator, 30)
    assert allocator.malloc(5 * MIB).address == address
    assert allocator.stats.allocated == 5 * MIB


@pytest.mark.parametrize(
    ("cached", "reused"),
    [
        (58, True),  # 58 < 40 + 20: the whole block is handed out
        (60, False),  # 60 - 40 is the rounding that is not allowed any more
    ],
)
def test_a_large_request_may_waste_a_bounded_rest(cached: int, reused: bool) -> None:
    allocator = taped(SPLIT_32).allocator
    [address] = free_segments(allocator, cached)
    block = allocator.malloc(40 * MIB)
    assert (block.address == address) == reused
    assert block.size == (cached * MIB if reused else 40 * MIB)
    assert allocator.stats.allocated == block.size


# --- other streams -----------------------------------------------------------


def test_a_block_used_on_another_stream_waits_after_its_free() -> None:
    """free_requested: not allocated, but active; free_completed: free."""
    allocator, trace = taped()
    block = allocator.malloc(12 * MIB, stream=1)
    allocator.record_stream(block, 2)
    allocator.free(block)
    assert (allocator.stats.allocated, allocator.stats.active) == (0, 12 * MIB)
    assert allocator.stats.requested == 12 * MIB
    assert pieces(allocator) == [[(0, 12 * MIB, HELD)]]
    assert allocator.malloc(12 * MIB, stream=1) is not block  # a second segment
    allocator.finish(block)
    assert pieces(allocator) == [[(0, 12 * MIB, FREE)], [(0, 12 * MIB, USED)]]
    actions = [action for action, *_ in trace]
    assert actions == ["segment_alloc", "alloc", "free_requested", "segment_alloc", "alloc", "free_completed"]
    assert (allocator.stats.active, allocator.stats.requested) == (12 * MIB, 12 * MIB)


def test_use_on_its_own_stream_needs_no_wait() -> None:
    allocator = taped().allocator
    block = allocator.malloc(12 * MIB, stream=1)
    allocator.record_stream(block, 1)
    allocator.free(block)
    assert allocator.held == {}


def test_a_waiting_block_is_not_merged() -> None:
    allocator = taped().allocator
    left, middle, right = (allocator.malloc(5 * MIB) for _ in range(3))
    allocator.record_stream(middle, 2)
    for block in (middle, left, right):
        allocator.free(block)
    assert [(size // MIB, state) for _, size, state in pieces(allocator)[0]] == [(5, FREE), (5, HELD), (10, FREE)]
    allocator.finish(middle)
    assert pieces(allocator) == [[(0, 20 * MIB, FREE)]]


def test_empty_cache_waits_for_other_streams() -> None:
    allocator = taped().allocator
    block = allocator.malloc(12 * MIB)
    allocator.record_stream(block, 2)
    allocator.free(block)
    allocator.empty_cache()
    assert allocator.layout() == ()
    assert allocator.stats.num_sync_all_streams == 1


# --- give back ---------------------------------------------------------------


def test_empty_cache_gives_back_whole_segments_only() -> None:
    """Large before small; within a pool by stream, size, address. Cut segments stay."""
    allocator, trace = taped()
    keep = allocator.malloc(5 * MIB)
    cut = allocator.malloc(5 * MIB)
    blocks = [
        allocator.malloc(size, stream) for size, stream in ((KIB, 0), (14 * MIB, 3), (30 * MIB, 0), (12 * MIB, 0))
    ]
    for block in (cut, *blocks):
        allocator.free(block)
    trace.clear()
    allocator.empty_cache()
    freed = [(action, size // MIB, stream) for action, _, size, stream in trace]
    assert freed == [("segment_free", n, s) for n, s in ((12, 0), (30, 0), (14, 3), (2, 0))]
    assert pieces(allocator) == [[(0, 5 * MIB, USED), (5 * MIB, 15 * MIB, FREE)]]
    allocator.free(keep)
    allocator.empty_cache()
    assert allocator.stats.reserved == 0
    assert allocator.stats.num_device_free == 5


# --- numbers -----------------------------------------------------------------


def test_peaks_since_a_reset() -> None:
    allocator = taped().allocator
    block = allocator.malloc(12 * MIB)
    allocator.malloc(100)
    allocator.free(block)
    stats = allocator.stats
    assert (stats.allocated, stats.allocated_peak) == (512, 12 * MIB + 512)
    assert (stats.requested, stats.requested_peak) == (100, 12 * MIB + 100)
    assert (stats.reserved, stats.reserved_peak) == (14 * MIB, 14 * MIB)
    assert stats.inactive_split == 2 * MIB - 512
    stats.reset_peaks()
    assert stats.allocated_peak == 512
    assert stats.segments == 2


def test_no_bytes_are_no_block() -> None:
    assert line(taped().allocator.malloc, 0) == "cannot allocate 0 bytes; torch takes no block for an empty tensor"
    assert line(taped().allocator.malloc, -5).startswith("cannot allocate -5 bytes")


def test_freeing_twice_is_refused() -> None:
    allocator = taped().allocator
    block = allocator.malloc(100)
    allocator.free(block)
    assert "is not allocated; it was freed before" in line(allocator.free, block)
    assert "so no stream can use it" in line(allocator.record_stream, block, 1)
    assert "is not waiting for another stream" in line(allocator.finish, block)
    check(allocator)


def test_a_device_cannot_have_more_in_use_than_it_has() -> None:
    assert line(Device, 10, 11) == "a device of 10 bytes cannot have 11 bytes in use by others"
