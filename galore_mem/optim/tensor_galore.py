"""Tensor-GaLore: GaLore for parameters of more than two dimensions, through a Tucker decomposition.

George, Pitt, Zhao, Kossaifi, Luo, Tian, Anandkumar: Tensor-GaLore: Memory-Efficient Training via Gradient Tensor
Decomposition, arXiv:2501.02379. For a gradient of d1 x ... x dk:

Every `update_proj_gap` steps, for each mode i:  U_i = leading left singular vectors of G unfolded along i (di x ri)
R = G ×1 U_1ᵀ ... ×k U_kᵀ, the core, r1 x ... x rk; its moments and N as in `galore.py`
W = W - η·α·N ×1 U_1 ... ×k U_k

The authors' code (neuraloperator) takes tensorly's decomposition, which improves these singular vectors by higher-order
iteration, and computes it once. Here they are the singular vectors themselves (the HOSVD): one pass over the modes, and
an error at most sqrt(k) times the best one's (De Lathauwer, De Moor, Vandewalle, 2000); renewed as the paper says.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from galore_mem.errors import InputError
from galore_mem.methods import tensor_galore
from galore_mem.optim.base import Found, State
from galore_mem.optim.galore import GaLoreAdamW
from galore_mem.optim.projection import Randomized, at_least_float32, found


def contracted(t: Tensor, factors: list[Tensor], side: int) -> Tensor:
    """A tensor whose modes are multiplied, from the first on, by as many matrices, each over its dimension `side`. The
    modes that are done go to the end: after all of them, each is in its place."""
    for factor in factors:
        t = torch.tensordot(t, factor, dims=([0], [side]))
    return t


class TensorGaLoreAdamW(GaLoreAdamW):
    """AdamW whose moments live in a Tucker core of the gradient, for parameters of three and more dimensions.

    Arguments, and what becomes of matrices and of parameters outside the low-rank groups, are `GaLoreAdamW`'s.
    `rank` holds for every mode, clipped to its length (and to the product of the others); `proj_type` for matrices
    only. Similarity is the mean over the modes.

    State of d1 x ... x dk, in the gradient's format: `projector.0`, `projector.1`, ... of di·ri, `exp_avg` and
    `exp_avg_sq` of the core's size. A step without refresh needs the gradient with one mode contracted, and the update
    with one mode to go; nothing of full size for a contiguous parameter.

    Raises `InputError` as `GaLoreAdamW` does; vectors cannot be projected.
    """

    METHOD = tensor_galore.METHOD

    def _check(self, at: Found) -> None:
        if self._projects(at) and at.p.dim() < 2:
            raise InputError(
                f"{at.name} has the shape {tuple(at.p.shape)}; {type(self).__name__} projects two and more dimensions: "
                "put it into a group without rank"
            )

    def _sides(self, at: Found) -> tuple[str, ...]:
        return super()._sides(at) if at.p.dim() == 2 else tuple(str(mode) for mode in range(at.p.dim()))

    def _names(self, at: Found) -> tuple[str, ...]:
        return super()._names(at) if at.p.dim() == 2 else tuple(f"projector.{mode}" for mode in self._sides(at))

    def _factors(self, at: Found, state: State) -> list[Tensor]:
        return list(self._projectors(at, state).values())

    def _decomposed(self, at: Found, grad: Tensor, how: Randomized | None) -> dict[str, Tensor]:
        if grad.dim() == 2:
            return super()._decomposed(at, grad, how)
        ranks = tensor_galore.ranks(tuple(grad.shape), at.group["rank"])
        return {str(mode): _factor(grad, mode, r, how) for mode, r in enumerate(ranks)}

    def _lowered(self, at: Found, grad: Tensor, state: State) -> Tensor:
        return super()._lowered(at, grad, state) if grad.dim() == 2 else contracted(grad, self._factors(at, state), 0)

    def _add_raised_(self, at: Found, low: Tensor, state: State, alpha: float) -> None:
        if at.p.dim() == 2:
            super()._add_raised_(at, low, state, alpha)
            return
        *factors, last = self._factors(at, state)
        low = contracted(low, factors, 1).flatten(1)  # last mode's rank x the product of the others
        if at.p.is_contiguous():
            at.p.view(-1, at.p.shape[-1]).addmm_(low.T, last.T, alpha=alpha)
        else:
            at.p.add_((low.T @ last.T).view(at.p.shape), alpha=alpha)

    def _carry(self, state: State, by: Mapping[str, Tensor]) -> None:
        if "0" not in by:
            super()._carry(state, by)
            return
        turns = list(by.values())
        for name, maps in (("exp_avg", turns), ("exp_avg_sq", [turn.square() for turn in turns])):
            state[name].copy_(contracted(at_least_float32(state[name]), maps, 1))


def _factor(grad: Tensor, mode: int, rank: int, how: Randomized | None) -> Tensor:
    """The leading left singular vectors of a gradient with one mode first, as a matrix."""
    return found(grad.movedim(mode, 0).reshape(grad.shape[mode], -1), ("left",), rank, how)["left"]
