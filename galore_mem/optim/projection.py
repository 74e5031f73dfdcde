"""Projecting a gradient into a low-rank space and back, and finding the space.

Legend: G is rows x cols, r the rank; a left projector is rows x r with orthonormal columns, a right one r x cols
with orthonormal rows. `Projectors` maps `left`, `right` or both to them.

The exact projector takes the leading singular vectors of G (GaLore, arXiv:2403.03507, definition 3.4); the randomized
one finds their span by subspace iteration from a random start (Halko, Martinsson, Tropp, arXiv:0909.4061,
algorithm 4.4; GaLore 2, arXiv:2504.20437, section 4), and orders it by a small eigenproblem.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Projectors = Mapping[str, Tensor]


def lowered(grad: Tensor, by: Projectors) -> Tensor:
    """The low-rank gradient: Pᵀ·G, G·Pᵀ, or both."""
    if "left" in by:
        grad = by["left"].T @ grad
    return grad @ by["right"].T if "right" in by else grad


def add_raised_(weight: Tensor, low: Tensor, by: Projectors, alpha: float) -> None:
    """`weight += alpha · (low projected back)`, without a full-size tensor."""
    if "right" not in by:
        weight.addmm_(by["left"], low, alpha=alpha)
    else:
        if "left" in by:
            low = by["left"] @ low
        weight.addmm_(low, by["right"], alpha=alpha)


def at_least_float32(t: Tensor) -> Tensor:
    """`t` in float32, or in its own format where that is wider."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


@dataclass(frozen=True, slots=True)
class Randomized:
    """How the randomized projector is found. `oversampling`: columns beyond the rank; `power_iterations`: rounds of
    subspace iteration after the first."""

    generator: torch.Generator
    oversampling: int
    power_iterations: int


def found(grad: Tensor, sides: tuple[str, ...], rank: int, how: Randomized | None) -> dict[str, Tensor]:
    """New projectors of a gradient, in its format and with storages of their own: no factor stays alive.

    Raises `torch.linalg.LinAlgError` where the decomposition does not converge.
    """
    kept = _exact(grad, sides, rank) if how is None else _randomized(grad, sides, rank, how)
    return {side: t.to(grad.dtype, copy=True, memory_format=torch.contiguous_format) for side, t in kept.items()}


def _exact(grad: Tensor, sides: tuple[str, ...], rank: int) -> dict[str, Tensor]:
    u, _, vh = torch.linalg.svd(at_least_float32(grad), full_matrices=False)
    return {side: u[:, :rank] if side == "left" else vh[:rank] for side in sides}


def _randomized(grad: Tensor, sides: tuple[str, ...], rank: int, how: Randomized) -> dict[str, Tensor]:
    matrix = grad.float() if grad.dtype is torch.float16 else grad  # products of two gradients leave float16's range
    first, *second = sides
    basis = leading(matrix if first == "right" else matrix.T, rank, how)
    kept = {first: basis.T if first == "right" else basis}
    for other in second:  # the image of the first basis, orthonormal again
        image = matrix @ basis.to(matrix.dtype) if other == "left" else matrix.T @ basis.to(matrix.dtype)
        image = torch.linalg.qr(at_least_float32(image)).Q
        kept[other] = image if other == "left" else image.T
    return kept


def leading(matrix: Tensor, rank: int, how: Randomized) -> Tensor:
    """About the `rank` leading right singular vectors of a matrix: cols x rank, largest first, float32 at least.

    Products are made in the matrix's format: a bfloat16 gradient needs no wider copy, and what bfloat16 loses is below
    the rounding of the gradient itself. Bases are orthonormalized and ordered in float32.
    """
    wide, columns = torch.promote_types(matrix.dtype, torch.float32), min(rank + how.oversampling, *matrix.shape)
    basis = torch.randn(matrix.shape[1], columns, dtype=wide, device=matrix.device, generator=how.generator)
    for _ in range(how.power_iterations + 1):
        basis = torch.linalg.qr((matrix.T @ (matrix @ basis.to(matrix.dtype))).to(wide)).Q
    image = (matrix @ basis.to(matrix.dtype)).to(wide)
    order = torch.linalg.eigh(image.T @ image).eigenvectors
    chosen: Tensor = basis @ order[:, -rank:].flip(1)
    return chosen


def similarity(old: Projectors, fresh: Projectors) -> float:
    """The mean absolute cosine between corresponding singular vectors of adjacent projectors (0 to 1).

    Q-GaLore, arXiv:2407.08296, section 3.2, compares adjacent projection matrices; a singular vector's sign is
    arbitrary, so each pair counts by its absolute value.
    """
    cosines = []
    for side, a in old.items():
        b, along = fresh[side], 1 if side == "right" else 0
        lengths = torch.linalg.vector_norm(a, dim=along) * torch.linalg.vector_norm(b, dim=along)
        cosines.append(((a * b).sum(along) / lengths.clamp_(min=torch.finfo(a.dtype).tiny)).abs().float().mean())
    return float(sum(cosines)) / len(cosines)


def rotations(old: Projectors, fresh: Projectors) -> dict[str, Tensor]:
    """Per side, the map from the old low-rank coordinates to the new ones (r x r, float32 at least)."""
    return {
        side: at_least_float32(fresh[side]) @ at_least_float32(a).T
        if side == "right"
        else at_least_float32(fresh[side]).T @ at_least_float32(a)
        for side, a in old.items()
    }


def carried(moment: Tensor, by: Mapping[str, Tensor], *, squares: bool = False) -> Tensor:
    """A low-rank moment in the new coordinates. Averages of squares mix by the squared entries: that is the new
    coordinates' second moment where the old ones are uncorrelated."""
    moved = at_least_float32(moment)
    if "left" in by:
        moved = (by["left"].square() if squares else by["left"]) @ moved
    if "right" in by:
        moved = moved @ (by["right"].square() if squares else by["right"]).T
    return moved.to(moment.dtype)
