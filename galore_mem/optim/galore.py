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
from galore_mem.optim.base import Found, Group, LayerWise, State
from galore_mem.optim.projected import DEFAULTS, LowRank, Projected

FLOAT16_LEAST = 2.0**-24  # the smallest float16 above 0


def moments(state: State, like: Tensor) -> tuple[Tensor, Tensor]:
    """`exp_avg` in the gradient's format, and `exp_avg_sq` (float32 where that is float16: squares leave its range)."""
    if "exp_avg" not in state:
        squares = torch.float32 if like.dtype is torch.float16 else like.dtype
        state["exp_avg"] = torch.zeros_like(like)
        state["exp_avg_sq"] = torch.zeros_like(like, dtype=squares)
    return state["exp_avg"], state["exp_avg_sq"]


def averaged(state: State, grad: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """Both moments with this step's gradient in them."""
    beta1, beta2 = group["betas"]
    exp_avg, exp_avg_sq = moments(state, grad)
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    return exp_avg, exp_avg_sq


def corrections(state: State, group: Group, dtype: torch.dtype) -> tuple[float, float]:
    """(factor, ε): the update is `factor · exp_avg / (sqrt(exp_avg_sq) + ε)`, with both bias corrections in the two.
    ε is never rounded to 0 in the format it is added in: a zero gradient divides 0 by it."""
    beta1, beta2 = group["betas"]
    t = state.get("step", 0) + 1
    root = (1 - beta2**t) ** 0.5
    least = FLOAT16_LEAST if dtype is torch.float16 else torch.finfo(dtype).tiny
    return root / (1 - beta1**t), max(group["eps"] * root, least)


def decay(p: Tensor, group: Group) -> None:
    """Decoupled weight decay."""
    if group["weight_decay"]:
        p.mul_(1 - float(group["lr"]) * group["weight_decay"])


def adamw(p: Tensor, grad: Tensor, state: State, group: Group) -> None:
    """AdamW on the parameter itself; one temporary of its size."""
    exp_avg, exp_avg_sq = averaged(state, grad, group)
    factor, eps = corrections(state, group, exp_avg_sq.dtype)
    decay(p, group)
    p.addcdiv_(exp_avg, exp_avg_sq.sqrt().add_(eps), value=-float(group["lr"]) * factor)


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
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, **DEFAULTS, **low_rank}
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
