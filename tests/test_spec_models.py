"""Every bundled model has exactly the parameters of transformers' model, and every family does under its options."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, PretrainedConfig

from galore_mem.families import FAMILIES, family
from galore_mem.families.base import FamilyConfig
from galore_mem.spec.bundled import bundled, bundled_model, folder, spec_file
from galore_mem.spec.config import model_from_config
from galore_mem.spec.model import ModelSpec, Role, is_target


def hf_config(config: dict[str, Any]) -> PretrainedConfig:
    return AutoConfig.for_model(**config)


def hf_parameters(config: dict[str, Any]) -> list[tuple[str, tuple[int, ...]]]:
    """The rows of `named_parameters()` of the real model class, built without memory."""
    model_class = getattr(transformers, config["architectures"][0])
    with torch.device("meta"):
        model = model_class(hf_config(config))
    return [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]


def rows(model: ModelSpec) -> list[tuple[str, tuple[int, ...]]]:
    return [(row.name, row.shape) for row in model.parameters()]


@pytest.mark.parametrize("name", bundled())
def test_bundled_model_has_the_parameters_of_transformers(name: str) -> None:
    assert rows(bundled_model(name)) == hf_parameters(spec_file(name).hf_config)


# Totals as published: the number of parameters in the safetensors index or on the model card of each model on the
# hub, the table of architectures of the GaLore paper's configs, and `num_parameters()` in transformers' own docs.
TOTALS = {
    "bert-base-uncased": 109_514_298,
    "bert-large-uncased": 335_174_458,
    "gpt2": 124_439_808,
    "gpt2-125m": 124_439_808,
    "gpt2-large": 774_030_080,
    "gpt2-medium": 354_823_168,
    "gpt2-xl": 1_557_611_200,
    "llama-60m": 58_073_600,
    "llama-130m": 134_105_856,
    "llama-350m": 367_969_280,
    "llama-1b": 1_339_082_752,
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-33b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.3-70b": 70_553_706_496,
    "mistral-7b": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "qwen2-7b": 7_615_616_512,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "roberta-base": 124_697_433,
    "roberta-base-glue": 124_647_170,
    "roberta-large": 355_412_057,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "tinyllama-1.1b": 1_100_048_384,
}


def test_totals_are_the_published_ones() -> None:
    assert {name: bundled_model(name).parameter_count for name in bundled()} == TOTALS


def test_total_counted_by_hand() -> None:
    """LLaMA 350M: 24 layers of 4 h·h + 3 h·i with h = 1024, i = 2736; 2 norms each; embedding and head; a last norm."""
    h, i, layers, vocabulary = 1024, 2736, 24, 32000
    projected = layers * (4 * h * h + 3 * h * i)
    model = bundled_model("llama-350m")
    assert projected == 302_383_104
    assert sum(row.count for row in model.parameters() if is_target(row, None)) == projected
    assert model.parameter_count == projected + layers * 2 * h + 2 * vocabulary * h + h


@pytest.mark.parametrize("name", bundled())
def test_spec_file_says_what_it_is(name: str) -> None:
    spec = spec_file(name)
    model = bundled_model(name)
    assert (folder() / f"{name}.toml").read_text().startswith("# source: https://")
    assert spec.name == name
    assert spec.description
    assert model.num_layers == spec.config.get("num_hidden_layers", spec.config.get("n_layer"))
    assert model.heads is not None
    # no key is misspelt: each is one that the family reads
    assert set(spec.hf_config) <= set(family(model.family or "").Config.model_fields)


LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 96, "hidden_size": 32,
    "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
}  # fmt: skip
MISTRAL = LLAMA | {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "num_key_value_heads": 2}
QWEN2 = MISTRAL | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
GPT2 = {
    "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 96, "n_positions": 16, "n_embd": 32,
    "n_layer": 3, "n_head": 4,
}  # fmt: skip
BERT = {
    "model_type": "bert", "architectures": ["BertForMaskedLM"], "vocab_size": 96, "hidden_size": 32,
    "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 40, "max_position_embeddings": 16,
    "type_vocab_size": 2,
}  # fmt: skip
ROBERTA = BERT | {"model_type": "roberta", "architectures": ["RobertaForMaskedLM"]}
BERT_CLASSIFIER = BERT | {"architectures": ["BertForSequenceClassification"]}
ROBERTA_CLASSIFIER = ROBERTA | {"architectures": ["RobertaForSequenceClassification"]}
THREE_LABELS = {"id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}

OPTIONS = [
    LLAMA,
    LLAMA | {"num_key_value_heads": 1},
    LLAMA | {"num_key_value_heads": None, "head_dim": None},
    LLAMA | {"head_dim": 6},
    LLAMA | {"attention_bias": True},
    LLAMA | {"mlp_bias": True},
    LLAMA | {"tie_word_embeddings": True},
    LLAMA | {"num_hidden_layers": 1, "hidden_act": "gelu"},
    MISTRAL,
    MISTRAL | {"head_dim": 16, "sliding_window": None},
    MISTRAL | {"tie_word_embeddings": True},
    QWEN2,
    QWEN2 | {"head_dim": 16, "use_sliding_window": True, "max_window_layers": 1},
    QWEN2 | {"tie_word_embeddings": True, "num_key_value_heads": None},
    GPT2,
    GPT2 | {"n_inner": 24},
    GPT2 | {"tie_word_embeddings": False},
    {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 96, "max_position_embeddings": 16,
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    },
    BERT,
    BERT | {"tie_word_embeddings": False},
    BERT_CLASSIFIER,
    BERT_CLASSIFIER | THREE_LABELS,
    BERT_CLASSIFIER | {"num_labels": 1},
    ROBERTA,
    ROBERTA | {"tie_word_embeddings": False, "type_vocab_size": 1},
    ROBERTA_CLASSIFIER,
    ROBERTA_CLASSIFIER | THREE_LABELS,
]  # fmt: skip


@pytest.mark.parametrize("config", OPTIONS, ids=lambda c: f"{c['architectures'][0]}-{len(c)}")
def test_family_has_the_parameters_of_transformers(config: dict[str, Any]) -> None:
    model = model_from_config(config, "small", "test")
    assert rows(model) == hf_parameters(config)
    assert list(model.groups()) == [(row, block.repeat) for block in model.blocks for row in block.rows]


@pytest.mark.parametrize("config", [LLAMA, MISTRAL, QWEN2, GPT2, BERT, ROBERTA], ids=lambda c: c["model_type"])
def test_defaults_are_those_of_transformers(config: dict[str, Any]) -> None:
    """Every optional key that the config leaves out has the value that transformers fills in."""
    real = hf_config(config)
    checked = model_from_config(config, "small", "test").config
    ours = {key: value for key, value in checked.items() if key not in config}
    theirs = {key: getattr(real, key) for key in ours if hasattr(real, key)}
    if config["model_type"] == "qwen2":
        assert ours.pop("head_dim") == 8  # not an attribute there, but what the attention layer computes
    if config["model_type"] == "gpt2":
        assert ours.pop("n_inner") == 4 * 32  # None there, and then 4 n_embd in the block
        theirs.pop("n_inner")
    assert ours == theirs


@pytest.mark.parametrize("config", OPTIONS, ids=lambda c: f"{c['architectures'][0]}-{len(c)}")
def test_checked_config_describes_the_same_model(config: dict[str, Any]) -> None:
    model = model_from_config(config, "small", "test")
    assert model_from_config(model.config, "small", "test") == model


@pytest.mark.parametrize("model_type", FAMILIES)
def test_family_offers_what_the_protocol_says(model_type: str) -> None:
    chosen = family(model_type)
    assert issubclass(chosen.Config, FamilyConfig)
    assert callable(chosen.blocks)
    assert callable(chosen.heads)


def test_roles_and_kinds_of_modules() -> None:
    """A low-rank method applies to the attention and MLP matrices: seven in a layer of LLaMA, four in one of GPT-2."""
    llama, gpt2 = bundled_model("llama-60m"), bundled_model("gpt2")
    assert sum(is_target(row, None) for row in llama.parameters()) == 8 * 7
    assert sum(is_target(row, None) for row in gpt2.parameters()) == 12 * 4
    assert {row.module for row in gpt2.parameters() if is_target(row, None)} == {"conv1d"}
    assert [row.name for row in llama.parameters() if row.role is Role.HEAD] == ["lm_head.weight"]
    assert {row.role for row in bundled_model("roberta-base-glue").blocks[-1].rows} == {Role.HEAD}


def test_early_spelling_of_the_architecture_is_known() -> None:
    """The configs of the GaLore repository write LLaMAForCausalLM."""
    model = model_from_config(LLAMA | {"architectures": ["LLaMAForCausalLM"]}, "small", "test")
    assert model.config["architectures"] == ["LlamaForCausalLM"]
    assert model_from_config(LLAMA | {"architectures": None}, "small", "test") == model
