"""`galore-mem papers`."""

from __future__ import annotations

from typing import Annotated

import typer

from galore_mem.cli.options import Format, Output
from galore_mem.cli.output import check_format, check_output, dump_json, write


def command(
    paper: Annotated[str | None, typer.Option(help="Only this paper's tables. Default: all.")] = None,
    format: Format = "table",
    output: Output = None,
) -> int:
    """Recompute the papers' printed memory tables, cell by cell, each with its convention and a verdict."""
    check_format(format)
    check_output(output)
    from galore_mem.papers import recompute

    result = recompute(paper)
    if format == "json":
        write(dump_json(result.to_json()), output)
    else:
        from galore_mem.report import papers as report

        write(report.render(result, format, plain=output is not None), output)
    return 0
