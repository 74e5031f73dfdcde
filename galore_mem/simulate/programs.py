"""Whole programs of the user's own, run on the simulated device, in the phases that they name or that their calls
tell."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook

from galore_mem.errors import InputError
from galore_mem.memory.tensor import CATEGORIES, GRADIENTS, OPTIMIZER_STATE, WEIGHTS
from galore_mem.setup import Setup
from galore_mem.simulate.result import LOAD
from galore_mem.simulate.session import Traced, TraceMeter, trace
from galore_mem.simulate.steps import FORWARD, STEP, checked, run_returned
from galore_mem.simulate.subjects.load import UserStep
from galore_mem.simulate.trace import Trace
from galore_mem.simulate.tracing.places import Mixed, Places
from galore_mem.verify.workloads import Marks, Measured

BACKWARD, PROGRAM = "backward", "program"
# of a setup, what a whole program decides itself
LOOP = ("layerwise", "keep_gradients", "keep_logits", "gradient_accumulation", "use_cache")


class Marker:
    """What a program tells its phases: `phase("forward")`, until the next, or `with phase("forward"):`."""

    def __init__(self, meter: Marks) -> None:
        self._meter = meter
        self.now = LOAD

    def __call__(self, name: str) -> AbstractContextManager[None]:
        if not isinstance(name, str) or not name.strip():
            raise InputError(f"phase is called with a name, as phase('forward'); it was given {name!r}")
        before = self.now
        self.enter(name)
        return self._until(before)

    def enter(self, name: str) -> None:
        if name != self.now:
            self.now = name
            self._meter.enter(name)

    @contextmanager
    def _until(self, before: str) -> Iterator[None]:
        try:
            yield
        finally:
            self.enter(before)


def is_program(made: Any) -> bool:
    """Is this a program to be called?"""
    return callable(made) and not isinstance(made, torch.nn.Module | type)


def takes_marker(function: Callable[..., Any], *, named: bool) -> bool:
    """Does a function take the marker: has it a parameter called `phase`, or, unless it must be `named`, any that has
    to be given?"""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False
    if "phase" in parameters:
        return True
    return not named and any(
        p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters.values()
    )


def run_program(program: Callable[..., Any], marker: Marker) -> None:
    """Runs a whole program. One that takes no marker is in the phase of its last call: of a model, of backward, of an
    optimizer."""
    if takes_marker(program, named=False):
        marker.enter(PROGRAM)
        program(marker)
        return
    with told_by_calls(marker):
        program()


@contextmanager
def told_by_calls(marker: Marker) -> Iterator[None]:
    """The phases of a program that names none: that of its last call of a module, of backward, of an optimizer."""
    backward = torch.autograd.backward

    def called(module: torch.nn.Module, given: Any) -> None:
        if torch._C._current_graph_task_id() == -1:  # (a checkpoint's pass is of backward)
            marker.enter(FORWARD)

    def noticed(*args: Any, **kwargs: Any) -> None:
        marker.enter(BACKWARD)
        backward(*args, **kwargs)

    hooks = register_module_forward_pre_hook(called), register_optimizer_step_pre_hook(lambda *_: marker.enter(STEP))
    try:
        with patch.object(torch.autograd, "backward", noticed):
            yield
    finally:
        for hook in hooks:
            hook.remove()


UNNAMED = "it names no device, so what it makes is taken to be on the card"


class Unnamed(Exception):  # noqa: N818  # a turn, not a failure
    """A program that names no device cannot be run as if there were two."""


@dataclass
class Own:
    """A run of what `module:function` names. `warm`: steps before the one that is looked at, where there are such (1);
    `default`: where what names no device is made (None: in host memory, beside a card)."""

    step: UserStep
    setup: Setup
    warm: int | None
    default: torch.device | None = None
    whole: bool = False
    passes: bool = False
    used: bool | None = None  # has the function put something on the card?
    compiled: bool = False

    def run(self, meter: TraceMeter) -> Measured | None:
        """Runs it, and returns what `verify` would have found (None: of a whole program). Raises `Unnamed` for one that
        names no device and misses what it made."""
        assert meter.places is not None
        meter.enter(LOAD)
        try:
            with self.default or nullcontext():
                return self._run(meter, meter.places)
        except Mixed as error:
            if self.default is not None or (meter.places.used if self.used is None else self.used):
                raise
            raise Unnamed from error
        finally:
            self.compiled = meter.places.compiled

    def _run(self, meter: TraceMeter, places: Places) -> Measured | None:
        marker = Marker(meter)
        if takes_marker(self.step.function, named=True):
            made = self.step.call(marker)
        else:
            with told_by_calls(marker):
                made = self.step.call()
        self.used = places.used
        if made is None or is_program(made):
            self.whole = True
            check_loop(self.setup, self.warm)
            if made is not None:
                run_program(made, marker)
            meter.label_states()
            self.step.ran(meter.models, meter.optimizers)
            if not places.used:
                raise Unnamed
            return None
        built = checked(made)
        del made
        self.step.returned(*built[:2])
        self.whole = self.passes = built[1] is None
        meter.restart()
        warm = 1 if self.warm is None else self.warm
        return run_returned(built, self.setup, warm, torch.device(self.setup.device), meter)


def trace_own(step: UserStep, setup: Setup, warm: int | None) -> Traced:
    """What `module:function` names, traced. Raises `InputError`."""
    own = Own(step, setup, warm)
    try:
        found = trace(own.run, setup, own=True)
    except Unnamed:
        own = Own(step, setup, warm, torch.device(setup.device))
        try:
            found = trace(own.run, setup, own=True)
        except Unnamed:
            raise InputError("it puts nothing on the device: there is nothing to simulate") from None
        found = replace(found, notes=(*found.notes, UNNAMED))
    step.told["compiled"] |= own.compiled
    if not own.whole:
        return found
    return replace(found, whole=True, passes=own.passes, measured=residents(found.trace))


def residents(found: Trace) -> Measured:
    """Bytes of a program's weights, gradients and optimizer states, each at its fullest."""
    exact = replace(found, granularity=1)
    most = [0] * len(CATEGORIES)
    for _, _, live in exact.moments():
        most = [max(pair) for pair in zip(most, live, strict=True)]
    return Measured(most[WEIGHTS], most[GRADIENTS], most[OPTIMIZER_STATE], {})


def check_loop(setup: Setup, warm: int | None) -> None:
    """Raises `InputError` where options say what a whole program decides itself."""
    default = Setup()
    given = [name for name in LOOP if getattr(setup, name) != getattr(default, name)]
    given += ["warm_up"] if warm is not None else []
    given += ["recipe"] if setup.recipe.autocast is not None else []
    if given:
        raise InputError(f"the program runs its own loop; leave out --{given[0].replace('_', '-')}")
