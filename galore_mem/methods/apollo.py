"""APOLLO: the gradient itself, scaled per channel by what AdamW does to its random projection.

Zhu, Zhang, Cong, Liu, Park, Chandra, Long, Pan, Wang, Lee: APOLLO: SGD-like Memory, AdamW-level Performance,
MLSys 2025, arXiv:2412.05270. The paper counts 2nr + 2 (the projector is made again from its seed).

apollo-torch 1.0.3 (apollo_torch/apollo.py, random_projector.py, svd_projector.py) keeps the random projector
and does not clip its rank; with `proj=svd` it is GaLore's, a view of the whole factor in float32.
`scaled_grad`, a scalar, is the last norm. Only `proj_type="std"` runs: with another side the scales do not fit
the gradient. Names outlive the iteration: the previous parameter's `scaled_grad` is there while this one's is
made.
"""

from __future__ import annotations

from functools import partial

from galore_mem.dtypes import FLOAT32, INT64
from galore_mem.errors import unknown
from galore_mem.memory.tape import Shape, Tensor
from galore_mem.methods import adamw, projection
from galore_mem.methods.base import (
    RANK,
    UPDATE_PROJ_GAP,
    Buffer,
    Citation,
    Hyperparameter,
    Implementation,
    Job,
    Method,
    Slot,
    Slots,
    Trained,
)
from galore_mem.methods.eager import norm
from galore_mem.methods.projection import REFERENCE, applies, factor, one_side, regular_first
from galore_mem.methods.svd import SVD_WORKSPACE

PROJ = Hyperparameter("proj", "random", "where APOLLO's projector comes from", choices=("random", "svd"))
CITATION = Citation(
    "APOLLO: SGD-like Memory, AdamW-level Performance",
    "Zhu, Zhang, Cong, Liu, Park, Chandra, Long, Pan, Wang, Lee", "arXiv:2412.05270",
)  # fmt: skip
SOURCE = "apollo_torch/apollo.py, apollo_torch/random_projector.py"


def by_svd(job: Job) -> bool:
    kind = job.text("proj")
    if kind not in ("random", "svd"):
        raise unknown("proj", kind, ("random", "svd"))
    return kind == "svd"


def rank(p: Trained, job: Job) -> int:
    """The given rank: random projectors may have more columns than the matrix; SVD has no more to give."""
    given = int(job.hyperparameters.get("rank", 1))
    return min(given, p.m) if by_svd(job) else given


def low_shape(p: Trained, job: Job) -> Shape:
    side, r = one_side(p, job), rank(p, job)
    return (r, p.shape[1]) if side == "left" else (p.shape[0], r)


def state(p: Trained, job: Job) -> tuple[Buffer, ...]:
    """`projector.ortho_matrix`, `exp_avg`, `exp_avg_sq` and `scaled_grad`, in the gradient's format."""
    if not applies(p):
        return adamw.moments(p, job)
    side, r = one_side(p, job), rank(p, job)
    projector = Buffer(REFERENCE, factor(p, side, r), p.dtype)
    if by_svd(job) and p.dtype is FLOAT32:
        projector = Buffer(REFERENCE, factor(p, side, r), FLOAT32, storage_bytes=FLOAT32.nbytes(factor(p, side, p.m)))
    low = low_shape(p, job)
    return projector, Buffer("exp_avg", low, p.dtype), Buffer("exp_avg_sq", low, p.dtype), _norm(p)


def _norm(p: Trained) -> Buffer:
    return Buffer("scaled_grad", (), p.dtype)


def step(slots: Slots, job: Job, refresh: bool, *, tensor_wise: bool) -> None:
    """AdamW.step of apollo_torch/apollo.py; `tensor_wise` is `scale_type="tensor"`."""
    grad: Tensor | None = None
    denom: Tensor | None = None
    norm_grad: Tensor | None = None
    factors: Tensor | None = None
    scaled_grad: Tensor | None = None
    for slot, projected in regular_first(slots):
        p = slot.param
        grad = slot.grad
        if projected:
            if refresh:
                renew(slot, job)
            grad = slot.new(low_shape(p, job), p.dtype)
        shape = low_shape(p, job) if projected else p.shape
        denom = slot.new(shape, p.dtype)
        norm_grad = slot.new(shape, p.dtype)
        if projected:
            over = None if tensor_wise else 0 if p.shape[0] < p.shape[1] else 1
            of_update = norm(slot, shape, p.dtype, over)
            norms = of_update, slot.new(of_update.shape, p.dtype, norm(slot, shape, p.dtype, over))
            del of_update
            factors = slot.new(norms[0].shape, p.dtype, norms)
            del norms
            scaled_grad = slot.like()
            scaled_grad = slot.like()  # / limiter
            slot.keep(_norm(p))
            norm_grad = scaled_grad
    del grad, denom, norm_grad, factors, scaled_grad


def renew(slot: Slot, job: Job) -> None:
    """A float32 `randn`, divided by sqrt(r), cast; a half-precision gradient is copied to float32 all the same."""
    p = slot.param
    if by_svd(job):
        projection.renew_sliced(slot, job, p.dtype, product=True)
        return
    shape = factor(p, one_side(p, job), rank(p, job))
    if p.dtype is FLOAT32:
        slot.new(shape, FLOAT32)  # randn: the quotient is the projector
        slot.keep(Buffer(REFERENCE, shape, FLOAT32))
        return
    matrix = slot.new(p.shape, FLOAT32)
    scaled = slot.new(shape, FLOAT32, slot.new(shape, FLOAT32))
    slot.keep(Buffer(REFERENCE, shape, p.dtype))
    del matrix, scaled


def state_paper(p: Trained, job: Job) -> tuple[Buffer, ...]:
    """2·n·r, a seed and the last norm; 2·m·n for what is not projected."""
    if not applies(p):
        return adamw.moments(p, job)
    r = min(int(job.hyperparameters.get("rank", 1)), p.m)
    low = (r, p.n)
    return Buffer("exp_avg", low, p.dtype), Buffer("exp_avg_sq", low, p.dtype), Buffer("seed", (), INT64), _norm(p)


METHOD = Method(
    name="apollo",
    title="APOLLO",
    citation=CITATION,
    paper=Implementation(
        "paper", "arXiv:2412.05270", "table 1: 2nr + 2", state_paper,
        equations={"projected": "2·n·r + 2", "other": "2·m·n"},
    ),
    implementations=(
        Implementation(
            name="apollo-torch", version="apollo-torch 1.0.3", source=SOURCE,
            state=state, step=partial(step, tensor_wise=False), refreshes=True,
            equations={"projected": "m·r + 2·n·r + 1", "other": "2·m·n"},
            notes=("the random projector is kept, not made again from its seed: as many bytes as GaLore's",),
            not_counted=(SVD_WORKSPACE,),
        ),
    ),
    hyperparameters=(RANK, UPDATE_PROJ_GAP, PROJ),
)  # fmt: skip
