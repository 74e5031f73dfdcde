"""Size tables: one convention for a whole table, one formula for each of its rows, chosen by what they print.

Choosing cell by cell would let chance reproduce anything. So counts, unit and rounding are chosen once for a
table, the formula once for a method's row; every other cell of the table has to live with them. A table that
repeats another paper's digits is not allowed a choice of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from galore_mem.papers.conventions import FORMULAS, OWN, ROUNDINGS, Parts, Scale, Subject, scales
from galore_mem.papers.printed import Printed, text
from galore_mem.papers.result import NOT_REPRODUCED, REPRODUCED, Cell, shown


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """One cell as the paper prints it, and what it is about. (Compared by identity: digits repeat.)"""

    row: str
    column: str
    printed: Printed
    subject: Subject
    formulas: tuple[str, ...]
    why: str


@dataclass(frozen=True, slots=True)
class Block:
    """A rectangle of cells of one table: see the head of `cells.toml`."""

    id: str
    paper: str
    table: str
    quantity: str
    unit: str
    source: str
    quotes: Block | None
    against: str | None
    entries: tuple[Entry, ...]

    def printed_bytes(self, column: str, unit_bytes: int) -> dict[str, Fraction]:
        """What the rows print in a column, by row, at this many bytes per unit."""
        return {e.row: e.printed.value * unit_bytes for e in self.entries if e.column == column}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a convention makes of a cell: exact, and in units of the last printed digit."""

    value: Fraction
    units: int
    same: bool


@dataclass(frozen=True, slots=True)
class Choice:
    """The convention of a table: counts and unit, rounding, and a formula for each method."""

    scale: Scale
    rounding: str
    formulas: Mapping[str, str]

    def name(self, method: str) -> str:
        return f"{self.formulas[method]}; {whole_table(self.scale, self.rounding)}"


def whole_table(scale: Scale, rounding: str) -> str:
    return f"{scale.name}; {rounding}"


def read(data: Mapping[str, Any]) -> dict[str, Block]:
    """The blocks of `cells.toml` by id. Rows that quote another block have its formulas."""
    blocks: dict[str, Block] = {}
    for raw in data["block"]:
        quoted = blocks[raw["quotes"]] if "quotes" in raw else None
        blocks[raw["id"]] = _block(raw, data["nominal"], quoted)
    return blocks


def _block(raw: Mapping[str, Any], nominal: Mapping[str, int], origin: Block | None) -> Block:
    quoted = {e.subject.method: e.formulas for e in origin.entries} if origin else {}
    entries = []
    for row in raw["rows"]:
        method: str = row["method"]
        formulas = quoted.get(method) or tuple(row.get("formulas", (OWN,)))
        columns = zip(raw["columns"], raw["models"], raw["ranks"], row["printed"], strict=True)
        for column, model, rank, printed in columns:
            subject = Subject(model, method, row.get("rank", rank), nominal[model])
            why = row.get("why", "")
            entries.append(Entry(row["row"], column, Printed.parse(printed), subject, formulas, why))
    return Block(
        raw["id"], raw["paper"], raw["table"], raw["quantity"], raw["unit"], raw["source"],
        origin, raw.get("against"), tuple(entries),
    )  # fmt: skip


