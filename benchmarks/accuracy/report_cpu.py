"""Of docs/accuracy.md, the real training steps on the CPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cpu import COUNTED, RESIDENTS
from cpu_cases import EAGER, config
from errors import PEAK, Pair, bar, by_predictor, by_what, details, percent, size_of, spread, table, text
from record import Line

PREDICTORS = ("estimate", "simulate")
BARS = {"estimate": (0.01, 0.02), "simulate": (0.005, 0.015)}  # of a run's peak: at the median, at worst
EXPLAINED = 0.005  # from here on a difference is listed by itself
ACTIVATIONS = "forward above weights and state"
ORDER = (PEAK, *COUNTED, ACTIVATIONS, *RESIDENTS)


def pairs(lines: Sequence[Line]) -> Iterator[Pair]:
    """A run's peak, its phases, what of forward is neither weight nor state, and what stays."""
    for line in lines:
        found = line["found"]
        right = dict(_sizes(found["measured"]))
        for predictor in PREDICTORS:
            if found[predictor] is not None:
                for what, predicted in _sizes(found[predictor]):
                    names = line["key"], found["family"], f"{found['method']} ({found['implementation']})"
                    yield Pair(predictor, *names, what, right[what], predicted)


def _sizes(found: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    phases, stays = found["phases"], found["residents"]
    yield PEAK, max(phases.values())
    yield from phases.items()
    yield ACTIVATIONS, phases["forward"] - stays["weights"] - stays["optimizer_state"]
    yield from stays.items()


def section(lines: Sequence[Line]) -> Iterator[str]:
    everything = list(pairs(lines))
    yield "## Real training steps on the CPU"
    yield intro(lines)
    yield bars(everything)
    for predictor in PREDICTORS:
        yield f"### `{predictor}` beside real steps"
        own = (pair for pair in everything if pair.predictor == predictor)
        yield by_what(sorted(own, key=lambda pair: ORDER.index(pair.what)))
    yield text(
        "What is left of most are numbers of Python that become tensors inside C++, where no dispatch mode sees them, "
        "8 bytes each; and of `estimate` the buffers of a model, which are no parameters (position ids, rotary "
        "frequencies)."
    )
    yield from large_ones(everything)
    yield "### The worst of each family, of each method, and of each way to train"
    yield text("Of every peak, phase and component. (A dash: `estimate` has no forward pass of this family.)")
    yield by_predictor(everything, lambda pair: pair.family, "family")
    yield by_predictor(everything, lambda pair: pair.method, "method")
    by_way = (pair._replace(method=way) for line in lines for way in ways(line["found"]) for pair in pairs([line]))
    yield by_predictor(by_way, lambda pair: pair.method, "way")
    yield from details(f"Every case: {len(lines)}", legend(), every(lines))


def ways(found: Mapping[str, Any]) -> Iterator[str]:
    """How a case is trained, in words: its format, its attention, and every option."""
    options = {"attention": "eager" if found["model"] in EAGER else "sdpa", **found["options"]}
    yield f"format {found['recipe']}"
    yield f"attention {options['attention']}"
    yield "batch 1" if options["batch_size"] == 1 else "batch above 1"
    for name in ("gradient_checkpointing", "layerwise", "keep_gradients", "keep_logits"):
        if name in options:
            yield name.replace("_", " ") + (f" ({options[name]})" if name == "keep_logits" else "")
    if "gradient_accumulation" in options:
        yield "gradient accumulation"


def intro(lines: Sequence[Line]) -> str:
    kinds = {
        name: len({line["found"][key] for line in lines})
        for name, key in (("families", "family"), ("methods", "method"), ("formats", "recipe"))
    }
    wide, medium = config("llama", "wide"), config("llama", "medium")
    highest = max(max(line["found"]["measured"]["phases"].values()) for line in lines)
    return text(
        f"{len(lines)} training runs of {', '.join(f'{n} {name}' for name, n in kinds.items())}: models of "
        f"transformers with random weights, {wide['hidden_size']} wide with {wide['vocab_size']:,} tokens in fp32, "
        f"{medium['hidden_size']} and {medium['vocab_size']:,} otherwise, three layers or more, peaks up to "
        f"{highest / 2**20:,.0f} MiB. One thread, without oneDNN, whose scratch space is the processor's. *Measured* "
        f"is the most that torch's CPU allocator had handed out in a phase, every one of its events recorded from "
        f"before the first tensor: weights, gradients, state, activations and kernels' own buffers, all together. "
        f"*Forward* has the loss."
    )


def bars(everything: Sequence[Pair]) -> str:
    rows = []
    for predictor, (middle, worst) in BARS.items():
        peaks = [pair for pair in everything if pair.predictor == predictor and pair.what == PEAK]
        stays = [pair for pair in everything if pair.predictor == predictor and pair.what in RESIDENTS]
        inexact = {pair.case for pair in stays if pair.measured != pair.predicted}
        s = spread(peaks)
        rows.append(
            (
                f"`{predictor}`", str(len(peaks)), size_of(s.middle), bar(middle), percent(s.worst.error),
                bar(worst), s.worst.case, f"{len(peaks) - len(inexact)} of {len(peaks)}",
            )
        )  # fmt: skip
    columns = {
        "peak of a run": False, "cases": True, "median": True, "bar": True, "worst": True, "its bar": True,
        "worst case": False, "weights, gradients, state exact": True,
    }  # fmt: skip
    return table(columns, rows)


def large_ones(everything: Sequence[Pair]) -> Iterator[str]:
    """Every difference that asks for its reason."""
    far = sorted((pair for pair in everything if abs(pair.error) > EXPLAINED), key=lambda pair: -abs(pair.error))
    largest = max(everything, key=lambda pair: abs(pair.predicted - pair.measured))
    yield text(
        f"Differences above {bar(EXPLAINED)}: {len(far)} of {len(everything):,}. The largest in bytes is "
        f"{largest.predicted - largest.measured:+,} ({largest.predictor}, {largest.case}: {largest.what})."
    )
    if far:
        columns = {"predictor": False, "case": False, "what": False, "measured": True, "difference": True, "": True}
        yield table(
            columns,
            (
                (p.predictor, p.case, p.what, f"{p.measured:,}", f"{p.predicted - p.measured:+,}", percent(p.error))
                for p in far
            ),
        )


def legend() -> str:
    return text(
        "Measured bytes, and in parentheses how many more `estimate` and `simulate` say (a dash where there is no "
        "estimate). A case is a model, a method and its implementation, a format, batch x sequence, and options."
    )


def every(lines: Sequence[Line]) -> str:
    columns = {"case": False, **dict.fromkeys((*COUNTED, "what stays"), True)}
    return table(columns, ((line["key"], *_cells(line["found"])) for line in lines))


def _cells(found: Mapping[str, Any]) -> Iterator[str]:
    measured, said = found["measured"], [found[name] for name in PREDICTORS]
    for phase in COUNTED:
        right = measured["phases"].get(phase)
        yield "" if right is None else _cell(right, [one and one["phases"][phase] for one in said])
    yield _cell(_total(measured), [one and _total(one) for one in said])


def _total(found: Mapping[str, Any]) -> int:
    return sum(found["residents"].values())


def _cell(right: int, said: Sequence[int | None]) -> str:
    return f"{right:,} ({', '.join('-' if n is None else f'{n - right:+,}' if n != right else '0' for n in said)})"
