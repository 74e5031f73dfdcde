"""Of docs/accuracy.md, runs that others measured on GPUs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from errors import Pair, by_predictor, by_what, details, percent, size_of, spread, table, text
from record import Line

AS_THEY_RAN = "tracer, their loop and load"
PREDICTORS = ("estimate", "estimate --reserved", "simulate", AS_THEY_RAN)
# of the allocated peak: at the median, at worst
BARS = {
    "estimate": (0.005, 0.02), "estimate --reserved": (0.005, 0.02), "simulate": (0.002, 0.01),
    AS_THEY_RAN: (0.002, 0.01),
}  # fmt: skip
PEAK, RESERVED = "peak", "reserved"
BOTH = ("estimate --reserved", "simulate")
NAMED = {"loaded": "allocated after the load", "after the first step": "what the first step leaves"}


def pairs(lines: Sequence[Line]) -> Iterator[Pair]:
    """The allocated peak, peaks of phases, what stays, what lies there after the load, what was reserved."""
    for line in lines:
        found = line["found"]
        right = dict(_sizes(found["measured"]))
        for predictor in PREDICTORS:
            for what, predicted in _sizes(found.get(predictor) or {}):
                names = found["title"], found["family"], f"{found['method']} ({found['implementation']})"
                yield Pair(predictor, *names, what, right[what], predicted)


def _sizes(found: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    if found.get("peak"):
        yield PEAK, found["peak"]
    yield from found.get("phases", {}).items()
    yield from found.get("residents", {}).items()
    for name, told in NAMED.items():
        if found.get(name):
            yield told, found[name]
    if found.get("reserved"):
        yield RESERVED, found["reserved"]


def section(lines: Sequence[Line]) -> Iterator[str]:
    everything = list(pairs(lines))
    trained = [line for line in lines if any(line["found"].get(name) for name in PREDICTORS)]
    yield "## Runs that others measured on GPUs"
    yield from intro(lines)
    yield bars(everything)
    yield alike(everything)
    for predictor in PREDICTORS:
        yield f"### `{predictor}` beside others' runs"
        yield by_what(pair for pair in everything if pair.predictor == predictor)
    yield from (
        "### What remains",
        *remains(lines),
        "### The worst of each family, and of each method",
        by_predictor(_peaks(everything), lambda pair: pair.family, "family"),
        by_predictor(_peaks(everything), lambda pair: pair.method, "method"),
        "### Outside the allocator",
        text(
            "What the CUDA context takes is measured, not derived; it differs by card and driver. `galore-mem` adds a "
            "constant for the card: of these two from these runs, of others from out-of-memory messages of users."
        ),
        outside(lines),
    )
    yield from details(f"Every run: {len(trained)}", legend(), every(trained))


def intro(lines: Sequence[Line]) -> Iterator[str]:
    cards = sorted({line["found"]["gpu"] for line in lines})
    yield text(
        f"{len(lines)} runs ({', '.join(cards)}) that others measured and published: the figures of vramcalc 0.1.2, "
        f"fitcheck-llm 0.3.1 and torch-preflight 0.5.0 (their source distributions on PyPI, MIT) and torchao's profile "
        f"of GaLore. They are in `benchmarks/accuracy/gpu_runs.jsonl` and `gpu_published.jsonl`, with the source of "
        f"each. No number is fitted to them."
    )
    yield text(
        f"`estimate` and `simulate` are the commands, told what a source's loop keeps (`--keep-logits`, "
        f"`--keep-gradients`, `--use-cache`, `--load`, `--transformers`, `--torch`). *{AS_THEY_RAN.capitalize()}* is "
        f"no command: the same tracer and allocator on each source's own loop (`benchmarks/accuracy/gpu_loops.py`, as "
        f"data), from its own way to load the model, with the cache emptied where it empties it; two runs of inference "
        f"and encoders without a head, too. `estimate` alone counts tensors in blocks of 512 bytes; with `--reserved` "
        f"it follows the allocator. Where a release is not described, the nearest of the same major version stands for "
        f"it."
    )
    yield taken()


def bars(everything: Sequence[Pair]) -> str:
    rows = []
    for predictor, (middle, worst) in BARS.items():
        peaks = [pair for pair in _peaks(everything) if pair.predictor == predictor]
        if not peaks:
            continue
        s = spread(peaks)
        rows.append(
            (
                f"`{predictor}`", str(len(peaks)), size_of(s.middle), f"{middle:.1%}", percent(s.worst.error),
                f"{worst:.1%}", s.worst.case,
            )
        )  # fmt: skip
    columns = {
        "allocated peak": False, "runs": True, "median": True, "bar": True, "worst": True, "its bar": True,
        "worst case": False,
    }  # fmt: skip
    return table(columns, rows)


def alike(everything: Sequence[Pair]) -> str:
    """`estimate --reserved` beside `simulate`, on runs that both were asked about."""
    said = []
    for what, called in ((PEAK, "allocated"), (RESERVED, "reserved")):
        both = [{p.case: p.predicted for p in everything if (p.predictor, p.what) == (name, what)} for name in BOTH]
        apart = [abs(both[0][case] - both[1][case]) for case in both[0] if case in both[1]]
        if apart:
            said.append(f"the {called} peak in {apart.count(0)} of {len(apart)}, apart by at most {max(apart):,} bytes")
    return text(f"`{BOTH[0]}` and `{BOTH[1]}` say the same byte: {'; '.join(said)}.") if said else ""


def _peaks(everything: Sequence[Pair]) -> list[Pair]:
    return [pair for pair in everything if pair.what == PEAK]


def remains(lines: Sequence[Line]) -> Iterator[str]:
    """What the errors of `simulate` are, and bytes after the load of runs of one model, method and format."""
    yield text(
        "Most of what remains of `simulate`'s errors is room that the allocator leaves in its blocks: of a block above "
        "1 MiB nothing is cut off where no more than 1 MiB would be left. How much that is depends on the order in "
        "which a model came to the card. `estimate` does not count it. Of a quantized model it differs from run to "
        "run, although neither batch nor attention is known to a load. Why is not known: a load by several threads "
        "would vary as much, but transformers has none where it quantizes (5.23 and, by pull request 44576, releases "
        "since March 2026), and that load is replayed. The GPT-2 run, whose release of transformers was not recorded, "
        "is not explained."
    )
    groups: dict[tuple[str, ...], list[tuple[int, int]]] = {}
    for found in (line["found"] for line in lines):
        if "loaded" in found["measured"] and found.get(AS_THEY_RAN) and "loaded" in found[AS_THEY_RAN]:
            name = tuple(found["title"].split()[1:4])
            groups.setdefault(name, []).append((found["measured"]["loaded"], found[AS_THEY_RAN]["loaded"]))
    columns = {
        "model": False,
        "method": False,
        "format": False,
        "runs": True,
        "measured from": True,
        "to": True,
        "traced": True,
    }
    yield table(
        columns,
        (
            (*name, str(len(of)), f"{min(m for m, _ in of):,}", f"{max(m for m, _ in of):,}", f"{of[0][1]:,}")
            for name, of in groups.items()
            if len(of) > 1
        ),
    )


def taken() -> str:
    return text(
        "Four things about these loops are not written down and were read off their figures: how a source loads a "
        "model that is not quantized (in bytes after the load, `model.to(device)` is exact on the T4, and "
        "`from_pretrained` with a device map on the A6000); that inputs and labels are one tensor; that "
        "torch-preflight's runs were in bfloat16, which torch says a T4 supports; and that they left the decoder's "
        "`use_cache` as it is."
    )


def outside(lines: Sequence[Line]) -> str:
    found: dict[tuple[str, int], list[int]] = {}
    for line in lines:
        one = line["found"]
        if "outside" in one["measured"]:
            found.setdefault((one["gpu"], one["outside"]), []).append(one["measured"]["outside"])
    columns = {"card": False, "runs": True, "measured from": True, "to": True, "constant": True}
    return table(
        columns,
        ((card, str(len(of)), f"{min(of):,}", f"{max(of):,}", f"{ours:,}") for (card, ours), of in found.items()),
    )


def legend() -> str:
    return text(
        "Signed errors of the allocated peak, of the phases that were recorded, and of what was reserved. A run is its "
        "name in the source, model, method, format, batch x sequence and attention."
    )


def every(lines: Sequence[Line]) -> str:
    columns = {
        "run": False, "measured peak": True, **dict.fromkeys(PREDICTORS, True),
        **{f"phases, {name}": False for name in PREDICTORS}, "reserved": True,
        **{f"{name}, reserved": True for name in PREDICTORS[1:]},
    }  # fmt: skip
    return table(columns, (tuple(_cells(line["found"])) for line in lines))


def _cells(found: Mapping[str, Any]) -> Iterator[str]:
    right = found["measured"]
    yield found["title"]
    yield f"{right['peak']:,}" if "peak" in right else "-"
    for name in PREDICTORS:
        yield _error(found.get(name), right, "peak")
    for name in PREDICTORS:
        said = found.get(name) or {}
        yield ", ".join(f"{p} {_error(said.get('phases'), right['phases'], p)}" for p in said.get("phases", {}))
    yield f"{right['reserved']:,}" if "reserved" in right else "-"
    for name in PREDICTORS[1:]:
        yield _error(found.get(name), right, "reserved")


def _error(said: Mapping[str, Any] | None, right: Mapping[str, Any], name: str) -> str:
    return percent(said[name] / right[name] - 1) if said and name in said and name in right else "-"
