"""What is simulated: from what stands after `--model` to a spec, or to a training step of the user's own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from galore_mem.errors import InputError
from galore_mem.estimator import default_seq_len
from galore_mem.families import FAMILIES, family
from galore_mem.setup import Setup
from galore_mem.simulate.quiet import last_line, quiet
from galore_mem.simulate.subjects.load import UserStep, is_reference, load
from galore_mem.simulate.subjects.models import language_models, spec_of
from galore_mem.spec.files import is_file, is_folder, read_object, shown_path, status
from galore_mem.spec.hub import cached_folder, is_repo_id
from galore_mem.spec.model import ModelSpec
from galore_mem.spec.resolve import bundled, resolve

Subject = ModelSpec | UserStep


def subject(model: str | ModelSpec | UserStep, device: str = "cuda") -> Subject:
    """What `--model` means: `module:function`; the config of a family without a twin, as transformers builds it; or
    what `estimate` takes. Raises `InputError`."""
    if not isinstance(model, str):
        return model
    file, python, function = model.partition(".py")
    if python and (not function or function.startswith(":")) and not (is_reference(model) and function):
        name = f"{Path(file).name}:{function[1:] or 'function'}"
        raise InputError(f"{file}.py is a file; name its module's function: --model {name}, run from its folder")
    if is_reference(model) and status(Path(model)) is None:
        return load(model, device)
    path = None if model in bundled() else config_file(model)
    keys = None if path is None else read_object(path)
    if path is None or keys is None or not isinstance(keys.get("model_type"), str) or is_described(keys):
        return resolve(model)
    return of_any_family(keys, name_of(path), shown_path(path))


def is_described(keys: Mapping[str, Any]) -> bool:
    """Is this a config that a twin describes? Of its families not every variant and head is: a BERT that decodes."""
    if keys["model_type"] not in FAMILIES:
        return False
    only = family(keys["model_type"]).Config.ONLY
    if any(keys.get(key, value) not in (None, value) for key, value in only.items()):
        return False
    named = keys.get("architectures")
    return not (isinstance(named, list) and named and is_undescribed_head(keys["model_type"], named[0]))


def is_undescribed_head(kind: str, name: Any) -> bool:
    """Is this a causal or masked model of transformers that the family's twin lacks?"""
    described = family(kind).Config.ARCHITECTURES
    return name not in described and name in language_models(kind)


def is_own(asked: Subject) -> bool:
    """Is it a training step of the user's own?"""
    return isinstance(asked, UserStep)


def default_length(asked: Subject) -> int:
    """Tokens per sequence where nobody says."""
    return default_seq_len(asked) if isinstance(asked, ModelSpec) else Setup().seq_len


def default_attention(asked: Subject) -> str:
    """The attention that transformers takes where nobody says: sdpa, where the model has it."""
    usual = Setup().attention
    if not isinstance(asked, ModelSpec) or asked.family in FAMILIES:
        return usual
    import transformers

    named = asked.config.get("architectures") or [None]
    return usual if getattr(getattr(transformers, str(named[0]), None), "_supports_sdpa", True) else "eager"


def config_file(model: str) -> Path | None:
    """The config.json that is meant, if one is."""
    path = Path(model)
    if status(path) is None and is_repo_id(model):
        path = cached_folder(model) or path
    if is_folder(path):
        path = path / "config.json"
    return path if path.suffix == ".json" and not path.name.endswith(".index.json") and is_file(path) else None


def name_of(path: Path) -> str:
    """A model is called after its file, or after its folder where every model's file is called the same."""
    return path.stem if path.stem != "config" else path.absolute().parent.name or str(path)


def of_any_family(keys: Mapping[str, Any], name: str, source: str) -> ModelSpec:
    """A model that transformers knows and no twin describes, by transformers' own code alone. Raises `InputError`."""
    if keys.get("quantization_config"):
        raise InputError(
            f"{source}: quantization_config: only models with unquantized weights are simulated; remove it"
        )
    known = {key: value for key, value in keys.items() if key != "auto_map"}  # which names code to be downloaded
    try:
        with quiet():
            return spec_of(known, name, source)
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    except Exception as error:  # of whatever class a model's own code raises
        raise InputError(f"{source}: transformers cannot make this model: {last_line(error)}") from error
