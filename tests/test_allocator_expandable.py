"""Expandable segments on cases small enough to follow by hand. Pages are 2 and 20 MiB; comments say MiB."""

from __future__ import annotations

import pytest
from allocator_cases import Taped, check, pieces, taped
from spec_inputs import line

from galore_mem.allocator.blocks import SegmentLayout
from galore_mem.allocator.caching import CachingAllocator
from galore_mem.allocator.expandable import ExpandableAllocator
from galore_mem.allocator.oom import OutOfMemoryError
from galore_mem.allocator.restore import restore
from galore_mem.allocator.settings import AllocatorSettings, parse_settings
from galore_mem.units import MIB

FREE, USED = "inactive", "active_allocated"
EXPANDABLE = parse_settings("expandable_segments:True")


def expandable(capacity: int | None = None) -> Taped:
    return taped(EXPANDABLE, capacity)


def mapped(tape: Taped) -> list[tuple[str, int, int]]:
    """(action, page offset, pages' MiB) of the segment events of the large pool's only range."""
    assert isinstance(tape.allocator, ExpandableAllocator)
    base = min(a for action, a, size, _ in tape.trace if action == "segment_map" and size >= 20 * MIB)
    return [
        (action, (a - base) // MIB, size // MIB) for action, a, size, _ in tape.trace if action.startswith("segment")
    ]


def test_a_request_maps_the_pages_it_needs() -> None:
    """5 need one page of 20; 15 of it stay free; 100 bytes need a small page of 2, in another range."""
    tape = expandable()
    tape.allocator.malloc(5 * MIB)
    assert mapped(tape) == [("segment_map", 0, 20)]
    tape.allocator.malloc(100)
    assert tape.actions("segment")[1:] == [("segment_map", 2 * MIB)]
    assert [[size for _, size, _ in s] for s in pieces(tape.allocator)] == [
        [5 * MIB, 15 * MIB],
        [512, 2 * MIB - 512],
    ]
    assert tape.allocator.stats.reserved == 22 * MIB
    assert tape.allocator.stats.segments == 0  # maps are not counted as segments
    assert tape.allocator.stats.inactive_split == 0  # nor their free parts as split


def test_a_segment_grows_where_it_ends() -> None:
    """5 of the first page are used; 18 do not fit into the 15 behind them, but begin there: one more page is mapped."""
    tape = expandable()
    first = tape.allocator.malloc(5 * MIB)
    second = tape.allocator.malloc(18 * MIB)
    assert second.address == first.address + 5 * MIB
    assert mapped(tape) == [("segment_map", 0, 20), ("segment_map", 20, 20)]
    assert pieces(tape.allocator) == [[(0, 5 * MIB, USED), (5 * MIB, 18 * MIB, USED), (23 * MIB, 17 * MIB, FREE)]]


def test_whole_pages_are_mapped_at_once() -> None:
    tape = expandable()
    tape.allocator.malloc(41 * MIB)
    assert mapped(tape) == [("segment_map", 0, 60)]


def test_512_bytes_are_split_off_in_the_large_pool() -> None:
    """19.5 of 20 would keep their slack in a native segment."""
    tape = expandable()
    tape.allocator.malloc(20 * MIB - 512)
    assert pieces(tape.allocator) == [[(0, 20 * MIB - 512, USED), (20 * MIB - 512, 512, FREE)]]


def test_streams_have_their_own_ranges() -> None:
    tape = expandable()
    a, b = tape.allocator.malloc(5 * MIB, 1), tape.allocator.malloc(5 * MIB, 2)
    assert abs(a.address - b.address) > 2**40
    tape.allocator.free(a)
    assert tape.allocator.malloc(5 * MIB, 2).address == b.address + 5 * MIB


def test_a_block_counts_with_the_room_behind_it() -> None:
    """Free: 6 in the middle, 5 at the end, followed by unmapped pages. 5 fit the end exactly, but it could grow: the 6
    are the best fit."""
    tape = expandable()
    _, middle, _ = (tape.allocator.malloc(n * MIB) for n in (4, 6, 5))
    tape.allocator.free(middle)
    assert [(size // MIB, state) for _, size, state in pieces(tape.allocator)[0]] == [
        (4, USED), (6, FREE), (5, USED), (5, FREE),
    ]  # fmt: skip
    assert tape.allocator.malloc(5 * MIB).address == middle.address
    assert tape.allocator.malloc(4 * MIB).address == middle.address + 11 * MIB  # the end is all that is left


def test_whole_free_pages_are_unmapped() -> None:
    """Used: 5 of page 0 and 5 of page 3. Free: [5, 65); its whole pages are [20, 60); 15 before and 5 after stay."""
    tape = expandable()
    _, middle, last = (tape.allocator.malloc(n * MIB) for n in (5, 60, 5))
    tape.allocator.free(middle)
    tape.allocator.empty_cache()
    assert mapped(tape) == [("segment_map", 0, 20), ("segment_map", 20, 60), ("segment_unmap", 20, 40)]
    assert pieces(tape.allocator) == [
        [(0, 5 * MIB, USED), (5 * MIB, 15 * MIB, FREE)],
        [(0, 5 * MIB, FREE), (5 * MIB, 5 * MIB, USED), (10 * MIB, 10 * MIB, FREE)],
    ]
    assert tape.allocator.stats.reserved == 40 * MIB
    check(tape.allocator)
    # the hole is filled first: 30 begin behind the 15 free ones, one page is mapped
    again = tape.allocator.malloc(30 * MIB)
    assert again.address == middle.address
    assert mapped(tape)[3:] == [("segment_map", 20, 20)]
    # 30 more: from the 5 left of that page on, the second page of the hole and the free 5 behind it are just 30
    tape.allocator.malloc(30 * MIB)
    assert mapped(tape)[4:] == [("segment_map", 40, 20)]
    assert tape.allocator.stats.reserved == 80 * MIB
    tape.allocator.free(last)
    check(tape.allocator)


def test_too_small_a_hole_is_passed_over() -> None:
    """A hole of one page between used blocks has room for 20; 25 go to the end, though it is higher; 20 fill the hole,
    though 15 of a mapped page are free at the end."""
    tape = expandable()
    _, hole, last = (tape.allocator.malloc(20 * MIB) for _ in range(3))
    tape.allocator.free(hole)
    tape.allocator.empty_cache()
    assert tape.allocator.malloc(25 * MIB).address == last.address + 20 * MIB
    assert tape.allocator.malloc(20 * MIB).address == hole.address
    assert mapped(tape)[-2:] == [("segment_map", 60, 40), ("segment_map", 20, 20)]


def test_a_range_without_memory_goes_back() -> None:
    tape = expandable()
    tape.allocator.free(tape.allocator.malloc(50 * MIB))
    tape.allocator.empty_cache()
    assert mapped(tape) == [("segment_map", 0, 60), ("segment_unmap", 0, 60)]
    assert list(tape.allocator.chains()) == []
    assert tape.allocator.stats.reserved == 0


def test_a_retry_unmaps_and_maps_again() -> None:
    """60: 40 are cached in the large range, whose first 20 are used by stream 0; stream 1 asks for 40 and nothing is
    left: the 40 are unmapped, and its own range gets them."""
    tape = expandable(60 * MIB)
    tape.allocator.malloc(20 * MIB)
    tape.allocator.free(tape.allocator.malloc(40 * MIB))
    tape.allocator.malloc(40 * MIB, stream=1)
    assert tape.actions("segment") == [
        ("segment_map", 20 * MIB), ("segment_map", 40 * MIB), ("segment_unmap", 40 * MIB), ("segment_map", 40 * MIB),
    ]  # fmt: skip
    assert tape.allocator.stats.num_alloc_retries == 1


def test_out_of_memory_keeps_what_was_mapped_on_the_way() -> None:
    """50: 45 used begin at page 0 (60 mapped would not fit, so 45 fail: 3 pages). Then 30: 2 pages."""
    tape = expandable(50 * MIB)
    with pytest.raises(OutOfMemoryError) as caught:
        tape.allocator.malloc(45 * MIB)
    assert (caught.value.tried, caught.value.free, caught.value.reserved) == (46 * MIB, 50 * MIB, 0)
    tape.allocator.malloc(30 * MIB)
    assert tape.allocator.stats.reserved == 40 * MIB
    with pytest.raises(OutOfMemoryError) as caught:  # the free 10 and one more page are needed, 10 are left
        tape.allocator.malloc(15 * MIB)
    assert (caught.value.tried, caught.value.free) == (16 * MIB, 10 * MIB)
    assert caught.value.unallocated == 10 * MIB
    check(tape.allocator)


def test_a_hole_of_which_only_a_part_can_be_mapped() -> None:
    """90: pages 0 and 3 are used, 1 is a hole, 2 is free. 40 fit into 1 and 2 together: one page is mapped, which makes
    80. Another page would make 100."""
    tape = expandable(90 * MIB)
    blocks = [tape.allocator.malloc(20 * MIB) for _ in range(4)]
    tape.allocator.free(blocks[1])
    tape.allocator.empty_cache()
    tape.allocator.free(blocks[2])
    assert tape.allocator.malloc(40 * MIB).address == blocks[0].address + 20 * MIB
    check(tape.allocator)
    with pytest.raises(OutOfMemoryError):
        tape.allocator.malloc(20 * MIB)
    assert tape.allocator.stats.reserved == 80 * MIB


@pytest.mark.parametrize("request_", [1, MIB, 5 * MIB, 20 * MIB, 30 * MIB, 55 * MIB])
@pytest.mark.parametrize("capacity", [62, 80, 82, 100, 102, 140])
def test_would_release_foretells_the_retry(request_: int, capacity: int) -> None:
    """After used 5, free 35, used 20: the question changes nothing, and is answered by what malloc then does."""
    tape = expandable(capacity * MIB)
    _, middle, _ = (tape.allocator.malloc(n * MIB) for n in (5, 35, 20))
    tape.allocator.free(middle)
    before = len(tape.trace)
    told = tape.allocator.would_release(request_)
    assert len(tape.trace) == before
    try:
        tape.allocator.malloc(request_)
    except OutOfMemoryError:
        assert told
    assert (tape.allocator.stats.num_alloc_retries > 0) == told


def test_switched_off_expandable_blocks_are_left_alone() -> None:
    """A recording may begin with expandable segments and go on without: free blocks in them are passed over."""
    tape = expandable()
    tape.allocator.malloc(5 * MIB)
    segments = tape.allocator.layout()
    off = ExpandableAllocator(AllocatorSettings())
    restore(off, segments)
    block = off.malloc(5 * MIB)
    assert block.area is None
    native = off.layout()[0] if not off.layout()[0].expandable else off.layout()[1]
    assert native == SegmentLayout(block.address, 20 * MIB, 0, False, False, native.blocks)
    off.free(block)
    assert off.malloc(5 * MIB).address == block.address
    assert "set expandable_segments:True" in line(restore, CachingAllocator(), segments)
