"""`galore-mem simulate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from galore_mem.cli.options import (
    Accumulation,
    BatchSize,
    Checkpointing,
    Device,
    Format,
    GpuName,
    Hyperparameters,
    Implementation,
    KeepGradients,
    KeepLogits,
    KeepLogitsUntil,
    Layerwise,
    Load,
    Methods,
    Output,
    Rank,
    RecipeName,
    SeqLen,
    Target,
    Torch,
    Transformers,
    UpdateProjGap,
    UseCache,
    assignments,
    kept_logits,
    listed,
)
from galore_mem.cli.output import check_format, check_output, dump_json, write
from galore_mem.cli.progress import progress
from galore_mem.errors import InputError


def command(
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            help="As for estimate; also a config.json of any family of transformers, or module:function, which returns "
            "(model, optimizer, batch) or a program (docs/own.md).",
        ),
    ],
    method: Methods = None,
    implementation: Implementation = None,
    rank: Rank = None,
    target: Target = None,
    recipe: RecipeName = "pure-bf16",
    batch_size: BatchSize = 1,
    seq_len: SeqLen = None,
    attention: Annotated[
        str | None, typer.Option(help="sdpa, eager or flash.", show_default="sdpa, where the model has it")
    ] = None,
    gradient_checkpointing: Checkpointing = False,
    layerwise: Layerwise = False,
    update_proj_gap: UpdateProjGap = None,
    hyperparameter: Hyperparameters = None,
    gradient_accumulation: Accumulation = 1,
    keep_gradients: KeepGradients = False,
    keep_logits: KeepLogits = None,
    keep_logits_until: KeepLogitsUntil = None,
    use_cache: UseCache = False,
    load: Load = "to-device",
    warm_up: Annotated[
        int | None,
        typer.Option(help="For module:function: steps before the one that is reported. Default: 1.", min=0, max=1000),
    ] = None,
    transformers: Transformers = None,
    torch: Torch = None,
    device: Device = "cuda",
    gpu: GpuName = None,
    alloc_conf: Annotated[
        str, typer.Option(help="The allocator's settings, as in PYTORCH_ALLOC_CONF (expandable_segments:True).")
    ] = "",
    platform: Annotated[
        str, typer.Option(help="linux or windows: how the driver hands out addresses, which decides what is reused.")
    ] = "linux",
    full: Annotated[
        bool, typer.Option("--full/--extrapolate", help="Trace every layer, or a few and extrapolate.")
    ] = True,
    timeline: Annotated[
        Path | None, typer.Option(help="Draw the run: a .png, .svg or .html file.", show_default=False)
    ] = None,
    points: Annotated[
        int | None, typer.Option(help="With --format json: the timeline too, in so many points.", min=2, max=10**6)
    ] = None,
    snapshot: Annotated[
        Path | None,
        typer.Option(help="Write the run as a .pickle that PyTorch's memory visualizer opens.", show_default=False),
    ] = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="List everything that lives at the peak.")] = False,
    format: Format = "table",
    output: Output = None,
) -> int:
    """Run the real model and optimizer without values or a GPU: memory allocated and reserved, when and why.

    Exit code 1: methods (or module:function) were named, with --gpu, and none of them fits.
    """
    check_format(format)
    check_output(output)
    if points is not None and format != "json":
        raise InputError("--points is the timeline in numbers; give --format json too")
    from galore_mem.releases import modeled
    from galore_mem.report.simulate_files import Files
    from galore_mem.setup import TORCH, TRANSFORMERS, Setup
    from galore_mem.setup import recipe as find_recipe
    from galore_mem.simulate import simulate
    from galore_mem.simulate.subjects.subject import default_attention, default_length, is_own, subject

    asked = subject(model, device)
    files = Files(timeline, snapshot, device, None if is_own(asked) else method or ())
    setup = Setup(
        recipe=find_recipe(recipe),
        batch_size=batch_size,
        seq_len=default_length(asked) if seq_len is None else seq_len,
        attention=default_attention(asked) if attention is None else attention,
        gradient_checkpointing=gradient_checkpointing,
        layerwise=layerwise,
        keep_gradients=keep_gradients,
        keep_logits=kept_logits(keep_logits, keep_logits_until),
        use_cache=use_cache,
        load=load,
        transformers=transformers or modeled("transformers", TRANSFORMERS),
        torch=torch or modeled("torch", TORCH),
        gradient_accumulation=gradient_accumulation,
        device=device,
    )
    with progress() as begun:
        result = simulate(
            asked,
            method,
            setup=setup,
            implementation=implementation,
            targets=listed(target),
            gpu=gpu,
            allocator=alloc_conf,
            platform=platform,
            full=full,
            warm_up=warm_up,
            points=max((n for n in (points, files.points) if n is not None), default=None),
            keep_run=snapshot is not None,
            begun=begun,
            **assignments(hyperparameter or [], rank=rank, update_proj_gap=update_proj_gap),
        )
    files.write(result, alloc_conf)
    if format == "json":
        write(dump_json(result.to_json()), output)
    else:
        from galore_mem.report import simulate as report

        write(report.render(result, format, everything=tensors, plain=output is not None), output)
    return 1 if (method or is_own(asked)) and result.none_fits else 0
