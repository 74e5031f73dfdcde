"""Single figures in the text of a paper, against the derivations in `rules.py`.

A figure is reproduced by the first reading of its rule that rounds to its digits, or else by the first that has
them after cutting off further digits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from galore_mem.papers.printed import Printed, half_up, text, truncated
from galore_mem.papers.result import NOT_REPRODUCED, REPRODUCED, Cell, shown
from galore_mem.papers.rules import RULES, WHY_NOT, PrintedCell

ROUNDINGS: Mapping[str, Callable[[Fraction, int], int]] = {"rounded": half_up, "truncated": truncated}


@dataclass(frozen=True, slots=True)
class Claim:
    """A printed figure and the name of its rule."""

    paper: str
    table: str
    row: str
    column: str
    printed: str
    unit: str
    rule: str
    source: str


def read(data: Mapping[str, Any]) -> Iterator[Claim]:
    """The claims of `claims.toml`."""
    for group in data["claim"]:
        for raw in group["cells"]:
            yield Claim(
                group["paper"], group["table"], raw["row"], raw["column"], raw["printed"], group["unit"], raw["rule"],
                group["source"],
            )  # fmt: skip


def cell(claim: Claim, printed_cell: PrintedCell) -> Cell:
    """The claim under the first reading that prints it, else under the nearest one."""
    printed = Printed.parse(claim.printed)
    readings = tuple(RULES[claim.rule](printed_cell))
    tried = [(name, how, value) for how in ROUNDINGS for name, value in readings]
    found = next((t for t in tried if printed.is_printed_by(ROUNDINGS[t[1]](t[2], printed.digits))), None)
    reading, how, value = found or min(tried, key=lambda t: printed.distance(t[2] * 10**printed.digits))
    same = found is not None
    return Cell(
        paper=claim.paper, table=claim.table, row=claim.row, column=claim.column,
        printed=claim.printed, unit=claim.unit, value=value,
        shown=shown(printed, value, ROUNDINGS[how](value, printed.digits)),
        convention=f"{reading}; {how}", verdict=REPRODUCED if same else NOT_REPRODUCED,
        note=_note(readings, reading, claim.rule, printed.digits, same), source=claim.source,
    )  # fmt: skip


def _note(readings: tuple[tuple[str, Fraction], ...], chosen: str, rule: str, digits: int, same: bool) -> str:
    others = [f"{name}: {text(half_up(value, digits + 1), digits + 1)}" for name, value in readings if name != chosen]
    notes = [f"also tried {'; '.join(others)}"] if others else []
    if not same and rule in WHY_NOT:
        notes.insert(0, WHY_NOT[rule])
    return "; ".join(notes)
