"""Low-Rank, LoRA, ReLoRA and QLoRA: stored weights against peft and bitsandbytes, parameter by parameter; merges
against the CPU allocator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ledgers import job
from low_rank import peak_of

from galore_mem.dtypes import FLOAT32
from galore_mem.ledger import ledger
from galore_mem.memory.tape import GRADIENTS, WEIGHTS, Shape, Tape
from galore_mem.methods.base import Implementation, Job, Slot, Slots, Stored, Trained
from galore_mem.methods.registry import METHODS, method
from galore_mem.setup import recipe
from galore_mem.spec.config import model_from_config
from galore_mem.spec.model import ModelSpec, ParamSpec, Role, is_target

LLAMA = {
    "model_type": "llama", "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "vocab_size": 96,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32, "tie_word_embeddings": False,
    "attention_bias": True,
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "n_embd": 48, "n_layer": 2, "n_head": 4, "vocab_size": 96, "n_positions": 32}
MODELS = {"llama": LLAMA, "gpt2": GPT2}
TARGETS = {"llama": ("q_proj", "v_proj", "down_proj"), "gpt2": ("c_attn", "c_proj")}
# one rank below and one above the shorter side of every matrix: peft does not clip it
RANKS = (8, 64)
ROW = ParamSpec("model.layers.0.self_attn.q_proj.weight", (48, 80), Role.ATTENTION, "linear")
CONV = ParamSpec("transformer.h.0.attn.c_attn.weight", (48, 144), Role.ATTENTION, "conv1d")


def spec(family: str) -> ModelSpec:
    return model_from_config(MODELS[family], family, "test")


def told(name: str, given: str = "pure-bf16", rank: int = 8, **more: int) -> Job:
    return Job(job(name, {"rank": rank, **more}).hyperparameters, recipe(given))


def real_model(family: str, fmt: torch.dtype) -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(**MODELS[family])
    return transformers.AutoModelForCausalLM.from_config(config, dtype=fmt)


def stored(name: str, code: Implementation, family: str, how: Job) -> dict[str, Stored]:
    """Every stored tensor under its name, peft's way: `q_proj.weight` is `q_proj.base_layer.weight` beside adapters."""
    found = {}
    for row in spec(family).parameters():
        kept = code.store(row, is_target(row, TARGETS[family]), how)
        for s in kept:
            path = row.name.removesuffix(".weight")
            found[path + s.suffix if s.suffix.startswith(".lora_") else row.name + s.suffix] = s
    return found


def fmt_name(t: torch.Tensor) -> str:
    return str(t.dtype).removeprefix("torch.")


# -- shapes ----------------------------------------------------------------------------------------


def test_factors() -> None:
    """W is out x in: 48 x 80 (GPT-2's Conv1D stores in x out: 48 -> 144). A is r x in, B out x r."""
    how = told("low-rank")
    store = METHODS["low-rank"].implementations[0].store
    assert [(s.suffix, s.shape) for s in store(ROW, True, how)] == [("_a", (8, 80)), ("_b", (48, 8))]
    assert [s.shape for s in store(CONV, True, how)] == [(8, 48), (144, 8)]
    assert [s.shape for s in store(ROW, True, told("low-rank", rank=1000))] == [(48, 80), (48, 48)]
    assert [(s.suffix, s.shape) for s in store(ROW, False, how)] == [("", (48, 80))]


def count(code: Implementation, how: Job) -> tuple[int, int, int]:
    """Elements of weights, of trained weights and of states, for one projected 48 x 80 matrix."""
    kept = code.store(ROW, True, how)
    trained = [Trained("x", s.shape, FLOAT32, True, Role.ATTENTION, "linear") for s in kept if s.grad is not None]
    state = sum(b.nbytes for p in trained for b in code.state(p, how)) // 4
    return sum(_elements(s.shape) for s in kept), sum(p.numel for p in trained), state


def _elements(shape: Shape) -> int:
    return torch.Size(shape).numel()


@pytest.mark.parametrize("rank", [1, 8, 48, 1000])
def test_papers_count(rank: int) -> None:
    """m = 48, n = 80. Low-Rank: weights mr + nr, states twice that. LoRA and ReLoRA: mn besides, frozen."""
    r = min(rank, 48)
    adapters = 48 * r + 80 * r
    for name, base in (("low-rank", 0), ("lora", 48 * 80), ("relora", 48 * 80)):
        expected = base + adapters, adapters, 2 * adapters
        assert count(METHODS[name].paper, told(name, "fp32", rank)) == expected


def test_what_is_not_projected() -> None:
    """LoRA freezes it, ReLoRA and Low-Rank train it."""
    norm = ParamSpec("model.norm.weight", (48,), Role.NORM, "norm")
    for name, trains in (("low-rank", True), ("lora", False), ("relora", True), ("qlora", False)):
        for code in (METHODS[name].paper, *METHODS[name].implementations):
            (only,) = code.store(norm, False, told(name))
            assert (only.grad is not None) is trains, (name, code.name)


# -- peft ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["pure-bf16", "fp32"])
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("family", MODELS)
def test_lora_is_pefts(family: str, rank: int, given: str) -> None:
    """Names, shapes, formats and what is trained; then AdamW's states, in total."""
    peft = pytest.importorskip("peft")
    how = told("lora", given, rank)
    fmt = getattr(torch, how.recipe.weights.name)
    config = peft.LoraConfig(r=rank, target_modules=list(TARGETS[family]), fan_in_fan_out=family == "gpt2")
    model = peft.get_peft_model(real_model(family, fmt), config)
    real = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): (
            tuple(p.shape),
            fmt_name(p),
            p.requires_grad,
        )
        for name, p in model.named_parameters()
    }
    code = method("lora").implementation("peft")
    expected = {
        name: (s.shape, s.dtype.name, s.grad is not None) for name, s in stored("lora", code, family, how).items()
    }
    assert real == expected
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, foreach=True)
    for p in trained:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    states = sum(t.untyped_storage().nbytes() for s in optimizer.state.values() for t in s.values())
    on_cpu = Job(how.hyperparameters, how.recipe, "cpu")
    entries = ledger(spec(family), code, on_cpu, TARGETS[family])
    assert states == sum(e.total for e in entries if e.kind == "optimizer_state")


