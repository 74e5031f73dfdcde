"""Of docs/accuracy.md, `estimate` beside `simulate` on CUDA."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from agreement import COMPARED, SETS
from errors import Pair, bar, by_what, details, percent, size_of, spread, table, text
from record import Line

BARS = (0.002, 0.01)  # at the median, at worst
PER_PHASE = 0.005  # of every phase of the bundled models


def pairs(lines: Sequence[Line]) -> Iterator[Pair]:
    """What is simulated stands where elsewhere the measured is."""
    for line in lines:
        found = line["found"]
        for phase, (estimated, simulated) in found["phases"].items():
            yield Pair("estimate", line["key"], found["model"], found["method"], phase, simulated, estimated)


def section(lines: Sequence[Line]) -> Iterator[str]:
    everything = list(pairs(lines))
    yield "## `estimate` beside `simulate` on CUDA"
    yield text(
        "The closed form against the real model and the real optimizer, traced without values, on a card without "
        "limits (an A100 where multiprocessors count). The highest bytes of each phase, tensors and kernels' own "
        "buffers in blocks of 512 bytes; errors are the estimate's, relative to the simulation."
    )
    yield bars(lines)
    yield by_what(sorted(everything, key=lambda pair: COMPARED.index(pair.what)), "phase")
    yield "### What makes the difference, by operation"
    yield text(
        "Looked for in the same models with three layers, block by block at each phase's highest moment. Positive: "
        "only the simulation has it. Negative: only the estimate, which knows its blocks by size alone."
    )
    yield by_operation(lines)
    yield "### What the allocator's blocks add"
    yield from slack(lines)
    yield from details("Every model and method: the largest difference of its peaks", *every(lines, everything))


def bars(lines: Sequence[Line]) -> str:
    rows = []
    for name in SETS:
        own = list(pairs([line for line in lines if line["found"]["of"] == name]))
        if own:
            s = spread(own)
            cases = len({pair.case for pair in own})
            far = sum(abs(pair.error) > PER_PHASE for pair in own)
            rows.append(
                (
                    name, str(cases), str(s.count), size_of(s.middle), size_of(s.high), percent(s.worst.error),
                    f"{s.worst.case}: {s.worst.what}" if s.worst.error else "", str(far),
                )
            )  # fmt: skip
    columns = {
        "what": False, "runs": True, "peaks": True, f"median (bar {bar(BARS[0])})": True, "95 %": True,
        f"worst (bar {bar(BARS[1])})": True, "where": False, f"above {bar(PER_PHASE)}": True,
    }  # fmt: skip
    return table(columns, rows)


def by_operation(lines: Sequence[Line]) -> str:
    """One row for what differs: over how many bytes, in how many peaks, in which phases and models."""
    sizes: dict[str, list[int]] = {}
    phases: dict[str, dict[str, None]] = {}
    models: dict[str, Counter[str]] = {}
    for line in lines:
        for phase, rows in line["found"]["differences"].items():
            for name, size in rows:
                sizes.setdefault(name, []).append(size)
                phases.setdefault(name, {})[phase] = None
                models.setdefault(name, Counter())[line["found"]["model"]] += 1
    columns = {"what": False, "bytes": True, "peaks": True, "phases": False, "models": False}
    return table(
        columns,
        (
            (name, _range(sizes[name]), str(len(sizes[name])), ", ".join(phases[name]), _some(list(models[name])))
            for name in sorted(sizes, key=lambda name: (-max(map(abs, sizes[name])), name))
        ),
    )


def _range(sizes: Sequence[int]) -> str:
    low, high = min(sizes), max(sizes)
    return f"{low:+,}" if low == high else f"{low:+,} to {high:+,}"


def _some(names: Sequence[str], shown: int = 3) -> str:
    more = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {more} more" if more > 0 else "")


def slack(lines: Sequence[Line]) -> Iterator[str]:
    """Of the simulation alone: what torch counts as allocated beyond the tensors' own blocks."""
    found: dict[str, list[tuple[float, int, str]]] = {}
    for line in lines:
        for phase, added in line["found"]["slack"].items():
            found.setdefault(phase, []).append((added / line["found"]["phases"][phase][1], added, line["key"]))
    yield text(
        "The caching allocator gives a block whole where less than 1 MiB (of a large block; 512 bytes of a small one) "
        "would be left, and `max_memory_allocated` counts it whole. `simulate` replays that and says it apart (slack); "
        "`estimate` has the tensors' own bytes, and is compared with those. Added to each phase's highest moment:"
    )
    columns = {"phase": False, "runs": True, "median": True, "worst": True, "its bytes": True, "where": False}
    rows = []
    for phase, ones in found.items():
        ordered = sorted(ones)
        part, added, key = ordered[-1]
        rows.append((phase, str(len(ones)), size_of(ordered[len(ones) // 2][0]), size_of(part), f"{added:,}", key))
    yield table(columns, rows)


def every(lines: Sequence[Line], everything: Sequence[Pair]) -> Iterator[str]:
    for name in SETS:
        keys = {line["key"] for line in lines if line["found"]["of"] == name}
        rows: dict[str, list[Pair]] = {}
        for pair in everything:
            if pair.case in keys:
                rows.setdefault(pair.method if name != SETS[0] else pair.family, []).append(pair)
        if rows:
            columns = {name: False, "peaks": True, "largest difference": True, "bytes": True, "where": False}
            yield table(columns, (_largest(one, own) for one, own in rows.items()))


def _largest(name: str, own: Sequence[Pair]) -> tuple[str, ...]:
    worst = spread(own).worst
    where = f"{worst.case}: {worst.what}" if worst.error else ""
    return name, str(len(own)), percent(worst.error), f"{worst.predicted - worst.measured:+,}", where
