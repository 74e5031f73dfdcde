"""What is compared in an outcome of `verify`, and how far off it is: quantities, and statistics over all phases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from types import MappingProxyType
from typing import Any, NamedTuple

from galore_mem.memory.phases import PHASES
from galore_mem.methods.registry import METHODS
from galore_mem.units import ceil_div, format_bytes
from galore_mem.verify.case import (
    COUNTED,
    RESIDENTS,
    STATUSES,
    TOLD,
    TRAIN,
    WORKLOADS,
    Case,
    Outcome,
    Sizes,
    relative,
)


class Quantity(NamedTuple):
    """A component that stays or a phase's peak, in bytes (None: not predicted, or not measured). `beside` has what
    else an accelerator's meter told of the phase, by the names in `COUNTED`."""

    name: str
    predicted: int | None
    measured: int | None
    beside: Mapping[str, int] = MappingProxyType({})

    @property
    def error(self) -> int | None:
        """Bytes that the prediction is too high by."""
        return None if self.predicted is None or self.measured is None else self.predicted - self.measured

    @property
    def rel_error(self) -> float | None:
        """The same as a part of what was measured."""
        return None if self.predicted is None or self.measured is None else relative(self.predicted, self.measured)


class Off(NamedTuple):
    """A phase of a case whose prediction is off."""

    outcome: Outcome
    phase: Quantity


def residents(o: Outcome) -> Iterator[Quantity]:
    """Weights, gradients, optimizer state."""
    for name in RESIDENTS:
        yield Quantity(name.removesuffix("_bytes"), _of(o.predicted, name), _of(o.measured, name))


def _of(sizes: Sizes | None, name: str) -> int | None:
    found: int | None = None if sizes is None else getattr(sizes, name)
    return found


def phases(o: Outcome) -> Iterator[Quantity]:
    """Every phase that was predicted or measured, in the order of a step."""
    predicted = {} if o.predicted is None else o.predicted.phases
    measured = {} if o.measured is None else o.measured.phases
    counted = {} if o.measured is None else {what: getattr(o.measured, what) for what in COUNTED}
    named = [*PHASES, *sorted({*predicted, *measured} - {*PHASES})]
    for name in named:
        if name in predicted or name in measured:
            beside = {what: found[name] for what, found in counted.items() if name in found}
            yield Quantity(name, predicted.get(name), measured.get(name), beside)


def quantities(o: Outcome) -> Iterator[Quantity]:
    """All that is compared: what stays, each phase's peak, the highest of them; and what else a meter told."""
    if o.predicted is None and o.measured is None:
        return
    yield from residents(o)
    yield from phases(o)
    if highest := peak(o):
        yield highest
    for name in TOLD:
        if (told := _of(o.measured, name)) is not None:
            yield Quantity(name.removesuffix("_bytes"), None, told)


def peak(o: Outcome) -> Quantity | None:
    """The highest of the phases' peaks: of those that are compared, where there are both sides."""
    found = [*phases(o)]
    if not found:
        return None
    name = "peak_allocated_bytes"
    beside = {
        what: max(q.beside.get(what, 0) for q in found) for what in COUNTED if any(what in q.beside for q in found)
    }
    both = [q for q in found if q.predicted is not None and q.measured is not None]
    if o.predicted is None or o.measured is None:
        return Quantity("peak", _of(o.predicted, name), _of(o.measured, name), beside)
    if not both:
        return None
    return Quantity("peak", max(q.predicted or 0 for q in both), max(q.measured or 0 for q in both), beside)


def worst_phase(o: Outcome) -> Quantity | None:
    """The phase whose prediction is furthest off (of equal ones, the first)."""
    compared = [q for q in phases(o) if q.rel_error is not None]
    return max(compared, key=lambda q: abs(q.rel_error or 0.0), default=None)


