"""A recording cut at what the program asked for, with what the allocator did in between."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from galore_mem.allocator.snapshot import DeviceRecording, TraceEvent
from galore_mem.allocator.start import StartState

TAKES = frozenset({"segment_alloc", "segment_map"})
GIVES = frozenset({"segment_free", "segment_unmap"})
SEGMENT_EVENTS = TAKES | GIVES


class Step(NamedTuple):
    """An event that a program caused, and what the allocator did since the one before."""

    at: int
    event: TraceEvent
    delayed: bool  # a free whose completion comes later
    finished: list[int]  # addresses of held blocks that became free
    before: list[TraceEvent]  # segment events

    @property
    def gives(self) -> bool:
        """Did memory go back to the device?"""
        return any(e.action in GIVES for e in self.before)

    @property
    def starved(self) -> bool:
        """Is it a request that may have found no memory at first?"""
        return self.event.action == "oom" or (self.event.action == "alloc" and self.gives)


def steps(events: list[TraceEvent]) -> Iterator[Step]:
    """The recording cut at what the program asked for; a last step has no event of its own (action `end`)."""
    before: list[TraceEvent] = []
    finished: list[int] = []
    skip = -1
    for i, event in enumerate(events):
        if event.action in SEGMENT_EVENTS:
            before.append(event)
        elif event.action == "free_completed":
            if i != skip:
                finished.append(event.address)
        elif event.action != "snapshot":
            delayed = False
            if event.action == "free_requested":
                after = events[i + 1] if i + 1 < len(events) else None
                delayed = after is None or after.action != "free_completed" or after.address != event.address
                skip = -1 if delayed else i + 1
            yield Step(i, event, delayed, finished, before)
            before, finished = [], []
    yield Step(len(events), TraceEvent("end", 0, 0, 0), False, finished, before)


def reserved_bytes(recording: DeviceRecording, start: StartState) -> Iterator[int]:
    """Recorded bytes from the device: at the start, then after each event."""
    reserved = sum(s.size for s in start.segments)
    yield reserved
    for event in recording.events:
        if event.action in SEGMENT_EVENTS:
            reserved += event.size if event.action in TAKES else -event.size
        yield reserved
