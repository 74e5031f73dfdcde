"""Groups and partitions of real models: what is projected, and what is kept for it, is what `galore-mem estimate` says
of the same config. Models are tiny, random, and built from configs."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from ledgers import measured, predicted, tensors
from ours import OURS, Ours
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from galore_mem.dtypes import dtype
from galore_mem.errors import InputError
from galore_mem.families import FAMILIES
from galore_mem.methods.base import Trained
from galore_mem.optim import AdamMini, GaLoreAdamW, GaLoreMini, for_trainer, parameter_groups, partition_of
from galore_mem.optim.groups import heads_of
from galore_mem.partition import by_row
from galore_mem.spec.config import model_from_config
from galore_mem.spec.model import Heads, ModelSpec, check_targets, is_target

RANK = 8
LLAMA = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 32,
}  # fmt: skip
BERT = {**LLAMA, "type_vocab_size": 2}
GPT2 = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
# grouped queries; tied embeddings; a head_dim that is not hidden_size / num_attention_heads; biases; classifiers
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **LLAMA},
    "llama-head-dim": {"model_type": "llama", **LLAMA, "num_key_value_heads": 2, "head_dim": 12},
    "llama-biases": {"model_type": "llama", **LLAMA, "attention_bias": True, "mlp_bias": True},
    "mistral": {"model_type": "mistral", **LLAMA, "num_key_value_heads": 2, "sliding_window": None},
    "qwen2": {"model_type": "qwen2", **LLAMA, "num_key_value_heads": 1, "tie_word_embeddings": True},
    "gpt2": {"model_type": "gpt2", **GPT2},
    "bert": {"model_type": "bert", **BERT},
    "bert-classes": {"model_type": "bert", **BERT, "architectures": ["BertForSequenceClassification"]},
    "roberta": {"model_type": "roberta", **BERT},
    "roberta-classes": {"model_type": "roberta", **BERT, "architectures": ["RobertaForSequenceClassification"]},
}


def spec_of(name: str) -> ModelSpec:
    return model_from_config(CONFIGS[name], name, "test")


@cache
def model_of(name: str) -> nn.Module:
    config = CONFIGS[name]
    made: Any = AutoModelForMaskedLM if config["model_type"] in ("bert", "roberta") else AutoModelForCausalLM
    if "architectures" in config:
        made = AutoModelForSequenceClassification
    model: nn.Module = made.from_config(CONFIG_MAPPING[config["model_type"]](**config))
    return model


def test_every_family_is_here() -> None:
    assert {config["model_type"] for config in CONFIGS.values()} == set(FAMILIES)


# -- what is projected -----------------------------------------------------------------------------

TARGETS: tuple[tuple[str, ...] | None, ...] = (
    None, ("all-linear",), ("mlp",), ("attention",), ("self_attn",), ("q_proj", "k_proj"), ("query",), ("c_attn",),
    ("dense",), ("lm_head",), ("classifier",), ("attn", "mlp"), ("output",), ("decoder",), ("pooler",),
)  # fmt: skip


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_groups_are_the_ledgers(name: str, target: tuple[str, ...] | None) -> None:
    """A target that names nothing in the spec names nothing in the model either."""
    said = [row.name for row in spec_of(name).parameters() if is_target(row, target)]
    try:
        check_targets(spec_of(name), target)
    except InputError as error:
        of_the_model = str(error).replace(f"layer of {name};", "layer of the model;")
        with pytest.raises(InputError, match=f"^{re.escape(of_the_model)}$"):
            parameter_groups(model_of(name), target=target, rank=RANK)
        return
    regular, low = parameter_groups(model_of(name), target=target, rank=RANK, scale=0.5)
    assert [given for given, _ in low["params"]] == said
    every = dict(model_of(name).named_parameters())
    assert [given for given, _ in regular["params"]] == [given for given in every if given not in said]
    assert all(p is every[given] for group in (regular, low) for given, p in group["params"])
    assert {k: v for k, v in low.items() if k != "params"} == {"rank": RANK, "scale": 0.5}
    assert set(regular) == {"params"}


# -- what is kept ----------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("ours", OURS, ids=str)
def test_states_are_the_ledgers(ours: Ours, name: str, fmt: str) -> None:
    """Buffer by buffer, for every parameter, after one step. The model's config tells both sides its heads."""
    spec, model = spec_of(name), model_of(name).to(getattr(torch, fmt))
    how = replace(ours.job(RANK), heads=spec.heads)
    options = {"rank": RANK, **ours.options} if ours.projects else {}
    made, arguments = for_trainer(model, ours.made, lr=0.0, **options, **ours.arguments)
    optimizer = made(**arguments)
    for p in model.parameters():
        p.grad = torch.randn(p.shape).to(p.dtype)
    optimizer.step()
    optimizer.zero_grad()
    shared = {b.name for b in ours.ledger.shared(how)}
    real = dict(model.named_parameters())
    rows = list(spec.parameters())
    assert [row.name for row in rows] == list(real)
    for row in rows:
        trained = Trained(row.name, row.shape, dtype(fmt), is_target(row, None), row.role, row.module)
        kept = {k: t for k, t in tensors(optimizer.state[real[row.name]]).items() if k not in shared}
        assert measured(kept) == predicted(ours.ledger.state(trained, how)), row.name


