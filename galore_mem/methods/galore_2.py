"""GaLore 2: GaLore with a randomized SVD, made for sharded training.

Su, Gu, Xu, Tian, Zhao: GaLore 2: Large-Scale LLM Pre-Training by Gradient Low-Rank Projection,
arXiv:2504.20437. The update and the state are GaLore's, mr + 2nr; the projector comes from the randomized SVD
of Halko, Martinsson, Tropp (arXiv:0909.4061), and the update runs inside the backward pass, layer by layer,
under FSDP. Its code is not public; what is counted here is one device.

galore-mem: `torch.svd_lowrank` of r + `oversampling` columns with two power iterations, in float32.
"""

from __future__ import annotations

from functools import partial

from galore_mem.methods import galore, projection
from galore_mem.methods.base import RANK, UPDATE_PROJ_GAP, Citation, Hyperparameter, Implementation, Job, Method, Slot
from galore_mem.methods.projection import PROJ_TYPE
from galore_mem.methods.svd import QR_WORKSPACE, SVD_WORKSPACE, low_rank_svd

OVERSAMPLING = Hyperparameter("oversampling", 10, "columns beyond the rank that the randomized SVD works on")


def renew(slot: Slot, job: Job) -> None:
    """A new projector of the gradient, its columns copied, the factors freed."""
    p = slot.param
    u, v = low_rank_svd(slot, p.shape, p.dtype, min(job.r(p) + job.number("oversampling"), p.m))
    for buffer in projection.copied(p, job, p.dtype):
        slot.keep(buffer)
    del u, v


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
            not_counted=(SVD_WORKSPACE, QR_WORKSPACE),
        ),
    ),
    hyperparameters=(RANK, UPDATE_PROJ_GAP, PROJ_TYPE, OVERSAMPLING),
    projects=True,
)  # fmt: skip
