"""Devices of limited capacity: retries, garbage collection, and out of memory with the numbers of torch's message."""

from __future__ import annotations

import pytest
from allocator_cases import Taped, check, pieces, taped
from spec_inputs import line

from galore_mem.allocator.oom import OutOfMemoryError, format_size
from galore_mem.allocator.settings import AllocatorSettings
from galore_mem.units import GIB, KIB, MIB

FREE, USED = "inactive", "active_allocated"


def failure(allocator: Taped, size: int) -> OutOfMemoryError:
    with pytest.raises(OutOfMemoryError) as caught:
        allocator.allocator.malloc(size)
    check(allocator.allocator)
    return caught.value


def test_cached_memory_is_given_back_for_a_request_that_fits_then() -> None:
    """30 MiB: 20 are cached, 24 are asked for; 20 + 24 > 30, so the 20 go back first."""
    tape = taped(capacity=30 * MIB)
    tape.allocator.free(tape.allocator.malloc(20 * MIB))
    tape.allocator.malloc(24 * MIB)
    assert tape.actions("segment") == [
        ("segment_alloc", 20 * MIB), ("segment_free", 20 * MIB), ("segment_alloc", 24 * MIB),
    ]  # fmt: skip
    assert (tape.allocator.stats.num_alloc_retries, tape.allocator.stats.num_ooms) == (1, 0)
    assert tape.allocator.stats.reserved == 24 * MIB
    assert tape.allocator.stats.reserved_peak == 24 * MIB


def test_capacity_may_be_filled_to_the_last_byte() -> None:
    tape = taped(capacity=30 * MIB, other=6 * MIB)
    tape.allocator.malloc(24 * MIB)
    assert tape.allocator.stats.num_alloc_retries == 0
    assert failure(tape, 1).free == 0


def test_a_request_that_never_fits_fails_with_the_numbers_of_the_message() -> None:
    """40 MiB, 3 of them in use by others. A block of 5 (of a segment of 20) is alive, a segment of 14 is cached. 18 are
    asked for: the free rest of 15 is too small; the 14 go back in the retry; then 40 - 3 - 20 = 17 are free, not 18."""
    tape = taped(capacity=40 * MIB, other=3 * MIB)
    cached = tape.allocator.malloc(12 * MIB + 1)
    tape.allocator.malloc(5 * MIB)
    tape.allocator.free(cached)
    error = failure(tape, 18 * MIB - 100)
    assert (error.requested, error.tried, error.stream) == (18 * MIB - 100, 18 * MIB, 0)
    assert (error.capacity, error.outside, error.free) == (40 * MIB, 3 * MIB, 17 * MIB)
    assert (error.allocated, error.reserved, error.unallocated) == (5 * MIB, 20 * MIB, 15 * MIB)
    assert error.allowed is None
    assert str(error) == (
        "CUDA would be out of memory: 18.00 MiB more are needed, the device has 17.00 MiB free of 40.00 MiB. In use:"
        " 5.00 MiB allocated, 15.00 MiB reserved but unallocated, 3.00 MiB outside the allocator."
    )
    assert tape.trace[-1] == ("oom", 17 * MIB, 18 * MIB, 0)  # the device's free bytes, the rounded size
    assert tape.actions("segment")[2:] == [("segment_free", 14 * MIB)]
    stats = tape.allocator.stats
    assert (stats.num_alloc_retries, stats.num_ooms, stats.num_sync_all_streams) == (1, 1, 1)
    # 2 MiB less would have fitted, and the allocator is as usable as before
    assert tape.allocator.malloc(16 * MIB).size == 16 * MIB


def test_the_message_names_the_segment_that_was_tried() -> None:
    """5 MiB need a segment of 20, and 1 byte one of 2: that is what torch's message says, too."""
    assert failure(taped(capacity=19 * MIB), 5 * MIB).tried == 20 * MIB
    assert failure(taped(capacity=MIB), 1).tried == 2 * MIB


def test_blocks_that_wait_for_another_stream_are_freed_by_the_retry() -> None:
    tape = taped(capacity=30 * MIB)
    block = tape.allocator.malloc(20 * MIB)
    tape.allocator.record_stream(block, 2)
    tape.allocator.free(block)
    tape.allocator.malloc(24 * MIB)
    actions = [action for action, *_ in tape.trace][2:]
    assert actions == ["free_requested", "free_completed", "segment_free", "segment_alloc", "alloc"]


def test_the_memory_fraction_limits_the_allocator() -> None:
    """Half of 100 MiB: 50 may be reserved, though the device has more."""
    tape = taped(AllocatorSettings(per_process_memory_fraction=0.5), capacity=100 * MIB)
    tape.allocator.malloc(30 * MIB)
    tape.allocator.malloc(20 * MIB)
    error = failure(tape, 1)
    assert (error.allowed, error.free, error.reserved) == (50 * MIB, 50 * MIB, 50 * MIB)
    assert "free of 100.00 MiB; the allocator may use 50.00 MiB. In use" in str(error)


def test_the_memory_fraction_needs_a_capacity() -> None:
    says = line(taped, AllocatorSettings(per_process_memory_fraction=0.5))
    assert says == "per_process_memory_fraction needs the device's capacity; give it"


# --- max_split_size: only as much as needed is given back --------------------

SPLIT_32 = AllocatorSettings(max_split_size=32 * MIB)


