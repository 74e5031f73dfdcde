"""One training step, phase by phase, for a model of any depth from two shallow runs.

A model is a stack of identical layers between a beginning and an end. Where the program is inside layer i
of L, the live bytes are those of a run at another depth plus a multiple of the bytes each layer leaves
behind: affine in L and in i. So the highest moment of a phase, over all layers, is at the first or second
or last or last but one layer (an affine function of i is largest at an end), and each of these is affine in
L. Runs with three and four layers give all of them, and the result equals a run at full depth to the byte
(`tests/test_phases.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from galore_mem.memory.network import AFTER, BEFORE, Forward, Network, States
from galore_mem.memory.tape import (
    GRADIENTS,
    OPTIMIZER_STATE,
    Bytes,
    Node,
    Parameter,
    Peak,
    Segment,
    Storage,
    Tape,
    Tensor,
)
from galore_mem.methods.base import Implementation, Job, Slot, Slots
from galore_mem.setup import Setup
from galore_mem.spec.model import ModelSpec

PHASES = ("load", "forward", "loss", "backward", "step", "refresh")
SHALLOW = 3  # layers of the shallower of the two runs

# cuBLAS keeps one workspace per handle; the forward and the autograd thread have one each, for the life of
# the process (aten/src/ATen/cuda/CublasHandlePool.cpp: 2 x 4096 + 8 x 16 KiB; 32 MiB from Hopper on).
CUBLAS_WORKSPACES = 2
CUBLAS_WORKSPACE, CUBLAS_WORKSPACE_HOPPER = 8_519_680, 33_554_432


@dataclass(frozen=True, slots=True)
class Work:
    """What a run needs to know: the model, how it is trained, and the code that trains it."""

    model: ModelSpec
    setup: Setup
    code: Implementation
    job: Job
    targets: tuple[str, ...] | None
    forward: Forward | None

    def network(self, tape: Tape, layers: int) -> Network:
        return Network(tape, self.model, layers, self.code, self.job, self.setup, self.targets)

    def tape(self) -> Tape:
        return Tape(self.setup.granularity, self.setup.device)


NOTHING: Bytes = (0, 0, 0, 0, 0)
Profile = dict[tuple[str, int, str | int, int], Bytes]


@dataclass(frozen=True, slots=True)
class Moment:
    """The live bytes by category at one moment, and what one more layer would add to them (None: not known)."""

    live: Bytes
    per_layer: Bytes | None = None

    def plus(self, more: Bytes) -> Moment:
        """The same moment with constant bytes added."""
        return Moment(plus(self.live, more), self.per_layer)


@dataclass(frozen=True, slots=True)
class Phases:
    """The highest moment of each phase; what is still alive after backward besides weights, gradients and optimizer
    state (workspaces; the model's output if the loop keeps it); the attention kernels that ran."""

    peaks: Mapping[str, Moment]
    retained: Bytes = NOTHING
    kernels: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Run:
    """One run at one depth: the highest moment of each segment, and the rest as in `Phases`."""

    peaks: Mapping[Segment, Peak]
    retained: Bytes = NOTHING
    kernels: frozenset[str] = frozenset()


def plus(a: Bytes, b: Bytes) -> Bytes:
    return (a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3], a[4] + b[4])


def at_depth(run: Callable[[int], Run], depth: int) -> Phases:
    """Phases of a model with `depth` layers, from `run(layers)` at that depth or at two shallower ones."""
    if depth <= SHALLOW + 1:
        one = run(depth)
        moments = ((segment[0], Moment(peak.live)) for segment, peak in one.peaks.items())
        return Phases(_highest(moments), one.retained, one.kernels)
    low, high = run(SHALLOW), run(SHALLOW + 1)
    a, b = _by_position(low.peaks, SHALLOW), _by_position(high.peaks, SHALLOW + 1)
    assert a.keys() == b.keys(), "the program takes another path at another depth"
    extra = depth - SHALLOW
    moments = ((key[0], _affine(a[key], b[key], extra)) for key in a)
    return Phases(_highest(moments), _affine(low.retained, high.retained, extra).live, low.kernels)


def _affine(a: Bytes, b: Bytes, extra: int) -> Moment:
    step = (b[0] - a[0], b[1] - a[1], b[2] - a[2], b[3] - a[3], b[4] - a[4])
    return Moment(plus(a, (extra * step[0], extra * step[1], extra * step[2], extra * step[3], extra * step[4])), step)


def _by_position(peaks: Mapping[Segment, Peak], layers: int) -> Profile:
    """Segments named by their distance from the first or the last layer, so that depths can be compared."""
    found: Profile = {}
    for (phase, stage, where), peak in peaks.items():
        if isinstance(where, str):
            found[phase, stage, where, 0] = peak.live
            continue
        if where < 2:
            found[phase, stage, "front", where] = peak.live
        if where >= layers - 2:
            found[phase, stage, "back", layers - 1 - where] = peak.live
    return found


def _highest(moments: Iterable[tuple[str, Moment]]) -> dict[str, Moment]:
    """The highest moment of each phase, in the order of `PHASES`."""
    peaks: dict[str, Moment] = {}
    for phase, moment in moments:
        if phase not in peaks or sum(moment.live) > sum(peaks[phase].live):
            peaks[phase] = moment
    return {phase: peaks[phase] for phase in PHASES if phase in peaks}


