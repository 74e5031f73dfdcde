"""What a traced program allocated and freed, as data: no torch.

Events are in the order in which they happened. An event is the index of an allocation that is made, or the
complement (`~index`) of one that is freed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from galore_mem.memory.tape import Bytes
from galore_mem.memory.tensor import CATEGORIES, TEMPORARIES
from galore_mem.units import round_up

WORKSPACE = "cublas workspace"  # in the place of an operation


@dataclass(slots=True)
class Allocation:
    """A storage: its bytes as they were asked for, what it was, and where the program was when it was made.

    `name` is a parameter's or a state's, where it has one. `kernel`: a buffer that a kernel makes for itself, which
    no tensor shows (from a table, not from the trace).
    """

    nbytes: int
    op: str
    module: str
    phase: str
    category: int = TEMPORARIES
    name: str = ""
    shape: tuple[int, ...] = ()
    dtype: str = ""
    kernel: bool = False


class Mark(NamedTuple):
    """From event number `at` on, the program is in this phase."""

    at: int
    phase: str


class Moment(NamedTuple):
    """The highest moment of a phase: the event (its number) after which it is, and the live bytes by category, in the
    allocator's blocks."""

    at: int
    live: Bytes

    @property
    def total(self) -> int:
        return sum(self.live)


@dataclass(slots=True)
class Trace:
    """Allocations, events and phase marks; `granularity` is what an allocator rounds sizes up to (bytes). `emptied` are
    the numbers of events before which the program gives the allocator's cache back."""

    granularity: int = 1
    allocations: list[Allocation] = field(default_factory=list)
    events: list[int] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    emptied: list[int] = field(default_factory=list)

    def nbytes(self, index: int) -> int:
        """Bytes of an allocation in the allocator's blocks."""
        return round_up(self.allocations[index].nbytes, self.granularity)

    def moments(self, blocks: Mapping[int, int] | None = None) -> Iterator[tuple[int, str, list[int]]]:
        """(number of the event before, phase, live bytes by category) where each phase begins and after each event.
        The list is the same one, changed. `blocks`: the bytes that each allocation took, by its number."""
        live = [0] * len(CATEGORIES)
        phases = iter(self.marks)
        phase, upcoming = "", next(phases, None)
        for at, event in enumerate(self.events):
            while upcoming is not None and upcoming.at == at:
                phase, upcoming = upcoming.phase, next(phases, None)
                yield at - 1, phase, live
            index = max(event, ~event)
            size = self.nbytes(index) if blocks is None else blocks[index]
            live[self.allocations[index].category] += size if event >= 0 else -size
            yield at, phase, live

    def peaks(self, blocks: Mapping[int, int] | None = None) -> dict[str, Moment]:
        """The highest moment of each phase, the first of equal ones; a phase that is entered again has its highest of
        all."""
        found: dict[str, Moment] = {}
        highest: dict[str, int] = {}
        for at, phase, live in self.moments(blocks):
            total = sum(live)
            if phase and total > highest.get(phase, -1):
                highest[phase] = total
                found[phase] = Moment(at, (live[0], live[1], live[2], live[3], live[4]))
        return found

    def alive(self, at: int) -> list[int]:
        """The allocations that are live after event number `at`."""
        found: dict[int, None] = {}
        for event in self.events[: at + 1]:
            if event >= 0:
                found[event] = None
            else:
                del found[~event]
        return list(found)

    def residents(self) -> Mapping[int, int]:
        """Live bytes at the end, exact, by category."""
        found = dict.fromkeys(range(len(CATEGORIES)), 0)
        for index in self.alive(len(self.events)):
            found[self.allocations[index].category] += self.allocations[index].nbytes
        return found
