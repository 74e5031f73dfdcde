"""What Low-Rank and ReLoRA make of a model; ReLoRA's merges and restarts."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from adapted import IDS, RANK, RECIPES, SIZES, TARGETS, adapted, model_of, train, trained
from low_rank import peak_of
from torch import nn

from galore_mem.dtypes import FLOAT32
from galore_mem.errors import InputError
from galore_mem.ledger import ledger
from galore_mem.memory.tape import GRADIENTS, WEIGHTS, Tape
from galore_mem.methods import relora
from galore_mem.methods.base import Job, Slot, Slots, Trained
from galore_mem.methods.registry import method
from galore_mem.optim import ReLoRA, factorize, jagged_cosine, merge_and_restart, with_adapters
from galore_mem.setup import recipe
from galore_mem.spec.config import model_from_config
from galore_mem.spec.model import Role, is_target


def how(name: str, given: str) -> Job:
    defaults = {h.name: h.default for h in method(name).hyperparameters}
    return Job({**defaults, "rank": RANK}, recipe(given), "cpu")


Stored = dict[str, tuple[tuple[int, ...], str, bool]]  # name -> shape, format, is it trained


def in_the_ledger(name: str, family: str, given: str) -> Stored:
    code = method(name).implementations[0]
    found = {}
    for row in model_from_config(SIZES[family], family, "test").parameters():
        for s in code.store(row, is_target(row, TARGETS[family]), how(name, given)):
            path = row.name.removesuffix(".weight") if s.suffix.startswith(".lora_") else row.name
            found[path + s.suffix] = (s.shape, s.dtype.name, s.grad is not None)
    return found


def in_the_model(model: nn.Module) -> Stored:
    return {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): (
            tuple(p.shape), str(p.dtype).removeprefix("torch."), p.requires_grad,
        )
        for name, p in model.named_parameters()
    }  # fmt: skip


MADE: dict[str, Callable[[str, str], Any]] = {
    "relora": adapted,
    "low-rank": lambda family, given: factorize(model_of(family, given), RANK, TARGETS[family]),
}


@pytest.mark.parametrize("given", RECIPES)
@pytest.mark.parametrize("family", SIZES)
@pytest.mark.parametrize("name", MADE)
def test_weights_and_states_are_the_ledgers(name: str, family: str, given: str) -> None:
    """Names, shapes, formats and what is trained; then the optimizer's states, in total."""
    model = MADE[name](family, given)
    assert in_the_model(model) == in_the_ledger(name, family, given)
    optimizer = torch.optim.AdamW(trained(model), foreach=True)
    train(model, optimizer, 1)
    states = sum(t.untyped_storage().nbytes() for s in optimizer.state.values() for t in s.values())
    spec, code = model_from_config(SIZES[family], family, "test"), method(name).implementations[0]
    entries = ledger(spec, code, how(name, given), TARGETS[family])
    assert states == sum(e.total for e in entries if e.kind == "optimizer_state")


# -- ReLoRA ----------------------------------------------------------------------------------------


def factors(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if ".lora_" in name}


# float32: logits near 1 after two layers of sums over 80 products. bfloat16: the base's new weights are rounded at 2^-9
# of 0.02 each, which sums over 80 inputs of size 1 (post norm) to 80^0.5 · 4e-5 = 3.5e-4 a layer, before logits are
# rounded at 2^-9 themselves
UNCHANGED = {"fp32": 1e-5, "pure-bf16": 2e-2}


@pytest.mark.parametrize("given", RECIPES)
@pytest.mark.parametrize("family", SIZES)
def test_a_merge_leaves_the_function(family: str, given: str) -> None:
    """The weights take in what the adapters were; new adapters add nothing."""
    model = adapted(family, given)
    train(model, torch.optim.AdamW(trained(model), lr=1e-2), 3)
    before = model(input_ids=IDS).logits.float()
    with model.disable_adapter():
        without = model(input_ids=IDS).logits.float()
    assert (before - without).abs().max() > 10 * UNCHANGED[given]  # the adapters have learned something
    merge_and_restart(model, torch.optim.SGD(trained(model), 0.0))
    after = model(input_ids=IDS).logits.float()
    torch.testing.assert_close(after, before, rtol=0, atol=UNCHANGED[given])
    with model.disable_adapter():
        assert torch.equal(model(input_ids=IDS).logits.float(), after)


def test_a_merge_adds_the_product_to_the_weight() -> None:
    """W + (alpha/r)·B·A, with alpha 32 and r 8; GPT-2's matrix is stored in x out."""
    for family, name in (("llama", "model.layers.1.mlp.down_proj"), ("gpt2", "transformer.h.1.attn.c_attn")):
        model = adapted(family).double()
        layer = model.base_model.model.get_submodule(name)
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        nn.init.normal_(b)
        product = 4.0 * b.detach() @ a.detach()
        expected = layer.base_layer.weight + (product if family == "llama" else product.T)
        merge_and_restart(model, torch.optim.SGD(trained(model), 0.0))
        torch.testing.assert_close(layer.base_layer.weight, expected, rtol=1e-12, atol=1e-14)


