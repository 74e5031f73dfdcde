"""Q-GaLore as its package runs it, and the INT8 storage that ours shares (see `q_galore.py` for the method).

q-galore-torch: VITA-Group/Q-GaLore 5bd2f1c, q_galore_torch/q_galore_adamw8bit.py, q_galore_projector.py and
utils/quantization.py (the wheel 1.0 lacks the INT8 linear). Each "INT4" value takes a byte of its own;
`past_ortho_vector`, the first singular vector, stays; the step has up to eleven full-size tensors. It needs
bitsandbytes 0.43 (later ones take other arguments) and sizes that 256 divides.
"""

from __future__ import annotations

from galore_mem.dtypes import UINT8, DType
from galore_mem.errors import InputError
from galore_mem.memory.tape import GRADIENTS, WEIGHTS, Shape, Tensor
from galore_mem.methods import projection
from galore_mem.methods.adamw_8bit import lookup_tables
from galore_mem.methods.base import Buffer, Implementation, Job, Slot, Slots, Stored, Trained, dense
from galore_mem.methods.galore_8bit import EQUATIONS, kernel, moments
from galore_mem.methods.projection import REFERENCE, applies, factor, lowered, raised, regular_first
from galore_mem.methods.svd import SVD_WORKSPACE
from galore_mem.spec.model import ParamSpec
from galore_mem.units import ceil_div

GROUP = 256


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
    """Raises `InputError` for another side than `std`, as the package does (by an assertion)."""
    if job.hyperparameters.get("proj_type", "std") != "std":
        raise InputError("q-galore-torch has proj_type std only; the galore-mem implementation has the others")
    return factor(p, projection.one_side(p, job), job.r(p))


def quantized_projector(p: Trained, job: Job, name: str, codes: DType, shape: Shape) -> tuple[Buffer, ...]:
    """Codes, and a scale and a zero point per group in the gradient's format."""
    m, n = projector_shape(p, job)
    return (
        Buffer(name, shape, codes),
        Buffer(f"{name}_scales", groups(m * n), p.dtype),
        Buffer(f"{name}_zeros", groups(m * n), p.dtype),
    )


def state(p: Trained, job: Job) -> tuple[Buffer, ...]:
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


def step(slots: Slots, job: Job, refresh: bool) -> None:
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
            renew(slot, job)
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


def renew(slot: Slot, job: Job) -> None:
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


PACKAGE = Implementation(
    name="q-galore-torch", version="Q-GaLore 5bd2f1c, bitsandbytes 0.43",
    source="q_galore_torch/q_galore_adamw8bit.py, q_galore_projector.py, utils/quantization.py",
    state=state, step=step, shared=lookup_tables, one_each=True, store=store, linear="int8-package", refreshes=True,
    equations={
        "projected": "m·r + (2·⌈m·r/256⌉ + m)·e + 2·n·r + 8·⌈n·r/256⌉ bytes (e: bytes of a gradient's element)",
        "other": EQUATIONS["other"],
    },
    notes=(
        "INT4 values of the projector are stored one per byte",
        "after the step each projected gradient is the low-rank one until it is set to None",
        "bitsandbytes 0.44 and later break it",
    ),
    not_counted=(SVD_WORKSPACE,),
)  # fmt: skip
