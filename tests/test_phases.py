"""Phases of deep models from shallow runs, and the arithmetic every estimate must keep."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from galore_mem.estimator import Case, budget, estimate, given_for, select
from galore_mem.families import family
from galore_mem.memory import phases
from galore_mem.memory.phases import Work, stepping, training
from galore_mem.methods.base import Job
from galore_mem.methods.registry import METHODS
from galore_mem.setup import Setup, recipe
from galore_mem.spec.config import model_from_config
from galore_mem.spec.model import ModelSpec
from galore_mem.spec.resolve import bundled, resolve

CODES = [(m, code) for m in METHODS.values() for code in m.implementations]
NAMES = [f"{m.name}-{code.name}" for m, code in CODES]
SETUPS = {
    "plain": Setup(seq_len=256),
    "checkpointing": Setup(seq_len=256, batch_size=2, gradient_checkpointing=True),
    "eager-fp32": Setup(recipe("fp32"), seq_len=128, attention="eager"),
    "amp": Setup(recipe("amp-bf16"), seq_len=128),
    "master": Setup(recipe("bf16-fp32-master"), seq_len=128, keep_logits="step"),
    "kept": Setup(seq_len=128, keep_gradients=True, loss="chunked"),
    "accumulated": Setup(seq_len=128, gradient_accumulation=4, loss="fused", attention="flash"),
    "layerwise": Setup(seq_len=128, layerwise=True),
    "keys-and-values": Setup(seq_len=128, use_cache=True, keep_logits="next"),
}


def small(family_name: str = "llama", layers: int = 9, **changes: object) -> ModelSpec:
    """A narrow model of many layers; widths such that no two phases tie."""
    config = {
        "llama": {"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 688, "num_attention_heads": 8},
        "gpt2": {"vocab_size": 4096, "n_embd": 256, "n_head": 8, "n_positions": 512},
        "bert": {
            "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 8,
            "max_position_embeddings": 512, "type_vocab_size": 2,
        },
    }[family_name]  # fmt: skip
    depth = "n_layer" if family_name == "gpt2" else "num_hidden_layers"
    return model_from_config({"model_type": family_name, **config, depth: layers, **changes}, family_name, "test")


def work(model: ModelSpec, setup: Setup, name: str = "adamw", code: str | None = None, **given: int) -> Work:
    method = METHODS[name]
    found = method.implementation(code)
    job = Job(given_for(method, given), setup.recipe, setup.device, model.heads)
    assert model.family is not None
    return Work(model, setup, found, job, None, family(model.family).forward)


@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.parametrize("family_name", ["llama", "gpt2", "bert"])
def test_two_shallow_runs_equal_the_full_depth(family_name: str, setup: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one = work(small(family_name), SETUPS[setup])
    extrapolated = training(one)
    monkeypatch.setattr(phases, "SHALLOW", 99)
    full = training(one)
    assert {k: m.live for k, m in extrapolated.peaks.items()} == {k: m.live for k, m in full.peaks.items()}
    assert extrapolated.retained == full.retained


@pytest.mark.parametrize("refresh", [False, True])
@pytest.mark.parametrize("passes", [2, 5])
@pytest.mark.parametrize("name", ["galore", "galore-8bit", "adam-mini"])
def test_a_layerwise_update_that_waits_is_known_from_shallow_runs(
    name: str, passes: int, refresh: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = Setup(seq_len=64, layerwise=True, gradient_accumulation=passes)
    one = work(small(), setup, name, "galore-mem", **({} if name == "adam-mini" else {"rank": 16}))
    extrapolated = training(one, refresh)
    monkeypatch.setattr(phases, "SHALLOW", 99)
    full = training(one, refresh)
    assert {k: m.live for k, m in extrapolated.peaks.items()} == {k: m.live for k, m in full.peaks.items()}


STEPPED = {
    "plain": SETUPS["plain"],
    "master": SETUPS["master"],
    "fp32": SETUPS["eager-fp32"],
    "cpu": replace(SETUPS["plain"], device="cpu"),
}


@pytest.mark.parametrize("setup", STEPPED)
@pytest.mark.parametrize(("method", "code"), CODES, ids=NAMES)
def test_steps_of_shallow_runs_equal_the_full_depth(
    method: object, code: object, setup: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = work(small(), STEPPED[setup], method.name, code.name, rank=16)
    extrapolated = {name: m.live for name, m in stepping(one).peaks.items()}
    monkeypatch.setattr(phases, "SHALLOW", 99)
    assert extrapolated == {name: m.live for name, m in stepping(one).peaks.items()}
    assert set(extrapolated) == ({"step", "refresh"} if code.refreshes else {"step"})


@pytest.mark.parametrize("name", ["galore", "galore-8bit", "galore-mini", "q-galore", "lora", "qlora", "low-rank"])
@pytest.mark.parametrize("setup", ["layerwise", "checkpointing", "amp"])
def test_other_stores_and_hooks_equal_the_full_depth(name: str, setup: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one = work(small(), SETUPS[setup], name, rank=16)
    passes = (False, True) if SETUPS[setup].layerwise else (False,)
    extrapolated = [{k: m.live for k, m in training(one, refresh).peaks.items()} for refresh in passes]
    monkeypatch.setattr(phases, "SHALLOW", 99)
    assert extrapolated == [{k: m.live for k, m in training(one, refresh).peaks.items()} for refresh in passes]


@pytest.mark.parametrize("layers", [1, 2, 3, 4, 5, 40])
def test_any_depth_has_phases(layers: int) -> None:
    result = estimate(small(layers=layers), ["adamw", "lomo"], setup=SETUPS["plain"])
    for e in result.estimates:
        assert e.peak_allocated_bytes >= e.weights_bytes


def test_activations_are_affine_in_the_number_of_layers() -> None:
    """What one more layer adds is what 10 layers have above 9."""
    peaks = [training(work(small(layers=n), SETUPS["plain"])).peaks["loss"] for n in (9, 10)]
    step = tuple(b - a for a, b in zip(peaks[0].live, peaks[1].live, strict=True))
    assert peaks[0].per_layer == peaks[1].per_layer == step


@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.parametrize(("method", "code"), CODES, ids=NAMES)
def test_components_sum_to_the_peak(method: object, code: object, setup: str) -> None:
    chosen = SETUPS[setup]
    if chosen.layerwise and not code.layerwise:
        chosen = replace(chosen, layerwise=False)
    values = given_for(method, {"rank": 16})
    made = budget(Case(small(layers=6), chosen, method, code, None, values))
    assert made.peak_allocated_bytes == max(p.allocated_bytes for p in made.phases)
    for phase in made.phases:
        assert all(isinstance(n, int) and n >= 0 for n in phase.components)
        assert phase.allocated_bytes == sum(phase.components)
    resident = made.weights_bytes + made.optimizer_state_bytes
    assert made.peak_allocated_bytes >= resident


# q-galore-torch swaps its weights' codes and 8-bit GaLore its gradients while it steps
SWAPS = {"q-galore-torch", "galore-torch"}


@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.parametrize(("method", "code"), CODES, ids=NAMES)
def test_state_is_there_in_every_phase_after_load(method: object, code: object, setup: str) -> None:
    """In steady state the optimizer's tensors, and a master copy, exist from the first forward pass on."""
    chosen = SETUPS[setup]
    if chosen.layerwise and not code.layerwise:
        chosen = replace(chosen, layerwise=False)
    values = given_for(method, {"rank": 16})
    made = budget(Case(small(layers=6), chosen, method, code, None, values))
    for phase in made.phases:
        if phase.name == "load":
            assert phase.components[2] == 0
        elif code.name not in SWAPS:
            assert phase.components[2] >= made.optimizer_state_bytes, phase.name


