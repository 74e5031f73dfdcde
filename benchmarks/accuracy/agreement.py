"""`estimate` beside `simulate` on a CUDA card, phase by phase: every bundled model, every method, ways to train."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from galore_mem.estimator import Case, budget, default_seq_len, given_for
from galore_mem.memory.phases import Work
from galore_mem.methods.registry import METHODS as REGISTRY
from galore_mem.methods.registry import method
from galore_mem.setup import Setup, recipe
from galore_mem.spec.bundled import bundled
from galore_mem.spec.resolve import resolve

METHODS = (("adamw", "torch-foreach"), ("galore", "galore-mem"), ("lora", "peft"))
POINTS = ((1, 2048), (8, 256))
COMPARED = ("forward", "backward", "step", "refresh")
EACH = ("llama-130m", "gpt2-125m")  # models on which every implementation is compared
WAYS = (*EACH, "bert-base-uncased")  # and every way to train
WAYS_METHODS = (*METHODS, ("qlora", "peft"), ("q-galore", "galore-mem"))
RECIPES = ("fp32", "amp-bf16", "pure-fp16")
UPDATED = ("adamw", "adafactor", "galore", "galore-mini", "q-galore")  # layer by layer
BUNDLED, EVERY_METHOD, EVERY_WAY = "bundled models", "every method", "every way to train"
SETS = (BUNDLED, EVERY_METHOD, EVERY_WAY)
# bitsandbytes' paged optimizer asks CUDA's driver for its memory, also where tensors have no values
NEEDS_A_CARD = (("adamw-8bit", "bitsandbytes-paged"),)


@dataclass(frozen=True)
class Both:
    """One model, trained in one way; `of` says what it is there for."""

    of: str
    model: str
    method: str
    implementation: str
    batch_size: int
    seq_len: int
    checkpointing: bool = False
    recipe: str = "pure-bf16"
    attention: str = "sdpa"
    layerwise: bool = False

    @property
    def key(self) -> str:
        words = [self.model, self.method, self.implementation, self.recipe, f"{self.batch_size}x{self.seq_len}"]
        words += [self.attention] if self.attention != "sdpa" else []
        return " ".join(words + [name for name in ("checkpointing", "layerwise") if getattr(self, name)])

    def work(self) -> Work:
        return self.case().work()

    def case(self) -> Case:
        spec, found = resolve(self.model), method(self.method)
        assert spec.heads is not None
        setup = Setup(
            recipe(self.recipe), self.batch_size, self.seq_len, self.attention, self.checkpointing,
            layerwise=self.layerwise,
        )  # fmt: skip
        rank = min(512, spec.heads.hidden_size // 4)
        given = given_for(found, {"rank": rank} if any(h.name == "rank" for h in found.hyperparameters) else {})
        return Case(spec, setup, found, found.implementation(self.implementation), None, given)


def cases(*models: str) -> Iterator[Both]:
    """Those of some models only, where any are named. No case twice."""
    known: set[str] = set()
    for case in (*_bundled(), *_methods(), *_ways()):
        if case.key not in known and (not models or case.model in models):
            known.add(case.key)
            yield case


def _bundled() -> Iterator[Both]:
    for name in bundled():
        longest = default_seq_len(resolve(name))
        for batch, length in POINTS:
            for checkpointing in (False, True):
                for names in METHODS:
                    yield Both(BUNDLED, name, *names, batch, min(length, longest), checkpointing)


def _methods() -> Iterator[Both]:
    """Every implementation that can be run here: of which the packages are installed."""
    for model in EACH:
        for one in REGISTRY.values():
            for code in one.implementations:
                case = Both(EVERY_METHOD, model, one.name, code.name, 8, 256)
                if runs(case):
                    yield case


def runs(case: Both) -> bool:
    """Can it be run here, as far as packages say?"""
    from galore_mem.verify.builders import CannotRun, builder
    from galore_mem.verify.case import TRAIN

    try:
        builder(case.method, case.implementation).check(TRAIN, case.work())
    except CannotRun:
        return False
    return (case.method, case.implementation) not in NEEDS_A_CARD


def _ways() -> Iterator[Both]:
    for model in WAYS:
        for names in WAYS_METHODS:
            plain = Both(EVERY_WAY, model, *names, 2, 512)
            for fmt in RECIPES:
                for attention in ("sdpa", "eager"):
                    for checkpointing in (False, True):
                        yield replace(plain, recipe=fmt, attention=attention, checkpointing=checkpointing)
        for name in UPDATED:
            yield Both(EVERY_WAY, model, name, REGISTRY[name].implementations[0].name, 2, 512, layerwise=True)


def run(case: Both) -> dict[str, Any]:
    """Bytes of each phase's highest moment, estimated and simulated; how much higher the allocator's blocks are than
    the tensors in them; and what only one of the two has then."""
    from differences import differences

    from galore_mem.allocator.settings import AllocatorSettings
    from galore_mem.simulate.device import on_cuda
    from galore_mem.simulate.history import history
    from galore_mem.simulate.layers import trace_layers
    from galore_mem.verify.builders import builder

    said = {phase.name: phase.allocated_bytes for phase in budget(case.case()).phases}
    said["forward"] = max(said["forward"], said["loss"])  # the model computes its loss
    row = builder(case.method, case.implementation)
    trace = trace_layers(case.work(), row).trace
    peaks = trace.peaks()
    blocks = on_cuda(history(trace, hooks=case.layerwise), AllocatorSettings()).highest()
    return {
        **asdict(case),
        "phases": {name: [said[name], peaks[name].total] for name in COMPARED if name in peaks},
        "slack": {name: blocks[name].total - peaks[name].total for name in COMPARED if name in peaks},
        "differences": differences(case.work(), row),
    }
