"""APOLLO-Mini: APOLLO with a projection of rank 1 and one scale for the whole matrix.

Zhu, Zhang, Cong, Liu, Park, Chandra, Long, Pan, Wang, Lee: APOLLO: SGD-like Memory, AdamW-level Performance,
MLSys 2025, arXiv:2412.05270. The paper counts 2n + 2. apollo-torch 1.0.3 with `rank=1, scale_type="tensor"`
keeps the projector's m too; see `apollo.py`.
"""

from __future__ import annotations

from functools import partial

from galore_mem.methods import apollo
from galore_mem.methods.base import UPDATE_PROJ_GAP, Implementation, Method
from galore_mem.methods.svd import SVD_WORKSPACE

METHOD = Method(
    name="apollo-mini",
    title="APOLLO-Mini",
    citation=apollo.CITATION,
    paper=Implementation(
        "paper", "arXiv:2412.05270", "table 1: 2n + 2", apollo.state_paper,
        equations={"projected": "2·n + 2", "other": "2·m·n"},
    ),
    implementations=(
        Implementation(
            name="apollo-torch", version="apollo-torch 1.0.3", source=apollo.SOURCE,
            state=apollo.state, step=partial(apollo.step, tensor_wise=True), refreshes=True,
            equations={"projected": "m + 2·n + 1", "other": "2·m·n"}, not_counted=(SVD_WORKSPACE,),
        ),
    ),
    hyperparameters=(UPDATE_PROJ_GAP, apollo.PROJ),
)  # fmt: skip
