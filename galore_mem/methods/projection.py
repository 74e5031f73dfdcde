"""What gradient projections share: which side is projected, the shapes that follow, and how a projector is renewed.

A matrix of rows x cols at rank r is projected from the left (P is rows x r, the low-rank gradient Pᵀ·G is
r x cols), from the right (P is r x cols, G·Pᵀ is rows x r), or from both. `std` projects the shorter side,
so that with m <= n, the legend of all files here, P has m·r elements and each moment n·r; `reverse_std`
projects the longer one (n·r and m·r). Parameters with one or with more than two dimensions are not
projected and are treated like those outside the targets.

Ours and pytorch_optimizer copy the columns they keep. Code that follows the GaLore reference slices them:
in half precision the cast makes the copy, in float32 the projector is a view of the whole factor.
"""

from __future__ import annotations

from collections.abc import Iterator

from galore_mem.dtypes import FLOAT32, DType
from galore_mem.errors import InputError, unknown
from galore_mem.memory.tape import OPTIMIZER_STATE, Shape, Tensor
from galore_mem.methods.base import PENDING, Buffer, Hyperparameter, Job, Slot, Slots, Trained
from galore_mem.methods.svd import full_svd

PROJ_TYPES = ("std", "reverse_std", "left", "right", "full")
PROJ_TYPE = Hyperparameter("proj_type", "std", "side that is projected", choices=PROJ_TYPES)

OURS = "projector"
REFERENCE = "projector.ortho_matrix"


def applies(p: Trained) -> bool:
    """Is this parameter projected? (A targeted matrix; other shapes are left to the unprojected treatment.)"""
    return p.projected and len(p.shape) == 2


def sides(p: Trained, job: Job) -> tuple[str, ...]:
    """`left`, `right` or both, as `proj_type` says."""
    return sides_of(p.shape, job.text("proj_type") if "proj_type" in job.hyperparameters else "std")


def sides_of(shape: Shape, proj_type: str) -> tuple[str, ...]:
    """The sides of a matrix that are projected. Raises `InputError` for an unknown `proj_type`."""
    if proj_type not in PROJ_TYPES:
        raise unknown("proj_type", proj_type, PROJ_TYPES)
    if proj_type == "full":
        return "left", "right"
    if proj_type in ("left", "right"):
        return (proj_type,)
    tall = shape[0] >= shape[1]
    return ("right",) if tall == (proj_type == "std") else ("left",)


def one_side(p: Trained, job: Job) -> str:
    """The side that is projected, for code that has no `full`. Raises `InputError` when that was asked for."""
    (side, *more) = sides(p, job)
    if more:
        raise InputError("this implementation projects one side of a matrix only; give a proj_type other than full")
    return side


def factor(p: Trained, side: str, r: int) -> Shape:
    """Shape of the projector of one side."""
    return (p.shape[0], r) if side == "left" else (r, p.shape[1])


def low_shape(p: Trained, job: Job, r: int | None = None) -> Shape:
    """Shape of the low-rank gradient and of its moments."""
    rank = job.r(p) if r is None else r
    projected = sides(p, job)
    return (rank if "left" in projected else p.shape[0], rank if "right" in projected else p.shape[1])


def names(projected: tuple[str, ...], name: str) -> tuple[str, ...]:
    """One name, or one for each side (the reference keeps a list; ours two tensors)."""
    if len(projected) == 1:
        return (name,)
    return tuple(f"{name}.{i}" if "." in name else f"{name}_{side}" for i, side in enumerate(projected))


def copied(p: Trained, job: Job, dtype: DType, name: str = OURS) -> tuple[Buffer, ...]:
    """Projectors with storages of their own."""
    projected = sides(p, job)
    return tuple(
        Buffer(key, factor(p, side, job.r(p)), dtype)
        for side, key in zip(projected, names(projected, name), strict=True)
    )


def sliced(p: Trained, job: Job, dtype: DType) -> tuple[Buffer, ...]:
    """The reference's projectors: in float32 each keeps the whole of U (rows x k) or Vh (k x cols) alive."""
    if dtype is not FLOAT32:
        return copied(p, job, dtype, REFERENCE)
    projected = sides(p, job)
    return tuple(
        Buffer(key, factor(p, side, job.r(p)), FLOAT32, storage_bytes=FLOAT32.nbytes(factor(p, side, p.m)))
        for side, key in zip(projected, names(projected, REFERENCE), strict=True)
    )


