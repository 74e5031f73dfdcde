"""Models of any family, and of one's own, beside their real runs on the CPU; and programs that cannot be simulated."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from simulate_models import CONFIGS, EAGER, SMALL, config, work
from simulate_runs import measured
from torch import Tensor, nn

from galore_mem.errors import InputError
from galore_mem.memory.tensor import OPTIMIZER_STATE, WEIGHTS
from galore_mem.setup import Setup, recipe
from galore_mem.simulate.layers import trace_layers
from galore_mem.simulate.session import META, Traced, trace_work
from galore_mem.simulate.steps import run_step, trace_step
from galore_mem.simulate.subjects.models import spec_of, stack_of, with_layers
from galore_mem.simulate.subjects.subject import subject
from galore_mem.simulate.tracing import branches
from galore_mem.spec.model import ModelSpec
from galore_mem.verify.builders import builder
from galore_mem.verify.workloads import Measured, run_train

CPU = torch.device("cpu")
FP32 = Setup(recipe("fp32"), device="cpu")
# Bytes. Python's numbers beside tensors become tensors of up to 8 bytes in C++, which no dispatch mode sees; some are
# kept for backward: gemma2's soft caps, GPT-OSS' limits (for each use one).
SCALARS = 64
PHASES = ("forward", "backward", "step", "refresh")


def same(simulated: Traced, found: Measured, peaks: dict[str, int]) -> None:
    """Is what stays equal, and each phase's highest moment, but for scalars?"""
    assert simulated.measured[:3] == found[:3]
    said = simulated.trace.peaks()
    for phase in PHASES:
        if phase in peaks:
            assert said[phase].total == pytest.approx(peaks[phase], abs=SCALARS)


# -- families of transformers ----------------------------------------------------------------------------------

WAYS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "qwen3": ("galore", "galore-mem", "pure-bf16", {}),
    "gemma2": ("adamw", "torch-loop", "pure-bf16", {"gradient_checkpointing": True}),
    "mixtral": ("galore-mini", "galore-mem", "pure-bf16", {}),
    "deepseek_v3": ("adamw", "torch-loop", "fp32", {"gradient_checkpointing": True}),
    "gpt_oss": ("adamw", "torch-foreach", "pure-bf16", {}),
    "opt": ("adamw", "torch-loop", "fp32", {"layerwise": True}),
    "falcon": ("adamw", "torch-loop", "fp32", {}),
    "diffllama": ("adamw", "torch-loop", "pure-bf16", {}),
    "doge": ("adamw", "torch-loop", "fp32", {"gradient_checkpointing": True}),
    "afmoe": ("adamw", "torch-loop", "fp32", {}),
}


@pytest.mark.parametrize("family", WAYS)
def test_a_family_beside_its_real_run(family: str) -> None:
    method, implementation, fmt, options = WAYS[family]
    run, row = work(family, method, implementation, fmt, **options), builder(method, implementation)
    found, peaks = measured(lambda meter: run_train(run, row, CPU, meter))
    same(trace_work(run, row), found, peaks)


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_is_built_and_cut(family: str) -> None:
    """A layer less has a layer's parameters less, and the first layers are of the same kinds."""
    run = work(family, more={"num_hidden_layers": 3})
    shallow = run._replace(model=with_layers(run.model, [0, 1]))
    names = {row.name for row in run.model.parameters()}
    less = {row.name for row in shallow.model.parameters()}
    assert less < names
    assert all(".2." in name for name in names - less)
    assert len(stack_of(nn_of(run)).layers) == 3


def nn_of(run: Any) -> nn.Module:
    from galore_mem.simulate.subjects.models import built

    return built(run)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model_type": "qwen33"}, "unknown model_type 'qwen33'; did you mean qwen3"),
        ({}, "unknown model_type 'None'"),
        (config("qwen3", hidden_size="wide"), "transformers refuses this qwen3 config"),
        (config("qwen3", layer_types=["full_attention"]), r"refuses this qwen3 config: .* must be equal to the number"),
        (config("opt", num_attention_heads=7), "transformers cannot build this opt: embed_dim must be divisible"),
        ({"model_type": "vit"}, "no causal or masked language model of the family vit"),
    ],
)
def test_configs_that_cannot_be(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        spec_of(given, "x")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "parameter"),
    [
        # variants and heads of families with a twin, which the twin does not describe
        (config("bert", is_decoder=True, architectures=["BertLMHeadModel"], type_vocab_size=2), "cls.predictions.bias"),
        (config("roberta", architectures=["RobertaForCausalLM"], type_vocab_size=2), "lm_head.bias"),
        # a class whose name does not say what it is, and infinity as transformers writes it
        ({"model_type": "bert-generation", **SMALL, "architectures": ["BertGenerationDecoder"]}, "lm_head.bias"),
        ({"model_type": "mamba2", **SMALL, "num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 2,
          "time_step_limit": [0.0, {"__float__": "Infinity"}]}, "backbone.layers.0.mixer.A_log"),
    ],
)  # fmt: skip
def test_configs_by_transformers_own_code(keys: dict[str, Any], parameter: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(keys), encoding="utf-8")
    found = subject(str(path))
    assert isinstance(found, ModelSpec)
    assert parameter in {row.name for row in found.parameters()}