# -- forward, loss, backward -----------------------------------------------------------------------


def training(work: Work, refresh: bool = False) -> Phases:
    """Load, forward, loss and backward. With layer-wise update the optimizer's steps run inside backward (and its
    states are counted); with `refresh` those steps renew their projectors, and the phase is named so."""
    return at_depth(lambda layers: _train(work, layers, refresh), work.model.num_layers)


def _train(work: Work, layers: int, refresh: bool) -> Run:
    setup, tape = work.setup, work.tape()
    network = work.network(tape, layers)
    tape.mark("load", 0, "all")
    tape.mark("ready", 0, "all")  # what exists before a step in steady state, and is in no phase of its own
    for _, parameter, _ in network.trained:
        if setup.keep_gradients or setup.gradient_accumulation > 1:
            parameter.grad = tape.empty(parameter.weight.shape, parameter.weight.dtype, GRADIENTS)
    resident = _residents(work, tape)
    if setup.layerwise:
        resident += _hook(work, network, refresh)
    network.enter("forward", BEFORE)
    if work.forward is not None:
        ids, labels = network.ids(), network.labels()
        with tape.autocast_region(setup.recipe.autocast):
            loss, outputs = work.forward(network, ids, labels)
        del ids, labels
        if not setup.keep_logits:
            outputs = ()
        _backward(network, loss, "refresh" if refresh else "backward")
        live = tape.live  # the loss, and the outputs if they are kept, lie there during the step
        retained = (0, 0, 0, live[3], live[4])
        del loss, outputs
    else:
        retained = (0, 0, 0, tape.live[3], tape.live[4])
    del resident
    return Run(dict(tape.peaks), retained, frozenset(tape.kernels))


def _backward(network: Network, loss: Tensor, phase: str) -> None:
    """Runs backward, marking where in the model it is."""
    tape = network.tape
    position: int | str = AFTER
    tape.mark(phase, 0, position)

    def follow(node: Node) -> None:
        nonlocal position
        if node not in tape.leaves:
            here = network.where(node.sequence)
            if here != position:
                position = here
                tape.mark(phase, 0, position)

    tape.backward(loss, follow)


def _residents(work: Work, tape: Tape) -> list[Storage]:
    """Workspaces, which a running process has had since its first step."""
    if work.setup.device != "cuda":
        return []
    hopper = work.setup.compute_capability is not None and work.setup.compute_capability >= (9, 0)
    size = CUBLAS_WORKSPACE_HOPPER if hopper else CUBLAS_WORKSPACE
    return [tape.bytes(size) for _ in range(CUBLAS_WORKSPACES)]


def _hook(work: Work, network: Network, refresh: bool) -> list[Storage]:
    """Layer-wise update: each parameter is stepped, and its gradient freed, as soon as it has one. Returns what the
    optimizer keeps beside the states of each parameter."""
    tape, master, states = network.tape, work.job.recipe.master, States(work.code, work.job)
    for trained, parameter, layer in network.trained:
        slot = Slot(tape, trained, layer, parameter.weight, None)
        if master is not None:
            slot.weight = tape.empty(trained.shape, master, OPTIMIZER_STATE)
        states.give(slot)

        def step(parameter: Parameter, slot: Slot = slot) -> None:
            slot.grad, parameter.grad = parameter.grad, None
            with tape.no_grad():
                if master is not None:  # the optimizer works on a gradient in the master copy's format
                    slot.grad = tape.empty(slot.param.shape, master)
                work.code.step(Slots(tape, [slot], None), work.job, refresh)
            slot.grad = None

        parameter.hook = step
    return [tape.bytes(b.nbytes, OPTIMIZER_STATE) for b in work.code.shared(work.job)]


# -- the optimizer's step --------------------------------------------------------------------------


def stepping(work: Work, refresh: bool) -> Moment:
    """The highest moment of `optimizer.step()` over all parameters: weights, gradients, state and temporaries."""
    phases = at_depth(lambda layers: _step(work, layers, refresh), work.model.num_layers)
    return phases.peaks["step"]


def _step(work: Work, layers: int, refresh: bool) -> Run:
    tape = work.tape()
    tape.grad_enabled = False
    network = work.network(tape, layers)
    shared = [tape.bytes(b.nbytes, OPTIMIZER_STATE) for b in work.code.shared(work.job)]
    slots, narrow, states = [], [], States(work.code, work.job)
    for trained, parameter, layer in network.trained:
        grad = tape.empty(parameter.weight.shape, parameter.weight.dtype, GRADIENTS)
        slot = Slot(tape, trained, layer, parameter.weight, grad)
        if work.job.recipe.master is not None:
            narrow.append((parameter.weight, grad))
            slot.weight = tape.empty(trained.shape, trained.dtype, OPTIMIZER_STATE)
        del parameter, grad
        states.give(slot)
        slots.append(slot)
    frozen = network.frozen()
    del network  # a program may replace weights and gradients: nothing else may hold them
    tape.mark("step", 0, "all")
    if work.job.recipe.master is not None:  # the optimizer works on gradients in the master copy's format
        for slot in slots:
            slot.grad = tape.empty(slot.param.shape, slot.param.dtype)
    work.code.step(Slots(tape, slots, "step"), work.job, refresh)
    del shared, narrow, frozen
    return Run(dict(tape.peaks))
