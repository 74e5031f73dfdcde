"""Training runs on INT8 weights: layer by layer, copied, saved and resumed, by hand and with transformers' Trainer."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.utils.logging import disable_progress_bar

from galore_mem.optim import LayerWise, QGaLoreAdamW8bit, for_trainer, parameter_groups, quantize_linears
from galore_mem.optim.int8 import Int8Weight

disable_progress_bar()
FORMATS = [torch.float32, torch.bfloat16]
VOCABULARY = 64
LLAMA = LlamaConfig(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=16,
)  # fmt: skip
IDS = torch.randint(0, VOCABULARY, (40, 8), generator=torch.Generator().manual_seed(3))


def llama(dtype: torch.dtype = torch.float32, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LLAMA).to(dtype)
    quantize_linears(model)
    return model


def state_bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(t, b[name]) for name, t in a.items())


KINDS = {"step": None, "layer-wise": LayerWise(), "accumulating": LayerWise(2)}


def made(model: nn.Module, kind: str) -> QGaLoreAdamW8bit:
    return QGaLoreAdamW8bit(
        parameter_groups(model, rank=6, update_proj_gap=3), lr=0.02, weight_decay=0.01, layerwise=KINDS[kind]
    )


def train(model: nn.Module, optimizer: QGaLoreAdamW8bit, steps: range) -> float:
    for step in steps:
        for part in (IDS[4 * step : 4 * step + 2], IDS[4 * step + 2 : 4 * step + 4]):
            loss = model(input_ids=part, labels=part).loss
            loss.backward()
            if optimizer.layerwise == LayerWise():
                optimizer.step()
        optimizer.step()
        optimizer.zero_grad()
    return float(loss.item())


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_run(kind: str, dtype: torch.dtype) -> None:
    """Weights, their random rounding, and states, to the bit; saved between two refreshes (step 5)."""
    model = llama(dtype)
    optimizer = made(model, kind)
    train(model, optimizer, range(5))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    content = torch.load(file, weights_only=True)
    train(model, optimizer, range(5, 10))
    again = llama(dtype, seed=1)
    again.load_state_dict(content["model"])
    fresh = made(again, kind)
    fresh.load_state_dict(content["optimizer"])
    train(again, fresh, range(5, 10))
    assert same(state_bits(again), state_bits(model))
    for (name, p), q in zip(model.named_parameters(), again.parameters(), strict=True):
        for key, value in optimizer.state[p].items():
            other = fresh.state[q][key]
            assert torch.equal(value, other) if isinstance(value, Tensor) else value == other, (name, key)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_layer_wise_is_the_same_update(dtype: torch.dtype) -> None:
    """To the bit: the random numbers depend on the parameter and the step alone. A step in the backward pass for each
    of two micro-batches against a step after each of them."""
    model, other = llama(dtype), llama(dtype)
    optimizer, plain = made(model, "layer-wise"), made(other, "step")
    train(model, optimizer, range(4))
    for i in range(8):
        part = IDS[2 * i : 2 * i + 2]
        other(input_ids=part, labels=part).loss.backward()
        plain.step()
        plain.zero_grad()
    assert same(state_bits(model), state_bits(other))


def test_it_learns() -> None:
    """The same four texts over and over, INT8 weights at lr 0.02: the loss (ln 64 = 4.2 at first) is halved."""
    model = llama()
    optimizer = made(model, "step")
    for _ in range(30):
        last = train(model, optimizer, range(1))
    assert last < 2.1


def test_a_copy_of_model_and_optimizer() -> None:
    model = llama()
    optimizer = made(model, "layer-wise")
    train(model, optimizer, range(2))
    again, fresh = copy.deepcopy((model, optimizer))
    before = state_bits(model)
    train(again, fresh, range(2, 4))
    assert same(state_bits(model), before)
    train(model, optimizer, range(2, 4))
    assert same(state_bits(again), state_bits(model))


TRAINERS: dict[str, tuple[torch.dtype, LayerWise | None, dict[str, Any]]] = {
    "step": (
        torch.float32,
        None,
        {"bf16": True, "gradient_checkpointing": True},
    ),
    "layer-wise": (torch.bfloat16, LayerWise(2), {"max_grad_norm": 0.0}),
}


@pytest.mark.parametrize("setup", TRAINERS)
def test_the_trainer_resumes(setup: str, tmp_path: Path) -> None:
    """Five steps of two micro-batches against the last three from the checkpoint, which has safetensors."""
    dtype, layerwise, more = TRAINERS[setup]

    def trainer(seed: int, folder: str) -> Trainer:
        model = llama(dtype, seed)
        told = for_trainer(model, QGaLoreAdamW8bit, lr=0.01, rank=6, update_proj_gap=3, layerwise=layerwise)
        arguments = TrainingArguments(
            output_dir=str(tmp_path / folder), max_steps=5, save_steps=2, per_device_train_batch_size=2,
            gradient_accumulation_steps=2, logging_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True, **more,
        )  # fmt: skip
        data = [{"input_ids": ids, "labels": ids} for ids in IDS]
        return Trainer(model, arguments, train_dataset=data, optimizer_cls_and_kwargs=told)

    whole, resumed = trainer(0, "whole"), trainer(1, "resumed")
    whole.train()
    assert (tmp_path / "whole" / "checkpoint-2" / "model.safetensors").exists()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert same(state_bits(resumed.model), state_bits(whole.model))
    assert isinstance(resumed.model.model.layers[0].mlp.up_proj.weight, Int8Weight)
