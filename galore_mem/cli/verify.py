"""`galore-mem verify`, and `galore-mem verify report`."""

from __future__ import annotations

from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from galore_mem.cli.options import Format, Hyperparameters, Methods, Output, Rank, Target, assignments, listed
from galore_mem.cli.output import check_format, check_output, write
from galore_mem.errors import InputError

if TYPE_CHECKING:
    from galore_mem.verify.case import Outcome

app = typer.Typer(no_args_is_help=False, context_settings={"help_option_names": ["-h", "--help"]})

Buffers = Annotated[bool, typer.Option("--buffers", help="Also list every tensor of the optimizer's state.")]
Tolerance = Annotated[float, typer.Option(help="How far a phase's peak may be off, as a fraction of it.", min=0, max=1)]


@app.callback(invoke_without_command=True)
def command(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="As for estimate. Default: small models made for this."),
    ] = None,
    method: Methods = None,
    implementation: Annotated[str | None, typer.Option(help="Whose code. Default: all.")] = None,
    workload: Annotated[
        str | None, typer.Option(help="optimizer (steps on random gradients) or train (whole steps). Default: both.")
    ] = None,
    device: Annotated[
        str, typer.Option(help="cpu, cuda or auto. With a card, the LLaMA sizes that fit are trained too.")
    ] = "auto",
    recipe: Annotated[str | None, typer.Option(help="As for estimate. Default: fp32 and pure-bf16.")] = None,
    rank: Rank = None,
    target: Target = None,
    hyperparameter: Hyperparameters = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", "-b", help="Default: 2.", show_default=False)
    ] = None,
    seq_len: Annotated[int | None, typer.Option("--seq-len", "-s", help="Default: 64.", show_default=False)] = None,
    attention: Annotated[str | None, typer.Option(help="sdpa, eager or flash. Default: sdpa.")] = None,
    gradient_checkpointing: Annotated[
        bool | None, typer.Option(help="Recompute each layer in backward. Default: small models are run both ways.")
    ] = None,
    gradient_accumulation: Annotated[int | None, typer.Option(help="Backward passes per step. Default: 1.")] = None,
    layerwise: Annotated[bool | None, typer.Option(help="Step and free each gradient in the backward hook.")] = None,
    tolerance: Tolerance = 0.02,
    timeout: Annotated[float, typer.Option(help="Seconds for one case.", min=1, max=1e6)] = 1800,
    jobs: Annotated[
        int | None, typer.Option("--jobs", "-j", help="Cases run at once. Default: 2 small ones on the CPU.", min=1)
    ] = None,
    record: Annotated[Path | None, typer.Option(help="Append each result to this file as it comes.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Skip cases that are in the record.")] = False,
    snapshot: Annotated[
        Path | None, typer.Option(help="Folder for the allocator's history of each case (CUDA).")
    ] = None,
    buffers: Buffers = False,
    format: Format = "table",
    output: Output = None,
) -> int:
    """Run real optimizers and models, and compare what the allocator measured with the estimate.

    Exit code 1: a case does not match, ran out of memory or failed.
    """
    if context.invoked_subcommand is not None:
        refuse_options(context, context.invoked_subcommand)
        return 0
    check_format(format)
    check_output(output)
    if resume and record is None:
        raise InputError("--resume continues a record; name it with --record FILE")
    from galore_mem.verify.matrix import Wishes
    from galore_mem.verify.session import Session

    options = {
        "batch_size": batch_size, "seq_len": seq_len, "attention": attention, "layerwise": layerwise,
        "gradient_checkpointing": gradient_checkpointing, "gradient_accumulation": gradient_accumulation,
    }  # fmt: skip
    targets = listed(target)
    wishes = Wishes(
        model, tuple(method or ()), implementation, workload, recipe,
        None if targets is None else tuple(targets),
        {name: value for name, value in options.items() if value is not None},
        {name: value for name, value in assignments(hyperparameter or [], rank=rank).items() if value is not None},
    )  # fmt: skip
    session = Session(wishes, device, record, resume=resume, tolerance=tolerance, timeout=timeout, snapshot=snapshot)
    outcomes = session.run(jobs)
    code = show(outcomes, format, output, buffers=buffers)
    if session.error is not None:
        raise session.error
    return 130 if session.interrupted else code


def refuse_options(context: typer.Context, subcommand: str) -> None:
    """Raises `InputError` where options are written before the subcommand, which would not see them."""
    for option in context.command.params:
        source = context.get_parameter_source(str(option.name))
        if source is None or source.name != "COMMANDLINE":
            continue
        if option.name in signature(report).parameters:
            raise InputError(f"{option.opts[0]} is an option of verify {subcommand}: write it after {subcommand}")
        raise InputError(f"{option.opts[0]} is an option of verify, not of {subcommand}")


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
    check_output(output)
    from galore_mem.verify.record import Record, latest
    from galore_mem.verify.runner import judged

    outcomes = [judged(o, tolerance) for o in latest(o for path in records for o in Record(path).read())]
    return show(outcomes, format, output, buffers=buffers)


def show(outcomes: list[Outcome], format: str, output: Path | None, *, buffers: bool) -> int:
    """Writes the answer; 1 if any case is not as predicted."""
    from galore_mem.report.verify import render
    from galore_mem.verify.case import BAD

    write(render(outcomes, format, buffers=buffers, plain=output is not None), output)
    return 1 if any(o.status in BAD for o in outcomes) else 0
