"""CAME: Adafactor's factored second moment, a full first moment, and a factored measure of confidence.

Luo, Ren, Zheng, Jiang, Jiang, You: CAME: Confidence-guided Adaptive Memory Efficient Optimization,
ACL 2023, arXiv:2307.02047. A matrix keeps mn + 2(m + n) values, a vector twice its own.

The authors' code (came-pytorch 0.1.3, came_pytorch/CAME.py) keeps everything in float32 and works on a
float32 copy of a half-precision gradient; `RMS` has the parameter's format. pytorch_optimizer 4.1.0
(optimizer/came.py) keeps everything in the parameter's format and updates all parameters together
unless `foreach=False`.
"""

from __future__ import annotations

from galore_mem.dtypes import FLOAT32, DType
from galore_mem.memory.tape import Tensor
from galore_mem.methods.adafactor import approx_sq_grad, cols, factored, group, rows, squared_plus_eps
from galore_mem.methods.base import Buffer, Citation, Implementation, Job, Method, Slot, Slots, Trained
from galore_mem.methods.eager import add_float32, as_float32, mean


def moments(p: Trained, dtype: DType) -> tuple[Buffer, ...]:
    """`exp_avg`, and row and column means of squared gradient and of squared instability (a vector: the
    whole second moment, and no instability)."""
    if not factored(p):
        return Buffer("exp_avg", p.shape, dtype), Buffer("exp_avg_sq", p.shape, dtype)
    return (
        Buffer("exp_avg", p.shape, dtype),
        Buffer("exp_avg_sq_row", rows(p.shape), dtype),
        Buffer("exp_avg_sq_col", cols(p.shape), dtype),
        Buffer("exp_avg_res_row", rows(p.shape), dtype),
        Buffer("exp_avg_res_col", cols(p.shape), dtype),
    )


def state(p: Trained, job: Job) -> tuple[Buffer, ...]:
    """Moments in float32; `RMS` as the parameter."""
    return (*moments(p, FLOAT32), Buffer("RMS", (), p.dtype))


def step(slots: Slots, job: Job, refresh: bool) -> None:
    """CAME.step. Names outlive the iteration: the previous parameter's gradient copy, update, `res` and
    `res_approx` are there until the next ones take their names."""
    grad: Tensor | None = None
    update = res = res_approx = None
    for slot in slots:
        shape = slot.param.shape
        grad = slot.grad
        grad = as_float32(slot, grad)
        slot.keep(Buffer("RMS", (), slot.param.dtype))
        update = squared_plus_eps(slot, shape)
        if factored(slot.param):
            for over in (-1, -2):
                mean(slot, job, shape, FLOAT32, over)
            update = approx_sq_grad(slot, shape)
        else:
            update = slot.new(shape, FLOAT32)  # exp_avg_sq.rsqrt().mul_(grad)
        res = _instability(slot)
        if factored(slot.param):
            for over in (-1, -2):
                mean(slot, job, shape, FLOAT32, over)
            res_approx = approx_sq_grad(slot, shape)
            update = res_approx
        else:
            update = slot.new(shape, FLOAT32)  # exp_avg.clone()
        negated = slot.new(shape, FLOAT32)
        add_float32(slot, job)
        del negated
    del grad, update, res, res_approx


def _instability(slot: Slot) -> Tensor:
    """`(update - exp_avg)**2 + eps`: of the three tensors two are alive at a time."""
    shape = slot.param.shape
    squared = slot.new(shape, FLOAT32, slot.new(shape, FLOAT32))
    return slot.new(shape, FLOAT32, squared)


def state_foreach(p: Trained, job: Job) -> tuple[Buffer, ...]:
    """Moments and `RMS` in the parameter's format."""
    return (*moments(p, p.dtype), Buffer("RMS", (), p.dtype))


def step_foreach(slots: Slots, job: Job, refresh: bool) -> None:
    """CAME._step_foreach: vectors first, then matrices; the updates of a group, and for matrices the
    instabilities, are alive together."""
    _new_rms(slots, matrices=False)
    updates = [slot.like() for slot in group(slots, matrices=False)]
    updates = [slot.like() for slot in group(slots, matrices=False)]  # rsqrt() while the squares are there
    clipping = [slot.new((), slot.param.dtype) for slot in group(slots, matrices=False)]
    del updates, clipping
    _new_rms(slots, matrices=True)
    updates = [slot.like() for slot in group(slots, matrices=True)]
    _means_and_factors(slots, job)
    clipping = [slot.new((), slot.param.dtype) for slot in group(slots, matrices=True)]
    residuals = [slot.like() for slot in group(slots, matrices=True)]
    _means_and_factors(slots, job)
    del updates, clipping, residuals


def _new_rms(slots: Slots, *, matrices: bool) -> None:
    for slot in group(slots, matrices=matrices):
        slot.keep(Buffer("RMS", (), slot.param.dtype))


def _means_and_factors(slots: Slots, job: Job) -> None:
    """Row means of all, column means of all, then one parameter's row and column factors at a time."""
    for over in (-1, -2):
        means = [mean(slot, job, slot.param.shape, slot.param.dtype, over) for slot in group(slots, matrices=True)]
        del means
    for slot in group(slots, matrices=True):
        factors = [slot.new(side(slot.param.shape), slot.param.dtype) for side in (rows, cols)]
        del factors


def state_paper(p: Trained, job: Job) -> tuple[Buffer, ...]:
    """mn + 2(m + n) values for a matrix."""
    return moments(p, FLOAT32)


EQUATIONS = {"other": "m·n + 2·(m + n) at 4 bytes; vectors 2·n"}

METHOD = Method(
    name="came",
    title="CAME",
    citation=Citation(
        "CAME: Confidence-guided Adaptive Memory Efficient Optimization",
        "Luo, Ren, Zheng, Jiang, Jiang, You", "arXiv:2307.02047",
    ),
    paper=Implementation("paper", "arXiv:2307.02047", "algorithm 2: m, r, c, R, C", state_paper, equations=EQUATIONS),
    implementations=(
        Implementation(
            name="came-pytorch", version="came-pytorch 0.1.3", source="came_pytorch/CAME.py:CAME",
            state=state, step=step, equations=EQUATIONS,
            notes=("half-precision gradients are copied to float32 one parameter at a time",),
        ),
        Implementation(
            name="pytorch-optimizer", version="pytorch_optimizer 4.1.0", source="pytorch_optimizer/optimizer/came.py",
            one_by_one=False,
            state=state_foreach, step=step_foreach, equations={"other": "m·n + 2·(m + n); vectors 2·n"},
            notes=("updates and instabilities of all matrices are alive at once: two more copies of the parameters",),
        ),
    ),
)  # fmt: skip
