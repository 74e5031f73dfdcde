"""LOMO: plain gradient descent fused into the backward pass, without state.

Lv, Yang, Liu, Gao, Guo, Qiu: Full Parameter Fine-tuning for Large Language Models with Limited
Resources, arXiv:2306.09782. lomo-optim 0.1.1 (lomo_optim/lomo.py, the Trainer's `optim="lomo"`) updates
from hooks: a parameter whose gradient is there is updated through float32 copies of gradient and
weight, the gradient dropped in between; in float32 there are no copies.
"""

from __future__ import annotations

from galore_mem.memory.tape import Tensor
from galore_mem.methods.base import Buffer, Citation, Implementation, Job, Method, Slots, Trained
from galore_mem.methods.eager import as_float32


def state(p: Trained, job: Job) -> tuple[Buffer, ...]:
    """Nothing."""
    return ()


def step(slots: Slots, job: Job, refresh: bool) -> None:
    """Lomo.fuse_update: `grad_fp32 = p.grad.to(float32); p.grad = None; p_fp32 = p.data.to(float32)`."""
    grad: Tensor | None = None
    param: Tensor | None = None
    for slot in slots:
        grad = as_float32(slot, slot.grad)
        slot.grad = None
        param = as_float32(slot, slot.weight)
    del grad, param


METHOD = Method(
    name="lomo",
    title="LOMO",
    citation=Citation(
        "Full Parameter Fine-tuning for Large Language Models with Limited Resources",
        "Lv, Yang, Liu, Gao, Guo, Qiu", "arXiv:2306.09782",
    ),
    paper=Implementation(
        "paper", "arXiv:2306.09782", "section 3.2: no optimizer state", state, equations={"other": "0"},
        notes=("gradients are never all alive",),
    ),
    implementations=(
        Implementation(
            name="lomo-optim", version="lomo-optim 0.1.1", source="lomo_optim/lomo.py:Lomo.fuse_update",
            state=state, step=step, late=True, equations={"other": "0"},
            notes=(
                "each parameter is updated in backward and its gradient dropped: they are never all alive",
                "the hook runs before its own gradient is stored and updates the parameter before: two are alive",
            ),
            not_counted=(
                "with clip_grad_norm: a first backward pass for the norm, which retains the graph",
                "in float16: the loss scaler's float32 copy of each gradient",
            ),
        ),
    ),
    always_layerwise=True,
)  # fmt: skip
