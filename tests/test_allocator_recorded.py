"""Recordings replayed: start states rebuilt from the end, exact replays, and recordings that contradict themselves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from allocator_cases import random_program
from allocator_recordings import VARIABLE, real_traces, record
from hypothesis import given, settings
from hypothesis import strategies as st
from spec_inputs import is_one_line, line

from galore_mem.allocator.blocks import BlockLayout, SegmentLayout
from galore_mem.allocator.events import Alloc, EmptyCache, Event, Free
from galore_mem.allocator.recorded import compare
from galore_mem.allocator.settings import AllocatorSettings, parse_settings
from galore_mem.allocator.snapshot import ACTIONS, DeviceRecording, TraceEvent, read_snapshot
from galore_mem.allocator.start import start_state
from galore_mem.errors import InputError
from galore_mem.units import MIB

DEFAULT = AllocatorSettings()
FREE, USED = "inactive", "active_allocated"


# --- real recordings ---------------------------------------------------------


ABSENT = pytest.mark.skip(reason=f"no recordings here: set {VARIABLE} to a folder that has traces/*.json.gz")
REAL = [pytest.param(path, id=path.name.split(".")[0]) for path in real_traces()]


@pytest.mark.parametrize("path", REAL or [pytest.param(Path(), id="none", marks=ABSENT)])
def test_real_recordings_replay_exactly(path: Path) -> None:
    """Every allocation on its recorded address, every segment event, every block at the end; and with invented
    addresses the recorded peak of reserved bytes."""
    recording = read_snapshot(path)
    for device in recording.devices:
        start = start_state(device, recording.settings)
        found = compare(device, recording.settings, start=start)
        assert found.first_difference is None
        assert found.allocations_matched == found.allocations > 0
        assert found.segment_events_matched == found.segment_events
        assert found.blocks_matched == found.blocks
        assert found.peak_reserved_bytes == found.recorded_peak_reserved_bytes
        invented = compare(device, recording.settings, start=start, invented=True)
        assert invented.peak_reserved_bytes == found.recorded_peak_reserved_bytes


# --- recordings of the model itself ------------------------------------------

# multiples of 2 MiB from 10 MiB on fill their segments, so that no block keeps a slack that a recording cannot show
WITHOUT_SLACK = (100, 3000, MIB, 10 * MIB, 12 * MIB, 24 * MIB, 40 * MIB)
SETTINGS = {
    "default": "",
    "expandable": "expandable_segments:True",
    "rounded": "roundup_power2_divisions:4",
    "max-split": "max_split_size_mb:32",
    "collected": "per_process_memory_fraction:0.9,garbage_collection_threshold:0.5",
}


@pytest.mark.parametrize("emptied", [True, False])
@pytest.mark.parametrize("capacity", [4000, 300])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_recording_from_the_start_replays_exactly(name: str, capacity: int, emptied: bool) -> None:
    """Retries, failures, waits for streams and emptied caches included. A cache that is emptied right before a request
    that would have needed a retry looks like that retry."""
    options = parse_settings(SETTINGS[name])
    program = [e for e in random_program(800, seed=3) if emptied or not isinstance(e, EmptyCache)]
    recording, model = record(program, options, capacity * MIB)
    found = compare(recording, options, capacity * MIB)
    assert found.first_difference is None
    assert found.retries == model.stats.num_alloc_retries or (emptied and found.retries > model.stats.num_alloc_retries)
    assert found.out_of_memory == found.out_of_memory_matched == model.stats.num_ooms
    assert found.peak_reserved_bytes == model.stats.reserved_peak
    assert found.peak_allocated_bytes == model.stats.allocated_peak
    assert (capacity == 300) == (model.stats.num_ooms > 0)


@pytest.mark.parametrize("percent", [1, 15, 50, 90])
@pytest.mark.parametrize("name", ["default", "expandable", "max-split"])
def test_a_recording_that_begins_later_replays_exactly(name: str, percent: int) -> None:
    """The ring buffer of torch keeps the last events only: the start state is rebuilt from the final segments."""
    options = parse_settings(SETTINGS[name])
    whole, model = record(random_program(800, 5, WITHOUT_SLACK), options, 4000 * MIB)
    recording = whole._replace(events=whole.events[len(whole.events) * percent // 100 :])
    assert len(recording.events) > 100
    found = compare(recording, options, 4000 * MIB)
    assert found.first_difference is None
    assert found.recorded_peak_reserved_bytes == found.peak_reserved_bytes <= model.stats.reserved_peak


def test_a_capacity_that_explains_the_retries_is_found() -> None:
    """300 MiB without failures: what was ever reserved at most explains every retry."""
    sizes = (100, 3000, MIB, 5 * MIB, *(n * MIB for n in range(10, 40, 2)))
    program = [e for e in random_program(800, 9, sizes, live=6) if not isinstance(e, EmptyCache)]
    recording, model = record(program, None, 300 * MIB)
    assert model.stats.num_alloc_retries > 5
    assert model.stats.num_ooms == 0
    found = compare(recording, DEFAULT)
    assert found.capacity == model.stats.reserved_peak <= 300 * MIB
    assert found.first_difference is None
    assert found.retries == model.stats.num_alloc_retries


def test_a_capacity_follows_from_out_of_memory() -> None:
    """The driver reported what was free: reserved + free = 300 MiB."""
    recording, model = record(random_program(800, seed=3), None, 300 * MIB)
    assert model.stats.num_ooms > 0
    found = compare(recording, DEFAULT)
    assert found.capacity == 300 * MIB
    assert found.exact


def test_what_others_have_in_use_may_change() -> None:
    """60 are reserved at most; later, with 20 reserved, 14 more fail, for the driver has 10 left: 30 in all then."""
    program: list[Event] = [Alloc(1, 40 * MIB), Alloc(2, 20 * MIB), Free(1), EmptyCache()]
    recording, _ = record(program)
    recording.events.append(TraceEvent("oom", 10 * MIB, 14 * MIB, 0))
    found = compare(recording, DEFAULT)
    assert (found.capacity, found.out_of_memory_matched, found.exact) == (60 * MIB, 1, True)
    assert compare(recording, DEFAULT, 60 * MIB).out_of_memory_matched == 0  # a capacity that is given holds


def test_an_emptied_cache_is_no_retry() -> None:
    """40 were cached when the cache was emptied: 12 would have been cut from them, so nothing refused memory."""
    program: list[Event] = [Alloc(1, 40 * MIB), Free(1), EmptyCache(), Alloc(2, 12 * MIB), Alloc(3, 14 * MIB)]
    recording, _ = record(program)
    found = compare(recording, DEFAULT)
    assert (found.capacity, found.retries, found.exact) == (None, 0, True)


def test_wrong_settings_are_noticed() -> None:
    recording, _ = record(random_program(300, seed=1), None)
    found = compare(recording, parse_settings("roundup_power2_divisions:2"))
    assert not found.exact
    assert found.allocations_matched < found.allocations
    found = compare(recording, DEFAULT, 30 * MIB)  # a device that is too small
    assert found.out_of_memory_extra > 0


def test_invented_addresses_may_differ_but_not_the_sizes() -> None:
    recording, model = record(random_program(300, seed=1), None)
    moved = DeviceRecording(0, [_moved(e) for e in recording.events], tuple(map(_moved_segment, recording.segments)))
    assert compare(moved, DEFAULT).exact
    invented = compare(moved, DEFAULT, invented=True)
    assert invented.allocations_matched == 0
    assert invented.peak_reserved_bytes == model.stats.reserved_peak


SHIFT = 2**40


def _moved(event: TraceEvent) -> TraceEvent:
    return event._replace(address=event.address + SHIFT)


def _moved_segment(segment: SegmentLayout) -> SegmentLayout:
    blocks = tuple(b._replace(address=b.address + SHIFT) for b in segment.blocks)
    return segment._replace(address=segment.address + SHIFT, blocks=blocks)


# --- blocks whose end is not recorded ----------------------------------------

BASE = 2**44


def large(*blocks: tuple[float, float, str]) -> SegmentLayout:
    """A large segment at BASE of (size, requested, state) in MiB."""
    laid = []
    at = BASE
    for size, requested, state in blocks:
        laid.append(BlockLayout(at, int(size * MIB), int(requested * MIB), state))
        at += int(size * MIB)
    return SegmentLayout(BASE, at - BASE, 0, False, False, tuple(laid))


def alloc(at: float, size: float) -> TraceEvent:
    return TraceEvent("alloc", BASE + int(at * MIB), int(size * MIB), 0)


def free(at: float, size: float) -> list[TraceEvent]:
    return [TraceEvent(a, BASE + int(at * MIB), int(size * MIB), 0) for a in ("free_requested", "free_completed")]


def starts(events: list[TraceEvent], *blocks: tuple[float, float, str]) -> list[tuple[float, str]]:
    """(MiB, state) of the blocks at the start of a recording that ends with these."""
    [segment] = start_state(DeviceRecording(0, events, (large(*blocks),)), DEFAULT).segments
    return [(b.size / MIB, b.state) for b in segment.blocks]


def test_a_gap_of_up_to_1_mib_belongs_to_the_block_before_it() -> None:
    """19 were asked for; a free block of the large pool has more than 1 MiB: the freed block had all 20."""
    assert starts(free(0, 19), (20, 0, FREE)) == [(20, USED)]
    assert starts(free(0, 18.5), (20, 0, FREE)) == [(18.5, USED), (1.5, FREE)]


def test_the_first_allocation_behind_a_block_shows_its_end() -> None:
    """10 were asked for, and in its lifetime something was put 10.5 behind its beginning: it had 10.5."""
    events = [alloc(10.5, 4), *free(10.5, 4), *free(0, 10)]
    assert starts(events, (20, 0, FREE)) == [(10.5, USED), (9.5, FREE)]
    # after its free this says nothing: the least size is assumed, and the block is said to be open
    events = [*free(0, 10), alloc(0, 3), alloc(3, 4)]
    recording = DeviceRecording(0, events, (large((3, 3, USED), (4, 4, USED), (13, 0, FREE)),))
    start = start_state(recording, DEFAULT)
    assert [(b.size // MIB, b.state) for b in start.segments[0].blocks] == [(10, USED), (10, FREE)]
    assert start.open_blocks == {BASE: (10 * MIB, 11 * MIB)}
    assert compare(recording, DEFAULT).open_blocks == 1


def test_a_block_that_is_there_at_the_end_shows_its_size() -> None:
    assert starts(free(12, 5), (12, 11.5, USED), (8, 0, FREE)) == [(12, USED), (5, USED), (3, FREE)]


def test_a_block_held_at_the_start() -> None:
    """The recording begins between the free and its completion."""
    events = [TraceEvent("free_completed", BASE, 5 * MIB, 0)]
    assert starts(events, (20, 0, FREE)) == [(5, "active_pending_free"), (15, FREE)]
    assert compare(DeviceRecording(0, events, (large((20, 0, FREE)),)), DEFAULT).exact


def test_a_block_that_was_never_split_has_its_whole_segment() -> None:
    options = replace(DEFAULT, max_split_size=32 * MIB)
    recording = DeviceRecording(0, free(0, 40), (large((58, 0, FREE)),))
    [segment] = start_state(recording, options).segments
    assert segment.blocks == (BlockLayout(BASE, 58 * MIB, 40 * MIB, USED),)


# --- recordings that contradict themselves -----------------------------------


@pytest.mark.parametrize(
    ("events", "blocks", "says"),
    [
        # freed twice: before the second free it must have been there, so the first cannot be undone
        ([*free(0, 5), *free(0, 5)], ((20, 0, FREE),), "event 1 (free_completed of 5242880 bytes at 0x100000000000)"),
        ([free(0, 5)[0], *free(0, 5)], ((20, 0, FREE),), "event 0 (free_requested of 5242880 bytes at 0x100000000000)"),
        # freed, but the end still has it
        (free(0, 5), ((5, 5, USED), (15, 0, FREE)), "frees what cannot have been there"),
        # outside of all segments, and over the end of one
        (free(30, 5), ((20, 0, FREE),), "frees what cannot have been there"),
        (free(18, 5), ((20, 0, FREE),), "frees what cannot have been there"),
        # over another block
        (free(3, 5), ((5, 5, USED), (15, 0, FREE)), "frees what cannot have been there"),
        ([*free(3, 5), *free(0, 5)], ((20, 0, FREE),), "frees what cannot have been there"),
        # allocated, but nowhere
        ([alloc(0, 5)], ((20, 0, FREE),), "allocates what is neither freed later nor there at the end"),
        ([alloc(0, 6)], ((6, 5, USED), (14, 0, FREE)), "allocates what is neither"),
        # segments
        ([TraceEvent("segment_alloc", BASE, 5, 0)], ((20, 0, FREE),), "adds memory that is not there afterwards"),
        ([TraceEvent("segment_alloc", BASE, 20 * MIB, 0)], ((5, 5, USED), (15, 0, FREE)), "adds memory"),
        ([TraceEvent("segment_map", BASE, 20 * MIB, 0)], ((20, 0, FREE),), "adds memory"),
        ([TraceEvent("segment_free", BASE, 20 * MIB, 0)], ((20, 0, FREE),), "takes away memory that is there"),
        ([TraceEvent("segment_free", BASE - 5, 6, 0)], ((20, 0, FREE),), "takes away memory"),
        ([TraceEvent("segment_unmap", BASE + 3, 0, 0)], ((20, 0, FREE),), "takes away memory"),
    ],
)  # fmt: skip
def test_a_recording_that_contradicts_itself_is_refused(
    events: list[TraceEvent], blocks: tuple[tuple[float, float, str], ...], says: str
) -> None:
    message = line(compare, DeviceRecording(3, events, (large(*blocks),)), DEFAULT)
    assert message.startswith("device 3, event ")
    assert says in message


WORDS = st.tuples(st.integers(0, 10**6), st.integers(0, 3), st.integers(-1, 2**50) | st.integers(-(2**21), 2**21))


@settings(max_examples=150, derandomize=True, deadline=None)
@given(st.sampled_from(["default", "expandable", "max-split"]), st.lists(WORDS, min_size=1, max_size=4), st.booleans())
def test_any_recording_is_compared_or_refused_in_one_line(
    name: str, changes: list[tuple[int, int, int]], swap: bool
) -> None:
    """Events of a good recording with other actions, addresses, sizes or streams, or in another order."""
    options = parse_settings(SETTINGS[name])
    recording, _ = record(random_program(80, seed=2, live=8), options, 300 * MIB)
    events = list(recording.events)
    for at, field, value in changes:
        at %= len(events)
        old = events[at]
        new: list[Any] = list(old)
        new[field] = sorted(ACTIONS)[value % len(ACTIONS)] if field == 0 else abs(new[field] + value)
        events[at] = TraceEvent(*new)
        if swap:
            events[at], events[-1 - at] = events[-1 - at], events[at]
    message = "compared"
    try:
        compare(recording._replace(events=events), options)
    except InputError as error:
        message = str(error)
    assert is_one_line(message)
