"""From the keys of a Hugging Face config.json to a `ModelSpec`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from galore_mem.errors import InputError
from galore_mem.families import FAMILIES, family
from galore_mem.spec.files import read_object, shown, shown_path
from galore_mem.spec.model import ModelSpec

_LISTED_PROBLEMS = 3


def has_known_family(config: Mapping[str, Any]) -> bool:
    """Does the config name a `model_type` whose parameters are known?"""
    model_type = config.get("model_type")
    return isinstance(model_type, str) and model_type in FAMILIES


def model_from_config(config: Mapping[str, Any], name: str, source: str) -> ModelSpec:
    """The model that this config describes; its `config` holds the checked keys with transformers' defaults.

    `source` says where the keys are from and begins every error. Raises `InputError` (one line) for a config
    that is not an object, has no known `model_type`, or lacks a key or gives it a value that cannot be.
    """
    if not isinstance(config, Mapping):
        raise InputError(f"{source}: a config must be an object, got {shown(config)}")
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        given = f"got {shown(model_type)}" if "model_type" in config else "it is missing"
        raise InputError(f"{source}: model_type must be one of {', '.join(FAMILIES)}; {given}")
    if model_type not in FAMILIES:
        raise InputError(
            f"{source}: unknown model_type {shown(model_type)}; known: {', '.join(FAMILIES)}; galore-mem simulate "
            "knows all of transformers' causal and masked models"
        )
    if config.get("quantization_config"):
        raise InputError(f"{source}: quantization_config: only models with unquantized weights are described")
    try:
        chosen = family(model_type)
        checked = chosen.Config.model_validate(dict(config))
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    except ValidationError as error:
        raise InputError(f"{source}: {problems(error)}") from None
    return ModelSpec(
        name=name,
        family=model_type,
        blocks=chosen.blocks(checked),
        heads=chosen.heads(checked),
        buffers=chosen.buffers(checked),
        config=checked.model_dump(),
        source=source,
    )


def read_config(path: Path, name: str) -> ModelSpec:
    """The model that a config.json file describes. Raises `InputError`."""
    return model_from_config(read_object(path), name, shown_path(path))


def problems(error: ValidationError) -> str:
    """Pydantic's findings as one line: the key, what is wrong, what was given; the first few of many."""
    found = [_problem(e) for e in error.errors(include_url=False)]
    more = len(found) - _LISTED_PROBLEMS
    return "; ".join(found[:_LISTED_PROBLEMS]) + (f"; and {more} more" if more > 0 else "")


def _problem(error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "missing":
        return f"{key} is missing"
    if error["type"] == "extra_forbidden":
        return f"{shown(key)} is not a key of it"
    message = str(error["msg"]).removeprefix("Value error, ").replace("Input should be", "must be")
    if message.startswith("must"):
        return f"{key} {message}, got {shown(error['input'])}"
    return f"{key}: {message}" if key else message
