"""What is simulated: from what stands after `--model` to a spec, or to a training step of the user's own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from galore_mem.errors import InputError
from galore_mem.estimator import default_seq_len
from galore_mem.families import FAMILIES
from galore_mem.setup import Setup
from galore_mem.simulate.quiet import last_line, quiet
from galore_mem.simulate.subjects.load import UserStep, is_reference, load
from galore_mem.simulate.subjects.models import spec_of
from galore_mem.spec.files import is_file, is_folder, read_object, shown_path, status
from galore_mem.spec.hub import cached_folder, is_repo_id
from galore_mem.spec.model import ModelSpec
from galore_mem.spec.resolve import bundled, resolve

Subject = ModelSpec | UserStep


def subject(model: str | ModelSpec | UserStep) -> Subject:
    """What `--model` means: `module:function`; the config of a family without a twin, as transformers builds it; or
    what `estimate` takes. Raises `InputError`."""
    if not isinstance(model, str):
        return model
    if is_reference(model) and status(Path(model)) is None:
        return load(model)
    path = None if model in bundled() else config_file(model)
    keys = None if path is None else read_object(path)
    if path is None or keys is None or not isinstance(keys.get("model_type"), str) or keys["model_type"] in FAMILIES:
        return resolve(model)
    return of_any_family(keys, name_of(path), shown_path(path))


def is_own(asked: Subject) -> bool:
    """Is it a training step of the user's own?"""
    return isinstance(asked, UserStep)


def default_length(asked: Subject) -> int:
    """Tokens per sequence where nobody says."""
    return default_seq_len(asked) if isinstance(asked, ModelSpec) else Setup().seq_len


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
