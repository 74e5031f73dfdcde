"""Buffers that kernels make for themselves: what no tensor of the program shows. One table a device.

A rule gives, for one call of an operation, a kernel's program: the buffers it allocates (bytes), where among them its
results are made (`RESULTS`), and which it gives back before the end (`~i`, the i-th of its own); the others are given
back at the end, the last one first, as C++ does with local variables.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from galore_mem.dtypes import dtype
from galore_mem.memory.tape import TEMPORARIES, Storage, Tape
from galore_mem.memory.tape import Tensor as Twin
from galore_mem.units import round_up

RESULTS = 0
Program = tuple[int, ...]
# rule(args, kwargs, result) of one call; None where it allocates nothing besides its results
Rule = Callable[[tuple[Any, ...], dict[str, Any], Any], Program | None]


class Recorder(Tape):
    """A tape of the twin that writes down a kernel's program, so that both share one description."""

    def __init__(self, device: str) -> None:
        self.program: list[int] = []
        self.made = 0
        super().__init__(1, device)

    def bytes(self, n: int, category: int = TEMPORARIES) -> Storage:
        return Own(self, n, category)

    def like(self, t: Tensor) -> Twin:
        """A twin of a tensor, which takes no bytes."""
        name = str(t.dtype).removeprefix("torch.")
        return Twin(Storage(self, 0, TEMPORARIES), tuple(t.shape), dtype(name), tuple(t.stride()))


class Own(Storage):
    """A kernel's buffer: its life is in the recorder's program."""

    __slots__ = ("number",)

    def __init__(self, tape: Recorder, nbytes: int, category: int) -> None:
        super().__init__(tape, nbytes, category)
        self.number = tape.made
        tape.made += 1
        tape.program.append(nbytes)

    def __del__(self) -> None:
        tape = self.tape
        assert isinstance(tape, Recorder)
        tape.program.append(~self.number)
        super().__del__()


def nbytes(t: Tensor) -> int:
    """Bytes of a tensor's elements."""
    return t.numel() * t.dtype.itemsize


def safe_softmax(args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Program:
    """transformers/attention.cpp, _safe_softmax: which scores are -inf, and which rows are nothing else."""
    t = args[0]
    return (RESULTS, t.numel(), t.numel() // t.shape[-1])


def grouped_mm(device: str) -> Callable[..., Tensor]:
    """Products of groups of rows (`torch._grouped_mm`); torch's own rule for tensors without values takes bfloat16
    only. On CUDA rows begin at multiples of 16 bytes (native/GroupedMMUtils.h).
    """

    def run(a: Tensor, b: Tensor, offs: Tensor | None = None, bias: Any = None, out_dtype: Any = None) -> Tensor:
        groups = () if a.dim() != b.dim() else (a.shape[0] if a.dim() == 3 or offs is None else offs.shape[0],)
        rows, columns = a.shape[-2], b.shape[-1]
        dtype = out_dtype or a.dtype
        width = round_up(columns, 16 // dtype.itemsize) if device == "cuda" else columns
        strides = (*([rows * width] if groups else []), width, 1)
        return torch.empty_strided((*groups, rows, columns), strides, dtype=dtype, device="meta")

    return run


def changes_only(*args: Any, **kwargs: Any) -> None:
    """An operation that changes what it is given and returns nothing. (torch has no rule of its own for some.)"""
