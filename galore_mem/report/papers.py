"""`papers` as a table, CSV or Markdown: each printed figure beside the computed one, and what does not follow."""

from __future__ import annotations

from collections.abc import Iterator

from galore_mem.papers import PapersResult
from galore_mem.papers.result import Cell
from galore_mem.report.tables import Column, Table, to_csv, to_markdown, to_terminal

MARKS = {True: "reproduced", False: "NOT"}


def render(result: PapersResult, format: str, *, plain: bool) -> str:
    """The result as text in one of the formats `table`, `csv` and `markdown`."""
    if format == "csv":
        keys = list(result.to_json()["cells"][0])
        return to_csv(keys, [[cell[k] for k in keys] for cell in result.to_json()["cells"]])
    show = to_markdown if format == "markdown" else lambda table: to_terminal(table, plain=plain)
    parts = [show(_cells(paper, table, cells)) for (paper, table), cells in _by_table(result).items()]
    return "\n".join([*parts, show(_summary(result)), "\n".join(_reasons(result)) + "\n"])


def _by_table(result: PapersResult) -> dict[tuple[str, str], list[Cell]]:
    found: dict[tuple[str, str], list[Cell]] = {}
    for cell in result.cells:
        found.setdefault((cell.paper, cell.table), []).append(cell)
    return found


def _cells(paper: str, table: str, cells: list[Cell]) -> Table:
    columns = (
        Column("row"),
        Column("column"),
        Column("printed", right=True),
        Column("computed", right=True),
        Column("unit"),
        Column("verdict", colors={"reproduced": "green", "NOT": "red"}),
        Column("convention", drop=1),
    )
    rows = tuple(
        (c.row, c.column, c.printed, c.shown, c.unit, MARKS[c.reproduced], _short(c.convention, 70)) for c in cells
    )
    return Table(f"{paper}: {table}", columns, rows)


def _short(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


def _summary(result: PapersResult) -> Table:
    columns = (Column("paper"), Column("table"), Column("reproduced", right=True), Column("of", right=True))
    rows = [(t.paper, t.table, str(t.reproduced), str(t.cells)) for t in result.tables]
    rows.append(("all", "", str(result.reproduced), str(len(result.cells))))
    return Table("", columns, tuple(rows))


def _reasons(result: PapersResult) -> Iterator[str]:
    yield "Not reproduced, and what was tried:"
    for c in result.cells:
        if not c.reproduced:
            where = f"{c.paper}, {c.table}, {c.row}, {c.column}"
            yield f"- {where}: printed {c.printed} {c.unit}, {c.shown} by {c.convention}"
            if c.note:
                yield f"  {c.note}"
