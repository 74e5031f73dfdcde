"""Whole simulations: the trace of a training run with every layer, from shallow models where layers repeat."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn
from torch.optim import Optimizer

from galore_mem.memory.phases import Work
from galore_mem.methods.registry import method
from galore_mem.setup import Setup
from galore_mem.simulate.depths import Pattern, pattern
from galore_mem.simulate.repeat import LAYER, Affine, Unlike, repeated
from galore_mem.simulate.session import Told, Traced, trace_work
from galore_mem.simulate.subjects.models import Stack, built, spec_of, stack_of, with_layers, work_of
from galore_mem.verify.builders import Builder, Request, builder
from galore_mem.verify.case import BETWEEN
from galore_mem.verify.workloads import Measured

ATTEMPTS = 2  # how often with more layers, where what a layer adds was not found
WHOLE = "every layer was traced"
GROUPED = ("aten._grouped_mm", "transformers.grouped_mm")
EXPERTS = "experts: all tokens' rows go through products of groups, so which experts they choose changes no size"
Factory = Callable[[nn.Module], Optimizer]


def trace_layers(work: Work, row: Builder, *, full: bool = False, told: Told = lambda what: None) -> Traced:
    """The training steps of `galore-mem verify` for a model, a method and an implementation. `full`: every layer runs;
    otherwise as few as show what the others do, which the result says (`layers`, `notes`). `told` hears what begins.
    Raises `InputError`, and `CannotRun` for what cannot be built."""
    stack = stack_of(built(work))
    count, why = len(stack.layers), ""
    if not full:
        try:
            return _from_shallow(work, row, stack, told)
        except Unlike as reason:
            why = f"; {reason}"
    what = f"{count} layers" if count else "the model"
    return _noted(trace_work(work, row, _within(what, told)), (count,) if count else (), WHOLE + why)


def _within(what: str, told: Told) -> Told:
    """Tells phases of what is traced; what is between them has no name of its own."""
    return lambda phase: None if phase == BETWEEN else told(f"{what}, {phase}")


def from_config(
    config: Mapping[str, Any], setup: Setup, optimizer: str | Factory = "adamw", implementation: str | None = None,
    hyperparameters: Mapping[str, Any] | None = None, *, full: bool = False,
) -> Traced:  # fmt: skip
    """A training run of any language model that transformers has, from the keys of its config.json. `optimizer` is a
    method of the registry, with one of its implementations and its hyperparameters, or makes one for a model."""
    spec = spec_of(config, str(config.get("model_type")))
    if not isinstance(optimizer, str):
        row = Builder(partial(_made, optimizer), refresh=None)
        return trace_layers(work_of(spec, setup, "adamw"), row, full=full)
    code = method(optimizer).implementation(implementation).name
    work = work_of(spec, setup, optimizer, code, hyperparameters)
    return trace_layers(work, builder(optimizer, code), full=full)


def _made(factory: Factory, request: Request) -> Optimizer:
    assert request.model is not None
    return factory(request.model)


def _from_shallow(work: Work, row: Builder, stack: Stack, told: Told) -> Traced:
    """From three shallow models. Raises `Unlike` where they do not show the rest."""
    found = pattern(stack.kinds(stack.numbers()))
    if found is None:
        raise Unlike("too few layers are alike for shallower models to show the rest")
    known: dict[int, Traced] = {}
    problem = Unlike()
    for more in range(ATTEMPTS):
        if not found.pays(more):
            break
        depths = found.depths(more)
        for periods in depths:
            if periods not in known:
                kept = found.kept(periods)
                what = _within(f"{len(kept)} of {len(stack.layers)} layers", told)
                known[periods] = trace_work(_shallow(work, stack, kept), row, what)
        try:
            return _deeper(found, depths, [known[periods] for periods in depths])
        except Unlike as reason:
            problem = reason
    raise problem


def _shallow(work: Work, stack: Stack, kept: Sequence[int]) -> Work:
    """The same training run of a model with some of the layers. Raises `Unlike` where it has others."""
    shallow = work._replace(model=with_layers(work.model, kept))
    numbers, kinds = stack.numbers(), stack.kinds(stack.numbers())
    if stack_of(built(shallow)).kinds(numbers) != [kinds[i] for i in kept]:
        raise Unlike("a shallower model has other layers")
    return shallow


def _deeper(found: Pattern, depths: Sequence[int], traces: Sequence[Traced]) -> Traced:
    steps = found.periods - depths[0]
    trace = repeated([one.trace for one in traces], steps)
    sizes = zip(*(one.measured[:3] for one in traces), strict=True)
    weights, gradients, state = (Affine.of_all(three).at(steps, 0) for three in sizes)
    layers = tuple(len(found.kept(periods)) for periods in depths)
    added = "a layer adds" if found.period == 1 else f"{found.period} layers add"
    how = f"{found.layers} layers, from traces of {layers[0]}, {layers[1]} and {layers[2]}, which show what {added}"
    assumed = tuple(dict.fromkeys(value for one in traces for value in one.assumed))
    operations = sum(one.operations for one in traces)
    return _noted(Traced(trace, assumed, operations, Measured(weights, gradients, state, {})), layers, how)


def _noted(traced: Traced, layers: tuple[int, ...], how: str) -> Traced:
    """With what was taken for granted where layers, or values, could have decided otherwise."""
    assumed = dict.fromkeys(value._replace(module=LAYER.sub("{i}", value.module)) for value in traced.assumed)
    notes = (how, EXPERTS) if any(one.op.startswith(GROUPED) for one in traced.trace.allocations) else (how,)
    return replace(traced, assumed=tuple(assumed), layers=layers, notes=notes)
