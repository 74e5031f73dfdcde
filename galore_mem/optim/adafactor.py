"""Adafactor's pieces, for the optimizers here that factor their second moment.

Shazeer, Stern: Adafactor: Adaptive Learning Rates with Sublinear Memory Cost, arXiv:1804.04235, algorithm 4. For a
matrix G of n x m at step t (from 1):
R = β̂·R + (1 - β̂)·mean of G² + ε1 over each row;  C the same over each column;  β̂ = 1 - t^decay_rate
U = G / sqrt(R·C / mean(R));  Û = U / max(1, RMS(U)/d);  W = W - ρ·max(ε2, RMS(W))·Û

(The paper keeps sums, here are means: R·C / mean(R) of means is R·C / sum(R) of sums.) More than two dimensions are a
stack of matrices; less have one second moment per value.

Averages are float32 at least. The update is made in place of a tensor in the gradient's format; in float16, which
1/sqrt(C) leaves, and for vectors, in float32.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from galore_mem.errors import InputError
from galore_mem.optim.base import Group, State
from galore_mem.optim.options import Range
from galore_mem.optim.projection import at_least_float32

RANGES: Mapping[str, Range] = {
    "lr": Range(),
    "weight_decay": Range(),
    "beta1": Range(0.0, 1.0, optional=True),
    "decay_rate": Range(-1.0, 0.0),
    "clip_threshold": Range(optional=True),
}


def check(group: Group) -> None:
    """Raises `InputError` where the two ε, or the clipping threshold, are none."""
    eps = group["eps"]
    if not isinstance(eps, tuple | list) or len(eps) != 2:
        raise InputError(f"eps must be two numbers (of squared gradients, of the parameter's RMS), got {eps!r}")
    for i, value in enumerate(eps):
        Range().check(f"eps[{i}]", value)
    if eps[0] == 0:
        raise InputError("eps[0] must be above 0: the mean square of a zero gradient is divided by")
    if group["clip_threshold"] == 0:
        raise InputError("clip_threshold must be above 0; give None for no clipping")


def own(grad: Tensor) -> Tensor:
    """A copy of a gradient, to be turned into the update."""
    wide = grad.dtype is torch.float16 or grad.dim() < 2
    return at_least_float32(grad) if wide and grad.dtype.itemsize < 4 else grad.clone()


def in_range(t: Tensor) -> Tensor:
    """`t`, or a float32 copy of a float16 one."""
    return t.float() if t.dtype is torch.float16 else t


def mean_squares(t: Tensor, dim: int) -> Tensor:
    """Means of the squares along a dimension. `vector_norm` reads `t` without a copy."""
    return at_least_float32(torch.linalg.vector_norm(t, dim=dim)).square_().div_(t.shape[dim])


def rms(t: Tensor) -> Tensor:
    """The root mean square, a scalar in float32 at least; through norms of rows, few enough to be widened."""
    if t.dim() == 0:
        return at_least_float32(t).abs()
    rows = at_least_float32(torch.linalg.vector_norm(t, dim=-1))
    norm: Tensor = torch.linalg.vector_norm(rows)
    return norm.div_(t.numel() ** 0.5)


def beta2(state: State, group: Group) -> float:
    """β̂ of the step that is being made; 0 in the first."""
    return 1.0 - float((state.get("step", 0) + 1) ** group["decay_rate"])


def factors(grad: Tensor, state: State, group: Group) -> tuple[Tensor, Tensor]:
    """Averages with this step's gradient in them, as two factors in its format: U is the gradient times a value per row
    times a value per column."""
    decay, eps = beta2(state, group), group["eps"][0]
    for name, dim in (("exp_avg_sq_row", -1), ("exp_avg_sq_col", -2)):
        squares = mean_squares(grad, dim).add_(eps)
        state[name] = state[name].lerp_(squares, 1 - decay) if name in state else squares
        del squares
    rows, cols = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
    by_row = (rows / rows.mean(-1, keepdim=True)).rsqrt_().to(grad.dtype)
    return by_row.unsqueeze(-1), cols.rsqrt().to(grad.dtype).unsqueeze(-2)


def normalize_(update: Tensor, state: State, group: Group) -> Tensor:
    """A gradient becomes U, in place."""
    if update.dim() >= 2:
        by_row, by_col = factors(update, state, group)
        return update.mul_(by_row).mul_(by_col)
    decay, eps = beta2(state, group), group["eps"][0]
    if "exp_avg_sq" not in state:
        state["exp_avg_sq"] = torch.zeros_like(update)
    average: Tensor = state["exp_avg_sq"]
    average.mul_(decay).addcmul_(update, update, value=1 - decay).add_((1 - decay) * eps)
    return update.mul_(average.rsqrt())


def clipping(size: Tensor, group: Group) -> Tensor:
    """What an update whose RMS is `size` is multiplied by: 1/max(1, RMS/d). No wait for the device."""
    threshold = group["clip_threshold"]
    return size.div_(float("inf") if threshold is None else threshold).clamp_(min=1.0).reciprocal_()


def step_size(p: Tensor, state: State, group: Group) -> tuple[float, Tensor | None]:
    """(ρ, max(ε2, RMS(W)) or None without `scale_parameter`). ρ is `lr`, with `relative_step` at most 1/sqrt(t)."""
    rho = float(group["lr"])
    if group["relative_step"]:
        rho = min(rho, (state.get("step", 0) + 1) ** -0.5)
    return rho, rms(p).clamp_(min=group["eps"][1]) if group["scale_parameter"] else None


def decay_(p: Tensor, group: Group, rho: float, size: Tensor | None) -> None:
    """Decoupled weight decay, by the whole step size."""
    if group["weight_decay"]:
        p.mul_(1 - rho * group["weight_decay"] * (1.0 if size is None else size))
