"""Parameters of projected methods, real optimizers over them, and the peaks of a step: real and of the program."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from allocations import allocations
from ledgers import SCALAR

from galore_mem.dtypes import dtype
from galore_mem.memory.tape import GRADIENTS, WEIGHTS, Shape, Tape, Tensor
from galore_mem.methods.base import Implementation, Job, Slot, Slots, Trained
from galore_mem.spec.model import Heads, Role

M, N = 256, 688
HEAD_DIM = 8
WIDE, TALL = (M, N), (N, M)
FORMATS = ("float32", "bfloat16")
HEADS = Heads(N, N // HEAD_DIM, N // HEAD_DIM, HEAD_DIM)


@dataclass(frozen=True, slots=True)
class Param:
    """A parameter of the tables below."""

    shape: Shape
    projected: bool = True
    name: str = "weight"

    def trained(self, fmt: str = "float32") -> Trained:
        return Trained(self.name, self.shape, dtype(fmt), self.projected, Role.ATTENTION, "linear")


# both orientations; square; sizes that no block divides; sides below the rank; vectors; matrices outside the targets
ALL = (
    Param(WIDE), Param((512,), False), Param(TALL), Param((64, 64)), Param((1000, 3), False), Param((63, 80)),
    Param((1000, 3)), Param((128, 256), False, "q_proj.weight"),
)  # fmt: skip
ORDERS = {"wide": ALL[:1], "tall": ALL[2:3], "all": ALL, "reversed": ALL[::-1]}


# -- measuring -------------------------------------------------------------------------------------

MARK = 1_234_567
Build = Callable[[list[torch.nn.Parameter], list[torch.nn.Parameter], list[torch.nn.Parameter]], Any]


@contextmanager
def plain_kernels() -> Iterator[None]:
    """One thread, and no oneDNN, whose bfloat16 products take scratch space that depends on the processor."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # setting its flags warns about Intel GPUs
            with torch.backends.mkldnn.flags(enabled=False):
                yield
    finally:
        torch.set_num_threads(threads)


def real(params: tuple[Param, ...], fmt: str) -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    made = []
    for given in params:
        p = torch.nn.Parameter(torch.randn(given.shape).to(getattr(torch, fmt)))
        p.grad = torch.randn(given.shape).to(p.dtype)
        p.low_rank, p.heads = given.projected, given.name.startswith("q_proj")
        p.label = f"{len(made)}.{given.name}"
        made.append(p)
    return made


def run(build: Build, params: tuple[Param, ...], fmt: str, steps: int) -> tuple[Any, list[torch.nn.Parameter]]:
    """An optimizer (other parameters in a group before the projected ones) after some steps, with fresh gradients."""
    named = real(params, fmt)
    optimizer = build([p for p in named if not p.low_rank], [p for p in named if p.low_rank], named)
    for _ in range(steps):
        optimizer.step()
        for p in named:
            p.grad = torch.randn(p.shape).to(p.dtype)
    return optimizer, named


def step_peak(build: Build, params: tuple[Param, ...], fmt: str, steps: int, refresh: bool = False) -> int:
    """How far above its start step number `steps` comes (from 0). The profiler follows the run from its first
    allocation, so that it knows what the step frees; a tensor of an odd size marks the start."""

    def start() -> Callable[[], object]:
        optimizer, _ = run(build, params, fmt, steps)
        optimizer.refresh = refresh
        return optimizer.step

    return peak_of(start)


def peak_of(start: Callable[[], Callable[[], object]]) -> int:
    """The peak of what `start()` returns, above its own start."""

    def life() -> None:
        step = start()
        mark = torch.empty(MARK, dtype=torch.int8)
        step()
        del mark

    with plain_kernels():
        moments = allocations(life, ignore=SCALAR).steps
    first = [size for size, _ in moments].index(MARK)
    return max(live for _, live in moments[first:]) - moments[first][1]


class QuietTape(Tape):
    """A tape that leaves scalars out."""

    def nbytes(self, shape: Any, dtype: Any) -> int:
        n = super().nbytes(shape, dtype)
        return 0 if n <= SCALAR else n


def program_peak(of: Implementation, params: tuple[Param, ...], fmt: str, how: Job, refresh: bool) -> int:
    tape, slots = laid_out(of, params, fmt, how)
    start = tape.total
    tape.mark("step", 0, "step")
    of.step(Slots(tape, slots, None), how, refresh)
    return tape.peaks["step", 0, "step"].total - start


def laid_out(of: Implementation, params: tuple[Param, ...], fmt: str, how: Job) -> tuple[Tape, list[Slot]]:
    """Weights (codes of one byte where the implementation stores them so), gradients and states on a tape."""
    tape = QuietTape(granularity=1, device=how.device)
    slots = []
    for p in (given.trained(fmt) for given in params):
        size = p.numel if of.linear.startswith("int8") and p.projected else p.nbytes
        weight = Tensor(tape.bytes(size, WEIGHTS), p.shape, p.dtype)
        slot = Slot(tape, p, 0, weight, tape.empty(p.shape, p.dtype, GRADIENTS))
        for buffer in of.state(p, how):
            slot.keep(buffer)
        slots.append(slot)
    return tape, slots
