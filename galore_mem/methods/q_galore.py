"""Q-GaLore: INT8 weights, INT4 projector, 8-bit moments, and refreshes only where the subspace still moves.

Zhang, Jaiswal, Yin, Liu, Zhao, Tian, Wang: Q-GaLore: Quantized GaLore with INT4 Projection and Layer-Adaptive
Low-Rank Gradients, arXiv:2407.08296. Projected weights take one byte, and each group of 256 a scale and a
zero point in the gradient's format; their gradients are full ones in that format.

galore-mem: two projector values per byte. A weight is updated and rounded stochastically in float32, in blocks
of rows of about 2**22 elements, so that no full-size copy exists; a refresh compares the new projector with
the old one and keeps nothing else. q-galore-torch: see `q_galore_torch.py`.
"""

from __future__ import annotations

from galore_mem.dtypes import FLOAT32, INT4, UINT8
from galore_mem.memory.tape import Tensor
from galore_mem.methods import galore_8bit, q_galore_torch
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
from galore_mem.methods.projection import OURS, applies, lowered
from galore_mem.methods.q_galore_torch import GROUP, groups, projector_shape, quantized_projector, store
from galore_mem.methods.svd import SVD_WORKSPACE, full_svd
from galore_mem.spec.model import ParamSpec
from galore_mem.units import ceil_div

BLOCK = 2**22


def state(p: Trained, job: Job) -> tuple[Buffer, ...]:
    """`projector` (packed), `projector_scales`, `projector_zeros`, and bitsandbytes' states."""
    if not applies(p):
        return moments(p, job)
    return *quantized_projector(p, job, OURS, INT4, projector_shape(p, job)), *moments(p, job)


def step(slots: Slots, job: Job, refresh: bool) -> None:
    """QGaLoreAdamW8bit.step: the projector in the gradient's format, the low-rank gradient and its update, then
    one block of the weight at a time."""
    for slot in slots:
        p = slot.param
        if not applies(p):
            kernel(slot, job)
            continue
        if refresh:
            renew(slot, job)
        projector = unpacked(slot, job)
        grad = lowered(slot, job, p.dtype)
        update = slot.new(grad.shape, p.dtype)
        kernel(slot, job, grad, update)
        del grad
        requantize(slot)
        del projector, update


def unpacked(slot: Slot, job: Job) -> Tensor:
    """Both halves of each byte, their interleaved codes, the values (shifted and scaled in place)."""
    shape = projector_shape(slot.param, job)
    half = (ceil_div(shape[0] * shape[1], 2),)
    codes = slot.new(shape, UINT8, slot.new(half, UINT8), slot.new(half, UINT8))
    return slot.new(shape, slot.param.dtype, codes)


def requantize(slot: Slot) -> None:
    """A block of rows: its weight in float32, the update projected back and cast, then random numbers to round by."""
    rows, cols = slot.param.shape
    block = min(rows, max(GROUP, BLOCK // cols // GROUP * GROUP)), cols
    weight = slot.new(block, FLOAT32)
    delta = slot.new(block, slot.param.dtype)
    if delta.dtype is not FLOAT32:
        delta = slot.new(block, FLOAT32, delta)
    del delta
    group = groups(block[0] * block[1])
    quantized = slot.new(group, FLOAT32), slot.new(group, FLOAT32)  # scales and zeros
    noise = slot.new(block, FLOAT32)
    del weight, quantized, noise


def renew(slot: Slot, job: Job) -> None:
    """SVD; the kept columns; their products with the old ones; then codes, packed."""
    p = slot.param
    shape = projector_shape(p, job)
    u, s, vh = full_svd(slot, p.shape, p.dtype)
    fresh = slot.new(shape, p.dtype)
    del u, s, vh
    old = unpacked(slot, job)
    products = slot.new(shape, p.dtype, old)
    del old, products
    codes = slot.new(shape, UINT8, slot.new(shape, p.dtype))
    for buffer in quantized_projector(p, job, OURS, INT4, shape):
        slot.keep(buffer)
    del fresh, codes


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
            equations=EQUATIONS, not_counted=(SVD_WORKSPACE,),
        ),
        q_galore_torch.PACKAGE,
    ),
    hyperparameters=(RANK, UPDATE_PROJ_GAP),
    projects=True,
)  # fmt: skip
