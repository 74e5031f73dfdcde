"""Tensor-GaLore: GaLore for parameters of more than two dimensions, through a Tucker decomposition.

George, Pitt, Zhao, Kossaifi, Luo, Tian, Anandkumar: Tensor-GaLore: Memory-Efficient Training via Gradient Tensor
Decomposition, arXiv:2501.02379. A gradient of d1 x ... x dk keeps a factor di x ri per mode and two moments of
the core, r1 x ... x rk.

galore-mem: matrices as in `galore.py`; other shapes with ri = min(rank, di), one SVD per unfolding, modes
contracted one after another, the last one into the weight; factors and moments in the gradient's format.
neuraloperator 2.0.0 with tensorly 0.10 (neuralop/training/adamw.py, tensor_galore_projector.py): every targeted
parameter, matrices included; where the rank is above di, tensorly adds up to di columns; float32 only (tensorly's
SVD has no half precision); the factors are computed once, in the first step, by higher-order iteration.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from galore_mem.dtypes import of_squares
from galore_mem.memory.tape import OPTIMIZER_STATE, Shape, Tensor
from galore_mem.methods import adamw, galore, projection
from galore_mem.methods.base import (
    PENDING,
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
from galore_mem.methods.projection import PROJ_TYPE
from galore_mem.methods.svd import SVD_WORKSPACE, full_svd


def decomposes(p: Trained) -> bool:
    """Is this a targeted parameter with more than two dimensions?"""
    return p.projected and len(p.shape) > 2


def core(p: Trained, job: Job) -> Shape:
    """Shape of the core."""
    return ranks(p.shape, job.rank)


def ranks(shape: Shape, rank: int) -> Shape:
    """The rank in every mode: clipped to the dimension, and to the product of the others, which bounds the rank of the
    unfolded gradient."""
    return tuple(min(rank, d, prod(shape) // max(d, 1)) for d in shape)


def tucker(p: Trained, ranks: Shape, name: str) -> tuple[Buffer, ...]:
    """A factor per mode, and both moments of the core (the second in float32 where the parameter is float16)."""
    factors = (Buffer(f"{name}.{i}", (d, r), p.dtype) for i, (d, r) in enumerate(zip(p.shape, ranks, strict=True)))
    return *factors, Buffer("exp_avg", ranks, p.dtype), Buffer("exp_avg_sq", ranks, of_squares(p.dtype))


def state(p: Trained, job: Job) -> tuple[Buffer, ...]:
    """`projector.0`, `projector.1`, ... and the core's `exp_avg`, `exp_avg_sq`; matrices as GaLore's."""
    return tucker(p, core(p, job), "projector") if decomposes(p) else galore.state(p, job)


def step(slots: Slots, job: Job, refresh: bool) -> None:
    """TensorGaLoreAdamW.step: the core's tensor becomes the update, as in GaLore's. The last mode's product is made in
    the weight (`addmm_`)."""
    for slot in slots:
        if not decomposes(slot.param):
            galore.step(Slots(slot.tape, [slot], None), job, refresh)
            continue
        if refresh:
            renew(slot, job)
        full, low = slot.param.shape, core(slot.param, job)
        core_grad = contracted(slot, job)
        slot.state.pop(PENDING, None)  # added to it
        update: Tensor | None = None
        for shape in tuple(contractions(low, full))[:-1]:
            update = slot.new(shape, slot.param.dtype, update)
        del core_grad, update


def compressed(slot: Slot, job: Job) -> Tensor | None:
    """The core of a micro-batch's gradient; of a matrix, its low-rank gradient."""
    return contracted(slot, job) if decomposes(slot.param) else projection.compressed(slot, job)


def contracted(slot: Slot, job: Job) -> Tensor | None:
    """The gradient with every mode contracted."""
    result: Tensor | None = None
    for shape in contractions(slot.param.shape, core(slot.param, job)):
        result = slot.new(shape, slot.param.dtype, result)
    return result


def contractions(before: Shape, after: Shape) -> Iterator[Shape]:
    """Shapes on the way when one mode after another is contracted (`torch.tensordot` over the first dimension puts
    the new one last; the order does not change the size)."""
    for i in range(len(before)):
        yield (*after[: i + 1], *before[i + 1 :])


def unfold(slot: Slot, mode: int) -> Tensor | None:
    """The gradient with one mode first, as a matrix: a view for the first and the last mode, else a copy."""
    between = 0 < mode < len(slot.param.shape) - 1
    return slot.like() if between else None


