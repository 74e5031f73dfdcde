"""Streams of events: peaks by phase and where they are, the timeline, out of memory, streams that make no sense."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from allocator_cases import check, random_program
from hypothesis import given, settings
from hypothesis import strategies as st
from spec_inputs import JSON, is_one_line, line

from galore_mem.allocator.device import Device
from galore_mem.allocator.events import Alloc, EmptyCache, Event, Finish, Free, Mark, RecordStream
from galore_mem.allocator.expandable import new_allocator
from galore_mem.allocator.replay import replay
from galore_mem.allocator.settings import AllocatorSettings
from galore_mem.errors import InputError
from galore_mem.units import KIB, MIB


def test_peaks_of_each_phase() -> None:
    """load: 12 + 14. forward begins there, and adds 20 + 2: 48 of 26 + 20 + 2 reserved. step: the 20 are free but
    cached; 16 fit into them and are cut off: 12 + 14 + 16."""
    events = [
        Mark("load"),
        Alloc(1, 12 * MIB),
        Alloc(2, 14 * MIB),
        Mark("forward"),
        Alloc(3, 20 * MIB),  # event 4
        Alloc(4, MIB),
        Alloc(5, MIB),  # event 6: the second half of the same segment of 2
        Free(5),
        Free(3),
        Free(4),
        Mark("step"),  # event 10
        Alloc(6, 16 * MIB),
        Free(6),
    ]
    result = replay(events, new_allocator())
    load, forward, step = result.phases
    assert (load.name, load.start_allocated_bytes, load.start_reserved_bytes) == ("load", 0, 0)
    assert (load.peak_allocated_bytes, load.peak_allocated_at) == (26 * MIB, 2)
    assert (forward.start_allocated_bytes, forward.start_reserved_bytes) == (26 * MIB, 26 * MIB)
    assert (forward.peak_allocated_bytes, forward.peak_allocated_at) == (48 * MIB, 6)
    assert (forward.peak_reserved_bytes, forward.peak_reserved_at) == (48 * MIB, 5)
    assert (step.start_allocated_bytes, step.start_reserved_bytes) == (26 * MIB, 48 * MIB)
    assert (step.peak_allocated_bytes, step.peak_allocated_at) == (42 * MIB, 11)
    assert (step.peak_reserved_bytes, step.peak_reserved_at) == (48 * MIB, 10)  # it begins there
    assert (result.peak_allocated_bytes, result.peak_allocated_at) == (48 * MIB, 6)
    assert (result.peak_reserved_bytes, result.peak_reserved_at) == (48 * MIB, 5)
    assert set(result.addresses) == {1, 2}
    assert result.out_of_memory is None


def test_the_two_peaks_are_reached_apart() -> None:
    """40 allocated at event 0; at event 2 another stream's 12 add to the 40 that are cached: 52 reserved."""
    result = replay([Alloc(1, 40 * MIB), Free(1), Alloc(2, 12 * MIB, stream=7)], new_allocator())
    assert (result.peak_allocated_bytes, result.peak_allocated_at) == (40 * MIB, 0)
    assert (result.peak_reserved_bytes, result.peak_reserved_at) == (52 * MIB, 2)


def test_what_comes_before_the_first_mark_is_a_phase_without_a_name() -> None:
    result = replay([Alloc(1, 100), Mark("a")], new_allocator())
    assert [(p.name, p.peak_allocated_bytes) for p in result.phases] == [("", 512), ("a", 512)]
    assert replay([], new_allocator()).phases[0].peak_allocated_at == -1


def test_the_timeline_has_an_entry_for_each_event() -> None:
    result = replay(
        [Alloc(1, 100), Alloc(2, 12 * MIB), Free(2), EmptyCache(), Mark("x")], new_allocator(), timeline=True
    )
    assert result.timeline is not None
    assert list(result.timeline.allocated) == [512, 12 * MIB + 512, 512, 512, 512]
    assert list(result.timeline.reserved) == [2 * MIB, 14 * MIB, 14 * MIB, 2 * MIB, 2 * MIB]


def test_nothing_is_allocated_for_no_bytes() -> None:
    result = replay([Alloc(1, 0), RecordStream(1, 3), Free(1)], new_allocator())
    assert result.peak_reserved_bytes == 0


def test_a_replay_ends_where_memory_does() -> None:
    """40 MiB, 2 in use by others: 20 and 12 fit, 10 more do not."""
    events = [Alloc(1, 20 * MIB), Alloc(2, 12 * MIB), Alloc(3, 10 * MIB), Alloc(4, 100)]
    result = replay(events, new_allocator(None, Device(40 * MIB, 2 * MIB)))
    assert result.out_of_memory is not None
    assert result.out_of_memory_at == 2
    assert (result.out_of_memory.requested, result.out_of_memory.free) == (10 * MIB, 6 * MIB)
    assert result.peak_allocated_bytes == 32 * MIB
    assert set(result.addresses) == {1, 2}
    assert replay(events, new_allocator(None, Device(44 * MIB + 2 * MIB))).out_of_memory is None


