"""What a convolution allocates on the CPU without oneDNN: columns of its input, and copies where it has groups.

aten/src/ATen/native/Convolution.cpp (_convolution, convolution_backward: groups one after another, then put together)
and ConvolutionMM2d.cpp (compute_columns2d). Plain ones of one or two dimensions; of dilated and transposed ones, and of
those of three, nothing is told.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from galore_mem.simulate.kernels import RESULTS, Program, nbytes


class Recipe:
    """A program as it is written: buffers by number."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self._made = 0

    def take(self, size: int) -> int | None:
        """A buffer's number; None where there is none."""
        if not size:
            return None
        self.steps.append(size)
        self._made += 1
        return self._made - 1

    def give(self, *numbers: int | None) -> None:
        self.steps += [~number for number in numbers if number is not None]


def plain(stride: Any, padding: Any, dilation: Any, transposed: bool) -> bool:
    return not transposed and len(stride) <= 2 and all(n == 1 for n in dilation)


def columns(source: Tensor, weight: Tensor, out: Tensor, stride: Any, padding: Any) -> int:
    """Bytes of the input's columns for one group; none where a kernel of one element takes the input as it is."""
    kernel = weight.shape[2:]
    if prod(kernel) == 1 and all(n == 1 for n in stride) and not any(padding):
        return 0
    return int(source.shape[0] * weight.shape[1] * prod(kernel) * prod(out.shape[2:]) * source.itemsize)


def forward(args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> Program | None:
    """Of aten.convolution: the input's columns (bytes), once or for each group, whose results are put together."""
    source, weight, _, stride, padding, dilation, transposed, _, groups = args
    if not plain(stride, padding, dilation, transposed):
        return None
    recipe = Recipe()
    recipe.take(_copied(source))
    taken = columns(source, weight, result, stride, padding)
    if groups == 1:
        own = recipe.take(taken)
        recipe.steps.append(RESULTS)
        recipe.give(own)
        return tuple(recipe.steps)
    for _ in range(groups):
        part, own = recipe.take(_part(source, groups)), recipe.take(taken)
        recipe.take(nbytes(result) // groups)
        recipe.give(own, part)
    return (*recipe.steps, RESULTS)


def backward(args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Program | None:
    """Of aten.convolution_backward: the same for the gradients of input and weight."""
    grad, source, weight, _, stride, padding, dilation, transposed, _, groups, _ = args
    if not plain(stride, padding, dilation, transposed):
        return None
    recipe = Recipe()
    recipe.take(_copied(grad))
    recipe.take(_copied(source))
    taken = columns(source, weight, grad, stride, padding) if result[1] is not None or result[0] is not None else 0
    if groups == 1:
        return (*recipe.steps, RESULTS, *((taken,) if taken else ()))
    lists: tuple[list[int | None], ...] = ([], [], [])  # of each group: the gradients of input, bias and weight
    for _ in range(groups):
        parts = recipe.take(_part(grad, groups)), recipe.take(_part(source, groups))
        for kept, made in zip(lists, (result[0], result[2], result[1]), strict=True):
            kept.append(recipe.take(0 if made is None else nbytes(made) // groups))
        recipe.give(recipe.take(taken), *reversed(parts))
    recipe.steps.append(RESULTS)
    for kept in reversed(lists):
        recipe.give(*kept)
    return tuple(recipe.steps)


def _copied(t: Tensor) -> int:
    """Bytes of a copy in order; images whose channels come last are taken as they are."""
    last = t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last)
    return 0 if t.is_contiguous() or last else nbytes(t)


def _part(t: Tensor, groups: int) -> int:
    """A group's channels are copied where they do not lie in order: where there are several sequences."""
    return nbytes(t) // groups if t.shape[0] > 1 else 0
