"""Q-GaLore: INT8 weights, INT4 projector, 8-bit moments, and refreshes only where the subspace still moves.

Zhang, Jaiswal, Yin, Liu, Zhao, Tian, Wang: Q-GaLore: Quantized GaLore with INT4 Projection and Layer-Adaptive
Low-Rank Gradients, arXiv:2407.08296. Projected weights take one byte, and each group of 256 a scale and a
zero point in the gradient's format; their gradients are full ones in that format.

galore-mem: two projector values per byte. A weight is updated and rounded stochastically in float32, in blocks
of rows of about 2**22 elements, so that no full-size copy exists; a refresh compares the new projector with
the old one and keeps nothing else. q-galore-torch: see `q_galore_torch.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import gcd, prod

from galore_mem.dtypes import BOOL, INT4, UINT8, at_least_float32
from galore_mem.memory.tape import Tensor
from galore_mem.methods import galore_8bit, projection, q_galore_torch
from galore_mem.methods.adamw_8bit import lookup_tables
from galore_mem.methods.base import (
    RANK,
    UPDATE_PROJ_GAP,
    Buffer,
    Citation,
    Implementation,
    Job,
    Method,
    Slot,
    Slots,
    Stored,
    Trained,
)
from galore_mem.methods.galore_8bit import kernel, moments
from galore_mem.methods.projection import PROJ_TYPE, added, applies, lowered
from galore_mem.methods.q_galore_torch import GROUP, groups, store
from galore_mem.methods.svd import SVD_WORKSPACE, full_svd
from galore_mem.spec.model import ParamSpec
from galore_mem.units import ceil_div

BLOCK = 2**22


def block_rows(rows: int, cols: int) -> int:
    """Rows of a block in which a weight is updated: about `BLOCK` elements, in whole groups."""
    aligned = GROUP // gcd(cols, GROUP)
    return min(rows, max(aligned, BLOCK // cols // aligned * aligned))


def state(p: Trained, job: Job) -> tuple[Buffer, ...]:
    """`projector` (packed), `projector_scales`, `projector_zeros`, and bitsandbytes' states."""
    if not applies(p):
        return moments(p, job)
    return *projectors(p, job), *moments(p, job)


def projectors(p: Trained, job: Job) -> tuple[Buffer, ...]:
    """Of each projected side, the codes, and a scale and a zero point per group in the gradient's format."""
    kept: list[Buffer] = []
    for whole in projection.copied(p, job, INT4):
        count = groups(prod(whole.shape))
        kept += (whole, *(Buffer(f"{whole.name}_{what}", count, p.dtype) for what in ("scales", "zeros")))
    return tuple(kept)


def unpacked(slot: Slot, job: Job) -> list[Tensor]:
    """The projectors in the gradient's format; while one is made, half of each byte."""
    made = []
    for whole in projection.copied(slot.param, job, slot.param.dtype):
        made.append(slot.new(whole.shape, whole.dtype))
        slot.new((ceil_div(prod(whole.shape), 2),), UINT8)
    return made


def requantize(slot: Slot, job: Job, update: Tensor) -> None:
    """A block of rows: its codes in float32, the update projected back (to be added on the CPU it is cast, and so are
    the scales), then random numbers to round by and whether to round up."""
    (rows, cols), dtype = slot.param.shape, slot.param.dtype
    half = slot.new((rows, job.r(slot.param)), dtype) if len(projection.sides(slot.param, job)) == 2 else None
    block = block_rows(rows, cols), cols
    values = slot.new(block, at_least_float32(dtype))
    delta = slot.new(block, dtype)
    casts = [
        slot.new(shape, values.dtype)
        for shape in (block, groups(block[0] * block[1]))
        if slot.tape.device == "cpu" and dtype is not values.dtype
    ]
    del delta, casts
    noise = slot.new(block, values.dtype)
    up = slot.new(block, BOOL)
    del half, values, noise, up


