"""Models of transformers as specs: of any family, at other depths, and which of their layers are alike."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from galore_mem.errors import InputError, unknown
from galore_mem.estimator import Case, given_for
from galore_mem.memory.phases import Work
from galore_mem.methods.base import Job
from galore_mem.methods.registry import method as method_of
from galore_mem.optim.groups import heads_of, rows
from galore_mem.setup import RECIPES, Setup
from galore_mem.simulate.depths import cut
from galore_mem.spec.config import model_from_config
from galore_mem.spec.model import Block, Heads, ModelSpec, check_targets
from galore_mem.verify.models import has_twin, transformers_model

META = torch.device("meta")
LAYERS = "num_hidden_layers"


def spec_of(config: Mapping[str, Any], name: str, source: str = "") -> ModelSpec:
    """The spec of any language model that transformers has, from the keys of its config.json: its parameters are those
    of the real model, built without values. (There is no estimate of a family that the package does not know.)"""
    made = config_of(config)
    given = made.to_dict()
    if not given.get("architectures"):
        given["architectures"] = [default_head(made)]
    spec = ModelSpec(name, str(config["model_type"]), (), config=given, source=source)
    code = method_of("adamw").implementation(None)
    model = built(Work(spec, Setup(attention="eager"), code, Job({}, RECIPES["fp32"]), None, None))
    found = tuple(row for row, _ in rows(model))
    return replace(spec, blocks=tuple(Block((row,)) for row in found), heads=_heads(model))


def _heads(model: nn.Module) -> Heads | None:
    """Attention geometry; None where the layers' differ (transformers then refuses to tell the model's)."""
    try:
        return heads_of(model)
    except RuntimeError:  # its AmbiguousGlobalPerLayerAttributeError
        return None


def config_of(config: Mapping[str, Any]) -> Any:
    """transformers' own object. Raises `InputError` for keys or values that it refuses."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise unknown("model_type", str(kind), CONFIG_MAPPING)
    try:
        # (its files write infinity as {"__float__": "Infinity"})
        given = CONFIG_MAPPING[kind]._decode_special_floats(dict(config))
        return CONFIG_MAPPING[kind](**{k: v for k, v in given.items() if k != "model_type"})
    except Exception as error:  # of whatever class its checks raise
        raise InputError(f"transformers refuses this {kind} config: {' '.join(str(error).split())}") from None


def default_head(config: Any) -> str:
    """Causal where the family has such a model, masked otherwise."""
    found = language_models(config.model_type)
    if not found:
        raise InputError(f"transformers has no causal or masked language model of the family {config.model_type}")
    return found[0]


def language_models(family: str) -> list[str]:
    """transformers' causal and masked models of a family."""
    from transformers.models.auto import modeling_auto as auto

    tables = (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES)
    return [str(names[family]) for names in tables if family in names]


def work_of(
    spec: ModelSpec, setup: Setup, method: str, implementation: str | None = None,
    hyperparameters: Mapping[str, Any] | None = None, targets: tuple[str, ...] | None = None,
) -> Work:  # fmt: skip
    """A training run of a model of any family, with a method of the registry."""
    check_targets(spec, targets)
    found = method_of(method)
    shapes = spec if has_twin(spec) else replace(spec, family=None)
    given = given_for(found, hyperparameters or {})
    case = Case(shapes, setup, found, found.implementation(implementation), targets, given)
    return case.work()._replace(model=spec)


def built(work: Work) -> nn.Module:
    """The model without values. Raises `InputError` where transformers cannot build it."""
    try:
        return transformers_model(work, META)
    except (ValueError, TypeError, RuntimeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        if "scaled_dot_product_attention" in str(error):
            kind = work.model.family
            raise InputError(f"{kind} has no sdpa attention in transformers; give --attention eager") from None
        raise InputError(
            f"transformers cannot build this {work.model.family}: {' '.join(str(error).split())}"
        ) from None


# -- depth -----------------------------------------------------------------------------------------------


def with_layers(spec: ModelSpec, kept: Sequence[int]) -> ModelSpec:
    """The model with some of its layers."""
    given = cut(spec.config, layers_key(spec), kept)
    if has_twin(spec):
        return model_from_config(given, spec.name, spec.source)
    return spec_of(given, spec.name, spec.source)


def layers_key(spec: ModelSpec) -> str:
    """What the family's config calls the number of layers."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    assert spec.family is not None
    key: str = CONFIG_MAPPING[spec.family].attribute_map.get(LAYERS, LAYERS)
    return key


class Stack(NamedTuple):
    """A model's layers: what each is made of and told, and what its config says of it."""

    layers: list[dict[Hashable, Any]]
    said: list[str]

    def numbers(self) -> frozenset[Hashable]:
        """Options that are the layer's own number."""
        return frozenset(key for layer in self.layers for key in layer if all(self._numbered(key)))

    def _numbered(self, key: Hashable) -> Iterator[bool]:
        return (type(layer[key]) is int and layer[key] == i for i, layer in enumerate(self.layers) if key in layer)

    def kinds(self, without: Set[Hashable]) -> list[Hashable]:
        """A value for each layer, equal for those that are alike but for these options."""
        return [
            (frozenset((key, value) for key, value in layer.items() if key not in without), said)
            for layer, said in zip(self.layers, self.said, strict=True)
        ]


def stack_of(model: nn.Module) -> Stack:
    """The layers of a model; none where it is not clear which they are (an encoder's and a decoder's)."""
    config: Any = model.config
    count = getattr(config, LAYERS, None)
    stacks = {p: m for p, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count}
    outer = next(iter(stacks), "")
    if not outer or any(not path.startswith(f"{outer}.") for path in stacks if path != outer):
        return Stack([], [])
    lists = [value for value in config.to_dict().values() if isinstance(value, list) and len(value) == count]
    said = [repr([value[i] for value in lists]) for i in range(len(stacks[outer]))]
    return Stack([dict(_described(layer)) for layer in stacks[outer]], said)


def _described(layer: nn.Module) -> Iterator[tuple[Hashable, Any]]:
    """All of a layer that can decide what it does: its modules, their tensors, and their options."""
    for path, module in layer.named_modules():
        yield (path, "class"), type(module).__name__
        for name, t in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            yield (path, name), (tuple(t.shape), t.dtype, t.requires_grad)
        for name, value in vars(module).items():
            if isinstance(value, float):
                yield (path, name), bool(value)  # how large it is changes no size
            elif value is None or isinstance(value, int | str):
                yield (path, name), value
