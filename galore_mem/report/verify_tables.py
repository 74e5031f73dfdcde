"""The tables of `verify`: one line a case for many cases, a block a case for few, every tensor on request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from galore_mem.report.tables import Column, Table
from galore_mem.report.verify_rows import (
    Quantity,
    code,
    hyper,
    peak,
    percent,
    quantities,
    residents,
    signed,
    size,
    summary,
    way,
    worst,
    worst_phase,
)
from galore_mem.units import format_bytes
from galore_mem.verify.case import BAD, COUNTED, STATUSES, Outcome
from galore_mem.verify.paper import paper_state

COLORS = {"ok": "green", **dict.fromkeys(BAD, "bold red")}
LEGEND = (
    "stays: weights, gradients and optimizer state, each of them, or the one that differs most; peak: the highest "
    "phase, measured; worst: the phase whose peak is predicted worst; error: predicted minus measured."
)


# -- many cases: one line each -----------------------------------------------------------------------


def overviews(outcomes: Sequence[Outcome]) -> Iterator[Table]:
    """A table for each way of running (model, workload, setup), a line for each case of it that could run."""
    by_way: dict[str, list[Outcome]] = {}
    for o in outcomes:
        if o.status != "unsupported":
            by_way.setdefault(way(o.case), []).append(o)
    for heading, found in by_way.items():
        yield _overview(heading, found)


def _overview(heading: str, outcomes: Sequence[Outcome]) -> Table:
    common, varying = _hyperparameters(outcomes)
    columns = [
        Column("", colors=COLORS), Column("method"), Column("implementation"),
        *([Column("with")] if varying else []), Column("stays", drop=4), Column("peak", right=True, drop=1),
        Column("predicted", right=True, drop=5), Column("worst"), Column("error", right=True, drop=6),
        Column("off", right=True),
    ]  # fmt: skip
    rows = []
    for o in outcomes:
        off = worst_phase(o)
        highest = peak(o) or Quantity("", None, None)
        rows.append((
            o.status, o.case.method, o.case.implementation + ("*" if o.status == "ok" and o.detail else ""),
            *([hyper(o.case, varying)] if varying else []), _stays(o), size(highest.measured), size(highest.predicted),
            *(("", "", "") if off is None else (off.name, signed(off.error), percent(off.rel_error))),
        ))  # fmt: skip
    title = ", ".join(part for part in (heading, common) if part)
    title = f"{title}: {len(outcomes)} case{'s' * (len(outcomes) != 1)}"
    return Table(title, tuple(columns), tuple(rows), warnings=tuple(wrong(outcomes)))


def _hyperparameters(outcomes: Sequence[Outcome]) -> tuple[str, tuple[str, ...]]:
    """Those that all cases which have them share, as text; the names of the others."""
    values: dict[str, set[int | float | str]] = {}
    for o in outcomes:
        for name, value in o.case.hyperparameters.items():
            values.setdefault(name, set()).add(value)
    common = ", ".join(f"{name} {next(iter(found))}" for name, found in values.items() if len(found) == 1)
    return common, tuple(name for name, found in values.items() if len(found) > 1)


def _stays(o: Outcome) -> str:
    """`exact`, or the component that is furthest off."""
    compared = [q for q in residents(o) if q.error is not None]
    if not compared:
        return ""
    furthest = max(compared, key=lambda q: abs(q.error or 0))
    return f"{furthest.name.removeprefix('optimizer_')} {signed(furthest.error)}" if furthest.error else "exact"


# -- few cases: a block each -------------------------------------------------------------------------


def block(o: Outcome) -> Table:
    """Predicted, measured and the error of each component that stays and of each phase's peak."""
    found = [*quantities(o)]
    beside = [name for name in COUNTED if any(name in q.beside for q in found)]
    columns = (
        Column(""), Column("predicted", right=True), Column("measured", right=True), Column("error", right=True),
        Column("off", right=True), *(Column(name, right=True, drop=1 + i) for i, name in enumerate(beside)),
    ) if found else ()  # fmt: skip
    rows = tuple(
        (q.name.replace("_", " "), size(q.predicted), size(q.measured), signed(q.error), percent(q.rel_error),
         *(size(q.beside.get(name)) for name in beside))
        for q in found
    )  # fmt: skip
    title = f"{o.status}: {code(o.case)}: {', '.join(part for part in (way(o.case), hyper(o.case)) if part)}"
    return Table(title, columns, rows, tuple(_beside(o)), tuple(wrong([o])))


