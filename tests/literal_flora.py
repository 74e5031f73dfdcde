"""As `literal.py`: Flora."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from literal_more import Adafactor, squares
from torch import Tensor


class Flora(Adafactor):
    """Flora, arXiv:2402.03293, algorithm 2, for Adafactor's U in the place of the gradient.

    A is r x cols where the columns are the smaller side (or equal), and M = β·M + (1 - β)·U·Aᵀ; else A is r x rows and
    M = β·M + (1 - β)·A·U. Every κ steps M·A·A'ᵀ (A'·Aᵀ·M) takes the place of M. Û = M·A (Aᵀ·M) is clipped and applied.
    `draw()` is the projection of the current step: random, so it is the optimizer's.
    """

    def __init__(
        self, weight: Tensor, rank: int | None, kappa: int, draw: Callable[[], Tensor], **settings: Any
    ) -> None:
        super().__init__(weight, **settings)
        self.kappa, self.draw, self.clip_at = kappa, draw, self.d
        self.d = None  # U is not clipped, M·A is
        self.compressed = rank is not None and self.m is not None and rank < min(self.shape)
        self.wide = len(self.shape) == 2 and self.shape[0] < self.shape[1]
        self.a = torch.zeros(0)
        if self.compressed:
            assert rank is not None
            low = (rank, self.shape[1]) if self.wide else (self.shape[0], rank)
            self.m = torch.zeros(low, dtype=torch.float64)

    def moments(self, grad: Tensor) -> None:
        if not self.compressed:
            super().moments(grad)
            return
        m, self.m = self.m, None
        super().moments(grad)  # U
        assert m is not None
        old, self.a = self.a, self.draw().double()
        if self.t > 1 and (self.t - 1) % self.kappa == 0:
            m = self.a @ old.T @ m if self.wide else m @ old @ self.a.T
        low = self.a @ self.u if self.wide else self.u @ self.a.T
        self.m = self.beta1 * m + (1 - self.beta1) * low

    def direction(self) -> Tensor:
        moment = super().direction()
        if self.compressed:
            moment = self.a.T @ moment if self.wide else moment @ self.a
        if self.clip_at is None:
            return moment
        return moment / max(1.0, math.sqrt(squares(moment) / moment.numel()) / self.clip_at)

    def take(self, state: Mapping[str, Any], weight: Tensor) -> None:
        super().take(state, weight)
        if self.compressed and state:
            self.a = self.draw().double()
