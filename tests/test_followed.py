"""The twin's whole run beside the closed form, and through the allocator beside `simulate`."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from test_phases import small

import galore_mem
from galore_mem.errors import InputError
from galore_mem.estimator import Case, budget, given_for
from galore_mem.followed import follow, trace
from galore_mem.memory.tensor import GRADIENTS, OPTIMIZER_STATE, WEIGHTS
from galore_mem.methods.registry import METHODS
from galore_mem.setup import RECIPES, Setup

WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpointing": {"gradient_checkpointing": True},
    "layer-wise": {"layerwise": True},
    "layer-wise, accumulated": {"layerwise": True, "gradient_accumulation": 3},
    "amp": {"recipe": RECIPES["amp-bf16"]},
    "master": {"recipe": RECIPES["bf16-fp32-master"]},
    "accumulation": {"gradient_accumulation": 3},
    "gradients kept": {"keep_gradients": True},
    "output kept": {"keep_logits": "step"},
    "output kept until the next": {"keep_logits": "next"},
    "keys and values kept": {"use_cache": True, "keep_logits": "step"},
    "fp32, eager": {"recipe": RECIPES["fp32"], "attention": "eager"},
}
# their steps let the gradient go; what a loop then zeroes is another's
LETS_GO = ("galore-torch", "galore-torch-bnb-0.50", "q-galore-torch")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", METHODS)
def test_the_whole_run_has_the_closed_forms_peaks(name: str, way: str) -> None:
    """Step after step with every layer, and two shallow runs: the same bytes in every phase, for every
    implementation."""
    method, setup = METHODS[name], Setup(seq_len=64, **WAYS[way])
    for code in method.implementations:
        if (setup.layerwise and not code.layerwise) or (setup.keep_gradients and code.name in LETS_GO):
            continue
        case = Case(small(layers=5), setup, method, code, None, given_for(method, {"rank": 16}))
        try:
            said = {phase.name: phase.allocated_bytes for phase in budget(case).phases}
        except InputError:  # of this model or setup there is no estimate
            continue
        peaks = trace(case.work()).peaks()
        if name == "qlora":  # a load that quantizes has temporaries
            assert peaks["load"].total > said.pop("load")
        assert {phase: peaks[phase].total for phase in said} == said, code.name


def test_everything_that_stays_is_there_at_the_end() -> None:
    """AdamW on a small LLaMA in bfloat16: weights, and twice their size of state; gradients are gone. Each of the two
    buffers (the rotary embedding's frequencies, and a copy) has a block of 512 bytes."""
    adamw = METHODS["adamw"]
    case = Case(small(layers=3), Setup(seq_len=64), adamw, adamw.implementations[0], None, {})
    made = budget(case)
    rest = trace(case.work()).residents()
    assert (rest[WEIGHTS], rest[GRADIENTS], rest[OPTIMIZER_STATE]) == (
        made.weights_bytes + 2 * 512, 0, made.optimizer_state_bytes,
    )  # fmt: skip


def test_slack_is_what_the_blocks_have_more() -> None:
    """Without it, the moments are the closed form's; with it, what is allocated is below what is reserved."""
    (plain,) = galore_mem.estimate("llama-60m", ["galore"], setup=Setup(seq_len=128)).estimates
    (made,) = galore_mem.estimate("llama-60m", ["galore"], setup=Setup(seq_len=128), reserved=True).estimates
    assert made.peak_reserved_bytes is not None
    assert [phase.name for phase in made.phases] == [phase.name for phase in plain.phases]
    for with_slack, without in zip(made.phases, plain.phases, strict=True):
        assert with_slack.slack_bytes is not None
        assert with_slack.reserved_bytes is not None
        assert without.allocated_bytes <= with_slack.allocated_bytes <= with_slack.reserved_bytes
        assert with_slack.allocated_bytes - with_slack.slack_bytes <= without.allocated_bytes
    assert made.peak_reserved_bytes == max(phase.reserved_bytes or 0 for phase in made.phases)
    assert made.confidence is not None
    assert made.confidence.reserved_band is not None
    assert made.reserve is None


def test_adapters_come_after_the_model() -> None:
    """LoRA's matrices are put beside a model that is loaded: in the order of allocations the base is whole first."""
    lora = METHODS["lora"]
    code, given = lora.implementation("peft"), given_for(lora, {"rank": 8})
    case = Case(small(layers=2), Setup(seq_len=64), lora, code, None, given)
    found = trace(case.work())
    loaded = [found.allocations[n].nbytes for n in found.events[: found.marks[1].at]]
    sgd = METHODS["sgd"]
    base = budget(Case(small(layers=2), Setup(seq_len=64), sgd, sgd.implementations[0], None, given_for(sgd, {})))
    frozen, whole = 0, base.weights_bytes
    for nbytes in loaded:
        if frozen == whole:
            break
        frozen += nbytes
    assert frozen == whole


@pytest.mark.parametrize(
    ("given", "expected"),
    [({"setup": Setup(seq_len=64, device="cpu")}, "--device cpu"), ({"convention": "paper"}, "--convention paper")],
)
def test_where_there_is_no_allocator(given: dict[str, Any], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        galore_mem.estimate("llama-60m", ["sgd"], reserved=True, **given)
    sgd = METHODS["sgd"]
    with pytest.raises(InputError, match="--device cpu"):
        follow(Case(small(), Setup(device="cpu"), sgd, sgd.implementations[0], None, {}).work())


SAME: list[tuple[str, dict[str, Any]]] = [
    ("adamw", {}),
    ("adamw", {"load": "device-map"}),
    ("adamw", {"recipe": RECIPES["amp-bf16"], "keep_gradients": True, "transformers": "4.57"}),
    ("galore", {}),
    ("galore-mini", {"layerwise": True}),
    ("lora", {"gradient_checkpointing": True}),
    ("qlora", {"keep_logits": "step"}),
]


@pytest.mark.parametrize(("method", "how"), SAME, ids=[f"{method} {' '.join(how)}".strip() for method, how in SAME])
def test_simulate_says_the_same(method: str, how: dict[str, Any]) -> None:
    """A run of the real model and optimizer through the same allocator: the same peaks, slack included, but for two
    blocks of 512 bytes (the loss, which the estimate has in the step; the table of codes, which QLoRA's has not); and
    the same reserve, but for one segment of 2 MiB (GaLore's, whose first step the twin takes without its SVD)."""
    simulate = pytest.importorskip("galore_mem.simulate").simulate
    setup = Setup(seq_len=256, **how)
    rank = None if method == "adamw" else 64
    (said,) = galore_mem.estimate("llama-60m", [method], setup=setup, rank=rank, reserved=True).estimates
    (real,) = simulate("llama-60m", [method], setup=setup, rank=rank).estimates
    right = {phase.name: phase.allocated_bytes for phase in real.phases}
    phases = {phase.name: phase.allocated_bytes for phase in said.phases}
    phases["forward"] = max(phases["forward"], phases["loss"])
    for name in ("forward", "backward", "step"):
        assert name not in phases or abs(phases[name] - right[name]) <= 2 * 512, name
    assert said.peak_reserved_bytes is not None
    assert abs(said.peak_reserved_bytes - real.peak_reserved_bytes) <= 2 << 20


def test_torch_is_not_needed() -> None:
    asked = "galore_mem.estimate('llama-60m', ['galore'], reserved=True)"
    program = f"import sys, galore_mem; {asked}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