@pytest.mark.parametrize("family", EAGER)
def test_attention_that_a_family_has_not(family: str) -> None:
    run = work(family, attention="sdpa")
    with pytest.raises(InputError, match=f"{family} has no sdpa attention in transformers; give --attention eager"):
        trace_layers(run, builder("adamw", "torch-loop"))


def attended(heads: int = 4, **mask: Any) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Queries of four heads, keys, values and a mask."""
    q, k, v = torch.zeros(2, 4, 8, 16), torch.zeros(2, heads, 8, 16), torch.zeros(2, heads, 8, 16)
    return q, k, v, torch.zeros(mask.pop("shape"), **mask) if mask else None


@pytest.mark.parametrize("gqa", [False, True])
@pytest.mark.parametrize(
    "operands",
    [
        attended(), attended(1), attended(2), attended(shape=(8, 8)), attended(shape=(2, 1, 8, 8)),
        attended(shape=(1, 4, 1, 8), dtype=torch.bool), attended(shape=(2, 8, 8)),
        attended(shape=(2, 4, 8, 8), requires_grad=True),
        (*attended()[:2], torch.zeros(2, 4, 16, 8).transpose(-1, -2), None),
        (*attended()[:2], torch.zeros(2, 4, 8, 8), None),
    ],
)  # fmt: skip
def test_which_attention_the_cpu_takes(operands: Any, gqa: bool) -> None:
    """torch's own choice: 0 is the math, 1 the fused kernel (SDPBackend)."""
    q, k, v, mask = operands
    with branches.on(FP32):
        said = branches.attention_kernel(q, k, v, mask, 0.0, gqa)
    assert said == {0: "math", 1: "cpu"}[torch._fused_sdp_choice(q, k, v, mask, 0.0, False, enable_gqa=gqa)]


# -- models of one's own -----------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """Two layers with dropout; `form` is what becomes of the loss."""

    def __init__(self, form: Callable[[Tensor], Any]) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True)
        self.stack = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 50)
        self.form = form

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        scores = self.head(self.stack(x))
        return self.form(nn.functional.cross_entropy(scores.flatten(0, 1), labels.flatten()))


class Told:
    def __init__(self, loss: Tensor) -> None:
        self.loss = loss


FORMS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Tensor, Tensor], Any]]] = {
    # how the loss is returned, and how the batch is given
    "number": (lambda loss: loss, lambda x, labels: {"x": x, "labels": labels}),
    "tuple": (lambda loss: (loss, None), lambda x, labels: (x, labels)),
    "dictionary": (lambda loss: {"loss": loss}, lambda x, labels: [x, labels]),
    "object": (Told, lambda x, labels: {"labels": labels, "x": x}),
}


def encoder(form: str, *, foreach: bool, anew: bool = False) -> Callable[[], Any]:
    """A training step with AdamW; its batch is kept, or made anew for each pass."""
    how, given = FORMS[form]

    def batch() -> Any:
        return given(torch.randn(3, 16, 32), torch.randint(0, 50, (3, 16)))

    def build() -> Any:
        model = Encoder(how)
        return model, torch.optim.AdamW(model.parameters(), foreach=foreach), batch if anew else batch()

    return build


@pytest.mark.parametrize(("foreach", "anew"), [(False, True), (True, False)])
def test_a_model_of_ones_own(foreach: bool, anew: bool) -> None:
    build = encoder("number", foreach=foreach, anew=anew)
    found, peaks = measured(lambda meter: run_step(build, FP32, 1, CPU, meter))
    same(trace_step(build, FP32), found, peaks)


@pytest.mark.parametrize("form", FORMS)
def test_losses_and_batches_have_many_forms(form: str) -> None:
    usual, other = (trace_step(encoder(name, foreach=False), FP32) for name in ("number", form))
    assert other.trace.peaks() == usual.trace.peaks()
    assert other.measured[:3] == usual.measured[:3]


