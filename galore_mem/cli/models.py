"""`galore-mem models`."""

from __future__ import annotations

from typing import Annotated

import typer

from galore_mem.cli.options import Format, Output
from galore_mem.cli.output import check_format, check_output, dump_json, write


def command(
    name: Annotated[
        str | None, typer.Argument(help="A model, as --model takes it. Default: list the bundled models.")
    ] = None,
    format: Format = "table",
    output: Output = None,
) -> int:
    """List the bundled models, or show one: its parameters by role."""
    check_format(format)
    check_output(output)
    from galore_mem.report import models as report
    from galore_mem.spec.resolve import bundled, resolve

    found = [resolve(n) for n in bundled()] if name is None else [resolve(name)]
    data = report.to_json(found, detail=name is not None)
    if format == "json":
        write(dump_json(data), output)
    else:
        write(report.render(data, format, plain=output is not None), output)
    return 0
