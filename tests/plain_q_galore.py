"""Our Q-GaLore written out in plain torch (see `plain_low_rank.py`)."""

from __future__ import annotations

import torch
from plain_low_rank import RANK, State, kernel, project, right
from torch import Tensor

GROUP, BLOCK = 256, 2**22


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
