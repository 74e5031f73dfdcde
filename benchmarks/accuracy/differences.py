"""What makes a difference between `estimate` and `simulate`: block by block, at each phase's highest moment."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any
from unittest.mock import patch

from galore_mem.ledger import registered
from galore_mem.memory.phases import Work, stepping, training
from galore_mem.memory.tape import OPTIMIZER_STATE, WEIGHTS, Storage, Tape
from galore_mem.units import round_up

SHALLOW = 3  # layers of the model in which differences are looked for: a first, one between, a last
PHASES = ("forward", "backward", "step", "refresh")
STEPS = ("step", "refresh")
LOSS = "the loss that the loop keeps"


class Watched(Tape):
    """A tape that remembers which blocks were live at the highest moment of each segment."""

    def __init__(self, granularity: int, device: str, capability: tuple[int, int] | None) -> None:
        self.blocks: Counter[int] = Counter()
        self.highest: dict[int, Counter[int]] = {}
        super().__init__(granularity, device, capability)

    def _grow(self, category: int, nbytes: int) -> None:
        self.blocks[nbytes] += 1
        before = self._peak.total
        super()._grow(category, nbytes)
        self._note(before)

    def mark(self, phase: str, stage: int, layer: int | str) -> None:
        known = self.peaks.get((phase, stage, layer))
        before = -1 if known is None else known.total
        super().mark(phase, stage, layer)
        self._note(before)

    def _note(self, before: int) -> None:
        if self._peak.total > before:
            self.highest[id(self._peak)] = +self.blocks


def dropped(storage: Storage) -> None:
    storage.tape.live[storage.category] -= storage.nbytes
    storage.tape.total -= storage.nbytes
    if isinstance(storage.tape, Watched):
        storage.tape.blocks[storage.nbytes] -= 1


def estimated(work: Work) -> tuple[dict[str, Counter[int]], int]:
    """Blocks at each phase's highest moment, without optimizer state but in steps and layer-wise updates, and without
    the model's buffers in steps; and the other bytes that are kept from the passes to the steps. The loss is computed
    in forward."""
    tapes: list[Watched] = []

    def tape(self: Work) -> Watched:
        tapes.append(Watched(self.setup.granularity, self.setup.device, self.setup.compute_capability))
        return tapes[-1]

    with patch.object(Work, "tape", tape), patch.object(Storage, "__del__", dropped):
        retained = sum(training(work).retained[1:])
        if not work.setup.layerwise:
            stepping(work)
        elif work.code.refreshes:
            training(work, refresh=True)
    found: dict[str, Counter[int]] = {}
    best: dict[str, int] = {}
    for one in tapes:
        for (phase, _, _), peak in one.peaks.items():
            name = "forward" if phase == "loss" else phase
            if peak.total > best.get(name, -1):
                best[name], found[name] = peak.total, one.highest[id(peak)]
    return found, retained


def differences(work: Work, row: Any) -> dict[str, list[list[Any]]]:
    """Of the model with three layers, by phase: (what it is, bytes that only the simulation has, or, negative, that
    only the estimate has). `row`: the optimizer's builder."""
    from galore_mem.simulate.session import trace_work
    from galore_mem.simulate.subjects.models import with_layers

    work = work._replace(model=with_layers(work.model, range(min(SHALLOW, work.model.num_layers))))
    trace = trace_work(work, row).trace
    (twins, retained), moments = estimated(work), trace.peaks()
    known = {row.name for row in work.model.parameters()}
    beside = [
        round_up(e.nbytes, trace.granularity) for e in registered(work.model, work.setup) for _ in range(e.repeat)
    ]
    found: dict[str, list[list[Any]]] = {}
    for phase in PHASES:
        if phase not in moments or phase not in twins:
            continue
        whole = work.setup.layerwise
        left = +twins[phase]
        if phase in STEPS and not whole:
            left.update(beside)
        rows: Counter[str] = Counter()
        alive = [trace.allocations[i] for i in trace.alive(moments[phase].at)]
        # what the estimate surely has not comes last, so that it is what is left over
        alive.sort(key=lambda one: one.category == WEIGHTS and bare(one.name) not in known)
        for one in alive:
            size = -(-one.nbytes // trace.granularity) * trace.granularity
            if one.category == OPTIMIZER_STATE and phase not in STEPS and not whole:
                continue
            if left[size]:
                left[size] -= 1
            else:
                rows[what(one)] += size
        if phase in STEPS and not whole:  # to its blocks the estimate adds what it keeps from the passes
            rows[LOSS] = rows.pop("cublas workspace", 0) - retained
        rows.update({f"{size:,} bytes": -size * count for size, count in (+left).items()})
        found[phase] = [[name, size] for name, size in rows.items() if size]
    return found


def bare(name: str) -> str:
    """A weight's name as it is without peft's wrappings."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def what(one: Any) -> str:
    """An allocation by its name, or by operation and module, without the layer's number."""
    place = re.sub(r"\.\d+\.", ".{i}.", one.name or one.module).removeprefix("base_model.model.")
    if one.name or one.op == "cublas workspace":
        return place or one.op
    return f"{one.op} in {place or 'the training loop'}"
