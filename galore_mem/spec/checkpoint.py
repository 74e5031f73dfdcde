"""From the tensors of a checkpoint to a `ModelSpec`, with or without the config.json beside it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from galore_mem.errors import InputError
from galore_mem.spec.config import has_known_family, model_from_config
from galore_mem.spec.files import is_file, read_object, shown, shown_path
from galore_mem.spec.model import ModelSpec
from galore_mem.spec.names import fold, guess_rows, is_buffer
from galore_mem.spec.safetensors import StoredTensor, read_header, read_index

# Heads of other tasks, which transformers drops when it loads the checkpoint.
_OTHER_HEADS = re.compile(r"(^|\.)(cls|lm_head|classifier|qa_outputs|score|pooler)\.")
_LISTED = 3


def model_from_checkpoint(path: Path, name: str) -> ModelSpec:
    """The model in a .safetensors file, or in the shards of an index.

    A config.json of a known family beside it gives the family, and must agree with the stored shapes. Without one
    (or with one of another family) the rows are the stored tensors in natural order, their roles guessed from their
    names, and `family` is None. `dtypes` says how each parameter is stored. Raises `InputError`.
    """
    stored = read_index(path) if path.name.endswith(".json") else read_header(path)
    tensors = {key: tensor for key, tensor in stored.items() if not is_buffer(key, tensor.shape)}
    _refuse_quantized(tensors, path)
    beside = path.with_name("config.json")
    if is_file(beside):
        config = read_object(beside)
        if has_known_family(config):
            model = model_from_config(config, name, shown_path(beside))
            return _with_stored(model, tensors, path)
    return _from_names(tensors, name, path)


def _refuse_quantized(tensors: Mapping[str, StoredTensor], path: Path) -> None:
    """Packed integers do not show the shapes of the weights they stand for."""
    for tensor in tensors.values():
        if not tensor.format.trainable:
            raise InputError(
                f"{shown_path(path)}: tensor {shown(tensor.name)} is stored as {tensor.format.name}, which is not a "
                "format to train in; give the checkpoint before quantization or its config.json"
            )


def _from_names(tensors: Mapping[str, StoredTensor], name: str, path: Path) -> ModelSpec:
    if not tensors:
        raise InputError(f"{shown_path(path)} holds no parameters")
    return ModelSpec(
        name=name,
        family=None,
        blocks=fold(guess_rows({key: tensor.shape for key, tensor in tensors.items()})),
        dtypes={key: tensor.format.name for key, tensor in tensors.items()},
        source=f"shapes in {shown_path(path)}; roles guessed from names",
    )


def _with_stored(model: ModelSpec, tensors: Mapping[str, StoredTensor], path: Path) -> ModelSpec:
    """The config's model, after a check that the stored tensors are its parameters."""
    shapes = {row.name: row.shape for row in model.parameters()}
    base = next(iter(shapes)).partition(".")[0] + "."
    found = _as_parameters(tensors, shapes, base, path)
    for name, shape in shapes.items():
        if name in found and found[name].shape != shape:
            raise InputError(
                f"{shown_path(path)}: {name} is stored as {list(found[name].shape)}, config.json makes it {list(shape)}"
            )
    missing = [name for name in shapes if name not in found and name.startswith(base) and ".pooler." not in name]
    if missing:
        raise InputError(f"{shown_path(path)} lacks {_some(missing)} of the {len(shapes)} parameters in config.json")
    extra = [name for name in found if name not in shapes]
    strange = [name for name in extra if not _OTHER_HEADS.search(name)]
    if strange:
        raise InputError(f"{shown_path(path)} holds {_some(strange)} that config.json does not describe")
    unused = f"; not parameters of this model: {_some(extra)}" if extra else ""
    return replace(
        model,
        dtypes={name: found[name].format.name for name in shapes if name in found},
        source=f"{shown_path(path)} with its config.json{unused}",
    )


def _as_parameters(
    tensors: Mapping[str, StoredTensor], shapes: Mapping[str, object], base: str, path: Path
) -> dict[str, StoredTensor]:
    """The stored tensors under the names that parameters have.

    Checkpoints of a bare base model lack its prefix (`h.0.ln_1.weight` for `transformer.h.0.ln_1.weight`), and old
    BERT checkpoints call a LayerNorm's weight and bias gamma and beta.
    """
    bare = not any(name.startswith(base) for name in tensors)
    found: dict[str, StoredTensor] = {}
    for stored, tensor in tensors.items():
        name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", stored)
        name = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)
        if bare and name not in shapes and base + name in shapes:
            name = base + name
        if name in found:
            raise InputError(f"{shown_path(path)} holds {shown(name)} twice, under two names")
        found[name] = tensor
    return found


def _some(names: list[str]) -> str:
    listed = ", ".join(shown(name) for name in names[:_LISTED])
    return listed + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")
