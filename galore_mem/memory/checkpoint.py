"""Non-reentrant activation checkpointing (torch/utils/checkpoint.py) on the tape.

In the forward pass of a checkpointed region nothing is kept but the region's input; each saved tensor
becomes a promise. The first promise that backward asks for recomputes the region, stopping as soon as the
last promised tensor exists (`early_stop`); a recomputed tensor belongs to the node that asked for it, and is
dropped when that node's backward function returns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from galore_mem.memory.tape import ACTIVATIONS, Storage, Tape, Tensor

CPU_RNG_STATE = 5056  # bytes of torch.get_rng_state()


class _StopRecomputationError(Exception):
    """The last tensor that backward needs has been recomputed."""


class Frame:
    """One checkpointed region: how to run it again, and what it promised."""

    def __init__(self, tape: Tape, run: Callable[[], object], kept: Sequence[Tensor]) -> None:
        self.tape = tape
        self.run = run
        self.kept = [t.detach() for t in kept]
        for t in self.kept:
            t.storage.save()
        self.autocast = tape.autocast
        self.rng_state = _rng_state(tape)
        self.promised = 0
        self.recomputed: list[Tensor | None] | None = None

    def __del__(self) -> None:
        for t in self.kept:
            t.storage.unsave()

    def pack(self, tensors: Sequence[Tensor]) -> Promise:
        first = self.promised
        self.promised += len(tensors)
        return Promise(self, first, len(tensors))

    def take(self, first: int, count: int) -> list[Tensor]:
        """Hands over recomputed tensors (unpack_hook: the frame's own reference goes)."""
        if self.recomputed is None:
            self.recomputed = self._recompute()
        found = [t for t in self.recomputed[first : first + count] if t is not None]
        self.recomputed[first : first + count] = [None] * count
        for t in found:
            t.storage.forget()
        return found

    def _recompute(self) -> list[Tensor | None]:
        tape = self.tape
        recorder = Recorder(self.promised)
        grad_enabled, tape.grad_enabled = tape.grad_enabled, True
        outer, tape.frame = tape.frame, recorder
        interrupted = _rng_state(tape)  # put back afterwards (torch.random.fork_rng)
        try:
            with tape.autocast_region(self.autocast):
                self.run()
        except _StopRecomputationError:
            pass
        finally:
            tape.frame, tape.grad_enabled = outer, grad_enabled
            del interrupted
        return recorder.tensors


def _rng_state(tape: Tape) -> Storage | None:
    """The state of the CPU's generator, kept to repeat dropout; beside an accelerator it is in host memory."""
    return tape.bytes(CPU_RNG_STATE, ACTIVATIONS) if tape.device == "cpu" else None


class Promise:
    """Saved tensors of one operation inside a checkpointed region."""

    __slots__ = ("count", "first", "frame")

    def __init__(self, frame: Frame, first: int, count: int) -> None:
        self.frame, self.first, self.count = frame, first, count

    def unpack(self) -> list[Tensor]:
        return self.frame.take(self.first, self.count)

    def release(self) -> None:
        """Nothing: what was promised was handed over."""


class Recorder:
    """Collects what a recomputation saves, and stops it after the last one."""

    def __init__(self, wanted: int) -> None:
        self.wanted = wanted
        self.tensors: list[Tensor | None] = []

    def pack(self, tensors: Sequence[Tensor]) -> Kept:
        for t in tensors:
            t.storage.save()
            self.tensors.append(t.detach())
            if len(self.tensors) == self.wanted:
                raise _StopRecomputationError
        return Kept()


class Kept:
    """The recomputed graph itself is never run backward; the recorder holds its tensors."""

    def unpack(self) -> list[Tensor]:
        return []

    def release(self) -> None:
        return None


def checkpoint(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`function(x)`, keeping only x for backward; plain when nothing is being recorded."""
    tape = x.tape
    if not tape.grad_enabled:
        return function(x)
    frame = Frame(tape, lambda: function(x), [x])
    outer, tape.frame = tape.frame, frame
    try:
        return function(x)
    finally:
        tape.frame = outer