def build_linear(loss: Any = None, frozen: bool = False, kind: Any = None) -> Callable[[], Any]:
    """A layer of 8 x 6 on 5 vectors, and an SGD with momentum."""

    def build() -> Any:
        model = nn.Linear(6, 8, bias=False)
        model.requires_grad_(not frozen)
        optimizer = (kind or torch.optim.SGD)(model.parameters(), momentum=0.9, foreach=False)
        made = (model, optimizer, torch.zeros(5, 6))
        return made if loss is None else (*made, loss)

    return build


def test_a_loss_of_output_and_batch() -> None:
    """Weights, and momentum after a step: 8 x 6 x 4 bytes each."""
    found = trace_step(build_linear(lambda output, batch: (output.sum() + batch.sum()).pow(2)), FP32)
    assert found.measured[:3] == (192, 192, 192)
    assert found.trace.peaks()["step"].live[WEIGHTS] == found.trace.peaks()["step"].live[OPTIMIZER_STATE] == 192


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (build_linear(), r"the model returned a tensor of shape \(5, 8\), where no loss is found"),
        (build_linear(lambda output, batch: {"logits": output}), "returned dict with logits, where no loss is found"),
        (build_linear(lambda output, batch: None), "returned NoneType, where no loss is found"),
        (build_linear(lambda output, batch: output.sum(), frozen=True), "depends on no parameter that is trained"),
        (lambda: 3, "must return a torch.nn.Module, a torch.optim.Optimizer .* and a batch .* it returned int"),
        (lambda: (nn.Linear(2, 2), 1, 2), "it returned Linear, int, int"),
    ],
)
def test_what_is_no_training_step(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        trace_step(build, FP32)
    assert "\n" not in str(caught.value)


# -- what has no values --------------------------------------------------------------------------------------------

QUESTIONS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "nonzero": (lambda x: x.nonzero(), "aten.nonzero.default"),
    "unique": (lambda x: x.unique(), "aten._unique2.default"),
    "mask": (lambda x: x[x > 0], "aten.index.Tensor"),
    "bincount": (lambda x: torch.bincount(x.long().flatten()), "aten.bincount.default"),
}


def asking(question: Callable[[Tensor], Any]) -> Callable[[], Any]:
    class Inner(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            question(y)
            return y

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.inner(x)
            return y.sum()

    def build() -> Any:
        model = Model()
        return model, torch.optim.SGD(model.parameters(), foreach=False), torch.zeros(5, 6)

    return build


@pytest.mark.parametrize("name", QUESTIONS)
def test_a_question_about_values_is_refused(name: str) -> None:
    question, operation = QUESTIONS[name]
    with pytest.raises(InputError) as caught:
        trace_step(asking(question), FP32)
    said = str(caught.value)
    assert said.startswith(f"the program asks for values, by {operation} in inner (test_simulate_models.py, line ")
    assert "\n" not in said


def test_a_card_is_not_asked_for() -> None:
    with pytest.raises(InputError, match=r"asks for a CUDA device \(test_simulate_models.py, line \d+\)"):
        trace_step(asking(lambda x: x.cuda()), FP32)


def test_other_errors_stay_what_they_are() -> None:
    def fail(x: Tensor) -> None:
        raise RuntimeError("of the model's own")

    with pytest.raises(RuntimeError, match="of the model's own"):
        trace_step(asking(fail), FP32)


def test_a_value_that_has_an_answer_is_told() -> None:
    """`.item()` of a bool, asked in each of the two steps: one line."""
    found = trace_step(asking(lambda x: (x > 0).any().item()), FP32)
    assert [(one.module, one.dtype, one.answer) for one in found.assumed] == [("inner", "bool", True)]


# -- runs leave nothing behind ---------------------------------------------------------------------------------------


def test_a_trace_does_not_change_afterwards() -> None:
    """What the program made is freed when it is dropped; the trace has ended by then."""
    found = trace_step(build_linear(lambda output, batch: output.sum()), FP32)
    events = list(found.trace.events)
    assert found.trace.residents()[WEIGHTS] == 192
    import gc

    gc.collect()
    assert found.trace.events == events


def test_tables_of_libraries_are_not_kept() -> None:
    """bitsandbytes keeps a table for the process: each run makes its own, and none stays on `meta`."""
    functional = pytest.importorskip("bitsandbytes.functional")
    run, row = work("llama", "qlora", "peft", "pure-bf16"), builder("qlora", "peft")
    before = dict(functional.name2qmap)
    first, second = trace_work(run, row), trace_work(run, row)
    assert first.trace.events == second.trace.events
    assert functional.name2qmap == before
    assert all(table.device != META for table in functional.name2qmap.values())
