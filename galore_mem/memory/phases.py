"""One training step, phase by phase, for a model of any depth from two shallow runs.

A model is a stack of identical layers between a beginning and an end. A program goes through the layers in one
direction, and what happens in a layer depends on the layers before it, not on those to come. So from the second layer
that it meets to the last, the live bytes inside a layer are those of a run at another depth plus a multiple of what
each layer leaves behind: affine in the layer's number and in the depth. An affine function is highest at an end: the
highest moment of a phase is in the first, the second or the last layer that the program meets (or outside the layers),
and each of these is affine in the depth. Runs with two and three layers give all of them, and the result equals a run
at full depth to the byte (`tests/test_phases.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from galore_mem.memory.network import AFTER, BEFORE, Forward, Layout, Network, States, Turn, place
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
from galore_mem.methods.base import PENDING, Implementation, Job, Slot, Slots
from galore_mem.setup import Setup
from galore_mem.spec.model import ModelSpec

PHASES = ("load", "forward", "loss", "backward", "step", "refresh")
SHALLOW = 2  # layers of the shallower of the two runs

# cuBLAS keeps one workspace per handle; the forward and the autograd thread have one each, for the life of
# the process (aten/src/ATen/cuda/CublasHandlePool.cpp: 2 x 4096 + 8 x 16 KiB; 32 MiB on these major versions).
CUBLAS_WORKSPACES = 2
HOPPER_ON = (9, 10, 12)
CUBLAS_WORKSPACE, CUBLAS_WORKSPACE_HOPPER = 8_519_680, 33_554_432


class Work(NamedTuple):
    """What a run needs to know: the model, how it is trained, and the code that trains it."""

    model: ModelSpec
    setup: Setup
    code: Implementation
    job: Job
    targets: tuple[str, ...] | None
    forward: Forward | None

    def layout(self) -> Layout:
        return Layout(self.model, self.code, self.job, self.targets)

    def tape(self) -> Tape:
        return Tape(self.setup.granularity, self.setup.device, self.setup.compute_capability)


NOTHING: Bytes = (0, 0, 0, 0, 0)
Profile = dict[tuple[str, int, str, int], Bytes]


class Moment(NamedTuple):
    """The live bytes by category at one moment, and what one more layer would add to them (None: not known)."""

    live: Bytes
    per_layer: Bytes | None = None

    def plus(self, more: Bytes) -> Moment:
        """The same moment with constant bytes added."""
        return Moment(plus(self.live, more), self.per_layer)


@dataclass(frozen=True, slots=True)
class Phases:
    """The highest moment of each phase; what is still alive after backward besides parameters, their gradients and
    optimizer state (the model's buffers; workspaces; its output if the loop keeps that); the attention kernels that
    ran."""

    peaks: Mapping[str, Moment]
    retained: Bytes = NOTHING
    kernels: frozenset[str] = frozenset()


class Run(NamedTuple):
    """One run at one depth: the highest moment of each segment, and the rest as in `Phases`."""

    peaks: Mapping[Segment, Peak]
    retained: Bytes = NOTHING
    kernels: frozenset[str] = frozenset()


def plus(a: Bytes, b: Bytes) -> Bytes:
    return (a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3], a[4] + b[4])


def at_depth(run: Callable[[int], Run], depth: int, descending: Sequence[str] = ()) -> Phases:
    """Phases of a model with `depth` layers, from `run(layers)` at that depth or at two shallower ones; `descending`
    names the phases that meet the last layer first."""
    if depth <= SHALLOW + 1:
        one = run(depth)
        moments = ((segment[0], Moment(peak.live)) for segment, peak in one.peaks.items())
        return Phases(_highest(moments), one.retained, one.kernels)
    low, high = run(SHALLOW), run(SHALLOW + 1)
    a, b = _by_position(low.peaks, SHALLOW, descending), _by_position(high.peaks, SHALLOW + 1, descending)
    assert a.keys() == b.keys(), "the program takes another path at another depth"
    extra = depth - SHALLOW
    moments = ((key[0], _affine(a[key], b[key], extra)) for key in a)
    return Phases(_highest(moments), _affine(low.retained, high.retained, extra).live, low.kernels)


def _affine(a: Bytes, b: Bytes, extra: int) -> Moment:
    return _raised(a, (b[0] - a[0], b[1] - a[1], b[2] - a[2], b[3] - a[3], b[4] - a[4]), extra)


def _raised(live: Bytes, step: Bytes, extra: int) -> Moment:
    """A moment with so many layers more, each adding `step`."""
    added = (extra * step[0], extra * step[1], extra * step[2], extra * step[3], extra * step[4])
    return Moment(plus(live, added), step)


def _by_position(peaks: Mapping[Segment, Peak], layers: int, descending: Sequence[str]) -> Profile:
    """Segments by how many layers the program has met before, so that depths can be compared."""
    found: Profile = {}
    for (phase, stage, where), peak in peaks.items():
        if isinstance(where, str):
            found[phase, stage, where, 0] = peak.live
            continue
        met = layers - 1 - where if phase in descending else where
        if met < 2:
            found[phase, stage, "first", met] = peak.live
        if met == layers - 1:
            found[phase, stage, "last", 0] = peak.live
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
    backward = ("refresh" if refresh else "backward",)
    layout = work.layout()
    return at_depth(lambda layers: _train(work, layout, layers, refresh), work.model.num_layers, backward)


def _train(work: Work, layout: Layout, layers: int, refresh: bool) -> Run:
    setup, tape = work.setup, work.tape()
    network = Network(tape, layout, layers, setup)
    tape.mark("load", 0, "all")
    tape.mark("ready", 0, "all")  # what exists before a step in steady state, and is in no phase of its own
    kept = setup.keep_gradients or (setup.gradient_accumulation > 1 and not setup.waits)
    for _, parameter, _ in network.trained:
        if kept:
            parameter.grad = tape.empty(parameter.weight.shape, parameter.weight.dtype, GRADIENTS)
    resident = workspaces(work, tape)
    network.turn = Turn(refresh)
    if setup.layerwise:
        resident += hook(work, network, layout.states)
    held: list[Tensor] = []
    if setup.keep_logits == "next":
        held += run_pass(work, network, "ready", [])
        for _, parameter, _ in network.trained:
            parameter.grad = parameter.grad if kept else None
    for stage, turn in enumerate(turns(setup, refresh=refresh)):
        network.stage, network.turn = stage, turn
        if setup.keep_logits != "next":
            held.clear()
        held += run_pass(work, network, "refresh" if refresh else "backward", held)
    # what is held lies there during the step
    retained = (network.buffer_bytes, network.inputs_gradient(), 0, tape.live[3], tape.live[4])
    del resident, held
    return Run(dict(tape.peaks), retained, frozenset(tape.kernels))


def run_pass(work: Work, network: Network, backward: str, before: list[Tensor]) -> tuple[Tensor, ...]:
    """A forward and a backward pass. Returns what the loop holds afterwards: the loss, and the model's output if it
    keeps that. `before` is what it holds of the pass before, until this one's output takes its name."""
    setup, tape = work.setup, network.tape
    network.enter("forward", BEFORE)
    if work.forward is None:
        return ()
    ids, labels = network.ids(), network.labels()
    with tape.autocast_region(setup.recipe.autocast):
        loss, outputs = work.forward(network, ids, labels)
    del ids, labels
    before.clear()
    if setup.keep_logits == "none":
        outputs = ()
    _backward(network, loss, backward)
    if setup.keep_logits not in ("step", "next"):
        outputs = ()
        loss = loss.detach()  # what is left of the graph goes
        network.dropped()
    return loss, *outputs


def _backward(network: Network, loss: Tensor, phase: str) -> None:
    """Runs backward, marking where in the model it is."""
    tape = network.tape
    position: int | str = AFTER
    tape.mark(phase, network.stage, position)

    def follow(node: Node) -> None:
        nonlocal position
        if node not in tape.leaves:
            here = network.where(node.sequence)
            if here != position:
                position = here
                tape.mark(phase, network.stage, position)

    tape.backward(loss, follow)


def cublas_workspace(setup: Setup) -> int:
    """Bytes of one cuBLAS workspace on the setup's card (a card before Hopper where none is named)."""
    card = setup.compute_capability
    return CUBLAS_WORKSPACE_HOPPER if card is not None and card[0] in HOPPER_ON else CUBLAS_WORKSPACE


def workspaces(work: Work, tape: Tape) -> list[Storage]:
    """Workspaces, which a running process has had since its first step."""
    if work.setup.device != "cuda":
        return []
    size = cublas_workspace(work.setup)
    return [tape.bytes(size) for _ in range(CUBLAS_WORKSPACES)]


def turns(setup: Setup, *, refresh: bool) -> Iterator[Turn]:
    """The passes of a step that differ: the first, one between, the last. An update that does not wait has one."""
    for left in reversed(range(min(setup.gradient_accumulation, 3) if setup.waits else 1)):
        yield Turn(refresh, last=not left)


def hook(work: Work, network: Network, states: States, *, lazily: bool = False) -> list[Storage]:
    """Layer-wise update: each parameter is stepped, and its gradient freed, as soon as it has all of it, which the
    network's turn says. Returns what the optimizer keeps beside the states of each parameter. `lazily`: these are not
    there before the parameter's first step, as at the start of a run."""
    tape, master = network.tape, work.job.recipe.master
    waiting = network.waiting
    for trained, parameter, layer in network.trained:
        slot = Slot(tape, trained, layer, parameter.weight, None)
        if master is not None:
            slot.weight = tape.empty(trained.shape, master, OPTIMIZER_STATE)
        if not lazily:
            states.give(slot)

        def step(parameter: Parameter, slot: Slot = slot) -> None:
            slot.grad, parameter.grad = parameter.grad, None
            if not network.turn.last:
                parameter.grad = _awaited(work, slot, network.turn.refresh or not slot.state)
                slot.grad = None
                return
            with tape.no_grad():
                if not slot.state:
                    states.give(slot)
                if master is not None:  # the optimizer works on a gradient in the master copy's format
                    slot.grad = tape.empty(slot.param.shape, master)
                work.code.step(Slots(tape, [slot], None), work.job, network.turn.refresh)
            slot.grad = None

        def late(parameter: Parameter, step: Callable[[Parameter], None] = step) -> None:
            while waiting:
                waiting.pop()()
            waiting.append(lambda: step(parameter))

        parameter.hook = late if work.code.late else step
    return [tape.bytes(b.nbytes, OPTIMIZER_STATE) for b in work.code.shared(work.job)]


def _awaited(work: Work, slot: Slot, refresh: bool) -> Tensor | None:
    """What is left of a gradient that is not complete: itself, or nothing where its low-rank form joins the sum of
    those before. A projector is renewed from the whole of it."""
    compress = work.code.compresses
    assert compress is not None, "it steps in every backward pass"
    low = None if refresh else compress(slot, work.job)
    if low is None:
        return slot.grad
    if PENDING not in slot.state:  # else it is added in place
        low.storage.move(OPTIMIZER_STATE)
        slot.state[PENDING] = low
    return None


# -- the optimizer's step --------------------------------------------------------------------------


def stepping(work: Work) -> Phases:
    """The highest moment of `optimizer.step()` over all parameters, and of a step that renews projectors where there is
    one (`step`, `refresh`): weights, gradients, state and temporaries."""
    layout, depth = work.layout(), work.model.num_layers
    single = work.code.one_by_one and work.job.recipe.master is None  # with a master, all gradients are widened at once
    if not single or depth <= SHALLOW + 1:
        return at_depth(lambda layers: _step(work, layout, layers), depth)
    run = _step(work, layout, SHALLOW)
    more = layout.layer_bytes(work.setup.granularity, work.job.recipe.master)
    moments = (
        (key[0], _raised(live, more, depth - SHALLOW)) for key, live in _by_position(run.peaks, SHALLOW, ()).items()
    )
    return Phases(_highest(moments))


def _step(work: Work, layout: Layout, layers: int) -> Run:
    tape = work.tape()
    tape.grad_enabled = False
    code, job = work.code, work.job
    shared = [tape.bytes(b.nbytes, OPTIMIZER_STATE) for b in code.shared(job)]
    slots, rest = _slots(work, layout, tape, layers)
    before = [slot.layout() for slot in slots]
    run_step(work, Slots(tape, slots, "step"), refresh=False)
    if code.refreshes:
        if before != [slot.layout() for slot in slots]:  # the program has replaced tensors by others
            slots.clear()
            slots, rest = _slots(work, layout, tape, layers)
        run_step(work, Slots(tape, slots, "refresh"), refresh=True)
    del shared, rest
    return Run(dict(tape.peaks))


def _slots(work: Work, layout: Layout, tape: Tape, layers: int) -> tuple[list[Slot], list[Tensor]]:
    """The optimizer's view of the model in steady state, and what else lies there: frozen weights, and the narrow
    weights and gradients that a master copy stands for. Nothing else holds a slot's tensors: programs replace them."""
    master = work.job.recipe.master
    slots: list[Slot] = []
    rest: list[Tensor] = []
    for row, _, layer in layout.rows(layers):
        for stored, trained in row.tensors:
            weight = place(tape, stored)
            if trained is None or stored.grad is None:
                rest.append(weight)
                continue
            grad = tape.empty(stored.shape, stored.grad, GRADIENTS)
            if master is None:
                slot = Slot(tape, trained, layer, weight, grad)
            else:
                rest += weight, grad
                slot = Slot(tape, trained, layer, tape.empty(trained.shape, master, OPTIMIZER_STATE), None)
            layout.states.give(slot)
            slots.append(slot)
    return slots, rest


def run_step(work: Work, slots: Slots, *, refresh: bool) -> None:
    """The optimizer's step, with the master copy's gradients around it where there is one."""
    master = work.job.recipe.master
    slots.begin()
    if master is not None:  # the optimizer works on gradients in the master copy's format
        for slot in slots.unmarked():
            slot.grad = slots.tape.empty(slot.param.shape, master)
    work.code.step(slots, work.job, refresh)
    if master is not None:
        for slot in slots.unmarked():
            slot.grad = None
