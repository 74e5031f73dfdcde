"""bitsandbytes' product with a weight of 4-bit codes, as its CUDA kernels compute it (0.50.2, backends/cuda/ops.py).

The weight is made in the input's format for the length of the product. A kernel that needs no such weight exists for
few rows: always up to four; above, a measured table decides by the card, up to 1,536 rows at most (of small weights; of
large ones up to 64 to 320). That table is not modelled: the weight is counted.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

FEW = 4  # _GEMM_4BIT_CUSTOM_FLOOR_M


def gemm_4bit(
    rows: Tensor,
    codes: Tensor,
    shape: Sequence[int],
    scales: Tensor,
    block: int,
    kind: str,
    bias: Tensor | None = None,
    quantized_scales: Tensor | None = None,
    table: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    """_dequant_linear_fallback; scales that are quantized themselves are made first."""
    if rows.numel() // rows.shape[-1] <= FEW:
        return torch.empty((*rows.shape[:-1], shape[0]), dtype=rows.dtype, device=rows.device)
    alive = [scales]
    if quantized_scales is not None and offset is not None:
        alive.append(torch.empty_like(quantized_scales, dtype=torch.float32))
        alive.append(alive[-1] + offset)
    weight = torch.empty(tuple(shape), dtype=rows.dtype, device=rows.device)
    return functional.linear(rows, weight, bias)
