"""The randomized projector: a run with its projectors is GaLore's, and its projectors are nearly the exact ones."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from literal import GaLore, GaLoreMini, Literal, Spaces, exact
from literal_follow import follow, same, start
from torch import Tensor

from galore_mem.optim import GaLoreAdamW
from galore_mem.optim import GaLoreMini as OurGaLoreMini

SETTINGS: dict[str, Any] = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}
SIDES = ("std", "reverse_std", "left", "right", "full")


def kept(optimizer: torch.optim.Optimizer, p: torch.nn.Parameter) -> Spaces:
    """The optimizer's projectors, as orthonormal columns."""
    state = optimizer.state[p]
    left = state.get("projector_left", state.get("projector"))
    right = state.get("projector_right", state.get("projector"))
    assert isinstance(left, Tensor)
    assert isinstance(right, Tensor)
    return left.double(), right.double().T


@pytest.mark.parametrize("carry", [False, True], ids=["kept", "carried"])
@pytest.mark.parametrize("proj_type", SIDES)
@pytest.mark.parametrize("made", [GaLoreAdamW, OurGaLoreMini])
def test_a_run_with_these_projectors(made: Any, proj_type: str, carry: bool) -> None:
    """The literal is given the projector that the optimizer found; everything else is its own."""
    p = start((10, 14))
    low = {"update_proj_gap": 7, "proj_type": proj_type, "carry_moments": carry}
    group = {"params": [("w", p)], "rank": 4, "svd": "randomized", "oversampling": 2, "power_iterations": 0, **low}
    optimizer = made([group], **SETTINGS)
    twin = {**low, "decompose": lambda grad, rank: kept(optimizer, p)}
    rows = [[i] for i in range(10)]
    literal: Literal = (
        GaLore(p, 4, low=twin, **SETTINGS) if made is GaLoreAdamW else GaLoreMini(p, 4, rows, low=twin, **SETTINGS)
    )
    follow(optimizer, {p: literal})


# -- the projectors themselves -----------------------------------------------------------------------

RANK, OVERSAMPLING = 16, 8


def orthonormal(rows: int, cols: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, cols, generator=generator, dtype=torch.float64)).Q


def decaying(rows: int, cols: int, decay: float) -> tuple[Tensor, list[float]]:
    """A matrix with singular values 1, decay, decay², ...."""
    side = min(rows, cols)
    values = [decay**k for k in range(side)]
    u, v = orthonormal(rows, side, 1), orthonormal(cols, side, 2)
    return u @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ v.T, values


def projectors(grad: Tensor, rank: int, **options: Any) -> Spaces:
    p = torch.nn.Parameter(torch.zeros_like(grad))
    p.grad = grad.clone()
    optimizer = GaLoreAdamW([{"params": [p], "rank": rank, "svd": "randomized", "proj_type": "full", **options}])
    optimizer.step()
    return kept(optimizer, p)


def halko(values: list[float], rank: int, oversampling: int, power: int) -> float:
    """The expected spectral error of subspace iteration, at most (Halko, Martinsson, Tropp, arXiv:0909.4061, corollary
    10.10), for a matrix (A·Aᵀ)^q·A with q = power rounds: with s = σ^(2q + 1),
    [(1 + sqrt(k/(p - 1)))·s_{k+1} + e·sqrt(k + p)/p·sqrt(Σ_{j>k} s_j²)]^(1/(2q + 1)); cutting the k + p columns
    found down to k adds σ_{k+1} (theorem 9.3)."""
    k, p, over = rank, oversampling, 2 * power + 1
    s = [value**over for value in values]
    bound = (1 + math.sqrt(k / (p - 1))) * s[k] + math.e * math.sqrt(k + p) / p * math.sqrt(sum(x * x for x in s[k:]))
    return bound ** (1 / over) + values[k]


