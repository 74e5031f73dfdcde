"""`estimate` as a table, CSV or Markdown, and its equations with the numbers put in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from galore_mem.evidence import CLASSES
from galore_mem.ledger import Entry
from galore_mem.memory.tape import CATEGORIES, Bytes
from galore_mem.report.tables import Column, Table, to_csv, to_markdown, to_terminal
from galore_mem.result import Estimate, EstimateResult
from galore_mem.units import GIB, MIB, format_bytes

GLYPHS = "█▓▒░·"
COLOURS = ("blue", "magenta", "yellow", "green", "white")
SHORT = {"fits": "fits", "tight": "tight", "does_not_fit": "no"}
VERDICTS = {"fits": "green", "tight": "yellow", "no": "red"}
LEGEND = "  ".join(f"{g} {c.replace('_', ' ')}" for g, c in zip(GLYPHS, CATEGORIES, strict=True))
BAR = 20


def render(result: EstimateResult, format: str, *, explain: bool, tensors: bool, plain: bool) -> str:
    """The result as text in one of the formats `table`, `csv` and `markdown`."""
    if format == "csv":
        return _tensor_csv(result) if tensors else _csv(result)
    show = to_markdown if format == "markdown" else lambda table: to_terminal(table, plain=plain)
    parts = [show(overview(result))]
    if explain:
        parts += ["\n".join(explanation(e)) + "\n" for e in result.estimates]
    if tensors:
        parts += [show(tensor_table(e)) for e in result.estimates]
    return "\n".join(parts)


def overview(result: EstimateResult) -> Table:
    """One row a method: residents, the peak with its phase, what it is made of, the verdict."""
    highest, unit = max(e.peak_allocated_bytes for e in result.estimates), unit_of(result)
    baseline = next((e for e in result.estimates if e.method == "adamw"), None)
    judged = any(e.fits for e in result.estimates)
    reserves = any(e.peak_reserved_bytes is not None for e in result.estimates)
    columns = [
        Column("method"), Column("implementation", drop=6), Column("weights", right=True, drop=4),
        Column("gradients", right=True, drop=5), Column("state", right=True, drop=1), Column("peak", right=True),
        Column("in"), *([Column("reserved", right=True)] if reserves else []), Column("within", drop=3),
        Column("vs adamw", right=True, drop=4),
        Column("at the peak", colours=dict(zip(GLYPHS, COLOURS, strict=True)), drop=2),
    ]  # fmt: skip
    if judged:
        columns.append(Column(str(result.setup["gpu"]), colours=VERDICTS))
    rows = []
    for e in result.estimates:
        mark = "" if e.layerwise == result.setup["layerwise"] else "*"
        sizes = (e.weights_bytes, e.gradients_bytes, e.optimizer_state_bytes, e.peak_allocated_bytes)
        row = [
            e.method + mark, e.implementation, *(amount(n, unit) for n in sizes), e.peak.name,
            *([amount(e.peak_reserved_bytes or 0, unit)] if reserves else []), within(e), saving(e, baseline),
            bar(e.peak.components, highest),
        ]  # fmt: skip
        if judged:
            row.append(verdict(e))
        rows.append(tuple(row))
    return Table(_title(result), tuple(columns), tuple(rows), tuple(_footer(result)))


def _title(result: EstimateResult) -> str:
    m, s = result.model, result.setup
    return (
        f"{m['name']}: {m['parameters']:,} parameters, {m['parameters_projected']:,} projected; "
        f"batch {s['batch_size']} x {s['seq_len']} tokens, {s['recipe']}, {s['attention']} attention"
        + (", checkpointing" if s["gradient_checkpointing"] else "")
        + (", layer-wise update" if s["layerwise"] else "")
    )


def _footer(result: EstimateResult) -> Iterator[str]:
    yield LEGEND
    unit = "GiB (2^30 bytes)" if unit_of(result) == GIB else "MiB (2^20 bytes)"
    yield f"{unit}. weights, gradients, state: tensors that stay; peak: torch's allocator, highest phase."
    first = result.estimates[0]
    if result.setup["gpu"]:
        outside = format_bytes(first.outside_allocator_bytes)
        needed = "what is reserved" if first.reserve is None else "the peak"
        usual = "" if first.reserve is None else "the usual reserve at "
        yield (
            f"{result.setup['gpu']}: GiB left (+) or missing (-) for {needed} and {outside} of CUDA context. fits: "
            f"room for {usual}the upper end of the band; no: not even for the lower end; tight: between."
        )
        if first.reserve is not None:
            yield f"reserve: {first.reserve.text}."
    if first.peak_reserved_bytes is not None:
        yield "reserved: what the allocator takes of the device. Room in its blocks that nothing fills (slack) counts."
    yield from bands(result.estimates)
    if any(e.layerwise != result.setup["layerwise"] for e in result.estimates):
        other = "has no layer-wise update" if result.setup["layerwise"] else "updates layer by layer, inside backward"
        yield f"* {other}."
    common = set.intersection(*(set(e.assumptions) for e in result.estimates))
    yield from (f"Assumed: {a}." for a in first.assumptions if a in common)
    yield from kernels(result, common)
    yield from (f"Not supported: {u.method} ({u.implementation}): {u.reason}." for u in result.unsupported)
    clipped = {a for e in result.estimates for a in e.assumptions if "clipped" in a}
    yield from (f"Note: {a}." for a in sorted(clipped - common))
    if any("activations" in n for n in first.not_counted):
        yield f"Not counted: {first.not_counted[0]}."


def bands(estimates: Sequence[Estimate]) -> Iterator[str]:
    """What the classes of evidence in the table mean."""
    found = {e.confidence.evidence for e in estimates if e.confidence is not None}
    told = "; ".join(f"{name}: {CLASSES[name]}" for name in CLASSES if name in found)
    if told:
        yield f"within: how far off the measured peak may be, by what was measured. {told}."


def kernels(result: EstimateResult, common: set[str]) -> Iterator[str]:
    """The attention kernels, where methods differ in them (a method's formats decide)."""
    found: dict[str, list[str]] = {}
    for e in result.estimates:
        for a in e.assumptions:
            if a.startswith("attention kernel") and a not in common:
                found.setdefault(a, []).append(e.method)
    widest = max(found, key=lambda a: len(found[a]), default=None)
    for a, methods in found.items():
        yield f"Assumed: {a}" + ("." if a == widest else f" for {', '.join(methods)}.")


def unit_of(result: EstimateResult) -> int:
    """GiB, or MiB for a table of small models."""
    return GIB if max(e.peak_allocated_bytes for e in result.estimates) >= GIB else MIB


def amount(n: int, unit: int) -> str:
    return f"{n / unit:.2f}" if n >= unit // 100 or n == 0 else f"{n / unit:.4f}"


def within(e: Estimate) -> str:
    """How far off the measured peak may be, and what says so."""
    return "" if e.confidence is None else e.confidence.short


def saving(e: Estimate, baseline: Estimate | None) -> str:
    if baseline is None or e is baseline:
        return ""
    change = e.peak_allocated_bytes / baseline.peak_allocated_bytes - 1
    return f"{change:+.1%}"


def bar(live: Bytes, highest: int) -> str:
    """The components of a peak as a bar, the highest peak of the table filling it (largest remainders)."""
    total = sum(live)
    cells = max(1, round(BAR * total / highest)) if highest else 0
    exact = [cells * part / total if total else 0.0 for part in live]
    counts = [int(x) for x in exact]
    for i in sorted(range(5), key=lambda i: counts[i] - exact[i])[: cells - sum(counts)]:
        counts[i] += 1
    return "".join(g * n for g, n in zip(GLYPHS, counts, strict=True))


def verdict(e: Estimate) -> str:
    if e.fits is None:
        return ""
    return f"{SHORT[e.fits.verdict]} {e.fits.headroom_bytes / GIB:+.2f}"


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


def judged(e: Estimate) -> tuple[object, ...]:
    """Evidence, band, headroom and verdict; empty where there are none."""
    told = (e.confidence.evidence, e.confidence.band) if e.confidence else ("", "")
    return *told, *((e.fits.headroom_bytes, e.fits.verdict) if e.fits else ("", ""))


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
    gradients = [t for t in e.entries if t.kind == "gradients"]
    if e.layerwise:
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
            yield f"    activations grow by {format_bytes(phase.per_layer[3])} ({phase.per_layer[3]:,} B) a layer"
    if e.kept:
        total = sum(k.nbytes for k in e.kept if not k.shared)
        yield f"  one layer keeps for backward {total:,} B = {format_bytes(total)}:"
        for k in e.kept:
            shape = " x ".join(map(str, k.shape)) or "scalar"
            shared = " (one for all layers)" if k.shared else ""
            yield f"    {k.nbytes:>13,} B  {k.dtype} {shape}: {', '.join(k.operations)}{shared}"
    if e.confidence is not None:
        yield f"  within {e.confidence.short}: {e.confidence.text}"
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
