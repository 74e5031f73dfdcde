"""GaLore-mini: a low-rank first moment, and one second moment per block of Adam-mini's partition.

Huang, Zhang, Zhang, Luo, Sun, Wang: GaLore-mini: Low Rank Gradient Learning with Fewer Learning Rates, NeurIPS 2024
workshop. The authors have published no code. Section 3.1 and algorithm 1, for a matrix projected from the left:

1. G = ∇L(W)
2. v_b = β2·v_b + (1 - β2)·mean(G_b∘G_b) for each block b of rows
3. every T steps P = leading left singular vectors of G, T adapted by the similarity of adjacent projectors
4. R = Pᵀ·G
5. M = β1·M + (1 - β1)·R
6. U = P·(M/(1 - β1^t)) / (sqrt(v/(1 - β2^t)) + ε)
7. W = W - η·α·U

That is approach 3, the paper's choice. Approach 2 divides the low-rank M instead of P·M; approach 1 takes the mean
squares of R. (`adam_mini.py` has the blocks.)

Where text, figures and algorithm differ or leave something open:
- Which gradient enters v: algorithm 1 writes the low-rank gradient before it is computed; section 3 (approach 3) and
  remark 1 say the original one. We take the original: the other is approach 1, which the paper rejects.
- Square root and ε: figure 5 has sqrt(V) + ε, step 6 has V + ε, algorithm 1 sqrt(V + ε). We take the first: it is
  Adam's and Adam-mini's, with which ε is of a gradient's size.
- Mean and root: section 3 averages Adam's v, so the mean of squares is taken before the root.
- Bias correction: algorithm 1 prints 1 - β1; meant is 1 - β1^t, as for V in the same listing.
- Sign: step 7 and algorithm 1 add η·U. With G the gradient of the loss that climbs; we subtract.
- α: not in section 3.1 but in algorithm 1, on the update in the original space; so here, for projected parameters.
- Parameters that are not projected: open; they get Adam-mini, the other half of the method.
- T: "adapted by the cosine similarity" after Q-GaLore, whose threshold of 0.4 is the default (None: T is fixed).
- Heads: blocks of query and key are heads, as in Adam-mini. Approach 1 has no rows of the original space where these
  are projected away; it takes one value per row of the low-rank gradient, for every parameter.
- Rows that have had no gradient at all (dead neurons): v is 0, and P may still carry other rows' moments to them, where
  columns of P lie beyond the gradient's rank. Adam's own quotient is 0 there, so such rows do not move.
- Approach 2 with projected rows: each low-rank row mixes all rows, with weights P; its v is (P∘P)ᵀ·v, the second moment
  that it would have if rows were uncorrelated.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor

from galore_mem.errors import InputError
from galore_mem.methods import galore_mini, projection
from galore_mem.methods.base import Buffer
from galore_mem.optim.adam_mini import Partitioned, adam_mini_, divisor, second_moment
from galore_mem.optim.adamw import FLOAT16_LEAST, corrections, decay
from galore_mem.optim.base import Found, Group, LayerWise, State
from galore_mem.optim.blocks import per_row
from galore_mem.optim.projected import LowRank, Projected, low_rank_options
from galore_mem.optim.projection import Projectors, add_raised_, carried, rotations
from galore_mem.partition import Partition, by_row

APPROACHES = (1, 2, 3)


class GaLoreMini(Partitioned, Projected):
    """GaLore's low-rank first moment with Adam-mini's second moments; see the module for the choices made.

    `params`: groups of named parameters, as from `galore_mem.optim.parameter_groups(model, rank=...)`; `partition` as
    for `AdamMini`. `approach` 3 is the paper's method; 1 and 2 are the two it tried before. The options of a low-rank
    group are described in `galore_mem.optim.projected`.

    State of an m x n matrix (m <= n): `projector` m·r and `exp_avg` n·r in the gradient's format, `exp_avg_sq` one
    float32 per block. No step needs a full-size temporary. With gradient accumulation in a layer-wise update,
    approaches 2 and 3 need whole gradients: the mean of squares is not linear.

    Raises `InputError` as `GaLoreAdamW` does, and for an unknown approach.
    """

    METHOD = galore_mini.METHOD
    CARRIED_SQUARES: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        approach: int = 3,
        partition: Mapping[str, Partition] | None = None,
        layerwise: LayerWise | None = None,
        error_if_nonfinite: bool = True,
        **low_rank: Unpack[LowRank],
    ) -> None:
        self._partitions = partition
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "approach": approach,
            **low_rank_options(low_rank, cos_threshold=0.4),
        }  # fmt: skip
        super().__init__(params, defaults, layerwise=layerwise, error_if_nonfinite=error_if_nonfinite)

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        if group["approach"] not in APPROACHES or isinstance(group["approach"], bool):
            raise InputError(f"approach must be 1, 2 or 3, got {group['approach']!r}")

    def _update_full(self, at: Found, grad: Tensor, state: State) -> None:
        adam_mini_(at.p, grad, state, at.group, self._partition(at))

    def _update_low(self, at: Found, grad: Tensor | None, state: State) -> None:
        group, part = at.group, self._partition(at)
        low = self._gradient(at, grad, state)
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(low)
        exp_avg = state["exp_avg"].lerp_(low, 1 - group["betas"][0])
        factor, eps = corrections(state, group, torch.float32)
        by = self._projectors(at, state)
        decay(at.p, group)
        alpha = -float(group["lr"]) * group["scale"] * factor
        side = "right" if part.dim else "left"  # of the projector that rows go through, if they are projected
        if group["approach"] == 1:
            part = _low_rows(tuple(low.shape), part)
            second_moment(low, state, group, part)
        else:
            assert grad is not None
            if group["approach"] == 3 and side in by:
                del low  # it has joined exp_avg
                second_moment(grad, state, group, part)
                scaled = by[side] * _rates(state, part, grad.dtype, eps, alpha)
                add_raised_(at.p, exp_avg, {**by, side: scaled}, 1.0)
                return
            second_moment(grad, state, group, part)
        through = by[side] if group["approach"] == 2 and side in by else None
        under = divisor(state, part, low.dtype, eps) if through is None else _through(through, state, part, eps)
        torch.div(exp_avg, under, out=low)
        add_raised_(at.p, low, by, alpha)

    def _compare(self, at: Found, old: Projectors, fresh: Projectors, state: State) -> None:
        """Approach 1's second moment is one per low-rank row: where rows are projected it is carried over too."""
        super()._compare(at, old, fresh, state)
        side = "right" if self._partition(at).dim else "left"
        if at.group["carry_moments"] and at.group["approach"] == 1 and side in old:
            turn = {side: rotations(old, fresh)[side]}
            state["exp_avg_sq"].copy_(carried(state["exp_avg_sq"], turn, squares=True))

    def _compressed(self, at: Found, grad: Tensor, state: State) -> Tensor | None:
        return super()._compressed(at, grad, state) if at.group["approach"] == 1 else None

    def _buffers(self, at: Found) -> tuple[Buffer, ...]:
        trained, job = self._trained(at), self._job(at.group)
        part = self._partition(at)
        if self._projects(at) and at.group["approach"] == 1:
            part = _low_rows(projection.low_shape(trained, job), part)
        return galore_mini.buffers(trained, job, part)