@pytest.mark.parametrize("name", CONFIGS)
def test_heads_are_the_specs(name: str) -> None:
    assert heads_of(model_of(name)) == spec_of(name).heads


# -- fused projections and adapters ----------------------------------------------------------------


def second_moments(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of Adam-mini's second moments after a step with gradients for what is trained."""
    made, arguments = for_trainer(model, AdamMini, lr=0.01)
    optimizer = made(**arguments)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    for _, p in named:
        p.grad = torch.randn_like(p)
    optimizer.step()
    return {n: tuple(optimizer.state[p]["exp_avg_sq"].shape) for n, p in named}


def test_fused_projections() -> None:
    """Phi-3, heads of 8 rows: 4 of queries, then 2 of keys, then 2 · 8 rows of values. GPT-NeoX: for each of 4 heads a
    block of queries, one of keys, 8 rows of values. GPT-2 the same one after the other, stored in x out."""
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    phi = Phi3Config(**sizes, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)
    neox = GPTNeoXConfig(**sizes, num_attention_heads=4)
    found = second_moments(AutoModelForCausalLM.from_config(phi))
    assert found["model.layers.0.self_attn.qkv_proj.weight"] == (4 + 2 + 16, 1)
    assert found["model.layers.0.mlp.gate_up_proj.weight"] == (96, 1)
    found = second_moments(AutoModelForCausalLM.from_config(neox))
    assert found["gpt_neox.layers.0.attention.query_key_value.weight"] == (4 * (1 + 1 + 8), 1)
    assert found["gpt_neox.layers.0.attention.query_key_value.bias"] == (96, 1)
    found = second_moments(AutoModelForCausalLM.from_config(CONFIG_MAPPING["gpt2"](**GPT2)))
    assert found["transformer.h.0.attn.c_attn.weight"] == (1, 4 + 4 + 32)
    assert found["transformer.h.0.mlp.c_fc.weight"] == (1, 128)


@pytest.mark.parametrize(("name", "target"), [("llama-head-dim", "q_proj"), ("gpt2", "c_attn")])
def test_adapters(name: str, target: str) -> None:
    """peft's factors have rows of their own (4, and the layer's output); the frozen weights under them keep their
    partition, with which they may be trained later."""
    config = CONFIGS[name]
    fresh = AutoModelForCausalLM.from_config(CONFIG_MAPPING[config["model_type"]](**config))
    model = get_peft_model(fresh, LoraConfig(r=4, target_modules=[target], fan_in_fan_out=name == "gpt2"))
    out = {"q_proj": 48, "c_attn": 96}[target]
    for given, shape in second_moments(model).items():
        assert shape == ((4, 1) if "lora_A" in given else (out, 1)), given
    parts = partition_of(model)
    assert set(parts) == {given for given, _ in model.named_parameters()}
    plain = partition_of(model_of(name))
    for given, part in parts.items():
        if "lora_" not in given:
            assert part == plain[given.removeprefix("base_model.model.").replace(".base_layer", "")]
    # only the adapters are trained: nothing else is in a group
    (low,) = parameter_groups(model, rank=2)
    assert [given for given, p in low["params"]] == [given for given, p in model.named_parameters() if p.requires_grad]


def test_quantized_weights_have_no_partition() -> None:
    """bitsandbytes' 4-bit weights are a column of bytes: no rows, no heads, and frozen."""
    model = LlamaForCausalLM(LlamaConfig(**LLAMA))
    model.requires_grad_(False)
    for layer in model.model.layers:
        packed = torch.zeros(32 * 32 // 2, 1, dtype=torch.uint8)
        layer.self_attn.q_proj.weight = nn.Parameter(packed, requires_grad=False)
    parts = partition_of(model)
    assert "model.layers.0.self_attn.q_proj.weight" not in parts
    assert parts["model.layers.0.self_attn.k_proj.weight"].blocks == 4


# -- other modules ---------------------------------------------------------------------------------


class Mixed(nn.Module):
    """Names of attention and MLP on modules that are no linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.attn_conv = nn.Conv1d(4, 6, 3)
        self.mlp_norm = nn.LayerNorm(6)
        self.mlp = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6, bias=False))
        self.attn = nn.MultiheadAttention(8, 2)
        self.scale = nn.Parameter(torch.ones(()))


def test_a_convolution_is_no_linear_layer() -> None:
    """torch's Conv1d is out x in x width; transformers' Conv1D is a matrix stored in x out."""
    model = Mixed()
    regular, low = parameter_groups(model, rank=2)
    assert [name for name, _ in low["params"]] == ["mlp.0.weight", "mlp.1.weight", "attn.out_proj.weight"]
    # two each of the convolution and the norm, a bias of the MLP, three of the attention, and the number
    assert len(regular["params"]) == 2 + 2 + 1 + 3 + 1
    parts = partition_of(model, Heads(8, 2, 2, 4))
    assert parts["attn_conv.weight"] == by_row((6, 4, 3))
    assert parts["attn.in_proj_weight"].runs == ((2, 4), (2, 4), (8, 1))
    assert parts["scale"].blocks == 1


def test_a_compiled_model_keeps_its_groups() -> None:
    model = model_of("llama")
    _, low = parameter_groups(model, rank=2)
    _, compiled = parameter_groups(torch.compile(model), rank=2)
    assert [name for name, _ in compiled["params"]] == [f"_orig_mod.{name}" for name, _ in low["params"]]


def test_heads_can_be_told() -> None:
    """A model without a config, and one whose config is another's."""
    model = nn.ModuleDict({"q_proj": nn.Linear(8, 12)})
    with pytest.raises(InputError, match=r"partitions q_proj.weight by head, and this model's head_dim is not known"):
        partition_of(model)
    assert partition_of(model, Heads(8, 3, 3, 4))["q_proj.weight"].runs == ((3, 4),)
    with pytest.raises(InputError, match=r"q_proj.weight has 12 rows, which this model's heads do not add up to"):
        partition_of(model, Heads(8, 2, 2, 5))


# -- bad use ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["q_prj", ("q_proj", "q"), ("",), ("norm",), ("embed_tokens",)])
def test_targets_that_name_nothing(target: Any) -> None:
    with pytest.raises(InputError, match=r"names no linear layer of the model; it has down_proj, gate_proj, .*q_proj"):
        parameter_groups(model_of("llama"), target=target, rank=2)


def test_nothing_to_project() -> None:
    frozen = LlamaForCausalLM(LlamaConfig(**LLAMA)).requires_grad_(False)
    for model, target in ((frozen, None), (model_of("llama"), ()), (nn.Sequential(nn.Linear(3, 4)), None)):
        with pytest.raises(InputError, match="no linear layer of attention or MLP is trained in this model"):
            parameter_groups(model, target=target, rank=2)
    (low,) = parameter_groups(nn.Sequential(nn.Linear(3, 4, bias=False)), target="0", rank=2)
    assert [name for name, _ in low["params"]] == ["0.weight"]
    made, arguments = for_trainer(frozen, AdamMini)
    with pytest.raises(InputError, match="no parameters; is everything frozen"):
        made(**arguments)


def test_a_pair_without_a_rank_projects_nothing() -> None:
    made, arguments = for_trainer(model_of("llama"), GaLoreAdamW, lr=0.01)
    (group,) = made(**arguments).param_groups
    assert group["rank"] is None
    assert len(group["params"]) == len(list(model_of("llama").parameters()))


def test_a_partition_that_is_told_stays() -> None:
    model = model_of("llama")
    told = {**partition_of(model), "model.layers.0.self_attn.q_proj.weight": by_row((32, 32))}
    made, arguments = for_trainer(model, GaLoreMini, lr=0.01, rank=2, partition=told)
    group = made(**arguments).param_groups[1]
    assert group["partition"][group["param_names"].index("model.layers.0.self_attn.q_proj.weight")][0] == ((32, 1),)
