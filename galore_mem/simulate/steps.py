"""What a function of the user's own returned, run: training steps, or forward passes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import chain, repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor

from galore_mem.dtypes import FLOAT32
from galore_mem.errors import InputError
from galore_mem.methods.base import Trained
from galore_mem.setup import Setup
from galore_mem.simulate.outputs import Called, Loss, call
from galore_mem.simulate.result import FIRST, LOAD
from galore_mem.simulate.session import Traced, trace
from galore_mem.spec.model import Role
from galore_mem.verify.builders import Member
from galore_mem.verify.case import WARM
from galore_mem.verify.residents import tensors, total
from galore_mem.verify.workloads import Largest, Marks, Measured, train

FORWARD, STEP = "forward", "step"
# model, optimizer (None: forward only), batch (or a function that makes one anew for each pass), and, where the model
# returns no loss, a function of its output and the batch that does
Built = tuple[Any, ...]
Build = Callable[[], Built]
NO_LEDGER = Trained("", (), FLOAT32, projected=False, role=Role.OTHER, module="")


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
