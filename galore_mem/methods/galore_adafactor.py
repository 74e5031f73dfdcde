"""GaLore with Adafactor inside: row and column means of the squared low-rank gradient.

Zhao, Zhang, Chen, Wang, Anandkumar, Tian: GaLore, arXiv:2403.03507, section 5; Shazeer, Stern: Adafactor,
arXiv:1804.04235. Besides the projector's m·r a matrix keeps n + r values, and n·r more with a first moment.

galore-mem: projector and first moment in the gradient's format, second moments in float32. The means come
from `vector_norm`, which reads the gradient without a copy; the low-rank gradient is scaled in place into
the update (in float16 a float32 copy of it, for the factors leave float16's range). galore-torch 1.0
(galore_torch/adafactor.py): everything in float32. Half-precision gradients and parameters are copied to
float32, so the projector is always a view that keeps a whole factor alive.
"""

from __future__ import annotations

from galore_mem.dtypes import FLOAT32, DType, at_least_float32, of_squares
from galore_mem.memory.tape import Shape, Tensor
from galore_mem.methods import adafactor, galore, projection
from galore_mem.methods.adafactor import approx_sq_grad, cols, rows, squared_plus_eps
from galore_mem.methods.base import (
    RANK,
    UPDATE_PROJ_GAP,
    Buffer,
    Hyperparameter,
    Implementation,
    Job,
    Method,
    Slot,
    Slots,
    Trained,
)
from galore_mem.methods.eager import as_float32, converted, mean, norm
from galore_mem.methods.projection import PROJ_TYPE, applies, low_shape, lowered, raised, regular_first
from galore_mem.methods.svd import SVD_WORKSPACE

BETA1 = Hyperparameter("beta1", 0.0, "above 0: a first moment is kept")


def _first_moment(job: Job) -> bool:
    return float(job.hyperparameters["beta1"]) != 0.0


def seen(p: Trained, job: Job) -> Shape:
    """Shape of the gradient that Adafactor sees."""
    return low_shape(p, job) if applies(p) else p.shape


def adafactor_state(p: Trained, job: Job, first: DType, second: DType) -> tuple[Buffer, ...]:
    """`exp_avg` if asked for; row and column means (a vector: the whole second moment)."""
    shape = seen(p, job)
    moment = (Buffer("exp_avg", shape, first),) if _first_moment(job) else ()
    return *moment, *means(shape, second)


def means(shape: Shape, dtype: DType) -> tuple[Buffer, ...]:
    """The second moment of a gradient of this shape."""
    if len(shape) < 2:
        return (Buffer("exp_avg_sq", shape, dtype),)
    return Buffer("exp_avg_sq_row", rows(shape), dtype), Buffer("exp_avg_sq_col", cols(shape), dtype)


def state(p: Trained, job: Job) -> tuple[Buffer, ...]:
    """`projector` and Adafactor's state of the low-rank gradient; no `RMS`."""
    projector = projection.copied(p, job, p.dtype) if applies(p) else ()
    return *projector, *adafactor_state(p, job, p.dtype, at_least_float32(p.dtype))


def step(slots: Slots, job: Job, refresh: bool) -> None:
    """GaLoreAdafactor.step: the low-rank gradient (elsewhere a copy of the gradient) is scaled by its row and
    its column factors in place; with a first moment, it is gone before that is applied."""
    for slot in slots:
        p = slot.param
        if not applies(p):
            update = own(slot)
        else:
            if refresh:
                projection.renew(slot, job)
            update = lowered(slot, job, p.dtype)
            update = in_range(slot, update)
        normalized(slot, update)
        update = projection.cast(slot, update)
        if _first_moment(job):
            update = slot.state["exp_avg"]
        if applies(p):
            projection.added(slot, job, update)
        del update


def own(slot: Slot) -> Tensor:
    """A copy of the gradient: in its format, for vectors and in float16 in float32."""
    p = slot.param
    return slot.new(p.shape, of_squares(p.dtype) if len(p.shape) >= 2 else at_least_float32(p.dtype))


def in_range(slot: Slot, tensor: Tensor) -> Tensor:
    """`tensor.float()` of a float16 one."""
    return converted(slot, tensor, of_squares(tensor.dtype))


def normalized(slot: Slot, update: Tensor) -> None:
    """The update in place of the gradient: factors from the means (of a vector, the divisor), then its RMS."""
    shape, dtype = update.shape, update.dtype
    if len(shape) < 2:
        slot.new(shape, dtype)
        return
    by_row, by_col = factors(slot, shape, dtype)
    del by_row, by_col
    rms(slot, shape, dtype)


