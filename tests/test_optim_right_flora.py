"""`Flora` against a literal transcription, as in `test_optim_right.py`. κ = 7: new projections at steps 7, 14, 21."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from literal_flora import Flora
from literal_follow import follow, follow_rounded, gradients, start
from torch import Tensor

from galore_mem.optim.flora import Flora as OurFlora

KAPPA = 7
# tall, wide, square, and a rank that reaches the smaller side
SHAPES = {(10, 6): 4, (6, 10): 4, (8, 8): 3, (3, 11): 3, (12, 2): 1}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"lr": 0.02},
    "clipped": {"lr": 0.02, "beta1": 0.8, "eps": (1e-2, 1e-3), "clip_threshold": 0.2, "weight_decay": 0.1},
    "unclipped": {"lr": 0.02, "clip_threshold": None},
    "no moment": {"lr": 0.02, "beta1": 0.0},
    "relative": {"lr": 0.3, "scale_parameter": True, "relative_step": True, "weight_decay": 0.1},
}


def drawn(optimizer: OurFlora, p: torch.nn.Parameter, rank: int, dtype: torch.dtype) -> Tensor:
    """A of the step that was made: standard normal numbers from the seed in the state, divided by sqrt(r)."""
    generator = torch.Generator().manual_seed(optimizer.state[p]["seed"])
    return torch.randn(rank, min(p.shape), generator=generator, dtype=dtype) / rank**0.5


def pair(
    shape: tuple[int, ...], rank: int | None, dtype: torch.dtype = torch.float64, **settings: Any
) -> tuple[OurFlora, torch.nn.Parameter, Flora]:
    p = start(shape, dtype=dtype)
    optimizer = OurFlora([{"params": [p], "rank": rank}], kappa=KAPPA, **settings)
    # random numbers are of the gradient's format, of float16 in float32 (whose range 1/sqrt(V) leaves)
    made = torch.float32 if dtype == torch.float16 else dtype
    literal = Flora(p, rank, KAPPA, lambda: drawn(optimizer, p, rank or 0, made), **{"beta1": 0.9, **settings})
    return optimizer, p, literal


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_flora(shape: tuple[int, int], options: str) -> None:
    optimizer, p, literal = pair(shape, SHAPES[shape], **OPTIONS[options])
    follow(optimizer, {p: literal})
    assert literal.compressed == (options != "no moment" and shape != (3, 11))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", [(6, 9), (7,), (2, 3, 4)], ids=str)
def test_momentum_as_it_is(shape: tuple[int, ...], options: str) -> None:
    optimizer, p, literal = pair(shape, None, **OPTIONS[options])
    follow(optimizer, {p: literal})


def test_projections_are_renewed_every_kappa_steps() -> None:
    """One seed for seven steps, then another; and the numbers are such that E[AᵀA] is the identity."""
    optimizer, p, _ = pair((40, 30), 20)
    seeds, outer = [], torch.zeros(30, 30, dtype=torch.float64)
    for grad in gradients(p.shape, 4 * KAPPA):
        p.grad = grad
        optimizer.step()
        seeds.append(optimizer.state[p]["seed"])
        a = drawn(optimizer, p, 20, torch.float64)
        outer += a.T @ a / (4 * KAPPA)
    assert [len(set(seeds[i : i + KAPPA])) for i in range(0, 4 * KAPPA, KAPPA)] == [1, 1, 1, 1]
    assert len(set(seeds)) == 4
    # each entry averages 4·20 products of numbers of variance 1/20: deviation sqrt(2/80) at most, five of them
    assert float((outer - torch.eye(30)).abs().max()) < 5 * (2 / 80) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_flora_rounded(shape: tuple[int, int], dtype: torch.dtype) -> None:
    optimizer, p, literal = pair(shape, SHAPES[shape], dtype, lr=0.5, beta1=0.8, weight_decay=0.1)
    follow_rounded(optimizer, p, literal)
