"""`galore-mem papers`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from galore_mem.cli.output import check_format, dump_json, write


def command(
    paper: Annotated[str | None, typer.Option(help="Only this paper's tables. Default: all.")] = None,
    format: Annotated[str, typer.Option("--format", "-f", help="table, json, csv or markdown.")] = "table",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write to a file instead of stdout.")] = None,
) -> int:
    """Recompute the papers' printed memory tables, cell by cell, each with its convention and a verdict."""
    check_format(format)
    from galore_mem.papers import recompute

    result = recompute(paper)
    if format == "json":
        write(dump_json(result.to_json()), output)
    else:
        from galore_mem.report import papers as report

        write(report.render(result, format, plain=output is not None), output)
    return 0
