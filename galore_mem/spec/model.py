"""What a model is, for memory: the rows of `named_parameters()` and the dimensions behind them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from math import prod
from typing import Any, NamedTuple

from galore_mem.dtypes import DType
from galore_mem.errors import InputError

Shape = tuple[int, ...]


class Role(StrEnum):
    """Where a parameter sits in the model."""

    EMBEDDING = "embedding"
    ATTENTION = "attention"
    MLP = "mlp"
    NORM = "norm"
    HEAD = "head"
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class ParamSpec:
    """One row of `named_parameters()`: its name, its shape as stored and what it belongs to.

    `module` is the kind of the owning module: `linear` (weight is out x in), `conv1d` (GPT-2's, in x
    out), `embedding` or `norm`. In a `Block`'s template the name has `{i}` for the layer's number.
    """

    name: str
    shape: Shape
    role: Role
    module: str

    @property
    def count(self) -> int:
        return prod(self.shape)

    @property
    def is_matrix_of_linear(self) -> bool:
        """Is this a weight with two or more dimensions that a module multiplies by (not an embedding)?"""
        return self.module in ("linear", "conv1d") and len(self.shape) >= 2

    @property
    def module_path(self) -> str:
        """Dotted path of the owning module: the name without its last part."""
        return self.name.rpartition(".")[0]


@dataclass(frozen=True, slots=True)
class BufferSpec:
    """A tensor that the model registers beside its parameters: a row of `named_buffers()`, with `{i}` in its name where
    each layer has one.

    It is neither trained nor stored in the optimizer's format: `dtype` is its own, or None where it has the format the
    model is made in. `releases` of transformers register it; empty: all of them.
    """

    name: str
    shape: Shape
    dtype: DType | None
    releases: tuple[str, ...] = ()

    @property
    def in_each_layer(self) -> bool:
        return "{i}" in self.name


class Block(NamedTuple):
    """Parameter rows that repeat `repeat` times, one after another, with `{i}` counting from `start`."""

    rows: tuple[ParamSpec, ...]
    repeat: int = 1
    start: int = 0

    def expand(self) -> Iterator[ParamSpec]:
        for i in range(self.start, self.start + self.repeat):
            for row in self.rows:
                yield ParamSpec(row.name.replace("{i}", str(i)), row.shape, row.role, row.module)


class Heads(NamedTuple):
    """Attention geometry that some ledgers need (Adam-mini partitions query and key by head)."""

    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A model as far as its memory goes.

    `blocks` expand, in order, to exactly the rows of `named_parameters()` (tied parameters once, under
    the name that transformers keeps). `family` names the entry of `galore_mem.families` that can run
    the model's forward pass on sizes alone; it is None when only shapes are known (a safetensors header
    without a config), and then activations cannot be counted, nor `buffers`. `config` holds the Hugging Face keys.
    """

    name: str
    family: str | None
    blocks: tuple[Block, ...]
    heads: Heads | None = None
    buffers: tuple[BufferSpec, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    dtypes: Mapping[str, str] = field(default_factory=dict)
    source: str = ""

    def registered(self, release: str) -> Iterator[BufferSpec]:
        """The buffers that the model has under this release of transformers."""
        return (row for row in self.buffers if not row.releases or release in row.releases)

    def parameters(self) -> Iterator[ParamSpec]:
        """Every row of `named_parameters()`, in its order."""
        for block in self.blocks:
            yield from block.expand()

    def groups(self) -> Iterator[tuple[ParamSpec, int]]:
        """Template rows with how often each occurs: the same parameters in far fewer rows."""
        for block in self.blocks:
            for row in block.rows:
                yield row, block.repeat

    @property
    def parameter_count(self) -> int:
        return sum(row.count * repeat for row, repeat in self.groups())

    @property
    def num_layers(self) -> int:
        """How many identical layers the model stacks (the longest repeated block)."""
        return max((b.repeat for b in self.blocks), default=0)


DEFAULT_TARGET_ROLES = (Role.ATTENTION, Role.MLP)


def is_target(row: ParamSpec, targets: tuple[str, ...] | None) -> bool:
    """Does a low-rank method or an adapter apply to this parameter?

    With no targets: the weight matrices of attention and MLP (GaLore, `torchrun_main.py`: linear modules
    whose name contains attn or mlp). With targets: a linear weight one of whose module names (the dotted
    parts) equals a target; `all-linear` means every linear but the head (as peft does).
    """
    if not row.is_matrix_of_linear:
        return False
    if targets is None:
        return row.role in DEFAULT_TARGET_ROLES
    parts = row.module_path.split(".")
    return any(t in parts or (t == "all-linear" and row.role is not Role.HEAD) for t in targets)


def check_targets(model: ModelSpec, targets: tuple[str, ...] | None) -> None:
    """Raises `InputError` when a target names no linear weight of the model, listing those it has."""
    if targets is None:
        return
    if not targets:
        raise InputError("--target names no linear layer; leave it out for attention and MLP")
    linears = [row for row, _ in model.groups() if row.is_matrix_of_linear]
    for target in targets:
        if not any(is_target(row, (target,)) for row in linears):
            names = sorted({row.module_path.rpartition(".")[2] for row in linears})
            raise InputError(f"target {target!r} names no linear layer of {model.name}; it has {', '.join(names)}")
