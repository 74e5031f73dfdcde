"""Fira: GaLore's update, plus the part of the gradient outside the subspace, scaled by the same norms.

Chen, Feng, Li, Lai, Yue, Yuan, Wang: Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank
Constraint?, arXiv:2410.01623. States mr + 2nr + 1.

fira 1.0.2 (fira/fira_adamw.py, gradient_projection.py): GaLore's state with the same view of a whole factor
in float32, and `scaling_grad`, the last norm. `subgrad`, `scaling_grad` and `norm_grad`, all of full size,
outlive the iteration.
"""

from __future__ import annotations

from galore_mem.memory.tape import Tensor
from galore_mem.methods import adamw, galore, projection
from galore_mem.methods.base import (
    RANK,
    UPDATE_PROJ_GAP,
    Buffer,
    Citation,
    Implementation,
    Job,
    Method,
    Slots,
    Trained,
)
from galore_mem.methods.eager import norm
from galore_mem.methods.projection import PROJ_TYPE, applies, low_shape, lowered, one_side, raised, regular_first
from galore_mem.methods.svd import SVD_WORKSPACE


def _norm(p: Trained) -> Buffer:
    return Buffer("scaling_grad", (), p.dtype)


def state(p: Trained, job: Job) -> tuple[Buffer, ...]:
    """`projector.ortho_matrix`, `exp_avg`, `exp_avg_sq`, `scaling_grad`."""
    if not applies(p):
        return adamw.moments(p, job)
    one_side(p, job)
    return *projection.sliced(p, job, p.dtype), *projection.moments(p, job, p.dtype), _norm(p)


def step(slots: Slots, job: Job, refresh: bool) -> None:
    """AdamW.step of fira/fira_adamw.py."""
    grad: Tensor | None = None
    denom: Tensor | None = None
    norm_grad: Tensor | None = None
    subgrad: Tensor | None = None
    factors: Tensor | None = None
    scaling_grad: Tensor | None = None
    for slot, projected in regular_first(slots):
        p = slot.param
        dtype = p.dtype
        grad = slot.grad
        if projected:
            if refresh:
                projection.renew_sliced(slot, job, dtype, product=False)
            grad = lowered(slot, job, dtype)
        shape = low_shape(p, job) if projected else p.shape
        denom = slot.new(shape, dtype)
        norm_grad = slot.new(shape, dtype)
        if projected:
            subgrad = slot.like(raised(slot, job, dtype))
            over = 0 if shape[0] < shape[1] else 1
            of_update = norm(slot, shape, dtype, over)
            norms = of_update, slot.new(of_update.shape, dtype, norm(slot, shape, dtype, over))
            del of_update
            factors = slot.new(norms[0].shape, dtype, norms)
            del norms
            scaling_grad = slot.like(slot.like())  # (p.grad - subgrad) * scaling_factor
            scaling_grad = slot.like()  # / limiter
            slot.keep(_norm(p))
            back = slot.like(raised(slot, job, dtype))
            norm_grad = slot.like(back)
            del back
    del grad, denom, norm_grad, subgrad, factors, scaling_grad


def state_paper(p: Trained, job: Job) -> tuple[Buffer, ...]:
    """m·r + 2·n·r + 1; 2·m·n for what is not projected."""
    return *galore.state_paper(p, job), *((_norm(p),) if applies(p) else ())


METHOD = Method(
    name="fira",
    title="Fira",
    citation=Citation(
        "Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?",
        "Chen, Feng, Li, Lai, Yue, Yuan, Wang", "arXiv:2410.01623",
    ),
    paper=Implementation(
        "paper", "arXiv:2410.01623", "mr + 2nr + 1", state_paper,
        equations={"projected": "m·r + 2·n·r + 1", "other": "2·m·n"},
    ),
    implementations=(
        Implementation(
            name="fira", version="fira 1.0.2", source="fira/fira_adamw.py, fira/gradient_projection.py",
            state=state, step=step, refreshes=True, not_counted=(SVD_WORKSPACE,),
            equations={
                "projected": "m·r + 2·n·r + 1 (float32 gradients: m·m + 2·n·r + 1, the whole factor stays alive)",
                "other": "2·m·n",
            },
            notes=("the step has up to seven full-size tensors: names outlive the iteration",),
        ),
    ),
    hyperparameters=(RANK, UPDATE_PROJ_GAP, PROJ_TYPE),
)  # fmt: skip
