"""The two workloads: the optimizer's steps on random gradients, and whole training steps of the real model.

Both run one step that makes the state, a plain one and one that renews projectors, and tell a meter where they are.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from galore_mem.dtypes import DType
from galore_mem.memory.phases import Work
from galore_mem.spec.model import ModelSpec
from galore_mem.verify.builders import Builder, Member, Request, Unsupported
from galore_mem.verify.meters import Meter
from galore_mem.verify.residents import tensors, total

WARM, BETWEEN = "warm-up", "between"  # phases that are not reported


class Measured(NamedTuple):
    """Bytes of what stays, and the optimizer's tensors by parameter and dotted name."""

    weights: int
    gradients: int
    optimizer_state: int
    buffers: dict[tuple[str, str], Tensor]


# -- parameters without a model ----------------------------------------------------------------------


class RandomGradient(torch.autograd.Function):
    """A scalar whose gradient is random: it is made when the backward pass comes to the parameter, and is the only
    reference to its tensor, as that of a model's layer."""

    @staticmethod
    def forward(ctx: Any, p: Tensor) -> Tensor:
        ctx.like = p.shape, p.dtype, p.device
        return torch.zeros((), device=p.device)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        shape, dtype, device = ctx.like
        return torch.empty(shape, dtype=dtype, device=device).normal_(std=1e-3)


def parameters(work: Work, device: torch.device) -> tuple[list[Member], list[Tensor]]:
    """Every stored tensor of the model under the case's implementation: the trained ones with small random values, and
    those that only lie there."""
    trained_ones: list[Member] = []
    frozen: list[Tensor] = []
    for row, number, _ in work.layout().rows(work.model.num_layers):
        for stored, trained in row.tensors:
            if trained is None:
                frozen.append(empty(stored.shape, stored.dtype, device).zero_())
                continue
            p = torch.nn.Parameter(empty(stored.shape, stored.dtype, device))
            with torch.no_grad():
                p.normal_(std=0.02)
            trained_ones.append(Member(replace(trained, name=trained.name.replace("{i}", number)), p))
    return trained_ones, frozen


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
    members, frozen = parameters(work, device)
    largest = Largest(members)
    stepper = Stepper(work, builder, Request(members, work, None))

    def passes() -> None:
        losses = [RandomGradient.apply(m.p) for m in members]  # type: ignore[no-untyped-call]
        torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]

    for phase in stepper.phases():
        if work.setup.layerwise:
            meter.enter(phase)
        passes()
        largest.together(device)
        if not work.setup.layerwise:
            meter.enter(phase)
        stepper.step()
        meter.enter(BETWEEN)
        stepper.zero_grad()
    return stepper.measured([*(m.p for m in members), *frozen], largest.nbytes, device)


# -- real models ---------------------------------------------------------------------------------------


def run_train(work: Work, builder: Builder, device: torch.device, meter: Meter) -> Measured:
    """Forward, backward and step of the transformers model with random weights."""
    meter.enter(WARM)
    model = transformers_model(work).to(device)
    if builder.prepare is not None:
        model = builder.prepare(model, Request((), work, model))
    members = members_of(model, work)
    largest = Largest(members)
    stepper = Stepper(work, builder, Request(members, work, model))
    inputs = batch(work, device)
    autocast = _autocast(work, device)
    gc.collect()
    gc.disable()
    try:
        for phase in stepper.phases():
            plain = phase == "step"
            for micro in range(work.setup.gradient_accumulation):
                del micro
                meter.enter("forward" if plain else WARM)
                with autocast():
                    loss = model(**inputs()).loss
                backward = "refresh" if phase == "refresh" and work.setup.layerwise else "backward"
                meter.enter(backward if plain or backward == "refresh" else WARM)
                loss.backward()
                del loss
            largest.together(device)
            meter.enter(BETWEEN if work.setup.layerwise else phase)
            stepper.step()
            meter.enter(BETWEEN)
            stepper.zero_grad()
    finally:
        gc.enable()
    return stepper.measured(model.parameters(), largest.nbytes, device)


