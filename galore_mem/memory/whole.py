"""A training run on sizes as one stream of allocations, with every layer, from the start of its process.

`galore_mem.memory.phases` finds the highest moment of each phase from two shallow runs. What an allocator makes of a
run depends on all of it, in order: here is the model as it is loaded, a step that makes the optimizer's state, a plain
one, and one that renews projectors where the method has those.
"""

from __future__ import annotations

from collections.abc import Sequence

from galore_mem.memory.network import Network
from galore_mem.memory.phases import Work, cublas_workspace, hook, run_pass, run_step, turns
from galore_mem.memory.tape import GRADIENTS, OPTIMIZER_STATE, Log, Storage, Tape, Tensor
from galore_mem.methods.base import Slot, Slots

FIRST, END = "first-step", "end"
MICRO = 2  # batches that are accumulated: what a third does, the second has done


def whole(work: Work) -> Log:
    """The run's events. Phases are those of `PHASES`, `FIRST` for all of the first step, and `END`."""
    setup, tape, layout = work.setup, work.tape(), work.layout()
    log = tape.log = Log()
    tape.mark("load", 0, "all")
    network = Network(tape, layout, work.model.num_layers, setup)
    log.events = _loaded(log.events, network)
    log.stored = network.named()
    log.called = FIRST
    tape.mark(FIRST, 0, "all")
    tape.workspace = cublas_workspace(setup) if setup.device == "cuda" else 0
    kept: list[Storage] = []
    if setup.layerwise:
        kept += hook(work, network, layout.states, lazily=True)
    slots: list[Slot] = []
    held: list[Tensor] = []
    for name in (FIRST, "step", "refresh") if work.code.refreshes else (FIRST, "step"):
        renews = name == "refresh"
        # with whole gradients in it, a forward pass of such a step is no plain one
        log.called = FIRST if name == FIRST else "refresh" if renews and setup.waits else None
        backward = "refresh" if renews and setup.layerwise else "backward"
        alike = 1 if setup.layerwise else min(setup.gradient_accumulation, MICRO)
        for network.turn in [*turns(setup, refresh=renews)] * alike:
            if setup.keep_logits != "next":
                held.clear()
            held += run_pass(work, network, backward, held)
        network.settle()
        if not setup.layerwise:
            if not slots:
                slots = _slots(work, network, tape)
                kept += [tape.bytes(b.nbytes, OPTIMIZER_STATE) for b in work.code.shared(work.job)]
                for slot in slots:
                    layout.states.give(slot)
            _step(work, network, slots, tape, name)
        if setup.keep_logits != "next":
            held.clear()
            network.dropped()
    log.called = END
    tape.mark(END, 0, "all")
    tape.close()  # what goes when this returns is no part of the run
    return log


def _loaded(made: Sequence[int], network: Network) -> list[int]:
    """The model's tensors in the order in which they come to the card: adapters last."""
    last = {parameter.weight.storage.number for parameter in network.adapters}
    return [n for n in made if n not in last] + [n for n in made if n in last]


def _slots(work: Work, network: Network, tape: Tape) -> list[Slot]:
    """The optimizer's view of the model, without states yet."""
    master = work.job.recipe.master
    return [
        Slot(
            tape, trained, layer,
            parameter.weight if master is None else tape.empty(trained.shape, master, OPTIMIZER_STATE), None,
        )
        for trained, parameter, layer in network.trained
    ]  # fmt: skip


def _step(work: Work, network: Network, slots: Sequence[Slot], tape: Tape, name: str) -> None:
    """The step, and what the loop does with gradients after it."""
    single, keeps = work.job.recipe.master is None, work.setup.keep_gradients
    parameters = [parameter for _, parameter, _ in network.trained]
    for slot, parameter in zip(slots, parameters, strict=True):
        if single:  # the program may replace it or let it go
            slot.grad, parameter.grad = parameter.grad, None
    with tape.no_grad():
        run_step(work, Slots(tape, slots, name), refresh=name == "refresh")
    for slot, parameter in zip(slots, parameters, strict=True):
        if single:
            parameter.weight, parameter.grad = slot.weight, slot.grad
        slot.grad = None
        if not keeps:
            parameter.grad = None
        elif parameter.grad is None:  # the next pass finds one that is zeroed
            weight = parameter.weight
            parameter.grad = tape.empty(weight.shape, weight.dtype, GRADIENTS)
