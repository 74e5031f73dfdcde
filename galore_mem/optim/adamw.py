"""The pieces of AdamW that the optimizers here share.

Loshchilov, Hutter: Decoupled Weight Decay Regularization, arXiv:1711.05101, algorithm 2, with the schedule in `lr`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from galore_mem.optim.state import Group, State

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