def moments(p: Trained, job: Job, dtype: DType) -> tuple[Buffer, Buffer]:
    """Both moments of the low-rank gradient."""
    low = low_shape(p, job)
    return Buffer("exp_avg", low, dtype), Buffer("exp_avg_sq", low, dtype)


# -- pieces of step programs -----------------------------------------------------------------------


def lowered(slot: Slot, job: Job, dtype: DType) -> Tensor:
    """The low-rank gradient; what micro-batches before have left is added to it, and goes."""
    low = _product(slot, job, dtype)
    slot.state.pop(PENDING, None)
    return low


def compressed(slot: Slot, job: Job) -> Tensor | None:
    """The low-rank gradient of a micro-batch, which is kept in the place of the gradient: projection is linear."""
    return _product(slot, job, slot.param.dtype) if applies(slot.param) else None


def _product(slot: Slot, job: Job, dtype: DType) -> Tensor:
    """The gradient times the projector; `full` goes through r x cols."""
    p = slot.param
    half = slot.new((job.r(p), p.shape[1]), dtype) if len(sides(p, job)) == 2 else None
    return slot.new(low_shape(p, job), dtype, half)


def raised(slot: Slot, job: Job, dtype: DType) -> Tensor:
    """A low-rank matrix projected back to full size; `full` goes through rows x r."""
    p = slot.param
    half = slot.new((p.shape[0], job.r(p)), dtype) if len(sides(p, job)) == 2 else None
    return slot.new(p.shape, dtype, half)


def added(slot: Slot, job: Job, update: Tensor) -> None:
    """`weight.addmm_(update, P)` needs nothing more; with both sides projected, P_left·update (rows x r) is made."""
    p = slot.param
    if len(sides(p, job)) == 2:
        slot.new((p.shape[0], job.r(p)), p.dtype, update)


def cast(slot: Slot, tensor: Tensor) -> Tensor:
    """`tensor.to(grad.dtype)`."""
    dtype = slot.param.dtype
    return tensor if tensor.dtype is dtype else slot.new(tensor.shape, dtype, tensor)


def renew(slot: Slot, job: Job, name: str = OURS) -> None:
    """A new projector of the gradient: SVD in float32, the kept columns copied, the factors freed."""
    p = slot.param
    u, s, vh = full_svd(slot, p.shape, p.dtype)
    for buffer in copied(p, job, p.dtype, name):
        slot.keep(buffer)
    del u, s, vh


def renew_sliced(slot: Slot, job: Job, dtype: DType, *, product: bool) -> None:
    """A new projector as the reference has it; the gradient has format `dtype`."""
    kept = ortho_matrix(slot, job, dtype, product=product)
    for key, tensor in zip(names(sides(slot.param, job), REFERENCE), kept, strict=True):
        tensor.storage.move(OPTIMIZER_STATE)
        slot.state[key] = tensor


def ortho_matrix(slot: Slot, job: Job, dtype: DType, *, product: bool) -> list[Tensor]:
    """get_orthogonal_matrix of the GaLore reference (galore_torch/galore_projector.py) and its descendants.

    A float32 copy of a narrower gradient lives until the function returns. `product` says that the other
    factor is scaled, `U[:, :r] @ diag(s[:r])` or `diag(s[:r]) @ Vh[:r]`, and not used (PyPI 1.0).
    """
    p = slot.param
    r, projected = job.r(p), sides(slot.param, job)
    matrix = slot.new(p.shape, FLOAT32) if dtype is not FLOAT32 else None
    u, s, vh = full_svd(slot, p.shape, FLOAT32)
    unused = None
    if product and len(projected) == 1:
        other = "left" if projected == ("right",) else "right"
        unused = slot.new(factor(p, other, r), FLOAT32, slot.new((r, r), FLOAT32))
    kept = []
    for side in projected:
        view = (u if side == "left" else vh).like(factor(p, side, r))
        kept.append(view if dtype is FLOAT32 else slot.new(view.shape, dtype))
    del matrix, u, s, vh, unused
    return kept


def regular_first(slots: Slots) -> Iterator[tuple[Slot, bool]]:
    """Parameters outside the targets, then the projected ones: the order of the parameter groups in the
    reference's training script and in transformers (what is alive across parameters depends on it)."""
    for projected in (False, True):
        for slot in slots:
            if applies(slot.param) is projected:
                yield slot, projected
