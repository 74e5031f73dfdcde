"""The update in the backward pass in models that share, freeze or recompute; what it refuses; what it saves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from low_rank import peak_of
from ours import OURS, Ours
from small import GAP, LR, build, gradients, made, parameters, push, row, snapshot, sums_low_rank, train, values

from galore_mem.errors import InputError
from galore_mem.optim import GaLoreAdamW, LayerWise, TensorGaLoreAdamW

GALORE = row("galore")


# -- models ----------------------------------------------------------------------------------------


class Tied(torch.nn.Module):
    """A weight that is used twice, a frozen one, and a stack that can be recomputed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(16, 16, bias=False)
        self.stack = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(3))
        self.last = torch.nn.Linear(16, 16, bias=False)
        self.last.weight = self.first.weight
        self.frozen = torch.nn.Linear(16, 16)
        self.frozen.requires_grad_(False)

    def forward(self, x: torch.Tensor, recompute: bool | None = None) -> torch.Tensor:
        x = self.first(x)
        for layer in self.stack:
            run: Callable[..., Any] = torch.nn.Sequential(layer, torch.nn.Tanh())
            x = run(x) if recompute is None else torch.utils.checkpoint.checkpoint(run, x, use_reentrant=recompute)
        return self.last(self.frozen(x)).square().mean()


def of_model(model: torch.nn.Module, layerwise: LayerWise | None) -> GaLoreAdamW:
    low = [(n, p) for n, p in model.named_parameters() if p.dim() == 2]
    rest = [(n, p) for n, p in model.named_parameters() if p.dim() < 2]
    return GaLoreAdamW([{"params": rest}, {"params": low, "rank": 4, "update_proj_gap": 2}], LR, layerwise=layerwise)


@pytest.mark.parametrize("recompute", [None, False, True], ids=["plain", "checkpointing", "reentrant"])
def test_tied_frozen_and_recomputed_weights(recompute: bool | None) -> None:
    """A tied weight is updated once, when both uses are in; a frozen one not at all; a layer is recomputed before it
    is updated. (Tied weights are outside the recomputed part here: see `LayerWise` for the reentrant kind.)"""
    models = Tied(), Tied()
    optimizers = of_model(models[0], None), of_model(models[1], LayerWise())
    frozen = models[0].frozen.weight.clone()
    for step in range(5):
        x = torch.randn(3, 16, generator=torch.Generator().manual_seed(step))
        for model, optimizer in zip(models, optimizers, strict=True):
            model(x, recompute).backward()
            optimizer.step()
            optimizer.zero_grad()
        named = [list(model.named_parameters()) for model in models]
        assert snapshot(named[0], optimizers[0]) == snapshot(named[1], optimizers[1])
    assert torch.equal(models[1].frozen.weight, frozen)
    assert optimizers[1].state[models[1].first.weight]["step"] == 5
    assert models[1].frozen.weight not in optimizers[1].state


def test_a_parameter_that_is_unfrozen_later_is_left_to_step() -> None:
    models = Tied(), Tied()
    optimizers = of_model(models[0], None), of_model(models[1], LayerWise())
    for step in range(4):
        x = torch.randn(3, 16, generator=torch.Generator().manual_seed(step))
        for model, optimizer in zip(models, optimizers, strict=True):
            if step == 2:
                model.frozen.requires_grad_(True)
            model(x).backward()
            optimizer.step()
            optimizer.zero_grad()
        named = [list(model.named_parameters()) for model in models]
        assert snapshot(named[0], optimizers[0]) == snapshot(named[1], optimizers[1])


@pytest.mark.parametrize("ours", OURS, ids=str)
def test_groups_added_later_are_updated_in_the_backward_pass_too(ours: Ours) -> None:
    optimizers = []
    for layerwise in (None, LayerWise()):
        named = parameters()
        first = [(n, p) for n, p in named if n != "up_proj.weight"]
        optimizer = build(ours, first, layerwise)
        train(first, optimizer, range(2))
        later: dict[str, Any] = {"params": [(n, p) for n, p in named if n == "up_proj.weight"]}
        if ours.projects:
            later |= {k: v for k, v in optimizer.param_groups[1].items() if k not in ("params", "param_names")}
            later.pop("partition", None)
        given = dict(later)
        optimizer.add_param_group(later)
        assert later == given  # a dict that is given stays as it is
        push(named, gradients(2))
        assert all(p.grad is None for _, p in named) == (layerwise is not None)
        optimizer.step()
        optimizer.zero_grad()
        train(named, optimizer, range(3, GAP + 2))
        optimizers.append((named, optimizer))
    assert snapshot(*optimizers[0]) == snapshot(*optimizers[1])


@pytest.mark.parametrize("passes", [1, 3])
def test_without_its_hooks_it_is_the_normal_optimizer(passes: int) -> None:
    named, optimizer = made(GALORE, LayerWise(passes))
    twin, normal = made(GALORE, LayerWise(passes))
    train(named, optimizer, range(2), micro=passes)
    train(twin, normal, range(2), micro=passes)
    optimizer.remove_hooks()
    assert optimizer.layerwise is None
    push(named, gradients(50))
    push(named, gradients(51))  # no error: nobody counts
    assert all(p.grad is not None for _, p in named)
    before = values(named)
    optimizer.step()
    assert all(not torch.equal(p, before[name]) for name, p in named)
    build(GALORE, named, LayerWise())  # may take over now


