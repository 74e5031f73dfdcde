"""What the training loop keeps, and which release it runs: real steps on the CPU, `estimate` and `simulate` agree."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from simulate_runs import measured

from galore_mem.errors import InputError
from galore_mem.estimator import Case, budget
from galore_mem.methods.registry import method
from galore_mem.setup import KEPT_LOGITS, RECIPES, TRANSFORMERS, Setup
from galore_mem.simulate.session import trace_work
from galore_mem.simulate.subjects import versions
from galore_mem.spec.config import model_from_config
from galore_mem.verify.builders import builder
from galore_mem.verify.workloads import run_train

SIZES: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 2048, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False, "max_position_embeddings": 256,
}  # fmt: skip
CODE = "torch-foreach"
# Bytes: numbers of Python that become tensors in C++, where no dispatch mode sees them, and which the twin leaves out.
SCALARS = 96
BLOCKS = 2 * 512  # the same on CUDA: two of them, in a block each


def case(model: dict[str, Any] = SIZES, **options: Any) -> Case:
    setup = Setup(**{"recipe": RECIPES["fp32"], "batch_size": 2, "seq_len": 32, **options})
    adamw = method("adamw")
    return Case(model_from_config(model, "loops", "test"), setup, adamw, adamw.implementation(CODE), None, {})


def estimated(asked: Case) -> dict[str, int]:
    found = {phase.name: phase.allocated_bytes for phase in budget(asked).phases}
    return found | {"forward": max(found["forward"], found["loss"])}


def simulated(asked: Case) -> dict[str, int]:
    traced = trace_work(asked.work(), builder("adamw", CODE))
    return {phase: peak.total for phase, peak in traced.trace.peaks().items()}


def compare(asked: Case) -> None:
    """A real run, its estimate and its simulation, phase by phase."""
    row = builder("adamw", CODE)
    _, real = measured(lambda meter: run_train(asked.work(), row, torch.device("cpu"), meter))
    said, traced = estimated(asked), simulated(asked)
    for phase in ("forward", "backward", "step"):
        assert abs(said[phase] - real[phase]) <= SCALARS, (phase, said[phase], real[phase])
        assert abs(traced[phase] - real[phase]) <= SCALARS, (phase, traced[phase], real[phase])


@pytest.mark.parametrize(("kept", "zeroed"), list(product(KEPT_LOGITS, (False, True))))
def test_what_the_loop_keeps(kept: str, zeroed: bool) -> None:
    asked = case(device="cpu", keep_logits=kept, keep_gradients=zeroed)
    compare(asked)


KEYS_AND_VALUES: dict[str, dict[str, Any]] = {
    "kept until the step": {"keep_logits": "step"},
    "until the next pass": {"keep_logits": "next"},
    "not kept": {},
    "eager": {"keep_logits": "step", "attention": "eager"},
    "checkpointing": {"keep_logits": "step", "gradient_checkpointing": True},
}
DECODERS: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "window": {**SIZES, "model_type": "mistral", "sliding_window": 16},
    "gpt2": {"model_type": "gpt2", "vocab_size": 2048, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256},
}


@pytest.mark.parametrize(
    ("model", "way"),
    [*(("llama", way) for way in KEYS_AND_VALUES), *product(("window", "gpt2"), ("kept until the step", "eager"))],
)
def test_keys_and_values_in_the_output(model: str, way: str) -> None:
    asked = case(DECODERS[model], device="cpu", use_cache=True, **KEYS_AND_VALUES[way])
    compare(asked)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_keys_and_values_live_as_long_as_the_output(checkpointing: bool) -> None:
    """Each layer's, 2 x 32 tokens x 2 heads x 16 numbers of 4 bytes; none where layers are checkpointed."""
    options = {"device": "cpu", "keep_logits": "step", "gradient_checkpointing": checkpointing}
    held, without = estimated(case(use_cache=True, **options)), estimated(case(**options))
    assert held["step"] - without["step"] == (0 if checkpointing else 3 * 2 * (2 * 32 * 2 * 16 * 4))
    dropped = case(use_cache=True, device="cpu"), case(device="cpu")
    assert estimated(dropped[0])["step"] == estimated(dropped[1])["step"]


