"""Builders: every implementation of the registry has a row or a reason, and what runs here is measured as predicted.

End to end in this process. (The command line runs each case in a process of its own.)
"""

from __future__ import annotations

import gc
import subprocess
import sys
from collections import deque
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from galore_mem.methods.registry import METHODS
from galore_mem.verify import builders
from galore_mem.verify.builders import Builder, CannotRun, builder, every
from galore_mem.verify.case import OPTIMIZER, RESIDENTS, TRAIN, Case, Outcome
from galore_mem.verify.matrix import hyperparameters
from galore_mem.verify.models import ledger_name
from galore_mem.verify.peers import BUILDERS, NOT_BUILT
from galore_mem.verify.predict import predict
from galore_mem.verify.runner import judged
from galore_mem.verify.worker import run

# Of a phase's peak. Scalars (step counters, losses, norms) are the only allocations that programs leave out: some
# hundred bytes of half a megabyte at least.
EXACT = 1e-3
PEERS = sorted(
    {
        "galore_torch", "adam_mini", "pytorch_optimizer", "apollo_torch", "q_galore_torch", "came_pytorch", "fira",
        "torchao", "lomo_optim", "flora_opt", "neuralop", "tensorly",
    }
)  # fmt: skip
ALL = sorted(every())


def names(keys: list[tuple[str, str]]) -> list[str]:
    return ["-".join(key) for key in keys]


def outcome_of(
    method: str, implementation: str, workload: str = OPTIMIZER, model: str = "small-tied", fmt: str = "fp32",
    options: Mapping[str, Any] | None = None, **told: int | str,
) -> Outcome:  # fmt: skip
    """One case in this process. Garbage of the case before is collected first: freed during this one, it would be
    subtracted from what this one has."""
    gc.collect()
    passes = {"batch_size": 2, "seq_len": 32} if workload == TRAIN else {}
    hyper = {**hyperparameters(method), **told}
    return run(Case(model, method, implementation, workload, fmt, {**passes, **(options or {})}, hyper))


def check(outcome: Outcome, tolerance: float = EXACT) -> None:
    """No byte of what stays differs, in the whole or in any tensor; peaks to the tolerance. Skips what is missing."""
    if outcome.status == "unsupported" and "not installed" in outcome.detail:
        pytest.skip(outcome.detail)
    result = judged(outcome, tolerance)
    assert result.status == "ok", result.detail
    assert result.measured is not None
    assert result.predicted is not None
    for name in RESIDENTS:
        assert getattr(result.predicted, name) == getattr(result.measured, name), name
    assert set(result.measured.phases) == set(result.predicted.phases) | set(result.not_compared)


# -- the table ---------------------------------------------------------------------------------------------


def test_every_implementation_has_a_row_or_a_reason() -> None:
    registry = {(m.name, code.name) for m in METHODS.values() for code in m.implementations}
    assert set(BUILDERS) | set(NOT_BUILT) == registry
    assert not set(BUILDERS) & set(NOT_BUILT)
    assert all(NOT_BUILT.values())


def test_what_is_not_built_says_why() -> None:
    with pytest.raises(CannotRun, match="no package of an index"):
        builder("relora", "relora")
    with pytest.raises(CannotRun, match="no builder"):
        builder("adamw", "someone-elses")
    outcome = outcome_of("relora", "relora", TRAIN)
    assert (outcome.status, "Guitaricet" in outcome.detail) == ("unsupported", True)


