"""Predictions beside measurements: signed errors, their spread, and the tables of the documents."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import isinf
from statistics import median, quantiles
from textwrap import fill
from typing import NamedTuple

from galore_mem.report.tables import Column, Table, to_markdown

PEAK = "peak"  # what a `Pair` is of: the highest moment of a whole run


class Pair(NamedTuple):
    """What a predictor said of one case beside what was measured, in bytes. `what` is a phase (forward, backward,
    step, refresh), a component (weights, gradients, optimizer_state, activations) or the whole run's `peak`."""

    predictor: str
    case: str
    family: str
    method: str
    what: str
    measured: int
    predicted: int

    @property
    def error(self) -> float:
        """Signed: positive where too much was predicted."""
        if self.measured == 0:
            return 0.0 if self.predicted == 0 else float("inf")
        return (self.predicted - self.measured) / self.measured


class Spread(NamedTuple):
    """Of signed errors their median; of their sizes the median, the 95th percentile; and the pair with the largest."""

    count: int
    equal: int
    signed: float
    middle: float
    high: float
    worst: Pair


def spread(pairs: Sequence[Pair]) -> Spread:
    sizes = [abs(pair.error) for pair in pairs]
    high = quantiles(sizes, n=20, method="inclusive")[-1] if len(sizes) > 1 else sizes[0]
    return Spread(
        len(pairs), sum(pair.measured == pair.predicted for pair in pairs), median(pair.error for pair in pairs),
        median(sizes), high, max(pairs, key=lambda pair: abs(pair.error)),
    )  # fmt: skip


def grouped(pairs: Iterable[Pair], key: Callable[[Pair], str]) -> dict[str, list[Pair]]:
    """Pairs by a key, in the order in which keys come."""
    found: dict[str, list[Pair]] = {}
    for pair in pairs:
        found.setdefault(key(pair), []).append(pair)
    return found


# -- Markdown ------------------------------------------------------------------------------------------------


def text(said: str) -> str:
    """A paragraph."""
    return fill(" ".join(said.split()), 118, break_on_hyphens=False, break_long_words=False)


def table(columns: Mapping[str, bool], rows: Iterable[Sequence[str]]) -> str:
    """A column's value says whether it is aligned to the right."""
    return to_markdown(Table("", tuple(Column(n, right=r) for n, r in columns.items()), tuple(map(tuple, rows))))


def percent(value: float, places: int = 3) -> str:
    """Signed; with as many more places as show that it is not nothing."""
    if value == 0 or isinf(value):
        return "0" if value == 0 else "all"
    while places < 12 and not round(abs(value) * 100, places):
        places += 1
    return f"{value:+.{places}%}".replace("%", " %")


def size_of(value: float) -> str:
    """Without the sign."""
    return percent(value).lstrip("+-")


def bar(value: float) -> str:
    """A round number of percents."""
    return f"{value * 100:g} %"


OPENS, ENDS, CLOSES = "<details><summary>", "</summary>", "</details>"


def details(title: str, *paragraphs: str) -> Iterator[str]:
    """What a reader can open."""
    yield f"{OPENS}{title}{ENDS}"
    yield from paragraphs
    yield CLOSES


SPREAD = {"pairs": True, "exact": True, "median, signed": True, "median": True, "95 %": True, "worst": True}


def spread_cells(pairs: Sequence[Pair]) -> tuple[str, ...]:
    """Under `SPREAD`."""
    s = spread(pairs)
    return str(s.count), str(s.equal), percent(s.signed), size_of(s.middle), size_of(s.high), percent(s.worst.error)


def by_what(pairs: Iterable[Pair], title: str = "phase or component") -> str:
    """One row for each phase and component: how far off, and the case in which it is worst."""
    groups = grouped(pairs, lambda pair: pair.what)
    rows = ((what, *spread_cells(group), where(spread(group).worst, what=False)) for what, group in groups.items())
    return table({title: False, **SPREAD, "worst case": False}, rows)


def where(worst: Pair, *, what: bool = True) -> str:
    """The case of an error; nothing where there is none."""
    return "" if worst.error == 0 else f"{worst.case}: {worst.what}" if what else worst.case


def by_predictor(pairs: Iterable[Pair], key: Callable[[Pair], str], title: str) -> str:
    """One row for each value of a key and predictor: the worst error of a run's peak, the worst of everything, and
    where that is."""
    rows = []
    for value, group in sorted(grouped(pairs, key).items()):
        for name, own in sorted(grouped(group, lambda pair: pair.predictor).items()):
            peaks = [pair for pair in own if pair.what == PEAK]
            worst = spread(own).worst
            cases = str(len({pair.case for pair in own}))
            highest = percent(spread(peaks).worst.error) if peaks else "-"
            rows.append((value, f"`{name}`", cases, highest, percent(worst.error), where(worst)))
    columns = {title: False, "predictor": False, "cases": True, "peak, worst": True, "any, worst": True, "where": False}
    return table(columns, rows)


def apart(paragraphs: Iterable[str], other: str) -> tuple[list[str], list[str]]:
    """A document without what a reader can open, each replaced by a link to the `other` document; and that one's
    sections. What is opened is under the heading of its section."""
    kept: list[str] = []
    moved: list[str] = []
    heading, into = "", kept
    for paragraph in paragraphs:
        if paragraph.startswith("## "):
            heading = paragraph.removeprefix("## ")
        if paragraph.startswith(OPENS):
            title = paragraph.removeprefix(OPENS).removesuffix(ENDS)
            kept.append(f"{title}: [{other}]({other}#{anchor(heading)}).")
            into = moved
            moved += [f"## {heading}", title + "."]
        elif paragraph == CLOSES:
            into = kept
        else:
            into.append(paragraph)
    return kept, moved


def anchor(heading: str) -> str:
    """What a heading is called in links."""
    return "".join(c for c in heading.lower().replace(" ", "-") if c.isalnum() or c == "-")