def factors(slot: Slot, shape: Shape, dtype: DType) -> tuple[Tensor, Tensor]:
    """Means by `vector_norm`, squared in float32; then the factors in the gradient's format."""
    wide = at_least_float32(dtype)
    for over in (-1, -2):
        widened(slot, norm(slot, shape, dtype, over))
    by_row = slot.new(rows(shape), wide, slot.new((*shape[:-2], 1), wide))
    by_row = converted(slot, by_row, dtype)
    return by_row, converted(slot, slot.new(cols(shape), wide), dtype)


def rms(slot: Slot, shape: Shape, dtype: DType) -> None:
    """Norms of rows, and of those the norm."""
    of_rows = widened(slot, norm(slot, shape, dtype, -1))
    norm(slot, of_rows.shape, of_rows.dtype, None)


def widened(slot: Slot, tensor: Tensor) -> Tensor:
    return converted(slot, tensor, at_least_float32(tensor.dtype))


def state_reference(p: Trained, job: Job) -> tuple[Buffer, ...]:
    """`projector.ortho_matrix`, Adafactor's state and `RMS`; all float32."""
    projector = projection.sliced(p, job, FLOAT32) if applies(p) else ()
    return *projector, *adafactor_state(p, job, FLOAT32, FLOAT32), Buffer("RMS", (), FLOAT32)


def step_reference(slots: Slots, job: Job, refresh: bool) -> None:
    """Adafactor.step: as transformers' Adafactor between the two projections. The previous parameter's copy and
    its full-size update are there until the next ones take their names."""
    grad: Tensor | None = None
    param: Tensor | None = None
    update: Tensor | None = None
    for slot, projected in regular_first(slots):
        shape = seen(slot.param, job)
        grad = slot.grad
        grad = as_float32(slot, grad)
        if projected:
            if refresh:
                projection.renew_sliced(slot, job, FLOAT32, product=True)
            grad = lowered(slot, job, FLOAT32)
        param = slot.weight
        param = as_float32(slot, param)
        slot.keep(Buffer("RMS", (), FLOAT32))
        update = squared_plus_eps(slot, shape)
        if len(shape) >= 2:
            for over in (-1, -2):
                mean(slot, job, shape, FLOAT32, over)
            update = approx_sq_grad(slot, shape)
        else:
            update = slot.new(shape, FLOAT32)  # exp_avg_sq.rsqrt().mul_(grad)
        if _first_moment(job):
            update = slot.state["exp_avg"]
        if projected:
            update = slot.new(slot.param.shape, FLOAT32, raised(slot, job, FLOAT32))
        slot.new(slot.param.shape, FLOAT32)  # -update
    del grad, param, update


def state_paper(p: Trained, job: Job) -> tuple[Buffer, ...]:
    """m·r + n + r, and n·r with a first moment; m + n for what is not projected."""
    first = _first_moment(job)
    if not applies(p):
        moment = (Buffer("exp_avg", p.shape, p.dtype),) if first else ()
        return *moment, *(Buffer(b.name, b.shape, p.dtype) for b in adafactor.second_moment(p))
    r = job.r(p)
    moment = (Buffer("exp_avg", (r, p.n), p.dtype),) if first else ()
    return (
        Buffer("projector", (p.m, r), p.dtype), *moment,
        Buffer("exp_avg_sq_row", (r,), p.dtype), Buffer("exp_avg_sq_col", (p.n,), p.dtype),
    )  # fmt: skip


EQUATIONS = {"projected": "m·r + (n + r) at 4 bytes; + n·r with beta1", "other": "(m + n) at 4 bytes; + m·n with beta1"}

METHOD = Method(
    name="galore-adafactor",
    title="GaLore (Adafactor)",
    citation=galore.CITATION,
    paper=Implementation(
        "paper", "arXiv:2403.03507, 1804.04235", "projector mr; Adafactor's factored moment of an r x n gradient",
        state_paper, equations={"projected": "m·r + n + r; + n·r with beta1", "other": "m + n; + m·n with beta1"},
    ),
    implementations=(
        Implementation(
            name="galore-mem", version="galore-mem", source="galore_mem/optim",
            state=state, step=step, refreshes=True, compresses=projection.compressed,
            equations=EQUATIONS, not_counted=(SVD_WORKSPACE,),
        ),
        Implementation(
            name="galore-torch", version="galore-torch 1.0", source="galore_torch/adafactor.py",
            state=state_reference, step=step_reference, refreshes=True, not_counted=(SVD_WORKSPACE,),
            equations={**EQUATIONS, "projected": "(m·m + n + r) at 4 bytes; + n·r with beta1"},
            notes=("gradients are projected in float32: the projector keeps a whole m x m factor alive in any format",),
        ),
    ),
    hyperparameters=(RANK, UPDATE_PROJ_GAP, PROJ_TYPE, BETA1),
)  # fmt: skip
