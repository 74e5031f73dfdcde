"""Projectors by randomized SVD: what our optimizers hold while they find one with `svd="randomized"`.

Halko, Martinsson, Tropp, arXiv:0909.4061: subspace iteration on the projected side (`galore_mem/optim/projection.py`)
with r + `oversampling` columns and `power_iterations` rounds after the first; products in the gradient's format, bases
in float32. The state is that of the exact projector. GaLore 2 is GaLore with it; of other methods it is an
implementation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from galore_mem.dtypes import FLOAT16, FLOAT32
from galore_mem.methods import projection
from galore_mem.methods.base import Hyperparameter, Implementation, Job, Slot
from galore_mem.methods.projection import factor
from galore_mem.methods.svd import QR_WORKSPACE, leading, orthonormal, product

OVERSAMPLING = Hyperparameter("oversampling", 10, "columns beyond the rank that the randomized SVD works on")
POWER_ITERATIONS = Hyperparameter("power_iterations", 1, "rounds of the randomized SVD after the first")


def columns(job: Job) -> int:
    """Columns that the iteration works on, where the matrix has them."""
    return job.rank + int(job.hyperparameters.get(OVERSAMPLING.name, OVERSAMPLING.default))


def renew(slot: Slot, job: Job) -> None:
    """A new projector of the gradient, its columns copied, the factors freed. `full` takes the image of the left
    projector, orthonormal again, for the right one."""
    p = slot.param
    r, q = job.r(p), min(columns(job), p.m)
    rounds = 1 + int(job.hyperparameters.get(POWER_ITERATIONS.name, POWER_ITERATIONS.default))
    first, *second = projection.sides(p, job)
    work = slot.new(p.shape, FLOAT32) if p.dtype is FLOAT16 else None
    dtype = FLOAT32 if p.dtype is FLOAT16 else p.dtype
    shape = p.shape if first == "right" else p.shape[::-1]
    kept = [leading(slot, shape, dtype, r, q, rounds)]
    for side in second:
        image = factor(p, side, r)[::-1]
        kept += [orthonormal(slot, image, product(slot, image, dtype, kept[0]))]
    del work
    for buffer in projection.copied(p, job, p.dtype):
        slot.keep(buffer)
    del kept


def randomized(code: Implementation, step: Callable[..., None]) -> Implementation:
    """Our implementation of a method with this way to find projectors; `step` is its program, which takes `renew`."""
    return replace(
        code, name=f"{code.name}-randomized", step=partial(step, renew=renew), not_counted=(QR_WORKSPACE,),
        notes=(*code.notes, 'projectors by randomized SVD (`svd="randomized"`)'),
    )  # fmt: skip
