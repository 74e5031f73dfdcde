"""The two workloads: the optimizer's steps on random gradients, and whole training steps of the real model.

Both run one step that makes the state, a plain one and one that renews projectors, and tell a meter where they are.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from galore_mem.collector import paused
from galore_mem.dtypes import DType
from galore_mem.memory.phases import Work
from galore_mem.methods.base import Stored, Trained
from galore_mem.setup import Setup
from galore_mem.verify.builders import Builder, CannotRun, Member, Request
from galore_mem.verify.case import BETWEEN, WARM
from galore_mem.verify.meters import Meter
from galore_mem.verify.models import autocast, batch, members_of, transformers_model
from galore_mem.verify.residents import storage, tensors, total


class Measured(NamedTuple):
    """Bytes of what stays, and the optimizer's tensors by parameter and dotted name."""

    weights: int
    gradients: int
    optimizer_state: int
    buffers: dict[tuple[str, str], Tensor]


# -- parameters without a model ----------------------------------------------------------------------


class RandomGradient(torch.autograd.Function):
    """An empty tensor whose gradient is random: it is made when the backward pass comes to the parameter, and is the
    only reference to its tensor, as that of a model's layer."""

    @staticmethod
    def forward(ctx: Any, p: Tensor) -> Tensor:
        ctx.like = p.shape, p.dtype, p.device
        return torch.zeros(0, device=p.device)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        shape, dtype, device = ctx.like
        return torch.empty(shape, dtype=dtype, device=device).normal_(std=1e-3)


def parameters(work: Work, builder: Builder, device: torch.device) -> tuple[list[Member], list[Tensor]]:
    """Every stored tensor of the model under the case's implementation: the trained ones with small random values, and
    those that only lie there."""
    trained_ones: list[Member] = []
    frozen: list[Tensor] = []
    for row, number, _ in work.layout().rows(work.model.num_layers):
        coded = False  # a parameter of codes brings the scales and zeros that follow it
        for stored, trained in row.tensors:
            if trained is None:
                if not coded:
                    frozen.append(empty(stored.shape, stored.dtype, device).zero_())
                continue
            coded = stored.grad != stored.dtype
            p = coded_parameter(stored, builder, device) if coded else random_parameter(stored, device)
            trained_ones.append(Member(numbered(trained, number), p))
    return trained_ones, frozen


def numbered(trained: Trained, number: str) -> Trained:
    return replace(trained, name=trained.name.replace("{i}", number))


def random_parameter(stored: Stored, device: torch.device) -> Tensor:
    return torch.nn.Parameter(random(stored.shape, stored.dtype, device))


def coded_parameter(stored: Stored, builder: Builder, device: torch.device) -> Tensor:
    """What stands for a float matrix. Raises `CannotRun` where the builder does not say."""
    if builder.coded is None or stored.grad is None:
        raise CannotRun(f"a weight stored as {stored.dtype.name} needs the train workload")
    made: Tensor = builder.coded(random(stored.shape, stored.grad, device))
    return made


def random(shape: tuple[int, ...], fmt: DType, device: torch.device) -> Tensor:
    return empty(shape, fmt, device).normal_(std=0.02)


def empty(shape: tuple[int, ...], fmt: DType, device: torch.device) -> Tensor:
    """A tensor of a format; packed ones are bytes."""
    dtype = getattr(torch, fmt.name, None)
    if dtype is None:
        return torch.empty(fmt.nbytes(shape), dtype=torch.uint8, device=device)
    return torch.empty(shape, dtype=dtype, device=device)


def run_optimizer(work: Work, builder: Builder, device: torch.device, meter: Meter) -> Measured:
    """The optimizer's steps over all parameters. Of a layer-wise update, which happens in the backward pass, that pass
    is what is measured."""
    meter.enter(WARM)
    members, frozen = parameters(work, builder, device)
    beside = [m.p for m in members if not m.p.requires_grad]
    if beside and work.setup.layerwise:
        raise CannotRun("its gradients are not autograd's: there is no backward pass that could step")
    largest = Largest(members, device)
    stepper = Stepper(work, builder, Request(members, work, None))

    def passes() -> None:
        for p in beside:
            p.float_grad = random(p.shape, work.job.recipe.weights, device)  # type: ignore[attr-defined]  # q-galore-torch's name
        losses = [RandomGradient.apply(m.p) for m in members if m.p.requires_grad]  # type: ignore[no-untyped-call]  # torch has no types for it
        torch.cat(losses).sum().backward()

    for phase in stepper.phases():
        if work.setup.layerwise:
            meter.enter(phase)
        passes()
        largest.together()
        if not work.setup.layerwise:
            meter.enter(phase)
        stepper.step()
        meter.enter(BETWEEN)
        stepper.zero_grad()
    return stepper.measured([*(m.p for m in members), *frozen], largest.nbytes, device)


# -- real models ---------------------------------------------------------------------------------------


def run_train(work: Work, builder: Builder, device: torch.device, meter: Marks) -> Measured:
    """Forward, backward and step of the transformers model with random weights."""
    meter.enter(WARM)
    with builder.making():
        model = transformers_model(work, device)
    if builder.prepare is not None:
        model = builder.prepare(model, work)
    members = members_of(model, work)
    largest = Largest(members, device)
    stepper = Stepper(work, builder, Request(members, work, model))
    train(model, batch(work, device), stepper, meter, work.setup, autocast(work, device), largest.together)
    return stepper.measured(model.parameters(), largest.nbytes, device)


