"""GaLore with Adafactor inside: row and column means of the squared low-rank gradient.

Zhao, Zhang, Chen, Wang, Anandkumar, Tian: GaLore, arXiv:2403.03507, section 5 (GaLore with Adafactor); Shazeer, Stern:
Adafactor, arXiv:1804.04235, algorithm 4, which `adafactor.py` writes down. The low-rank gradient R takes the place of
Adafactor's G; what comes out, clipped, is projected back:  W = W - ρ·max(ε2, RMS(W))·α·P·Û

With `beta1`, a first moment of Û is what is applied. The learning rate is outside it, as in Adam; the reference
(galore-torch) averages ρ·Û, which is the same while ρ is constant. No bias correction, as there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor

from galore_mem.methods import galore_adafactor
from galore_mem.optim import adafactor
from galore_mem.optim.base import Found, Group, LayerWise, Range, State
from galore_mem.optim.projected import LowRank, Projected, low_rank_options
from galore_mem.optim.projection import carried


class GaLoreAdafactor(Projected):
    """Adafactor whose second moment, and first if there is one, live in a low-rank subspace of the gradient.

    `params` as for `GaLoreAdamW`; parameters outside the low-rank groups get Adafactor. The options of a low-rank
    group are described in `galore_mem.optim.projected`. `eps`: what is added to squared gradients, and the least RMS
    of a parameter for `scale_parameter`. `clip_threshold`: d, None for no clipping. `decay_rate`: the exponent in β̂.

    By default `lr` is the step size, to be scheduled outside. The paper's own are `scale_parameter` (times the
    parameter's RMS) and `relative_step` (at most 1/sqrt(t)), with `lr=1e-2`.

    State of an m x n matrix (m <= n): `projector` m·r in the gradient's format, n + r float32 means
    (`exp_avg_sq_row`, `exp_avg_sq_col`), and with `beta1` an `exp_avg` of n·r in the gradient's format. A step without
    refresh needs n·r elements more; a parameter that is not projected, one copy of its gradient.

    Raises `InputError` as `GaLoreAdamW` does.
    """

    METHOD = galore_adafactor.METHOD
    FLAGS: ClassVar[tuple[str, ...]] = (*Projected.FLAGS, "scale_parameter", "relative_step")
    RANGES: ClassVar[Mapping[str, Range]] = {
        **{name: allowed for name, allowed in Projected.RANGES.items() if name != "eps"},
        **adafactor.RANGES,
    }

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        beta1: float | None = None,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float | None = 1.0,
        decay_rate: float = -0.8,
        weight_decay: float = 0.0,
        *,
        scale_parameter: bool = False,
        relative_step: bool = False,
        layerwise: LayerWise | None = None,
        error_if_nonfinite: bool = True,
        **low_rank: Unpack[LowRank],
    ) -> None:
        defaults = {
            "lr": lr, "beta1": beta1, "eps": eps, "clip_threshold": clip_threshold, "decay_rate": decay_rate,
            "weight_decay": weight_decay, "scale_parameter": scale_parameter, "relative_step": relative_step,
            **low_rank_options(low_rank),
        }  # fmt: skip
        super().__init__(params, defaults, layerwise=layerwise, error_if_nonfinite=error_if_nonfinite)

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        adafactor.check(group)

    def _update_full(self, at: Found, grad: Tensor, state: State) -> None:
        update, rho = self._direction(at, adafactor.own(grad), state)
        at.p.add_(update.to(at.p.dtype), alpha=-rho)

    def _update_low(self, at: Found, grad: Tensor | None, state: State) -> None:
        update, rho = self._direction(at, adafactor.in_range(self._gradient(at, grad, state)), state)
        self._add_raised_(at, update.to(at.p.dtype), state, -rho * at.group["scale"])

    def _direction(self, at: Found, grad: Tensor, state: State) -> tuple[Tensor, float]:
        """(what the parameter moves against, the number it is multiplied by); overwrites the gradient."""
        group = at.group
        update = adafactor.normalize_(grad, state, group)
        update.mul_(adafactor.clipping(adafactor.rms(update), group))
        rho, size = adafactor.step_size(at.p, state, group)
        adafactor.decay_(at.p, group, rho, size)
        if group["beta1"]:
            if "exp_avg" not in state:
                state["exp_avg"] = torch.zeros_like(update, dtype=at.p.dtype)
            average = state["exp_avg"].lerp_(update.to(at.p.dtype), 1 - group["beta1"])
            if size is None:
                return average, rho
            torch.mul(average, size, out=update)
        elif size is not None:
            update.mul_(size)
        return update, rho

    def _carry(self, state: State, by: Mapping[str, Tensor]) -> None:
        """The first moment in the new coordinates, and the means over the side that was turned."""
        if "exp_avg" in state:
            state["exp_avg"].copy_(carried(state["exp_avg"], by))
        for side, name in (("left", "exp_avg_sq_row"), ("right", "exp_avg_sq_col")):
            if side in by:
                state[name].copy_(by[side].square() @ state[name])