def test_one_block_that_suffices_is_given_back() -> None:
    """160 MiB, cached: 36, 44, 70. 45 do not fit into 160 - 150; the smallest block of at least 45 is 70, but it is
    refused for reuse (70 >= 45 + 20), so it goes back, and only it."""
    tape = taped(SPLIT_32, capacity=160 * MIB)
    for block in [tape.allocator.malloc(n * MIB) for n in (36, 44, 70)]:
        tape.allocator.free(block)
    tape.allocator.malloc(45 * MIB)
    assert tape.actions("segment")[3:] == [("segment_free", 70 * MIB), ("segment_alloc", 46 * MIB)]
    assert tape.allocator.stats.num_alloc_retries == 0  # this is not counted as one


def test_several_blocks_are_given_back_from_the_largest_down() -> None:
    """120 MiB, cached: 36, 44, 34. 50 do not fit into 120 - 114; no block has 50; 44, then 36 go back: 80 >= 50."""
    tape = taped(SPLIT_32, capacity=120 * MIB)
    for block in [tape.allocator.malloc(n * MIB) for n in (36, 44, 34)]:
        tape.allocator.free(block)
    tape.allocator.malloc(50 * MIB)
    assert tape.actions("segment")[3:] == [
        ("segment_free", 44 * MIB), ("segment_free", 36 * MIB), ("segment_alloc", 50 * MIB),
    ]  # fmt: skip


def test_blocks_below_max_split_size_are_left_for_the_last_resort() -> None:
    """100 MiB, cached: 30 and 40. 62 do not fit into 100 - 70. 40 go back, then 30 is below max_split_size: not enough,
    so all that is cached goes back (30)."""
    tape = taped(SPLIT_32, capacity=100 * MIB)
    for block in [tape.allocator.malloc(n * MIB) for n in (30, 40)]:
        tape.allocator.free(block)
    tape.allocator.malloc(62 * MIB)
    assert tape.actions("segment")[2:] == [
        ("segment_free", 40 * MIB), ("segment_free", 30 * MIB), ("segment_alloc", 62 * MIB),
    ]  # fmt: skip
    assert tape.allocator.stats.num_alloc_retries == 1


# --- garbage collection ------------------------------------------------------


def collected(threshold: float) -> list[tuple[str, int]]:
    """Limit 0.8 of 200 MiB = 160. Searches of the large pool count the age of a free block.

    20 (search 1), 30 (2), free 20 (age counted from 2), 40 (3), free 30 (from 3), then 50 (4): ages are 2 and 1, the
    average 1.5, and 90 MiB are reserved.
    """
    settings = AllocatorSettings(per_process_memory_fraction=0.8, garbage_collection_threshold=threshold)
    tape = taped(settings, capacity=200 * MIB)
    a, b = tape.allocator.malloc(20 * MIB), tape.allocator.malloc(30 * MIB)
    tape.allocator.free(a)
    tape.allocator.malloc(40 * MIB)
    tape.allocator.free(b)
    before = len(tape.trace)
    tape.allocator.malloc(50 * MIB)
    check(tape.allocator)
    return [(action, size // MIB) for action, _, size, _ in tape.trace[before:]]


def test_above_the_threshold_old_blocks_are_given_back() -> None:
    """0.5 of 160 = 80 < 90: at least 10 must go. Blocks of age 1.5 and more go: the 20. That is enough."""
    assert collected(0.5) == [("segment_free", 20), ("segment_alloc", 50), ("alloc", 50)]


def test_collection_goes_on_until_the_target_is_reached() -> None:
    """0.3125 of 160 = 50: 40 must go. The 20 go; the average of what is left is 1, so the 30 go, too."""
    assert collected(0.3125) == [("segment_free", 20), ("segment_free", 30), ("segment_alloc", 50), ("alloc", 50)]


def test_below_the_threshold_nothing_is_collected() -> None:
    """0.5625 of 160 = 90, which is not exceeded."""
    assert collected(0.5625) == [("segment_alloc", 50), ("alloc", 50)]


def test_without_a_limit_there_is_no_collection() -> None:
    """DeviceCachingAllocator::malloc: only if allowed_memory_maximum has a value, which a fraction below 1 gives."""
    tape = taped(AllocatorSettings(garbage_collection_threshold=0.1), capacity=200 * MIB)
    tape.allocator.free(tape.allocator.malloc(100 * MIB))
    tape.allocator.malloc(110 * MIB - MIB)
    assert tape.allocator.stats.num_alloc_retries == 1  # given back by the retry
    tape = taped(AllocatorSettings(garbage_collection_threshold=0.1), capacity=300 * MIB)
    tape.allocator.free(tape.allocator.malloc(100 * MIB))
    tape.allocator.malloc(110 * MIB)
    assert pieces(tape.allocator) == [[(0, 100 * MIB, FREE)], [(0, 110 * MIB, USED)]]


def test_cut_blocks_are_not_collected() -> None:
    settings = AllocatorSettings(per_process_memory_fraction=0.8, garbage_collection_threshold=0.1)
    tape = taped(settings, capacity=200 * MIB)
    tape.allocator.malloc(5 * MIB)  # 15 of its segment are free
    tape.allocator.malloc(50 * MIB)
    assert tape.actions("segment_free") == []


# --- sizes as torch prints them ----------------------------------------------


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"), (512, "512 bytes"), (KIB, "1024 bytes"), (KIB + 512, "1.50 KiB"), (MIB, "1024.00 KiB"),
        (20 * MIB, "20.00 MiB"), (GIB, "1024.00 MiB"), (2 * GIB, "2.00 GiB"), (2000 * GIB, "2000.00 GiB"),
    ],
)  # fmt: skip
def test_sizes_are_printed_as_torch_does(size: int, text: str) -> None:
    """c10 format_size changes the unit only above 1024 of it."""
    assert format_size(size) == text
