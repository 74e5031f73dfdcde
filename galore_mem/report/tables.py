"""Rows of text as a terminal table, CSV or Markdown: one table, three looks."""

from __future__ import annotations

import csv
import io
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Column:
    """A heading; `right` aligns numbers."""

    name: str
    right: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """A title, columns and rows of text, with lines below it."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    footer: tuple[str, ...] = ()


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
    lines += ["", *(f"{line}  " for line in table.footer)] if table.footer else []
    return "\n".join(lines).rstrip() + "\n"


def to_terminal(table: Table, *, plain: bool) -> str:
    """The table as rich draws it; colours only where stdout is a terminal and the text is not `plain`."""
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    text = io.StringIO()
    colour = not plain and sys.stdout.isatty() and "NO_COLOR" not in os.environ
    console = Console(file=text, force_terminal=colour, no_color=not colour, width=_width(plain), highlight=False)
    drawn = RichTable(title=table.title or None, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in table.columns:
        drawn.add_column(column.name, justify="right" if column.right else "left", no_wrap=True)
    for row in table.rows:
        drawn.add_row(*(Text.from_markup(cell) if "[/" in cell else Text(cell) for cell in row))
    console.print(drawn, soft_wrap=False)
    for line in table.footer:
        console.print(line, style="dim", markup=False)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"


def _width(plain: bool) -> int:
    if plain or not sys.stdout.isatty():
        return 140
    return max(80, os.get_terminal_size(sys.stdout.fileno()).columns)