def _beside(o: Outcome) -> Iterator[str]:
    """Remarks, buffers, and the paper's counting."""
    if o.status == "ok" and o.detail:
        yield o.detail
    if o.buffers:
        different = sum(not b.equal for b in o.buffers)
        yield f"{len(o.buffers):,} tensors of state compared, {different:,} differ"
    counted, held = paper_state(o.case), o.measured
    if counted is not None and held is not None:
        equations = "; ".join(f"{where} {formula}" for where, formula in counted.equations.items())
        yield (
            f"the paper counts {format_bytes(counted.nbytes)} of optimizer state"
            f"{f' (elements: {equations})' if equations else ''}; "
            f"{signed(held.optimizer_state_bytes - counted.nbytes)} here"
        )


def tensors(o: Outcome) -> Table:
    """Every tensor of the optimizer's state."""
    columns = (
        Column("parameter"), Column("buffer"), Column("shape", drop=1), Column("dtype", drop=2),
        Column("predicted", right=True), Column("measured", right=True), Column("error", right=True),
    )  # fmt: skip
    rows = []
    for b in o.buffers:
        q = Quantity(b.buffer, b.predicted_bytes, b.measured_bytes)
        error = f"{q.error:+,}" if q.error else "0" if q.error == 0 else "missing" if q.measured is None else "more"
        shape = " x ".join(map(str, b.shape)) or "scalar"
        bytes_ = ("" if n is None else f"{n:,}" for n in (q.predicted, q.measured))
        rows.append((b.param, b.buffer, shape, b.dtype, *bytes_, error))
    return Table(f"{code(o.case)}: bytes of the optimizer's tensors", columns, tuple(rows))


# -- what follows the tables -------------------------------------------------------------------------


def wrong(outcomes: Sequence[Outcome], *, where: bool = False) -> Iterator[str]:
    """Why a case is not as predicted, or has no result; with how it was run where no heading says so."""
    for o in outcomes:
        if o.status in BAD:
            yield f"{o.status}: {code(o.case)}{f', {way(o.case)}' if where else ''}: {o.detail}"


def reasons(outcomes: Sequence[Outcome], *, remarks: bool = True) -> Iterator[str]:
    """The cases that could not run here, by reason; remarks on those that did, by remark."""
    yield from _by_detail("unsupported: ", [o for o in outcomes if o.status == "unsupported"])
    if remarks:
        yield from _by_detail("* ", [o for o in outcomes if o.status == "ok" and o.detail])


def _by_detail(mark: str, outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Each detail, and below it the methods that it is told of with the number of their cases."""
    found: dict[str, dict[str, int]] = {}
    for o in outcomes:
        counts = found.setdefault(o.detail, {})
        counts[code(o.case)] = counts.get(code(o.case), 0) + 1
    for detail, counts in found.items():
        yield mark + detail
        yield "    " + ", ".join(name if n == 1 else f"{name} x {n}" for name, n in counts.items())


def closing(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Counts by status, what was compared, and how far off phases are."""
    found, off = summary(outcomes), worst(outcomes)
    counts = ", ".join(f"{found[status]} {status}" for status in STATUSES if found[status])
    yield f"{len(outcomes)} case{'s' * (len(outcomes) != 1)}{': ' * bool(counts)}{counts}"
    if found["buffers_compared"]:
        yield f"{found['buffers_compared']:,} tensors of state compared, {found['buffers_different']:,} differ"
    if off is not None:
        where = f"{off.phase.name} of {code(off.outcome.case)}, {way(off.outcome.case)}"
        yield (
            f"{found['phases_compared']:,} peaks compared, error: median {found['median_rel_error']:.3%}, 95th "
            f"percentile {found['p95_rel_error']:.3%}, worst {percent(off.phase.rel_error)}:"
        )
        yield f"    {signed(off.phase.error)} in the {where}"
