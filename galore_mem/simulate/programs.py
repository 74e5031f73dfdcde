"""Programs of the user's own, run on the simulated device: a training step of what a function returned, a forward pass,
or a whole program, with the phases that it names or that its calls tell."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, repeat
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook

from galore_mem.dtypes import FLOAT32
from galore_mem.errors import InputError
from galore_mem.memory.tensor import CATEGORIES, GRADIENTS, OPTIMIZER_STATE, WEIGHTS
from galore_mem.methods.base import Trained
from galore_mem.setup import Setup
from galore_mem.simulate.outputs import Called, Loss, call
from galore_mem.simulate.result import FIRST, LOAD
from galore_mem.simulate.session import Traced, TraceMeter, trace
from galore_mem.simulate.subjects.load import UserStep
from galore_mem.simulate.trace import Trace
from galore_mem.simulate.tracing.places import Mixed, Places
from galore_mem.spec.model import Role
from galore_mem.verify.builders import Member
from galore_mem.verify.case import WARM
from galore_mem.verify.residents import tensors, total
from galore_mem.verify.workloads import Largest, Marks, Measured, train

FORWARD, BACKWARD, STEP, PROGRAM = "forward", "backward", "step", "program"
# model, optimizer (None: forward only), batch (or a function that makes one anew for each pass), and, where the model
# returns no loss, a function of its output and the batch that does
Built = tuple[Any, ...]
Build = Callable[[], Built]
NO_LEDGER = Trained("", (), FLOAT32, projected=False, role=Role.OTHER, module="")
# of a setup, what a whole program decides itself
LOOP = ("layerwise", "keep_gradients", "keep_logits", "gradient_accumulation", "use_cache")


# -- what a function returned --------------------------------------------------------------------------


class Given(NamedTuple):
    """An optimizer that is there, and how many steps it is run before the one that is looked at."""

    optimizer: torch.optim.Optimizer
    setup: Setup
    warm: int

    def phases(self) -> Iterator[str]:
        yield from [WARM] * self.warm
        yield STEP

    def step(self) -> None:
        if not self.setup.layerwise:
            self.optimizer.step()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=not self.setup.keep_gradients)


def run_step(build: Build, setup: Setup, warm: int, device: torch.device, meter: Marks) -> Measured:
    """A training step in steady state of what `build` returns (`run_returned`)."""
    meter.enter(LOAD)
    return run_returned(checked(build()), setup, warm, device, meter)


def run_returned(built: Built, setup: Setup, warm: int, device: torch.device, meter: Marks) -> Measured:
    """A training step in steady state of any model, optimizer and batch, on a device; or, without an optimizer, a
    forward pass. What was made elsewhere is put there, batches as each is needed, as a Trainer does. Raises
    `InputError`."""
    model, optimizer, batch, *loss = built
    with torch.no_grad():
        model.to(device)

    make = loaded(batch) if isinstance(batch, torch.utils.data.DataLoader) else batch

    def inputs() -> dict[str, Any]:
        return {"batch": put(make() if callable(make) else make, device)}

    fmt = setup.recipe.autocast
    context = nullcontext if fmt is None else partial(torch.autocast, device.type, getattr(torch, fmt.name))
    known: set[int] = set()
    if optimizer is None:
        run_forward(model, inputs, *loss, setup=setup, warm=warm, meter=meter, context=context)
        return Measured(total(model.parameters(), device, known), 0, 0, {})
    with torch.no_grad():
        for state in optimizer.state.values():
            state.update(put(dict(state), device))
    largest = Largest([Member(NO_LEDGER, p) for p in model.parameters() if p.requires_grad], device)
    given = Given(optimizer, setup, warm)

    def after_backward() -> None:
        largest.together()
        if setup.layerwise and not setup.waits and any(p.grad is not None for p in model.parameters()):
            raise InputError(
                "with --layerwise the step happens in hooks of its own, which free each gradient, and after backward "
                "there are gradients; leave it out, or register hooks (Tensor.register_post_accumulate_grad_hook)"
            )

    train(Called(model, *loss), inputs, given, meter, setup, context, after_backward)
    weights = total(model.parameters(), device, known)
    state = total((t for _, t in tensors(optimizer.state)), device, known)
    return Measured(weights, largest.nbytes, state, {})


def trace_step(build: Build, setup: Setup, warm: int = 1) -> Traced:
    """A training step in steady state, traced (`run_step`)."""
    return trace(lambda meter: run_step(build, setup, warm, torch.device(setup.device), meter), setup, own=True)


def run_forward(
    model: torch.nn.Module, inputs: Callable[[], dict[str, Any]], loss: Loss | None = None, *, setup: Setup,
    warm: int, meter: Marks, context: Callable[[], AbstractContextManager[Any]],
) -> None:  # fmt: skip
    """Forward passes without gradients. What one returned goes at its end, or, if the setup keeps it until the next,
    when that has returned its own."""
    decides = [name for name in ("layerwise", "keep_gradients") if getattr(setup, name)]
    if decides or setup.gradient_accumulation > 1:
        raise InputError(
            f"there is no optimizer, so only forward passes run; leave out "
            f"--{(decides or ['gradient_accumulation'])[0].replace('_', '-')}"
        )
    held: list[Any] = []
    for number in range(warm + 1):
        meter.enter(FIRST if number < warm else FORWARD)
        with torch.no_grad(), context():
            batch = inputs()["batch"]
            output = call(model, batch)
            held[:] = [output, None if loss is None else loss(output, batch)]
            del batch, output
        if setup.keep_logits != "next":
            held.clear()


def checked(built: Any) -> Built:
    """What `build` returned. Raises `InputError` for anything else."""
    known = isinstance(built, tuple) and len(built) in (3, 4)
    if known and isinstance(built[0], torch.nn.Module) and isinstance(built[1], torch.optim.Optimizer | None):
        if isinstance(built[1], torch.optim.Optimizer):
            check_steps(built[0], built[1])
        return tuple(built)
    shown = ", ".join(type(one).__name__ for one in built) if isinstance(built, tuple) else type(built).__name__
    raise InputError(
        f"the function must return a torch.nn.Module, a torch.optim.Optimizer (or None: forward only) and a batch (and "
        f"a function of output and batch that gives the loss, where the model returns none), or a program to call; it "
        f"returned {shown}"
    )


def check_steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raises `InputError` where the training loop's `optimizer.step()` would not do."""
    name = type(optimizer).__name__
    _, *given = inspect.signature(type(optimizer).step).parameters.values()  # (a scheduler wraps the optimizer's own)
    needed = [p.name for p in given if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if needed:
        raise InputError(
            f"{name}.step takes {', '.join(needed)}, which the training loop does not give; return a program that runs "
            f"its own loop"
        )
    if isinstance(optimizer, torch.optim.SparseAdam) or any(getattr(m, "sparse", False) for m in model.modules()):
        raise InputError("sparse gradients are not followed; use dense ones (sparse=False, and another optimizer)")


def loaded(loader: Iterable[Any]) -> Callable[[], Any]:
    """A function that gives a loader's batches, from the start again after the last."""
    batches = chain.from_iterable(repeat(loader))
    return lambda: next(batches)


def put(value: Any, device: torch.device) -> Any:
    """A batch, or what is like one, on the device: all tensors in mappings and sequences."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        moved = {key: put(one, device) for key, one in value.items()}
        return moved if type(value) is dict else type(value)(moved)  # type: ignore[call-arg]  # as mappings are made
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(put(one, device) for one in value))
    return type(value)(put(one, device) for one in value) if type(value) in (list, tuple) else value


# -- whole programs ------------------------------------------------------------------------------------


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