def test_an_encoder_has_no_keys_and_values() -> None:
    bert = {**SIZES, "model_type": "bert", "type_vocab_size": 2}
    assert estimated(case(bert, use_cache=True)) == estimated(case(bert))


@pytest.mark.parametrize("recipe", ["pure-bf16", "amp-bf16"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model", ["llama", "window", "gpt2"])
def test_keys_and_values_on_a_card(model: str, attention: str, recipe: str) -> None:
    options = {"attention": attention, "compute_capability": (8, 0), "recipe": RECIPES[recipe]}
    asked = case(DECODERS[model], use_cache=True, keep_logits="step", **options)
    said, traced = estimated(asked), simulated(asked)
    for phase in ("forward", "backward", "step"):
        assert abs(traced[phase] - said[phase]) <= BLOCKS, (phase, traced[phase], said[phase])


def test_a_cache_spares_the_mask() -> None:
    """transformers 4.57 looks for packed sequences, and so builds a mask, only where there is no cache
    (masking_utils.py, _preprocess_mask_arguments): with one it allocates in the step what 5.23 does, and forward no
    more."""
    old, new = (estimated(case(use_cache=True, keep_logits="step", transformers=release)) for release in TRANSFORMERS)
    copy = 512  # of the rotary embedding's frequencies, which 5.23 has
    assert {phase: new[phase] - old[phase] for phase in old} == dict.fromkeys(old, copy)


def test_what_is_kept_is_there() -> None:
    """The logits, batch x length x vocabulary in float32, lie there in backward (beyond its own, when they are used
    last) and in the step; gradients lie there in forward."""
    logits, gradients = 2 * 32 * 2048 * 4, budget(case(device="cpu")).weights_bytes
    plain, backward, step, following = (simulated(case(device="cpu", keep_logits=kept)) for kept in KEPT_LOGITS)
    assert backward["backward"] > plain["backward"]
    assert backward["step"] == plain["step"] < step["step"]
    assert step["step"] - plain["step"] >= logits
    assert following["forward"] - step["forward"] >= logits
    assert following["step"] == step["step"]
    zeroed = simulated(case(device="cpu", keep_gradients=True))
    assert zeroed["forward"] - plain["forward"] == gradients


@pytest.mark.parametrize("release", TRANSFORMERS)
@pytest.mark.parametrize("groups", ["2.13", "2.14"])
def test_the_releases_of_estimate_are_those_of_simulate(release: str, groups: str) -> None:
    """transformers 4.57 makes a mask that 5.23 does not; torch 2.14's efficient attention takes fewer key heads."""
    asked = case(transformers=release, torch=groups, compute_capability=(7, 5))
    said, traced = estimated(asked), simulated(asked)
    for phase in ("forward", "backward", "step"):
        assert abs(traced[phase] - said[phase]) <= BLOCKS, (phase, traced[phase], said[phase])


def test_a_mask_is_what_releases_differ_in() -> None:
    """Repeated keys and values, which a mask asks for, are more than none; and less than the scores of the composite
    form, which torch 2.13 takes for grouped queries without a mask."""
    for torch_release, more in (("2.14", True), ("2.13", False)):
        old, new = (
            estimated(case(transformers=release, torch=torch_release, compute_capability=(7, 5)))
            for release in TRANSFORMERS
        )
        assert (old["forward"] > new["forward"]) is more


def test_a_newer_release_than_the_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "modeled", lambda package, known: known[0])
    with pytest.raises(InputError, match=r"transformers 4.57 is installed, .* give --transformers 4.57"):
        versions.check(Setup())
