"""From what the user writes after `--model` to a `ModelSpec`."""

from __future__ import annotations

import difflib
import os
import stat
from pathlib import Path

from galore_mem.errors import InputError, unknown
from galore_mem.spec.bundled import bundled, bundled_model, read_spec_file
from galore_mem.spec.checkpoint import model_from_checkpoint
from galore_mem.spec.config import has_known_family, model_from_config, read_config
from galore_mem.spec.files import is_file, list_folder, read_object, shown, shown_path, status
from galore_mem.spec.hub import cache_folder, cached_folder, is_repo_id
from galore_mem.spec.model import ModelSpec

__all__ = ["bundled", "resolve"]

WEIGHTS = ("model.safetensors.index.json", "model.safetensors")
_ACCEPTED = "a bundled name, a config.json, a model folder, a .safetensors file or a hub id in the local cache"


def resolve(model: str) -> ModelSpec:
    """The model that is meant. Raises `InputError` that says what was looked for.

    In this order: the name of a bundled model; a path that exists (a model folder, a config.json, a .safetensors
    file, an index of shards, a spec .toml); the id of a model in the local Hugging Face cache.
    """
    if not model.strip():
        raise InputError(f"the model is empty; give {_ACCEPTED}")
    if model in bundled():
        return bundled_model(model)
    path = Path(model)
    found = status(path)
    if found is not None:
        return _from_folder(path, _name(path)) if stat.S_ISDIR(found.st_mode) else _from_file(path)
    if path.suffix in (".json", ".toml", ".safetensors") or ("/" in model and not is_repo_id(model)):
        raise InputError(f"there is no file or folder {shown_path(model)}; give {_ACCEPTED}")
    cached = cached_folder(model) if is_repo_id(model) else None
    if cached is not None:
        return _from_folder(cached, model)
    raise _not_cached(model) if "/" in model else unknown("model", model, bundled())


def _not_cached(model: str) -> InputError:
    near = difflib.get_close_matches(model.rpartition("/")[2].lower(), bundled(), n=3, cutoff=0.5)
    instead = f"use a bundled model ({', '.join(near)})" if near else "download its config.json"
    return InputError(
        f"{shown(model, 100)} is no folder here and not in the Hugging Face cache {shown_path(cache_folder())}, and "
        f"nothing is downloaded; {instead} or give the path of its config.json"
    )


def _from_file(path: Path) -> ModelSpec:
    if path.name.endswith((".safetensors", ".index.json")):
        return model_from_checkpoint(path, _name(path))
    if path.suffix == ".toml":
        spec = read_spec_file(path)
        return model_from_config(spec.hf_config, spec.name, shown_path(path))
    if path.suffix == ".json" or not path.suffix or not is_file(path):
        return read_config(path, _name(path))
    raise InputError(f"cannot tell what {shown_path(path)} is; give {_ACCEPTED}")


def _from_folder(path: Path, name: str) -> ModelSpec:
    """The config.json decides; the weights do where there is none, or one of a family that is not known."""
    config = path / "config.json"
    keys = read_object(config) if is_file(config) else None
    if keys is not None and has_known_family(keys):
        return model_from_config(keys, name, shown_path(config))
    weights = _weights(path)
    if weights is None and keys is not None:
        return model_from_config(keys, name, shown_path(config))  # raises: says which families are known
    if weights is None:
        raise InputError(f"{shown_path(path)} holds neither config.json nor safetensors weights")
    return model_from_checkpoint(weights, name)


def _weights(path: Path) -> Path | None:
    """The weights in a model folder: the index, else the file of the usual name, else the only safetensors file."""
    for usual in WEIGHTS:
        if is_file(path / usual):
            return path / usual
    files = [p for p in list_folder(path) if p.suffix == ".safetensors"]
    return files[0] if len(files) == 1 else None


def _name(path: Path) -> str:
    """A model is called after its file, or after its folder where every model's file is called the same."""
    stem = path.name.partition(".")[0]
    if path.is_dir() or stem in ("config", "model"):
        folder = path if path.is_dir() else path.parent
        return os.path.basename(os.path.abspath(folder)) or str(path)
    return path.stem
