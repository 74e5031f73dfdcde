"""From the record of `benchmarks/simulate.py` to docs/simulate.md."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from statistics import median, quantiles
from textwrap import fill
from typing import Any, NamedTuple

from galore_mem.memory.tensor import CATEGORIES
from galore_mem.report.tables import Column, Table, to_markdown

GIB = 2**30
MEM_TRACKER_SAYS = {"torch-loop": 50.69, "torch-foreach": 62.76}  # GiB, in an earlier run, of torch 2.13
WORKSPACES = 2 * 8_519_680  # bytes of cuBLAS, which MemTracker does not know
Line = Mapping[str, Any]


class Peak(NamedTuple):
    """A phase's highest moment in one case: bytes as they should be, and as they are predicted."""

    case: str
    phase: str
    right: int
    said: int

    @property
    def error(self) -> float:
        return (self.said - self.right) / self.right


def document(lines: Sequence[Line], wanted: Mapping[str, int]) -> str:
    """Every number in it is from the record."""
    by_part = {name: [one for one in lines if one["part"] == name] for name in wanted}
    parts: list[str] = ["# Simulation beside reality", head(lines, by_part, wanted)]
    for name, write in WRITERS.items():
        if by_part[name]:
            parts += write(by_part[name])
    if by_part["memtracker"]:
        parts += memtracker(by_part["memtracker"], by_part["large"])
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def head(lines: Sequence[Line], by_part: Mapping[str, Sequence[Line]], wanted: Mapping[str, int]) -> str:
    dates = sorted({one["date"] for one in lines})
    stack = sorted({f"{name} {one[name]}" for one in lines for name in ("galore-mem", "torch", "transformers")})
    counts = "; ".join(f"{name} {len(by_part[name])} of {n}" for name, n in wanted.items())
    days = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return text(
        f"Written by `python benchmarks/simulate.py` from what was run on {days}: {', '.join(stack)}, Python "
        f"{platform.python_version()}, on a CPU. Tasks in the record: {counts}."
    )


def text(said: str) -> str:
    return fill(" ".join(said.split()), 118, break_on_hyphens=False, break_long_words=False)


def table(columns: Mapping[str, bool], rows: Iterable[Sequence[str]]) -> str:
    """Markdown; a column's value says whether it is aligned to the right."""
    return to_markdown(Table("", tuple(Column(n, right=r) for n, r in columns.items()), tuple(map(tuple, rows))))


def percent(value: float) -> str:
    return f"{value:+.4%}".replace("%", " %") if value else "0"


def spread(peaks: Sequence[Peak]) -> tuple[str, str, str]:
    """Median, 95th percentile and worst of the errors' sizes."""
    sizes = sorted(abs(peak.error) for peak in peaks)
    high = quantiles(sizes, n=20)[-1] if len(sizes) > 1 else sizes[0]
    return tuple(f"{n:.4%}".replace("%", " %") for n in (median(sizes), high, sizes[-1]))  # type: ignore[return-value]


# -- real runs on the CPU ------------------------------------------------------------------------------------


def cpu(lines: Sequence[Line]) -> Iterator[str]:
    peaks = [
        Peak(one["key"], phase, right, said) for one in lines for phase, (right, said) in one["found"]["phases"].items()
    ]
    same = sum(one["found"]["stays"][0] == one["found"]["stays"][1] for one in lines)
    middle, high, worst = spread(peaks)
    yield "## Real training steps on the CPU"
    yield text(
        f"{len(lines)} small models with random weights were trained for real, one thread, without oneDNN, every event "
        f"of torch's allocator recorded from before the first tensor; and simulated with `--device cpu`, every layer. "
        f"*Real* and *simulated*: the highest bytes in a phase, everything included. Weights, gradients and optimizer "
        f"state are equal to the byte in {same} of {len(lines)}."
    )
    yield text(f"{len(peaks)} peaks: median error {middle}, 95th percentile {high}, worst {worst} (bars: 1 %, -, 2 %).")
    rows = []
    for phase in dict.fromkeys(peak.phase for peak in peaks):
        of_phase = [peak for peak in peaks if peak.phase == phase]
        exact = sum(peak.right == peak.said for peak in of_phase)
        rows.append((phase, str(len(of_phase)), str(exact), *spread(of_phase)))
    yield table({"phase": False, "peaks": True, "equal": True, "median": True, "95 %": True, "worst": True}, rows)
    far = sorted((peak for peak in peaks if abs(peak.said - peak.right) > SCALARS), key=lambda peak: -abs(peak.error))
    yield text(
        f"Differences of up to {SCALARS} bytes are numbers of Python that become tensors inside C++, where no dispatch "
        f"mode sees them. Larger ones: {len(far)}."
    )
    if far:
        yield table(
            {"case": False, "phase": False, "real": True, "simulated": True, "difference": True, "error": True},
            ((p.case, p.phase, f"{p.right:,}", f"{p.said:,}", f"{p.said - p.right:+,}", percent(p.error)) for p in far),
        )
    yield "<details><summary>Every case</summary>"
    yield table(
        {"case": False, "forward": True, "backward": True, "step": True, "refresh": True, "stays": False},
        ((one["key"], *errors(one["found"]), stays(one["found"])) for one in lines),
    )
    yield "</details>"


