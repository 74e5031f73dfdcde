"""Q-GaLore: an INT4 projector, 8-bit moments, INT8 weights, and refreshes only where the subspace still moves.

Zhang, Jaiswal, Yin, Liu, Zhao, Tian, Wang: Q-GaLore: Quantized GaLore with INT4 Projection and Layer-Adaptive Low-Rank
Gradients, arXiv:2407.08296, section 3 and algorithm 1. For a matrix projected from the left:

Every T steps, counted from the first:  P = leading left singular vectors of G, rounded to INT4
T of this matrix doubles once adjacent P have been similar for a while (section 3.2)
R = Pᵀ·G;  M, V, N as in 8-bit Adam;  W = SR(W - η·α·P·N), SR rounding stochastically to INT8 (section 3.4)

Where the paper leaves something open, or its code (VITA-Group/Q-GaLore) differs:
- P is two values per byte; the code stores one.
- Similarity: the paper compares projection matrices, the code the first singular vector with its arbitrary sign. Ours
  is the mean over all vectors of the absolute cosine (`projection.similarity`). The old P has been rounded, the new one
  not yet.
- Groups whose values all have one sign: their range is extended to 0 (`quantize.py`), where the code's collapses.
- The gradient of an INT8 weight is in `weight.grad`, so that clipping, accumulation and hooks see it.
- What SR rounds, and when a group's range is refitted: `int8.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Unpack

from torch import Tensor

from galore_mem.errors import InputError
from galore_mem.methods import q_galore
from galore_mem.methods.projection import OURS, factor, names
from galore_mem.optim.adamw import decay
from galore_mem.optim.base import Found, LayerWise, State
from galore_mem.optim.galore_8bit import EightBit
from galore_mem.optim.int8 import Int8Weight
from galore_mem.optim.projected import LowRank, low_rank_options
from galore_mem.optim.projection import Projectors, add_raised_
from galore_mem.optim.quantize import INT4, Grid, dequantize_, packed, quantize, unpacked


class QGaLoreAdamW8bit(EightBit):
    """8-bit GaLore whose projector is INT4, and whose projected weights may be INT8.

    `galore_mem.optim.quantize_linears(model)` makes the weights INT8; call it before this. Float weights are taken too.
    `params` and the options of a low-rank group are those of `GaLoreAdamW`, with `cos_threshold` 0.4 as in the paper;
    parameters that are not projected get bitsandbytes' 8-bit AdamW. Needs bitsandbytes.

    State of an m x n matrix (m <= n): `projector` m·r/2 bytes, `projector_scales` and `projector_zeros` one each per
    256 of its elements in the gradient's format, and the moments of `GaLoreAdamW8bit`. A step makes the projector in
    the gradient's format and, of an INT8 weight, one block of about 2^22 elements in float32
    (`galore_mem/methods/q_galore.py`).

    Random numbers for the rounding follow from `seed`, the parameter's name and the step. Raises `InputError` as
    `GaLoreAdamW8bit` does, and for an INT8 weight in a group without rank.
    """

    METHOD = q_galore.METHOD
    INT8 = True

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        layerwise: LayerWise | None = None,
        error_if_nonfinite: bool = True,
        **low_rank: Unpack[LowRank],
    ) -> None:
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay,
            **low_rank_options(low_rank, cos_threshold=0.4),
        }  # fmt: skip
        super().__init__(params, defaults, layerwise=layerwise, error_if_nonfinite=error_if_nonfinite)

    def _check(self, at: Found) -> None:
        super()._check(at)
        if isinstance(at.p, Int8Weight) and not self._projects(at):
            raise InputError(f"{at.name} is an INT8 weight in a group without rank; only projected ones are updated")

    def _update_low(self, at: Found, grad: Tensor | None, state: State) -> None:
        update = self._negative_direction(at, grad, state)
        group, by = at.group, self._projectors(at, state)
        alpha = float(group["lr"]) * group["scale"]
        if isinstance(at.p, Int8Weight):
            keep = 1 - float(group["lr"]) * group["weight_decay"]
            at.p.add_rounded_(raised_rows(update, by), alpha=alpha, keep=keep, generator=self._generator(at, state))
        else:
            decay(at.p, group)
            add_raised_(at.p, update, by, alpha)

    # -- the projector -----------------------------------------------------------------------------

    def _keep(self, at: Found, fresh: Projectors, state: State) -> None:
        sides = self._sides(at)
        for side, name in zip(sides, names(sides, OURS), strict=True):
            codes, grid = quantize(fresh[side], INT4)
            state.update({name: packed(codes), f"{name}_scales": grid.scales, f"{name}_zeros": grid.zeros})

    def _projectors(self, at: Found, state: State) -> dict[str, Tensor]:
        sides, rank, p = self._sides(at), self._rank(at), self._trained(at)
        made = {}
        for side, name in zip(sides, names(sides, OURS), strict=True):
            rows, cols = factor(p, side, rank)
            grid = Grid(state[f"{name}_scales"], state[f"{name}_zeros"])
            made[side] = dequantize_(unpacked(state[name], rows * cols, at.p.dtype), grid).view(rows, cols)
        return made


def raised_rows(low: Tensor, by: Projectors) -> Callable[[slice], Tensor]:
    """Some rows of a low-rank matrix projected back to full size."""
    if "right" not in by:
        return lambda rows: by["left"][rows] @ low
    half = by["left"] @ low if "left" in by else low
    return lambda rows: half[rows] @ by["right"]
