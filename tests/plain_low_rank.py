"""The projected optimizers written out in plain torch, one parameter at a time, as their ledgers describe ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

State = dict[str, Any]
RANK, OVERSAMPLING, HEAD_DIM = 64, 10, 8
GROUP, BLOCK = 256, 2**16  # a small block, to need several
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


# -- GaLore-mini -----------------------------------------------------------------------------------


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


# -- Q-GaLore --------------------------------------------------------------------------------------


def groups_of(t: Tensor) -> Tensor:
    return t.view(-1, GROUP)


def scales_and_zeros(t: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Of each group, so that its values fall into 0 .. top."""
    low, high = groups_of(t).amin(1, keepdim=True), groups_of(t).amax(1, keepdim=True)
    scales = high.sub_(low).clamp_(min=1e-5).div_(top)
    return scales, low.neg_().div_(scales).round_().clamp_(0, top)


def quantize(t: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    scales, zeros = scales_and_zeros(t, top)
    codes = groups_of(t).div(scales).add_(zeros).round_().clamp_(0, top).view(t.shape).to(torch.uint8)
    return codes, scales, zeros


def pack(codes: Tensor) -> Tensor:
    pairs = codes.view(-1, 2)
    return pairs[:, 0] + (pairs[:, 1] << 4)


def unpacked(state: State, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    codes = torch.stack((state["projector"] & 15, state["projector"] >> 4), dim=-1)
    values = codes.to(dtype)
    groups_of(values).sub_(state["projector_zeros"]).mul_(state["projector_scales"])
    return values.view(shape)


def q_galore(p: Tensor, state: State, refresh: bool) -> None:
    """`p` holds codes, with `scales`, `zeros` and the gradient `float_grad` beside it."""
    g = p.float_grad
    tall = right(p)
    if refresh:
        u, _, vh = torch.linalg.svd(g.float(), full_matrices=False)
        kept = vh[:RANK] if tall else u[:, :RANK]
        fresh = torch.empty(kept.shape, dtype=g.dtype).copy_(kept)
        del u, _, vh, kept
        if "projector" in state:
            old = unpacked(state, fresh.shape, g.dtype)
            old.mul(fresh).sum()
            del old
        codes, scales, zeros = quantize(fresh, 15)
        state.update(projector=pack(codes), projector_scales=scales, projector_zeros=zeros)
        del codes, scales, zeros, fresh
    shape = torch.Size((RANK, p.shape[1]) if tall else (p.shape[0], RANK))
    projector = unpacked(state, shape, g.dtype)
    low = project(g, projector, tall)
    update = torch.zeros_like(low)
    kernel(update, low, state)
    del low
    rows = max(GROUP, BLOCK // p.shape[1] // GROUP * GROUP)
    for i in range(0, p.shape[0], rows):
        part, of = slice(i, i + rows), slice(i * p.shape[1] // GROUP, (i + rows) * p.shape[1] // GROUP)
        weight = p[part].float()
        groups_of(weight).sub_(p.zeros[of]).mul_(p.scales[of])
        delta = (update[part] @ projector if tall else projector[part] @ update).float()
        weight.add_(delta)
        del delta
        scales, zeros = scales_and_zeros(weight, 255)
        groups_of(weight).div_(scales).add_(zeros)
        noise = torch.rand_like(weight)
        p[part] = weight.add_(noise).floor_().clamp_(0, 255)
        p.scales[of], p.zeros[of] = scales, zeros
        del weight, scales, zeros, noise


PLAIN: dict[str, Step] = {
    "galore": galore,
    "galore-2": galore_2,
    "galore-8bit": galore_8bit,
    "galore-adafactor": galore_adafactor,
    "galore-mini": galore_mini(3),
    "galore-mini-1": galore_mini(1),
    "galore-mini-2": galore_mini(2),
    "tensor-galore": tensor_galore,
}
