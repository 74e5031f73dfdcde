"""GaLore with 8-bit AdamW inside.

Zhao, Zhang, Chen, Wang, Anandkumar, Tian: GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection,
ICML 2024, arXiv:2403.03507, section 4.3: the low-rank gradient of algorithm 2 is given to the 8-bit Adam of Dettmers
et al. (arXiv:2110.02861), here bitsandbytes' own kernels (`blockwise.py`).

The kernels change a parameter. Ours get zeros of the low-rank shape and η = 1, so that what comes out is -N of
algorithm 2; it is projected back and added with η·α in one product. Weight decay is decoupled and applied to the weight
before the update, as in bitsandbytes. So the low-rank update is that of `bitsandbytes.optim.Adam8bit`, bit for bit, and
so are parameters that are not projected.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

import torch
from torch import Tensor

from galore_mem.errors import InputError
from galore_mem.methods import galore_8bit
from galore_mem.optim.adamw import decay
from galore_mem.optim.base import Found, LayerWise, State
from galore_mem.optim.blockwise import Tables, adam_, begin, change_, kernels
from galore_mem.optim.projected import LowRank, Projected, low_rank_options
from galore_mem.optim.projection import add_raised_, carried


class EightBit(Projected):
    """What `GaLoreAdamW8bit` and `QGaLoreAdamW8bit` share: 8-bit moments, their tables, and how these are loaded."""

    def __init__(
        self, params: Any, defaults: dict[str, Any], *, layerwise: LayerWise | None, error_if_nonfinite: bool
    ) -> None:
        kernels()
        self._tables = Tables()
        super().__init__(params, defaults, layerwise=layerwise, error_if_nonfinite=error_if_nonfinite)

    def _check(self, at: Found) -> None:
        super()._check(at)
        if at.p.dtype is torch.float64 and at.p.device.type != "cpu":
            raise InputError(f"{at.name} is float64, which bitsandbytes takes on the CPU only; convert the model")

    def _update_full(self, at: Found, grad: Tensor, state: State) -> None:
        self._kernel(at, at.p, grad, state, lr=float(at.group["lr"]), weight_decay=at.group["weight_decay"])

    def _negative_direction(self, at: Found, grad: Tensor | None, state: State) -> Tensor:
        """-N of algorithm 2, from the gradient and what is pending."""
        low = self._gradient(at, grad, state)
        update = torch.zeros_like(low)
        self._kernel(at, update, low, state, lr=1.0, weight_decay=0.0)
        return update

    def _kernel(self, at: Found, p: Tensor, grad: Tensor, state: State, *, lr: float, weight_decay: float) -> None:
        if "state1" not in state:
            begin(state, p, self._tables)
        betas, eps = at.group["betas"], at.group["eps"]
        given = p.contiguous()
        adam_(given, grad.contiguous(), state, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        if given is not p:
            p.copy_(given)

    def _carry(self, state: State, by: Mapping[str, Tensor]) -> None:
        change_(state, lambda moment, second: carried(moment, by, squares=second))

    # -- saving and loading ------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As the base class; the tables of the codes, loaded too, are shared again by all parameters."""
        super().load_state_dict(state_dict)
        self._tables.adopt(list(self.state.values()))

    def _fit(self, at: Found, kept: Mapping[str, Any]) -> State:
        fitted = super()._fit(at, kept)
        for table in self._shared() if "absmax1" in fitted else ():
            given = fitted.get(table.name)
            if given is None or tuple(given.shape) != table.shape or given.dtype is not torch.float32:
                raise InputError(f"{at.name}: the state has no {table.name!r} of 256 float32 values for its codes")
        return fitted


class GaLoreAdamW8bit(EightBit):
    """AdamW whose moments live in a low-rank subspace of the gradient, in 8 bits.

    `params` and the options of a low-rank group are those of `GaLoreAdamW`; parameters that are not projected get
    bitsandbytes' 8-bit AdamW. Needs bitsandbytes.

    State of an m x n matrix (m <= n): `projector` m·r in the gradient's format, `state1` and `state2` n·r bytes each
    and a float32 per 256 of them (both in float32 where n·r < 4096); two tables of 1 KiB per optimizer. A step needs
    two low-rank tensors on an accelerator (`galore_mem/methods/galore_8bit.py`).

    Raises `InputError` as `GaLoreAdamW` does, and where bitsandbytes is missing.
    """

    METHOD = galore_8bit.METHOD

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
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, **low_rank_options(low_rank)}
        super().__init__(params, defaults, layerwise=layerwise, error_if_nonfinite=error_if_nonfinite)

    def _update_low(self, at: Found, grad: Tensor | None, state: State) -> None:
        update = self._negative_direction(at, grad, state)
        decay(at.p, at.group)
        alpha = float(at.group["lr"]) * at.group["scale"]
        add_raised_(at.p, update, self._projectors(at, state), alpha)
