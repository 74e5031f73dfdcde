"""`simulate` as a table, CSV or Markdown: an overview, each phase, and what lives at the peak."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from galore_mem.memory.tape import CATEGORIES
from galore_mem.report.estimate import (
    COLOURS,
    GLYPHS,
    LEGEND,
    VERDICTS,
    amount,
    bands,
    bar,
    judged,
    kernels,
    saving,
    unit_of,
    verdict,
    within,
)
from galore_mem.report.tables import Column, Table, to_csv, to_markdown, to_terminal
from galore_mem.result import Phase
from galore_mem.simulate.result import Live, Place, SimulateResult, Simulation
from galore_mem.units import GIB, MIB, format_bytes

FEW = 3  # runs that are shown phase by phase
TOP = 12  # rows of what lives at the peak, where not all are asked for
GLYPH = dict(zip(CATEGORIES, GLYPHS, strict=True))
PAINT = dict(zip(GLYPHS, COLOURS, strict=True))
SHORT = ("weights", "gradients", "state", "activ.", "temp.")


def render(result: SimulateResult, format: str, *, everything: bool, plain: bool) -> str:
    """The result as text in one of the formats `table`, `csv` and `markdown`. `everything`: all that lives at the
    peak, not only the largest."""
    if format == "csv":
        return _live_csv(result) if everything else _csv(result)
    show = to_markdown if format == "markdown" else lambda table: to_terminal(table, plain=plain)
    parts = [overview(result)]
    if len(result.estimates) <= FEW or everything:
        for s in result.estimates:
            parts += [phases(s), at_peak(s, None if everything else TOP)]
    return "\n".join(show(table) for table in parts)


def overview(result: SimulateResult) -> Table:
    """One row a method: what stays, the peak with its phase, what is reserved for it, the verdict."""
    runs = result.estimates
    highest, unit = max(s.peak_allocated_bytes for s in runs), unit_of(result)
    baseline = next((s for s in runs if s.method == "adamw"), None)
    judged, reserves = any(s.fits for s in runs), any(s.peak_reserved_bytes is not None for s in runs)
    columns = [
        Column("method"), Column("implementation", drop=6), Column("weights", right=True, drop=4),
        Column("gradients", right=True, drop=5), Column("state", right=True, drop=1), Column("peak", right=True),
        Column("in"),
    ]  # fmt: skip
    columns += [Column("reserved", right=True)] if reserves else []
    columns += [Column("within", drop=3)]
    columns += [Column("vs adamw", right=True, drop=4), Column("at the peak", colours=PAINT, drop=2)]
    columns += [Column(str(result.setup["gpu"]), colours=VERDICTS)] if judged else []
    rows = []
    for s in runs:
        mark = "" if s.layerwise == result.setup["layerwise"] else "*"
        sizes = (s.weights_bytes, s.gradients_bytes, s.optimizer_state_bytes, s.peak_allocated_bytes)
        row = [s.method + mark, s.implementation, *(amount(n, unit) for n in sizes), s.peak.name]
        row += [amount(s.peak_reserved_bytes or 0, unit)] if reserves else []
        row += [within(s)]
        row += [saving(s, baseline), bar(s.peak.components, highest)]
        row += [verdict(s)] if judged else []
        rows.append(tuple(row))
    return Table(_title(result), tuple(columns), tuple(rows), tuple(_footer(result)), tuple(_refusals(result)))


def _title(result: SimulateResult) -> str:
    m, s = result.model, result.setup
    told = [f"{m['name']}: {m['parameters']:,} parameters"]
    if m["parameters_projected"]:
        told[0] += f", {m['parameters_projected']:,} projected"
    how = [] if s["batch_size"] is None else [f"batch {s['batch_size']} x {s['seq_len']} tokens"]
    how += [] if s["recipe"] is None else [s["recipe"]]
    how += [] if s["attention"] is None else [f"{s['attention']} attention"]
    how += ["checkpointing"] if s["gradient_checkpointing"] else []
    how += [f"{s['gradient_accumulation']} micro-batches"] if s["gradient_accumulation"] > 1 else []
    how += ["layer-wise update"] if s["layerwise"] else []
    return "; ".join([*told, ", ".join(how)] if how else told)


def _refusals(result: SimulateResult) -> Iterator[str]:
    for s in result.estimates:
        if s.refusal is not None:
            yield f"{s.method}: out of memory in {where(s.refusal.place)}. {s.refusal.message}"


def _footer(result: SimulateResult) -> Iterator[str]:
    runs, setup = result.estimates, result.setup
    yield LEGEND
    unit = "GiB (2^30 bytes)" if unit_of(result) == GIB else "MiB (2^20 bytes)"
    yield f"{unit}. weights, gradients, state: tensors that stay; peak: torch's allocator, highest phase."
    if setup["device"] == "cuda":
        yield "reserved: what the allocator takes of the device. Room in its blocks that nothing fills (slack) counts."
    if setup["gpu"]:
        outside = format_bytes(runs[0].outside_allocator_bytes)
        yield (
            f"{setup['gpu']}: GiB left (+) or missing (-) for what is reserved and {outside} of CUDA context; tight: "
            "served only after cached memory was given back, or at one end of the band but not at the other."
        )
    yield from bands(runs)
    if any(s.refusal for s in runs):
        yield "What ran out of memory is shown as it would be on a card with room."
    if any(s.layerwise != setup["layerwise"] for s in runs):
        yield f"* {'has no layer-wise update' if setup['layerwise'] else 'updates layer by layer, inside backward'}."
    common = set.intersection(*(set(s.assumptions) for s in runs))
    yield from (f"Assumed: {a}." for a in runs[0].assumptions if a in common)
    for s in runs:
        rest = [a for a in s.assumptions if a not in common and not a.startswith("attention kernel")]
        yield from (f"Assumed for {s.method} ({s.implementation}): {a}." for a in rest if len(runs) <= FEW)
    yield from kernels(result, common)
    left_out = set.intersection(*(set(s.not_counted) for s in runs))
    yield from (f"Not counted: {one}." for one in runs[0].not_counted if one in left_out)
    yield from (f"Not run: {u.method} ({u.implementation}): {u.reason}." for u in result.unsupported)


# -- one run -------------------------------------------------------------------------------------------


def phases(s: Simulation) -> Table:
    """Each phase's highest moment: allocated, reserved, what it is made of."""
    reserves = s.peak_reserved_bytes is not None
    unit = GIB if s.peak_allocated_bytes >= GIB else MIB
    columns = [Column("phase"), Column("allocated", right=True)]
    columns += [Column("reserved", right=True)] if reserves else []
    columns += [Column(name, right=True) for name in SHORT]
    columns += [Column("of it slack", right=True, drop=1)] if reserves else []
    rows = [tuple(_phase(p, unit, reserves=reserves)) for p in s.phases]
    footer = []
    if reserves:
        beyond = s.fragmentation_bytes or 0
        share = beyond / (s.peak_reserved_bytes or 1)
        again = f", cached memory given back {s.retries} times" if s.retries else ""
        footer.append(f"reserved beyond the peak: {format_bytes(beyond)} ({share:.1%}){again}; {s.events:,} events.")
    given = ", ".join(f"{k} {v}" for k, v in s.hyperparameters.items())
    name = f"{s.method} ({s.implementation}{'; ' + given if given else ''}), {'GiB' if unit == GIB else 'MiB'}"
    return Table(name, tuple(columns), tuple(rows), tuple(footer))


