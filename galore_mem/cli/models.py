"""`galore-mem models`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from galore_mem.cli.output import check_format, dump_json, write


def command(
    name: Annotated[str | None, typer.Argument(help="A model, as --model takes it. Default: list the bundled.")] = None,
    format: Annotated[str, typer.Option("--format", "-f", help="table, json, csv or markdown.")] = "table",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write to a file instead of stdout.")] = None,
) -> int:
    """List the bundled models, or show one: its parameters by role."""
    check_format(format)
    from galore_mem.report import models as report
    from galore_mem.spec.resolve import bundled, resolve

    found = [resolve(n) for n in bundled()] if name is None else [resolve(name)]
    data = report.to_json(found, detail=name is not None)
    if format == "json":
        write(dump_json(data), output)
    else:
        write(report.render(data, format, plain=output is not None), output)
    return 0
