"""Runs that others measured on GPUs (`benchmarks/accuracy`): how a row is read, its loop and its load, and that both
predictors say the same of a small one."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from galore_mem.allocator.events import Alloc, EmptyCache, Free
from galore_mem.errors import InputError
from galore_mem.memory.tensor import WEIGHTS
from galore_mem.simulate import loads
from galore_mem.simulate.trace import Allocation, Mark, Trace

SUITE = Path(__file__).parents[1] / "benchmarks" / "accuracy"
NAMES = ("report_limits", "gpu", "gpu_loops", "gpu_rows", "report_gpu")


@pytest.fixture
def suite(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The suite's modules, by attribute."""
    monkeypatch.syspath_prepend(str(SUITE))
    names = [path.stem for path in SUITE.glob("*.py") if path.stem != "__main__"]
    before = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    yield SimpleNamespace(**{n: import_module(n) for n in NAMES}, loads=loads)
    for name in names:
        sys.modules.pop(name, None)
    sys.modules.update(before)


CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 512, "hidden_size": 64,
    "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip
TOLD = {
    "id": "x-1", "source": "fitcheck-llm", "gpu": "Tesla T4", "mode": "train", "model": "small", "config": CONFIG,
    "versions": {"torch": "2.14.0", "transformers": "5.17.0", "peft": "0.20.0"}, "method": "lora", "rank": 4,
    "lora_targets": ["q_proj", "v_proj"], "dtype": "fp16", "batch": 2, "seq_len": 32, "gradient_checkpointing": True,
    "attention": "eager", "measured": {"peak_allocated_bytes": 1},
}  # fmt: skip


# -- rows ------------------------------------------------------------------------------------------------


def test_every_row_is_a_run_or_says_why_not(suite: Any) -> None:
    rows = list(suite.gpu.cases())
    assert len({row.key for row in rows}) == len(rows)
    for row in rows:
        assert row.title.startswith(row.key)
        if row.trains and not row.headless:
            assert row.case.work().forward is not None
    assert {row.key.partition("-")[0] for row in rows} == {"a6000", "t4", "preflight", "ao"}


@pytest.mark.parametrize(
    ("told", "recipe"),
    [
        ({"dtype": "fp16"}, "pure-fp16"),
        ({"dtype": "bf16", "recipe": "amp: fp32 weights, bf16 autocast"}, "amp-bf16"),
        ({"dtype": "fp32"}, "fp32"),
        ({"dtype": "amp", "source": "torch-preflight"}, "amp-bf16"),
    ],
)
def test_formats(suite: Any, told: dict[str, Any], recipe: str) -> None:
    assert suite.gpu_rows.Row({**TOLD, **told}).setup.recipe.name == recipe


def test_a_source_whose_loop_is_not_known(suite: Any) -> None:
    row = suite.gpu_rows.Row({**TOLD, "source": "someone"})
    with pytest.raises(InputError, match="the training loop of someone is not known"):
        _ = row.loop


def test_inference_is_simulated(suite: Any) -> None:
    """The output is logits (64 x 512 in 2 bytes, 65,536) and, of each of two layers, keys and values (2 x 32 of 2 x 16
    numbers each: 4,096 bytes), which all live when the last product is done; more is alive inside a layer. Both are
    gone before the next pass. `estimate` has no such phase."""
    told = {**TOLD, "mode": "inference", "method": "adamw", "rank": None, "gradient_checkpointing": False}
    row = suite.gpu_rows.Row(told)
    found = suite.gpu.run(row)
    assert found["not"] == dict.fromkeys(("estimate", "estimate --reserved", "simulate"), "it is inference")
    simulated = suite.gpu.as_they_ran(row)
    output, ids, workspace = 65_536 + 4 * 4_096, 512, 8_519_680
    assert set(simulated["phases"]) == {"forward"}
    assert simulated["after the first step"] == ids + workspace
    assert simulated["peak"] >= simulated["loaded"] + output + ids + workspace


