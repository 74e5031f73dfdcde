"""`galore-mem verify`, and `galore-mem verify report`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from galore_mem.cli.output import check_format, dump_json, write
from galore_mem.errors import InputError

if TYPE_CHECKING:
    from galore_mem.verify.case import Case, Outcome

app = typer.Typer(no_args_is_help=False, context_settings={"help_option_names": ["-h", "--help"]})

Format = Annotated[str, typer.Option("--format", "-f", help="table or json.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Write to a file instead of stdout.")]
Buffers = Annotated[bool, typer.Option("--buffers", help="With every tensor of the optimizer's state.")]
Tolerance = Annotated[float, typer.Option(help="How far a phase's peak may be off, as a part of it.")]


@app.callback(invoke_without_command=True)
def command(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="As for estimate. Default: small models made for this."),
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option("--method", help="Method; repeat for several. Default: all.", show_default=False)
    ] = None,
    implementation: Annotated[str | None, typer.Option(help="Whose code. Default: all.")] = None,
    workload: Annotated[
        str | None, typer.Option(help="optimizer (steps on random gradients) or train (whole steps). Default: both.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    recipe: Annotated[str | None, typer.Option(help="As for estimate. Default: fp32 and pure-bf16.")] = None,
    rank: Annotated[int | None, typer.Option("--rank", "-r", help="Rank of low-rank methods.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b")] = 2,
    seq_len: Annotated[int, typer.Option("--seq-len", "-s")] = 64,
    gradient_checkpointing: Annotated[bool, typer.Option(help="Recompute each layer in backward.")] = False,
    layerwise: Annotated[bool, typer.Option(help="Step and free each gradient in the backward hook.")] = False,
    tolerance: Tolerance = 0.02,
    timeout: Annotated[float, typer.Option(help="Seconds for one case.")] = 1800,
    record: Annotated[Path | None, typer.Option(help="Append each result to this file as it comes.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Leave out what the record has.")] = False,
    buffers: Buffers = False,
    format: Format = "table",
    output: Output = None,
) -> int:
    """Run real optimizers and models, and compare what the allocator measured with the estimate.

    Exit code 1: a case does not match, ran out of memory or failed.
    """
    if context.invoked_subcommand is not None:
        return 0
    check_format(format)
    from galore_mem.verify.matrix import chosen
    from galore_mem.verify.record import Record
    from galore_mem.verify.runner import run

    if resume and record is None:
        raise InputError("--resume continues a record; name it with --record FILE")
    cases = chosen(
        model=model, methods=method or (), implementation=implementation, workload=workload, device=device,
        recipe=recipe, rank=rank, batch_size=batch_size, seq_len=seq_len,
        gradient_checkpointing=gradient_checkpointing, layerwise=layerwise,
    )  # fmt: skip
    kept = None if record is None else Record(record)
    begun = progress(len(cases))
    outcomes = list(run(cases, record=kept, resume=resume, tolerance=tolerance, timeout=timeout, begun=begun))
    return show(outcomes, format, output, buffers=buffers)


@app.command()
def report(
    records: Annotated[list[Path], typer.Argument(help="Files that --record wrote.")],
    tolerance: Tolerance = 0.02,
    buffers: Buffers = False,
    format: Format = "table",
    output: Output = None,
) -> int:
    """Show what is in records: predicted, measured, and the signed error per component and phase."""
    check_format(format)
    from galore_mem.verify.record import Record
    from galore_mem.verify.runner import judged

    outcomes = [judged(o, tolerance) for path in records for o in Record(path).read()]
    return show(outcomes, format, output, buffers=buffers)


def progress(total: int) -> Callable[[Case], None]:
    """Tells on stderr which case begins."""
    done = 0

    def begun(case: Case) -> None:
        nonlocal done
        done += 1
        print(f"[{done}/{total}] {case}", file=sys.stderr, flush=True)

    return begun


def show(outcomes: list[Outcome], format: str, output: Path | None, *, buffers: bool) -> int:
    """Writes the answer; 1 if any case is not as predicted."""
    from galore_mem.report import verify as reports

    if format == "json":
        write(dump_json(reports.to_json(outcomes, buffers=buffers)), output)
    else:
        write("\n".join(reports.lines(outcomes, buffers=buffers)) + "\n", output)
    return 1 if any(o.status in ("mismatch", "oom", "failed") for o in outcomes) else 0
