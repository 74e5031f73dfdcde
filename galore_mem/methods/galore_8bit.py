"""8-bit GaLore: GaLore with both moments in blocks of 8-bit codes.

Zhao, Zhang, Chen, Wang, Anandkumar, Tian: GaLore, arXiv:2403.03507, section 4.3 (8-bit Adam of Dettmers
et al., arXiv:2110.02861, on the low-rank gradient). The moments of other parameters are 8-bit too.

The paper's 82.5 % (states of LLaMA-7B at r = 1024 against BF16 Adam's) follows when everything kept,
projector included, takes one byte; `paper` counts so. The code quantizes the moments only: with the
projector in BF16 it is 79.1 %.

galore-mem: bitsandbytes' block-wise kernels (`adamw_8bit.py` has their rules) on the low-rank gradient and
a low-rank tensor of zeros, which becomes the update; one product adds it to the weight. galore-torch 1.0
(galore_torch/adamw8bit.py): the weight is cloned and `p.data` is a low-rank stand-in while the kernel runs,
so each weight gets a new storage in every step; `p.grad` stays low-rank until it is set to None; float32
projectors keep a whole factor alive. It needs bitsandbytes below 0.50, which took its positional arguments
away (`max_unorm=100` results, 4 bytes more per parameter, and small tensors stop training): that is
galore-torch-bnb-0.50.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

from galore_mem.dtypes import FLOAT32, UINT8
from galore_mem.memory.tape import GRADIENTS, Tensor
from galore_mem.methods import adamw_8bit, galore, projection
from galore_mem.methods.adamw_8bit import blockwise, lookup_tables
from galore_mem.methods.base import RANK, UPDATE_PROJ_GAP, Buffer, Implementation, Job, Method, Slot, Slots, Trained
from galore_mem.methods.projection import PROJ_TYPE, added, applies, low_shape, lowered, raised, regular_first
from galore_mem.methods.svd import SVD_WORKSPACE

EQUATIONS = {
    "projected": "m·r + 2·n·r at 1 byte and 2·⌈n·r/256⌉ at 4 bytes; below 4096 elements 2·n·r at 4 bytes",
    "other": "2·m·n at 1 byte + 2·⌈m·n/256⌉ at 4 bytes; below 4096 elements 2·m·n at 4 bytes",
}


def moments(p: Trained, job: Job) -> tuple[Buffer, ...]:
    """bitsandbytes' two states of the low-rank tensor, or of the parameter outside the targets."""
    shape = low_shape(p, job) if applies(p) else p.shape
    return blockwise(shape, prod(shape))


def state(p: Trained, job: Job) -> tuple[Buffer, ...]:
    """`projector` in the gradient's format, `state1`, `state2`, `absmax1`, `absmax2`."""
    return *(projection.copied(p, job, p.dtype) if applies(p) else ()), *moments(p, job)


def kernel(slot: Slot, job: Job, grad: Tensor | None = None, param: Tensor | None = None) -> None:
    """bitsandbytes' update of the slot's parameter, or of `param` with the gradient `grad` in its place."""
    if grad is not None and param is not None:
        slot = Slot(slot.tape, replace(slot.param, shape=param.shape), slot.layer, param, grad)
    adamw_8bit.step(Slots(slot.tape, [slot], None), job, False)


def step(slots: Slots, job: Job, refresh: bool) -> None:
    """GaLoreAdamW8bit.step: the low-rank gradient, and the zeros that become the update."""
    for slot in slots:
        p = slot.param
        if not applies(p):
            kernel(slot, job)
            continue
        if refresh:
            projection.renew(slot, job)
        grad = lowered(slot, job, p.dtype)
        update = slot.new(grad.shape, p.dtype)
        kernel(slot, job, grad, update)
        del grad
        added(slot, job, update)
        del update


def state_reference(p: Trained, job: Job) -> tuple[Buffer, ...]:
    """`projector.ortho_matrix` in the gradient's format, `state1`, `state2`, `absmax1`, `absmax2`."""
    return *(projection.sliced(p, job, p.dtype) if applies(p) else ()), *moments(p, job)


def state_misread(p: Trained, job: Job) -> tuple[Buffer, ...]:
    """As `state_reference`, and the update's norm, for which a positive `max_unorm` makes room."""
    return *state_reference(p, job), Buffer("unorm_vec", (1,), FLOAT32)


def step_reference(slots: Slots, job: Job, refresh: bool) -> None:
    """AdamW8bit.step. `p.saved_data` becomes the weight when the old storage goes, so that from then on the
    two count once; the full gradient is replaced by the low-rank one, which stays."""
    for slot, projected in regular_first(slots):
        p = slot.param
        if not projected:
            kernel(slot, job)
            continue
        if refresh:
            projection.renew_sliced(slot, job, p.dtype, product=True)
        grad = lowered(slot, job, p.dtype)
        saved = slot.like()
        data = slot.new(grad.shape, p.dtype)
        del saved  # the weight's old storage, in truth: `p.data = grad.clone()`
        grad.storage.move(GRADIENTS)
        slot.grad = grad
        kernel(slot, job, grad, data)
        update = slot.like(raised(slot, job, p.dtype))
        del data, update


def state_paper(p: Trained, job: Job) -> tuple[Buffer, ...]:
    """(m·r + 2·n·r) bytes; 2·m·n bytes for what is not projected."""
    return tuple(replace(b, dtype=UINT8) for b in galore.state_paper(p, job))


GALORE_TORCH = Implementation(
    name="galore-torch", version="galore-torch 1.0, bitsandbytes 0.49", source="galore_torch/adamw8bit.py",
    state=state_reference, step=step_reference, shared=lookup_tables, one_each=True, refreshes=True,
    equations=EQUATIONS, not_counted=(SVD_WORKSPACE,),
    notes=(
        "in float32 the projector is a view that keeps the whole m x m factor of the SVD alive",
        "after the step each gradient is the low-rank one until it is set to None",
    ),
)  # fmt: skip

METHOD = Method(
    name="galore-8bit",
    title="8-bit GaLore",
    citation=galore.CITATION,
    paper=Implementation(
        "paper", "arXiv:2403.03507", "mr + 2nr at one byte, projector included (what 82.5 % takes)", state_paper,
        equations={"projected": "m·r + 2·n·r at 1 byte", "other": "2·m·n at 1 byte"},
    ),
    implementations=(
        Implementation(
            name="galore-mem", version="galore-mem, bitsandbytes 0.50.2", source="galore_mem/optim",
            state=state, step=step, shared=lookup_tables, refreshes=True, compresses=projection.compressed,
            equations=EQUATIONS, not_counted=(SVD_WORKSPACE,),
        ),
        GALORE_TORCH,
        replace(
            GALORE_TORCH, name="galore-torch-bnb-0.50", version="galore-torch 1.0, bitsandbytes 0.50.2",
            state=state_misread,
            notes=("bitsandbytes takes its percentile_clipping=100 for max_unorm=100", *GALORE_TORCH.notes),
        ),
    ),
    hyperparameters=(RANK, UPDATE_PROJ_GAP, PROJ_TYPE),
)  # fmt: skip
