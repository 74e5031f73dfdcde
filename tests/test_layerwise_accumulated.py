"""A layer-wise update that waits for several backward passes: real steps on the CPU, `estimate`, `simulate`."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from simulate_runs import NUMBER, measured

import galore_mem
from galore_mem.errors import InputError
from galore_mem.estimator import Case, budget, given_for
from galore_mem.methods.registry import METHODS
from galore_mem.result import Estimate
from galore_mem.setup import RECIPES, Setup
from galore_mem.simulate.session import trace_work
from galore_mem.spec.config import model_from_config
from galore_mem.verify.builders import builder
from galore_mem.verify.workloads import run_train

SIZES: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False, "max_position_embeddings": 256,
}  # fmt: skip
RANK = 16
LAYER = ((64, 64), (32, 64), (32, 64), (64, 64), (160, 64), (160, 64), (64, 160))  # query, key, value, output; the MLP
OTHERS = 2 * 512 * 64 + 7 * 64  # embedding and head; two norms a layer and the last
OURS = "galore-mem"
EIGHT_BIT = ("galore-8bit", "q-galore")
TABLE = 128  # bytes that bitsandbytes makes once for the process, in whichever run is its first


def case(name: str, passes: int, **options: Any) -> Case:
    given = {"recipe": RECIPES["fp32"], "batch_size": 2, "seq_len": 32, "layerwise": True, "device": "cpu"}
    setup = Setup(**{**given, "gradient_accumulation": passes, **options})
    method = METHODS[name]
    rank = given_for(method, {"rank": RANK})
    return Case(model_from_config(SIZES, "waits", "test"), setup, method, method.implementation(OURS), None, rank)


def estimated(made: Estimate) -> dict[str, int]:
    found = {phase.name: phase.allocated_bytes for phase in made.phases}
    return found | {"forward": max(found["forward"], found["loss"])}


def phases(asked: Case) -> tuple[str, ...]:
    return ("forward", "backward", "refresh") if asked.code.refreshes else ("forward", "backward")


REAL = [
    ("galore", 2, {}),
    ("galore", 4, {"keep_logits": "step", "gradient_checkpointing": True}),
    ("galore-8bit", 2, {}),  # its kernel makes the highest moment in a hook
    ("galore-mini", 3, {"keep_logits": "next"}),
    ("galore-mini-1", 3, {}),
    ("galore-adafactor", 2, {"recipe": RECIPES["pure-bf16"]}),
    ("q-galore", 3, {}),
    ("adam-mini", 2, {"recipe": RECIPES["amp-bf16"]}),
    ("flora", 3, {}),
]


@pytest.mark.parametrize(("name", "passes", "options"), REAL, ids=[f"{name}-{n}" for name, n, _ in REAL])
def test_phases_are_those_of_real_steps(name: str, passes: int, options: dict[str, Any]) -> None:
    if name in EIGHT_BIT and find_spec("bitsandbytes") is None:
        pytest.skip("needs bitsandbytes")
    asked, row = case(name, passes, **options), builder(name, OURS)
    stays, real = measured(lambda meter: run_train(asked.work(), row, torch.device("cpu"), meter))
    made = budget(asked)
    said, traced = estimated(made), trace_work(asked.work(), row).trace.peaks()
    assert made.weights_bytes == stays.weights
    assert made.gradients_bytes == stays.gradients
    assert made.optimizer_state_bytes == stays.optimizer_state
    allowed = NUMBER + (TABLE if name in EIGHT_BIT else 0)
    for phase in phases(asked):
        assert abs(said[phase] - real[phase]) <= allowed, (phase, said[phase], real[phase])
        assert abs(traced[phase].total - real[phase]) <= allowed, (phase, traced[phase].total, real[phase])


@pytest.mark.parametrize("name", ["galore", "tensor-galore", "galore-2", "adam-mini"])
def test_phases_on_a_card_are_those_of_simulate(name: str) -> None:
    asked = case(name, 3, device="cuda", recipe=RECIPES["pure-bf16"], compute_capability=(8, 0))
    said, traced = estimated(budget(asked)), trace_work(asked.work(), builder(name, OURS)).trace.peaks()
    for phase in phases(asked):
        assert abs(said[phase] - traced[phase].total) <= 2 * 512, (phase, said[phase], traced[phase].total)


def test_what_waits() -> None:
    """In float32: what is not projected waits as it is, and of a projected matrix of m x n (m <= n) r·n numbers; in a
    step that renews projectors everything waits as it is. One pass leaves nothing."""
    once, twice = (estimated(budget(case("galore", passes))) for passes in (1, 2))
    low = 3 * sum(RANK * max(shape) for shape in LAYER)
    whole = 3 * sum(m * n for m, n in LAYER)
    assert twice["forward"] - once["forward"] == 4 * (low + OTHERS)
    assert twice["backward"] - once["backward"] == 4 * (low + OTHERS)
    assert twice["refresh"] - once["refresh"] == 4 * (whole + OTHERS)
    kept = budget(case("galore-mini", 2))  # of whose approach the mean of squares needs the gradient
    assert estimated(kept)["forward"] - estimated(budget(case("galore-mini", 1)))["forward"] == 4 * (whole + OTHERS)
    assert kept.gradients_bytes == 4 * (whole + OTHERS)


def test_more_passes_wait_no_more() -> None:
    """All passes between the first and the last are alike."""
    three, many = (budget(case("galore", passes)) for passes in (3, 64))
    assert three.phases == many.phases


def test_who_steps_in_every_pass_is_told_so() -> None:
    asked = {"setup": Setup(seq_len=64, layerwise=True, gradient_accumulation=4)}
    for name, implementation in (("adamw", None), ("galore", "galore-torch")):
        with pytest.raises(InputError, match=r"steps in every backward pass.*leave out --layerwise or --gradient-accu"):
            galore_mem.estimate("llama-60m", [name], implementation=implementation, **asked)
    master = Setup(RECIPES["bf16-fp32-master"], seq_len=64, layerwise=True, gradient_accumulation=4)
    with pytest.raises(InputError, match="cannot accumulate gradients in bf16-fp32-master"):
        galore_mem.estimate("llama-60m", ["galore"], setup=master)
    result = galore_mem.estimate("llama-60m", rank=64, **asked)
    assert {"galore", "galore-8bit", "q-galore", "adam-mini", "flora"} <= {e.method for e in result.estimates}
    assert {"adamw", "sgd", "lora", "apollo"} <= {u.method for u in result.unsupported}
    lomo = next(e for e in result.estimates if e.method == "lomo")  # which has no other step, and says so
    assert any("not accumulated, whatever the options say" in a for a in lomo.assumptions)
