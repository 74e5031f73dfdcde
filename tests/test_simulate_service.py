"""`simulate` as a service: beside the estimate, on cards, for models of every kind, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from galore_mem import estimate
from galore_mem.errors import InputError
from galore_mem.gpus import gpu
from galore_mem.report.schema import schema
from galore_mem.result import EstimateResult
from galore_mem.setup import Setup, recipe
from galore_mem.simulate import simulate
from galore_mem.simulate.result import SimulateResult
from galore_mem.spec.config import model_from_config
from galore_mem.units import MIB
from galore_mem.verify.matrix import SMALL, model_of

SETUP = Setup(batch_size=2, seq_len=64)
METHODS = ("adamw", "lora", "galore", "galore-mini")
RANK = 16
BLOCK = 512  # bytes of the smallest block


@pytest.fixture(scope="module")
def simulated() -> SimulateResult:
    return simulate(model_of("small-llama"), METHODS, setup=SETUP, rank=RANK, points=50)


@pytest.fixture(scope="module")
def estimated() -> EstimateResult:
    return estimate(model_of("small-llama"), METHODS, setup=SETUP, rank=RANK)


# -- beside the estimate -------------------------------------------------------------------------------------


def test_each_phase_is_the_estimates(simulated: SimulateResult, estimated: EstimateResult) -> None:
    """But for the loss, a block, which the estimate lets live through the step. The real model computes its loss in the
    forward pass."""
    for real, said in zip(simulated.estimates, estimated.estimates, strict=True):
        assert (real.method, real.implementation) == (said.method, said.implementation)
        expected = {p.name: p.allocated_bytes for p in said.phases}
        expected["forward"] = max(expected["forward"], expected.pop("loss"))
        for p in real.phases:
            if p.name in expected:
                more = expected[p.name] - (p.allocated_bytes - (p.slack_bytes or 0))
                assert more == (BLOCK if p.name in ("step", "refresh") else 0), (real.method, p.name)
        assert {p.name for p in real.phases} - expected.keys() == {"first-step"}


def test_what_stays_is_the_estimates(simulated: SimulateResult, estimated: EstimateResult) -> None:
    """To the byte."""
    for real, said in zip(simulated.estimates, estimated.estimates, strict=True):
        sizes = [(e.weights_bytes, e.gradients_bytes, e.optimizer_state_bytes) for e in (real, said)]
        assert sizes[0] == sizes[1], real.method


def test_parts_sum_to_the_byte(simulated: SimulateResult) -> None:
    for made in simulated.estimates:
        assert made.at_peak is not None
        assert sum(row.nbytes for row in made.at_peak.live) == made.peak_allocated_bytes
        assert made.peak_reserved_bytes is not None
        for p in made.phases:
            assert p.reserved_bytes is not None
            assert p.allocated_bytes <= p.reserved_bytes <= made.peak_reserved_bytes
        assert made.device_bytes == made.peak_reserved_bytes + made.outside_allocator_bytes


def test_json_is_as_its_schema_says(simulated: SimulateResult) -> None:
    data = json.loads(json.dumps(simulated.to_json()))
    jsonschema.validate(data, schema("simulate"))
    assert data["schema"] == "galore-mem.simulate/1"
    assert data["setup"]["torch"].startswith("2.")
    for made in data["estimates"]:
        assert sum(row["bytes"] for row in made["at_peak"]["live"]) == made["peak_allocated_bytes"]
        assert len(made["timeline"]["at"]) == len(made["timeline"]["weights"]) == 50


# -- ways to run it ------------------------------------------------------------------------------------------


def test_few_layers_say_what_all_of_them_say() -> None:
    """Ten layers, from two, three and four: the same to the byte."""
    spec = model_from_config({**SMALL["small-tied"], "num_hidden_layers": 10}, "deep", "made for this test")
    whole, few = (simulate(spec, ["adamw"], setup=SETUP, full=full) for full in (True, False))
    assert few.estimates[0].layers_traced == (2, 3, 4)
    assert whole.estimates[0].layers_traced == (10,)
    shown = [r.to_json()["estimates"][0] for r in (whole, few)]
    for made in shown:
        del made["layers_traced"], made["assumptions"]
    assert shown[0] == shown[1]
    assert (whole.setup["full"], few.setup["full"]) == (True, False)


def test_a_card_that_is_too_small() -> None:
    """A context of 512 MiB leaves 16: less than the 20 MiB that the first workspace of cuBLAS (8,519,680 bytes) takes
    beside weights."""
    result = simulate(model_of("small-tied"), ["adamw"], setup=SETUP, gpu="528MiB")
    [made] = result.estimates
    assert made.refusal is not None
    assert (made.refusal.requested, made.refusal.tried) == (8_519_680, 20 * MIB)
    assert made.refusal.place.phase == "first-step"
    assert made.fits is not None
    assert (made.fits.verdict, made.fits.gpu) == ("does_not_fit", "528MiB")
    jsonschema.validate(result.to_json(), schema("simulate"))


def test_the_cards_capability_decides() -> None:
    """cuBLAS takes 32 MiB twice on Hopper."""
    [made] = simulate(model_of("small-tied"), ["sgd"], setup=SETUP, gpu="h100-80gb").estimates
    assert made.outside_allocator_bytes == gpu("h100-80gb").context
    assert made.at_peak is not None
    assert [r.nbytes for r in made.at_peak.live if "cublas" in r.place.operation] == [2 * 33_554_432]


def test_layerwise_on_the_cpu() -> None:
    """Bytes of tensors, no allocator; the largest gradient alone: the embedding, 97 x 48 in float32."""
    setup = Setup(recipe("fp32"), batch_size=1, seq_len=16, layerwise=True, device="cpu")
    [made] = simulate(model_of("small-tied"), ["galore"], setup=setup, rank=4).estimates
    assert (made.peak_reserved_bytes, made.outside_allocator_bytes) == (None, 0)
    assert made.gradients_bytes == 97 * 48 * 4
    assert [p.name for p in made.phases] == ["load", "first-step", "forward", "backward", "refresh"]


def test_progress_is_told() -> None:
    seen: list[tuple[int, int, str]] = []
    simulate(model_of("small-tied"), ["sgd"], setup=SETUP, begun=lambda *said: seen.append(said))
    assert {said[:2] for said in seen} == {(0, 1)}
    assert seen[0][2] == "sgd (torch-foreach): the model is built"


# -- other models --------------------------------------------------------------------------------------------

QWEN3 = {
    "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 101,
    "max_position_embeddings": 32, "tie_word_embeddings": True,
    "auto_map": {"AutoModelForCausalLM": "evil--model.Evil"},
}  # fmt: skip


def test_a_family_without_a_twin(tmp_path: Path) -> None:
    """Qwen3. Its parameters: embedding 101 x 64; a layer has q 64 x 64, k and v 32 x 64, o 64 x 64, three of 96 x 64,
    two norms of 64 and two of 16; and a norm of 64. In bf16, and twice that of AdamW's state. Other people's code that
    the config names is not asked for."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN3))
    layer = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 96 * 64 + 2 * 64 + 2 * 16
    count = 101 * 64 + 2 * layer + 64
    result = simulate(str(tmp_path), ["adamw", "galore-mini"], rank=8)
    assert (result.model["family"], result.model["parameters"], result.model["layers"]) == ("qwen3", count, 2)
    assert result.model["parameters_projected"] == 2 * (layer - 2 * 64 - 2 * 16)
    assert result.setup["seq_len"] == 32
    assert (result.estimates[0].weights_bytes, result.estimates[0].optimizer_state_bytes) == (2 * count, 4 * count)
    assert result.estimates[1].optimizer_state_bytes < result.estimates[0].optimizer_state_bytes


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "no-such"}, "unknown model_type 'no-such'"),
        ({"model_type": "qwen3", "hidden_size": "wide"}, "transformers refuses this qwen3 config"),
        ({"model_type": "clip"}, "no causal or masked language model of the family clip"),
        ({**QWEN3, "quantization_config": {"bits": 4}}, "only models with unquantized weights are simulated"),
        ({"model_type": "llama"}, "hidden_size is missing"),
    ],
)
def test_configs_that_are_refused(config: dict[str, Any], expected: str, tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    path.write_text(json.dumps(config))
    with pytest.raises(InputError, match=expected):
        simulate(str(path), ["sgd"])


# -- refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"setup": Setup(seq_len=16, loss="fused")}, "a fused one can be estimated"),
        ({"warm_up": 2}, "--warm-up is for module:function"),
        ({"allocator": "backend:cudaMallocAsync"}, "only native is"),
        ({"setup": Setup(seq_len=16, device="cpu"), "gpu": "24GiB"}, "leave them out with --device cpu"),
        ({"methods": ["adamw"], "implementation": "nobody"}, "nobody"),
        ({"methods": ["fira"]}, r"fira \(fira\): needs the package fira, which is not installed"),
        ({"methods": ["adamw"], "setup": Setup(recipe("bf16-fp32-master"), seq_len=16)}, "no master copy"),
    ],
)
def test_what_the_run_does_not_do(given: dict[str, Any], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        simulate(model_of("small-tied"), **{"methods": ["sgd"], **given})


def test_tensor_shapes_alone_cannot_be_run() -> None:
    with pytest.raises(InputError, match=r"architecture is not known .* give its config\.json"):
        simulate(replace(model_of("small-tied"), family=None), ["sgd"], setup=SETUP)


def test_a_failure_of_one_method_does_not_end_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody named it: it is listed, with what its code said."""
    from galore_mem.simulate import service

    original = service.trace_layers

    def broken(work: Any, row: Any, **more: Any) -> Any:
        if work.code.name != "torch-loop":
            raise RuntimeError("no kernel\nadvice")
        return original(work, row, **more)

    monkeypatch.setattr(service, "trace_layers", broken)
    result = simulate(model_of("small-tied"), setup=SETUP, implementation="torch-loop")
    assert {made.implementation for made in result.estimates} == {"torch-loop"}
    with pytest.raises(InputError, match=r"sgd \(torch-foreach\): it cannot be run .*: RuntimeError: no kernel$"):
        simulate(model_of("small-tied"), ["sgd"], setup=SETUP)


# -- imports -------------------------------------------------------------------------------------------------


def test_the_package_is_imported_without_torch() -> None:
    program = (
        "import sys, galore_mem, galore_mem.cli, galore_mem.simulate, galore_mem.simulate.result\n"
        "import galore_mem.report.simulate, galore_mem.report.simulate_files, galore_mem.report.schema\n"
        "print({'torch', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_without_torch_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("galore_mem.simulate.find_spec", lambda name: None)
    with pytest.raises(InputError, match="needs torch and transformers; install galore-mem with its extra: verify"):
        from galore_mem.simulate import simulate as _  # noqa: F401  # importing it is what is tested
