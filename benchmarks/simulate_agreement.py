"""`estimate` beside `simulate` on a CUDA card, phase by phase: every bundled model, and what makes the difference."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any
from unittest.mock import patch

from galore_mem.estimator import Case, budget, default_seq_len, given_for
from galore_mem.memory.phases import Work, stepping, training
from galore_mem.memory.tape import OPTIMIZER_STATE, WEIGHTS, Storage, Tape
from galore_mem.methods.registry import method
from galore_mem.setup import Setup, recipe
from galore_mem.spec.bundled import bundled
from galore_mem.spec.resolve import resolve

METHODS = (("adamw", "torch-foreach"), ("galore", "galore-mem"), ("lora", "peft"))
POINTS = ((1, 2048), (8, 256))
COMPARED = ("forward", "backward", "step", "refresh")
SHALLOW = 3  # layers of the model in which differences are looked for: a first, one between, a last
STEPS = ("step", "refresh")


@dataclass(frozen=True)
class Both:
    """One model, trained in one way."""

    model: str
    method: str
    implementation: str
    batch_size: int
    seq_len: int
    checkpointing: bool

    @property
    def key(self) -> str:
        return " ".join(map(str, asdict(self).values()))

    def work(self) -> Work:
        return self.case().work()

    def case(self) -> Case:
        spec, found = resolve(self.model), method(self.method)
        assert spec.heads is not None
        setup = Setup(recipe("pure-bf16"), self.batch_size, self.seq_len, gradient_checkpointing=self.checkpointing)
        given = given_for(found, {"rank": min(512, spec.heads.hidden_size // 4)})
        return Case(spec, setup, found, found.implementation(self.implementation), None, given)


def cases(*models: str) -> Iterator[Both]:
    for name in models or bundled():
        longest = default_seq_len(resolve(name))
        for batch, length in POINTS:
            for checkpointing in (False, True):
                for m, code in METHODS:
                    yield Both(name, m, code, batch, min(length, longest), checkpointing)


def run(case: Both) -> dict[str, Any]:
    """Bytes of each phase's highest moment, estimated and simulated, and what only one of them has then."""
    from galore_mem.simulate.layers import trace_layers
    from galore_mem.verify.builders import builder

    said = {phase.name: phase.allocated_bytes for phase in budget(case.case()).phases}
    said["forward"] = max(said["forward"], said["loss"])  # the model computes its loss
    peaks = trace_layers(case.work(), builder(case.method, case.implementation)).trace.peaks()
    phases = {name: [said[name], peaks[name].total] for name in COMPARED if name in peaks}
    return {**asdict(case), "phases": phases, "differences": differences(case)}


# -- what makes the difference -----------------------------------------------------------------------------


class Watched(Tape):
    """A tape that remembers which blocks were live at the highest moment of each segment."""

    def __init__(self, granularity: int = 1, device: str = "cuda") -> None:
        self.blocks: Counter[int] = Counter()
        self.highest: dict[int, Counter[int]] = {}
        super().__init__(granularity, device)

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
    """Blocks at each phase's highest moment, without optimizer state but in steps; and the bytes that are kept from
    the passes to the steps. The loss is computed in forward."""
    found: dict[str, Counter[int]] = {}
    tapes: list[Watched] = []

    def tape(self: Work) -> Watched:
        tapes.append(Watched(self.setup.granularity, self.setup.device))
        return tapes[-1]

    with patch.object(Work, "tape", tape), patch.object(Storage, "__del__", dropped):
        retained = sum(training(work).retained)
        stepping(work)
    best: dict[str, int] = {}
    for one in tapes:
        for (phase, _, _), peak in one.peaks.items():
            name = "forward" if phase == "loss" else phase
            if peak.total > best.get(name, -1):
                best[name], found[name] = peak.total, one.highest[id(peak)]
    return found, retained


def differences(case: Both) -> dict[str, list[list[Any]]]:
    """Of the model with three layers, by phase: (what it is, bytes that only the simulation has, or, negative, that
    only the estimate has)."""
    from galore_mem.simulate.models import with_layers
    from galore_mem.simulate.session import trace_work
    from galore_mem.verify.builders import builder

    work = case.work()
    work = work._replace(model=with_layers(work.model, range(min(SHALLOW, work.model.num_layers))))
    trace = trace_work(work, builder(case.method, case.implementation)).trace
    (twins, retained), moments = estimated(work), trace.peaks()
    known = {row.name for row in work.model.parameters()}
    found: dict[str, list[list[Any]]] = {}
    for phase in COMPARED:
        if phase not in moments or phase not in twins:
            continue
        left = +twins[phase].copy()
        rows: Counter[str] = Counter()
        alive = [trace.allocations[i] for i in trace.alive(moments[phase].at)]
        # what the estimate surely has not comes last, so that it is what is left over
        alive.sort(key=lambda one: one.category == WEIGHTS and one.name not in known)
        for one in alive:
            size = -(-one.nbytes // trace.granularity) * trace.granularity
            if one.category == OPTIMIZER_STATE and phase not in STEPS:
                continue
            if left[size]:
                left[size] -= 1
            else:
                rows[what(one)] += size
        if phase in STEPS:  # to its blocks the estimate adds what it keeps from the passes: workspaces, the loss
            rows["the loss"] = rows.pop("cublas workspace", 0) - retained
        rows.update({f"{size:,} bytes": -size * count for size, count in (+left).items()})
        found[phase] = [[name, size] for name, size in rows.items() if size]
    return found


def what(one: Any) -> str:
    """An allocation by its name, or by operation and module, without the layer's number."""
    place = re.sub(r"\.\d+\.", ".{i}.", one.name or one.module)
    return (
        place if one.name else f"{one.op} in {place or 'the training loop'}" if one.op != "cublas workspace" else one.op
    )