def step(slots: Slots, job: Job, refresh: bool, apply: Callable[[Slot, Job, Tensor], None] = requantize) -> None:
    """QGaLoreAdamW8bit.step: the projector in the gradient's format for the low-rank gradient, its update, then the
    projector again, to apply that to the weight."""
    for slot in slots:
        p = slot.param
        if not applies(p):
            kernel(slot, job)
            continue
        if refresh:
            renew(slot, job)
        projector = unpacked(slot, job)
        grad = lowered(slot, job, p.dtype)
        del projector
        update = slot.new(grad.shape, p.dtype)
        kernel(slot, job, grad, update)
        del grad
        projector = unpacked(slot, job)
        apply(slot, job, update)
        del projector, update


def compressed(slot: Slot, job: Job) -> Tensor | None:
    """The low-rank gradient of a micro-batch, by the projector in the gradient's format."""
    projector = unpacked(slot, job) if applies(slot.param) else None
    low = projection.compressed(slot, job)
    del projector
    return low


def renew(slot: Slot, job: Job) -> None:
    """SVD; the kept columns; their products with the old ones; then codes, packed."""
    p = slot.param
    u, s, vh = full_svd(slot, p.shape, p.dtype)
    fresh = [slot.new(whole.shape, p.dtype) for whole in projection.copied(p, job, p.dtype)]
    del u, s, vh
    old = unpacked(slot, job)
    for projector in old:
        slot.new(projector.shape, p.dtype)
    del old
    kept = projectors(p, job)
    for i, projector in enumerate(fresh):
        codes = slot.new(projector.shape, UINT8, slot.new(projector.shape, at_least_float32(p.dtype)))
        for buffer in kept[3 * i : 3 * i + 3]:
            slot.keep(buffer)
        del codes
    del fresh


def state_paper(p: Trained, job: Job) -> tuple[Buffer, ...]:
    """m·r / 2 + 2·n·r bytes; 2·m·n bytes for what is not projected."""
    first, *rest = galore_8bit.state_paper(p, job)
    if not applies(p):
        return first, *rest
    return Buffer(first.name, first.shape, INT4), *rest


def store_paper(row: ParamSpec, projected: bool, job: Job) -> tuple[Stored, ...]:
    """m·n bytes for a projected weight: scales and zero points are neglected."""
    return store(row, projected, job)[:1]


EQUATIONS = {
    "projected": "m·r/2 + 2·⌈m·r/256⌉·e + 2·n·r + 8·⌈n·r/256⌉ bytes (e: bytes of a gradient's element)",
    "other": galore_8bit.EQUATIONS["other"],
}

METHOD = Method(
    name="q-galore",
    title="Q-GaLore",
    citation=Citation(
        "Q-GaLore: Quantized GaLore with INT4 Projection and Layer-Adaptive Low-Rank Gradients",
        "Zhang, Jaiswal, Yin, Liu, Zhao, Tian, Wang", "arXiv:2407.08296",
    ),
    paper=Implementation(
        "paper", "arXiv:2407.08296", "INT8 weights mn, INT4 projector mr/2, 8-bit states 2nr (bytes)", state_paper,
        store=store_paper, linear="int8",
        equations={"projected": "m·r/2 + 2·n·r bytes", "other": "2·m·n at 1 byte"},
    ),
    implementations=(
        Implementation(
            name="galore-mem", version="galore-mem, bitsandbytes 0.50.2", source="galore_mem/optim",
            state=state, step=step, shared=lookup_tables, store=store, linear="int8", refreshes=True,
            compresses=compressed, equations=EQUATIONS, not_counted=(SVD_WORKSPACE,),
        ),
        Implementation(
            name="galore-mem-float-weights", version="galore-mem, bitsandbytes 0.50.2", source="galore_mem/optim",
            state=state, step=partial(step, apply=added), shared=lookup_tables, refreshes=True, compresses=compressed,
            equations=EQUATIONS, not_counted=(SVD_WORKSPACE,),
            notes=("without quantize_linears: the weights keep the recipe's format",),
        ),
        q_galore_torch.PACKAGE,
    ),
    hyperparameters=(RANK, UPDATE_PROJ_GAP, PROJ_TYPE),
)  # fmt: skip