def _rates(state: State, part: Partition, dtype: torch.dtype, eps: float, alpha: float) -> Tensor:
    """Approach 3's `alpha / (sqrt(exp_avg_sq) + ε)` per row. The projector is multiplied by the whole of it: divided by
    the root alone it leaves float16's range."""
    each = divisor(state, part, state["exp_avg_sq"].dtype, eps).reciprocal_().mul_(alpha)
    if dtype is torch.float16:
        each.clamp_(min=torch.finfo(dtype).min)
    return each.to(dtype)


def _low_rows(low: tuple[int, ...], part: Partition) -> Partition:
    """Approach 1's blocks: one per row of the low-rank gradient."""
    return by_row(low, transposed=bool(part.dim))


def _through(projector: Tensor, state: State, part: Partition, eps: float) -> Tensor:
    """Approach 2's divisor, a value per low-rank row: sqrt((P∘P)ᵀ·v) + ε."""
    dtype = torch.float32 if projector.dtype is torch.float16 else projector.dtype  # squares leave float16's range
    values = per_row(state["exp_avg_sq"], part).to(dtype)
    squared = projector.to(dtype).square()
    carried = values @ squared.T if part.dim else squared.T @ values
    del values, squared
    carried.sqrt_().add_(eps)
    return carried.clamp_(min=FLOAT16_LEAST).to(projector.dtype) if projector.dtype is torch.float16 else carried