def worst(outcomes: Sequence[Outcome]) -> Off | None:
    """The phase, of all cases, whose prediction is furthest off."""
    found = [Off(o, q) for o in outcomes if (q := worst_phase(o)) is not None]
    return max(found, key=lambda off: abs(off.phase.rel_error or 0.0), default=None)


def place(o: Outcome) -> tuple[int | str, ...]:
    """Where a case stands among others: workload, model, way of running, then the registry's order."""
    case, last = o.case, len(METHODS)
    known = METHODS.get(case.method)
    codes = [] if known is None else [c.name for c in known.implementations]
    return (
        WORKLOADS.index(case.workload), case.model, case.recipe, str(case.setup().gradient_checkpointing), way(case),
        [*METHODS].index(case.method) if known else last,
        codes.index(case.implementation) if case.implementation in codes else last, hyper(case),
    )  # fmt: skip


# -- all cases ---------------------------------------------------------------------------------------


def errors(outcomes: Sequence[Outcome]) -> list[float]:
    """The absolute relative errors of all measured phases, ascending."""
    return sorted(abs(e) for o in outcomes for q in phases(o) if (e := q.rel_error) is not None)


def percentile(ascending: Sequence[float], percent: int) -> float | None:
    """The smallest value that so many percent of all are not above (nearest rank)."""
    return ascending[ceil_div(percent * len(ascending), 100) - 1] if ascending else None


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Counts by status and of what was compared, and the errors of phases (absolute; `worst` is signed)."""
    found, off = errors(outcomes), worst(outcomes)
    pairs = [b for o in outcomes for b in o.buffers]
    return {
        "cases": len(outcomes),
        **{status: sum(o.status == status for o in outcomes) for status in STATUSES},
        "buffers_compared": len(pairs),
        "buffers_different": sum(not b.equal for b in pairs),
        "phases_compared": len(found),
        "worst_rel_error": max(found, default=None),
        "p95_rel_error": percentile(found, 95),
        "median_rel_error": median(found) if found else None,
        "worst": None
        if off is None
        else {
            "model": off.outcome.case.model,
            "method": off.outcome.case.method,
            "implementation": off.outcome.case.implementation,
            "workload": off.outcome.case.workload,
            "phase": off.phase.name,
            "rel_error": off.phase.rel_error,
        },
    }


# -- text --------------------------------------------------------------------------------------------


def size(n: int | None) -> str:
    return "" if n is None else format_bytes(n)


def signed(n: int | None) -> str:
    """A difference in bytes: `-12 B`, `+1.50 MiB`, `0`."""
    if n is None:
        return ""
    return "0" if n == 0 else f"{'+' if n > 0 else '-'}{format_bytes(abs(n))}"


def percent(e: float | None) -> str:
    """A signed part: `-0.001%`, `0` where there is no difference at all."""
    if e is None:
        return ""
    return "0" if e == 0 else f"{e:+.3%}"


def way(case: Case) -> str:
    """How the case is run: model, workload, recipe and whatever else is not the default."""
    setup, train = case.setup(), case.workload == TRAIN
    parts = [
        case.model,
        "training steps" if train else "optimizer steps",
        setup.recipe.name,
        f"batch {setup.batch_size} x {setup.seq_len}" if train else "",
        "" if setup.attention == "sdpa" else f"{setup.attention} attention",
        "checkpointing" if setup.gradient_checkpointing else "",
        "layer-wise" if setup.layerwise else "",
        "" if setup.gradient_accumulation == 1 else f"accumulating {setup.gradient_accumulation}",
        "" if case.targets is None else f"only {'+'.join(case.targets)}",
        setup.device,
    ]
    return ", ".join(part for part in parts if part)


def hyper(case: Case, names: Sequence[str] | None = None) -> str:
    """The hyperparameters (of these names): `rank 64`."""
    return ", ".join(f"{k} {v}" for k, v in case.hyperparameters.items() if names is None or k in names)


def code(case: Case) -> str:
    return f"{case.method} ({case.implementation})"