def test_a_reserved_peak_inside_a_failed_request_counts() -> None:
    """70 MiB, pages of 20: 0 is used, 1 a hole, 2 free: 40 reserved. 60 would begin in the hole: it is mapped (60), the
    page behind 2 does not fit (80). The retry gives back 1 and 2, and fails, too: 20 are reserved at the end."""
    three = [Alloc(i, 20 * MIB) for i in range(3)]
    events = [*three, Free(1), EmptyCache(), Free(2), Mark("x"), Alloc(3, 60 * MIB)]
    result = replay(events, new_allocator(AllocatorSettings(expandable_segments=True), Device(70 * MIB)))
    assert result.out_of_memory_at == 7
    phase = result.phases[1]
    assert (phase.start_reserved_bytes, phase.peak_reserved_bytes, phase.peak_reserved_at) == (40 * MIB, 60 * MIB, 7)
    assert result.stats.reserved == 20 * MIB


def test_a_second_replay_goes_on_where_the_first_ended() -> None:
    allocator = new_allocator(None, Device())
    replay([Alloc(1, 12 * MIB), Free(1)], allocator)
    result = replay([Alloc(1, 12 * MIB)], allocator)
    assert result.peak_reserved_bytes == 12 * MIB
    assert result.stats.num_device_alloc == 1


def test_waiting_for_another_stream() -> None:
    """12 are freed but held, so the second 12 need their own segment; the third 12 find the first, finished. A wait
    that an emptied cache has ended may be finished again."""
    events: list[Event] = [
        Alloc(1, 12 * MIB),
        RecordStream(1, 9),
        Free(1),
        Alloc(2, 12 * MIB),
        Finish(1),
        Alloc(3, 12 * MIB),
        RecordStream(3, 9),
        Free(3),
        EmptyCache(),
        Alloc(4, 12 * MIB),
        RecordStream(4, 9),
        Free(4),
        Finish(3),
    ]
    result = replay(events, new_allocator())
    assert result.peak_reserved_bytes == 24 * MIB
    assert result.stats.active == 24 * MIB  # block 4 still waits: finishing 3 has not finished it
    assert result.stats.allocated == 12 * MIB


# --- streams that make no sense ----------------------------------------------


@pytest.mark.parametrize(
    ("events", "says"),
    [
        ([Free(1)], "event 0 frees block 1, which is not allocated: unknown, or freed before"),
        (
            [Alloc(1, 5), Free(1), Free(1)],
            "event 2 frees block 1, which is not allocated: unknown, or freed before",
        ),
        ([Alloc(1, 5), Alloc(1, 5)], "event 1 allocates block 1, which is allocated already"),
        ([Alloc(1, -1)], "event 0 allocates -1 bytes; a size is a whole number from 0 to 2**60 - 1"),
        (
            [Alloc(1, 2**60)],
            f"event 0 allocates {2**60} bytes; a size is a whole number from 0 to 2**60 - 1",
        ),
        (
            [Alloc(1, 10**4000)],
            "event 0 allocates an integer of 13288 bits bytes; a size is a whole number from 0 to 2**60 - 1",
        ),
        ([Alloc(1, 1.5)], "event 0 allocates 1.5 bytes; a size is a whole number from 0 to 2**60 - 1"),
        ([Alloc(1, True)], "event 0 allocates true bytes; a size is a whole number from 0 to 2**60 - 1"),
        ([Finish(1)], "event 0 finishes block 1, which no stream holds after a free"),
        ([Alloc(1, 5), Free(1), Finish(1)], "event 2 finishes block 1, which no stream holds after a free"),
        (
            [RecordStream(3, 1)],
            "event 0 records a stream for block 3, which is not allocated: unknown, or freed before",
        ),
        (["alloc"], "event 0 is 'alloc', not an event of galore_mem.allocator.events"),
    ],
)
def test_a_stream_that_makes_no_sense_is_refused(events: list[Any], says: str) -> None:
    assert line(replay, events, new_allocator()) == says


EVENT = st.one_of(
    st.builds(Alloc, st.integers(0, 3), st.one_of(st.integers(-1, 2**61), JSON), st.integers(0, 2)),
    st.builds(Free, st.integers(0, 3)),
    st.builds(RecordStream, st.integers(0, 3), st.integers(0, 2)),
    st.builds(Finish, st.integers(0, 3)),
    st.builds(EmptyCache),
    st.builds(Mark, st.text(max_size=3)),
    JSON,
)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(st.lists(EVENT, max_size=8))
def test_any_stream_is_replayed_or_refused_in_one_line(events: list[Any]) -> None:
    allocator = new_allocator(None, Device(2**40))
    message = "replayed"
    try:
        replay(events, allocator)
    except InputError as error:
        message = str(error)
    assert is_one_line(message)
    check(allocator)


# --- speed -------------------------------------------------------------------


def rate(run: Callable[[], object], events: int) -> float:
    """Events per second of processor time, the best of five: other work on the machine does not count."""
    best = 0.0
    for _ in range(5):
        begin = time.process_time()
        run()
        best = max(best, events / (time.process_time() - begin))
    return best


def test_at_least_200_000_events_a_second() -> None:
    sizes = (2 * KIB, 12 * KIB, 100 * KIB, MIB, 3 * MIB, 8 * MIB, 11 * MIB, 33 * MIB)
    events = random_program(40_000, seed=1, sizes=sizes, streams=(0,), live=400)
    assert rate(lambda: replay(events, new_allocator()), len(events)) >= 200_000
