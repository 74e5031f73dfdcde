"""Outcomes of `galore-mem verify` as a table, and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

from galore_mem import __version__
from galore_mem.verify.case import RESIDENTS, STATUSES, Outcome

VERIFY_SCHEMA = "galore-mem.verify/1"


def errors(outcomes: Sequence[Outcome]) -> list[float]:
    """The absolute relative errors of all measured phases."""
    return [
        abs(error)
        for o in outcomes
        if o.measured is not None
        for error in o.rel_error()["phases"].values()
        if error is not None
    ]


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    found = errors(outcomes)
    return {
        "cases": len(outcomes),
        **{status: sum(o.status == status for o in outcomes) for status in STATUSES},
        "worst_rel_error": max(found, default=None),
        "median_rel_error": median(found) if found else None,
    }


def to_json(outcomes: Sequence[Outcome], *, buffers: bool = False) -> dict[str, Any]:
    environments = [o.environment for o in outcomes if o.environment]
    return {
        "schema": VERIFY_SCHEMA,
        "version": __version__,
        "environment": dict(environments[0]) if environments else {},
        "cases": [o.to_json(buffers=buffers) for o in outcomes],
        "summary": summary(outcomes),
    }


def lines(outcomes: Sequence[Outcome], *, buffers: bool = False) -> Iterator[str]:
    """A block per case: measured bytes and what the prediction is off by."""
    for o in outcomes:
        yield f"{o.status:12}{o.case}"
        if o.detail:
            yield f"    {o.detail}"
        if o.predicted is None or o.measured is None:
            continue
        pairs = [(name, getattr(o.predicted, name), getattr(o.measured, name)) for name in RESIDENTS]
        yield "    stays   " + "  ".join(difference(name.removesuffix("_bytes"), p, m) for name, p, m in pairs)
        phases = o.predicted.phases
        yield "    peaks   " + "  ".join(
            difference(n, phases[n], m) for n, m in o.measured.phases.items() if n in phases
        )
        if buffers:
            yield from (
                f"      {difference(f'{b.param} {b.buffer}', b.predicted_bytes, b.measured_bytes)}" for b in o.buffers
            )
    yield closing(outcomes)


def difference(name: str, predicted: int | None, measured: int | None) -> str:
    """`name measured (prediction - measurement)`."""
    if measured is None or predicted is None:
        return f"{name} {'missing' if measured is None else f'{measured:,} (not predicted)'}"
    return f"{name} {measured:,} ({predicted - measured:+,})"


def closing(outcomes: Sequence[Outcome]) -> str:
    found = summary(outcomes)
    counts = ", ".join(f"{found[status]} {status}" for status in STATUSES if found[status])
    if found["worst_rel_error"] is None:
        return f"{len(outcomes)} cases: {counts}"
    return (
        f"{len(outcomes)} cases: {counts}; phases' peaks: median error {found['median_rel_error']:.4%}, "
        f"worst {found['worst_rel_error']:.4%}"
    )
