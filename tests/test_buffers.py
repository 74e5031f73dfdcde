"""What a model registers beside its parameters: as transformers has it, counted in every phase, never as parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from simulate_runs import NUMBER, measured

import galore_mem
from galore_mem.estimator import Case, budget
from galore_mem.families import FAMILIES
from galore_mem.memory.phases import Work
from galore_mem.methods.registry import method
from galore_mem.setup import RECIPES, Setup
from galore_mem.spec.config import model_from_config
from galore_mem.spec.model import ModelSpec
from galore_mem.verify.builders import builder
from galore_mem.verify.models import transformers_model
from galore_mem.verify.workloads import run_train

SIZES: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "type_vocab_size": 2,
}  # fmt: skip
GPT2: dict[str, Any] = {"vocab_size": 512, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}
CODE = "torch-foreach"


def spec(family: str) -> ModelSpec:
    return model_from_config({"model_type": family, **(GPT2 if family == "gpt2" else SIZES)}, family, "test")


def case(family: str, **options: Any) -> Case:
    setup = Setup(RECIPES[options.pop("recipe", "fp32")], batch_size=2, seq_len=96, **options)
    adamw = method("adamw")
    return Case(spec(family), setup, adamw, adamw.implementation(CODE), None, {})


def real(work: Work) -> list[tuple[str, tuple[int, ...], str]]:
    model = transformers_model(work, torch.device("meta"))
    return [(name, tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in model.named_buffers()]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recipe", ["fp32", "pure-bf16"])
def test_rows_are_those_of_the_real_model(family: str, recipe: str) -> None:
    work = case(family, recipe=recipe).work()
    said = [
        (row.name.replace("{i}", str(i)), row.shape, (row.dtype or work.setup.recipe.weights).name)
        for row in work.model.registered(work.setup.transformers)
        for i in range(2 if row.in_each_layer else 1)
    ]
    assert said == real(work)


@pytest.mark.parametrize(
    ("family", "release", "nbytes"),
    [
        ("llama", "5.23", 2 * 8 * 4),  # half of a head of 16 numbers, and its copy, in float32
        ("llama", "4.57", 8 * 4),  # the copy is the same tensor
        ("bert", "5.23", 2 * 256 * 8),  # two of 256 positions in int64
        ("bert", "4.57", 2 * 256 * 8),
        ("gpt2", "5.23", 0),
        ("gpt2", "4.57", 2 * (256 * 256 + 2)),  # each layer: a boolean mask, a number in the model's own bfloat16
    ],
)
def test_bytes_of_each_release(family: str, release: str, nbytes: int) -> None:
    """From the modeling files of transformers 4.57.6 and 5.23."""
    asked = case(family, recipe="pure-bf16", transformers=release, device="cpu")
    made = budget(asked)
    phases = {phase.name: phase for phase in made.phases}
    assert made.buffers_bytes == nbytes
    assert made.weights_bytes == 2 * asked.model.parameter_count
    assert phases["load"].allocated_bytes == made.weights_bytes + nbytes
    assert {phase.components[0] for phase in phases.values()} == {made.weights_bytes + nbytes}


def test_deep_models_have_those_of_each_layer() -> None:
    """gpt2-small under 4.57: 12 masks of 1024 x 1024 booleans, and 12 numbers, each in a block of 512 bytes."""
    setups = (Setup(seq_len=64, transformers=release) for release in ("5.23", "4.57"))
    new, old = (galore_mem.estimate("gpt2", ["adamw"], setup=setup).estimates[0] for setup in setups)
    more = 12 * (1024 * 1024 + 512)
    for before, after in zip(new.phases, old.phases, strict=True):
        assert after.components[0] - before.components[0] == more


@pytest.mark.parametrize("family", ["bert", "roberta", "qwen2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_phases_are_those_of_real_steps(family: str, checkpointing: bool) -> None:
    asked = case(family, gradient_checkpointing=checkpointing, device="cpu")
    row = builder("adamw", CODE)
    stays, found = measured(lambda meter: run_train(asked.work(), row, torch.device("cpu"), meter))
    made = budget(asked)
    said = {phase.name: phase.allocated_bytes for phase in made.phases}
    assert (stays.weights, stays.optimizer_state) == (made.weights_bytes, made.optimizer_state_bytes)
    assert max(said["forward"], said["loss"]) == found["forward"]
    assert said["backward"] == found["backward"]
    assert abs(said["step"] - found["step"]) <= NUMBER  # one of Python's, as a tensor


def test_they_are_listed_and_explained() -> None:
    made = galore_mem.estimate(spec("llama"), ["sgd"], setup=Setup(seq_len=64)).estimates[0]
    listed = [t for t in made.to_json(tensors=True)["tensors"] if t["kind"] == "buffers"]
    assert [(t["param"], t["shape"], t["dtype"], t["bytes"], t["count"]) for t in listed] == [
        ("model.rotary_emb.inv_freq", [8], "float32", 32, 1),
        ("model.rotary_emb.original_inv_freq", [8], "float32", 32, 1),
    ]
    from galore_mem.report.estimate import explanation

    assert "  buffers, which each phase counts among the weights = 64 B = 64 B" in list(explanation(made))
