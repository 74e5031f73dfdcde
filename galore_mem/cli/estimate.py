"""`galore-mem estimate`."""

from __future__ import annotations

from typing import Annotated

import typer

from galore_mem.cli.options import (
    Accumulation,
    Attention,
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
    Model,
    Output,
    Rank,
    RecipeName,
    Reserved,
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


def command(
    model: Model,
    method: Methods = None,
    implementation: Implementation = None,
    convention: Annotated[
        str, typer.Option(help="'implementation': what code allocates; 'paper': what papers count.")
    ] = "implementation",
    rank: Rank = None,
    target: Target = None,
    recipe: RecipeName = "pure-bf16",
    batch_size: BatchSize = 1,
    seq_len: SeqLen = None,
    attention: Attention = "sdpa",
    gradient_checkpointing: Checkpointing = False,
    layerwise: Layerwise = False,
    loss: Annotated[str, typer.Option(help="eager, chunked or fused cross-entropy.")] = "eager",
    update_proj_gap: UpdateProjGap = None,
    hyperparameter: Hyperparameters = None,
    gradient_accumulation: Accumulation = 1,
    keep_gradients: KeepGradients = False,
    keep_logits: KeepLogits = None,
    keep_logits_until: KeepLogitsUntil = None,
    use_cache: UseCache = False,
    load: Load = "to-device",
    transformers: Transformers = None,
    torch: Torch = None,
    device: Device = "cuda",
    gpu: GpuName = None,
    reserved: Reserved = False,
    explain: Annotated[bool, typer.Option("--explain", help="Print the equations with their numbers.")] = False,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every persistent tensor.")] = False,
    format: Format = "table",
    output: Output = None,
) -> int:
    """Memory per method: weights, gradients, optimizer state, activations, temporaries, and the peak.

    Exit code 1: methods were named, with --gpu, and none of them fits.
    """
    check_format(format)
    check_output(output)
    from galore_mem.estimator import default_seq_len, estimate
    from galore_mem.setup import TORCH, TRANSFORMERS, Setup
    from galore_mem.setup import recipe as find_recipe
    from galore_mem.spec.resolve import resolve

    spec = resolve(model)
    setup = Setup(
        recipe=find_recipe(recipe),
        batch_size=batch_size,
        seq_len=default_seq_len(spec) if seq_len is None else seq_len,
        attention=attention,
        gradient_checkpointing=gradient_checkpointing,
        loss=loss,
        layerwise=layerwise,
        keep_gradients=keep_gradients,
        keep_logits=kept_logits(keep_logits, keep_logits_until),
        use_cache=use_cache,
        load=load,
        gradient_accumulation=gradient_accumulation,
        transformers=transformers or TRANSFORMERS[-1],
        torch=torch or TORCH[0],
        device=device,
    )
    result = estimate(
        spec,
        method,
        setup=setup,
        implementation=implementation,
        convention=convention,
        targets=listed(target),
        gpu=gpu,
        explain=explain,
        reserved=reserved,
        **assignments(hyperparameter or [], rank=rank, update_proj_gap=update_proj_gap),
    )
    if format == "json":
        write(dump_json(result.to_json(tensors)), output)
    else:
        from galore_mem.report import estimate as report

        write(report.render(result, format, explain=explain, tensors=tensors, plain=output is not None), output)
    return 1 if method and result.none_fits else 0