SCALARS = 256  # bytes: numbers, 8 each; LoRA keeps one for each adapter


def errors(found: Mapping[str, Any]) -> Iterator[str]:
    for phase in ("forward", "backward", "step", "refresh"):
        if phase in found["phases"]:
            right, said = found["phases"][phase]
            yield f"{said:,} ({said - right:+,})"
        else:
            yield ""


def stays(found: Mapping[str, Any]) -> str:
    real, said = found["stays"]
    return "equal" if real == said else f"real {real}, simulated {said}"


# -- estimate and simulate -----------------------------------------------------------------------------------


def agreement(lines: Sequence[Line]) -> Iterator[str]:
    peaks = [
        Peak(one["key"], phase, simulated, said)
        for one in lines
        for phase, (said, simulated) in one["found"]["phases"].items()
    ]
    middle, high, worst = spread(peaks)
    models = dict.fromkeys(one["found"]["model"] for one in lines)
    yield "## `estimate` and `simulate` on CUDA"
    yield text(
        f"{len(models)} bundled models, pure-bf16, two sizes of batch and sequence (1 x 2,048 and 8 x 256, or the "
        f"longest that the model has learned), AdamW, GaLore and LoRA, with and without checkpointing: {len(peaks)} "
        f"peaks of {len(lines)} runs. The estimate's difference from the simulation: median {middle}, 95th percentile "
        f"{high}, worst {worst} (bar: 0.5 %)."
    )
    yield text(
        "What makes it was looked for in the same model with three layers, block by block at each phase's highest "
        "moment (bytes in blocks of 512; positive: only the simulation has it):"
    )
    found: dict[tuple[str, int], set[str]] = {}
    times: Counter[tuple[str, int]] = Counter()
    for one in lines:
        for phase, rows in one["found"]["differences"].items():
            for name, size in rows:
                key = (name.removeprefix("base_model.model."), size)
                times[key] += 1
                found.setdefault(key, set()).add(f"{one['found']['model']}:{phase}")
    yield table(
        {"what": False, "bytes": True, "peaks": True, "phases": False, "models": False},
        (
            (name, f"{size:+,}", str(times[name, size]), *places(found[name, size]))
            for name, size in sorted(found, key=lambda key: (-abs(key[1]), key[0]))
        ),
    )
    yield "<details><summary>Every model: the largest difference of its peaks</summary>"
    yield table(
        {"model": False, "peaks": True, "largest difference": True, "bytes": True, "where": False},
        (row(name, [peak for peak in peaks if peak.case.split()[0] == name]) for name in models),
    )
    yield "</details>"


def places(found: Iterable[str]) -> tuple[str, str]:
    pairs = [one.split(":") for one in sorted(found)]
    return ", ".join(sorted({phase for _, phase in pairs})), ", ".join(dict.fromkeys(name for name, _ in pairs))


def row(name: str, peaks: Sequence[Peak]) -> tuple[str, ...]:
    most = max(peaks, key=lambda peak: abs(peak.error))
    where = f"{most.case.removeprefix(name).strip()}: {most.phase}"
    return name, str(len(peaks)), percent(most.error), f"{most.said - most.right:+,}", where


