"""Runs a training program without values and returns what it allocated."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from types import TracebackType
from typing import Any
from unittest.mock import patch

import torch

from galore_mem.collector import paused
from galore_mem.memory.phases import Work
from galore_mem.memory.tensor import ACTIVATIONS, OPTIMIZER_STATE, TEMPORARIES, WEIGHTS
from galore_mem.setup import Setup
from galore_mem.simulate.subjects.versions import as_released
from galore_mem.simulate.trace import Trace
from galore_mem.simulate.tracing import branches
from galore_mem.simulate.tracing.card import simulated
from galore_mem.simulate.tracing.modules import Modules
from galore_mem.simulate.tracing.patches import patched
from galore_mem.simulate.tracing.places import Places
from galore_mem.simulate.tracing.questions import refused
from galore_mem.simulate.tracing.tracer import Tracer
from galore_mem.simulate.tracing.values import Assumed
from galore_mem.verify.builders import Builder
from galore_mem.verify.residents import tensors
from galore_mem.verify.workloads import Measured, run_train

META = torch.device("meta")
Told = Callable[[str], None]


class TraceMeter:
    """A meter (`galore_mem.verify.meters`) of a program on `meta`: used around its whole life, told where phases
    begin, which it tells `told`. `ended` gives what happened."""

    def __init__(self, setup: Setup, told: Told = lambda phase: None, *, own: bool = False) -> None:
        self._told = told
        self._modules = Modules(self._label_weights)
        self.places = Places(setup.device) if own else None
        self._tracer = Tracer(setup, self._modules, self.places)
        self._setup = setup
        self._stack = ExitStack()
        # they live to the end of the trace, with what they hold, after whoever made them has returned
        self._optimizers: dict[int, torch.optim.Optimizer] = {}
        self._models: dict[int, torch.nn.Module] = {}

    @property
    def assumed(self) -> tuple[Assumed, ...]:
        """Values that the program asked for."""
        return tuple(self._tracer.assumed)

    @property
    def operations(self) -> int:
        return self._tracer.operations

    def __enter__(self) -> TraceMeter:
        enter = self._stack.enter_context
        enter(patched(self._setup, self._tracer.follow))
        enter(self._modules.followed())
        enter(patch.object(torch.optim.Optimizer, "__init__", self._noticing(torch.optim.Optimizer.__init__)))
        enter(branches.on(self._setup))
        enter(as_released(self._setup))
        if self.places is not None:
            enter(simulated(self._setup, self.places, self._tracer))
        enter(self._tracer)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    def enter(self, phase: str) -> None:
        self.label_states()
        self._told(phase)
        self._tracer.enter(phase)

    def restart(self) -> None:
        """What has happened is all of the first phase."""
        del self._tracer.trace.marks[1:]

    @property
    def models(self) -> list[torch.nn.Module]:
        """The outermost modules that have run."""
        return list(self._models.values())

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """All that have been made."""
        return list(self._optimizers.values())

    def ended(self) -> Trace:
        """What has happened until now. (What is freed later goes on to be written down elsewhere.)"""
        self.label_states()
        found = self._tracer.trace
        return Trace(
            found.granularity, list(found.allocations), list(found.events), list(found.marks), list(found.emptied)
        )

    def path_of(self, module: torch.nn.Module) -> str:
        """Where a module that has run is in the model."""
        return self._modules._names.get(id(module), "")

    def label_states(self) -> None:
        """What optimizers keep now is optimizer state, in `state` or elsewhere, unless it has been called otherwise."""
        models = [module for root in self._models.values() for module in root.modules()]
        for optimizer in self._optimizers.values():
            for p in (p for group in optimizer.param_groups for p in group["params"]):
                if self._unsaid(p):  # of no module that has run
                    self._tracer.label(p, WEIGHTS, "")
            for p, state in optimizer.state.items():
                name = self._tracer.names.get(id(p), "")
                for path, t in tensors(state):
                    self._tracer.label(t, OPTIMIZER_STATE, f"{name}:{path}")
            for path, t in tensors(vars(optimizer), without=models):
                if self._unsaid(t):
                    self._tracer.label(t, OPTIMIZER_STATE, path)

    def _unsaid(self, t: torch.Tensor) -> bool:
        index = self._tracer.index(t)
        return index is not None and self._tracer.trace.allocations[index].category in (ACTIVATIONS, TEMPORARIES)

    def _label_weights(self, root: torch.nn.Module) -> None:
        self._models[id(root)] = root
        for rows in (root.named_buffers(), root.named_parameters()):
            for name, p in rows:
                self._tracer.names[id(p)] = name
                for held in (p, vars(p)):
                    for _, t in tensors(held):
                        if t is not p.grad:
                            self._tracer.label(t, WEIGHTS, name)

    def _noticing(self, original: Callable[..., None]) -> Callable[..., None]:
        def init(optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> None:
            original(optimizer, *args, **kwargs)
            self._optimizers[id(optimizer)] = optimizer

        return init


@dataclass(frozen=True, slots=True)
class Traced:
    """A traced program: what it allocated, and the values that it asked for. `measured` is what `verify` would have
    found of the tensors that stay.

    `layers`: of the models that ran, where they are made of layers; if it is not the number that was meant, the trace
    follows from theirs (`galore_mem.simulate.layers`). `notes` say so, and what else was taken for granted. `whole`:
    the trace is a program's own, from its start, with its own phases; `passes`: nothing but forward passes.
    """

    trace: Trace
    assumed: tuple[Assumed, ...]
    operations: int
    measured: Measured
    layers: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    whole: bool = False
    passes: bool = False


def trace(
    program: Callable[[TraceMeter], Measured | None], setup: Setup, told: Told = lambda phase: None, *,
    own: bool = False,
) -> Traced:  # fmt: skip
    """Runs a program on `meta` that tells the meter its phases, and the meter `told`. Nothing has values there, and
    nothing takes memory. `own`: the program may name devices, and what it means is done
    (`galore_mem.simulate.tracing.places`). Raises `InputError` where the program needs values.

    What reference counts do not free stays, all of the time: when the collector would come is chance. Where the
    training loop asks for it, it looks at what was made inside alone, which takes a tenth of the time."""
    with suppress(ImportError):  # before its functions are looked up to be replaced
        import_module("transformers.utils.generic")
    with new_tables(), paused(freeze=True), TraceMeter(setup, told, own=own) as meter, refused(meter.path_of):
        found = program(meter) or Measured(0, 0, 0, {})
        ended = meter.ended()
    # (what a program on `meta` counts of the state lacks the tensors in host memory, which may be the device)
    measured = found._replace(optimizer_state=ended.residents()[OPTIMIZER_STATE])
    return Traced(ended, meter.assumed, meter.operations, measured)


# Tensors that libraries keep for the process (bitsandbytes 0.50), in dictionaries and behind functools.cache. A run
# makes them anew, as the only one of its process would, and leaves none on `meta` for those after it.
TABLES = (("bitsandbytes.functional", "name2qmap"), ("bitsandbytes.backends.utils", "_code_4bit_cache"))
CACHES = (("bitsandbytes.backends.default.ops", "_get_4bit_quantize_bounds"),)


@contextmanager
def new_tables() -> Iterator[None]:
    """Libraries have kept nothing yet, and keep nothing of what is made inside (where they may come to be imported)."""
    before = {key: dict(kept) for key, kept in _loaded(TABLES)}
    try:
        _forget({})
        yield
    finally:
        _forget(before)


def _forget(known: Mapping[tuple[str, str], dict[Any, Any]]) -> None:
    for key, kept in _loaded(TABLES):
        kept.clear()
        kept.update(known.get(key, {}))
    for _, cached in _loaded(CACHES):
        cached.cache_clear()


def _loaded(names: Iterable[tuple[str, str]]) -> Iterator[tuple[tuple[str, str], Any]]:
    for module, name in names:
        kept = getattr(sys.modules.get(module), name, None)
        if kept is not None:
            yield (module, name), kept


def trace_work(work: Work, row: Builder, told: Told = lambda phase: None) -> Traced:
    """The training steps of `verify` (workload `train`) for a spec, a method and an implementation."""
    for module in row.needs:  # what libraries make as they are imported is not the run's
        with suppress(ImportError):
            import_module(module)

    def program(meter: TraceMeter) -> Measured:
        with row.around():
            return run_train(work, row, META, meter)

    return trace(program, work.setup, told)
