"""What `simulate` returns: an estimate's numbers, found by running, and what only a run can tell. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from galore_mem.memory.tape import CATEGORIES, Bytes
from galore_mem.result import Estimate, EstimateResult, Phase

if TYPE_CHECKING:
    from galore_mem.simulate.device import Run

SIMULATE_SCHEMA = "galore-mem.simulate/1"
LOAD, FIRST = "load", "first-step"  # the model on the device; the step that makes the optimizer's state
# of a setup, what module:function decides itself
DECIDED = ("batch_size", "seq_len", "attention", "gradient_checkpointing", "loss")
SIMULATED_PHASES = (LOAD, FIRST, "forward", "backward", "step", "refresh")


class Place(NamedTuple):
    """Where a program is: its phase, the module that runs or whose backward function does, and the operation."""

    phase: str
    module: str
    operation: str

    def to_json(self) -> dict[str, Any]:
        return self._asdict()


class Live(NamedTuple):
    """Allocations that are alike but for the number of their layer ({i} in the names), and live at the same time.

    `nbytes` are those of all of them together, in the allocator's blocks; `place` is where they were made. `name` is
    a parameter's, a state's (`parameter:state`), or empty.
    """

    category: str
    name: str
    place: Place
    shape: tuple[int, ...]
    dtype: str
    repeat: int
    nbytes: int

    def to_json(self) -> dict[str, Any]:
        return {
            "category": self.category,
            "name": self.name,
            **self.place.to_json(),
            "shape": list(self.shape),
            "dtype": self.dtype,
            "count": self.repeat,
            "bytes": self.nbytes,
        }


class Peak(NamedTuple):
    """The highest moment of the run: the allocation that made it, and everything that lives then, largest first."""

    place: Place
    live: tuple[Live, ...]

    def to_json(self) -> dict[str, Any]:
        return {**self.place.to_json(), "live": [one.to_json() for one in self.live]}


class Refusal(NamedTuple):
    """The request that a device of this capacity could not serve. Bytes; `tried` is the segment that it was asked
    for, which torch's message calls "tried to allocate"."""

    place: Place
    requested: int
    tried: int
    allocated: int
    reserved: int
    free: int
    message: str

    def to_json(self) -> dict[str, Any]:
        return {
            **self.place.to_json(),
            "requested_bytes": self.requested,
            "tried_bytes": self.tried,
            "allocated_bytes": self.allocated,
            "reserved_bytes": self.reserved,
            "free_bytes": self.free,
            "message": self.message,
        }


class Timeline(NamedTuple):
    """The run drawn with few points: each is the highest moment of a stretch of events.

    `at` is the number of an event, `live` the bytes by category after it, `reserved` the most that was reserved in the
    stretch (None: not known). `phases` begin at the events numbered.
    """

    events: int
    phases: tuple[tuple[int, str], ...]
    at: tuple[int, ...]
    live: tuple[Bytes, ...]
    reserved: tuple[int, ...] | None
    refused_at: int | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "events": self.events,
            "phases": [{"at": at, "name": name} for at, name in self.phases],
            "at": list(self.at),
            **{name: [live[i] for live in self.live] for i, name in enumerate(CATEGORIES)},
            "reserved_bytes": None if self.reserved is None else list(self.reserved),
            "out_of_memory_at": self.refused_at,
        }


@dataclass(frozen=True, slots=True)
class Simulation(Estimate):
    """One simulated run. With a card that is too small, the phases are those on one that is not.

    `retries`: how often the allocator had to give cached memory back before a request could be served (None: not on
    CUDA). `layers_traced`: of the models that ran; if it is not the model's own number, its trace follows from theirs.
    `run` is the run itself, where it was asked for.
    """

    at_peak: Peak | None = None
    refusal: Refusal | None = None
    retries: int | None = None
    events: int = 0
    layers_traced: tuple[int, ...] = ()
    timeline: Timeline | None = None
    run: Run | None = field(default=None, repr=False, compare=False)

    @property
    def peak(self) -> Phase:
        """The phase with the highest moment; of equal ones the first that belongs to every step."""
        return max(self.phases, key=lambda phase: (phase.allocated_bytes, phase.name != FIRST))

    @property
    def fragmentation_bytes(self) -> int | None:
        """What the allocator reserves beyond the highest moment of what it hands out."""
        return None if self.peak_reserved_bytes is None else self.peak_reserved_bytes - self.peak_allocated_bytes

    def to_json(self, tensors: bool = False) -> dict[str, Any]:
        """`tensors` is an estimate's: here everything that lives at the peak is listed anyway."""
        found = Estimate.to_json(self)
        found |= {
            "fragmentation_bytes": self.fragmentation_bytes,
            "retries": self.retries,
            "events": self.events,
            "layers_traced": list(self.layers_traced),
            "out_of_memory": None if self.refusal is None else self.refusal.to_json(),
            "at_peak": None if self.at_peak is None else self.at_peak.to_json(),
        }
        if self.timeline is not None:
            found["timeline"] = self.timeline.to_json()
        return found


@dataclass(frozen=True, slots=True)
class SimulateResult(EstimateResult):
    """What `simulate` answers for one model and setup, method by method."""

    estimates: tuple[Simulation, ...]

    def to_json(self, tensors: bool = False) -> dict[str, Any]:
        return {**EstimateResult.to_json(self), "schema": SIMULATE_SCHEMA}
