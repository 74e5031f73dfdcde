"""The transformers model of a case, with random weights, and its parameters under the names of the ledger."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from galore_mem.families import FAMILIES
from galore_mem.memory.phases import Work
from galore_mem.spec.model import ModelSpec
from galore_mem.verify.builders import CannotRun, Member

# how transformers calls the setup's kinds of attention
ATTENTION = {"flash": "flash_attention_2"}
# What peft makes of a parameter's name, and what the ledger calls it. (Low-Rank's `weight_a` and `weight_b`, and the
# `weight` of an INT8 layer, have the ledger's names.)
NAMES = (
    (r"^base_model\.model\.", ""),
    (r"\.base_layer\.", "."),
    (r"\.(lora_[AB])\.(\w+)\.weight$", r".weight.\1.\2.weight"),
)


def ledger_name(name: str) -> str:
    """A parameter's name in the ledger, from that in a model that a method has changed."""
    for pattern, its in NAMES:
        name = re.sub(pattern, its, name)
    return name


def transformers_model(work: Work, device: torch.device) -> torch.nn.Module:
    """The model of a spec on a device, as transformers builds it from the same config. Raises `CannotRun` for shapes
    alone. It is made where and in the format in which it is trained, as `from_pretrained` makes it: buffers that a
    model keeps in float32 stay so."""
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForMaskedLM,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
    )
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    spec, setup = work.model, work.setup
    if spec.family is None:
        raise CannotRun("the model's architecture is not known (only tensor shapes); give its config.json")
    if setup.attention == "flash" and find_spec("flash_attn") is None:
        raise CannotRun("flash attention needs the package flash-attn, which is not installed")
    config: Any = CONFIG_MAPPING[spec.family](**{k: v for k, v in spec.config.items() if k != "model_type"})
    head = (config.architectures or ["CausalLM"])[0]
    kinds = {
        "CausalLM": AutoModelForCausalLM, "LMHeadModel": AutoModelForCausalLM, "MaskedLM": AutoModelForMaskedLM,
        "SequenceClassification": AutoModelForSequenceClassification,
        "TokenClassification": AutoModelForTokenClassification,
    }  # fmt: skip
    listed = (k for k in (AutoModelForCausalLM, AutoModelForMaskedLM) if is_class_of(k, spec.family, head))
    kind: Any = next(listed, None) or next((k for name, k in kinds.items() if head.endswith(name)), None)
    if kind is None:
        raise CannotRun(f"{head} has no loss that is verified here")
    attention = ATTENTION.get(setup.attention, setup.attention)
    fmt = getattr(torch, setup.recipe.weights.name)
    with device:
        model: torch.nn.Module = kind.from_config(config, dtype=fmt, attn_implementation=attention)
    if any(t.device.type not in (device.type, "meta") for t in (*model.parameters(), *model.buffers())):
        model.to(device)  # what functions make that ask no device (torch.normal)
    model.train()
    model.config.use_cache = setup.use_cache  # type: ignore[union-attr]  # a transformers model
    if setup.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]  # a transformers model
    return model


def is_class_of(auto: Any, family: str, name: str) -> bool:
    """Is this the class that one of transformers' auto classes makes for a family? (Not all names say what they are:
    ReformerModelWithLMHead, BertGenerationDecoder.)"""
    found: bool = auto._model_mapping._model_mapping.get(family) == name
    return found


def has_twin(spec: ModelSpec) -> bool:
    """Is the spec of a family that the package knows, whose rows repeat? (Those made from a real model do not.)"""
    return spec.family in FAMILIES and any("{i}" in row.name for row, _ in spec.groups())


def members_of(model: torch.nn.Module, work: Work) -> list[Member]:
    """The model's trained parameters, each with the ledger's view of it. Raises `CannotRun` where they differ."""
    expected = {
        trained.name.replace("{i}", number): trained
        for row, number, _ in work.layout().rows(work.model.num_layers)
        for _, trained in row.tensors
        if trained is not None
    }
    found = {ledger_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    if not has_twin(work.model):  # such a spec has all of the real model's parameters, and a model may freeze some
        expected = {name: trained for name, trained in expected.items() if name in found}
    if expected.keys() != found.keys():
        other = sorted(expected.keys() ^ found.keys())[0]
        raise CannotRun(f"the real model and its spec differ: {other}")
    return [Member(replace(expected[name], name=name), p) for name, p in found.items()]


def batch(work: Work, device: torch.device) -> Callable[[], dict[str, Tensor]]:
    """A function that makes the inputs anew, as a data loader does. A classifier's labels are classes: one a sequence,
    or one a token."""
    config = work.model.config
    vocabulary, head = int(config.get("vocab_size", 2)), (config.get("architectures") or [""])[0]
    shape, classes = (work.setup.batch_size, work.setup.seq_len), int(config.get("num_labels") or 2)
    labelled = shape[:1] if head.endswith("SequenceClassification") else shape

    def inputs() -> dict[str, Tensor]:
        ids = torch.randint(min(5, vocabulary - 1), vocabulary, shape, device=device)
        labels = torch.randint(classes, labelled, device=device) if "Classification" in head else ids.clone()
        return {"input_ids": ids, "labels": labels}

    return inputs


def autocast(work: Work, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """The recipe's autocast region, made anew for each use."""
    fmt = work.setup.recipe.autocast
    if fmt is None:
        return nullcontext
    return lambda: torch.autocast(device.type, getattr(torch, fmt.name))
