"""Faults that a review found, each with the smallest run that shows it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adapted import IDS, model_of
from torch import nn

from galore_mem.errors import InputError
from galore_mem.optim import (
    AdamMini,
    GaLoreAdafactor,
    GaLoreAdamW,
    GaLoreMini,
    LayerWise,
    ReLoRA,
    for_trainer,
    parameter_groups,
    with_adapters,
)
from galore_mem.partition import by_row, partition
from galore_mem.spec.model import Heads


def named(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[str, nn.Parameter]:
    return "w", nn.Parameter(torch.zeros(shape, dtype=dtype))


# -- numbers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1e-6, 1e-4, 1.0])
@pytest.mark.parametrize("approach", [1, 2, 3])
def test_galore_mini_in_float16(approach: int, size: float) -> None:
    """A projector divided by the root of v alone leaves float16's range for gradients of 1e-4. The first update of a
    row is near its learning rate: the projected gradient's RMS over the gradient's is at most 1."""
    torch.manual_seed(0)
    name, p = named(24, 40, dtype=torch.float16)
    optimizer = GaLoreMini([{"params": [(name, p)], "rank": 8, "scale": 1.0}], lr=1e-2, eps=0.0, approach=approach)
    p.grad = (size * torch.randn(24, 40)).half()
    optimizer.step()
    moved = p.detach().float()
    assert moved.isfinite().all()
    assert 1e-3 < moved.square().mean().sqrt() < 3e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_without_a_gradient_do_not_move(dtype: torch.dtype) -> None:
    """Three dead rows. The first gradient has rank 4, below the projector's 8, so that columns of P are arbitrary and
    carry other rows' moments to them; v is 0 there."""
    torch.manual_seed(0)
    name, p = named(32, 64, dtype=dtype)
    optimizer = GaLoreMini([{"params": [(name, p)], "rank": 8, "update_proj_gap": 100}], lr=1e-3)
    for step in range(5):
        grad = torch.randn(32, 4) @ torch.randn(4, 64) if step == 0 else torch.randn(32, 64)
        grad[:3] = 0
        p.grad = grad.to(dtype)
        optimizer.step()
    assert p[:3].abs().max() == 0
    assert p[3:].abs().min() > 0


def test_a_layout_that_changes_later_is_no_silence() -> None:
    """Rows of a channels-last convolution cannot be viewed; a copy would be updated in the weight's stead."""
    conv = nn.Conv2d(4, 6, 3)
    optimizer = AdamMini(conv.named_parameters(), lr=1e-2)
    conv.to(memory_format=torch.channels_last)
    conv(torch.randn(2, 4, 8, 8)).square().sum().backward()
    with pytest.raises(RuntimeError, match="view"):
        optimizer.step()


def test_heads_that_are_not_the_models() -> None:
    """DeepSeek-V2's config gives the rotary part as head_dim (16); its query has 4 heads of 48 rows."""
    with pytest.raises(InputError, match="192 rows, which this model's heads do not add up to"):
        partition("layers.0.self_attn.q_proj.weight", (192, 64), Heads(64, 4, 4, 16))


# -- a loss scaler -----------------------------------------------------------------------------------


@pytest.mark.parametrize("unscaled", [False, True])
def test_a_loss_scaler_is_refused_layer_wise_in_either_order(unscaled: bool) -> None:
    name, p = named(4, 4)
    optimizer = AdamMini([(name, p)], layerwise=LayerWise())
    scaler = torch.amp.GradScaler("cpu")
    other = nn.Parameter(torch.ones(2))  # torch wants a gradient to look at
    optimizer.add_param_group({"params": [("other", other)]})
    other.requires_grad_(False)
    scaler.scale(p.sum()).backward()
    other.grad = torch.ones(2)
    if unscaled:
        scaler.unscale_(optimizer)
    with pytest.raises(InputError, match="loss scaler"):
        scaler.step(optimizer)


# -- options -----------------------------------------------------------------------------------------


