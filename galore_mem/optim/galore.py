"""GaLore with AdamW inside.

Zhao, Zhang, Chen, Wang, Anandkumar, Tian: GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection,
ICML 2024, arXiv:2403.03507, algorithm 2.

Every `update_proj_gap` steps, counted from the first:  P = leading singular vectors of G
R = Pᵀ·G (or G·Pᵀ);  M = β1·M + (1 - β1)·R;  V = β2·V + (1 - β2)·R∘R
N = M/(1 - β1^t) / (sqrt(V/(1 - β2^t)) + ε);  W = W - η·α·P·N (or N·P)

As in the paper and in torch, both bias corrections come before ε; the reference package (galore-torch 1.0) adds ε to
the uncorrected root. Weight decay is decoupled and, as in torch, applied to the weight before the update.

In bfloat16 an average with beta2 = 0.999 moves only where the new square is far above it (as in the reference and in
torch's AdamW on bfloat16 parameters): the paper's experiments live with that; a beta2 of 0.95 to 0.99 does not have it.
"""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import Tensor

from galore_mem.methods import galore
from galore_mem.optim.adamw import adamw, averaged, corrections, decay
from galore_mem.optim.base import Found, Group, LayerWise, State
from galore_mem.optim.projected import LowRank, Projected, low_rank_options


class GaLoreAdamW(Projected):
    """AdamW whose moments live in a low-rank subspace of the gradient.

    `params`: parameters or named parameters, or groups of them; groups with a `rank` are projected (matrices only),
    the others get AdamW. `galore_mem.optim.parameter_groups(model, rank=...)` makes the two groups of a model. The
    options of a low-rank group are described in `galore_mem.optim.projected`.

    State of an m x n matrix (m <= n), in the gradient's format: `projector` m·r, `exp_avg` and `exp_avg_sq` n·r
    each. A step without refresh needs n·r elements more (`galore_mem/methods/galore.py`).

    Raises `InputError` for options out of range, parameters that cannot be projected, and gradients that are sparse,
    NaN or infinite; the message names the parameter.
    """

    METHOD = galore.METHOD

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        layerwise: LayerWise | None = None,
        error_if_nonfinite: bool = True,
        **low_rank: Unpack[LowRank],
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, **low_rank_options(low_rank)}
        super().__init__(params, defaults, layerwise=layerwise, error_if_nonfinite=error_if_nonfinite)

    def _update_full(self, at: Found, grad: Tensor, state: State) -> None:
        adamw(at.p, grad, state, at.group)

    def _update_low(self, at: Found, grad: Tensor | None, state: State) -> None:
        group = at.group
        low = self._gradient(at, grad, state)
        factor = self._direction_(low, state, group)
        decay(at.p, group)
        self._add_raised_(at, low, state, -float(group["lr"]) * group["scale"] * factor)

    def _direction_(self, low: Tensor, state: State, group: Group) -> float:
        """Overwrites the low-rank gradient with `exp_avg / (sqrt(exp_avg_sq) + ε)`; returns the factor before it."""
        exp_avg, exp_avg_sq = averaged(state, low, group)
        factor, eps = corrections(state, group, low.dtype)
        torch.sqrt(exp_avg_sq, out=low).add_(eps)
        torch.div(exp_avg, low, out=low)
        return factor
