"""What `recompute` returns: one `Cell` per printed figure, and a summary per table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from galore_mem.papers.printed import Printed, half_up, text

SCHEMA = "galore-mem.papers/1"
REPRODUCED, NOT_REPRODUCED = "reproduced", "not_reproduced"
_DIGITS = 6  # decimals of a computed number in JSON


@dataclass(frozen=True, slots=True)
class Cell:
    """A printed figure and what the convention gives for it, in the printed unit.

    `value` is exact; `computed` is the same as a plain number, `shown` as text with the printed digits (and two more
    where those do not agree), rounded the way the convention says.
    """

    paper: str
    table: str
    row: str
    column: str
    printed: str
    unit: str
    value: Fraction
    shown: str
    convention: str
    verdict: str
    note: str
    source: str

    @property
    def reproduced(self) -> bool:
        return self.verdict == REPRODUCED

    @property
    def computed(self) -> int | float:
        """The value as JSON has it: an int where it is whole, else to six decimals."""
        value = Fraction(half_up(self.value, _DIGITS), 10**_DIGITS)
        return int(value) if value.denominator == 1 else float(value)

    def to_json(self) -> dict[str, Any]:
        names = ("paper", "table", "row", "column", "printed", "computed", "unit", "convention", "verdict", "note")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, slots=True)
class TableSummary:
    """How a table fares: `conventions` counts the cells each whole-table convention prints, in the order tried. Cells
    that repeat another table are not among these, nor figures that have a derivation of their own."""

    paper: str
    table: str
    cells: int
    reproduced: int
    conventions: Mapping[str, int]

    def to_json(self) -> dict[str, Any]:
        return {
            "paper": self.paper, "table": self.table, "cells": self.cells, "reproduced": self.reproduced,
            "conventions": dict(self.conventions),
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class PapersResult:
    """Every figure of one paper or of all. `reasons` says of each convention why it is tried."""

    cells: tuple[Cell, ...]
    tables: tuple[TableSummary, ...]
    reasons: Mapping[str, str]

    @property
    def reproduced(self) -> int:
        return sum(cell.reproduced for cell in self.cells)

    def to_json(self) -> dict[str, Any]:
        """The contract of `galore-mem papers --format json`."""
        return {
            "schema": SCHEMA,
            "cells": [cell.to_json() for cell in self.cells],
            "tables": [table.to_json() for table in self.tables],
            "conventions": dict(self.reasons),
        }


def shown(printed: Printed, value: Fraction, units: int) -> str:
    """A value beside its printed figure: with the same digits where it is that figure, else with two more."""
    digits = printed.digits
    return text(units, digits) if units == printed.low == printed.high else text(half_up(value, digits + 2), digits + 2)
