"""`galore-mem methods`."""

from __future__ import annotations

from typing import Annotated

import typer

from galore_mem.cli.options import Format, Output
from galore_mem.cli.output import check_format, check_output, dump_json, write


def command(
    name: Annotated[str | None, typer.Argument(help="A method, as --method takes it. Default: list all.")] = None,
    format: Format = "table",
    output: Output = None,
) -> int:
    """List the methods, or show one: its paper, implementations, equations and hyperparameters."""
    check_format(format)
    check_output(output)
    from galore_mem.methods.registry import METHODS, method
    from galore_mem.report import methods as report

    data = report.to_json(METHODS.values() if name is None else [method(name)])
    if format == "json":
        write(dump_json(data), output)
    else:
        write(report.render(data, format, detail=name is not None, plain=output is not None), output)
    return 0
