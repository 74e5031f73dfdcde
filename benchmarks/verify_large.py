"""Runs of large models: GaLore-mini's saving on the projected linears and on the whole model, and phases' peaks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from verify_facts import text

from galore_mem.papers import recompute
from galore_mem.report.tables import Column, Table, to_markdown
from galore_mem.report.verify_rows import hyper, percent, phases, residents, signed, size, way
from galore_mem.report.verify_tables import wrong
from galore_mem.spec.model import is_target
from galore_mem.verify.case import Case, Outcome
from galore_mem.verify.matrix import model_of
from galore_mem.verify.paper import paper_state

MINI = "galore-mini"
AGAINST = {"galore": "saved against GaLore", "adamw": "saved against AdamW"}  # columns of the paper's claims


class State(NamedTuple):
    """Bytes of optimizer state: of projected parameters, and of all."""

    projected: int
    whole: int


def large(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """What large runs show."""
    ran = [o for o in outcomes if o.measured is not None and o.predicted is not None]
    rows = [*savings(ran)]
    if rows:
        columns = ("model", "run", "GaLore-mini beside", "bytes on the projected linears", "GaLore-mini's", "saved",
                   "bytes on the whole model", "GaLore-mini's", "saved", "by the paper's count: linears", "whole",
                   "the paper says")  # fmt: skip
        numbers = ("bytes", "GaLore-mini's", "saved", "by", "whole")
        yield "### Optimizer state, measured: GaLore-mini beside GaLore and AdamW"
        yield to_markdown(Table("", tuple(Column(c, right=c.startswith(numbers)) for c in columns), tuple(rows)))
        yield text(
            "The paper's figures are of one layer with four h x h and two h x 4h matrices at r = h/4, second moments "
            "not counted; LLaMA's layers have three MLP matrices. Embeddings, head and norms are not projected: GaLore "
            "keeps AdamW's states for them, GaLore-mini Adam-mini's. *By the paper's count*: its formulas on these "
            "shapes."
        )
    yield "### Peaks, phase by phase"
    yield to_markdown(peaks(ran))
    yield "\n".join(f"- {line}" for line in wrong(outcomes, where=True))


def projected_names(case: Case) -> set[str]:
    """The parameters that a low-rank method would project."""
    return {row.name for row in model_of(case.model).parameters() if is_target(row, case.targets)}


def measured(o: Outcome) -> State:
    names = projected_names(o.case)
    inside = sum(b.measured_bytes or 0 for b in o.buffers if b.param in names)
    assert o.measured is not None
    return State(inside, o.measured.optimizer_state_bytes)


def counted(o: Outcome) -> State | None:
    """As the method's paper counts."""
    found = paper_state(o.case)
    return None if found is None else State(found.projected_bytes, found.nbytes)


def saved(mini: int, other: int) -> str:
    return f"{1 - mini / other:.1%}"


def savings(outcomes: Sequence[Outcome]) -> Iterator[tuple[str, ...]]:
    """GaLore-mini beside each GaLore and AdamW of the same model, format and rank; those alike in one row."""
    said, found = claims(), dict[tuple[str, ...], list[str]]()
    for o in outcomes:
        rank = o.case.hyperparameters.get("rank")
        for other in outcomes if o.case.method == MINI else ():
            same = (other.case.model, other.case.recipe) == (o.case.model, o.case.recipe)
            if same and other.case.method in AGAINST and other.case.hyperparameters.get("rank", rank) == rank:
                row = (*_saving(o, other), said[AGAINST[other.case.method]])
                found.setdefault(row, []).append(other.case.implementation)
    for (model, run, method, *cells), implementations in found.items():
        yield model, run, f"{method} ({', '.join(dict.fromkeys(implementations))})", *cells


def _saving(o: Outcome, other: Outcome) -> tuple[str, ...]:
    mini, theirs = measured(o), measured(other)
    counts = counted(o), counted(other)
    by_paper = ("", "")
    if counts[0] is not None and counts[1] is not None:
        by_paper = saved(counts[0].projected, counts[1].projected), saved(counts[0].whole, counts[1].whole)
    return (
        o.case.model, ", ".join((o.case.recipe, hyper(o.case))), other.case.method,
        f"{theirs.projected:,}", f"{mini.projected:,}", saved(mini.projected, theirs.projected),
        f"{theirs.whole:,}", f"{mini.whole:,}", saved(mini.whole, theirs.whole), *by_paper,
    )  # fmt: skip


def claims() -> dict[str, str]:
    """What the GaLore-mini paper says is saved, with where."""
    found: dict[str, dict[str, list[str]]] = {}
    for cell in recompute(MINI).cells:
        if cell.column in AGAINST.values():
            found.setdefault(cell.column, {}).setdefault(f"{cell.printed} {cell.unit}", []).append(cell.table)
    return {column: "; ".join(f"{p} ({', '.join(where)})" for p, where in by.items()) for column, by in found.items()}


def peaks(outcomes: Sequence[Outcome]) -> Table:
    """A row for each phase; what stays with the first."""
    columns = (
        Column("method"), Column("implementation"), Column("run"), Column("stays, predicted", right=True),
        Column("measured", right=True), Column("phase"), Column("peak, predicted", right=True),
        Column("measured", right=True), Column("measured", right=True), Column("error", right=True),
        Column("off", right=True), Column("seconds", right=True),
    )  # fmt: skip
    rows: list[tuple[str, ...]] = []
    for o in outcomes:
        run = ", ".join(part for part in (way(o.case), hyper(o.case)) if part)
        sums = [sum(getattr(q, side) or 0 for q in residents(o)) for side in ("predicted", "measured")]
        first = (o.case.method, o.case.implementation, run, *(f"{n:,}" for n in sums))
        compared = [q for q in phases(o) if q.predicted is not None and q.measured is not None]
        for i, q in enumerate(compared):
            rows.append((
                *(first if i == 0 else [""] * len(first)), q.name, f"{q.predicted:,}", f"{q.measured:,}",
                size(q.measured), signed(q.error), percent(q.rel_error), f"{o.seconds:.0f}" if i == 0 else "",
            ))  # fmt: skip
    return Table("", columns, tuple(rows))