def test_factors_start_again() -> None:
    """B zero; A uniform within 1/sqrt(in) (Kaiming with a = sqrt(5), peft's default), other numbers than before."""
    model = adapted("llama")
    old = {name: p.detach().clone() for name, p in factors(model).items()}
    merge_and_restart(model, torch.optim.SGD(trained(model), 0.0), seed=3)
    for name, p in factors(model).items():
        if ".lora_B." in name:
            assert not p.any()
        else:
            assert 0.9 < float(p.detach().abs().max()) * p.shape[1] ** 0.5 <= 1
            assert not torch.equal(p, old[name])
    drawn = [tuple(p.flatten().tolist()) for name, p in factors(model).items() if ".lora_A." in name]
    assert len(set(drawn)) == len(drawn)


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-2),  # a state that begins with a one
    "Rprop": lambda p: torch.optim.Rprop(p, lr=1e-2),  # and one that begins with the learning rate
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_start_again_with_the_factors_and_no_others(name: str) -> None:
    """The step after a merge is a new optimizer's first one for the factors, and one like any other for the rest."""
    model = adapted("llama")
    optimizer = OPTIMIZERS[name](trained(model))
    train(model, optimizer, 3)
    low = set(factors(model).values())
    others = {p: copy.deepcopy(s) for p, s in optimizer.state.items() if p not in low}
    merge_and_restart(model, optimizer)
    for p, state in others.items():
        assert state.keys() == optimizer.state[p].keys()
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(optimizer.state[p][k])) for k, v in state.items())
    fresh = OPTIMIZERS[name](list(low))
    before = {p: p.detach().clone() for p in low}
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    after = {p: p.detach().clone() for p in low}
    for p in low:
        p.data.copy_(before[p])
    fresh.step()
    assert all(torch.equal(p, after[p]) for p in low)


def test_merges_come_every_update_proj_gap_steps() -> None:
    model = adapted("llama")
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    restarts = ReLoRA(model, optimizer, update_proj_gap=3)
    merged = []
    train(model, optimizer, 7, lambda: merged.append(restarts.step()))
    assert merged == [False, False, True, False, False, True, False]


@pytest.mark.parametrize("stop", [2, 3, 4], ids=["before a merge", "after a merge", "between"])
def test_a_resumed_run_is_the_same(stop: int) -> None:
    """Six steps with merges after the third and the sixth; saved and loaded, in a process with other random numbers."""
    ends = []
    for stops in (6, stop):
        model, parts = adapted("llama"), []
        while True:
            optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
            schedule = torch.optim.lr_scheduler.LambdaLR(
                optimizer, jagged_cosine(9, 3, warmup_steps=2, restart_warmup_steps=2)
            )
            restarts = ReLoRA(model, optimizer, 3, seed=5)
            held = {"model": model, "optimizer": optimizer, "schedule": schedule, "relora": restarts}
            for name, state in parts:
                held[name].load_state_dict(state)  # type: ignore[attr-defined]  # all of them have state
            for _ in range(restarts.steps, stops if not parts else 6):
                train(model, optimizer, 1)
                schedule.step()
                restarts.step()
            if restarts.steps == 6:
                break
            file = io.BytesIO()
            torch.save({name: part.state_dict() for name, part in held.items()}, file)  # type: ignore[attr-defined]  # all of them have state
            file.seek(0)
            parts = list(torch.load(file, weights_only=True).items())
            torch.manual_seed(99)
            model = adapted("llama")
            torch.manual_seed(99)
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_what_cannot_be_merged_is_refused_and_nothing_changes() -> None:
    peft = pytest.importorskip("peft")
    names = ["q_proj", "down_proj"]
    for options, said in (({"use_dora": True}, "no DoRA"), ({"lora_bias": True}, "no bias")):
        model = peft.get_peft_model(model_of("llama"), peft.LoraConfig(r=4, target_modules=names, **options))
        with pytest.raises(InputError, match=said):
            ReLoRA(model, torch.optim.SGD(trained(model), 0.0))
    model = peft.get_peft_model(model_of("llama"), peft.LoraConfig(r=4, target_modules=names))
    model.base_model.model.model.layers[1].mlp.down_proj.merge()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.down_proj: ReLoRA merges plain LoRA adapters"):
        merge_and_restart(model, torch.optim.SGD(trained(model), 0.0))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    with pytest.raises(InputError, match="has no LoRA adapters to merge"):
        merge_and_restart(nn.Linear(3, 3), torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.0))