def test_unknown_options_are_refused_with_the_nearest() -> None:
    model = model_of("llama")
    for wrong in (
        lambda: GaLoreAdamW(parameter_groups(model, rank=8), lrr=1),
        lambda: GaLoreAdamW(parameter_groups(model, rnak=8)),
        lambda: GaLoreAdamW(parameter_groups(model, rank=8, update_proj_gp=8)),
        lambda: AdamMini(parameter_groups(model, rank=8)),
    ):
        with pytest.raises(InputError, match="unknown option"):
            wrong()
    made, options = for_trainer(model, GaLoreAdamW, rnak=8)
    with pytest.raises(InputError, match="unknown option 'rnak'; did you mean rank"):
        made(**options)


@pytest.mark.parametrize(
    ("made", "options"),
    [
        (GaLoreAdamW, {"carry_moments": "no"}),
        (GaLoreAdafactor, {"scale_parameter": "no"}),
        (GaLoreAdafactor, {"relative_step": 1}),
        (GaLoreAdamW, {"error_if_nonfinite": "no"}),
    ],
    ids=str,
)
def test_a_flag_is_true_or_false(made: Any, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(options))} must be True or False"):
        made([named(4, 4)], **options)


@pytest.mark.parametrize("approach", [0, 4, "3", True])
def test_the_approach_is_checked_in_a_group_too(approach: object) -> None:
    with pytest.raises(InputError, match="approach must be 1, 2 or 3"):
        GaLoreMini([{"params": [named(8, 8)], "rank": 2, "approach": approach}], partition={"w": by_row((8, 8))})


def test_what_for_trainer_takes() -> None:
    model = model_of("llama")
    with pytest.raises(InputError, match=r"takes a class of galore_mem\.optim"):
        for_trainer(model, torch.optim.AdamW, rank=8)  # type: ignore[type-var]  # wrong on purpose
    with pytest.raises(InputError, match="AdamMini has no rank"):
        for_trainer(model, AdamMini, rank=8)
    with pytest.raises(InputError, match=r"must be a torch\.nn\.Module"):
        parameter_groups(model.parameters())


def test_a_set_of_parameters_has_no_order() -> None:
    with pytest.raises(InputError, match="order"):
        GaLoreAdamW({nn.Parameter(torch.ones(2))})


def test_a_partition_for_other_names() -> None:
    p = nn.Parameter(torch.zeros(8, 8))
    with pytest.raises(InputError, match=r"has no such name, but '_orig_mod.q_proj.weight'"):
        AdamMini([("q_proj.weight", p)], partition={"_orig_mod.q_proj.weight": by_row((8, 8))})
    with pytest.raises(InputError, match="must map names"):
        AdamMini([("q_proj.weight", p)], partition=[1])  # type: ignore[arg-type]  # wrong on purpose


# -- ReLoRA --------------------------------------------------------------------------------------------


def test_relora_needs_adapters_when_it_is_made() -> None:
    model = model_of("llama")
    with pytest.raises(InputError, match="no LoRA adapters"):
        ReLoRA(model, torch.optim.SGD(model.parameters()), 10)


@pytest.mark.parametrize("options", [{"alpha": 0}, {"dropout": 1.0}, {"dropout": -0.1}])
def test_adapters_options(options: dict[str, Any]) -> None:
    pytest.importorskip("peft")
    with pytest.raises(InputError, match=next(iter(options))):
        with_adapters(model_of("llama"), 8, **options)


def test_relora_without_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    import galore_mem.optim.relora as module

    def missing(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(module, "import_module", missing)
    with pytest.raises(InputError, match="needs peft"):
        with_adapters(model_of("llama"), 8)


def test_the_models_own_state_has_what_was_merged() -> None:
    """`torch.save(model.state_dict())` of an adapted model, after a merge, gives the same loss in a fresh one."""
    pytest.importorskip("peft")
    model = with_adapters(model_of("llama"), 8)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    relora = ReLoRA(model, optimizer, update_proj_gap=2)
    for _ in range(3):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        relora.step()
    fresh = with_adapters(model_of("llama"), 8)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(input_ids=IDS).logits, model(input_ids=IDS).logits)