class Marks(Protocol):
    """What is told where phases begin: a meter."""

    def enter(self, phase: str) -> None: ...


class Stepping(Protocol):
    """What steps: the phase of each step, the step, and what follows it."""

    def phases(self) -> Iterator[str]: ...

    def step(self) -> None: ...

    def zero_grad(self) -> None: ...


def train(
    model: Any,
    inputs: Callable[[], Mapping[str, Any]],
    stepper: Stepping,
    meter: Marks,
    setup: Setup,
    context: Callable[[], AbstractContextManager[Any]],
    after_backward: Callable[[], None] = lambda: None,
) -> None:
    """The training loop. The collector, which would free what reference counts do not, rests."""
    gc.collect()
    held: list[Any] = []  # what forward returned, as long as the setup's loop keeps it
    with paused():
        for phase in stepper.phases():
            plain = phase == "step"
            for micro in range(setup.gradient_accumulation):
                del micro
                meter.enter("forward" if plain else WARM)
                if setup.keep_logits != "next":
                    held.clear()
                with context():
                    made = model(**inputs())
                held[:] = [made]
                del made
                loss = held[0].loss
                if setup.keep_logits == "none":
                    held.clear()
                backward = "refresh" if phase == "refresh" and setup.layerwise else "backward"
                meter.enter(backward if plain or backward == "refresh" else WARM)
                loss.backward()
                del loss
                if setup.keep_logits == "backward":
                    held.clear()
                after_backward()
            meter.enter(BETWEEN if setup.layerwise else phase)
            stepper.step()
            meter.enter(BETWEEN)
            stepper.zero_grad()
            if setup.keep_logits != "next":
                held.clear()


# -- both ----------------------------------------------------------------------------------------------


class Largest:
    """Bytes of gradients at their fullest: all together after a backward pass, or the largest that was seen alone."""

    def __init__(self, members: Iterable[Member], device: torch.device) -> None:
        self.nbytes = 0
        self._device = device
        self._members = list(members)
        for member in self._members:  # before the optimizer's own hooks, which free them
            if not member.p.requires_grad:
                continue  # its gradient is put beside it
            member.p.register_post_accumulate_grad_hook(self._one)

    def _one(self, p: Tensor) -> None:
        assert p.grad is not None
        self.nbytes = max(self.nbytes, p.grad.untyped_storage().nbytes())

    def together(self) -> None:
        """To be called after a backward pass."""
        alive = (gradient(m.p) for m in self._members)
        self.nbytes = max(self.nbytes, total((g for g in alive if g is not None), self._device))


def gradient(p: Any) -> Tensor | None:
    """A parameter's gradient, wherever its optimizer looks for it."""
    found: Tensor | None = p.grad if p.requires_grad else p.float_grad
    return found


class Stepper:
    """The case's optimizer: one over all parameters, or, of others' in a layer-wise update, one for each."""

    def __init__(self, work: Work, builder: Builder, request: Request) -> None:
        self.work, self.builder, self.request = work, builder, request
        self.hooked = work.setup.layerwise and not builder.hooks_itself
        if self.hooked:
            self.optimizers = [self._hooked(member) for member in request.members]
        else:
            self.optimizers = [builder.make(request)]

    def _hooked(self, member: Member) -> Any:
        optimizer = self.builder.make(self.request._replace(members=[member]))

        def hook(p: Tensor) -> None:
            optimizer.step()
            p.grad = None

        member.p.register_post_accumulate_grad_hook(hook)
        return optimizer

    def phases(self) -> Iterator[str]:
        """What the phase of each step is called."""
        names = {self.builder.plain: "step"}
        if self.work.code.refreshes and self.builder.refresh is not None:
            names[self.builder.refresh] = "refresh"
        for number in range(max(2, *names) + 1 + self.builder.settle):
            yield names.get(number, WARM)

    def step(self) -> None:
        if not self.hooked:
            self.optimizers[0].step()

    def zero_grad(self) -> None:
        for member in self.request.members:
            if member.p.requires_grad and not self.work.setup.keep_gradients:
                member.p.grad = None
            elif member.p.requires_grad:
                if member.p.grad is not None:
                    member.p.grad.zero_()
            else:
                member.p.float_grad = None  # type: ignore[attr-defined]  # q-galore-torch's name

    def measured(self, weights: Iterable[Any], gradients: int, device: torch.device) -> Measured:
        """What lies there after the last step."""
        known: set[int] = set()
        held = total((t for w in weights for _, t in (*tensors(w), *tensors(vars(w)))), device, known)
        buffers = {
            (member.name, name): t
            for optimizer in self.optimizers
            for member in self.request.members
            if member.p in optimizer.state
            for name, t in tensors(optimizer.state[member.p])
        }
        seen = {storage(t)[0] for t in buffers.values()} | known
        model = () if self.request.model is None else self.request.model.modules()
        owners = [m.name for m in self.request.members] if self.hooked else ["(optimizer)"]
        for owner, optimizer in zip(owners, self.optimizers, strict=True):
            for name, t in tensors(vars(optimizer), without=model):
                if storage(t)[0] not in seen and not isinstance(t, torch.nn.Parameter):
                    buffers[owner, name] = t
        return Measured(held, gradients, total(buffers.values(), device, known), buffers)
