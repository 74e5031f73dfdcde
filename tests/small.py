"""A few parameters of every kind, gradients for them, and training steps with our optimizers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from low_rank import Param
from ours import OURS, Named, Ours

from galore_mem.errors import InputError
from galore_mem.optim import LayerWise, ParameterWise
from galore_mem.optim.adam_mini import Partitioned
from galore_mem.optim.projected import Projected

RANK, GAP, LR = 6, 3, 0.01
FORMATS = ("float32", "bfloat16", "float16")
# Projected: tall with heads of 8 rows, tall, wide, square. The others: a matrix, and vectors. Two matrices have
# 4096 low-rank elements or more (704 · 6), and one not projected has 64 · 72: enough for 8-bit moments.
PARAMS = (
    Param((64, 72), False, "embed.weight"), Param((16, 72), True, "q_proj.weight"), Param((16,), False, "q_proj.bias"),
    Param((704, 16), True, "up_proj.weight"), Param((24, 704), True, "down_proj.weight"),
    Param((12, 12), True, "o_proj.weight"), Param((72,), False, "norm.weight"),
)  # fmt: skip
Gradients = Mapping[str, torch.Tensor]
Trained = tuple[Named, ParameterWise]


def row(name: str) -> Ours:
    """The row of the table with this name."""
    return next(ours for ours in OURS if str(ours) == name)


def decomposes(ours: Ours) -> bool:
    """Does it find projectors of gradients, with the options that go with that?"""
    return issubclass(ours.made, Projected)


def sums_low_rank(ours: Ours) -> bool:
    """Are micro-batches summed in the low-rank space? Not where a mean of squares needs the whole gradient."""
    partitioned = issubclass(ours.made, Partitioned) and ours.arguments.get("approach") != 1
    return decomposes(ours) and not partitioned


def dtype(fmt: str) -> torch.dtype:
    found: torch.dtype = getattr(torch, fmt)
    return found


def parameters(fmt: str = "float32", seed: int = 0) -> Named:
    made = torch.Generator().manual_seed(seed)
    return [(p.name, torch.nn.Parameter(torch.randn(p.shape, generator=made).to(dtype(fmt)))) for p in PARAMS]


@cache
def _drawn(number: int, fmt: str) -> dict[str, torch.Tensor]:
    fixed, own = torch.Generator().manual_seed(77), torch.Generator().manual_seed(1000 + number)
    made = {}
    for p in PARAMS:
        stays = torch.randn(p.shape, generator=fixed)
        made[p.name] = (stays + 0.5 * torch.randn(p.shape, generator=own)).to(dtype(fmt))
    return made


def gradients(number: int, fmt: str = "float32") -> dict[str, torch.Tensor]:
    """Those of one backward pass, each around a direction that stays, so that adjacent projectors resemble."""
    return {name: grad.clone() for name, grad in _drawn(number, fmt).items()}


def push(named: Named, grads: Gradients) -> None:
    """A backward pass that adds exactly these gradients: d/dp of sum(p·g) is g."""
    sum((p * grads[name]).sum() for name, p in named if name in grads).backward()  # type: ignore[union-attr]  # a sum of tensors


def build(ours: Ours, named: Named, layerwise: LayerWise | None = None, **options: Any) -> ParameterWise:
    """The optimizer; `options` are of the projected group, and left out where there is none."""
    projected = {p.name for p in PARAMS if p.projected}
    regular = [(name, p) for name, p in named if name not in projected]
    low = [(name, p) for name, p in named if name in projected]
    made = {"lr": options.pop("lr", LR)}
    if ours.projects:
        made |= {"rank": RANK, **ours.every(GAP), **options}
    return ours.build(regular, low, layerwise, **made)


def made(ours: Ours, layerwise: LayerWise | None = None, fmt: str = "float32", **options: Any) -> Trained:
    """Parameters and their optimizer."""
    named = parameters(fmt)
    return named, build(ours, named, layerwise, **options)


def train(
    named: Named,
    optimizer: ParameterWise,
    steps: range,
    fmt: str = "float32",
    micro: int = 1,
    before_step: Callable[[], object] = lambda: None,
) -> None:
    """Some steps, each after `micro` backward passes; `before_step` runs between the last of them and `step()`."""
    for step in steps:
        for i in range(micro):
            push(named, gradients(step * micro + i, fmt))
        before_step()
        optimizer.step()
        optimizer.zero_grad()


def values(named: Named) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in named}


def plain(value: Any) -> Any:
    """Nested containers as they compare: tensors as format, shape and bits."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.detach().flatten().view(torch.uint8).numpy().tobytes()
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return value


def snapshot(named: Named, optimizer: torch.optim.Optimizer) -> Any:
    """Parameters, states, options and counts, to the bit."""
    return plain({"weights": values(named), **optimizer.state_dict()})


@contextmanager
def refused(named: Named, optimizer: torch.optim.Optimizer, message: str) -> Iterator[None]:
    """An `InputError` of one line that matches, and nothing has changed."""
    before = snapshot(named, optimizer)
    with pytest.raises(InputError, match=message) as caught:
        yield
    assert "\n" not in str(caught.value)
    assert snapshot(named, optimizer) == before


def goes_on(ours: Ours, named: Named, optimizer: ParameterWise, steps: range) -> None:
    """Continues, and ends where an optimizer ends that nobody has disturbed."""
    optimizer.zero_grad()
    train(named, optimizer, steps)
    twin = parameters()
    undisturbed = build(ours, twin)
    train(twin, undisturbed, range(steps.stop))
    assert snapshot(named, optimizer) == snapshot(twin, undisturbed)