class Outcomes:
    """Everything the conventions make of a block's cells, worked out once. Where the convention is `given`, only
    that one, and the paper's own formula beside it."""

    def __init__(self, block: Block, against: Block | None = None, given: Choice | None = None) -> None:
        self.block = block
        self.scales = (given.scale,) if given else scales(block.unit)
        every = tuple(r for r in ROUNDINGS if block.quantity == "total" or r != "sum of rounded parts")
        self.roundings = (given.rounding,) if given else every
        self._found: dict[Entry, dict[tuple[str, Scale, str], Outcome]] = {}
        for entry in block.entries:
            found = self._found[entry] = {}
            for formula in entry.formulas:
                for scale in self.scales:
                    elsewhere = against.printed_bytes(entry.column, scale.unit_bytes) if against else {}
                    weights, states = self._parts(entry, formula, scale, elsewhere)
                    for rounding in self.roundings:
                        units = ROUNDINGS[rounding](weights, states, entry.printed.digits)
                        outcome = Outcome(weights + states, units, entry.printed.is_printed_by(units))
                        found[formula, scale, rounding] = outcome

    def _parts(self, entry: Entry, formula: str, scale: Scale, elsewhere: Mapping[str, Fraction]) -> Parts:
        """What a cell adds up, in the printed unit: weights and states, of which its table may show only one."""
        subject = replace(entry.subject, elsewhere=elsewhere) if elsewhere else entry.subject
        weights, states = FORMULAS[formula].parts(subject, scale.count(subject))
        quantity = self.block.quantity
        return (
            weights / scale.unit_bytes if quantity != "states" else Fraction(0),
            states / scale.unit_bytes if quantity != "weights" else Fraction(0),
        )

    def get(self, entry: Entry, formula: str, scale: Scale, rounding: str) -> Outcome:
        return self._found[entry][formula, scale, rounding]

    def of(self, entry: Entry) -> dict[str, Outcome]:
        """Every convention tried for a cell, by name."""
        return {
            f"{formula}; {whole_table(scale, rounding)}": outcome
            for (formula, scale, rounding), outcome in self._found[entry].items()
        }

    def choose(self) -> tuple[Choice, dict[str, int]]:
        """The convention that prints most cells (the first of equals), and how many each of them prints."""
        best: tuple[int, Choice] | None = None
        counts: dict[str, int] = {}
        for rounding in self.roundings:  # before the units: an odd unit is likelier than odd rounding
            for scale in self.scales:
                hits, formulas = self._best_formulas(scale, rounding)
                counts[whole_table(scale, rounding)] = hits
                if best is None or hits > best[0]:
                    best = hits, Choice(scale, rounding, formulas)
        assert best is not None
        return best[1], counts

    def _best_formulas(self, scale: Scale, rounding: str) -> tuple[int, dict[str, str]]:
        total = 0
        formulas: dict[str, str] = {}
        for method, entries in _by_method(self.block.entries).items():
            hits = {f: sum(self.get(e, f, scale, rounding).same for e in entries) for f in entries[0].formulas}
            formulas[method] = max(hits, key=lambda f: hits[f])  # the first of equals
            total += hits[formulas[method]]
        return total, formulas


def _by_method(entries: Iterable[Entry]) -> dict[str, list[Entry]]:
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.subject.method, []).append(entry)
    return groups


def cells(block: Block, outcomes: Outcomes, choice: Choice, equals: int = 0) -> Iterator[Cell]:
    """The block's cells under a convention; `equals` others print as many of them."""
    for entry in block.entries:
        method = entry.subject.method
        outcome = outcomes.get(entry, choice.formulas[method], choice.scale, choice.rounding)
        yield Cell(
            paper=block.paper, table=block.table, row=entry.row, column=entry.column,
            printed=entry.printed.text, unit=block.unit, value=outcome.value,
            shown=shown(entry.printed, outcome.value, outcome.units),
            convention=choice.name(method),
            verdict=REPRODUCED if outcome.same else NOT_REPRODUCED,
            note="; ".join(_notes(block, entry, outcomes, choice, outcome, equals)), source=block.source,
        )  # fmt: skip


def _notes(
    block: Block, entry: Entry, outcomes: Outcomes, choice: Choice, outcome: Outcome, equals: int
) -> Iterator[str]:
    digits = entry.printed.digits
    if choice.formulas[entry.subject.method] != OWN:
        own = outcomes.get(entry, OWN, choice.scale, choice.rounding)
        yield f"the method's own formula gives {text(own.units, digits)}"
    if block.quotes:
        yield f"repeats {block.quotes.paper}, {block.quotes.table}, under the same convention"
    elif outcome.same:
        if equals:
            yield f"weak evidence: {equals} other conventions print as many cells of this table"
    else:
        if entry.why:
            yield entry.why
        tried = outcomes.of(entry)
        printing = [name for name, other in tried.items() if other.same]
        if printing:
            yield f"would be printed, but fewer cells of the table, by: {printing[0]} ({len(tried)} tried)"
        else:
            near = min(tried, key=lambda name: entry.printed.distance(tried[name].units))
            yield f"none of {len(tried)} conventions tried prints it; nearest {text(tried[near].units, digits)}: {near}"
