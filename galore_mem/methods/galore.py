"""GaLore: AdamW on the gradient projected into a low-rank subspace that is renewed every few hundred steps.

Zhao, Zhang, Chen, Wang, Anandkumar, Tian: GaLore: Memory-Efficient LLM Training by Gradient Low-Rank
Projection, ICML 2024, arXiv:2403.03507, algorithm 2 and table 1: weights mn, states mr + 2nr (m <= n).
This is GaLore with AdamW inside; `galore-8bit`, `galore-adafactor`, `q-galore` are the others.

All implementations keep the projector and both moments in the gradient's format, the step as a Python
int, and treat parameters outside the targets as AdamW does (two moments in their own format).

galore-mem: the projector is a copy of r columns. The low-rank gradient is overwritten by the update,
which is projected back and added in one product (`weight.addmm_`), so the step needs r·n elements.
galore-torch 1.0 (galore_torch/adamw.py, galore_projector.py): in float32 the projector keeps the whole
U or Vh alive (m·m elements at any rank); the step needs 3·r·n + 2·m·n; names outlive the iteration; a
refresh also computes a scaled factor that nobody uses. pytorch_optimizer 4.1.0 (optimizer/galore.py,
utils/galore.py): a copied projector, 2·r·n + m·n, and one update for all other parameters together.
"""

from __future__ import annotations

from collections.abc import Callable

from galore_mem.dtypes import of_squares
from galore_mem.memory.tape import Tensor
from galore_mem.methods import adamw, projection
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
    Trained,
)
from galore_mem.methods.projection import (
    PROJ_TYPE,
    REFERENCE,
    added,
    applies,
    low_shape,
    lowered,
    raised,
    regular_first,
)
from galore_mem.methods.randomized import randomized
from galore_mem.methods.svd import SVD_WORKSPACE

EQUATIONS = {"projected": "m·r + 2·n·r", "other": "2·m·n"}


def state(p: Trained, job: Job) -> tuple[Buffer, ...]:
    """`projector`, `exp_avg`, `exp_avg_sq` (float32 where the parameter is float16)."""
    shape = low_shape(p, job) if applies(p) else p.shape
    return (
        *(projection.copied(p, job, p.dtype) if applies(p) else ()),
        Buffer("exp_avg", shape, p.dtype),
        Buffer("exp_avg_sq", shape, of_squares(p.dtype)),
    )


def step(slots: Slots, job: Job, refresh: bool, renew: Callable[[Slot, Job], None] = projection.renew) -> None:
    """GaLoreAdamW.step: nothing outlives a parameter. The low-rank gradient's tensor becomes
    `sqrt(exp_avg_sq) + eps`, then the update; other parameters need one `sqrt(exp_avg_sq)`."""
    for slot in slots:
        if not applies(slot.param):
            slot.new(slot.param.shape, of_squares(slot.param.dtype))
            continue
        if refresh:
            renew(slot, job)
        update = lowered(slot, job, slot.param.dtype)
        added(slot, job, update)
        del update


def state_reference(p: Trained, job: Job) -> tuple[Buffer, ...]:
    """`projector.ortho_matrix`, `exp_avg`, `exp_avg_sq`."""
    if not applies(p):
        return adamw.moments(p, job)
    return *projection.sliced(p, job, p.dtype), *projection.moments(p, job, p.dtype)


def step_reference(slots: Slots, job: Job, refresh: bool) -> None:
    """AdamW.step. The previous parameter's `grad`, `denom` and `norm_grad` are there until the next ones
    take their names; `project_back` returns a scaled copy."""
    grad: Tensor | None = None
    denom: Tensor | None = None
    norm_grad: Tensor | None = None
    for slot, projected in regular_first(slots):
        p = slot.param
        grad = slot.grad
        if projected:
            if refresh:
                projection.renew_sliced(slot, job, p.dtype, product=True)
            grad = lowered(slot, job, p.dtype)
        shape = low_shape(p, job) if projected else p.shape
        denom = slot.new(shape, p.dtype)
        norm_grad = slot.new(shape, p.dtype)
        if projected:
            norm_grad = slot.like(raised(slot, job, p.dtype))
    del grad, denom, norm_grad


