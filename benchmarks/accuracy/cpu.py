"""A real training step on the CPU beside its estimate and its simulation, phase by phase."""

from __future__ import annotations

import gc
from dataclasses import asdict
from typing import Any

from cpu_cases import Trained, cases

from galore_mem.estimator import budget
from galore_mem.memory.phases import Work
from galore_mem.verify.builders import Builder

__all__ = ["cases", "run"]
COUNTED = ("forward", "backward", "step", "refresh")
RESIDENTS = ("weights", "gradients", "optimizer_state")
Found = dict[str, dict[str, int]]  # `phases` and `residents`, in bytes


def run(case: Trained) -> dict[str, Any]:
    """The highest moment of each phase and the tensors that stay: measured, estimated (None where the family is not
    known), simulated with every layer."""
    from galore_mem.verify.builders import builder

    work, row = case.work(), builder(case.method, case.implementation)
    row.check("train", work)
    said = {"estimate": estimated(case), "simulate": simulated(work, row)}
    gc.collect()
    real = measured(work, row)
    for found in said.values():
        if found is not None:
            found["phases"] = {name: found["phases"][name] for name in real["phases"]}
    return {**asdict(case), "family": case.family, "measured": real, **said}


def estimated(case: Trained) -> Found | None:
    """The model computes its loss inside forward."""
    asked = case.estimated()
    if asked is None:
        return None
    made = budget(asked)
    phases = {phase.name: phase.allocated_bytes for phase in made.phases}
    phases["forward"] = max(phases["forward"], phases["loss"])
    stays = made.weights_bytes, made.gradients_bytes, made.optimizer_state_bytes
    return {"phases": phases, "residents": dict(zip(RESIDENTS, stays, strict=True))}


def simulated(work: Work, row: Builder) -> Found:
    from galore_mem.simulate.layers import trace_layers

    found = trace_layers(work, row, full=True)
    phases = {phase: peak.total for phase, peak in found.trace.peaks().items()}
    return {"phases": phases, "residents": dict(zip(RESIDENTS, found.measured[:3], strict=True))}


def measured(work: Work, row: Builder) -> Found:
    """Every event of torch's allocator from before the first tensor."""
    import torch

    from galore_mem.verify.kernels import chosen_kernels
    from galore_mem.verify.meters import CpuMeter
    from galore_mem.verify.workloads import run_train

    torch.manual_seed(0)
    with CpuMeter() as meter, chosen_kernels(work), row.around():
        found = run_train(work, row, torch.device("cpu"), meter)
    phases = {name: peak.allocated for name, peak in meter.peaks().items() if name in COUNTED}
    return {"phases": phases, "residents": dict(zip(RESIDENTS, found[:3], strict=True))}
