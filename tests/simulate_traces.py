"""Traces written by hand, and what simulated runs of them say."""

from __future__ import annotations

from typing import Any

from galore_mem.allocator.settings import parse_settings
from galore_mem.evidence import Confidence
from galore_mem.gpus import Gpu
from galore_mem.memory.tensor import ACTIVATIONS, GRADIENTS, OPTIMIZER_STATE, TEMPORARIES, WEIGHTS
from galore_mem.result import Unsupported
from galore_mem.setup import Setup
from galore_mem.simulate.outcome import Target, completed
from galore_mem.simulate.result import SimulateResult, Simulation
from galore_mem.simulate.session import Traced
from galore_mem.simulate.trace import Allocation, Mark, Trace
from galore_mem.units import MIB
from galore_mem.verify.workloads import Measured

MM, SQRT, EMPTY = "aten.mm.default", "aten._foreach_sqrt.default", "aten.empty.memory_format"
UP = "model.layers.{}.up"


def allocation(mib: int, op: str, module: str = "", category: int = TEMPORARIES, **more: Any) -> Allocation:
    return Allocation(mib * MIB, op, module, "", category, shape=(mib, 2**19), dtype="bfloat16", **more)


def step_of_two_layers() -> Trace:
    """Two layers of 12 MiB: loading needs 100 MiB besides; one step that makes 24 MiB of state, one that uses it.

    MiB, in the order of the program (numbers are those of the allocations):
    - load: weight 0 (12), scratch 1 (100), weight 2 (12), the scratch goes, a workspace 3 (14);
    - first step: activations 4 and 5 (20 each); backward: gradient 6 of the last layer (12), 5 goes, 7 (12), 4 goes;
      update: state 8 and 9 (12 each), a temporary 10 (16) that goes; the gradients go;
    - second step: activations 11 and 12 (20), backward 13 (12), 12 goes, 14 (12), 11 goes; a temporary 15 (16).
    """
    made = [
        allocation(12, EMPTY, category=WEIGHTS, name=UP.format(0) + ".weight"),
        allocation(100, "aten.uniform_.default"),
        allocation(12, EMPTY, category=WEIGHTS, name=UP.format(1) + ".weight"),
        Allocation(14 * MIB, "cublas workspace", "", "", kernel=True),
    ]
    for state in (True, False):
        made += [allocation(20, MM, UP.format(i), ACTIVATIONS) for i in (0, 1)]
        made += [allocation(12, MM, UP.format(i), GRADIENTS) for i in (1, 0)]
        if state:
            names = (f"{UP.format(i)}.weight:exp_avg" for i in (0, 1))
            made += [allocation(12, "aten.zeros_like.default", category=OPTIMIZER_STATE, name=n) for n in names]
        made.append(allocation(16, SQRT))
    events = [0, 1, 2, ~1, 3]
    events += [4, 5, 6, ~5, 7, ~4, 8, 9, 10, ~10, ~6, ~7]
    events += [11, 12, 13, ~12, 14, ~11, 15, ~15, ~13, ~14]
    marks = [(0, "warm-up"), (5, "warm-up"), (7, "warm-up"), (11, "warm-up"), (15, "between")]
    marks += [(17, "forward"), (19, "backward"), (23, "step"), (25, "between")]
    return Trace(512, made, events, [Mark(*mark) for mark in marks])


def simulation(
    trace: Trace | None = None, method: str = "adamw", setup: Setup | None = None,
    confidence: Confidence | None = None, **target: Any,
) -> Simulation:  # fmt: skip
    """What a simulated run of a trace says; `target` is what `Target` takes besides the device."""
    setup = setup or Setup()
    target["settings"] = parse_settings(target.pop("alloc_conf", ""))
    bare = Simulation(
        method=method, implementation="torch-foreach", convention="implementation", hyperparameters={},
        layerwise=setup.layerwise, weights_bytes=0, gradients_bytes=0, optimizer_state_bytes=0, phases=(),
        outside_allocator_bytes=0, fits=None, assumptions=("it was written by hand",), not_counted=("nothing",),
        confidence=confidence,
    )  # fmt: skip
    sizes = Measured(24 * MIB, 24 * MIB, 24 * MIB, {})
    traced = Traced(trace or step_of_two_layers(), (), 0, sizes, (2,), ("every layer was traced",))
    return completed(bare, traced, setup, Target(setup.device, **target))


def card(mib: int) -> Gpu:
    """A card of this size, without a context."""
    return Gpu("small-card", mib * MIB, None, 0, "made for this")


def result(*runs: Simulation, gpu: str | None = None, **setup: Any) -> SimulateResult:
    """An answer of these runs."""
    shown = {
        "recipe": "pure-bf16", "batch_size": 1, "seq_len": 64, "attention": "sdpa", "gradient_checkpointing": False,
        "loss": "eager", "layerwise": False, "keep_gradients": False, "keep_logits": "none", "use_cache": False,
        "load": "to-device", "gradient_accumulation": 1,
        "transformers": "5.23.0", "torch": "2.13.0", "device": "cuda", "target": None, "gpu": gpu, "allocator": "",
        "full": True, **setup,
    }  # fmt: skip
    model = {
        "name": "by-hand", "family": "llama", "parameters": 12 * MIB, "parameters_projected": 0, "layers": 2,
        "source": "here",
    }  # fmt: skip
    return SimulateResult("0", model, shown, runs, (Unsupported("fira", "fira", "needs the package fira"),))
