"""GaLore 2: GaLore with a randomized SVD, made for sharded training.

Su, Gu, Xu, Tian, Zhao: GaLore 2: Large-Scale LLM Pre-Training by Gradient Low-Rank Projection,
arXiv:2504.20437. The update and the state are GaLore's, mr + 2nr; the projector comes from the randomized SVD
of Halko, Martinsson, Tropp (arXiv:0909.4061), and the update runs inside the backward pass, layer by layer,
under FSDP. Its code is not public; what is counted here is one device.

galore-mem: subspace iteration on the projected side (`galore_mem/optim/projection.py`) with r + `oversampling` columns
and `power_iterations` rounds after the first; products in the gradient's format, bases in float32.
"""

from __future__ import annotations

from functools import partial

from galore_mem.dtypes import FLOAT16, FLOAT32
from galore_mem.methods import galore, projection
from galore_mem.methods.base import RANK, UPDATE_PROJ_GAP, Citation, Hyperparameter, Implementation, Job, Method, Slot
from galore_mem.methods.projection import PROJ_TYPE, factor
from galore_mem.methods.svd import QR_WORKSPACE, leading, orthonormal, product

OVERSAMPLING = Hyperparameter("oversampling", 10, "columns beyond the rank that the randomized SVD works on")
POWER_ITERATIONS = Hyperparameter("power_iterations", 1, "rounds of the randomized SVD after the first")


def renew(slot: Slot, job: Job) -> None:
    """A new projector of the gradient, its columns copied, the factors freed. `full` takes the image of the left
    projector, orthonormal again, for the right one."""
    p = slot.param
    r, q = job.r(p), min(job.r(p) + job.number("oversampling"), p.m)
    first, *second = projection.sides(p, job)
    work = slot.new(p.shape, FLOAT32) if p.dtype is FLOAT16 else None
    dtype = FLOAT32 if p.dtype is FLOAT16 else p.dtype
    shape = p.shape if first == "right" else p.shape[::-1]
    kept = [leading(slot, shape, dtype, r, q, 1 + job.number("power_iterations"))]
    for side in second:
        image = factor(p, side, r)[::-1]
        kept += [orthonormal(slot, image, product(slot, image, dtype, kept[0]))]
    del work
    for buffer in projection.copied(p, job, p.dtype):
        slot.keep(buffer)
    del kept


METHOD = Method(
    name="galore-2",
    title="GaLore 2",
    citation=Citation(
        "GaLore 2: Large-Scale LLM Pre-Training by Gradient Low-Rank Projection",
        "Su, Gu, Xu, Tian, Zhao", "arXiv:2504.20437",
    ),
    paper=Implementation(
        "paper", "arXiv:2504.20437", "GaLore's mr + 2nr", galore.state_paper, equations=galore.EQUATIONS
    ),
    implementations=(
        Implementation(
            name="galore-mem", version="galore-mem", source="galore_mem/optim",
            state=galore.state, step=partial(galore.step, renew=renew), refreshes=True, equations=galore.EQUATIONS,
            notes=("one device: the paper's sharding is not part of this count",),
            not_counted=(QR_WORKSPACE,),
        ),
    ),
    hyperparameters=(RANK, UPDATE_PROJ_GAP, PROJ_TYPE, OVERSAMPLING, POWER_ITERATIONS),
    projects=True,
)  # fmt: skip
