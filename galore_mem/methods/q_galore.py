"""Q-GaLore: INT8 weights, INT4 projector, 8-bit moments, and refreshes only where the subspace still moves.

Zhang, Jaiswal, Yin, Liu, Zhao, Tian, Wang: Q-GaLore: Quantized GaLore with INT4 Projection and Layer-Adaptive
Low-Rank Gradients, arXiv:2407.08296. Projected weights take one byte, and each group of 256 a scale and a
zero point in the gradient's format; their gradients are full ones in that format.

galore-mem: two projector values per byte. A weight is updated and rounded stochastically in float32, in blocks
of rows of about 2**22 elements, so that no full-size copy exists; a refresh compares the new projector with
the old one and keeps nothing else. q-galore-torch (VITA-Group/Q-GaLore 5bd2f1c; the wheel 1.0 lacks the INT8
linear): each "INT4" value takes a byte of its own; `past_ortho_vector`, the first singular vector, stays; the
step has up to eleven full-size tensors. It needs bitsandbytes 0.43 and sizes that 256 divides.
"""

from __future__ import annotations

from galore_mem.dtypes import FLOAT32, INT4, UINT8, DType
from galore_mem.memory.tape import GRADIENTS, WEIGHTS, Shape, Tensor
from galore_mem.methods import galore_8bit, projection
from galore_mem.methods.adamw_8bit import lookup_tables
from galore_mem.methods.base import (
    RANK, UPDATE_PROJ_GAP, Buffer, Citation, Implementation, Job, Method, Slot, Slots, Stored, Trained, dense,
)  # fmt: skip
from galore_mem.methods.galore_8bit import kernel, moments
from galore_mem.methods.projection import OURS, REFERENCE, applies, factor, lowered, raised, regular_first
from galore_mem.methods.svd import SVD_WORKSPACE, full_svd
from galore_mem.spec.model import ParamSpec
from galore_mem.units import ceil_div

GROUP = 256
BLOCK = 2**22


def groups(numel: int) -> Shape:
    """A value for each group of 256 elements."""
    return ceil_div(numel, GROUP), 1


def store(row: ParamSpec, projected: bool, job: Job) -> tuple[Stored, ...]:
    """Projected weights as uint8 codes with `scales` and `zeros`; the rest as it is."""
    if not projected or len(row.shape) != 2:
        return dense(row, projected, job)
    given = job.recipe.weights
    return (
        Stored("", row.shape, UINT8, given),
        Stored(".scales", groups(row.count), given, None),
        Stored(".zeros", groups(row.count), given, None),
    )


def projector_shape(p: Trained, job: Job) -> Shape:
    return factor(p, projection.one_side(p, job), job.r(p))


def quantized_projector(p: Trained, job: Job, name: str, codes: DType, shape: Shape) -> tuple[Buffer, ...]:
    """Codes, and a scale and a zero point per group in the gradient's format."""
    m, n = projector_shape(p, job)
    return (
        Buffer(name, shape, codes),
        Buffer(f"{name}_scales", groups(m * n), p.dtype),
        Buffer(f"{name}_zeros", groups(m * n), p.dtype),
    )


# -- galore-mem ------------------------------------------------------------------------------------


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
    noise = slot.new(block, FLOAT32)
    del weight, noise


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


# -- q-galore-torch --------------------------------------------------------------------------------


def state_reference(p: Trained, job: Job) -> tuple[Buffer, ...]:
    """`projector.ortho_matrix` as groups x 256 bytes, its scales and zeros, `projector.past_ortho_vector`, and
    bitsandbytes' states."""
    if not applies(p):
        return moments(p, job)
    m, n = projector_shape(p, job)
    return (
        *quantized_projector(p, job, REFERENCE, UINT8, (ceil_div(m * n, GROUP), GROUP)),
        Buffer("projector.past_ortho_vector", (p.m,), p.dtype),
        *moments(p, job),
    )