def test_a_quantized_base_is_refused() -> None:
    peft = pytest.importorskip("peft")
    layers = pytest.importorskip("bitsandbytes.nn")
    for storage in (torch.uint8, torch.bfloat16):
        base = layers.Linear4bit(64, 64, quant_storage=storage).to("cpu")
        model = peft.get_peft_model(nn.ModuleDict({"q_proj": base}), peft.LoraConfig(r=4, target_modules=["q_proj"]))
        with pytest.raises(InputError, match="into floating-point matrices"):
            ReLoRA(model, torch.optim.SGD(trained(model), 0.0))


def test_options_of_relora() -> None:
    model = adapted("llama")
    optimizer = torch.optim.SGD(trained(model), 0.0)
    with pytest.raises(InputError, match="update_proj_gap must be a whole number of at least 1, got 0"):
        ReLoRA(model, optimizer, 0)
    with pytest.raises(InputError, match="has no 'seed'; it has steps, update_proj_gap"):
        ReLoRA(model, optimizer).load_state_dict({"steps": 1, "update_proj_gap": 2})
    with pytest.raises(InputError, match="steps must be a whole number of at least 0, got -1"):
        ReLoRA(model, optimizer).load_state_dict({"steps": -1, "update_proj_gap": 2, "seed": 0})
    with pytest.raises(InputError, match="rank must be a whole number of at least 1, got 0"):
        with_adapters(model_of("llama"), 0)


def one_layer(weights: torch.dtype) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = with_adapters(nn.ModuleDict({"q_proj": nn.Linear(80, 48, bias=False, dtype=weights)}), RANK)
    nn.init.normal_(next(p for name, p in model.named_parameters() if ".lora_B." in name))
    return model, torch.optim.SGD(trained(model), 0.0)


@pytest.mark.parametrize("given", RECIPES)
def test_a_merge_needs_what_the_ledger_says(given: str) -> None:
    """float32: nothing. bfloat16: A and B in it, (8·80 + 48·8)·2 = 2,048 bytes (the weight has 7,680)."""
    pytest.importorskip("peft")
    job = how("relora", given)
    tape = Tape(device="cpu")
    slots = []
    for part, shape in (("A", (RANK, 80)), ("B", (48, RANK))):
        p = Trained(f"q_proj.lora_{part}.default.weight", shape, FLOAT32, True, Role.ATTENTION, "linear")
        weight, grad = tape.empty(shape, FLOAT32, WEIGHTS), tape.empty(shape, FLOAT32, GRADIENTS)
        slots.append(Slot(tape, p, 0, weight, grad))
    start = tape.total
    tape.mark("step", 0, "step")
    relora.merge(Slots(tape, slots, None), job)
    predicted = tape.peaks["step", 0, "step"].total - start
    assert predicted == {"fp32": 0, "pure-bf16": 2048}[given]

    def merge() -> Callable[[], object]:
        model, optimizer = one_layer(RECIPES[given])
        merge_and_restart(model, optimizer, seed=1)
        nn.init.normal_(next(p for name, p in model.named_parameters() if ".lora_B." in name))
        return lambda: merge_and_restart(model, optimizer, seed=1)

    assert peak_of(merge) == predicted


def test_jagged_cosine() -> None:
    """20 steps, warm-up over 4, restarts at 8 and 16 with warm-ups over 2, least 0.1. On the cosine at step s:
    0.1 + 0.45·(1 + cos(π·(s - 4)/16))."""
    factor = jagged_cosine(20, 8, warmup_steps=4, restart_warmup_steps=2, least=0.1)

    def cosine(step: int) -> float:
        return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - 4) / 16))

    expected = [0.25, 0.5, 0.75, 1.0, *map(cosine, range(4, 8))]
    expected += [cosine(8) / 2, *map(cosine, range(9, 16)), cosine(16) / 2, *map(cosine, range(17, 20)), 0.1, 0.1]
    assert [factor(step) for step in range(22)] == pytest.approx(expected, rel=1e-12)
    assert jagged_cosine(10, 5, warmup_steps=0, restart_warmup_steps=0)(5) == pytest.approx(0.55, rel=1e-12)  # halfway
    for bad, said in (
        ({"total_steps": 0}, "total_steps"), ({"warmup_steps": 20}, "warmup_steps"), ({"least": 1.5}, "least"),
        ({"restart_warmup_steps": 9}, "restart_warmup_steps"), ({"update_proj_gap": 0}, "update_proj_gap"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=said):
            jagged_cosine(**{"total_steps": 20, "update_proj_gap": 8, "warmup_steps": 4, **bad})  # type: ignore[arg-type]  # all of them have state