def _phase(p: Phase, unit: int, *, reserves: bool) -> Iterator[str]:
    sizes = [p.allocated_bytes, *([p.reserved_bytes or 0] if reserves else []), *p.components]
    sizes += [p.slack_bytes or 0] if reserves else []
    yield p.name
    yield from (f"{n / unit:.2f}" for n in sizes)


def at_peak(s: Simulation, top: int | None) -> Table:
    """What lives at the highest moment, the largest first; the rest in one row."""
    if s.at_peak is None:
        return Table("", (), ())
    unit = GIB if s.peak_allocated_bytes >= GIB else MIB
    columns = (
        Column("", colours=PAINT), Column("bytes", right=True), Column("x", right=True), Column("what"),
        Column("each", drop=2), Column("made in", drop=1),
    )  # fmt: skip
    shown, rest = s.at_peak.live[:top], s.at_peak.live[top:] if top is not None else ()
    rows = [
        (GLYPH[one.category], amount(one.nbytes, unit), str(one.repeat), what(one), each(one), one.place.phase)
        for one in shown
    ]
    if rest:
        more = f"{len(rest)} more kinds (--tensors lists them)"
        rows.append(
            ("", amount(sum(one.nbytes for one in rest), unit), str(sum(one.repeat for one in rest)), more, "", "")
        )
    title = f"at the peak, in {where(s.at_peak.place)}: {format_bytes(s.peak_allocated_bytes)}"
    return Table(title, columns, tuple(rows))


def what(one: Live) -> str:
    """A tensor by its name, or by the operation and the module that made it."""
    if one.name:
        return one.name
    return inside(one.place)


def each(one: Live) -> str:
    return f"{one.dtype} {' x '.join(map(str, one.shape)) or 'scalar'}" if one.dtype else ""


def where(place: Place) -> str:
    """A place of the program."""
    return f"{place.phase}: {inside(place)}"


def inside(place: Place) -> str:
    """An operation and the module that it runs in; libraries' own memory, and the loading of the model, are in none."""
    return operation_name(place.operation) + (f" in {place.module}" if place.module else "")


def operation_name(op: str) -> str:
    """`mm` for `aten.mm.default`; other libraries' operations with the library's name."""
    return (op.rpartition(".")[0] or op).removeprefix("aten.")


# -- every number, for scripts -------------------------------------------------------------------------


def _csv(result: SimulateResult) -> str:
    columns = [
        "model", "method", "implementation", "layerwise", "phase", "allocated_bytes", "reserved_bytes", *CATEGORIES,
        "slack_bytes", "is_peak", "weights_bytes", "gradients_bytes", "optimizer_state_bytes", "peak_reserved_bytes",
        "device_bytes", "evidence", "band", "headroom_bytes", "verdict",
    ]  # fmt: skip
    rows: list[Sequence[object]] = [
        [
            result.model["name"], s.method, s.implementation, s.layerwise, p.name, p.allocated_bytes, p.reserved_bytes,
            *p.components, p.slack_bytes, p is s.peak, s.weights_bytes, s.gradients_bytes, s.optimizer_state_bytes,
            s.peak_reserved_bytes, s.device_bytes, *judged(s),
        ]
        for s in result.estimates
        for p in s.phases
    ]  # fmt: skip
    return to_csv(columns, rows)


def _live_csv(result: SimulateResult) -> str:
    columns = [
        "method", "implementation", "category", "name", "phase", "module", "operation", "shape", "dtype", "count",
        "bytes",
    ]  # fmt: skip
    rows: list[Sequence[object]] = [
        [s.method, s.implementation, one.category, one.name, *one.place, "x".join(map(str, one.shape)), one.dtype,
         one.repeat, one.nbytes]
        for s in result.estimates
        if s.at_peak is not None
        for one in s.at_peak.live
    ]  # fmt: skip
    return to_csv(columns, rows)
