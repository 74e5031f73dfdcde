"""`galore-mem schema`."""

from __future__ import annotations

from typing import Annotated

import typer

from galore_mem.cli.output import dump_json, write


def command(
    name: Annotated[str, typer.Argument(help="estimate, methods, models, papers, simulate or verify.")] = "estimate",
) -> int:
    """Print the JSON schema of a command's --format json."""
    from galore_mem.report.schema import schema

    write(dump_json(schema(name)), None)
    return 0
