"""Outcomes of `galore-mem verify` as a table, JSON, CSV or Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from galore_mem import __version__
from galore_mem.estimator import setup_json
from galore_mem.report.tables import Column, Table, to_csv, to_markdown, to_terminal
from galore_mem.report.verify_rows import Quantity, hyper, percent, place, quantities, summary, way
from galore_mem.report.verify_tables import LEGEND, block, closing, overviews, reasons, tensors, wrong
from galore_mem.verify.case import COUNTED, NAMED, TRAIN, Case, Outcome
from galore_mem.verify.paper import paper_state

VERIFY_SCHEMA = "galore-mem.verify/1"
FEW = 8  # cases that are shown in full
# of a setup, what optimizer steps alone do not have
OF_PASSES = (
    "batch_size", "seq_len", "attention", "gradient_checkpointing", "loss", "keep_logits", "use_cache", "transformers",
)  # fmt: skip


def render(
    outcomes: Sequence[Outcome], format: str, *, buffers: bool = False, plain: bool = False, details: bool | None = None
) -> str:
    """The outcomes as text in one of the formats `table`, `json`, `csv` and `markdown`. `buffers`: with every tensor of
    the optimizer's state; `details`: a block for each case (None: if they are few); `plain`: without colors."""
    outcomes = sorted(outcomes, key=place)
    if format == "json":
        return json.dumps(to_json(outcomes, buffers=buffers), indent=2, ensure_ascii=False) + "\n"
    if format == "csv":
        return _buffer_csv(outcomes) if buffers else _csv(outcomes)
    more = [tensors(o) for o in outcomes if buffers and o.buffers]
    if format == "markdown":
        below = (
            "\n".join(["```text", *wrong(outcomes, where=True), *reasons(outcomes), *closing(outcomes), "```"]) + "\n"
        )
        return "\n".join([*map(to_markdown, [_long(outcomes), *more]), below])
    if len(outcomes) <= FEW if details is None else details:
        tables = [block(o) for o in outcomes if o.status != "unsupported"]
        notes = tuple(reasons(outcomes, remarks=False))
    else:
        tables, notes = [*overviews(outcomes)], (LEGEND, *reasons(outcomes))
    ending = Table("", (), (), notes)
    parts = [to_terminal(t, plain=plain).lstrip("\n") for t in [*tables, *more, ending]]
    return "\n".join([*(part for part in parts if part), "\n".join(closing(outcomes)) + "\n"])


# -- JSON --------------------------------------------------------------------------------------------


def to_json(outcomes: Sequence[Outcome], *, buffers: bool = False) -> dict[str, Any]:
    """The report as data. `environment` is what all cases share; what differs stands with the case."""
    outcomes = sorted(outcomes, key=place)
    common = shared([o.environment for o in outcomes if o.environment])
    return {
        "schema": VERIFY_SCHEMA,
        "version": __version__,
        "environment": common,
        "cases": [case_json(o, common, buffers=buffers) for o in outcomes],
        "summary": summary(outcomes),
    }


def shared(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What all of them say alike."""
    first = found[0] if found else {}
    return {k: v for k, v in first.items() if all(k in one and one[k] == v for one in found)}


def case_json(o: Outcome, common: Mapping[str, Any], *, buffers: bool) -> dict[str, Any]:
    """One case: null where nothing was predicted or measured."""
    case, counted = o.case, paper_state(o.case)
    shown: dict[str, Any] = {
        "model": case.model,
        "method": case.method,
        "implementation": case.implementation,
        "workload": case.workload,
        "hyperparameters": dict(case.hyperparameters),
        "setup": case_setup(case),
        "status": o.status,
        "detail": o.detail,
        "predicted": None if o.predicted is None else o.predicted.to_json(),
        "measured": None if o.measured is None else o.measured.to_json(),
        "rel_error": o.rel_error() or None,
        "paper_optimizer_state_bytes": None if counted is None else counted.nbytes,
        "seconds": round(o.seconds, 3),
    }
    if buffers:
        shown["buffers"] = [{**asdict(b), "shape": list(b.shape)} for b in o.buffers]
    other = {k: v for k, v in o.environment.items() if k not in common}
    return {**shown, "environment": other} if other else shown


def case_setup(case: Case) -> dict[str, Any]:
    """The setup under the names of `estimate`'s; null where the workload has no such thing."""
    found = setup_json(case.setup(), case.targets, None)
    return found if case.workload == TRAIN else {**found, **dict.fromkeys(OF_PASSES)}


# -- one row a quantity ------------------------------------------------------------------------------


WHO = ("model", "method", "implementation", "workload", "recipe", *NAMED, "target", "hyperparameters")


def _who(case: Case) -> list[object]:
    """What distinguishes a case, in the order of `WHO`."""
    setup = case_setup(case)
    given = " ".join(f"{k}={v}" for k, v in case.hyperparameters.items())
    named = (case.model, case.method, case.implementation, case.workload, case.recipe)
    return [*named, *(setup[name] for name in NAMED), "+".join(case.targets or ()), given]


def _csv(outcomes: Sequence[Outcome]) -> str:
    """A row for each case and quantity (one without a quantity where nothing was measured), bytes raw."""
    columns = [
        "status", *WHO, "quantity", "predicted_bytes", "measured_bytes", "error_bytes", "rel_error",
        *(f"{name}_bytes" for name in COUNTED), "detail",
    ]  # fmt: skip
    nothing = Quantity("", None, None)
    rows = [
        [
            o.status,
            *_who(o.case),
            q.name,
            q.predicted,
            q.measured,
            q.error,
            q.rel_error,
            *map(q.beside.get, COUNTED),
            o.detail,
        ]
        for o in outcomes
        for q in [*quantities(o)] or [nothing]
    ]
    return to_csv(columns, rows)


def _buffer_csv(outcomes: Sequence[Outcome]) -> str:
    """A row for each tensor of the optimizer's state."""
    rows = [
        [*_who(o.case), b.param, b.buffer, "x".join(map(str, b.shape)), b.dtype, b.predicted_bytes, b.measured_bytes]
        for o in outcomes
        for b in o.buffers
    ]
    return to_csv([*WHO, "param", "buffer", "shape", "dtype", "predicted_bytes", "measured_bytes"], rows)


def _long(outcomes: Sequence[Outcome]) -> Table:
    """The rows of the CSV for people."""
    columns = (
        Column("status"), Column("method"), Column("implementation"), Column("run"), Column("of"),
        Column("predicted", right=True), Column("measured", right=True), Column("error", right=True),
        Column("off", right=True),
    )  # fmt: skip
    rows = tuple(
        (o.status, o.case.method, o.case.implementation, ", ".join(filter(None, (way(o.case), hyper(o.case)))),
         q.name.replace("_", " "), *(f"{n:,}" if n is not None else "" for n in (q.predicted, q.measured)),
         "" if q.error is None else f"{q.error:+,}" if q.error else "0", percent(q.rel_error))
        for o in outcomes
        for q in quantities(o)
    )  # fmt: skip
    return Table("", columns, rows)
