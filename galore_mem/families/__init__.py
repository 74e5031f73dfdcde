"""The model families whose parameters and forward pass are known: one file each, and a row in `FAMILIES`.

Nothing is imported until a family is asked for, so a command pays for the one it uses.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, cast

from galore_mem.errors import unknown
from galore_mem.spec.model import Block, BufferSpec, Heads

if TYPE_CHECKING:
    from galore_mem.families.base import FamilyConfig
    from galore_mem.memory.network import Network
    from galore_mem.memory.tape import Tensor

# `model_type` of a Hugging Face config.json -> the module that describes such models.
FAMILIES: Mapping[str, str] = {
    "bert": "galore_mem.families.bert",
    "gpt2": "galore_mem.families.gpt2",
    "llama": "galore_mem.families.llama",
    "mistral": "galore_mem.families.mistral",
    "qwen2": "galore_mem.families.qwen2",
    "roberta": "galore_mem.families.roberta",
}


class Family(Protocol):
    """What the module of a family offers.

    - `Config`: the keys of config.json that decide memory, checked (`galore_mem.families.base`).
    - `blocks(config)`: the rows of `named_parameters()`, in transformers' order, tied parameters once.
    - `buffers(config)`: the rows of `named_buffers()`, in each release of transformers that is modelled.
    - `heads(config)`: the attention geometry.
    - `forward(net, input_ids, labels)`: the model's forward pass with its loss, on sizes; returns the loss and the
      tensors that the model's output object holds besides it.
    """

    @property
    def Config(self) -> type[FamilyConfig]: ...  # noqa: N802 - a class, as each family names it

    def blocks(self, config: Any, /) -> tuple[Block, ...]: ...

    def buffers(self, config: Any, /) -> tuple[BufferSpec, ...]: ...

    def heads(self, config: Any, /) -> Heads: ...

    def forward(self, net: Network, input_ids: Tensor, labels: Tensor, /) -> tuple[Tensor, tuple[Tensor, ...]]: ...


def family(model_type: str) -> Family:
    """The family of this `model_type`. Raises `InputError` with the known ones."""
    if model_type not in FAMILIES:
        raise unknown("model_type", model_type, FAMILIES)
    return cast(Family, import_module(FAMILIES[model_type]))