def state_copied(p: Trained, job: Job) -> tuple[Buffer, ...]:
    """`projector.ortho_matrix`, `exp_avg`, `exp_avg_sq`."""
    if not applies(p):
        return adamw.moments(p, job)
    return *projection.copied(p, job, p.dtype, REFERENCE), *projection.moments(p, job, p.dtype)


def step_copied(slots: Slots, job: Job, refresh: bool) -> None:
    """GaLore.step: a foreach update of the unprojected parameters (denominators, then quotients), then the
    others one by one, `norm_grad` and `de_nom` being one tensor until the update is projected back."""
    de_noms = [slot.like() for slot in slots if not applies(slot.param)]
    updates = [slot.like() for slot in slots if not applies(slot.param)]
    del de_noms, updates
    grad: Tensor | None = None
    de_nom: Tensor | None = None
    norm_grad: Tensor | None = None
    for slot in slots:
        p = slot.param
        if not applies(p):
            continue
        grad = slot.grad
        if refresh:
            projection.renew(slot, job, REFERENCE)
        grad = lowered(slot, job, p.dtype)
        de_nom = slot.new(low_shape(p, job), p.dtype)
        norm_grad = de_nom
        norm_grad = raised(slot, job, p.dtype)
    del grad, de_nom, norm_grad


def state_paper(p: Trained, job: Job) -> tuple[Buffer, ...]:
    """m·r + 2·n·r; 2·m·n for what is not projected."""
    if not applies(p):
        return adamw.moments(p, job)
    r = job.r(p)
    return (
        Buffer("projector", (p.m, r), p.dtype),
        Buffer("exp_avg", (r, p.n), p.dtype),
        Buffer("exp_avg_sq", (r, p.n), p.dtype),
    )


OURS = Implementation(
    name="galore-mem", version="galore-mem", source="galore_mem/optim",
    state=state, step=step, refreshes=True, compresses=projection.compressed,
    equations=EQUATIONS, not_counted=(SVD_WORKSPACE,),
)  # fmt: skip
GALORE_TORCH = Implementation(
    name="galore-torch", version="galore-torch 1.0", source="galore_torch/adamw.py, galore_torch/galore_projector.py",
    state=state_reference, step=step_reference, refreshes=True,
    equations={**EQUATIONS, "projected": "m·r + 2·n·r (float32 gradients: m·m + 2·n·r, the whole factor stays alive)"},
    notes=("in float32 the projector is a view that keeps the whole m x m factor of the SVD alive",),
    not_counted=(SVD_WORKSPACE,),
)  # fmt: skip
PYTORCH_OPTIMIZER = Implementation(
    name="pytorch-optimizer", version="pytorch_optimizer 4.1.0", source="pytorch_optimizer/optimizer/galore.py",
    one_by_one=False,
    state=state_copied, step=step_copied, refreshes=True, equations=EQUATIONS,
    notes=("parameters outside the targets are updated together: two more copies of them during the step",),
    not_counted=(SVD_WORKSPACE,),
)  # fmt: skip

CITATION = Citation(
    "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection",
    "Zhao, Zhang, Chen, Wang, Anandkumar, Tian", "arXiv:2403.03507",
)  # fmt: skip
METHOD = Method(
    name="galore",
    title="GaLore",
    citation=CITATION,
    paper=Implementation("paper", "arXiv:2403.03507", "table 1: mr + 2nr", state_paper, equations=EQUATIONS),
    implementations=(OURS, randomized(OURS, step), GALORE_TORCH, PYTORCH_OPTIMIZER),
    hyperparameters=(RANK, UPDATE_PROJ_GAP, PROJ_TYPE),
)
