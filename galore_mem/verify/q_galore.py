"""q-galore-torch's optimizer around today's bitsandbytes, and the parameters it updates.

Its projector, INT8 storage and step are the package's own, and the state of the moments is bitsandbytes'; only its call
of the 8-bit kernel, which is for bitsandbytes 0.43, is replaced.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from galore_mem.methods.q_galore_torch import GROUP
from galore_mem.optim.blockwise import adam_
from galore_mem.optim.int8 import Int8Weight
from galore_mem.verify.builders import GAP, LR, Request, load

BETAS, EPS = (0.9, 0.999), 1e-8
# run_pretrain.py of the package; a similarity that is never reached, so that it renews its projectors every GAP steps
OPTIONS = {
    "update_proj_gap": GAP, "scale": 0.25, "proj_type": "std", "quant": True, "quant_group_size": GROUP,
    "quant_n_bit": 4, "cos_threshold": 2.0, "gamma_proj": 2, "queue_size": 5,
}  # fmt: skip


def coded(weight: Tensor) -> Tensor:
    """A float matrix as the package keeps it: codes, with scales and zeros as attributes, and room for its gradient."""
    codes, scales, zeros = Int8Weight.of(weight).stored
    p: Any = torch.nn.Parameter(codes, requires_grad=False)
    p.scales, p.zeros, p.group_size, p.stochastic_round = scales, zeros, GROUP, True
    made: Tensor = p
    return made


def current(request: Request) -> Any:
    """The optimizer."""
    base = load("bitsandbytes.optim.optimizer.Optimizer2State")

    class Current(load("q_galore_torch.QGaLoreAdamW8bit")):  # type: ignore[misc]  # a class that is found at run time
        def __init__(self, groups: Any) -> None:
            base.__init__(self, "adam", groups, LR, BETAS, EPS, 0.0, 8)

        def update_step(self, group: Any, p: Any, group_index: int, index: int, flag_use_float_grad: bool) -> None:
            state = self.state[p]
            grad = p.float_grad if flag_use_float_grad else p.grad
            adam_(p, grad, state, lr=group["lr"], betas=BETAS, eps=EPS, weight_decay=group["weight_decay"])
            state["step"] += 1

    return Current(request.groups({"rank": request.told["rank"], **OPTIONS}))
