"""`simulate` as a table, CSV or Markdown: an overview, each phase, and what lives at the peak."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from galore_mem.memory.tape import CATEGORIES
from galore_mem.report.overview import GLYPHS, PAINT, amount, bands, exceptions, judged, kernels, legend, overview
from galore_mem.report.tables import Column, Table, to_csv, to_markdown, to_terminal
from galore_mem.result import Phase
from galore_mem.simulate.result import Live, Place, SimulateResult, Simulation
from galore_mem.units import GIB, MIB, format_bytes

FEW = 3  # runs that are shown phase by phase
TOP = 12  # rows of what lives at the peak, where not all are asked for
GLYPH = dict(zip(CATEGORIES, GLYPHS, strict=True))
SHORT = ("weights", "gradients", "state", "activ.", "temp.")


def render(result: SimulateResult, format: str, *, everything: bool, plain: bool) -> str:
    """The result as text in one of the formats `table`, `csv` and `markdown`. `everything`: all that lives at the
    peak, not only the largest."""
    if format == "csv":
        return _live_csv(result) if everything else _csv(result)
    show = to_markdown if format == "markdown" else lambda table: to_terminal(table, plain=plain)
    parts = [summary(result)]
    if len(result.estimates) <= FEW or everything:
        for s in result.estimates:
            parts += [phases(s), at_peak(s, None if everything else TOP)]
    return "\n".join(show(table) for table in parts)


def summary(result: SimulateResult) -> Table:
    """One row a method."""
    return overview(result, _footer(result), _refusals(result))


def _refusals(result: SimulateResult) -> Iterator[str]:
    for s in result.estimates:
        if s.refusal is not None:
            yield f"{s.method}: out of memory in {where(s.refusal.place)}. {s.refusal.message}"


def _footer(result: SimulateResult) -> Iterator[str]:
    runs, setup = result.estimates, result.setup
    yield from legend(result)
    if setup["device"] == "cuda":
        yield "reserved: what the allocator takes from the device. Peaks include unused room in its blocks (slack)."
    if setup["gpu"]:
        outside = format_bytes(runs[0].outside_allocator_bytes)
        yield (
            f"{setup['gpu']}: GiB to spare (+) or short (-) after what is reserved and {outside} of CUDA context; "
            "tight: it ran only after cached memory was released, or fits at one end of the band and not at the other."
        )
    yield from bands(runs)
    if any(s.refusal for s in runs):
        yield "A run that ran out of memory is shown as on a card that is large enough."
    yield from exceptions(result)
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
    columns += [Column("incl. slack", right=True, drop=1)] if reserves else []
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
        Column("", colors=PAINT), Column("bytes", right=True), Column("x", right=True), Column("what"),
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
