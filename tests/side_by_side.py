"""One program written twice, for torch and for the twin, and the bytes of both."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from allocations import allocations

from galore_mem.dtypes import INT64, DType, dtype
from galore_mem.memory.tape import Parameter, Shape, Tape, Tensor

BOTH = ("float32", "bfloat16")
NUMBER = 8  # a Python number beside a tensor becomes a tensor of its own in host memory, 8 bytes or fewer


@dataclass(frozen=True, slots=True)
class Ids:
    """An input of whole numbers below `high`."""

    shape: Shape
    high: int


@dataclass(frozen=True, slots=True)
class Frozen:
    """An input that wants no gradient, in the program's format or one of its own."""

    shape: Shape
    format: str | None = None


Input = Shape | Ids | Frozen


@dataclass(frozen=True, slots=True)
class Case:
    """A program of some inputs with one output, in torch and in the twin.

    `numbers`: it works with Python numbers, so allocations of at most 8 bytes are left out on both sides (the
    tensors made of such numbers are in host memory, on a GPU too, and are not counted).
    `scratch`: why, in this format, buffers that one CPU kernel both makes and frees are left out; they depend on
    the machine's vector units and threads, and the twin knows none of them.
    """

    name: str
    inputs: tuple[Input, ...]
    torch: Callable[..., torch.Tensor]
    twin: Callable[..., Tensor]
    numbers: bool = False
    scratch: Mapping[str, str] = field(default_factory=dict)
    dtypes: tuple[str, ...] = BOTH


@dataclass(frozen=True, slots=True)
class Record:
    """Bytes above those of the inputs: of each allocation, in order, its own and all that live after it; and what
    is left after each pass (the output and what autograd keeps for it; the output and the gradients)."""

    forward: list[tuple[int, int]]
    kept: int
    backward: list[tuple[int, int]]
    left: int


def torch_inputs(case: Case, format: str) -> list[torch.Tensor]:
    torch.manual_seed(0)
    made = []
    for given in case.inputs:
        if isinstance(given, Ids):
            made.append(torch.randint(0, given.high, given.shape))
        else:
            shape, grad = (given.shape, False) if isinstance(given, Frozen) else (given, True)
            own = given.format if isinstance(given, Frozen) else None
            made.append(torch.randn(shape).to(getattr(torch, own or format)).requires_grad_(grad))
    return made


def torch_record(case: Case, format: str) -> Record:
    """What torch's allocator saw, with one thread (kernels have scratch per thread)."""
    options: dict[str, Any] = {"ignore": NUMBER if case.numbers else 0, "scratch": format not in case.scratch}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        inputs = torch_inputs(case, format)
        forward = allocations(lambda: case.torch(*inputs), **options)
        out = forward.value

        def backward() -> None:
            torch.autograd.backward(out, torch.ones(out.shape, dtype=out.dtype))

        backwards = allocations(backward, **options)
    finally:
        torch.set_num_threads(threads)
    kept = forward.live
    return Record(forward.steps, kept, [(n, kept + live) for n, live in backwards.steps], kept + backwards.live)


class RecordingTape(Tape):
    """Writes down each allocation, leaving out those of at most `ignore` bytes, and a kernel's own copies of operands
    where the case leaves out what kernels make and free."""

    def __init__(self, device: str, ignore: int, *, scratch: bool = True) -> None:
        self.ignore = ignore
        self.scratch = scratch
        self.steps: list[tuple[int, int]] = []
        super().__init__(1, device)

    def nbytes(self, shape: Any, dtype: DType) -> int:
        n = super().nbytes(shape, dtype)
        return n if n > self.ignore else 0

    def converted(self, t: Tensor, dtype: DType) -> Tensor | None:
        return super().converted(t, dtype) if self.scratch else None

    def _grow(self, category: int, nbytes: int) -> None:
        super()._grow(category, nbytes)
        if nbytes:
            self.steps.append((nbytes, self.total))

    def since(self, start: int) -> list[tuple[int, int]]:
        steps, self.steps = self.steps, []
        return [(n, total - start) for n, total in steps]


def twin_inputs(tape: Tape, case: Case, format: str) -> tuple[list[Parameter], list[Tensor]]:
    parameters, inputs = [], []
    for i, given in enumerate(case.inputs):
        if isinstance(given, Ids):
            inputs.append(tape.empty(given.shape, INT64))
        elif isinstance(given, Frozen):
            inputs.append(tape.empty(given.shape, dtype(given.format or format)))
        else:
            weight = tape.empty(given, dtype(format))
            weight.requires_grad = True
            parameters.append(Parameter(str(i), weight))
            inputs.append(parameters[-1].tensor())
    return parameters, inputs


def twin_record(case: Case, format: str, tape: RecordingTape | None = None) -> Record:
    """The same from the twin, which must free everything without the help of the garbage collector."""
    tape = tape or RecordingTape("cpu", NUMBER if case.numbers else 0, scratch=format not in case.scratch)
    gc.disable()
    try:
        parameters, inputs = twin_inputs(tape, case, format)
        start = tape.total
        tape.since(start)
        out = case.twin(*inputs)
        forward, kept = tape.since(start), tape.total - start
        tape.backward(out)
        record = Record(forward, kept, tape.since(start), tape.total - start)
        assert sum(tape.live) == tape.total
        del out, inputs, parameters
        assert tape.total == 0, "something outlives its last reference"
        return record
    finally:
        gc.enable()
