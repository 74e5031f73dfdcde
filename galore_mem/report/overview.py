"""What the tables of `estimate` and `simulate` have in common: one row a method, and what is said below."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from galore_mem.evidence import CLASSES
from galore_mem.memory.tape import CATEGORIES, Bytes
from galore_mem.report.tables import Column, Table
from galore_mem.result import Estimate, EstimateResult
from galore_mem.units import GIB, MIB

GLYPHS = "█▓▒░·"
COLORS = ("blue", "magenta", "yellow", "green", "white")
SHORT = {"fits": "fits", "tight": "tight", "does_not_fit": "no"}
VERDICTS = {"fits": "green", "tight": "yellow", "no": "red"}
LEGEND = "  ".join(f"{g} {c.replace('_', ' ')}" for g, c in zip(GLYPHS, CATEGORIES, strict=True))
BAR = 20
PAINT = dict(zip(GLYPHS, COLORS, strict=True))


def overview(result: EstimateResult, footer: Iterable[str], warnings: Iterable[str] = ()) -> Table:
    """One row a method: what stays, the peak with its phase, what is reserved for it, what it is made of, the
    verdict."""
    made = result.estimates
    highest, unit = max(e.peak_allocated_bytes for e in made), unit_of(result)
    baseline = next((e for e in made if e.method == "adamw"), None)
    judged, reserves = any(e.fits for e in made), any(e.peak_reserved_bytes is not None for e in made)
    columns = [
        Column("method"), Column("implementation", drop=6), Column("weights", right=True, drop=4),
        Column("gradients", right=True, drop=5), Column("state", right=True, drop=1), Column("peak", right=True),
        Column("in"), *([Column("reserved", right=True)] if reserves else []), Column("within", drop=3),
        Column("vs adamw", right=True, drop=4), Column("at the peak", colors=PAINT, drop=2),
        *([Column(str(result.setup["gpu"]), colors=VERDICTS)] if judged else []),
    ]  # fmt: skip
    rows = []
    for e in made:
        mark = "" if e.layerwise == result.setup["layerwise"] else "*"
        sizes = (e.weights_bytes, e.gradients_bytes, e.optimizer_state_bytes, e.peak_allocated_bytes)
        rows.append((
            e.method + mark, e.implementation, *(amount(n, unit) for n in sizes), e.peak.name,
            *([amount(e.peak_reserved_bytes or 0, unit)] if reserves else []), within(e), saving(e, baseline),
            bar(e.peak.components, highest), *([verdict(e)] if judged else []),
        ))  # fmt: skip
    return Table(title(result), tuple(columns), tuple(rows), tuple(footer), tuple(warnings))


def title(result: EstimateResult) -> str:
    """The model, and how it is trained as far as that is known."""
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


def legend(result: EstimateResult) -> Iterator[str]:
    """What glyphs and units mean."""
    yield LEGEND
    unit = "GiB (2^30 bytes)" if unit_of(result) == GIB else "MiB (2^20 bytes)"
    yield f"{unit}. weights, gradients, state: tensors that stay; peak: torch's allocator, highest phase."


def exceptions(result: EstimateResult) -> Iterator[str]:
    """What a star beside a method means, where there is one."""
    layerwise = result.setup["layerwise"]
    if any(e.layerwise != layerwise for e in result.estimates):
        yield f"* {'has no layer-wise update' if layerwise else 'updates layer by layer, inside backward'}."


def bands(estimates: Sequence[Estimate]) -> Iterator[str]:
    """What the classes of evidence in the table mean."""
    found = {e.confidence.evidence for e in estimates if e.confidence is not None}
    told = "; ".join(f"{name}: {CLASSES[name]}" for name in CLASSES if name in found)
    if told:
        yield f"within: how far the measured peak may be from this one, and what that rests on. {told}."


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
    """How far the measured peak may be from this one, and what that rests on."""
    return "" if e.confidence is None else e.confidence.short(e.peak_allocated_bytes)


def saving(e: Estimate, baseline: Estimate | None) -> str:
    """How much less than AdamW's the peak is, or more."""
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


def judged(e: Estimate) -> tuple[object, ...]:
    """Evidence, band, headroom and verdict; empty where there are none."""
    told = (e.confidence.evidence, e.confidence.band) if e.confidence else ("", "")
    return *told, *((e.fits.headroom_bytes, e.fits.verdict) if e.fits else ("", ""))
