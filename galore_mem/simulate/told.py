"""What a simulated run says besides numbers: what was run, on what, and what is not in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import Any

from galore_mem.allocator.export import settings_text
from galore_mem.allocator.settings import AllocatorSettings
from galore_mem.estimator import GENERAL_NOT_COUNTED, max_positions
from galore_mem.gpus import DEFAULT_CONTEXT, Gpu
from galore_mem.memory.phases import Work
from galore_mem.releases import modeled
from galore_mem.setup import LOADED, TORCH, TRANSFORMERS, Setup
from galore_mem.simulate.session import Traced
from galore_mem.simulate.trace import WORKSPACE
from galore_mem.simulate.tracing.values import Assumed
from galore_mem.units import format_bytes
from galore_mem.verify.builders import GAP, Builder

BY_DEVICE = (
    "what a program does only where a tensor's device.type is cuda: here it is meta (is_cuda is answered as there)",
)
NOT_COUNTED = (
    "the temporaries of reading a checkpoint on the host",
    "scratch of kernels that are not in our tables: cuDNN's convolutions, cuSOLVER's drivers, custom CUDA kernels",
    *BY_DEVICE,
    *GENERAL_NOT_COUNTED[1:],
)
KERNELS = {
    "_scaled_dot_product_flash_attention": "flash",
    "_scaled_dot_product_efficient_attention": "efficient",
    "_scaled_dot_product_attention_math": "math",
    "_scaled_dot_product_flash_attention_for_cpu": "the CPU's",
}


def release(package: str, asked: str, known: tuple[str, ...]) -> str:
    """The release that ran, and the one whose ways it was given."""
    return version(package) + ("" if modeled(package, known) == asked else f" (as {asked})")


def stack(setup: Setup, settings: AllocatorSettings, *, full: bool) -> dict[str, Any]:
    """Of a result's setup, what is real: the releases that ran, the allocator's settings, which layers were traced."""
    return {
        "torch": release("torch", setup.torch, TORCH),
        "transformers": release("transformers", setup.transformers, TRANSFORMERS),
        "allocator": settings_text(settings),
        "full": full,
    }


def of_work(work: Work, row: Builder) -> Iterator[str]:
    """A method's run, its formats and its steps."""
    setup = work.setup
    r = setup.recipe
    yield f"recipe {r.name}: weights and gradients {r.weights}" + (f", autocast {r.autocast}" if r.autocast else "")
    steps = "one step that makes the state, a plain one"
    if work.code.refreshes and row.refresh is not None:
        steps += f", one that renews projectors (every {GAP} steps instead of the update_proj_gap)"
    yield f"steps from the start of the process: {steps}; {setup.loop}"
    yield (
        f"eager PyTorch {release('torch', setup.torch, TORCH)}, "
        f"transformers {release('transformers', setup.transformers, TRANSFORMERS)}, attention {setup.attention}, "
        + ("non-reentrant checkpointing of each layer" if setup.gradient_checkpointing else "no checkpointing")
    )
    limit = max_positions(work.model)
    if limit is not None and setup.seq_len > limit:
        yield f"seq-len {setup.seq_len} is beyond the {limit} positions of the config"
    yield from work.code.notes
    yield from row.remarks


def of_own(setup: Setup, traced: Traced, about: Mapping[str, Any], warm_up: int) -> Iterator[str]:
    """The run of a program of the user's own."""
    cast = f", autocast {setup.recipe.autocast}" if setup.recipe.autocast else ""
    yield f"weights {' and '.join(about['formats']) or 'of no model that ran'}, as they are made{cast}"
    if not traced.whole:
        yield f"steps from the start of the process, {warm_up} before the one looked at; {setup.loop}"
    elif traced.passes:
        yield f"forward passes without gradients, {warm_up} before the one looked at; {setup.loop.partition('; ')[2]}"
    else:
        yield "the program as it is, from its start, with its own loop"
    if about["compiled"]:
        yield "torch.compile: what it compiles is simulated as eager, operation by operation"
    yield (
        f"eager PyTorch {release('torch', setup.torch, TORCH)}, "
        f"transformers {release('transformers', setup.transformers, TRANSFORMERS)}"
    )


def not_counted(setup: Setup, about: Mapping[str, Any]) -> Iterator[str]:
    """What is left out of the run of a program of the user's own."""
    yield from (one for one in NOT_COUNTED if one not in BY_DEVICE)
    if about["recurrent"] and setup.device == "cuda":
        kinds = ", ".join(about["recurrent"])
        yield f"cuDNN's {kinds}: its reserve space and workspace, instead of which the steps of its parts are counted"


def of_run(traced: Traced, setup: Setup, card: Gpu | None, settings: AllocatorSettings, platform: str) -> Iterator[str]:
    """The device, and what the program was told about values that nothing has."""
    ran = {one.op.removeprefix("aten.").partition(".")[0] for one in traced.trace.allocations if "attention" in one.op}
    kernels = sorted({KERNELS[op] for op in ran if op in KERNELS})
    if kernels:
        yield f"attention kernel {', '.join(kernels)}"
    if setup.device == "cuda":
        outside = card or DEFAULT_CONTEXT
        yield f"CUDA context {format_bytes(outside.context)}: {outside.evidence}"
        how = settings_text(settings) or "default settings"
        yield f"caching allocator ({how}), one stream, addresses as under {platform}"
        if not traced.whole:
            yield f"a model comes to the card by {LOADED[setup.load]}; a quantized one matrix by matrix"
        kept = [one.nbytes for one in traced.trace.allocations if one.op == WORKSPACE]
        if kept:
            yield f"cuBLAS keeps {len(kept)} x {kept[0]:,} bytes, among the temporaries"
    else:
        yield "the CPU's kernels with one thread, oneDNN off"
    yield from traced.notes
    yield from dict.fromkeys(assumption(one) for one in traced.assumed)


def assumption(one: Assumed) -> str:
    """A value that the program asked for."""
    where = one.module or "the program"
    return f"{where} decides by a tensor's value ({one.dtype}), and nothing has values here: {one.answer} was taken"
