"""From the record of `benchmarks/simulate.py` to docs/simulate.md."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from errors import percent, table, text
from families_report import families
from record import VERSIONS, Line

from galore_mem.memory.tensor import CATEGORIES

GIB = 2**30
MEM_TRACKER_SAYS = {"torch-loop": 50.69, "torch-foreach": 62.76}  # GiB, in an earlier run, of torch 2.13
WORKSPACES = 2 * 8_519_680  # bytes of cuBLAS, which MemTracker does not know


def document(lines: Sequence[Line], wanted: Mapping[str, int]) -> str:
    """Every number in it is from the record."""
    by_part = {name: [one for one in lines if one["part"] == name] for name in wanted}
    parts = ["# Simulated: large models, and every model type", head(lines, by_part, wanted)]
    if by_part["large"]:
        parts += large(by_part["large"])
    if by_part["memtracker"]:
        parts += memtracker(by_part["memtracker"], by_part["large"])
    if by_part["families"]:
        parts += families(by_part["families"])
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def head(lines: Sequence[Line], by_part: Mapping[str, Sequence[Line]], wanted: Mapping[str, int]) -> str:
    dates = sorted({one["date"] for one in lines})
    stack = sorted({f"{name} {one[name]}" for one in lines for name in VERSIONS if name in one})
    counts = "; ".join(f"{name} {len(by_part[name])} of {n}" for name, n in wanted.items())
    days = " to ".join(dict.fromkeys((dates[0], dates[-1]))) if dates else "no day"
    return text(
        f"Written by `python benchmarks/simulate.py` from what was run on {days}: {', '.join(stack)}, Python "
        f"{platform.python_version()}, on a CPU. Runs in the record: {counts}. How right simulations are is in "
        f"[accuracy.md](accuracy.md)."
    )


# -- large models --------------------------------------------------------------------------------------------


def large(lines: Sequence[Line]) -> Iterator[str]:
    yield "## Without weights and without a GPU"
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
