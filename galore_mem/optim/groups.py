"""Parameter groups and partitions of a model, and the pair that the transformers Trainer takes.

Which parameters are projected is decided as in `galore-mem estimate`: the weights of linear layers in attention and
MLP, or of those that a target names.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from galore_mem.errors import InputError
from galore_mem.optim.adam_mini import Partitioned
from galore_mem.optim.base import Group, ParameterWise
from galore_mem.optim.projected import Projected
from galore_mem.partition import Partition, partition
from galore_mem.spec.model import Heads, ParamSpec, is_target
from galore_mem.spec.names import role_of

Chosen = TypeVar("Chosen", bound=ParameterWise)


def rows(model: nn.Module) -> Iterator[tuple[ParamSpec, torch.Tensor]]:
    """The rows of `named_parameters()` as specs, with their tensors."""
    modules = dict(model.named_modules())
    for name, p in model.named_parameters():
        owner = modules[name.rpartition(".")[0]]
        kind = "linear" if isinstance(owner, nn.Linear) else type(owner).__name__.lower()
        yield ParamSpec(name, tuple(p.shape), role_of(name), kind), p


def parameter_groups(model: nn.Module, *, target: Sequence[str] | None = None, **options: Any) -> list[Group]:
    """Two groups of named parameters: those that are not projected, and those that are, with `options` (`rank`, ...).

    `target`: module names whose weights are projected (`q_proj`, `mlp`, `all-linear`); None for attention and MLP.
    Parameters without a gradient are left out. Raises `InputError` where a target names no linear layer.
    """
    targets = (target,) if isinstance(target, str) else None if target is None else tuple(target)
    given = list(rows(model))
    for name in targets or ():
        if not any(is_target(row, (name,)) for row, _ in given):
            layers = sorted({row.module_path.rpartition(".")[2] for row, _ in given if row.is_matrix_of_linear})
            raise InputError(f"target {name!r} names no linear layer of the model; it has {', '.join(layers)}")
    regular: list[tuple[str, torch.Tensor]] = []
    projected: list[tuple[str, torch.Tensor]] = []
    for row, p in given:
        if p.requires_grad:
            (projected if is_target(row, targets) else regular).append((row.name, p))
    if not projected:
        raise InputError("no linear layer of attention or MLP is trained in this model; name the layers with target")
    groups: list[Group] = [{"params": regular}] if regular else []
    return [*groups, {"params": projected, **options}]


def heads_of(model: nn.Module) -> Heads | None:
    """Attention geometry from the model's config; None where it has none."""
    config = getattr(model, "config", None)
    config = getattr(config, "get_text_config", lambda: config)()
    count = getattr(config, "num_attention_heads", None)
    hidden = getattr(config, "hidden_size", None)
    if not isinstance(count, int) or not isinstance(hidden, int):
        return None
    keys = getattr(config, "num_key_value_heads", None) or count
    return Heads(hidden, count, keys, getattr(config, "head_dim", None) or hidden // count)


def partition_of(model: nn.Module, heads: Heads | None = None) -> dict[str, Partition]:
    """Adam-mini's partition of every parameter, by name, for `AdamMini` and `GaLoreMini`.

    `heads` overrides the config's. Raises `InputError` where query and key are there and neither tells their heads.
    """
    heads = heads or heads_of(model)
    return {
        row.name: partition(row.name, row.shape, heads, transposed=row.module == "conv1d") for row, _ in rows(model)
    }


def for_trainer(
    model: nn.Module, optimizer: type[Chosen], *, target: Sequence[str] | None = None, **options: Any
) -> tuple[type[Chosen], dict[str, Any]]:
    """`Trainer(model, args, optimizer_cls_and_kwargs=for_trainer(model, GaLoreMini, lr=1e-3, rank=128))`.

    `target` chooses what is projected, as in `parameter_groups`; the other options are the optimizer's own. Weight
    decay and learning rate are those given here, for all parameters: the Trainer's arguments do not reach them.
    """
    if issubclass(optimizer, Partitioned):
        options.setdefault("partition", partition_of(model))
    if issubclass(optimizer, Projected) and options.get("rank") is not None:
        params: Any = parameter_groups(model, target=target, rank=options.pop("rank"))
    else:
        params = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return optimizer, {"params": params, **options}
