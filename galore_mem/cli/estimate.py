"""`galore-mem estimate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from galore_mem.cli.output import check_format, dump_json, write
from galore_mem.errors import InputError

Model = Annotated[
    str,
    typer.Option(
        "--model", "-m", help="Bundled name, config.json, model folder, .safetensors file or index, or a cached hub id."
    ),
]
Methods = Annotated[
    list[str] | None, typer.Option("--method", help="Method; repeat for several. Default: all.", show_default=False)
]


def assignments(texts: list[str], **given: int | None) -> dict[str, Any]:
    """`name=value` texts as keywords, beside those that have options of their own. Raises `InputError`."""
    found: dict[str, Any] = dict(given)
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise InputError(f"--set takes name=value, got {text[:40]!r}")
        if found.get(name) is not None:
            raise InputError(f"{name} is given twice")
        found[name] = value
    return found


def command(
    model: Model,
    method: Methods = None,
    implementation: Annotated[
        str | None, typer.Option(help="Whose code: a name, or 'all'. Default: each method's first.")
    ] = None,
    convention: Annotated[
        str, typer.Option(help="'implementation': what code allocates; 'paper': what papers count.")
    ] = "implementation",
    rank: Annotated[int | None, typer.Option("--rank", "-r", help="Rank of low-rank methods and adapters.")] = None,
    target: Annotated[
        str | None,
        typer.Option(help="Linears that low-rank methods apply to, comma-separated. Default: attention and MLP."),
    ] = None,
    recipe: Annotated[
        str, typer.Option(help="pure-bf16, pure-fp16, fp32, amp-bf16, amp-fp16 or bf16-fp32-master.")
    ] = "pure-bf16",
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", help="Sequences per device.")] = 1,
    seq_len: Annotated[
        int | None,
        typer.Option("--seq-len", "-s", help="Tokens per sequence. Default: 2048, or the model's maximum if lower."),
    ] = None,
    attention: Annotated[str, typer.Option(help="sdpa, eager or flash.")] = "sdpa",
    gradient_checkpointing: Annotated[bool, typer.Option(help="Recompute each layer in backward.")] = False,
    layerwise: Annotated[bool, typer.Option(help="Step and free each gradient in the backward hook.")] = False,
    loss: Annotated[str, typer.Option(help="eager, chunked or fused cross-entropy.")] = "eager",
    update_proj_gap: Annotated[int | None, typer.Option(help="Steps between projector refreshes.")] = None,
    hyperparameter: Annotated[
        list[str] | None,
        typer.Option("--set", help="Another hyperparameter, as name=value; repeat for several (proj_type=left)."),
    ] = None,
    gradient_accumulation: Annotated[int, typer.Option(help="Backward passes per step.")] = 1,
    keep_gradients: Annotated[
        bool, typer.Option("--keep-gradients/--free-gradients", help="Between steps: zeroed, or set to None.")
    ] = False,
    keep_logits: Annotated[
        bool,
        typer.Option("--keep-logits/--free-logits", help="Does the loop hold the model's output through backward?"),
    ] = False,
    transformers: Annotated[str, typer.Option(help="Whose behaviour is modelled: 4.57 or 5.23.")] = "5.23",
    torch: Annotated[str, typer.Option(help="Whose behaviour is modelled: 2.13 or 2.14.")] = "2.13",
    device: Annotated[str, typer.Option(help="cuda or cpu: allocator rounding, kernels, workspaces.")] = "cuda",
    gpu: Annotated[str | None, typer.Option(help="Card (rtx-4090) or capacity (24GiB) to judge against.")] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Print the equations with the numbers put in.")] = False,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every persistent tensor.")] = False,
    format: Annotated[str, typer.Option("--format", "-f", help="table, json, csv or markdown.")] = "table",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write to a file instead of stdout.")] = None,
) -> int:
    """Memory per method: weights, gradients, optimizer state, activations, temporaries, and the peak.

    Exit code 1: methods were named, with --gpu, and none of them fits.
    """
    check_format(format)
    from galore_mem.estimator import default_seq_len, estimate
    from galore_mem.setup import Setup
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
        keep_logits=keep_logits,
        gradient_accumulation=gradient_accumulation,
        transformers=transformers,
        torch=torch,
        device=device,
    )
    result = estimate(
        spec,
        method,
        setup=setup,
        implementation=implementation,
        convention=convention,
        targets=None if target is None else [t.strip() for t in target.split(",") if t.strip()],
        gpu=gpu,
        explain=explain,
        **assignments(hyperparameter or [], rank=rank, update_proj_gap=update_proj_gap),
    )
    if format == "json":
        write(dump_json(result.to_json(tensors)), output)
    else:
        from galore_mem.report import estimate as report

        write(report.render(result, format, explain=explain, tensors=tensors, plain=output is not None), output)
    verdicts = [e.fits.verdict for e in result.estimates if e.fits is not None]
    return 1 if method and verdicts and all(v == "does_not_fit" for v in verdicts) else 0
