"""The projected optimizers written out in plain torch, one parameter at a time, as their ledgers describe ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

State = dict[str, Any]
RANK, OVERSAMPLING, HEAD_DIM = 64, 10, 8
LR, EPS = 1e-3, 1e-8

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


def right(p: Tensor) -> bool:
    return p.shape[0] >= p.shape[1]


def by_svd(g: Tensor, tall: bool) -> Tensor:
    u, _, vh = torch.linalg.svd(g.float(), full_matrices=False)
    return (vh[:RANK] if tall else u[:, :RANK]).to(g.dtype, copy=True)


def by_low_rank_svd(g: Tensor, tall: bool) -> Tensor:
    u, _, v = torch.svd_lowrank(g.float(), q=min(RANK + OVERSAMPLING, *g.shape))
    return (v[:, :RANK].T if tall else u[:, :RANK]).to(g.dtype, copy=True)


def project(g: Tensor, projector: Tensor, tall: bool) -> Tensor:
    return g @ projector.T if tall else projector.T @ g


def add(p: Tensor, update: Tensor, projector: Tensor, alpha: float) -> None:
    if right(p):
        p.addmm_(update, projector, alpha=alpha)
    else:
        p.addmm_(projector, update, alpha=alpha)


def moments(state: State, like: Tensor) -> tuple[Tensor, Tensor]:
    for name in ("exp_avg", "exp_avg_sq"):
        if name not in state:
            state[name] = torch.zeros_like(like)
    return state["exp_avg"], state["exp_avg_sq"]


def galore(p: Tensor, state: State, refresh: bool, renew: Callable[[Tensor, bool], Tensor] = by_svd) -> None:
    g = p.grad
    if not p.low_rank:
        exp_avg, exp_avg_sq = moments(state, g)
        exp_avg.lerp_(g, 0.1)
        exp_avg_sq.mul_(0.999).addcmul_(g, g, value=0.001)
        p.addcdiv_(exp_avg, exp_avg_sq.sqrt().add_(EPS), value=-LR)
        return
    if refresh:
        state["projector"] = renew(g, right(p))
    update = project(g, state["projector"], right(p))
    exp_avg, exp_avg_sq = moments(state, update)
    exp_avg.lerp_(update, 0.1)
    exp_avg_sq.mul_(0.999).addcmul_(update, update, value=0.001)
    torch.sqrt(exp_avg_sq, out=update).add_(EPS)
    torch.div(exp_avg, update, out=update)
    add(p, update, state["projector"], -LR)


def galore_2(p: Tensor, state: State, refresh: bool) -> None:
    galore(p, state, refresh, by_low_rank_svd)


# -- 8-bit -----------------------------------------------------------------------------------------


def kernel(p: Tensor, g: Tensor, state: State) -> None:
    """bitsandbytes' AdamW on p with the gradient g."""
    import bitsandbytes.functional as bnb

    state["step"] = state.get("step", 0) + 1
    small = p.numel() < 4096
    if "state1" not in state:
        for i in ("1", "2"):
            state[f"state{i}"] = torch.zeros_like(p, dtype=torch.float32 if small else torch.uint8)
            if not small:
                state[f"absmax{i}"] = torch.zeros(-(-p.numel() // 256))
                state[f"qmap{i}"] = bnb.create_dynamic_map(signed=i == "1")
    if small:
        bnb.optimizer_update_32bit(
            "adam", g, p, state["state1"], 0.9, EPS, state["step"], LR, state["state2"], 0.999, max_unorm=0.0
        )
    else:
        bnb.optimizer_update_8bit_blockwise(
            "adam", g, p, state["state1"], state["state2"], 0.9, 0.999, 0.0, 0.0, EPS, state["step"], LR,
            state["qmap1"], state["qmap2"], state["absmax1"], state["absmax2"],
        )  # fmt: skip


def galore_8bit(p: Tensor, state: State, refresh: bool) -> None:
    if not p.low_rank:
        kernel(p, p.grad, state)
        return
    if refresh:
        state["projector"] = by_svd(p.grad, right(p))
    low = project(p.grad, state["projector"], right(p))
    update = torch.zeros_like(low)
    kernel(update, low, state)
    del low
    add(p, update, state["projector"], 1.0)


# -- Adafactor -------------------------------------------------------------------------------------


def galore_adafactor(p: Tensor, state: State, refresh: bool) -> None:
    if p.low_rank:
        if refresh:
            state["projector"] = by_svd(p.grad, right(p))
        update = project(p.grad, state["projector"], right(p))
    else:
        update = p.grad.clone()
    if update.dim() < 2:
        if "exp_avg_sq" not in state:
            state["exp_avg_sq"] = torch.zeros(update.shape)
        state["exp_avg_sq"].mul_(0.99).add_(update.to(torch.float32, copy=True).square_())
        update.div_(state["exp_avg_sq"].sqrt().to(update.dtype))
        p.sub_(update)
        return
    for name, dim in (("exp_avg_sq_row", -1), ("exp_avg_sq_col", -2)):
        square = torch.linalg.vector_norm(update, dim=dim).float().square_()
        state[name] = state[name].lerp_(square, 0.1) if name in state else torch.ones_like(square)
        del square
    for name, dim in (("exp_avg_sq_row", -1), ("exp_avg_sq_col", -2)):
        update.mul_(state[name].add(1e-30).rsqrt_().to(update.dtype).unsqueeze(dim))
    if p.low_rank:
        add(p, update, state["projector"], -LR)
    else:
        p.sub_(update)


# -- Tensor-GaLore ---------------------------------------------------------------------------------


def tensor_galore(p: Tensor, state: State, refresh: bool) -> None:
    g = p.grad
    if not p.low_rank or p.dim() == 2:
        galore(p, state, refresh)
        return
    if refresh:
        for i, d in enumerate(p.shape):
            unfolded = g.movedim(i, 0).reshape(d, -1)
            u, _, vh = torch.linalg.svd(unfolded.float(), full_matrices=False)
            state[f"projector.{i}"] = u[:, :RANK].to(g.dtype, copy=True)
            del u, vh, _, unfolded
    core = g
    for i in range(p.dim()):
        core = torch.tensordot(core, state[f"projector.{i}"], dims=([0], [0]))
    exp_avg, exp_avg_sq = moments(state, core)
    exp_avg.lerp_(core, 0.1)
    exp_avg_sq.mul_(0.999).addcmul_(core, core, value=0.001)
    torch.sqrt(exp_avg_sq, out=core).add_(EPS)
    torch.div(exp_avg, core, out=core)
    for i in range(p.dim()):
        core = torch.tensordot(core, state[f"projector.{i}"], dims=([0], [1]))
    p.add_(core, alpha=-LR)


PLAIN: dict[str, Step] = {
    "galore": galore,
    "galore-2": galore_2,
    "galore-8bit": galore_8bit,
    "galore-adafactor": galore_adafactor,
    "tensor-galore": tensor_galore,
}
