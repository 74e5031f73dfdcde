"""What the estimate says of a case, in the phases that can be measured. No torch."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from galore_mem.estimator import Case as Estimated
from galore_mem.estimator import budget, check, given_for
from galore_mem.ledger import Entry, ledger, totals
from galore_mem.memory.network import Layout, place
from galore_mem.memory.phases import CUBLAS_WORKSPACES, Work, cublas_workspace, stepping
from galore_mem.memory.tape import GRADIENTS, OPTIMIZER_STATE
from galore_mem.methods.base import Slot, Slots
from galore_mem.methods.registry import method
from galore_mem.releases import modeled
from galore_mem.setup import TORCH, TRANSFORMERS
from galore_mem.verify.case import TRAIN, Case, Sizes
from galore_mem.verify.matrix import model_of


class Prediction(NamedTuple):
    """The case as the estimator sees it, its sizes, and every tensor that stays."""

    work: Work
    sizes: Sizes
    entries: tuple[Entry, ...]


def predict(case: Case, capability: tuple[int, int] | None = None, *, slack: bool = True) -> Prediction:
    """The estimate of a case, on a card of this compute capability; of whole training steps there, with what the
    allocator's blocks leave unused (`slack`), for the counters have it. Raises `InputError` for what cannot be
    estimated."""
    spec, found = model_of(case.model), method(case.method)
    code, given = found.implementation(case.implementation), given_for(found, case.hyperparameters)
    setup = replace(
        case.setup(), compute_capability=capability, torch=modeled("torch", TORCH),
        transformers=modeled("transformers", TRANSFORMERS),
    )  # fmt: skip
    check(spec, setup, (case.method,), "implementation", case.targets, case.hyperparameters)
    asked = Estimated(spec, setup, found, code, case.targets, given)
    work = asked.work()
    if case.workload == TRAIN:
        made = budget(asked, reserved=slack and setup.device == "cuda")
        kept = CUBLAS_WORKSPACES * cublas_workspace(setup) if setup.device == "cuda" else None
        phases = _measurable({p.name: p.allocated_bytes - (kept or 0) for p in made.phases})
        stays = made.weights_bytes, made.gradients_bytes, made.optimizer_state_bytes
        return Prediction(work, Sizes(*stays, phases, workspaces_bytes=kept), made.entries)
    entries = tuple(ledger(work.model, work.code, work.job, work.targets))
    sums = totals(entries, work.setup)
    sizes = Sizes(sums["weights"], sums["gradients"], sums["optimizer_state"], _steps(work))
    return Prediction(work, sizes, entries)


def _measurable(phases: dict[str, int]) -> dict[str, int]:
    """The loss is computed inside the model's forward pass, and what is loaded is never alone."""
    kept = {name: n for name, n in phases.items() if name not in ("load", "loss")}
    if "forward" in kept:
        kept["forward"] = max(kept["forward"], phases.get("loss", 0))
    return kept


def _steps(work: Work) -> dict[str, int]:
    """The optimizer's steps alone, without workspaces: over all parameters, or one by one with its gradient."""
    if not work.setup.layerwise:
        return {name: sum(moment.live) for name, moment in stepping(work).peaks.items()}
    found = {"step": _one_by_one(work, refresh=False)}
    if work.code.refreshes:
        found["refresh"] = _one_by_one(work, refresh=True)
    return found


def _one_by_one(work: Work, *, refresh: bool) -> int:
    """The highest moment of a step in which only one gradient exists at a time."""
    tape = work.tape()
    tape.grad_enabled = False
    layout: Layout = work.layout()
    shared = [tape.bytes(b.nbytes, OPTIMIZER_STATE) for b in work.code.shared(work.job)]
    slots: list[Slot] = []
    frozen = []
    for row, _, layer in layout.rows(work.model.num_layers):
        for stored, trained in row.tensors:
            weight = place(tape, stored)
            if trained is None:
                frozen.append(weight)
                continue
            slot = Slot(tape, trained, layer, weight, None)
            layout.states.give(slot)
            slots.append(slot)
    tape.mark("step", 0, "all")
    waiting: list[Slot] = []
    for slot in reversed(slots):  # as a backward pass comes to them
        slot.grad = tape.empty(slot.param.shape, slot.param.dtype, GRADIENTS)
        waiting.append(slot)
        if work.code.late and len(waiting) == 1:
            continue
        now = waiting.pop(0)
        work.code.step(Slots(tape, [now], None), work.job, refresh)
        now.grad = None
    for slot in waiting:
        work.code.step(Slots(tape, [slot], None), work.job, refresh)
        slot.grad = None
    del shared, frozen
    return max(peak.total for peak in tape.peaks.values())