@pytest.mark.parametrize("family", MODELS)
def test_qlora_is_pefts_around_bitsandbytes(family: str) -> None:
    """Which matrices are quantized, what the rest is cast to, and what the adapters are."""
    peft = pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig
    from transformers.integrations import replace_with_bnb_linear

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = replace_with_bnb_linear(
        real_model(family, torch.bfloat16), modules_to_not_convert=["lm_head"], quantization_config=config
    )
    model.is_loaded_in_4bit = True
    quantized = {n for n, p in model.named_parameters() if type(p).__name__ == "Params4bit"}
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    how, code = told("qlora"), method("qlora").implementation("peft")
    expected = stored("qlora", code, family, how)
    assert quantized == {name for name, s in expected.items() if s.dtype.name == "nf4"}
    for name, p in model.named_parameters():
        if name not in quantized:
            # bitsandbytes casts it in the first forward pass (measured in `test_verify_builders.py`)
            cast = name.removesuffix("bias") + "weight" in quantized
            fmt = "bfloat16" if cast else fmt_name(p)
            assert (tuple(p.shape), fmt) == (expected[name].shape, expected[name].dtype.name), name
    assert not any(p.requires_grad for p in model.parameters())
    adapters = {n: s for n, s in expected.items() if ".lora_" in n}
    assert adapters
    assert {s.dtype.name for s in adapters.values()} == {"float32"}
    assert all((s.grad is not None) == (n in adapters) for n, s in expected.items())


@pytest.mark.parametrize("double_quant", [1, 0])
@pytest.mark.parametrize("shape", [(256, 688), (688, 256), (63, 65), (5, 3), (1000, 3)], ids=str)
def test_nf4_is_bitsandbytes(shape: Shape, double_quant: int) -> None:
    """A matrix quantized for real: codes, scales, tables. (256 x 688: 88,064 bytes of codes, 2,752 scales in bytes, 11
    scales of those, tables of 16 and 256, an offset.)"""
    modules = pytest.importorskip("bitsandbytes.nn")
    weight = modules.Params4bit(torch.randn(shape), quant_type="nf4", compress_statistics=bool(double_quant)).to("cpu")
    state = weight.quant_state
    real = {"": weight.data, ".absmax": state.absmax, ".quant_map": state.code}
    if double_quant:
        real |= {
            ".nested_absmax": state.state2.absmax,
            ".nested_quant_map": state.state2.code,
            ".nested_offset": state.offset,
        }
    row = ParamSpec("mlp.up_proj.weight", shape, Role.MLP, "linear")
    kept = method("qlora").implementation("peft").store(row, False, told("qlora", double_quant=double_quant))
    assert {s.suffix: s.dtype.nbytes(s.shape) for s in kept} == {
        k: t.untyped_storage().nbytes() for k, t in real.items()
    }
    assert {s.suffix: s.shape for s in kept if s.suffix} == {k: tuple(t.shape) for k, t in real.items() if k}
    assert len({t.untyped_storage().data_ptr() for t in real.values()}) == len(real)


def test_bits_of_the_paper() -> None:
    """64·256 elements: 8,192 bytes of codes, 256 scales of a byte, one float32 scale: 4 + 8/64 + 32/(64·256) bits."""
    row = ParamSpec("mlp.up_proj.weight", (64, 256), Role.MLP, "linear")
    kept = METHODS["qlora"].paper.store(row, False, told("qlora"))
    assert [s.dtype.nbytes(s.shape) for s in kept] == [8192, 256, 4]


# -- merging ---------------------------------------------------------------------------------------


def merge_peak(code: Implementation, how: Job) -> int:
    """The program's peak in a step that merges one matrix, no states being on the tape."""
    tape = Tape(device="cpu")
    slots = []
    for s in code.store(ROW, True, how):
        if s.grad is not None:
            p = Trained(ROW.name + s.suffix, s.shape, s.grad, True, ROW.role, ROW.module)
            slots.append(
                Slot(tape, p, 0, tape.empty(s.shape, s.dtype, WEIGHTS), tape.empty(s.shape, s.dtype, GRADIENTS))
            )
    start = tape.total
    tape.mark("step", 0, "step")
    code.step(Slots(tape, slots, None), how, True)
    return tape.peaks["step", 0, "step"].total - start


@pytest.mark.parametrize("given", ["pure-bf16", "fp32"])
def test_merge_of_the_reference(given: str) -> None:
    """48 x 80 at rank 8: 3,840 elements (AdamW's copy of the factors has 1,024). B·A and B·A·scale in the weights'
    format. (Ours: `test_optim_adapters.py`.)"""
    how, code = told("relora", given), method("relora").implementation("relora")
    weights = getattr(torch, how.recipe.weights.name)

    def start() -> Any:
        base, a, b = torch.randn(48, 80).to(weights), torch.randn(8, 80).to(weights), torch.randn(48, 8).to(weights)
        return lambda: base.add_(b @ a * 0.5)

    assert peak_of(start) == merge_peak(code, how) == 2 * 3840 * {"pure-bf16": 2, "fp32": 4}[given]
