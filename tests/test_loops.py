"""What the training loop keeps, and which release it runs: real steps on the CPU, `estimate` and `simulate` agree."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from simulate_runs import measured

import galore_mem
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


def case(**options: Any) -> Case:
    setup = Setup(RECIPES["fp32"], batch_size=2, seq_len=32, **options)
    adamw = method("adamw")
    return Case(model_from_config(SIZES, "loops", "test"), setup, adamw, adamw.implementation(CODE), None, {})


def estimated(asked: Case) -> dict[str, int]:
    found = {phase.name: phase.allocated_bytes for phase in budget(asked).phases}
    return found | {"forward": max(found["forward"], found["loss"])}


def simulated(asked: Case) -> dict[str, int]:
    traced = trace_work(asked.work(), builder("adamw", CODE))
    return {phase: peak.total for phase, peak in traced.trace.peaks().items()}


@pytest.mark.parametrize(("kept", "zeroed"), list(product(KEPT_LOGITS, (False, True))))
def test_what_the_loop_keeps(kept: str, zeroed: bool) -> None:
    asked = case(device="cpu", keep_logits=kept, keep_gradients=zeroed)
    row = builder("adamw", CODE)
    _, real = measured(lambda meter: run_train(asked.work(), row, torch.device("cpu"), meter))
    said, traced = estimated(asked), simulated(asked)
    for phase in ("forward", "backward", "step"):
        assert abs(said[phase] - real[phase]) <= SCALARS, (phase, said[phase], real[phase])
        assert abs(traced[phase] - real[phase]) <= SCALARS, (phase, traced[phase], real[phase])


def test_keys_and_values_in_the_output() -> None:
    """As a decoder's config has it: each layer's, 2 x 32 tokens x 2 heads x 16 numbers of 4 bytes each, which live as
    long as the output."""
    asked = case(device="cpu", keep_logits="step", use_cache=True)
    row = builder("adamw", CODE)
    _, real = measured(lambda meter: run_train(asked.work(), row, torch.device("cpu"), meter))
    traced, without = simulated(asked), simulated(case(device="cpu", keep_logits="step"))
    for phase in ("forward", "backward", "step"):
        assert abs(traced[phase] - real[phase]) <= SCALARS, (phase, traced[phase], real[phase])
    assert traced["step"] - without["step"] == 3 * 2 * (2 * 32 * 2 * 16 * 4)
    with pytest.raises(InputError, match="simulate --use-cache has them"):
        galore_mem.estimate("llama-60m", ["sgd"], setup=Setup(use_cache=True))


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
    monkeypatch.setattr(versions, "modelled", lambda package, known: known[0])
    with pytest.raises(InputError, match=r"transformers 4.57 is installed, .* give --transformers 4.57"):
        versions.check(Setup())