def test_a_missing_package_is_named_as_pip_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each package of the table away, one after another: the rows that need it, and no others, say so."""
    for module in PEERS:
        with monkeypatch.context() as patched:
            patched.setattr(builders, "find_spec", lambda name, gone=module: None if name == gone else object())
            lacking = {key for key, row in BUILDERS.items() if row.missing()}
        assert lacking == {key for key, row in BUILDERS.items() if module in row.needs}
        assert lacking
    assert Builder(print, ("neuralop", "flora_opt", "pytorch_optimizer")).needs  # as pip calls them:
    monkeypatch.setattr(builders, "find_spec", lambda name: None)
    assert Builder(print, ("neuralop", "flora_opt")).missing() == ["neuraloperator", "flora-opt"]
    outcome = outcome_of("tensor-galore", "neuraloperator")
    assert outcome.status == "unsupported"
    assert outcome.detail == "needs the package neuraloperator, tensorly, which is not installed"


def test_missing_packages_are_known_without_torch() -> None:
    program = (
        "import sys; from galore_mem.verify.builders import every, missing;"
        "print([missing(*key) for key in every() if key != ('relora', 'relora')][0], 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[] False\n"


def test_workloads_that_a_row_has_not() -> None:
    outcome = outcome_of("relora", "galore-mem")
    assert outcome.status == "unsupported"
    assert "use --workload train" in outcome.detail


def test_recipes_that_verify_does_not_run() -> None:
    outcome = outcome_of("adamw", "torch-loop", fmt="bf16-fp32-master")
    assert outcome.status == "unsupported"
    assert "master copy" in outcome.detail


def test_what_a_ledger_does_not_count_is_not_compared() -> None:
    work = predict(Case("small-tied", "galore-2", "galore-mem", hyperparameters={"rank": 64})).work
    row = BUILDERS["galore-2", "galore-mem"]
    most = 96 * 4 * (64 + 10)  # bytes of the QR driver's workspace at rank 64 with 10 columns more: 28,416
    assert set(row.left_out(OPTIMIZER, work, {"refresh": 99 * most})) == {"refresh"}
    assert row.left_out(OPTIMIZER, work, {"refresh": 101 * most}) == {}
    compiled = BUILDERS["adamw-4bit", "torchao"]
    hooked = predict(Case("small-tied", "adamw-4bit", "torchao", TRAIN, "fp32", {"layerwise": True, "seq_len": 8})).work
    assert set(compiled.left_out(TRAIN, work, {})) == {"step"}
    assert set(compiled.left_out(TRAIN, hooked, {})) == {"step", "backward"}
    assert "not compared: step, backward (torchao" in compiled.told(hooked, compiled.left_out(TRAIN, hooked, {}))


@pytest.mark.parametrize(
    ("real", "its"),
    [
        ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("model.layers.0.mlp.up_proj.weight_a", "model.layers.0.mlp.up_proj.weight_a"),
        ("base_model.model.model.norm.weight", "model.norm.weight"),
        (
            "base_model.model.model.layers.1.self_attn.q_proj.base_layer.weight",
            "model.layers.1.self_attn.q_proj.weight",
        ),
        ("base_model.model.transformer.h.0.attn.c_attn.base_layer.bias", "transformer.h.0.attn.c_attn.bias"),
        (
            "base_model.model.model.layers.1.self_attn.q_proj.lora_A.default.weight",
            "model.layers.1.self_attn.q_proj.weight.lora_A.default.weight",
        ),
    ],
)
def test_names_of_changed_models(real: str, its: str) -> None:
    assert ledger_name(real) == its


class Hiding(torch.optim.AdamW):
    """Keeps tensors wherever an optimizer can."""

    def step(self, closure: Any = None) -> Any:
        self.state["everywhere"] = {"x": torch.zeros(1000)}  # type: ignore[index]  # torch allows it
        self.param_groups[0]["scale"] = torch.zeros(2000)
        self.net = torch.nn.BatchNorm1d(3000)
        self.window = deque([torch.zeros(4000)])
        return super().step(closure)


def test_what_an_optimizer_hides_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """4 bytes x (1000 + 2000 + 4000 + 2 x 3000 running statistics) and a batch counter of 8; a module's parameters
    would be taken for the model's."""
    hiding = Builder(lambda request: Hiding([m.p for m in request.members], foreach=False))
    monkeypatch.setitem(BUILDERS, ("adamw", "torch-loop"), hiding)
    outcome = outcome_of("adamw", "torch-loop")
    assert judged(outcome, 0.5).status == "mismatch"
    assert outcome.predicted is not None
    assert outcome.measured is not None
    assert outcome.measured.optimizer_state_bytes - outcome.predicted.optimizer_state_bytes == 4 * 13_000 + 8
    unknown = {b.buffer: b.measured_bytes for b in outcome.buffers if b.predicted_bytes is None}
    assert sorted(unknown.values(), key=int) == [8, 4_000, 8_000, 12_000, 12_000, 16_000]  # type: ignore[arg-type]  # texts of numbers