def renew(slot: Slot, job: Job) -> None:
    """Per mode: the unfolded gradient, its SVD, the kept columns. The old factors stay until all new ones are found."""
    p = slot.param
    factors = tucker(p, core(p, job), "projector")[: len(p.shape)]
    fresh = []
    for i, buffer in enumerate(factors):
        shape = (p.shape[i], p.numel // p.shape[i])
        unfolded = unfold(slot, i)
        u, s, vh = full_svd(slot, shape, p.dtype)
        fresh.append(slot.new(buffer.shape, buffer.dtype))
        del unfolded, u, s, vh
    for buffer, factor in zip(factors, fresh, strict=True):
        factor.storage.move(OPTIMIZER_STATE)
        slot.state[buffer.name] = factor


def padded(p: Trained, job: Job) -> Shape:
    """tensorly's ranks: above the dimension there are at most as many columns again (_complete_factor)."""
    return tuple(min(job.rank, 2 * d) for d in p.shape)


def state_reference(p: Trained, job: Job) -> tuple[Buffer, ...]:
    """`projector.proj_tensor.0`, ... and the core's moments, for matrices too."""
    if not p.projected or len(p.shape) < 2:
        return adamw.moments(p, job)
    return tucker(p, padded(p, job), "projector.proj_tensor")


def step_reference(slots: Slots, job: Job, refresh: bool) -> None:
    """AdamW.step of neuralop: names outlive the iteration; the product projected back is scaled into a copy."""
    grad: Tensor | None = None
    denom: Tensor | None = None
    norm_grad: Tensor | None = None
    for projected in (False, True):
        for slot in slots:
            p = slot.param
            if (p.projected and len(p.shape) >= 2) is not projected:
                continue
            grad = slot.grad
            if projected:
                if refresh:
                    renew_reference(slot, job)
                grad = multi_mode_dot(slot, p.shape, padded(p, job))
            shape = padded(p, job) if projected else p.shape
            denom = slot.new(shape, p.dtype)
            norm_grad = slot.new(shape, p.dtype)
            if projected:
                norm_grad = slot.like(multi_mode_dot(slot, padded(p, job), p.shape))
    del grad, denom, norm_grad


def multi_mode_dot(slot: Slot, before: Shape, after: Shape) -> Tensor | None:
    """One mode after another; a product of more than two dimensions is unfolded into a copy (tensorly/tenalg)."""
    result: Tensor | None = None
    for shape in contractions(before, after):
        unfolded = slot.new(result.shape, slot.param.dtype) if result is not None and len(before) > 2 else None
        result = slot.new(shape, slot.param.dtype, result)
        del unfolded
    return result


def renew_reference(slot: Slot, job: Job) -> None:
    """tucker's initial factors: per mode the unfolding and its SVD, then both factors with their signs set; the
    right one keeps its name until the next mode. The iterations that follow are smaller."""
    p = slot.param
    right: Tensor | None = None
    for i, buffer in enumerate(tucker(p, padded(p, job), "projector.proj_tensor")[: len(p.shape)]):
        shape = (p.shape[i], p.numel // p.shape[i])
        unfolded = unfold(slot, i)
        u, s, vh = full_svd(slot, shape, p.dtype)
        left = slot.new((shape[0], min(job.rank, *shape)), p.dtype)
        right = slot.new((min(job.rank, *shape), shape[1]), p.dtype, right)
        del u, s, vh, left, unfolded
        slot.keep(buffer)
    del right


def state_paper(p: Trained, job: Job) -> tuple[Buffer, ...]:
    """Σ di·ri + 2·Π ri; matrices as GaLore's, mr + 2nr."""
    return tucker(p, core(p, job), "projector") if decomposes(p) else galore.state_paper(p, job)


EQUATIONS = {"projected": "m·r + 2·n·r; more dimensions: Σ d·r + 2·Π r, r clipped to each d", "other": "2·m·n"}

METHOD = Method(
    name="tensor-galore",
    title="Tensor-GaLore",
    citation=Citation(
        "Tensor-GaLore: Memory-Efficient Training via Gradient Tensor Decomposition",
        "George, Pitt, Zhao, Kossaifi, Luo, Tian, Anandkumar", "arXiv:2501.02379",
    ),
    paper=Implementation(
        "paper", "arXiv:2501.02379", "Tucker factors and two moments of the core", state_paper, equations=EQUATIONS
    ),
    implementations=(
        Implementation(
            name="galore-mem", version="galore-mem", source="galore_mem/optim",
            state=state, step=step, refreshes=True, compresses=compressed,
            equations=EQUATIONS, not_counted=(SVD_WORKSPACE,),
        ),
        Implementation(
            name="neuraloperator", version="neuraloperator 2.0.0, tensorly 0.10.0",
            source="neuralop/training/adamw.py, neuralop/training/tensor_galore_projector.py",
            state=state_reference, step=step_reference, refreshes=True,
            equations={"projected": "Σ d·r + 2·r^dimensions, matrices too: (m + n)·r + 2·r·r", "other": "2·m·n"},
            notes=(
                "float32 only: tensorly's SVD has no half precision",
                "the factors are computed once, in the first step",
                "factors of modes shorter than the rank are padded, to twice the mode's length at most",
            ),
            not_counted=(SVD_WORKSPACE, "the higher-order iterations after the initial factors"),
        ),
    ),
    hyperparameters=(RANK, UPDATE_PROJ_GAP, PROJ_TYPE),
)  # fmt: skip
