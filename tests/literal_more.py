"""As `literal.py`: Adafactor and Tensor-GaLore."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from literal import AdamW, Literal, Projector, carried, exact
from torch import Tensor


def squares(values: Tensor) -> float:
    return math.fsum(float(x) ** 2 for x in values.flatten())


class Adafactor(Literal):
    """Shazeer, Stern, arXiv:1804.04235, algorithm 4 (matrices) and 5 (vectors), with the paper's sums over rows and
    columns. The optimizers' options:

    ρ_t is `lr`, with `relative_step` min(lr, 1/sqrt(t)); α_t = max(ε2, RMS(W))·ρ_t with `scale_parameter`, else ρ_t;
    `clip_threshold` d; β̂_t = 1 - t^decay_rate. With `beta1` a first moment of Û; weight decay of the step size α_t.
    Tensors of more than two dimensions are stacks of matrices.
    """

    def __init__(
        self,
        weight: Tensor,
        *,
        lr: float = 1e-3,
        beta1: float | None = None,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float | None = 1.0,
        decay_rate: float = -0.8,
        weight_decay: float = 0.0,
        scale_parameter: bool = False,
        relative_step: bool = False,
        shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__(weight, lr=lr, betas=(beta1 or 0.0, 0.0), eps=0.0, weight_decay=weight_decay)
        self.eps1, self.eps2, self.d, self.decay_rate = *eps, clip_threshold, decay_rate
        self.scaled, self.relative = scale_parameter, relative_step
        self.shape = tuple(weight.shape if shape is None else shape)  # of the gradient that it sees
        self.m = torch.zeros(self.shape, dtype=torch.float64) if beta1 else None
        self.u = torch.zeros(self.shape, dtype=torch.float64)
        stack, sides = self.shape[:-2], self.shape[-2:]
        if len(sides) < 2:
            self.v = torch.zeros(self.shape, dtype=torch.float64)
        else:
            self.r = torch.zeros((*stack, sides[0]), dtype=torch.float64)  # sums over each row
            self.c = torch.zeros((*stack, sides[1]), dtype=torch.float64)

    def moments(self, grad: Tensor) -> None:
        beta2 = 1 - self.t**self.decay_rate
        u = torch.zeros_like(grad)
        if grad.dim() < 2:
            self.v = beta2 * self.v + (1 - beta2) * (grad**2 + self.eps1)
            u = grad / self.v.sqrt()
        else:
            *stack, n, m = grad.shape
            for at in itertools.product(*map(range, stack)):
                for i in range(n):
                    row = squares(grad[at][i]) + m * self.eps1
                    self.r[at][i] = beta2 * self.r[at][i] + (1 - beta2) * row
                for j in range(m):
                    column = squares(grad[at][:, j]) + n * self.eps1
                    self.c[at][j] = beta2 * self.c[at][j] + (1 - beta2) * column
                v = torch.outer(self.r[at], self.c[at]) / self.r[at].sum()
                u[at] = grad[at] / v.sqrt()
        if self.d is not None:
            u = u / max(1.0, math.sqrt(squares(u) / u.numel()) / self.d)
        self.u = u
        if self.m is not None:
            self.m = self.beta1 * self.m + (1 - self.beta1) * u

    def move(self) -> None:
        rho = min(self.lr, 1 / math.sqrt(self.t)) if self.relative else self.lr
        if self.scaled:
            rho = max(self.eps2, math.sqrt(squares(self.weight) / self.weight.numel())) * rho
        self.weight = self.weight - rho * self.weight_decay * self.weight
        self.weight = self.weight - rho * self.direction()

    def direction(self) -> Tensor:
        return self.u if self.m is None else self.m

    def buffers(self) -> dict[str, Any]:
        first = {} if self.m is None else {"exp_avg": self.m}
        if len(self.shape) < 2:
            return {**first, "exp_avg_sq": self.v, "step": self.t}
        n, m = self.shape[-2:]
        return {**first, "exp_avg_sq_row": self.r / m, "exp_avg_sq_col": self.c / n, "step": self.t}

    def take(self, state: Mapping[str, Any], weight: Tensor) -> None:
        self.weight = weight.to(torch.float64).clone()
        if not state:
            return
        self.t = state["step"]
        if self.m is not None:
            self.m = state["exp_avg"].double()
        if len(self.shape) < 2:
            self.v = state["exp_avg_sq"].double()
        else:
            n, m = self.shape[-2:]
            self.r, self.c = state["exp_avg_sq_row"].double() * m, state["exp_avg_sq_col"].double() * n


class GaLoreAdafactor(Adafactor):
    """GaLore, arXiv:2403.03507, section 5: Adafactor of R = Pᵀ·G; W moves by α·P·Û (or α·P·M), times its step size."""

    def __init__(self, weight: Tensor, rank: int, *, scale: float = 0.25, low: dict[str, Any], **settings: Any) -> None:
        self.projector, self.scale = Projector(weight.shape, rank, **low), scale
        super().__init__(weight, shape=self.projector.low_shape(weight.shape), **settings)

    def look(self, grad: Tensor) -> None:
        maps = self.projector.renew(grad, self.t)
        if maps is not None:
            self.m = None if self.m is None else carried(self.m, *maps)
            left, right = maps  # a side that has not turned keeps its sums
            self.r = self.r if left is None else (left * left) @ self.r
            self.c = self.c if right is None else (right * right) @ self.c
        super().look(grad)

    def moments(self, grad: Tensor) -> None:
        super().moments(self.projector.down(grad))

    def direction(self) -> Tensor:
        return self.scale * self.projector.up(super().direction())

    def buffers(self) -> dict[str, Any]:
        return {**super().buffers(), **self.projector.buffers()}

    def take(self, state: Mapping[str, Any], weight: Tensor) -> None:
        super().take(state, weight)
        self.projector.take(state)


# -- Tensor-GaLore -----------------------------------------------------------------------------------


def unfolded(t: Tensor, mode: int) -> Tensor:
    """Row i holds all elements whose index along the mode is i."""
    return torch.stack([t.select(mode, i).flatten() for i in range(t.shape[mode])])


def multiplied(t: Tensor, matrix: Tensor, mode: int) -> Tensor:
    """T ×_mode matrix: slice a of the result is Σ_i matrix[a, i]·slice i."""
    rows, length = range(matrix.shape[0]), range(t.shape[mode])
    return torch.stack([sum(matrix[a, i] * t.select(mode, i) for i in length) for a in rows], dim=mode)


class TensorGaLore(AdamW):
    """Tensor-GaLore, arXiv:2501.02379, algorithm 1: the moments of G ×1 U_1ᵀ ... ×k U_kᵀ, with the leading left
    singular vectors U_i of each unfolding, as many as the rank, the mode and the unfolding have."""

    def __init__(
        self,
        weight: Tensor,
        rank: int,
        *,
        scale: float = 0.25,
        update_proj_gap: int = 200,
        carry_moments: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(weight, **settings)
        self.scale, self.gap, self.carry = scale, update_proj_gap, carry_moments
        self.ranks = [min(rank, d, weight.numel() // d) for d in weight.shape]
        self.factors: list[Tensor] = []
        self.m = torch.zeros(self.ranks, dtype=torch.float64)
        self.v = torch.zeros_like(self.m)
        self.refreshes, self.next = 0, 0

    def look(self, grad: Tensor) -> None:
        if self.t == self.next:
            old = self.factors
            self.factors = [exact(unfolded(grad, mode), rank)[0] for mode, rank in enumerate(self.ranks)]
            if old and self.carry:
                for mode, (new, before) in enumerate(zip(self.factors, old, strict=True)):
                    turn = new.T @ before
                    self.m, self.v = multiplied(self.m, turn, mode), multiplied(self.v, turn * turn, mode)
            self.refreshes, self.next = self.refreshes + 1, self.t + self.gap
        super().look(grad)

    def moments(self, grad: Tensor) -> None:
        for mode, factor in enumerate(self.factors):
            grad = multiplied(grad, factor.T, mode)
        super().moments(grad)

    def direction(self) -> Tensor:
        update = super().direction()
        for mode, factor in enumerate(self.factors):
            update = multiplied(update, factor, mode)
        return self.scale * update

    def buffers(self) -> dict[str, Any]:
        factors = {f"projector.{mode}": factor for mode, factor in enumerate(self.factors)}
        return {**super().buffers(), **factors, "next_refresh": self.next}

    def take(self, state: Mapping[str, Any], weight: Tensor) -> None:
        super().take(state, weight)
        if state:
            self.factors = [state[f"projector.{mode}"].double() for mode in range(len(self.ranks))]
