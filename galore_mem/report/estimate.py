"""`estimate` as a table, CSV or Markdown, and its equations with the numbers put in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from galore_mem.ledger import Entry
from galore_mem.memory.tape import CATEGORIES
from galore_mem.report.overview import bands, exceptions, judged, kernels, legend, overview, within
from galore_mem.report.tables import Column, Table, to_csv, to_markdown, to_terminal
from galore_mem.result import Estimate, EstimateResult
from galore_mem.units import format_bytes


def render(result: EstimateResult, format: str, *, explain: bool, tensors: bool, plain: bool) -> str:
    """The result as text in one of the formats `table`, `csv` and `markdown`."""
    if format == "csv":
        return _tensor_csv(result) if tensors else _csv(result)
    show = to_markdown if format == "markdown" else lambda table: to_terminal(table, plain=plain)
    parts = [show(overview(result, _footer(result)))]
    if explain:
        parts += ["\n".join(explanation(e)) + "\n" for e in result.estimates]
    if tensors:
        parts += [show(tensor_table(e)) for e in result.estimates]
    return "\n".join(parts)


def _footer(result: EstimateResult) -> Iterator[str]:
    yield from legend(result)
    first = result.estimates[0]
    if result.setup["gpu"]:
        outside = format_bytes(first.outside_allocator_bytes)
        needed = "what is reserved" if first.reserve is None else "the peak"
        usual = "" if first.reserve is None else "the usual reserve at "
        yield (
            f"{result.setup['gpu']}: GiB to spare (+) or short (-) after {needed} and {outside} of CUDA context. fits: "
            f"room for {usual}the upper end of the band; no: no room even for the lower end; tight: in between."
        )
        if first.reserve is not None:
            yield f"reserve: {first.reserve.text}."
    if first.peak_reserved_bytes is not None:
        yield "reserved: what the allocator takes from the device. Peaks include unused room in its blocks (slack)."
    yield from bands(result.estimates)
    yield from exceptions(result)
    common = set.intersection(*(set(e.assumptions) for e in result.estimates))
    yield from (f"Assumed: {a}." for a in first.assumptions if a in common)
    yield from kernels(result, common)
    yield from (f"Not supported: {u.method} ({u.implementation}): {u.reason}." for u in result.unsupported)
    clipped = {a for e in result.estimates for a in e.assumptions if "clipped" in a}
    yield from (f"Note: {a}." for a in sorted(clipped - common))
    if any("activations" in n for n in first.not_counted):
        yield f"Not counted: {first.not_counted[0]}."


# -- every number, for scripts -----------------------------------------------------------------------


def _csv(result: EstimateResult) -> str:
    columns = [
        "model", "method", "implementation", "convention", "layerwise", "phase", "allocated_bytes", *CATEGORIES,
        "is_peak", "weights_bytes", "gradients_bytes", "optimizer_state_bytes", "peak_reserved_bytes", "device_bytes",
        "evidence", "band", "headroom_bytes", "verdict",
    ]  # fmt: skip
    rows = [
        [
            result.model["name"], e.method, e.implementation, e.convention, e.layerwise, p.name, p.allocated_bytes,
            *p.components, p is e.peak, e.weights_bytes, e.gradients_bytes, e.optimizer_state_bytes,
            e.peak_reserved_bytes, e.device_bytes, *judged(e),
        ]
        for e in result.estimates
        for p in e.phases
    ]  # fmt: skip
    return to_csv(columns, rows)


def _tensor_csv(result: EstimateResult) -> str:
    columns = ["method", "implementation", "kind", "param", "buffer", "shape", "dtype", "bytes", "count", "host"]
    rows = [
        [e.method, e.implementation, t.kind, t.param, t.buffer, "x".join(map(str, t.shape)), t.dtype.name, t.nbytes,
         t.repeat, t.host]
        for e in result.estimates
        for t in e.entries
    ]  # fmt: skip
    return to_csv(columns, rows)


def tensor_table(e: Estimate) -> Table:
    """Every persistent tensor of one estimate, one row for tensors that repeat in each layer."""
    columns = (
        Column("kind", drop=2), Column("parameter"), Column("buffer"), Column("shape", drop=1), Column("dtype", drop=3),
        Column("bytes each", right=True), Column("x", right=True), Column("bytes", right=True),
    )  # fmt: skip
    rows = tuple(
        (t.kind, t.param, t.buffer + (" (host)" if t.host else "") + (" (view)" if t.is_view else ""),
         " x ".join(map(str, t.shape)) or "scalar", t.dtype.name, f"{t.nbytes:,}", str(t.repeat), f"{t.total:,}")
        for t in e.entries
    )  # fmt: skip
    return Table(f"{e.method} ({e.implementation}): persistent tensors", columns, rows)


# -- equations ---------------------------------------------------------------------------------------


def explanation(e: Estimate) -> Iterator[str]:
    """The equation of each component with the numbers put in (m <= n are the sides of a matrix, r the rank)."""
    given = ", ".join(f"{k} {v}" for k, v in e.hyperparameters.items())
    yield f"{e.method} ({e.implementation}{'; ' + given if given else ''})"
    yield from _sum_lines("weights", [t for t in e.entries if t.kind == "weights"])
    beside = [t for t in e.entries if t.kind == "buffers"]
    if beside:
        yield from _sum_lines("buffers, which each phase counts among the weights", beside)
    gradients = [t for t in e.entries if t.kind == "gradients"]
    if e.layerwise and e.gradients_bytes < sum(t.total for t in gradients):
        largest = format_bytes(e.gradients_bytes)
        yield f"  gradients = {e.gradients_bytes:,} B = {largest}: one at a time, the largest of"
        yield from _terms(gradients)
    else:
        yield from _sum_lines("gradients", gradients)
    state = [t for t in e.entries if t.kind == "optimizer_state" and not t.host]
    yield f"  optimizer_state = {e.optimizer_state_bytes:,} B = {format_bytes(e.optimizer_state_bytes)}"
    for projected, label in ((True, "projected"), (False, "other")):
        part = [t for t in state if t.projected is projected]
        if part:
            formula = e.equations.get(label) or e.equations.get("other")
            yield f"    {label} parameters" + (f": {formula} (elements, for each m x n)" if formula else "")
            yield from (f"  {line}" for line in _terms(part))
    for phase in e.phases:
        parts = " + ".join(
            f"{format_bytes(n)} {name.replace('_', ' ')}"
            for name, n in zip(CATEGORIES, phase.components, strict=True)
            if n
        )
        mark = "  <- peak" if phase is e.peak else ""
        yield f"  {phase.name} = {parts} = {format_bytes(phase.allocated_bytes)}{mark}"
        if phase.per_layer is not None and phase.per_layer[3]:
            yield f"    activations grow by {format_bytes(phase.per_layer[3])} ({phase.per_layer[3]:,} B) per layer"
    if e.kept:
        total = sum(k.nbytes for k in e.kept if not k.shared)
        yield f"  one layer keeps {total:,} B = {format_bytes(total)} for backward:"
        for k in e.kept:
            shape = " x ".join(map(str, k.shape)) or "scalar"
            shared = " (one for all layers)" if k.shared else ""
            yield f"    {k.nbytes:>13,} B  {k.dtype} {shape}: {', '.join(k.operations)}{shared}"
    if e.confidence is not None:
        yield f"  within {within(e)}: {e.confidence.told(e.peak_allocated_bytes)}"
    yield from (f"  assumed: {a}" for a in e.assumptions)
    yield from (f"  not counted: {n}" for n in e.not_counted)


def _sum_lines(kind: str, entries: list[Entry]) -> Iterator[str]:
    total = sum(t.total for t in entries)
    yield f"  {kind} = {total:,} B = {format_bytes(total)}"
    yield from _terms(entries)


def _terms(entries: Iterable[Entry]) -> Iterator[str]:
    """`name: elements x bytes` for each buffer and format."""
    groups: dict[tuple[str, str], list[Entry]] = {}
    for t in entries:
        groups.setdefault((t.buffer, t.dtype.name), []).append(t)
    for (buffer, dtype), found in groups.items():
        count = sum(t.repeat for t in found)
        elements = sum(_elements(t) * t.repeat for t in found)
        total = sum(t.total for t in found)
        bits = found[0].dtype.bits
        each = f"{bits // 8} B" if bits % 8 == 0 else f"{bits}/8 B"
        held = "" if not any(t.is_view for t in found) else " (views that keep larger storages alive)"
        name = f"{buffer}: " if buffer else ""
        yield f"    {name}{count:,} tensors, {elements:,} elements x {each} ({dtype}) = {total:,} B{held}"


def _elements(t: Entry) -> int:
    n = 1
    for size in t.shape:
        n *= size
    return n
