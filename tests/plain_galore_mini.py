"""Our GaLore-mini, approaches 1 to 3, written out in plain torch (see `plain_low_rank.py`)."""

from __future__ import annotations

import torch
from plain_low_rank import EPS, HEAD_DIM, LR, PLAIN, State, Step, add, by_svd, project, right
from torch import Tensor


def blocks(p: Tensor) -> Tensor:
    """p as blocks x elements: heads of query and key, rows of other matrices, a norm as one block."""
    if p.heads:
        return p.view(p.shape[0] // HEAD_DIM, -1)
    return p


def second_moment(state: State, of: Tensor) -> Tensor:
    """The average of the blocks' mean squares, in float32."""
    dims = {"dim": 1, "keepdim": True} if of.dim() > 1 else {}
    square = torch.linalg.vector_norm(of, **dims).float().square_().div_(of.shape[-1])
    if "exp_avg_sq" not in state:
        state["exp_avg_sq"] = torch.zeros_like(square)
    return state["exp_avg_sq"].lerp_(square, 0.001)


def per_row(values: Tensor, dtype: torch.dtype, repeat: int) -> Tensor:
    if repeat > 1:
        values = values.repeat_interleave(repeat, dim=0)
    return values.to(dtype)


def divisor(state: State, dtype: torch.dtype, repeat: int = 1) -> Tensor:
    return per_row(state["exp_avg_sq"].sqrt().add_(EPS), dtype, repeat)


def galore_mini(approach: int) -> Step:
    def step(p: Tensor, state: State, refresh: bool) -> None:
        g = p.grad
        g.heads = p.heads
        if not p.low_rank:
            second_moment(state, blocks(g))
            if "exp_avg" not in state:
                state["exp_avg"] = torch.zeros_like(p)
            state["exp_avg"].lerp_(g, 0.1)
            state["exp_avg"].heads = p.heads
            blocks(p).addcdiv_(blocks(state["exp_avg"]), divisor(state, p.dtype), value=-LR)
            return
        if refresh:
            state["projector"] = by_svd(g, right(p))
        projector = state["projector"]
        low = project(g, projector, right(p))
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(low)
        exp_avg = state["exp_avg"].lerp_(low, 0.1)
        if approach == 3 and not right(p):
            del low
            second_moment(state, blocks(g))
            scaled = projector / divisor(state, p.dtype, HEAD_DIM if p.heads else 1)
            add(p, exp_avg, scaled, -LR)
            return
        second_moment(state, low if approach == 1 else blocks(g))
        if approach == 2 and not right(p):
            values = per_row(state["exp_avg_sq"], p.dtype, HEAD_DIM if p.heads else 1)
            carried = projector.square().T @ values
            torch.div(exp_avg, carried.sqrt_().add_(EPS), out=low)
            del values, carried
        else:
            repeat = HEAD_DIM if p.heads and approach != 1 else 1
            torch.div(exp_avg, divisor(state, p.dtype, repeat), out=low)
        add(p, low, projector, -LR)

    return step


OURS = {
    **PLAIN,
    "galore-mini": galore_mini(3),
    "galore-mini-1": galore_mini(1),
    "galore-mini-2": galore_mini(2),
}