def transformers_model(work: Work) -> torch.nn.Module:
    """The model of a spec, as transformers builds it from the same config. Raises `Unsupported` for shapes alone."""
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForMaskedLM,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
    )
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    spec, setup = work.model, work.setup
    if spec.family is None:
        raise Unsupported("the model's architecture is not known (only tensor shapes); give its config.json")
    config: Any = CONFIG_MAPPING[spec.family](**{k: v for k, v in _config(spec).items() if k != "model_type"})
    head = (config.architectures or ["CausalLM"])[0]
    kinds = {
        "CausalLM": AutoModelForCausalLM, "LMHeadModel": AutoModelForCausalLM, "MaskedLM": AutoModelForMaskedLM,
        "SequenceClassification": AutoModelForSequenceClassification,
        "TokenClassification": AutoModelForTokenClassification,
    }  # fmt: skip
    kind: Any = next((k for name, k in kinds.items() if head.endswith(name)), None)
    if kind is None:
        raise Unsupported(f"{head} has no loss that is verified here")
    model: torch.nn.Module = kind.from_config(config, attn_implementation=setup.attention)
    model = model.to(getattr(torch, setup.recipe.weights.name)).train()
    model.config.use_cache = False  # type: ignore[union-attr]
    if setup.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    return model


def _config(spec: ModelSpec) -> dict[str, Any]:
    return dict(spec.config)


def members_of(model: torch.nn.Module, work: Work) -> list[Member]:
    """The model's trained parameters, each with the ledger's view of it. Raises `Unsupported` where they differ."""
    expected = {
        trained.name.replace("{i}", number): trained
        for row, number, _ in work.layout().rows(work.model.num_layers)
        for _, trained in row.tensors
        if trained is not None
    }
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if expected.keys() != found.keys():
        other = sorted(expected.keys() ^ found.keys())[0]
        raise Unsupported(f"the real model and its spec differ: {other}")
    return [Member(replace(expected[name], name=name), p) for name, p in found.items()]


def batch(work: Work, device: torch.device) -> Callable[[], dict[str, Tensor]]:
    """A function that makes the inputs anew, as a data loader does."""
    vocabulary = int(work.model.config.get("vocab_size", 2))
    shape = work.setup.batch_size, work.setup.seq_len

    def inputs() -> dict[str, Tensor]:
        ids = torch.randint(min(5, vocabulary - 1), vocabulary, shape, device=device)
        return {"input_ids": ids, "labels": ids.clone()}

    return inputs


def _autocast(work: Work, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    fmt = work.setup.recipe.autocast
    if fmt is None:
        return nullcontext
    return lambda: torch.autocast(device.type, getattr(torch, fmt.name))


# -- both ----------------------------------------------------------------------------------------------


class Largest:
    """Bytes of gradients at their fullest: all together after a backward pass, or the largest that was seen alone."""

    def __init__(self, members: Iterable[Member]) -> None:
        self.nbytes = 0
        self._members = list(members)
        for member in self._members:  # before the optimizer's own hooks, which free them
            member.p.register_post_accumulate_grad_hook(self._one)  # type: ignore[no-untyped-call]

    def _one(self, p: Tensor) -> None:
        assert p.grad is not None
        self.nbytes = max(self.nbytes, p.grad.untyped_storage().nbytes())

    def together(self, device: torch.device) -> None:
        """To be called after a backward pass."""
        alive = (m.p.grad for m in self._members if m.p.grad is not None)
        self.nbytes = max(self.nbytes, total(alive, device))


class Stepper:
    """The case's optimizer: one over all parameters, or, of others' in a layer-wise update, one for each."""

    def __init__(self, work: Work, builder: Builder, request: Request) -> None:
        self.work, self.builder, self.request = work, builder, request
        if work.setup.layerwise and not builder.hooks_itself:
            self.optimizers = [self._hooked(member) for member in request.members]
        else:
            self.optimizers = [builder.make(request)]

    def _hooked(self, member: Member) -> Any:
        optimizer = self.builder.make(self.request._replace(members=[member]))

        def hook(p: Tensor) -> None:
            optimizer.step()
            p.grad = None

        member.p.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
        return optimizer

    def phases(self) -> Iterator[str]:
        """What the phase of each step is called."""
        last = self.builder.refresh if self.work.code.refreshes else self.builder.plain
        names = {self.builder.plain: "step", self.builder.refresh: "refresh" if self.work.code.refreshes else WARM}
        for number in range(last + 1):
            yield names.get(number, WARM)

    def step(self) -> None:
        if len(self.optimizers) == 1:
            self.optimizers[0].step()

    def zero_grad(self) -> None:
        for member in self.request.members:
            member.p.grad = None

    def measured(self, weights: Iterable[Any], gradients: int, device: torch.device) -> Measured:
        """What lies there after the last step."""
        known: set[int] = set()
        held = total((t for w in weights for _, t in tensors(w)), device, known)
        buffers = {
            (member.name, name): t
            for optimizer in self.optimizers
            for member in self.request.members
            if member.p in optimizer.state
            for name, t in tensors(optimizer.state[member.p])
        }
        return Measured(held, gradients, total(buffers.values(), device, known), buffers)