@pytest.mark.parametrize("power", [0, 1, 2])
@pytest.mark.parametrize("decay", [0.8, 0.95, 1.0])
@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (80, 80)], ids=str)
def test_orthonormal_and_as_good_as_theory_says(shape: tuple[int, int], decay: float, power: int) -> None:
    grad, values = decaying(*shape, decay)
    left, right = projectors(grad, RANK, oversampling=OVERSAMPLING, power_iterations=power)
    eye = torch.eye(RANK, dtype=torch.float64)
    same(left.T @ left, eye, "left", rtol=0, atol=1e-13)
    same(right.T @ right, eye, "right", rtol=0, atol=1e-13)
    for missed in (grad - left @ left.T @ grad, grad - grad @ right @ right.T):
        error = float(torch.linalg.matrix_norm(missed, ord=2))
        assert values[RANK] * (1 - 1e-12) <= error <= halko(values, RANK, OVERSAMPLING, power)


@pytest.mark.parametrize("shape", [(96, 64), (64, 96)], ids=str)
def test_close_to_the_exact_subspace(shape: tuple[int, int]) -> None:
    """The sine of the largest angle between the two subspaces falls as (σ_{l+1}/σ_k)², l = k + p, with each product by
    G·Gᵀ (Halko et al., section 4.5); here 0.5^(9·2) each, 1.5e-11 with two of them, times a factor of some tens."""
    grad, _ = decaying(*shape, 0.5)
    found = projectors(grad, RANK, oversampling=OVERSAMPLING, power_iterations=1)
    for random, true in zip(found, exact(grad, RANK), strict=True):
        missed = random - true @ (true.T @ random)
        assert float(torch.linalg.matrix_norm(missed, ord=2)) < 1e-9


@pytest.mark.parametrize("rank", [5, 8])
@pytest.mark.parametrize("shape", [(8, 12), (12, 8)], ids=str)
def test_exact_where_the_columns_cover_the_matrix(shape: tuple[int, int], rank: int) -> None:
    """rank + oversampling >= min(m, n): the start spans the whole space, and the small eigenproblem is the SVD's.
    Vectors agree one by one, up to their signs."""
    grad, _ = decaying(*shape, 0.7)
    for random, true in zip(projectors(grad, rank), exact(grad, rank), strict=True):
        cosines = (random * true).sum(0)
        same(cosines.abs(), torch.ones(rank, dtype=torch.float64), "cosines", rtol=0, atol=1e-9)


def test_a_gradient_of_low_rank_loses_nothing() -> None:
    values = torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
    grad = orthonormal(40, 3, 1) @ values @ orthonormal(30, 3, 2).T
    left, right = projectors(grad, 4, oversampling=2, power_iterations=0)
    same(left @ (left.T @ grad), grad, "left", rtol=0, atol=1e-12)
    same((grad @ right) @ right.T, grad, "right", rtol=0, atol=1e-12)


# Products of the iteration are rounded in the gradient's format: two a round, each column at |G|·ε, 24 columns, hence
# 2·sqrt(24)·ε. What is kept is rounded once to that format; before that it is orthonormal to 24·ε of float32.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(96, 64), (64, 96)], ids=str)
def test_in_other_formats(shape: tuple[int, int], dtype: torch.dtype) -> None:
    grad, values = decaying(*shape, 0.8)
    left, right = projectors(grad.to(dtype), RANK, oversampling=OVERSAMPLING, power_iterations=1)
    rounding = 2 * math.sqrt(RANK + OVERSAMPLING) * torch.finfo(dtype).eps
    kept_in = (RANK + OVERSAMPLING) * torch.finfo(torch.float32).eps
    eye = torch.eye(RANK, dtype=torch.float64)
    for basis, missed in ((left, grad - left @ left.T @ grad), (right, grad - grad @ right @ right.T)):
        same(basis.T @ basis, eye, "orthonormal", rtol=0, atol=torch.finfo(dtype).eps + kept_in)
        error = float(torch.linalg.matrix_norm(missed, ord=2))
        assert values[RANK] * (1 - rounding) <= error <= halko(values, RANK, OVERSAMPLING, 1) + rounding