# -- large models --------------------------------------------------------------------------------------------


def large(lines: Sequence[Line]) -> Iterator[str]:
    yield "## Large models, simulated on CUDA"
    yield text(
        "Batch 1, 2,048 tokens, pure-bf16, the real model and optimizer of transformers and torch; Llama-3.1-405B and "
        "DeepSeek-V3 with checkpointing. *Layers*: those whose programs ran; what the others do follows from them, "
        "event by event. Seconds are of the whole simulation (not the imports of torch and transformers), *process* is "
        "the most memory that its process had, *load* the machine's."
    )
    yield table(
        {
            "model": False, "method": False, "layers": False, "forward": True, "backward": True, "step": True,
            "refresh": True, "seconds": True, "process": True, "load": True,
        },
        ((*_named(one["found"]), *_peaks(one["found"]), *_cost(one["found"])) for one in lines),
    )  # fmt: skip
    by_run: dict[tuple[str, ...], list[Line]] = {}
    for one in lines:
        by_run.setdefault((one["found"]["model"], one["found"]["method"], one["found"]["implementation"]), []).append(
            one
        )
    pairs = [runs for runs in by_run.values() if len(runs) > 1]
    equal = sum(
        runs[0]["found"]["phases"] == runs[1]["found"]["phases"]
        and runs[0]["found"]["stays"] == runs[1]["found"]["stays"]
        for runs in pairs
    )
    yield text(
        "From shallow models and with every layer traced: the same bytes in every phase and category "
        f"({', '.join(CATEGORIES)}), and of what stays, in {equal} of {len(pairs)}."
    )
    for note in dict.fromkeys(note for one in lines for note in one["found"]["notes"] if "experts" in note):
        yield text(f"Taken for granted where there are {note}.")


def _named(found: Mapping[str, Any]) -> tuple[str, str, str]:
    layers = ", ".join(map(str, found["layers"])) + (" (all)" if len(found["layers"]) == 1 else "")
    return found["model"], f"{found['method']} ({found['implementation']})", layers


def _peaks(found: Mapping[str, Any]) -> Iterator[str]:
    for phase in ("forward", "backward", "step", "refresh"):
        yield f"{sum(found['phases'][phase]) / GIB:,.2f} GiB" if phase in found["phases"] else ""


def _cost(found: Mapping[str, Any]) -> tuple[str, str, str]:
    return f"{found['seconds']:.1f}", f"{found['process'] / GIB:.2f} GiB", f"{found['load']:.1f}"


def memtracker(lines: Sequence[Line], ours: Sequence[Line]) -> Iterator[str]:
    yield "## LLaMA-7B beside PyTorch's MemTracker"
    yield text(
        "torch.distributed._tools.MemTracker on the same machine, two steps of AdamW under FakeTensorMode (the second "
        "in steady state, as ours is after its first); building the model is in both times. Ours: the highest phase, "
        "without the two cuBLAS workspaces that MemTracker does not know."
    )
    rows = []
    for one in lines:
        code = one["found"]["implementation"]
        for our in ours:
            if our["found"]["model"] != "llama-7b" or our["found"]["implementation"] != code:
                continue
            peak = max(sum(live) for live in our["found"]["phases"].values()) - WORKSPACES
            rows.append(
                (
                    code, f"{one['found']['bytes'] / GIB:.2f} GiB", f"{MEM_TRACKER_SAYS[code]} GiB",
                    ", ".join(map(str, our["found"]["layers"])), f"{peak / GIB:.2f} GiB",
                    percent(peak / one["found"]["bytes"] - 1), f"{one['found']['seconds']:.1f} s",
                    f"{our['found']['seconds']:.1f} s", f"{one['found']['seconds'] / our['found']['seconds']:.0f}",
                    f"{one['found']['load']:.1f}, {our['found']['load']:.1f}",
                )
            )  # fmt: skip
    yield table(
        {
            "AdamW": False, "MemTracker": True, "noted before": True, "our layers": False, "ours": True, "error": True,
            "its time": True, "our time": True, "times faster": True, "load then": True,
        },
        rows,
    )  # fmt: skip


WRITERS: dict[str, Callable[[Sequence[Line]], Iterator[str]]] = {"cpu": cpu, "agreement": agreement, "large": large}
