"""Every printed memory figure of the papers, computed again."""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping
from fractions import Fraction
from functools import lru_cache
from importlib.resources import files
from typing import Any

from galore_mem.errors import unknown
from galore_mem.papers import claims, polynomials, tables
from galore_mem.papers.conventions import reasons
from galore_mem.papers.result import Cell, PapersResult, TableSummary

DATA = ("cells.toml", "claims.toml")


@lru_cache(maxsize=1)
def data() -> Mapping[str, Any]:
    """The printed figures, as the package carries them."""
    folder = files("galore_mem.papers")
    parsed = (tomllib.loads(folder.joinpath(name).read_text("utf-8")) for name in DATA)
    return {key: value for part in parsed for key, value in part.items()}


def papers() -> tuple[str, ...]:
    """The papers whose figures are here, in their order."""
    return tuple(data()["order"])


def recompute(paper: str | None = None) -> PapersResult:
    """Recomputes the printed figures of one paper, or of all. Raises `InputError` for an unknown paper."""
    if paper is not None and paper not in papers():
        raise unknown("paper", paper, papers())
    return recompute_from(data(), paper)


def recompute_from(printed: Mapping[str, Any], paper: str | None = None) -> PapersResult:
    """`recompute` on figures given as the TOML files give them."""
    blocks = tables.read(printed)
    found: list[Cell] = []
    conventions: dict[tuple[str, str], Counter[str]] = {}
    for block, outcomes, choice, counts in _chosen(blocks):
        if not block.quotes:
            conventions.setdefault((block.paper, block.table), Counter()).update(counts)
        best = max(counts.values())
        found.extend(tables.cells(block, outcomes, choice, sum(hits == best for hits in counts.values()) - 1))

    def printed_cell(paper: str, table: str, row: str, column: str) -> Fraction:
        entries = (e for b in blocks.values() if (b.paper, b.table) == (paper, table) for e in b.entries)
        return next(e.printed.value for e in entries if (e.row, e.column) == (row, column))

    found.extend(polynomials.cell(formula) for formula in polynomials.read(printed))
    found.extend(claims.cell(claim, printed_cell) for claim in claims.read(printed))
    order = [(name, table) for name, places in printed["order"].items() for table in places if paper in (None, name)]
    groups: dict[tuple[str, str], list[Cell]] = {place: [] for place in order}
    for cell in found:
        if paper in (None, cell.paper):
            groups[cell.paper, cell.table].append(cell)
    cells = tuple(cell for group in groups.values() for cell in group)
    return PapersResult(cells, tuple(_summaries(groups, conventions)), reasons())


def _chosen(
    blocks: Mapping[str, tables.Block],
) -> Iterator[tuple[tables.Block, tables.Outcomes, tables.Choice, Mapping[str, int]]]:
    """Each block with its convention, and how many of its cells every convention prints."""
    choices: dict[str, tables.Choice] = {}
    for block in blocks.values():
        given = choices[block.quotes.id] if block.quotes else None
        outcomes = tables.Outcomes(block, blocks[block.against] if block.against else None, given)
        choice, counts = outcomes.choose()
        choices[block.id] = given or choice
        yield block, outcomes, choices[block.id], counts


def _summaries(
    groups: Mapping[tuple[str, str], list[Cell]], conventions: Mapping[tuple[str, str], Mapping[str, int]]
) -> Iterator[TableSummary]:
    for place, cells in groups.items():
        reproduced = sum(cell.reproduced for cell in cells)
        yield TableSummary(*place, len(cells), reproduced, conventions.get(place, {}))
