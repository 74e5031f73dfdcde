"""Options that several commands have: one definition each, so that they mean the same everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

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
Implementation = Annotated[str | None, typer.Option(help="Whose code: a name, or 'all'. Default: each method's first.")]
Rank = Annotated[
    int | None, typer.Option("--rank", "-r", help="Rank of low-rank methods and adapters. Default: 128; verify: 64.")
]
Target = Annotated[
    str | None,
    typer.Option(help="Linears that low-rank methods apply to, comma-separated. Default: attention and MLP."),
]
RecipeName = Annotated[str, typer.Option(help="pure-bf16, pure-fp16, fp32, amp-bf16, amp-fp16 or bf16-fp32-master.")]
BatchSize = Annotated[int, typer.Option("--batch-size", "-b", help="Sequences per device.")]
SeqLen = Annotated[
    int | None,
    typer.Option("--seq-len", "-s", help="Tokens per sequence. Default: 2048, or the model's maximum if lower."),
]
Attention = Annotated[str, typer.Option(help="sdpa, eager or flash.")]
Checkpointing = Annotated[bool, typer.Option(help="Recompute each layer in backward.")]
Layerwise = Annotated[bool, typer.Option(help="Step and free each gradient in the backward hook.")]
UpdateProjGap = Annotated[int | None, typer.Option(help="Steps between projector refreshes.")]
Hyperparameters = Annotated[
    list[str] | None,
    typer.Option("--set", help="Another hyperparameter, as name=value; repeat for several (proj_type=left)."),
]
Accumulation = Annotated[int, typer.Option(help="Backward passes per step.")]
KeepGradients = Annotated[
    bool,
    typer.Option(
        "--keep-gradients/--free-gradients", help="Gradients between steps: zeroed (keep) or set to None (free)."
    ),
]
KeepLogits = Annotated[
    bool | None,
    typer.Option(
        "--keep-logits/--free-logits",
        help="Does the loop hold the model's output through backward and step?",
        show_default="free-logits",
    ),
]
KeepLogitsUntil = Annotated[
    str | None,
    typer.Option(
        help="When the loop lets go of the output: after backward, step, or the next forward pass (next).",
        show_default="step",
    ),
]
UseCache = Annotated[
    bool,
    typer.Option(
        "--use-cache/--no-cache", help="The model's output holds keys and values (the default of decoders' configs)."
    ),
]
Load = Annotated[
    str,
    typer.Option(
        help="How the model comes to the card: to-device (model.to(device)) or device-map (from_pretrained with one)."
    ),
]
Transformers = Annotated[
    str | None,
    typer.Option(
        help="Release, described by the nearest of 4.57 and 5.23 of its major version. Default: 5.23; simulate: the "
        "installed one.",
        show_default=False,
    ),
]
Torch = Annotated[
    str | None,
    typer.Option(
        help="Release, described by the nearest of 2.13 and 2.14. Default: 2.13; simulate: the installed one.",
        show_default=False,
    ),
]
Device = Annotated[str, typer.Option(help="cuda or cpu: allocator rounding, kernels, workspaces.")]
GpuName = Annotated[str | None, typer.Option(help="Card (rtx-4090) or capacity (24GiB) to check the fit on.")]
Format = Annotated[str, typer.Option("--format", "-f", help="table, json, csv or markdown.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Write to a file instead of stdout.")]


Reserved = Annotated[
    bool, typer.Option("--reserved", help="Follow the CUDA allocator too: slack in its blocks, reserved memory.")
]


def kept_logits(keep: bool | None, until: str | None) -> str | bool:
    """The setup's `keep_logits`. To say until when is to say that it is held. Raises `InputError`."""
    if until and keep is False:
        raise InputError("--free-logits and --keep-logits-until contradict each other; give one of them")
    return until or bool(keep)


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


def listed(text: str | None) -> list[str] | None:
    """A comma-separated list; None where nothing is given."""
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]
