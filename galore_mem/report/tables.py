"""Rows of text as a terminal table, CSV or Markdown: one table, three looks."""

from __future__ import annotations

import csv
import io
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class Column:
    """A heading; `right` aligns numbers; `colors` gives words of a cell, or single characters, a rich style;
    the column with the highest `drop` goes first where a terminal is too narrow (0: never)."""

    name: str
    right: bool = False
    colors: Mapping[str, str] = field(default_factory=dict)
    drop: int = 0


@dataclass(frozen=True, slots=True)
class Table:
    """A title, columns and rows of text, with lines below it: first those that want attention, then the others."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    footer: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def below(self) -> tuple[str, ...]:
        return self.warnings + self.footer


def to_csv(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Comma-separated values, numbers raw."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue()


def to_markdown(table: Table) -> str:
    """A GitHub-flavoured Markdown table under its title."""
    lines = [f"**{table.title}**", ""] if table.title else []
    lines.append("| " + " | ".join(c.name for c in table.columns) + " |")
    lines.append("|" + "|".join("---:" if c.right else "---" for c in table.columns) + "|")
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table.rows]
    lines += ["", *(f"{line}  " for line in table.below)] if table.below else []
    return "\n".join(lines).rstrip() + "\n"


def to_terminal(table: Table, *, plain: bool) -> str:
    """The table in aligned columns: drawn by rich with colors on a terminal, as bare text elsewhere (files, pipes)."""
    terminal = sys.stdout is not None and sys.stdout.isatty() and "NO_COLOR" not in os.environ
    return _drawn(table) if terminal and not plain else _aligned(table)


def _aligned(table: Table) -> str:
    rows = [tuple(c.name for c in table.columns), *table.rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(table.columns))]
    lines = [table.title] if table.title else []
    for row in rows:
        cells = [
            cell.rjust(width) if column.right else cell.ljust(width)
            for cell, width, column in zip(row, widths, table.columns, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join([*lines, *table.below]) + "\n"


def _drawn(table: Table) -> str:
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    text = io.StringIO()
    width = os.get_terminal_size(sys.stdout.fileno()).columns
    table = narrowed(table, width)
    width = max(width, needed_width(table))  # still too wide: lines wrap, no number is cut
    console = Console(file=text, force_terminal=True, width=width, highlight=False)
    drawn = RichTable(box=None, pad_edge=False, header_style="dim")
    for column in table.columns:
        drawn.add_column(column.name, justify="right" if column.right else "left", no_wrap=True)
    for row in table.rows:
        drawn.add_row(*(_painted(Text, cell, c) for cell, c in zip(row, table.columns, strict=True)))
    if table.title:  # not the drawn table's, which would wrap it to the table's width
        console.print(table.title, style="bold", markup=False)
    if table.columns:
        console.print(drawn)
    for style, below in (("red", table.warnings), ("dim", table.footer)):
        for line in below:
            console.print(line, style=style, markup=False)
    return text.getvalue()


def _painted(text: Any, cell: str, column: Column) -> Any:
    """A cell with the column's colors, by its words and by its characters."""
    painted = text(cell)
    for part, style in column.colors.items():
        painted.highlight_words([part], style)
    return painted


def needed_width(table: Table) -> int:
    """Characters of the table's longest possible line."""
    cells = ((c.name, *(row[i] for row in table.rows)) for i, c in enumerate(table.columns))
    return sum(max(map(len, column)) + 2 for column in cells) - 2


def narrowed(table: Table, width: int) -> Table:
    """The table without its most dispensable columns, as far as the width asks for it."""
    while table.rows and needed_width(table) > width and any(c.drop for c in table.columns):
        worst = max(range(len(table.columns)), key=lambda i: table.columns[i].drop)
        columns = table.columns[:worst] + table.columns[worst + 1 :]
        table = replace(table, columns=columns, rows=tuple(row[:worst] + row[worst + 1 :] for row in table.rows))
    return table
