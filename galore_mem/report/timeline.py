"""The timeline of simulated runs: live bytes by category, what is reserved, the phases, the peak. PNG and SVG."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from io import BytesIO
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from galore_mem.errors import InputError, unknown
from galore_mem.memory.tape import CATEGORIES
from galore_mem.report.simulate import where
from galore_mem.simulate.result import SimulateResult, Simulation, Timeline
from galore_mem.units import GIB, MIB, format_bytes

SUFFIXES = (".png", ".svg", ".html")
PANELS = 8  # runs in one picture
COLORS = dict(zip(CATEGORIES, ("#4c78a8", "#b279a2", "#eeca3b", "#54a24b", "#9d9d9d"), strict=True))
RESERVED, LIMIT = "#222222", "#d62728"
INCHES = (11, 3.6)  # of one panel
NARROW = 0.045  # of the width: a shorter phase has no name


class Span(NamedTuple):
    """A phase from one event to another."""

    name: str
    start: int
    end: int


def check(path: Path) -> None:
    """Raises `InputError` for a file that no timeline can be drawn into."""
    if path.suffix.lower() not in SUFFIXES:
        raise unknown("kind of picture", path.suffix or path.name, SUFFIXES)
    if path.suffix.lower() != ".html" and find_spec("matplotlib") is None:
        raise InputError(
            f"a {path.suffix} needs matplotlib; install galore-mem with its extra: plot (or write a .html)"
        )


def picture(result: SimulateResult, suffix: str) -> bytes:
    """The timelines of all runs, one below the other, on one scale. Raises `InputError` for too many."""
    runs = drawn(result)
    if suffix == ".html":
        from galore_mem.report.timeline_html import page

        return page(result, runs).encode()
    rc_context = import_module("matplotlib").rc_context
    figure_of = import_module("matplotlib.figure").Figure
    unit = unit_of(runs)
    with rc_context({"svg.hashsalt": "galore-mem", "svg.fonttype": "none", "font.size": 9}):
        figure = figure_of(figsize=(INCHES[0], INCHES[1] * len(runs)), layout="constrained")
        axes = figure.subplots(len(runs), 1, squeeze=False, sharey=True)[:, 0]
        for panel, run in zip(axes, runs, strict=True):
            _panel(panel, result, run, unit)
        axes[0].set_ylim(0, ceiling(runs) / unit)
        entries = {
            name: handle for panel in axes for handle, name in zip(*panel.get_legend_handles_labels(), strict=True)
        }
        figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=len(entries), frameon=False)
        figure.suptitle(title(result), fontsize=10)
        out = BytesIO()
        metadata = {"Date": None} if suffix == ".svg" else None
        figure.savefig(out, format=suffix[1:], dpi=130, metadata=metadata)
    return out.getvalue()


def drawn(result: SimulateResult) -> list[Simulation]:
    """The runs that have a timeline. Raises `InputError` for more than one picture takes."""
    runs = [run for run in result.estimates if run.timeline is not None]
    if len(runs) > PANELS:
        raise InputError(f"a timeline shows up to {PANELS} runs, these are {len(runs)}; name methods with --method")
    return runs


def title(result: SimulateResult) -> str:
    m, s = result.model, result.setup
    shape = "" if s["batch_size"] is None else f", batch {s['batch_size']} x {s['seq_len']} tokens"
    return f"{m['name']}{shape}" + ("" if s["recipe"] is None else f", {s['recipe']}")


def unit_of(runs: Sequence[Simulation]) -> int:
    return GIB if max(run.device_bytes for run in runs) >= GIB else MIB


def spans(line: Timeline) -> Iterator[Span]:
    """Phases that follow each other; micro-batches and steps of the same name together."""
    begins = [*line.phases, (line.events, "")]
    parts = [Span(name, at, begins[i + 1][0]) for i, (at, name) in enumerate(line.phases)]
    for name, group in groupby(parts, key=lambda span: span.name):
        those = list(group)
        yield Span(name, those[0].start, those[-1].end)


def room(run: Simulation) -> int | None:
    """Bytes that the allocator can have of the card; None without one."""
    return None if run.fits is None else run.fits.capacity_bytes - run.outside_allocator_bytes


def ceiling(runs: Sequence[Simulation]) -> int:
    """Bytes at the upper end of the scale: room for what is said of the peak, and the card's limit if that is near."""
    top = max(max(run.peak_allocated_bytes, run.peak_reserved_bytes or 0) for run in runs)
    limits = [limit for run in runs if (limit := room(run)) is not None and limit < 2 * top]
    return max([top, *limits]) * 118 // 100


def summit(line: Timeline, phase: str) -> int:
    """The index of the highest point in a phase: that of the peak, which may be reached in others too."""
    starts = [at for at, _ in line.phases]

    def high(i: int) -> tuple[bool, int]:
        within = bisect_right(starts, line.at[i]) - 1
        return within >= 0 and line.phases[within][1] == phase, sum(line.live[i])

    return max(range(len(line.at)), key=high)


def label(run: Simulation) -> str:
    """What is said of the peak."""
    assert run.at_peak is not None
    return f"{format_bytes(run.peak_allocated_bytes)}, {where(run.at_peak.place)}"


def _panel(panel: Any, result: SimulateResult, run: Simulation, unit: int) -> None:
    line = run.timeline
    assert line is not None
    at = list(line.at)
    layers = [[live[i] / unit for live in line.live] for i in range(len(CATEGORIES))]
    names = [name.replace("_", " ") for name in CATEGORIES]
    panel.stackplot(at, layers, labels=names, colors=list(COLORS.values()), linewidth=0)
    if line.reserved is not None:
        panel.plot(at, [n / unit for n in line.reserved], color=RESERVED, linewidth=1, label="reserved")
    limit = room(run)
    if limit is not None:
        panel.axhline(limit / unit, color=LIMIT, linewidth=1, linestyle="--", label=f"room on {result.setup['gpu']}")
    if line.refused_at is not None:
        panel.axvline(line.refused_at, color=LIMIT, linewidth=1, label="out of memory")
    for span in spans(line):
        panel.axvline(span.start, color="#00000033", linewidth=0.6)
        if span.end - span.start > NARROW * line.events:
            middle = (span.start + span.end) / 2
            panel.text(
                middle, 1.01, span.name, ha="center", va="bottom", fontsize=8, transform=panel.get_xaxis_transform()
            )
    i = summit(line, run.peak.name)
    left = line.at[i] > line.events / 2
    height = sum(line.live[i]) / unit
    panel.plot([line.at[i]], [height], marker="v", color="black", markersize=5)
    panel.annotate(
        label(run), (line.at[i], height), xytext=(-8 if left else 8, 5), textcoords="offset points",
        ha="right" if left else "left", fontsize=8, bbox={"fc": "white", "ec": "none", "alpha": 0.8, "pad": 1},
    )  # fmt: skip
    panel.set_xlim(0, line.events)
    panel.set_ylabel("GiB" if unit == GIB else "MiB")
    panel.set_xlabel("allocations and releases")
    panel.set_title(f"{run.method} ({run.implementation})", loc="left", fontsize=9, pad=16)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