# -- loops -----------------------------------------------------------------------------------------------


class Output:
    def __init__(self, happened: list[str]) -> None:
        self.loss = SimpleNamespace(backward=lambda: happened.append("backward"))


class Recorded:
    """A model and an optimizer that write down what is done with them, and whether the output lives."""

    def __init__(self) -> None:
        self.happened: list[str] = []
        self.output: weakref.ref[Output] | None = None

    def __call__(self, **batch: Any) -> Output:
        made = Output(self.happened)
        self.output = weakref.ref(made)
        return made

    def step(self) -> None:
        self.happened.append("step")

    def zero_grad(self, set_to_none: bool) -> None:
        self.happened.append("none" if set_to_none else "zero")

    def enter(self, phase: str) -> None:
        alive = self.output is not None and self.output() is not None
        self.happened.append(f"{phase}{' with outputs' if alive else ''}")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            {"outputs": "backward", "keep_gradients": True},
            ["forward", "backward with outputs", "backward", "step", "step", "zero"],
        ),
        (
            {"outputs": "step"},
            ["forward", "none", "backward with outputs", "backward", "step with outputs", "step"],
        ),
        ({"outputs": "none"}, ["forward", "none", "backward", "backward", "step", "step"]),
    ],
)
def test_what_a_loop_holds_and_when_it_clears_gradients(suite: Any, given: Any, expected: list[str]) -> None:
    loops, one = suite.gpu_loops, Recorded()
    subject = loops.Subject(one, one, lambda: 0, loops.with_labels, lambda outputs: outputs.loss, nullcontext)
    loops.run(loops.Loop(**given), subject, one.enter)
    first = one.happened.index("forward")
    assert one.happened[0] == "first"
    assert one.happened[first:] == expected * loops.STEPS + ["end"]


# -- loads -----------------------------------------------------------------------------------------------


def loaded() -> Trace:
    """A norm and an embedding in float32, a matrix of 128 x 8 in codes with its scales and values, an adapter, and a
    buffer: of a 16-bit model."""
    names = ("model.norm.weight", "model.a.base_layer.weight", "model.embed.weight", "model.a.lora_A.default.weight")
    norm, matrix, embedding, adapter = (f"base_model.model.{name}" for name in names)
    rows = [
        (64, "float32", norm), (64, "float32", matrix), (512, "uint8", matrix), (64, "float32", matrix),
        (4096, "float32", embedding), (128, "float32", "base_model.model.rotary.inv_freq"), (256, "float32", adapter),
    ]  # fmt: skip
    made = [Allocation(n, "", "", "", WEIGHTS, name, (), dtype) for n, dtype, name in rows]
    return Trace(1, made, list(range(len(made))), [Mark(len(made), "first")])


def test_a_load_in_the_models_order_and_one_from_a_block(suite: Any) -> None:
    load, trace = suite.loads, loaded()
    kept = load.stays(trace, 7)
    sizes = [64, 64, 512, 64, 4096, 128, 256]
    assert list(load.to_device(kept)) == [Alloc(i, n) for i, n in enumerate(sizes)]
    block = 64 + 64 + 512 + 64 + 4096  # parameters of the checkpoint: neither buffer nor adapter
    assert list(load.warmed(kept))[:2] == [Alloc(load.OWN, block), Free(load.OWN)]


@pytest.mark.parametrize(("peft", "empties"), [("0.19.1", False), ("0.20.0", True), ("1.0.0", True)])
def test_a_load_that_quantizes(suite: Any, peft: str, empties: bool) -> None:
    """The block: 512 bytes of codes, and 16 and 1,024 numbers of 2 bytes. Then by name: `a` (128 x 8 numbers of 2
    bytes, read, quantized and gone), `embed`, `norm`; the two others are widened in the model's order."""
    load = suite.loads
    own = load.OWN
    found = list(load.quantized(load.stays(loaded(), 7), 2, peft))
    assert found == [
        Alloc(own, 512 + 32 + 2048), Free(own),
        Alloc(own + 1, 2048), Alloc(1, 64), Alloc(2, 512), Alloc(3, 64), Free(own + 1),
        Alloc(own + 2, 2048), Alloc(own + 3, 32),
        Alloc(0, 64), Free(own + 3), Alloc(4, 4096), Free(own + 2),
        *([EmptyCache()] if empties else []),
        Alloc(5, 128), Alloc(6, 256),
    ]  # fmt: skip


