"""The update in the backward pass equals `step()`: alone, with gradient accumulation, clipping, schedulers, and in
models that share, freeze or recompute. Gradients are freed on the way."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from ours import OURS, Ours
from small import (
    FORMATS,
    GAP,
    PARAMS,
    gradients,
    made,
    push,
    row,
    snapshot,
    sums_low_rank,
    train,
    values,
)
from torch.nn.utils import clip_grad_value_

from galore_mem.optim import AdamMini, LayerWise
from galore_mem.optim.base import MICRO, PENDING, Found

STEPS = 2 * GAP + 2  # projectors are renewed at 0, GAP and 2·GAP
GALORE = row("galore")


# -- equal to step() -------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("ours", OURS, ids=str)
def test_one_backward_pass_per_step_is_bit_for_bit_the_same(ours: Ours, fmt: str) -> None:
    named, normal = made(ours, fmt=fmt)
    again, layerwise = made(ours, LayerWise(), fmt)
    for step in range(STEPS):
        train(named, normal, range(step, step + 1), fmt)
        push(again, gradients(step, fmt))
        assert all(p.grad is None for _, p in again)  # freed in the hook, before any step()
        assert snapshot(again, layerwise) == snapshot(named, normal)
        layerwise.step()  # nothing is left to do
        assert snapshot(again, layerwise) == snapshot(named, normal)


@pytest.mark.parametrize("ours", OURS, ids=str)
def test_accumulation_equals_the_summed_gradient(ours: Ours) -> None:
    """Three backward passes per step, refreshes included, where whole gradients are kept: bit for bit. Where they are
    summed in the low-rank space, PᵀG₁ + PᵀG₂ + PᵀG₃ is rounded otherwise than Pᵀ(G₁ + G₂ + G₃): in float64 by about
    1e-16 of sums over at most 704 terms, which Adam's division by |g| and eight steps enlarge; a lost or doubled
    micro-batch would show in the first digits."""
    fmt = "float64"
    named, normal = made(ours, fmt=fmt)
    again, layerwise = made(ours, LayerWise(3), fmt)
    train(named, normal, range(STEPS), fmt, micro=3)
    train(again, layerwise, range(STEPS), fmt, micro=3)
    if not sums_low_rank(ours):
        assert snapshot(again, layerwise) == snapshot(named, normal)
        return
    for (name, p), (_, q) in zip(named, again, strict=True):
        torch.testing.assert_close(q, p, rtol=1e-9, atol=1e-11, msg=name)
        kept, got = normal.state[p], layerwise.state[q]
        assert kept.keys() == got.keys()
        for key in kept:
            torch.testing.assert_close(got[key], kept[key], rtol=1e-9, atol=1e-11, msg=f"{name} {key}")


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("ours", [o for o in OURS if not sums_low_rank(o)], ids=str)
def test_accumulation_of_whole_gradients_is_bit_for_bit_the_same(ours: Ours, fmt: str) -> None:
    named, normal = made(ours, fmt=fmt)
    again, layerwise = made(ours, LayerWise(3), fmt)
    train(named, normal, range(STEPS), fmt, micro=3)
    train(again, layerwise, range(STEPS), fmt, micro=3)
    assert snapshot(again, layerwise) == snapshot(named, normal)


@pytest.mark.parametrize("ours", OURS, ids=str)
def test_what_stays_within_an_accumulation(ours: Ours) -> None:
    """Projected gradients are in the low-rank sum at once, but for a refresh, which needs the whole gradient, and
    for methods that need it always; those of other parameters stay. After the last pass none is left."""
    named, optimizer = made(ours, LayerWise(3))
    projected = {p.name for p in PARAMS if p.projected}
    for step in range(GAP + 2):
        refresh = step % GAP == 0
        for micro in range(3):
            push(named, gradients(3 * step + micro))
            for name, p in named:
                summed = sums_low_rank(ours) and name in projected and not refresh
                assert (p.grad is None) == (summed or micro == 2), (step, micro, name)
                assert (PENDING in optimizer.state[p]) == (summed and micro < 2), (step, micro, name)
        optimizer.step()
        assert all(MICRO not in state for state in optimizer.state.values())


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("ours", [o for o in OURS if sums_low_rank(o)], ids=str)
def test_the_low_rank_sum_is_the_sum(ours: Ours, fmt: str) -> None:
    named, optimizer = made(ours, LayerWise(3), fmt)
    train(named, optimizer, range(1), fmt, micro=3)
    for micro in (3, 4):
        push(named, gradients(micro, fmt))
    for group in optimizer.param_groups:
        for i, p in enumerate(group["params"]):
            at, state = Found(p, group, i), optimizer.state[p]
            first, second = (optimizer._compressed(at, gradients(n, fmt)[at.name], state) for n in (3, 4))
            if first is None:
                assert PENDING not in state
            else:
                assert second is not None
                assert torch.equal(state[PENDING], first + second)


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("ours", OURS, ids=str)
def test_clipping_by_value_is_torchs(ours: Ours, passes: int) -> None:
    """The complete gradient is clipped, so it stays whole until then: bit for bit `clip_grad_value_`, then `step()`."""
    named, normal = made(ours)
    again, layerwise = made(ours, LayerWise(passes, clip_value=0.75))
    parameters_only = [p for _, p in named]
    train(named, normal, range(STEPS), micro=passes, before_step=lambda: clip_grad_value_(parameters_only, 0.75))
    train(again, layerwise, range(STEPS), micro=passes)
    assert snapshot(again, layerwise) == snapshot(named, normal)
    unclipped, other = made(ours)
    train(unclipped, other, range(STEPS), micro=passes)
    assert snapshot(unclipped, other) != snapshot(named, normal)


def test_a_clip_value_holds_for_gradients_that_step_finds() -> None:
    """A parameter that missed a micro-batch is finished by `step()`, and clipped there."""
    named, normal = made(GALORE)
    again, layerwise = made(GALORE, LayerWise(2, clip_value=0.5))
    for these in (named, again):
        push(these, gradients(0))
    clip_grad_value_([p for _, p in named], 0.5)
    normal.step()
    layerwise.step()
    assert snapshot(again, layerwise) == snapshot(named, normal)


# -- irregular gradients ---------------------------------------------------------------------------


@pytest.mark.parametrize("ours", OURS, ids=str)
def test_parameters_without_a_gradient_in_some_passes(ours: Ours) -> None:
    """Experts, or branches not taken: what is there is summed, and `step()` finishes it. In float64 for the reason
    above; a parameter without any gradient does not move."""
    fmt = "float64"
    missing = {0: {"up_proj.weight"}, 1: {"up_proj.weight", "norm.weight"}, 2: {"embed.weight"}}
    silent = {"q_proj.bias", "o_proj.weight"}
    named, normal = made(ours, fmt=fmt)
    again, layerwise = made(ours, LayerWise(3), fmt)
    start = values(named)
    for step in range(GAP + 2):
        for these in (named, again):
            for micro in range(3):
                grads = gradients(3 * step + micro, fmt)
                push(these, {n: g for n, g in grads.items() if n not in missing[micro] | silent})
        for optimizer in (normal, layerwise):
            optimizer.step()
            optimizer.zero_grad()
        for (name, p), (_, q) in zip(named, again, strict=True):
            torch.testing.assert_close(q, p, rtol=1e-9, atol=1e-11, msg=name)
            assert torch.equal(p, start[name]) == (name in silent)
            assert normal.state.get(p, {}).get("step") == layerwise.state.get(q, {}).get("step")


@pytest.mark.parametrize("ours", OURS, ids=str)
def test_step_finishes_an_incomplete_accumulation(ours: Ours) -> None:
    """The end of an epoch: two passes of three, and then three again."""
    fmt = "float64"
    named, normal = made(ours, fmt=fmt)
    again, layerwise = made(ours, LayerWise(3), fmt)
    for numbers in ((0, 1, 2), (3, 4), (5, 6, 7)):
        for these, optimizer in ((named, normal), (again, layerwise)):
            for number in numbers:
                push(these, gradients(number, fmt))
            optimizer.step()
            optimizer.zero_grad()
            assert all(p.grad is None for _, p in these)
        for (name, p), (_, q) in zip(named, again, strict=True):
            torch.testing.assert_close(q, p, rtol=1e-9, atol=1e-11, msg=name)
            assert normal.state[p]["step"] == layerwise.state[q]["step"]


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("layerwise", [None, LayerWise(3)], ids=["normal", "layer-wise"])
@pytest.mark.parametrize("ours", OURS, ids=str)
def test_zero_grad_drops_what_was_summed(ours: Ours, layerwise: LayerWise | None, to_none: bool) -> None:
    named, optimizer = made(ours, layerwise)
    twin, undisturbed = made(ours, layerwise)
    for these, theirs in ((named, optimizer), (twin, undisturbed)):
        train(these, theirs, range(2), micro=3)
    push(named, gradients(99))
    optimizer.zero_grad(set_to_none=to_none)
    for _, p in named:
        assert p.grad is None or not (to_none or p.grad.any())
    for these, theirs in ((named, optimizer), (twin, undisturbed)):
        train(these, theirs, range(2, GAP + 2), micro=3)
    assert snapshot(named, optimizer) == snapshot(twin, undisturbed)


@pytest.mark.parametrize("layerwise", [None, LayerWise()], ids=["normal", "layer-wise"])
@pytest.mark.parametrize("ours", OURS, ids=str)
def test_a_closure_is_run_with_gradients(ours: Ours, layerwise: LayerWise | None) -> None:
    named, optimizer = made(ours, layerwise)
    twin, plain = made(ours)

    def closure() -> float:
        optimizer.zero_grad()
        assert torch.is_grad_enabled()
        push(named, gradients(0))
        return 2.5

    assert optimizer.step(closure) == 2.5
    train(twin, plain, range(1))
    assert snapshot(named, optimizer)["weights"] == snapshot(twin, plain)["weights"]


@pytest.mark.parametrize("layerwise", [None, LayerWise()], ids=["step", "layer-wise"])
def test_a_forgotten_optimizer_is_freed_with_its_parameters(layerwise: LayerWise | None) -> None:
    """Hooks are out of the collector's sight: one that held its optimizer would keep both alive for good."""
    p = torch.nn.Parameter(torch.ones(4, 4))
    optimizer = AdamMini([("p", p)], layerwise=layerwise)
    p.sum().backward()
    optimizer.step()
    gone = weakref.ref(optimizer), weakref.ref(p)
    del optimizer
    gc.collect()
    assert gone[0]() is None
    p.sum().backward()  # as with any parameter whose optimizer is gone
    AdamMini([("p", p)], layerwise=LayerWise())  # and it may have another
    del p
    gc.collect()
    assert gone[1]() is None
