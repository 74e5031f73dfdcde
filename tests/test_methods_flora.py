"""Flora against the authors' optimizer written out in plain torch; Tensor-GaLore against neuraloperator's, where
installed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from ledgers import job, measured, predicted
from low_rank import ALL, FORMATS, TALL, WIDE, Build, Param, program_peak, run, step_peak
from plain import RANK, Plain, State
from torch import Tensor

from galore_mem.methods.base import Job
from galore_mem.methods.registry import method

# and a matrix too long for a low-rank momentum (n > 4·m)
PARAMS = (*ALL, Param((64, 640)))
LR, EPS = 1e-3, 1e-30


def randn(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape) / math.sqrt(RANK)


def down(t: Tensor) -> Tensor:
    return randn((RANK, t.shape[0])) @ t if t.shape[0] < t.shape[1] else t @ randn((t.shape[1], RANK))


def up(t: Tensor, shape: torch.Size) -> Tensor:
    if shape[0] < shape[1]:
        return randn((RANK, shape[0])).T @ t
    return t @ randn((shape[1], RANK)).T


def rms(t: Tensor) -> Tensor:
    return t.norm(2) / t.numel() ** 0.5


def factored(state: State, update: Tensor, grad: Tensor) -> Tensor:
    for name, dim in (("exp_avg_sq_row", -1), ("exp_avg_sq_col", -2)):
        mean = update.mean(dim=dim)
        state[name] = state[name].lerp_(mean, 0.1) if name in state else torch.ones_like(mean)
        del mean
    row, col = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
    r_factor = (row / row.mean(dim=-1, keepdim=True)).rsqrt_().unsqueeze(-1)
    return torch.mul(r_factor, col.unsqueeze(-2).rsqrt()).mul_(grad)


def flora(beta1: float) -> Any:
    """flora_step_ of BorealisAI/flora-opt, with its order of temporaries."""

    def step(p: Tensor, state: State, refresh: bool) -> None:
        grad, p.grad = p.grad.float(), None
        weight = p.float()
        state["RMS"] = rms(weight)
        compressed = p.low_rank and p.dim() == 2 and min(p.shape) >= RANK and max(p.shape) <= 4 * min(p.shape)
        update = (grad**2) + EPS
        if p.dim() == 2:
            update = factored(state, update, grad)
        else:
            state["exp_avg_sq"] = state.get("exp_avg_sq", torch.ones_like(grad)).mul_(0.9).add_(update, alpha=0.1)
            update = state["exp_avg_sq"].rsqrt().mul_(grad)
        if beta1 and "exp_avg" not in state:
            state["exp_avg"] = down(torch.zeros_like(grad)) if compressed else torch.zeros_like(grad)
        if compressed and beta1:
            raw = update.clone()
            update.copy_(update * (1 - beta1) + up(state["exp_avg"], p.shape) * beta1)
            if refresh:
                state["exp_avg"].copy_(down(up(state["exp_avg"], p.shape)))
            state["exp_avg"].copy_(state["exp_avg"] * beta1 + down(raw) * (1 - beta1))
        elif beta1:
            update = update * (1 - beta1) + state["exp_avg"] * beta1
            state["exp_avg"].copy_(update)
        update.div_((rms(update) / 1.0).clamp_(min=1.0)).mul_(LR)
        weight.add_(-update)
        if p.dtype != torch.float32:
            p.copy_(weight)

    return step


def told(beta1: float) -> Job:
    return job("flora", {"rank": RANK, "beta1": beta1})


def build(beta1: float) -> Build:
    return lambda regular, projected, named: Plain(named, flora(beta1))


@pytest.mark.parametrize("beta1", [0.9, 0.0])
@pytest.mark.parametrize("fmt", FORMATS)
def test_flora(fmt: str, beta1: float) -> None:
    code = method("flora").implementation("flora-opt")
    optimizer, named = run(build(beta1), PARAMS, fmt, 1)
    for given, p in zip(PARAMS, named, strict=True):
        assert measured(optimizer.state[p]) == predicted(code.state(given.trained(fmt), told(beta1))), given
    for params in ((Param(WIDE),), (Param(TALL),), PARAMS, PARAMS[::-1]):
        for refresh in (False, True):
            real = step_peak(build(beta1), params, fmt, 1, refresh)
            assert real == program_peak(code, params, fmt, told(beta1), refresh), (params, refresh)


def test_flora_by_hand() -> None:
    """256 x 688 at rank 64: five full-size float32 tensors in float32; in bfloat16 those and copies of gradient and
    parameter, less the bfloat16 gradient, which the step takes: 4·(5 + 2)·176,128 - 2·176,128."""
    full = 256 * 688
    code = method("flora").implementation("flora-opt")
    for fmt, expected in (("float32", 20 * full), ("bfloat16", 28 * full - 2 * full)):
        assert program_peak(code, (Param(WIDE),), fmt, told(0.9), False) == expected


CUBES = ((Param(WIDE),), (Param((64, 48, 32)),), (Param((64, 48, 3)),), (Param((16, 24, 20, 12)),))


@pytest.mark.parametrize("params", CUBES, ids=str)
def test_neuraloperator(params: tuple[Param, ...]) -> None:
    """In float32, the one format it runs in; a rank above a mode's length (3) pads the factor to twice the length."""
    adamw = pytest.importorskip("neuralop.training.adamw").AdamW
    pytest.importorskip("tensorly").set_backend("pytorch")
    code, how = method("tensor-galore").implementation("neuraloperator"), job("tensor-galore", {"rank": 16})

    def tucker(regular: list[Any], projected: list[Any], named: list[Any]) -> Any:
        return adamw([{"params": projected, "galore": True}], lr=LR, galore_rank=16)

    optimizer, named = run(tucker, params, "float32", 1)
    for given, p in zip(params, named, strict=True):
        state = optimizer.state[p]
        own = {f"projector.proj_tensor.{i}": t for i, t in enumerate(state["projector"].proj_tensor)}
        own |= {name: t for name, t in state.items() if isinstance(t, torch.Tensor)}
        assert measured(own) == predicted(code.state(given.trained("float32"), how))
    assert step_peak(tucker, params, "float32", 2) == program_peak(code, params, "float32", how, False)