def test_a_load_that_quantizes_scales_too(suite: Any) -> None:
    """128 x 64 numbers: 4,096 bytes of codes and 128 scales of a byte, which were 128 of 4 bytes for a while."""
    rows = [(128, "uint8"), (4096, "uint8"), (16, "float32")]
    made = [Allocation(n, "", "", "", WEIGHTS, "model.a.weight", (), dtype) for n, dtype in rows]
    load = suite.loads
    found = list(load.quantized(load.stays(Trace(1, made, [0, 1, 2]), 3), 2, "0.19.1"))
    own = load.OWN
    assert found == [
        Alloc(own, 4096), Free(own), Alloc(own + 1, 16384), Alloc(own + 2, 512),
        Alloc(0, 128), Alloc(1, 4096), Alloc(2, 16), Free(own + 2), Free(own + 1),
    ]  # fmt: skip


def test_names_are_read_in_natural_order(suite: Any) -> None:
    names = ["model.layers.10.a", "model.layers.9.b", "lm_head.weight", "model.layers.9.a"]
    assert sorted(names, key=suite.loads.natural) == [names[2], names[3], names[1], names[0]]


# -- both predictors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_small_row(suite: Any, method: str) -> None:
    """`simulate` has what `estimate` does not count in any phase: the batch (2 x 32 ids of 8 bytes: a block), and what
    the allocator leaves in its blocks, nothing here. While the output lives, so does the gradient that checkpointing
    makes the embeddings want."""
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    row = suite.gpu_rows.Row({**TOLD, "method": method})
    estimated, simulated = suite.gpu.estimated(row), suite.gpu.as_they_ran(row)
    assert simulated["residents"]["optimizer_state"] == estimated["residents"]["optimizer_state"]
    assert simulated["residents"]["weights"] == estimated["residents"]["weights"]
    assert simulated["loaded"] == estimated["loaded"]
    assert simulated["phases"]["step"] - estimated["phases"]["step"] == 512
    assert simulated["peak"] <= simulated["reserved"]


def test_the_section(suite: Any) -> None:
    """From lines as the record has them: a run that was predicted, one that cannot be."""
    rows = [suite.gpu_rows.Row(TOLD), suite.gpu_rows.Row({**TOLD, "id": "x-2", "mode": "inference", "method": "adamw"})]
    found = [
        {**suite.gpu.run(row), "measured": {"peak": 2_000_000, "phases": {"step": 1_000_000}, "residents": {}}}
        for row in rows
    ]
    lines = [{"key": row.key, "found": one} for row, one in zip(rows, found, strict=True)]
    lines[0]["found"]["estimate"] = {"peak": 2_020_000, "phases": {"step": 990_000}}
    lines[0]["found"]["simulate"] = {"peak": 2_000_000, "phases": {"step": 1_000_000}}
    for name in suite.report_gpu.PREDICTORS:
        lines[1]["found"][name] = None
    lines[0]["found"]["estimate --reserved"] = lines[0]["found"][suite.report_gpu.AS_THEY_RAN] = None
    errors = {(p.predictor, p.what): round(p.error, 9) for p in suite.report_gpu.pairs(lines)}
    assert errors == {
        ("estimate", "peak"): 0.01, ("estimate", "step"): -0.01, ("simulate", "peak"): 0, ("simulate", "step"): 0,
    }  # fmt: skip
    assert "+1.000 %" in "\n".join(suite.report_gpu.section(lines))
    assert "it is inference" in "\n".join(suite.report_limits.section(lines))
