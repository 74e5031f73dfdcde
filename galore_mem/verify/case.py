"""What is verified, and what came out. No torch: the command line reads records without it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from galore_mem.errors import InputError, unknown
from galore_mem.setup import Setup, recipe

OPTIMIZER, TRAIN = "optimizer", "train"
WORKLOADS = (OPTIMIZER, TRAIN)
WARM, BETWEEN = "warm-up", "between"  # phases of a run that are not reported
DONE = ("ok", "mismatch")  # measured
BAD = ("mismatch", "oom", "failed")  # what makes the answer a no
STATUSES = ("ok", "mismatch", "oom", "unsupported", "failed")
RESIDENTS = ("weights_bytes", "gradients_bytes", "optimizer_state_bytes")
COUNTED, TOLD = ("reserved", "requested"), ("workspaces_bytes", "device_used_bytes")
NAMED = ("batch_size", "seq_len", "attention", "gradient_checkpointing", "layerwise", "gradient_accumulation", "device")
ALONE = ("layerwise",)  # those of them that the optimizer's steps alone depend on


@dataclass(frozen=True, slots=True)
class Case:
    """One model, trained with one implementation of one method, in one way.

    `model` is what `--model` takes. `workload` is `optimizer` (the parameters' shapes with random gradients, and the
    optimizer's steps) or `train` (the transformers model, forward to step). `options` are the setup's, by the names
    of the command line; `hyperparameters` the method's.
    """

    model: str
    method: str
    implementation: str
    workload: str = OPTIMIZER
    recipe: str = "fp32"
    options: Mapping[str, Any] = field(default_factory=dict)
    hyperparameters: Mapping[str, int | float | str] = field(default_factory=dict)
    targets: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.workload not in WORKLOADS:
            raise unknown("workload", self.workload, WORKLOADS)
        for name in self.options:
            if name not in NAMED:
                raise unknown("option", name, NAMED)

    def setup(self) -> Setup:
        """How the training is run. (Optimizer steps alone have no sequences, whose length a model could refuse.)"""
        without = {"seq_len": 1} if self.workload == OPTIMIZER else {}
        return Setup(recipe(self.recipe), **{**without, **self.options, "device": self.device})

    @property
    def device(self) -> str:
        return str(self.options.get("device", "cpu"))

    @property
    def key(self) -> str:
        """The case as one line: two cases are the same when their keys are."""
        return json.dumps(self.to_json(), sort_keys=True)

    def __str__(self) -> str:
        more = [f"{k}={v}" for k, v in {**self.options, **self.hyperparameters}.items() if k != "device"]
        return " ".join((self.model, self.method, self.implementation, self.workload, self.recipe, *more))

    def to_json(self) -> dict[str, Any]:
        found = asdict(self)
        found["targets"] = None if self.targets is None else list(self.targets)
        return found

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> Case:
        """The case that `to_json` wrote. Raises `InputError` for anything else."""
        known = {f.name for f in fields(cls)}
        if not isinstance(given, Mapping) or not {"model", "method", "implementation"} <= set(given) <= known:
            raise InputError("this is no case of galore-mem verify")
        targets = given.get("targets")
        return cls(**{**given, "targets": None if targets is None else tuple(targets)})


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes, predicted or measured: the tensors that stay, and the highest moment of each phase.

    Where the allocator tells: what of each phase was `requested`, without rounding; what it had `reserved` of the
    device; `workspaces_bytes` that libraries keep in it (cuBLAS), which `phases` and `requested` are without; and
    `device_used_bytes`, what the driver says was taken of the device since before the first tensor, at most.
    """

    weights_bytes: int
    gradients_bytes: int
    optimizer_state_bytes: int
    phases: Mapping[str, int]
    reserved: Mapping[str, int] = field(default_factory=dict)
    requested: Mapping[str, int] = field(default_factory=dict)
    workspaces_bytes: int | None = None
    device_used_bytes: int | None = None

    @property
    def peak_allocated_bytes(self) -> int:
        return max(self.phases.values(), default=0)

    def to_json(self) -> dict[str, Any]:
        return {
            **{name: getattr(self, name) for name in RESIDENTS},
            "peak_allocated_bytes": self.peak_allocated_bytes,
            "phases": dict(self.phases),
            **{name: dict(getattr(self, name)) for name in COUNTED if getattr(self, name)},
            **{name: getattr(self, name) for name in TOLD if getattr(self, name) is not None},
        }

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> Sizes:
        """What `to_json` wrote, by this release or one before."""
        stays = {name: given[name] for name in (*RESIDENTS, "phases")}
        return cls(**stays, **{name: given[name] for name in (*COUNTED, *TOLD) if name in given})


@dataclass(frozen=True, slots=True)
class BufferPair:
    """A tensor that the ledger names, or that was found, or both: its bytes here and there (None: not there)."""

    param: str
    buffer: str
    shape: tuple[int, ...]
    dtype: str
    predicted_bytes: int | None
    measured_bytes: int | None

    @property
    def equal(self) -> bool:
        return self.predicted_bytes == self.measured_bytes


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came out of one case. `detail` says why where the status is not `ok`, and of phases in `not_compared`, which
    are measured and have no prediction, why not."""

    case: Case
    status: str
    detail: str = ""
    predicted: Sizes | None = None
    measured: Sizes | None = None
    buffers: tuple[BufferPair, ...] = ()
    environment: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    not_compared: tuple[str, ...] = ()

    def rel_error(self) -> dict[str, Any]:
        """(predicted - measured) / measured, per resident, phase that has a prediction, and the highest of these; None
        where nothing was measured."""
        if self.predicted is None or self.measured is None:
            return {}
        p, m = self.predicted, self.measured
        both = [name for name in m.phases if name in p.phases]
        highest = (max((phases[name] for name in both), default=0) for phases in (p.phases, m.phases))
        return {
            **{name: relative(getattr(p, name), getattr(m, name)) for name in RESIDENTS},
            "peak_allocated_bytes": relative(*highest),
            "phases": {name: relative(p.phases[name], m.phases[name]) for name in both},
        }

    def to_json(self, *, buffers: bool = True) -> dict[str, Any]:
        shown = {**self.case.to_json(), "status": self.status, "detail": self.detail}
        if self.predicted is not None:
            shown["predicted"] = self.predicted.to_json()
        if self.measured is not None:
            shown["measured"] = self.measured.to_json()
            shown["rel_error"] = self.rel_error()
        if buffers:
            shown["buffers"] = [asdict(b) for b in self.buffers]
        if self.not_compared:
            shown["not_compared"] = list(self.not_compared)
        return {**shown, "seconds": round(self.seconds, 3)}


def relative(predicted: int, measured: int) -> float | None:
    """The signed error of a prediction; None where nothing was measured but something predicted."""
    if predicted == measured:
        return 0.0
    return (predicted - measured) / measured if measured else None
