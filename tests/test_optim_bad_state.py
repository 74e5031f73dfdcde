"""States that do not fit the optimizer that loads them: it is as it was, and goes on as if nothing had happened."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from ours import OURS, Ours
from small import (
    GAP,
    RANK,
    build,
    goes_on,
    gradients,
    parameters,
    push,
    refused,
    row,
    train,
)

from galore_mem.optim import LayerWise

GALORE = row("galore")


# -- loading ---------------------------------------------------------------------------------------


@cache
def state_of(name: str) -> dict[str, Any]:
    """What a row of the table saves after two steps."""
    named = parameters()
    optimizer = build(row(name), named)
    train(named, optimizer, range(2))
    return optimizer.state_dict()


def without(state: dict[str, Any], *names: str) -> dict[str, Any]:
    for kept in state["state"].values():
        for name in names:
            kept.pop(name, None)
    return state


def regrouped(state: dict[str, Any]) -> dict[str, Any]:
    state["param_groups"][0]["params"].append(state["param_groups"][1]["params"].pop())
    return state


def low_key(state: dict[str, Any]) -> int:
    """The number of the wide projected matrix."""
    return next(k for k, kept in state["state"].items() if tuple(kept["exp_avg"].shape) == (RANK, 704))


def changed(state: dict[str, Any], name: str, to: Any) -> dict[str, Any]:
    state["state"][low_key(state)][name] = to
    return state


LOADED: dict[str, tuple[Any, str]] = {
    "not a state": (lambda s: {"a.weight": torch.zeros(2)}, "not the state of an optimizer; it has a.weight"),
    "empty": (lambda s: {}, "not the state of an optimizer; it has nothing"),
    "no groups": (lambda s: {"state": s["state"]}, "not the state of an optimizer"),
    "fewer groups": (lambda s: {**s, "param_groups": s["param_groups"][:1]}, "1 parameter groups, and the optimizer 2"),
    "other groups": (regrouped, r"group 0: 4 parameters in the state, and 3 here"),
    "a tensor less": (lambda s: without(s, "exp_avg"), r"\w+\.\w+: the state has no 'exp_avg'"),
    "no projector": (lambda s: without(s, "projector"), r"_proj.weight: the state has no 'projector'"),
    "no steps": (lambda s: without(s, "step"), r"this is no state of GaLoreAdamW, which counts steps under 'step'"),
    "one more": (
        lambda s: changed(s, "ema", torch.ones(1)),
        r"^down_proj.weight: the state has 'ema', which GaLoreAdamW",
    ),
    "another shape": (
        lambda s: changed(s, "exp_avg", torch.zeros(6, 705)),
        r"^down_proj.weight: its exp_avg is \(6, 705\) in the state, and \(6, 704\) here$",
    ),
    "another format": (
        lambda s: changed(s, "exp_avg", torch.zeros(6, 704, dtype=torch.uint8)),
        r"^down_proj.weight: its exp_avg is torch.uint8 in the state, and torch.float32 here$",
    ),
    "a spoilt option": (
        lambda s: s["param_groups"][1].update(update_proj_gap=0) or s,
        "^group 1 of the state: update_proj_gap must be",
    ),
    "a spoilt rank": (lambda s: s["param_groups"][1].update(rank="6") or s, "^group 1 of the state: rank must be"),
}


@pytest.mark.parametrize("layerwise", [None, LayerWise()], ids=["step", "layer-wise"])
@pytest.mark.parametrize("case", LOADED)
def test_a_state_that_does_not_fit(case: str, layerwise: LayerWise | None) -> None:
    change, message = LOADED[case]
    named = parameters()
    optimizer = build(GALORE, named, layerwise)
    train(named, optimizer, range(GAP - 1))
    spoilt = change(copy.deepcopy(state_of("galore")))
    with refused(named, optimizer, message):
        optimizer.load_state_dict(spoilt)
    goes_on(GALORE, named, optimizer, range(GAP - 1, GAP + 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 4}, r"its exp_avg is \(\d+, \d+\), and .* by those of the optimizer; make it with the saved ones"),
        ({"rank": None}, r"its exp_avg is"),
        ({"proj_type": "reverse_std"}, r"its exp_avg is"),
        ({"proj_type": "full"}, r"its exp_avg is"),
    ],
    ids=str,
)
@pytest.mark.parametrize("steps", [0, 2])
def test_a_state_of_other_options(options: dict[str, Any], message: str, steps: int) -> None:
    """Options that decide which tensors there are must agree, also where no step was made yet."""
    before = parameters()
    other = build(GALORE, before, **options)
    train(before, other, range(steps))
    named = parameters()
    optimizer = build(GALORE, named)
    train(named, optimizer, range(2))
    with refused(named, optimizer, rf"^[a-z]+_proj.weight: by the options in the state {message}"):
        optimizer.load_state_dict(other.state_dict())
    goes_on(GALORE, named, optimizer, range(2, GAP + 2))


@pytest.mark.parametrize("ours", OURS, ids=str)
def test_a_state_of_a_model_with_another_width(ours: Ours) -> None:
    """The same parameters, one of them wider: its name is in the error."""
    named, wider = parameters(), parameters()
    grown = torch.nn.Parameter(torch.randn(24, 712))
    wider = [(n, grown if n == "down_proj.weight" else p) for n, p in wider]
    other = build(ours, wider)
    push(wider, {**gradients(0), "down_proj.weight": torch.randn(24, 712)})
    other.step()
    optimizer = build(ours, named)
    train(named, optimizer, range(1))
    with refused(named, optimizer, r"^down_proj.weight: its \w+ is \(.*\) in the state, and \(.*\) here$"):
        optimizer.load_state_dict(other.state_dict())
    goes_on(ours, named, optimizer, range(1, GAP + 2))


@pytest.mark.parametrize("ours", OURS, ids=str)
def test_a_state_of_another_optimizer(ours: Ours) -> None:
    """Every other class of ours whose class differs, and torch's."""
    named = parameters()
    optimizer = build(ours, named)
    train(named, optimizer, range(1))
    for other in OURS:
        related = issubclass(other.made, ours.made) or issubclass(ours.made, other.made)
        if not related and len(state_of(str(other))["param_groups"]) == len(optimizer.param_groups):
            with refused(named, optimizer, r"\.(weight|bias): |^group \d of the state: "):
                optimizer.load_state_dict(state_of(str(other)))
    foreign = parameters()
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    order = [name for group in optimizer.param_groups for name in group["param_names"]]
    tensors = [dict(foreign)[name] for name in order]
    adamw = torch.optim.AdamW(
        [{"params": tensors[: sizes[0]]}, *([{"params": tensors[sizes[0] :]}] * (len(sizes) - 1))]
    )
    push(foreign, gradients(0))
    adamw.step()
    with refused(named, optimizer, r"\.(weight|bias): |^group \d of the state: "):
        optimizer.load_state_dict(adamw.state_dict())
    goes_on(ours, named, optimizer, range(1, GAP + 1))