@pytest.mark.parametrize("passes", [1, 3])
def test_parameters_of_three_dimensions(passes: int) -> None:
    """Tensor-GaLore sums cores: linear in the gradient as the matrices' low-rank gradients are (float64 as there).
    Saved and loaded on the way."""
    ends = []
    for layerwise in (None, LayerWise(passes)):
        p = torch.nn.Parameter(torch.ones(6, 5, 8, dtype=torch.float64))
        state = None
        for part in range(2):
            optimizer = TensorGaLoreAdamW([("conv", p)], 0.1, rank=3, update_proj_gap=2, layerwise=layerwise)
            if state is not None:
                optimizer.load_state_dict(state)
            for step in range(3 * part, 3 * part + 3):
                for micro in range(passes):
                    draw = torch.Generator().manual_seed(10 * step + micro)
                    push([("conv", p)], {"conv": torch.randn(6, 5, 8, generator=draw, dtype=torch.float64)})
                    projected = layerwise is not None and (micro == passes - 1 or step % 2 == 1)
                    assert (p.grad is None) == projected
                optimizer.step()
                optimizer.zero_grad()
            state = optimizer.state_dict()
            optimizer.remove_hooks()
        ends.append((p.detach(), optimizer.state[p]))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-9, atol=1e-11)


# -- what cannot be ---------------------------------------------------------------------------------


def test_more_backward_passes_than_announced_are_refused() -> None:
    """Else each micro-batch would be a step of its own: wrong, and silent."""
    named, optimizer = made(GALORE, LayerWise())
    push(named, gradients(0))
    before = snapshot(named, optimizer)
    with pytest.raises(InputError, match=r"weight has another gradient since its update.*gradient_accumulation_steps"):
        push(named, gradients(1))
    assert snapshot(named, optimizer) == before
    optimizer.zero_grad()  # throws the second away
    push(named, gradients(1))
    optimizer.step()
    twin, normal = made(GALORE)
    train(twin, normal, range(2))
    assert snapshot(named, optimizer) == snapshot(twin, normal)


def test_reentrant_checkpointing_of_a_shared_weight_is_refused() -> None:
    """Each recomputed part is a backward pass of its own there, so that the weight's gradient comes in two pieces; the
    other kind adds them up first."""
    for reentrant in (True, False):
        layer = torch.nn.Linear(8, 8, bias=False)
        optimizer = GaLoreAdamW([("shared", layer.weight)], layerwise=LayerWise())
        x = torch.randn(2, 8, requires_grad=True)
        for _ in range(2):
            x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant)
        if reentrant:
            with pytest.raises(InputError, match=r"^shared has another gradient since its update"):
                x.sum().backward()
        else:
            x.sum().backward()
            assert layer.weight.grad is None
        del optimizer  # parameters do not keep it


def test_a_second_layer_wise_optimizer_is_refused() -> None:
    named, optimizer = made(GALORE, LayerWise())
    with pytest.raises(InputError, match=r"^embed.weight has a layer-wise optimizer already; call remove_hooks"):
        build(GALORE, named, LayerWise())
    optimizer.remove_hooks()
    build(GALORE, named, LayerWise())


def test_a_loss_scaler() -> None:
    """torch's GradScaler divides gradients in place before `step()`, here by a power of two: nothing is lost. It
    leaves out a step with infinite gradients. A layer-wise update has no gradient left to divide."""
    named, optimizer = made(GALORE)
    twin, plain = made(GALORE)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(GAP + 1):
        push(named, {name: g * 1024.0 for name, g in gradients(step).items()})
        scaler.scale(torch.zeros(()))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        train(twin, plain, range(step, step + 1))
    assert snapshot(named, optimizer) == snapshot(twin, plain)
    push(named, {name: g * float("inf") for name, g in gradients(0).items()})
    scaler.step(optimizer)
    assert snapshot(named, optimizer) == snapshot(twin, plain)

    again, layerwise = made(GALORE, LayerWise())
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.zeros(()))
    push(again, gradients(0))
    with pytest.raises(InputError, match="before the loss scaler can unscale them"):
        scaler.step(layerwise)
    layerwise.step()  # without one it goes on
    train(again, layerwise, range(1, 3))


# -- memory ----------------------------------------------------------------------------------------

LAYERS, WIDTH = 8, 256
GRADIENT = WIDTH * WIDTH * 4


def backward_peak(ours: Ours, layerwise: LayerWise | None, passes: int = 1) -> int:
    """How far above its start one backward pass comes, at a step without refresh."""

    def start() -> Callable[[], object]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
        options = {"rank": 16, **ours.every(100)} if ours.projects else {}
        optimizer = ours.build([], list(model.named_parameters()), layerwise, **options)
        x = torch.randn(2, WIDTH)
        for _ in range(2):
            for _ in range(passes):
                model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        loss = model(x).square().mean()
        return lambda: (loss.backward(), optimizer)

    return peak_of(start)


@pytest.mark.parametrize("ours", OURS, ids=str)
def test_the_backward_pass_holds_one_gradient(ours: Ours) -> None:
    """All gradients, 8 · 256 KiB, against the one that is being used, with at most as much again for its update.
    (Each layer's activations, 2 · 256 numbers, are there at the start and freed on the way.)"""
    activations = (LAYERS + 1) * 2 * WIDTH * 4
    normal, layerwise = backward_peak(ours, None), backward_peak(ours, LayerWise())
    assert abs(normal - LAYERS * GRADIENT) <= activations
    assert GRADIENT <= layerwise <= 2 * GRADIENT
    if sums_low_rank(ours):
        # within an accumulation: the low-rank sums, at most 256 · 16 · 4 bytes for each layer, beside one gradient
        within = backward_peak(ours, LayerWise(4), 4)
        assert within <= 2 * GRADIENT + LAYERS * WIDTH * 16 * 4
