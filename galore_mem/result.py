"""What the services return: plain data, with the JSON that scripts rely on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from galore_mem.evidence import Confidence, Reserve
from galore_mem.ledger import Entry
from galore_mem.memory.kept import KeptTensor
from galore_mem.memory.tape import CATEGORIES, Bytes

ESTIMATE_SCHEMA = "galore-mem.estimate/1"


class Phase(NamedTuple):
    """The highest moment of one phase; the components sum to `allocated_bytes`.

    `per_layer` is what one more layer would add to each component, where it is known. Where the allocator is followed
    more is: the most that the allocator had `reserved`, and what of the components is `slack`, room in its blocks that
    no tensor uses.
    """

    name: str
    components: Bytes
    per_layer: Bytes | None = None
    reserved_bytes: int | None = None
    slack_bytes: int | None = None

    @property
    def allocated_bytes(self) -> int:
        return sum(self.components)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "allocated_bytes": self.allocated_bytes,
            "components": dict(zip(CATEGORIES, self.components, strict=True)),
            "reserved_bytes": self.reserved_bytes,
            "slack_bytes": self.slack_bytes,
        }


class Fit(NamedTuple):
    """Does it fit the card? `fits`: there is room for what is, or usually would be, reserved at the upper end of the
    band; `does_not_fit`: there is none even for the tensors at its lower end; `tight`: between. `headroom_bytes` is
    what the predicted need leaves."""

    gpu: str
    capacity_bytes: int
    headroom_bytes: int
    verdict: str

    def to_json(self) -> dict[str, Any]:
        return {
            "gpu": self.gpu,
            "capacity_bytes": self.capacity_bytes,
            "headroom_bytes": self.headroom_bytes,
            "verdict": self.verdict,
        }


@dataclass(frozen=True, slots=True)
class Estimate:
    """One method under one implementation (or the paper's counting).

    `weights_bytes` (parameters), `gradients_bytes` and `optimizer_state_bytes` are exact sums of the tensors, at their
    fullest; `buffers_bytes` are those that the model registers beside its parameters, which phases count among the
    weights (None: not told apart). Phases are in allocator blocks (on CUDA each tensor is rounded up to 512 bytes).
    `kept` is what one layer keeps for backward, filled where an explanation was asked for. `confidence` is the evidence
    behind the peak (None: a paper's counting); `reserve` what allocators were seen to hold beyond a peak, where none is
    followed.
    """

    method: str
    implementation: str
    convention: str
    hyperparameters: Mapping[str, int | float | str]
    layerwise: bool
    weights_bytes: int
    gradients_bytes: int
    optimizer_state_bytes: int
    phases: tuple[Phase, ...]
    outside_allocator_bytes: int
    fits: Fit | None
    assumptions: tuple[str, ...]
    not_counted: tuple[str, ...]
    equations: Mapping[str, str] = field(default_factory=dict)
    entries: tuple[Entry, ...] = ()
    kept: tuple[KeptTensor, ...] = ()
    peak_reserved_bytes: int | None = None
    confidence: Confidence | None = None
    reserve: Reserve | None = None
    buffers_bytes: int | None = None

    @property
    def peak(self) -> Phase:
        """The phase with the highest moment (the first of them, if several are equal)."""
        return max(self.phases, key=lambda phase: phase.allocated_bytes)

    @property
    def peak_allocated_bytes(self) -> int:
        return self.peak.allocated_bytes

    @property
    def device_bytes(self) -> int:
        """What the device must provide: the allocator's peak (reserved where known) and what lies outside it."""
        inside = self.peak_allocated_bytes if self.peak_reserved_bytes is None else self.peak_reserved_bytes
        return inside + self.outside_allocator_bytes

    def to_json(self, tensors: bool = False) -> dict[str, Any]:
        found: dict[str, Any] = {
            "method": self.method,
            "implementation": self.implementation,
            "convention": self.convention,
            "hyperparameters": dict(self.hyperparameters),
            "layerwise": self.layerwise,
            "weights_bytes": self.weights_bytes,
            "gradients_bytes": self.gradients_bytes,
            "optimizer_state_bytes": self.optimizer_state_bytes,
            "buffers_bytes": self.buffers_bytes,
            "phases": [phase.to_json() for phase in self.phases],
            "peak_phase": self.peak.name,
            "peak_allocated_bytes": self.peak_allocated_bytes,
            "peak_reserved_bytes": self.peak_reserved_bytes,
            "outside_allocator_bytes": self.outside_allocator_bytes,
            "device_bytes": self.device_bytes,
            "confidence": None if self.confidence is None else self.confidence.to_json(self.peak_allocated_bytes),
            "reserved_by_rule": None if self.reserve is None else self.reserve.to_json(self.peak_allocated_bytes),
            "fits": None if self.fits is None else self.fits.to_json(),
            "assumptions": list(self.assumptions),
            "not_counted": list(self.not_counted),
        }
        if tensors:
            found["tensors"] = [entry_json(e) for e in self.entries]
        if self.kept:
            found["kept_by_layer"] = [kept_json(k) for k in self.kept]
        return found


def entry_json(entry: Entry) -> dict[str, Any]:
    return {
        "kind": entry.kind,
        "param": entry.param,
        "buffer": entry.buffer,
        "shape": list(entry.shape),
        "dtype": entry.dtype.name,
        "bytes": entry.nbytes,
        "count": entry.repeat,
        "host": entry.host,
    }


def kept_json(kept: KeptTensor) -> dict[str, Any]:
    return {
        "operations": list(kept.operations),
        "shape": list(kept.shape),
        "dtype": kept.dtype.name,
        "bytes": kept.nbytes,
        "shared": kept.shared,
    }


class Unsupported(NamedTuple):
    """A method that cannot handle the model or the setup, and why."""

    method: str
    implementation: str
    reason: str

    def to_json(self) -> dict[str, Any]:
        return {"method": self.method, "implementation": self.implementation, "reason": self.reason}


@dataclass(frozen=True, slots=True)
class EstimateResult:
    """What `estimate` answers for one model and setup, method by method."""

    version: str
    model: Mapping[str, Any]
    setup: Mapping[str, Any]
    estimates: tuple[Estimate, ...]
    unsupported: tuple[Unsupported, ...] = ()

    @property
    def none_fits(self) -> bool:
        """Was a card asked about, and does no method fit it?"""
        verdicts = [e.fits.verdict for e in self.estimates if e.fits is not None]
        return bool(verdicts) and all(verdict == "does_not_fit" for verdict in verdicts)

    def to_json(self, tensors: bool = False) -> dict[str, Any]:
        return {
            "schema": ESTIMATE_SCHEMA,
            "version": self.version,
            "model": dict(self.model),
            "setup": dict(self.setup),
            "estimates": [e.to_json(tensors) for e in self.estimates],
            "unsupported": [u.to_json() for u in self.unsupported],
        }