def step_reference(slots: Slots, job: Job, refresh: bool) -> None:
    """AdamW8bit.step. While a float weight stands in for the codes their storage is gone; `float_weight` and
    `saved_data` of the previous parameter are there until the next ones take their names."""
    float_weight: Tensor | None = None
    saved_data: Tensor | None = None
    for slot, projected in regular_first(slots):
        p = slot.param
        if not projected:
            kernel(slot, job)
            continue
        float_weight = slot.like()
        data = slot.like()  # p.data.to(dtype)
        gone = slot.tape.bytes(-UINT8.nbytes(p.shape), WEIGHTS)
        data = slot.like(data)  # float_weight.clone()
        if refresh:
            renew_reference(slot, job)
        matrix = _dequantized(slot, job)
        grad = lowered(slot, job, p.dtype)
        del matrix
        saved = slot.like()  # p.saved_data = p.data.clone()
        data = slot.new(grad.shape, p.dtype)
        grad.storage.move(GRADIENTS)
        slot.grad = grad
        kernel(slot, job, grad, data)
        matrix = _dequantized(slot, job)
        slot.like(raised(slot, job, p.dtype))
        del matrix
        data = saved
        del saved
        saved_data = slot.like()  # p.data.clone()
        codes = _stochastic_round(slot)
        del data, codes, gone
    del float_weight, saved_data


def _dequantized(slot: Slot, job: Job) -> Tensor:
    """`scales * (ortho_matrix.to(dtype) - zeros)`: two of the three tensors at a time."""
    shape, dtype = projector_shape(slot.param, job), slot.param.dtype
    shifted = slot.new(shape, dtype, slot.new(shape, dtype))
    return slot.new(shape, dtype, shifted)


def _stochastic_round(slot: Slot) -> Tensor:
    """_quantize_stochastic_round: `w_round`, `up_round_w`, `down_round_w`, `probability` and `random` to the end;
    then the chosen values, those plus `zeros`, those clamped."""
    group, dtype = groups(slot.param.numel), slot.param.dtype
    kept = [slot.new(group, dtype) for _ in range(4)]  # max_val, min_val, scales, zeros
    kept += [slot.like() for _ in range(5)]
    chosen = slot.like(slot.new(slot.param.shape, UINT8))
    chosen = slot.like(chosen, slot.like())
    codes = slot.new(slot.param.shape, UINT8)
    del kept, chosen
    return codes


def renew_reference(slot: Slot, job: Job) -> None:
    """get_orthogonal_matrix, then `_quantize` of the projector."""
    p = slot.param
    (matrix,) = projection.ortho_matrix(slot, job, p.dtype, product=True)
    slot.keep(Buffer("projector.past_ortho_vector", (p.m,), p.dtype))
    rounded = slot.new(matrix.shape, p.dtype, slot.new(matrix.shape, p.dtype))
    clamped = slot.new(matrix.shape, p.dtype, slot.new(matrix.shape, p.dtype, rounded))
    shape = (ceil_div(matrix.numel, GROUP), GROUP)
    for buffer in quantized_projector(p, job, REFERENCE, UINT8, shape):
        slot.keep(buffer)
    del clamped


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
        Implementation(
            name="q-galore-torch", version="Q-GaLore 5bd2f1c, bitsandbytes 0.43",
            source="q_galore_torch/q_galore_adamw8bit.py, q_galore_projector.py, utils/quantization.py",
            state=state_reference, step=step_reference, shared=lookup_tables, store=store, linear="int8",
            refreshes=True, not_counted=(SVD_WORKSPACE,),
            equations={**EQUATIONS, "projected": EQUATIONS["projected"].replace("m·r/2", "m·r + m·e")},
            notes=(
                "INT4 values of the projector are stored one per byte",
                "after the step each projected gradient is the low-rank one until it is set to None",
                "bitsandbytes 0.44 and later break it",
            ),
        ),
    ),
    hyperparameters=(RANK, UPDATE_PROJ_GAP),
    projects=True,
)  # fmt: skip
