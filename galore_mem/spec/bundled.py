"""The model specs that come with the package: one TOML file each, found without reading the others."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

import galore_mem
from galore_mem.errors import InputError, unknown
from galore_mem.spec.config import model_from_config, problems
from galore_mem.spec.files import CONFIG_LIMIT, decode, read_file, shown_path
from galore_mem.spec.model import ModelSpec


class SpecFile(BaseModel):
    """A spec file: a name, a line about the model, and the keys of its config.json.

    `null_keys` lists the keys that are null there, which TOML cannot write.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    name: str
    description: str
    null_keys: list[str] = Field(default_factory=list)
    config: dict[str, Any]

    @property
    def hf_config(self) -> dict[str, Any]:
        """The config as in config.json, null keys included."""
        return self.config | dict.fromkeys(self.null_keys)


def folder() -> Path:
    """Where the specs are: inside the installed package, or beside it in a checkout."""
    package = Path(galore_mem.__file__).parent
    inside = package / "model_specs"
    return inside if inside.is_dir() else package.parent / "model_specs"


def bundled() -> tuple[str, ...]:
    """The names of the bundled models, sorted. No file is read."""
    return tuple(sorted(path.stem for path in folder().glob("*.toml")))


def spec_file(name: str) -> SpecFile:
    """The spec file of a bundled model. Raises `InputError` with the nearest names for an unknown one."""
    if name not in bundled():
        raise unknown("model", name, bundled())
    return read_spec_file(folder() / f"{name}.toml")


def read_spec_file(path: Path) -> SpecFile:
    """A spec file, checked. Raises `InputError` naming the file and what is wrong with it."""
    text = decode(read_file(path, CONFIG_LIMIT), shown_path(path))
    try:
        return SpecFile.model_validate(tomllib.loads(text))
    except ValidationError as error:  # a ValueError too, as is TOMLDecodeError
        raise InputError(f"{shown_path(path)}: {problems(error)}") from None
    except ValueError as error:
        raise InputError(f"{shown_path(path)} is not TOML: {error}") from None
    except RecursionError:
        raise InputError(f"{shown_path(path)} is nested too deeply") from None


def bundled_model(name: str) -> ModelSpec:
    """The bundled model of this name. Raises `InputError` with the nearest names for an unknown one."""
    return model_from_config(spec_file(name).hf_config, name, f"model_specs/{name}.toml")
