"""Runs a training program without values and returns what it allocated."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from types import TracebackType
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from galore_mem.dtypes import FLOAT32
from galore_mem.errors import InputError
from galore_mem.memory.phases import Work
from galore_mem.memory.tensor import ACTIVATIONS, OPTIMIZER_STATE, TEMPORARIES, WEIGHTS
from galore_mem.methods.base import Trained
from galore_mem.setup import Setup
from galore_mem.simulate.outputs import Called, Loss
from galore_mem.simulate.subjects.versions import as_released
from galore_mem.simulate.trace import Trace
from galore_mem.simulate.tracing import branches
from galore_mem.simulate.tracing.modules import Modules
from galore_mem.simulate.tracing.patches import patched
from galore_mem.simulate.tracing.questions import refused
from galore_mem.simulate.tracing.tracer import Tracer
from galore_mem.simulate.tracing.values import Assumed
from galore_mem.spec.model import Role
from galore_mem.verify.builders import Builder, Member
from galore_mem.verify.residents import tensors, total
from galore_mem.verify.workloads import WARM, Largest, Marks, Measured, run_train, train

META = torch.device("meta")
Told = Callable[[str], None]


class TraceMeter:
    """A meter (`galore_mem.verify.meters`) of a program on `meta`: used around its whole life, told where phases
    begin, which it tells `told`. `ended` gives what happened."""

    def __init__(self, setup: Setup, told: Told = lambda phase: None) -> None:
        self._told = told
        self._modules = Modules(self._label_weights)
        self._tracer = Tracer(setup, self._modules)
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
        enter(self._tracer)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    def enter(self, phase: str) -> None:
        self.label_states()
        self._told(phase)
        self._tracer.enter(phase)

    def ended(self) -> Trace:
        """What has happened until now. (What is freed later goes on to be written down elsewhere.)"""
        self.label_states()
        found = self._tracer.trace
        return Trace(found.granularity, list(found.allocations), list(found.events), list(found.marks))

    def path_of(self, module: torch.nn.Module) -> str:
        """Where a module that has run is in the model."""
        return self._modules._names.get(id(module), "")

    def label_states(self) -> None:
        """What optimizers keep now is optimizer state, in `state` or elsewhere, unless it has been called otherwise."""
        models = [module for root in self._models.values() for module in root.modules()]
        for optimizer in self._optimizers.values():
            for p, state in optimizer.state.items():
                name = self._tracer.names.get(id(p), "")
                for path, t in tensors(state):
                    self._tracer.label(t, OPTIMIZER_STATE, f"{name}:{path}")
            for path, t in tensors(vars(optimizer), without=models):
                index = self._tracer.index(t)
                if index is not None and self._tracer.trace.allocations[index].category in (ACTIVATIONS, TEMPORARIES):
                    self._tracer.label(t, OPTIMIZER_STATE, path)

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
    follows from theirs (`galore_mem.simulate.layers`). `notes` say so, and what else was taken for granted.
    """

    trace: Trace
    assumed: tuple[Assumed, ...]
    operations: int
    measured: Measured
    layers: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()


def trace(program: Callable[[TraceMeter], Measured | None], setup: Setup, told: Told = lambda phase: None) -> Traced:
    """Runs a program on `meta` that tells the meter its phases, and the meter `told`. Nothing has values there, and
    nothing takes memory. Raises `InputError` where the program needs values."""
    with suppress(ImportError):  # before its functions are looked up to be replaced
        import_module("transformers.utils.generic")
    with new_tables(), uncollected(), TraceMeter(setup, told) as meter, refused(meter.path_of):
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


@contextmanager
def uncollected() -> Iterator[None]:
    """What reference counts do not free stays, all of the time: when the collector would come is chance. Where the
    training loop asks for it, it looks at what was made inside alone, which takes a tenth of the time."""
    was = gc.isenabled()
    gc.disable()
    gc.freeze()
    try:
        with patch.object(gc, "enable", lambda: None):  # the training loop's, when it ends
            yield
    finally:
        gc.unfreeze()
        if was:
            gc.enable()


def trace_work(work: Work, row: Builder, told: Told = lambda phase: None) -> Traced:
    """The training steps of `verify` (workload `train`) for a spec, a method and an implementation."""
    for module in row.needs:  # what libraries make as they are imported is not the run's
        with suppress(ImportError):
            import_module(module)

    def program(meter: TraceMeter) -> Measured:
        with row.around():
            return run_train(work, row, META, meter)

    return trace(program, work.setup, told)


# model, optimizer, batch (or a function that makes one anew for each pass), and, where the model returns no loss, a
# function of its output and the batch that does
Built = tuple[torch.nn.Module, torch.optim.Optimizer, Any] | tuple[torch.nn.Module, torch.optim.Optimizer, Any, Loss]
Build = Callable[[], Built]


NO_LEDGER = Trained("", (), FLOAT32, projected=False, role=Role.OTHER, module="")


class Given(NamedTuple):
    """An optimizer that is there, and how many steps it is run before the one that is looked at."""

    optimizer: torch.optim.Optimizer
    setup: Setup
    warm: int

    def phases(self) -> Iterator[str]:
        yield from [WARM] * self.warm
        yield "step"

    def step(self) -> None:
        if not self.setup.layerwise:
            self.optimizer.step()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=not self.setup.keep_gradients)


def trace_step(build: Build, setup: Setup, warm: int = 1) -> Traced:
    """A training step in steady state of any model, optimizer and batch. `build` makes them where tensors are on `meta`
    unless it says otherwise; a batch is the arguments of the model's forward (`galore_mem.simulate.outputs`)."""
    return trace(lambda meter: run_step(build, setup, warm, META, meter), setup)


def run_step(build: Build, setup: Setup, warm: int, device: torch.device, meter: Marks) -> Measured:
    """The same on a device."""
    meter.enter("load")
    with device:
        model, optimizer, batch, *loss = checked(build())

    def inputs() -> dict[str, Any]:
        with device:
            return {"batch": batch() if callable(batch) else batch}

    fmt = setup.recipe.autocast
    context = nullcontext if fmt is None else partial(torch.autocast, device.type, getattr(torch, fmt.name))
    largest = Largest([Member(NO_LEDGER, p) for p in model.parameters() if p.requires_grad], device)
    given = Given(optimizer, setup, warm)

    def after_backward() -> None:
        largest.together()
        if setup.layerwise and any(p.grad is not None for p in model.parameters()):
            raise InputError(
                "with --layerwise the step happens in hooks of its own, which free each gradient, and after backward "
                "there are gradients; leave it out, or register hooks (Tensor.register_post_accumulate_grad_hook)"
            )

    train(Called(model, *loss), inputs, given, meter, setup, context, after_backward)
    known: set[int] = set()
    weights = total(model.parameters(), device, known)
    state = total((t for _, t in tensors(optimizer.state)), device, known)
    return Measured(weights, largest.nbytes, state, {})


def checked(built: Any) -> Built:
    """What `build` returned. Raises `InputError` for anything else."""
    known = isinstance(built, tuple) and len(built) in (3, 4)
    if known and isinstance(built[0], torch.nn.Module) and isinstance(built[1], torch.optim.Optimizer):
        found: Built = built
        return found
    shown = ", ".join(type(one).__name__ for one in built) if isinstance(built, tuple) else type(built).__name__
    raise InputError(
        f"the function must return a torch.nn.Module, a torch.optim.Optimizer and a batch (and a function of output "
        f"and batch that gives the loss, where the model returns none); it returned {shown}"
    )
