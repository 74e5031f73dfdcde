"""GaLore 2: GaLore with a randomized SVD, made for sharded training.

Su, Gu, Xu, Tian, Zhao: GaLore 2: Large-Scale LLM Pre-Training by Gradient Low-Rank Projection,
arXiv:2504.20437. The update and the state are GaLore's, mr + 2nr; the projector comes from the randomized SVD
(`randomized.py`), and the update runs inside the backward pass, layer by layer, under FSDP. Its code is not public;
what is counted here is one device.
"""

from __future__ import annotations

from dataclasses import replace

from galore_mem.methods import galore
from galore_mem.methods.base import RANK, UPDATE_PROJ_GAP, Citation, Implementation, Method
from galore_mem.methods.projection import PROJ_TYPE
from galore_mem.methods.randomized import OVERSAMPLING, POWER_ITERATIONS, randomized

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
        replace(
            randomized(galore.OURS, galore.step), name="galore-mem",
            notes=("one device: the paper's sharding is not part of this count",),
        ),
    ),
    hyperparameters=(RANK, UPDATE_PROJ_GAP, PROJ_TYPE, OVERSAMPLING, POWER_ITERATIONS),
)  # fmt: skip
