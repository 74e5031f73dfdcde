"""What must hold without looking into an optimizer: a projection that loses nothing changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from literal import exact
from literal_blocks import HEADS, KINDS, Kind
from literal_follow import gradients, same, start
from torch import Tensor

from galore_mem.optim import AdamMini, GaLoreAdamW, GaLoreMini
from galore_mem.partition import partition

SETTINGS: dict[str, Any] = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}
STEPS = 22
# float64, 22 steps: two computations of the same values by different routes differ by roundings
ROUTES = {"rtol": 1e-10, "atol": 1e-11}
PROJECTED = [kind for kind in KINDS if kind.projected]


def trained(optimizer: torch.optim.Optimizer, p: torch.nn.Parameter, grads: list[Tensor]) -> list[Tensor]:
    """The weight after each step."""
    seen = []
    for grad in grads:
        p.grad = grad.clone()
        optimizer.step()
        seen.append(p.detach().clone())
    return seen


def all_same(actual: list[Tensor], expected: list[Tensor], **tolerance: float) -> None:
    for t, (a, e) in enumerate(zip(actual, expected, strict=True)):
        same(a, e, f"step {t}", **(tolerance or ROUTES))


def mini(kind: Kind, p: torch.nn.Parameter, approach: int, **low: Any) -> GaLoreMini:
    group = {"params": [(kind.name, p)], "rank": min(kind.shape), "scale": 1.0, **low}
    return GaLoreMini([group], approach=approach, partition=blocks(kind), **SETTINGS)


def blocks(kind: Kind) -> dict[str, Any]:
    return {kind.name: partition(kind.name, kind.shape, HEADS, transposed=kind.transposed)}


# the projector of the shorter side at full rank is a square orthogonal matrix: P·Pᵀ = 1
@pytest.mark.parametrize("low", [
    {"update_proj_gap": 1000},  # fixed
    {"update_proj_gap": 5, "carry_moments": True},  # new coordinates, the same moments in them
], ids=["fixed", "carried"])  # fmt: skip
@pytest.mark.parametrize("kind", PROJECTED, ids=str)
def test_galore_mini_at_full_rank_is_adam_mini(kind: Kind, low: dict[str, Any]) -> None:
    """P·(M/c) with M = Σ β·Pᵀ·G is what Adam-mini has, and v is of the original gradient anyway."""
    grads = list(gradients(kind.shape, STEPS))
    p, q = start(kind.shape), start(kind.shape)
    expected = trained(AdamMini([(kind.name, q)], partition=blocks(kind), **SETTINGS), q, grads)
    all_same(trained(mini(kind, p, 3, **low), p, grads), expected)


@pytest.mark.parametrize("approach", [1, 2])
@pytest.mark.parametrize("kind", [k for k in PROJECTED if (k.shape[0] < k.shape[1]) != k.transposed], ids=str)
def test_the_other_approaches_are_not(kind: Kind, approach: int) -> None:
    """Where rows are projected away, 1 and 2 divide rows of another space, at full rank too."""
    grads = list(gradients(kind.shape, 3))
    p, q = start(kind.shape), start(kind.shape)
    expected = trained(AdamMini([(kind.name, q)], partition=blocks(kind), **SETTINGS), q, grads)
    actual = trained(mini(kind, p, approach, update_proj_gap=1000), p, grads)
    assert float((actual[-1] - expected[-1]).abs().max()) > 1e-3


@pytest.mark.parametrize("kind", PROJECTED, ids=str)
def test_approaches_2_and_3_are_one_where_rows_stay(kind: Kind) -> None:
    """(D·M)·Qᵀ = D·(M·Qᵀ) for a diagonal D: only a projection of the rows themselves tells the two apart."""
    low = {"proj_type": "left" if kind.transposed else "right", "update_proj_gap": 7}
    grads = list(gradients(kind.shape, STEPS))
    p, q = start(kind.shape), start(kind.shape)
    one, other = mini(kind, p, 2, **{**low, "rank": 4}), mini(kind, q, 3, **{**low, "rank": 4})
    all_same(trained(one, p, grads), trained(other, q, grads))


@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (6, 6)], ids=str)
@pytest.mark.parametrize("proj_type", ["std", "full"])
def test_galore_at_full_rank_is_adamw_on_the_rotated_weight(shape: tuple[int, int], proj_type: str) -> None:
    """With P fixed, Pᵀ·W moves as a weight of its own with the gradient Pᵀ·G; weight decay commutes with P."""
    if proj_type == "full" and shape[0] != shape[1]:
        shape = (shape[0], shape[0])
    grads = list(gradients(shape, STEPS))
    left, right = exact(grads[0], min(shape))
    wide = shape[0] < shape[1]
    a = left if wide or proj_type == "full" else torch.eye(shape[0], dtype=torch.float64)
    b = right if not wide or proj_type == "full" else torch.eye(shape[1], dtype=torch.float64)
    p = start(shape)
    rotated = torch.nn.Parameter(a.T @ p.detach() @ b)
    group = {"params": [p], "rank": min(shape), "scale": 1.0, "update_proj_gap": 1000, "proj_type": proj_type}
    actual = trained(GaLoreAdamW([group], **SETTINGS), p, grads)
    expected = trained(torch.optim.AdamW([rotated], **SETTINGS), rotated, [a.T @ grad @ b for grad in grads])
    all_same(actual, [a @ w @ b.T for w in expected])


@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (6, 6)], ids=str)
@pytest.mark.parametrize("proj_type", ["std", "full"])
def test_galore_at_full_rank_is_adamw_where_singular_vectors_are_axes(shape: tuple[int, int], proj_type: str) -> None:
    """P is a signed permutation when the gradient of the refresh is a permuted diagonal: AdamW's elementwise step
    commutes with that. (`full`: of the longer side only the axes of the first gradient are kept, so it is square.)"""
    if proj_type == "full":
        shape = (min(shape),) * 2
    side = min(shape)
    first = torch.zeros(shape, dtype=torch.float64)
    order = torch.randperm(side, generator=torch.Generator().manual_seed(1)).tolist()
    for i, j in enumerate(order):
        first[i, j] = (-1) ** i * (1.0 + i)  # singular values 1, 2, 3, ...
    grads = [first, *gradients(shape, STEPS - 1)]
    p, q = start(shape), start(shape)
    group = {"params": [p], "rank": side, "scale": 1.0, "update_proj_gap": 1000, "proj_type": proj_type}
    actual = trained(GaLoreAdamW([group], **SETTINGS), p, grads)
    all_same(actual, trained(torch.optim.AdamW([q], **SETTINGS), q, grads))


TORCH = {"rtol": 1e-12, "atol": 1e-13}


@pytest.mark.parametrize("shape", [(6, 9), (7,), (3, 2, 4), ()], ids=str)
def test_unprojected_parameters_get_torch_adamw(shape: tuple[int, ...]) -> None:
    grads = list(gradients(shape, STEPS))
    p, q = start(shape), start(shape)
    optimizer, reference = GaLoreAdamW([p], **SETTINGS), torch.optim.AdamW([q], **SETTINGS)
    all_same(trained(optimizer, p, grads), trained(reference, q, grads), **TORCH)
    for name in ("exp_avg", "exp_avg_sq"):
        same(optimizer.state[p][name], reference.state[q][name], name, **TORCH)


@pytest.mark.parametrize("made", [AdamMini, GaLoreMini])
def test_biases_get_torch_adamw(made: Any) -> None:
    """A block of one value has that value's second moment."""
    grads = list(gradients((7,), STEPS))
    p, q = start((7,)), start((7,))
    actual = trained(made([("q_proj.bias", p)], **SETTINGS), p, grads)
    all_same(actual, trained(torch.optim.AdamW([q], **SETTINGS), q, grads), **TORCH)


@pytest.mark.parametrize("approach", [2, 3])
def test_a_matrix_of_single_columns_gets_adamw(approach: int) -> None:
    """A row of one value is a block of one: n x 1, projected onto its one column (a sign), is AdamW on n values."""
    grads = list(gradients((7, 1), STEPS))
    p, q = start((7, 1)), start((7, 1))
    group = {"params": [("w", p)], "rank": 1, "scale": 1.0}
    actual = trained(GaLoreMini([group], approach=approach, **SETTINGS), p, grads)
    all_same(actual, trained(torch.optim.AdamW([q], **SETTINGS), q, grads), **TORCH)
