"""Uniform quantization by groups: codes from 0 to `top`, and a scale and a zero point for each 256 elements.

A value is `scale · (code - zero)`. The groups of a tensor run through its elements in order; the last one may be
shorter, and is neither stored nor computed longer than it is. Scales and zeros are (groups x 1), in the format of the
values; zeros are whole numbers from 0 to `top`, which every format holds exactly.

Each group's range contains 0, so that a zero point within the codes exists also where all values have one sign
(otherwise those groups would be clipped to a single code). Codes follow from the scale as it is stored, after rounding
to its format.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from galore_mem.methods.q_galore_torch import GROUP

INT4, INT8 = 15, 255  # the largest code


class Grid(NamedTuple):
    """Scales and zero points of a tensor's groups, each (groups x 1)."""

    scales: Tensor
    zeros: Tensor

    def to(self, dtype: torch.dtype) -> Grid:
        return Grid(self.scales.to(dtype), self.zeros.to(dtype))


def grouped(flat: Tensor, *per_group: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of a flat tensor as groups x elements, with the rows of `per_group` that belong to them: the whole groups,
    then the rest."""
    whole = flat.numel() // GROUP
    if whole:
        yield flat[: whole * GROUP].view(whole, GROUP), *(t[:whole] for t in per_group)
    if flat.numel() > whole * GROUP:
        yield flat[whole * GROUP :].view(1, -1), *(t[whole:] for t in per_group)


def ranges(flat: Tensor, *around: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the largest value of each group, or of it and of what lies in `around` (a value per group)."""
    ends = [torch.aminmax(values, dim=1, keepdim=True) for (values,) in grouped(flat)]
    low, high = (torch.cat(side) if len(side) > 1 else side[0] for side in zip(*ends, strict=True))
    for value in around:
        low, high = torch.minimum(low, value), torch.maximum(high, value)
    return low, high


def least_scale(dtype: torch.dtype) -> float:
    """The smallest scale: above 0, and no update divided by it leaves float32."""
    return 2.0**-24 if dtype is torch.float16 else 2.0**-100


def dequantize_(codes: Tensor, grid: Grid) -> Tensor:
    """Turns codes in a float format (contiguous) into values, in place. The grid has the same format."""
    for values, scales, zeros in grouped(codes.view(-1), *grid):
        values.sub_(zeros).mul_(scales)
    return codes


def quantize(t: Tensor, top: int) -> tuple[Tensor, Grid]:
    """The nearest codes (flat, uint8), and the grid in the format of `t`. An error is at most half a scale, and what
    the scale loses in its format at the ends."""
    wide = torch.promote_types(t.dtype, torch.float32)
    values = t.to(wide, copy=True, memory_format=torch.contiguous_format).view(-1)
    low, high = ranges(values, values.new_zeros(()))
    scales = high.sub_(low).div_(top).clamp_(min=least_scale(t.dtype)).to(t.dtype)
    zeros = low.neg_().div_(scales).round_().clamp_(0, top).to(t.dtype)
    for part, scale, zero in grouped(values, scales, zeros):
        part.div_(scale).add_(zero).round_().clamp_(0, top)
    return values.to(torch.uint8), Grid(scales, zeros)


def packed(codes: Tensor) -> Tensor:
    """Two codes of 4 bits per byte, the first of a pair in the low half; an odd last one has a byte of its own."""
    pairs = codes[::2].clone()
    pairs[: codes.numel() // 2].add_(codes[1::2], alpha=16)
    return pairs


def unpacked(pairs: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """`count` codes in a float format. Needs half a byte per code more while it runs."""
    codes = torch.empty(count, dtype=dtype, device=pairs.device)
    half = pairs & 15
    codes[::2] = half
    torch.bitwise_right_shift(pairs, 4, out=half)
    codes[1::2] = half[: count // 2]
    return codes