# -- optimizers alone --------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", ["fp32", "pure-bf16"])
@pytest.mark.parametrize(("method", "implementation"), ALL, ids=names(ALL))
def test_optimizer(method: str, implementation: str, fmt: str) -> None:
    """Square matrices below 4,096 elements, ranks above the side, tied embeddings."""
    outcome = outcome_of(method, implementation, fmt=fmt)
    if (method, implementation) in NOT_BUILT or OPTIMIZER not in BUILDERS[method, implementation].workloads:
        assert outcome.status == "unsupported"
        return
    if (implementation, fmt) == ("neuraloperator", "pure-bf16") and "not installed" not in outcome.detail:
        assert (outcome.status, "no bfloat16" in outcome.detail) == ("unsupported", True)
        return
    check(outcome)


@pytest.mark.parametrize(
    ("method", "implementation"),
    [
        ("galore", "galore-mem"), ("galore-8bit", "galore-mem"), ("galore-mini", "galore-mem"),
        ("q-galore", "galore-mem"), ("flora", "galore-mem"), ("adam-mini", "galore-mem"),
        ("adamw-8bit", "bitsandbytes"), ("galore", "galore-torch"), ("galore-8bit", "galore-torch"),
        ("flora", "flora-opt"), ("qlora", "peft"),
    ],
)  # fmt: skip
def test_shapes_of_all_kinds(method: str, implementation: str) -> None:
    """m > n, m < n, grouped queries, ranks above and below the smaller side, sizes that no block divides."""
    check(outcome_of(method, implementation, model="small-llama", fmt="pure-bf16"))


@pytest.mark.parametrize("side", ["std", "reverse_std", "full"])
def test_sides(side: str) -> None:
    check(outcome_of("galore-mini", "galore-mem", model="small-llama", rank=16, proj_type=side))
    check(outcome_of("galore", "galore-torch", model="small-llama", rank=16, proj_type=side))


def test_hyperparameters_reach_the_optimizer() -> None:
    """Momentum 0 keeps nothing; a first moment adds one."""
    check(outcome_of("sgd", "torch-loop", momentum=0))
    for beta1 in (0, "0.9"):
        check(outcome_of("adafactor", "transformers", beta1=beta1))
        check(outcome_of("flora", "galore-mem", beta1=beta1))
        check(outcome_of("galore-adafactor", "galore-mem", beta1=beta1))


@pytest.mark.parametrize(
    ("method", "implementation"),
    [("galore", "galore-mem"), ("galore-mini", "galore-mem"), ("q-galore", "galore-mem"), ("adamw", "torch-loop"),
     ("adamw-8bit", "bitsandbytes"), ("galore-8bit", "galore-torch"), ("galore", "galore-torch"),
     ("lomo", "lomo-optim")],
)  # fmt: skip
def test_layerwise(method: str, implementation: str) -> None:
    """One gradient at a time (LOMO: two), ours in its own hooks, another's with one optimizer a parameter."""
    outcome = outcome_of(method, implementation, options={"layerwise": True})
    check(outcome)
    assert outcome.measured is not None
    assert outcome.measured.gradients_bytes == 97 * 48 * 4  # the embedding's


