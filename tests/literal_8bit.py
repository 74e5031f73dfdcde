"""As `literal.py`: 8-bit moments, and Q-GaLore's INT4 projector and INT8 weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from literal import GaLore, Projector
from torch import Tensor

# -- block-wise dynamic quantization -----------------------------------------------------------------

BLOCK = 256


def dynamic_map(signed: bool) -> list[float]:
    """Dynamic tree quantization (Dettmers et al., arXiv:2110.02861, section 1.3), all 256 values in order.

    After the sign bit come k zeros, a one, and a linear fraction of the bits left: of 8 bits, 6 - k; without a sign,
    one more. The exponent is 10^-k, and 2^bits fractions are the middles of as many equal parts of [0.1, 1]. 0 and 1
    fill up the table.
    """
    values = [0.0, 1.0]
    for zeros in range(7):
        bits = 6 - zeros + (0 if signed else 1)
        for i in range(2**bits):
            low, high = (0.1 + 0.9 * (i + side) / 2**bits for side in (0, 1))
            value = 10.0**-zeros * (low + high) / 2
            values += [value, -value] if signed else [value]
    return sorted(values)


def dequantized(codes: Tensor, maxima: Tensor, table: Sequence[float]) -> Tensor:
    """Value = the block's maximum times the table's entry."""
    entries = torch.tensor(table, dtype=torch.float64)
    blocks = [
        entries[block.long()] * float(maximum)
        for block, maximum in zip(codes.flatten().split(BLOCK), maxima, strict=True)
    ]
    return torch.cat(blocks).reshape(codes.shape)


def block_maxima(values: Tensor) -> list[float]:
    flat = values.flatten()
    return [float(flat[i : i + BLOCK].abs().max()) for i in range(0, flat.numel(), BLOCK)]


class GaLore8bit(GaLore):
    """GaLore with the moments in 8 bits, which are taken from the optimizer's codes before each step: what a step makes
    of them is exact, what it keeps of that is `block_maxima` and the nearest of the table's values."""

    tables: ClassVar[dict[str, list[float]]] = {"state1": dynamic_map(True), "state2": dynamic_map(False)}

    def read(self, state: Mapping[str, Any], name: str) -> Tensor:
        if state[name].dtype != torch.uint8:
            return state[name].double()
        return dequantized(state[name], state[f"absmax{name[-1]}"], self.tables[name])

    def take(self, state: Mapping[str, Any], weight: Tensor) -> None:
        self.weight = weight.to(torch.float64).clone()
        if state:
            self.m, self.v, self.t = self.read(state, "state1"), self.read(state, "state2"), state["step"]
            self.projector.take(state)

    def buffers(self) -> dict[str, Any]:
        return {"state1": self.m, "state2": self.v, "step": self.t, **self.projector.buffers()}


# -- uniform quantization by groups ------------------------------------------------------------------

GROUP = 256


def uniform(
    values: Tensor, top: int, scales: Sequence[float] | None = None
) -> tuple[list[float], list[float], list[int]]:
    """Codes from 0 to `top` before they are rounded to whole numbers, and the scale and zero point of each group
    (Q-GaLore, arXiv:2407.08296, section 3.1): code = x/s + z, s = (max - min)/top, z = round(-min/s); the range
    contains 0. `scales`: those that were kept, which are rounded to a format."""
    codes, found, zeros = [], [], []
    flat = values.flatten()
    for first in range(0, flat.numel(), GROUP):
        group = flat[first : first + GROUP].double().tolist()
        low, high = min(0.0, *group), max(0.0, *group)
        found.append((high - low) / top)
        scale = found[-1] if scales is None else scales[first // GROUP]
        zeros.append(min(max(round(-low / scale), 0), top))
        codes += [min(max(x / scale + zeros[-1], 0.0), float(top)) for x in group]
    return codes, found, zeros


def values_of(codes: Sequence[int], scales: Sequence[float], zeros: Sequence[float]) -> list[float]:
    return [scales[i // GROUP] * (code - zeros[i // GROUP]) for i, code in enumerate(codes)]


def nibbles(packed: Tensor, count: int) -> list[int]:
    """Two codes in a byte, the first in the low half."""
    codes = []
    for byte in packed.flatten().tolist():
        codes += [byte % 16, byte // 16]
    return codes[:count]


Kept = tuple[list[int], list[float], list[float]]  # codes, scales, zero points


def kept_codes(state: Mapping[str, Any], name: str, count: int) -> Kept:
    grid = (state[f"{name}_{what}"].flatten().tolist() for what in ("scales", "zeros"))
    return nibbles(state[name], count), *grid


class RoundedProjector(Projector):
    """Q-GaLore's: kept as INT4 codes, from which each step makes the projector again, in the gradient's format. A new
    one is compared with the old before it is rounded.

    Codes halfway between two whole numbers may go either way, so that after `nearest` has checked them the optimizer's
    are taken. `state()` is its state.
    """

    state: Callable[[], Mapping[str, Any]]

    def renew(self, grad: Tensor, t: int) -> tuple[Tensor | None, Tensor | None] | None:
        refreshes = self.refreshes
        maps = super().renew(grad, t)
        if self.refreshes > refreshes:
            both = self.p is not None and self.q is not None
            if self.p is not None:
                self.p = self.rounded(self.p.to(grad.dtype), "projector_left" if both else "projector")
            if self.q is not None:
                self.q = self.rounded(self.q.T.to(grad.dtype), "projector_right" if both else "projector").T
        return maps

    def rounded(self, projector: Tensor, name: str) -> Tensor:
        codes, scales, zeros = kept_codes(self.state(), name, projector.numel())
        nearest(projector, codes, scales, zeros)
        values = torch.tensor(values_of(codes, scales, zeros), dtype=torch.float64).reshape(projector.shape)
        return values.to(projector.dtype).double()


def nearest(projector: Tensor, codes: Sequence[int], scales: Sequence[float], zeros: Sequence[float]) -> None:
    """Are these the nearest codes? x/s + z is computed in float32: some ε at its size, which is 16 at most."""
    exact, found, whole = uniform(projector, 15, scales)
    eps = max(torch.finfo(projector.dtype).eps, 2.0**-23)
    assert all(abs(a - b) <= eps * b for a, b in zip(scales, found, strict=True))
    assert list(zeros) == whole
    assert all(abs(code - x) <= 0.5 + 32 * 2.0**-23 for code, x in zip(codes, exact, strict=True))


class QGaLore(GaLore8bit):
    """Q-GaLore, arXiv:2407.08296, algorithm 1, up to the rounding of the weight."""

    def __init__(
        self,
        weight: Tensor,
        rank: int,
        *,
        state: Callable[[], Mapping[str, Any]],
        low: dict[str, Any],
        **settings: Any,
    ) -> None:
        super().__init__(weight, rank, low=low, **settings)
        self.projector = RoundedProjector(weight.shape, rank, **{"cos_threshold": 0.4, **low})
        self.projector.state = state

    def take(self, state: Mapping[str, Any], weight: Tensor) -> None:
        self.weight = weight.to(torch.float64).clone()
        if state:
            self.m, self.v, self.t = self.read(state, "state1"), self.read(state, "state2"), state["step"]