def test_kept_logits_lie_there_in_the_step() -> None:
    """batch x length x vocabulary in bfloat16: 1 x 256 x 4096 x 2 bytes."""
    plain, kept = (
        estimate(small(), ["adamw"], setup=Setup(seq_len=256, keep_logits=keep)).estimates[0]
        for keep in ("none", "step")
    )
    steps = [next(p for p in e.phases if p.name == "step").allocated_bytes for e in (plain, kept)]
    assert steps[1] - steps[0] == 256 * 4096 * 2


def test_residents_at_step_are_the_ledger() -> None:
    """On the CPU, where nothing is rounded, the step's weights, gradients and state are the tensors' exact sums; among
    the weights are the model's buffers."""
    setup = replace(SETUPS["eager-fp32"], device="cpu")
    for e in estimate(small(), setup=setup, rank=16).estimates:
        if e.layerwise or e.method in ("galore-8bit", "q-galore"):  # these replace gradients while stepping
            continue
        step = next(p for p in e.phases if p.name == "step")
        weights = e.weights_bytes + (e.buffers_bytes or 0)
        assert step.components[:3] == (weights, e.gradients_bytes, e.optimizer_state_bytes), e.method


METHOD_NAMES = sorted(METHODS)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.sampled_from(METHOD_NAMES),
    st.integers(1, 3),
    st.integers(1, 200),
    st.integers(1, 120),
    st.sampled_from(["batch_size", "seq_len", "rank"]),
    st.integers(1, 64),
)
def test_more_of_anything_never_takes_less(
    name: str, batch_size: int, seq_len: int, rank: int, grown: str, more: int
) -> None:
    def peak(values: dict[str, int]) -> int:
        setup = Setup(batch_size=values["batch_size"], seq_len=values["seq_len"], device="cpu")
        return estimate(MODEL, [name], setup=setup, rank=values["rank"]).estimates[0].peak_allocated_bytes

    values = {"batch_size": batch_size, "seq_len": seq_len, "rank": rank}
    assert peak({**values, grown: values[grown] + more}) >= peak(values)


MODEL = small(layers=5)


@pytest.mark.parametrize("name", bundled())
def test_every_bundled_model_under_every_method(name: str) -> None:
    model = resolve(name)
    result = estimate(model, rank=64)
    assert len(result.estimates) == len(METHODS)
    assert all(e.peak.allocated_bytes > e.weights_bytes for e in result.estimates)
    assert {p.name for p in result.estimates[0].phases} == {"load", "forward", "loss", "backward", "step"}


def test_selecting_all_implementations() -> None:
    found = list(select(["adamw"], "all", "implementation", Setup()))
    assert [code.name for _, code in found] == ["torch-foreach", "torch-fused", "torch-loop"]