def test_galore_torch_pins_whole_factors_in_float32() -> None:
    """A fact of galore-torch 1.0: in float32 the projector is a view of all of U (or V), 48 x 48 x 4 bytes whatever the
    rank; ours has 48 x 8."""
    found = {}
    for implementation in ("galore-torch", "galore-mem"):
        outcome = outcome_of("galore", implementation, rank=8)
        check(outcome)
        name = "model.layers.0.self_attn.q_proj.weight"
        found[implementation] = {
            b.measured_bytes for b in outcome.buffers if b.param == name and b.buffer[:4] == "proj"
        }
    assert found == {"galore-torch": {48 * 48 * 4}, "galore-mem": {48 * 8 * 4}}


def test_int4_of_q_galore_torch_takes_a_byte() -> None:
    """48 x 32 values: 1,536 bytes in the package, half of that in ours."""
    found = {}
    for implementation in ("q-galore-torch", "galore-mem"):
        outcome = outcome_of("q-galore", implementation, rank=32)
        check(outcome)
        name = "model.layers.0.self_attn.q_proj.weight"
        codes = [b for b in outcome.buffers if b.param == name and b.buffer in ("projector", "projector.ortho_matrix")]
        found[implementation] = [b.measured_bytes for b in codes]
    assert found == {"q-galore-torch": [48 * 32], "galore-mem": [48 * 32 // 2]}


# -- whole training steps ----------------------------------------------------------------------------------

TRAINED = [
    ("adamw", "torch-foreach"), ("adamw-8bit", "bitsandbytes"), ("adafactor", "transformers"),
    ("low-rank", "torch-fused"), ("lora", "peft"), ("relora", "galore-mem"), ("flora", "galore-mem"),
    ("galore", "galore-mem"), ("galore-8bit", "galore-mem"), ("q-galore", "galore-mem"), ("galore-mini", "galore-mem"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "implementation"), TRAINED, ids=names(TRAINED))
def test_train(method: str, implementation: str) -> None:
    check(outcome_of(method, implementation, TRAIN))


def test_train_with_checkpointing() -> None:
    options = {"gradient_checkpointing": True}
    check(outcome_of("galore-mini", "galore-mem", TRAIN, options=options))
    # the estimate keeps the embeddings' gradient (2 x 32 x 48 values) until the step
    check(outcome_of("lora", "peft", TRAIN, options=options), 0.02)


def test_train_qlora() -> None:
    """bitsandbytes keeps one more table of 1 KiB in a process; 1 % of the smallest peak. GPT-2's layers have biases,
    which bitsandbytes casts to bfloat16 in the first forward pass."""
    for model in ("small-tied", "small-gpt2"):
        check(outcome_of("qlora", "peft", TRAIN, model=model, fmt="pure-bf16"), 0.01)


@pytest.mark.parametrize("method", ["galore", "galore-mini", "q-galore"])
def test_train_layerwise(method: str) -> None:
    outcome = outcome_of(method, "galore-mem", TRAIN, options={"layerwise": True})
    check(outcome)
    assert outcome.measured is not None
    assert {"forward", "backward", "refresh"} == set(outcome.measured.phases)


def test_train_transposed_layers() -> None:
    """GPT-2 stores its matrices in x out."""
    for method, implementation in (("galore-mini", "galore-mem"), ("low-rank", "torch-loop"), ("lora", "peft")):
        check(outcome_of(method, implementation, TRAIN, model="small-gpt2"))


def test_train_accumulates_and_autocasts() -> None:
    check(outcome_of("galore", "galore-mem", TRAIN, options={"gradient_accumulation": 2}))
    check(outcome_of("adamw", "torch-foreach", TRAIN, fmt="amp-bf16"), 0.02)


def test_nothing_is_left_patched() -> None:
    """What a row changes around its run is undone. Without CUDA, `synchronize` fails outside of it."""
    before = torch.cuda.synchronize
    with BUILDERS["galore-8bit", "galore-torch"].around():
        torch.cuda.synchronize()
    assert torch.cuda.synchronize is before
