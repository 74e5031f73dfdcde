"""An optimizer written out in a function, one parameter at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

State = dict[str, Any]
RANK = 64

# step(p, state, refresh): `p.grad` is the gradient; `p.low_rank` says whether p is projected
Step = Callable[[Tensor, State, bool], None]


class Plain(torch.optim.Optimizer):
    """Calls `step` for each parameter; the refresh of the projectors is asked for."""

    def __init__(self, params: Any, step: Step) -> None:
        super().__init__(params, {})
        self.each, self.refresh = step, True

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.each(p, self.state[p], self.refresh)
