"""Printed formulas (`mr + 2nr`, `24h^2`) against the method's ledger, as polynomials.

Equality at one size proves nothing, so it is asked for at several with sides and ranks that share no ratio.
The number shown is the one at GaLore-mini's h = 4096, r = 1024 (a matrix: 4096 x 16384).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from galore_mem.papers.ledger import of_matrices
from galore_mem.papers.result import NOT_REPRODUCED, REPRODUCED, Cell
from galore_mem.spec.model import Shape

# (m, n, r) and (h, r); the first is shown
MATRIX_SIZES = ((4096, 16384, 1024), (768, 2048, 256), (512, 1376, 128), (640, 640, 30))
LAYER_SIZES = ((4096, 1024), (768, 256), (640, 30))
_TERM = re.compile(r"(\d*)([mnrh]+)(\^2)?\Z")


@dataclass(frozen=True, slots=True)
class Formula:
    """A printed formula and the method whose ledger it is about."""

    paper: str
    table: str
    row: str
    column: str
    printed: str
    method: str
    quantity: str
    source: str


def evaluate(printed: str, sizes: Mapping[str, int]) -> int:
    """The value of a printed polynomial: terms are a coefficient, letters, and `^2` on the last letter."""
    total = 0
    for term in printed.split("+"):
        match = _TERM.match(term.strip())
        if match is None:
            raise ValueError(f"cannot read the term {term!r} of {printed!r}")
        product = int(match[1] or 1)
        letters = match[2] + (match[2][-1] if match[3] else "")
        for letter in letters:
            product *= sizes[letter]
        total += product
    return total


def read(data: Mapping[str, Any]) -> Iterator[Formula]:
    """The formulas of `claims.toml`."""
    for group in data["formula"]:
        for raw in group["cells"]:
            yield Formula(
                group["paper"], group["table"], raw["row"], raw["column"], raw["printed"], raw["method"],
                raw["quantity"], group["source"],
            )  # fmt: skip


def _points(printed: str) -> Iterator[tuple[dict[str, int], tuple[Shape, ...]]]:
    """Sizes to compare at, with the matrices they stand for."""
    if "h" in printed:
        for h, r in LAYER_SIZES:
            yield {"h": h, "r": r}, ((h, h),) * 4 + ((4 * h, h), (h, 4 * h))
    else:
        for m, n, r in MATRIX_SIZES:
            yield {"m": m, "n": n, "r": r}, ((m, n),)


def _counted(formula: Formula, shapes: tuple[Shape, ...], rank: int) -> int:
    ledger = of_matrices(shapes, formula.method, rank)
    weights = ledger.weight_count if formula.quantity != "states" else 0
    return weights + (ledger.state_count if formula.quantity != "weights" else 0)


def cell(formula: Formula) -> Cell:
    """The formula's value beside the ledger's count."""
    points = tuple(_points(formula.printed))
    said = [evaluate(formula.printed, sizes) for sizes, _ in points]
    counted = [_counted(formula, shapes, sizes["r"]) for sizes, shapes in points]
    same = said == counted
    at = ", ".join(f"{letter} = {size}" for letter, size in points[0][0].items())
    differs = next((f"; at {points[i][0]} it gives {said[i]}, the ledger {counted[i]}"
                    for i in range(len(points)) if said[i] != counted[i]), "")  # fmt: skip
    return Cell(
        paper=formula.paper, table=formula.table, row=formula.row, column=formula.column,
        printed=formula.printed, unit="elements", value=Fraction(counted[0]), shown=f"{counted[0]:,}",
        convention=f"ledger of {formula.method}, paper convention",
        verdict=REPRODUCED if same else NOT_REPRODUCED,
        note=f"at {at}; compared at {len(points)} sizes{differs}", source=formula.source,
    )  # fmt: skip
