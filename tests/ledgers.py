"""Predicted against real optimizer state, buffer by buffer, and step programs against the CPU allocator."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from allocations import allocations

from galore_mem.dtypes import DType, dtype
from galore_mem.memory.tape import GRADIENTS, WEIGHTS, Shape, Tape
from galore_mem.methods.base import Buffer, Implementation, Job, Slot, Slots, Trained
from galore_mem.methods.registry import method
from galore_mem.setup import recipe
from galore_mem.spec.model import Heads, Role

Told = Mapping[str, int | float | str]
Named = list[tuple[str, torch.nn.Parameter]]
Kept = dict[str, tuple[Shape, str, int]]  # name -> shape, dtype, bytes of the storage

# On the CPU torch wraps a Python number in a scalar tensor of 8 bytes and copies it into the operands' format
# (2 or 4 bytes). CUDA kernels take the number as an argument, so the programs do not have these.
SCALAR = 8


@dataclass(frozen=True, slots=True)
class Case:
    """A ledger, what it is told, and the real optimizer of some named parameters."""

    method: str
    implementation: str
    build: Callable[[Named], torch.optim.Optimizer]
    told: tuple[tuple[str, int | float | str], ...] = ()

    def __str__(self) -> str:
        return "-".join((self.method, self.implementation, *(f"{name}={value}" for name, value in self.told)))

    @property
    def ledger(self) -> Implementation:
        return method(self.method).implementation(self.implementation)

    def job(self, device: str = "cpu", heads: Heads | None = None) -> Job:
        return job(self.method, dict(self.told), device, heads)


def job(of: str, told: Told | None = None, device: str = "cpu", heads: Heads | None = None) -> Job:
    """A job with the method's defaults where nothing else is told."""
    defaults = {h.name: h.default for h in method(of).hyperparameters}
    return Job({**defaults, **(told or {})}, recipe("fp32"), device, heads)


def trained(shape: Shape, name: str = "weight", fmt: str = "float32") -> Trained:
    return Trained(name, shape, dtype(fmt), False, Role.OTHER, "linear")


def real_parameters(named_shapes: Iterable[tuple[str, Shape]], fmt: str) -> Named:
    """Random parameters with random gradients."""
    torch.manual_seed(0)
    named = []
    for name, shape in named_shapes:
        p = torch.nn.Parameter(torch.randn(shape).to(getattr(torch, fmt)))
        p.grad = torch.randn(shape).to(p.dtype)
        named.append((name, p))
    return named


def predicted(buffers: Iterable[Buffer]) -> Kept:
    """As torch holds them: a packed format is a row of bytes."""
    return {
        b.name: ((b.nbytes,), "uint8", b.nbytes) if b.dtype.bits < 8 else (b.shape, b.dtype.name, b.nbytes)
        for b in buffers
    }


def measured(state: Mapping[str, torch.Tensor]) -> Kept:
    return {
        name: (tuple(t.shape), str(t.dtype).removeprefix("torch."), t.untyped_storage().nbytes())
        for name, t in state.items()
    }


def tensors(state: Mapping[str, object]) -> dict[str, torch.Tensor]:
    """The plain tensors of one parameter's state; those inside a tensor subclass under a dotted name."""
    found: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        if isinstance(value, torch.Tensor) and hasattr(value, "__tensor_flatten__"):
            found.update({f"{name}.{inner}": getattr(value, inner) for inner in value.__tensor_flatten__()[0]})
        elif isinstance(value, torch.Tensor):
            found[name] = value
    return found


class QuietTape(Tape):
    """A tape that leaves scalars out, as `allocations(ignore=SCALAR)` does."""

    def nbytes(self, shape: Iterable[int], dtype: DType) -> int:
        n = super().nbytes(shape, dtype)
        return 0 if n <= SCALAR else n


def predicted_temporaries(of: Implementation, parameters: Iterable[Trained], how: Job) -> int:
    """How far above its start the step program comes, at its highest."""
    tape = QuietTape(granularity=1, device=how.device)
    slots = [_slot(tape, p, of, how) for p in parameters]
    start = tape.total
    tape.mark("step", 0, "step")
    of.step(Slots(tape, slots, None), how, False)
    return tape.peaks["step", 0, "step"].total - start


def _slot(tape: Tape, p: Trained, of: Implementation, how: Job) -> Slot:
    slot = Slot(tape, p, 0, tape.empty(p.shape, p.dtype, WEIGHTS), tape.empty(p.shape, p.dtype, GRADIENTS))
    for buffer in of.state(p, how):
        slot.keep(buffer)
    return slot


def measured_temporaries(optimizer: torch.optim.Optimizer, named: Named) -> int:
    """The same of a real step, the third, by the CPU allocator's own events."""
    for _ in range(2):
        optimizer.step()
        for _, p in named:
            p.grad = torch.randn(p.shape).to(p.dtype)
    return allocations(optimizer.step, ignore=SCALAR).peak
