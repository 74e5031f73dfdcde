"""A run explained: what lives at its highest moment, by module and operation, layers together; its timeline."""

from __future__ import annotations

from bisect import bisect_right

from galore_mem.memory.tape import Bytes
from galore_mem.memory.tensor import CATEGORIES
from galore_mem.simulate.device import Run
from galore_mem.simulate.repeat import LAYER
from galore_mem.simulate.result import Live, Peak, Place, Timeline
from galore_mem.simulate.trace import Trace

POINTS = 1200  # of a timeline


def layered(name: str) -> str:
    """A name with {i} for the number of a layer or an expert."""
    return LAYER.sub("{i}", name)


def phase_at(trace: Trace, at: int) -> str:
    """The phase of an event."""
    found = bisect_right(trace.marks, at, key=lambda mark: mark.at)
    return trace.marks[found - 1].phase if found else ""


def place_of(trace: Trace, at: int) -> Place:
    """Where the program is at an event."""
    event = trace.events[at]
    one = trace.allocations[max(event, ~event)]
    return Place(phase_at(trace, at), one.module, one.op)


def peak(run: Run, at: int, phase: str) -> Peak:
    """What lives after event number `at`, the highest moment of the phase."""
    trace = run.trace
    while at > 0 and trace.events[at] < 0:  # the phase begins at its highest: what was made last before
        at -= 1
    made = place_of(trace, at)._replace(phase=phase)
    return Peak(made, alive(run, at))


def alive(run: Run, at: int) -> tuple[Live, ...]:
    """What lives after event number `at`, the largest first; allocations that differ in layer numbers are one row."""
    trace = run.trace
    born = {event: number for number, event in enumerate(trace.events[: at + 1]) if event >= 0}
    found: dict[tuple[object, ...], list[int]] = {}
    for i in trace.alive(at):
        one = trace.allocations[i]
        phase = phase_at(trace, born[i])
        key = (one.category, layered(one.name), phase, layered(one.module), one.op, one.shape, one.dtype, one.kernel)
        found.setdefault(key, []).append(i)
    rows = []
    for group in found.values():
        one = trace.allocations[group[0]]
        shown = layered if len(group) > 1 else str  # one of a kind has its own number
        place = Place(phase_at(trace, born[group[0]]), shown(one.module), one.op)
        size = sum(run.blocks[i] for i in group)
        rows.append(Live(CATEGORIES[one.category], shown(one.name), place, one.shape, one.dtype, len(group), size))
    return tuple(sorted(rows, key=lambda row: -row.nbytes))


def timeline(run: Run, points: int = POINTS, refused: int | None = None) -> Timeline:
    """The run in `points` stretches of events (or one for each event, if they are fewer)."""
    events = len(run.trace.events)
    count = min(points, events)
    highest: dict[int, tuple[int, Bytes]] = {}
    most = [0] * count
    for at, _, live in run.moments():
        stretch = max(at, 0) * count // events
        if stretch not in highest or sum(live) > sum(highest[stretch][1]):
            highest[stretch] = at, (live[0], live[1], live[2], live[3], live[4])
        if run.reserved is not None:
            most[stretch] = max(most[stretch], run.reserved[max(at, 0)])
    return Timeline(
        events, tuple((mark.at, mark.phase) for mark in run.trace.marks),
        tuple(max(at, 0) for at, _ in highest.values()), tuple(live for _, live in highest.values()),
        tuple(most) if run.reserved is not None else None, refused,
    )  # fmt: skip
