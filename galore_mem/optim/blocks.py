"""Second moments that blocks of rows share (Adam-mini's partition, `galore_mem.partition`).

A value per block or per row is a column (blocks x 1, rows x 1), or a row where the partition's rows are the columns
of the stored matrix. Averages are float32 at least: they are few, and in bfloat16 one with beta2 = 0.999 stands still.
"""

from __future__ import annotations

import torch
from torch import Tensor

from galore_mem.partition import Partition


def as_rows(t: Tensor) -> Tensor:
    """A parameter as a matrix: a vector as one column, more dimensions as rows of the last."""
    if t.dim() < 2:
        return t.view(-1, 1)
    return t if t.dim() == 2 else t.view(-1, t.shape[-1])  # never a copy: it is written to


def mean_squares(grad: Tensor, part: Partition) -> Tensor:
    """The mean of the squared gradient over each block. `vector_norm` reads the gradient without a copy."""
    rows, along = as_rows(grad if grad.dim() <= 2 else grad.contiguous()), 1 - part.dim
    wide = torch.promote_types(grad.dtype, torch.float32)
    squares = torch.linalg.vector_norm(rows, dim=along, keepdim=True).to(wide).square_().div_(rows.shape[along])
    return squares if part.one_each else _means(squares, part)


def _means(rows: Tensor, part: Partition) -> Tensor:
    """From values per row to their means per block."""
    pieces = torch.split(rows.view(part.repeat, -1), [count * size for count, size in part.runs], dim=1)
    means = [
        piece if size == 1 else piece.view(part.repeat, count, size).mean(2)
        for piece, (count, size) in zip(pieces, part.runs, strict=True)
    ]
    return _joined(means, part)


def per_row(blocks: Tensor, part: Partition) -> Tensor:
    """From values per block to values per row."""
    if part.one_each:
        return blocks
    pieces = torch.split(blocks.view(part.repeat, -1), [count for count, _ in part.runs], dim=1)
    rows = [
        piece if size == 1 else piece.repeat_interleave(size, dim=1)
        for piece, (_, size) in zip(pieces, part.runs, strict=True)
    ]
    return _joined(rows, part)


def _joined(pieces: list[Tensor], part: Partition) -> Tensor:
    values = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
    return values.reshape((1, -1) if part.dim else (-1, 1))
