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
from galore_mem.partition import Partition, partition
from galore_mem.spec.model import Heads, ParamSpec, is_target
from galore_mem.spec.names import role_of

Chosen = TypeVar("Chosen", bound=ParameterWise)
Named = list[tuple[str, torch.Tensor]]


def rows(model: nn.Module) -> Iterator[tuple[ParamSpec, torch.Tensor]]:
    """The rows of `named_parameters()` as specs, with their tensors."""
    modules = dict(model.named_modules())
    for name, p in model.named_parameters():
        yield ParamSpec(name, tuple(p.shape), role_of(name), _kind(modules[name.rpartition(".")[0]])), p


def _kind(module: nn.Module) -> str:
    """`linear`, or the class in lower case: `conv1d` is transformers' linear layer stored in x out, not torch's."""
    if isinstance(module, nn.Linear):
        return "linear"
    return "convolution" if isinstance(module, nn.Conv1d) else type(module).__name__.lower().removeprefix("int8")


def parameter_groups(model: nn.Module, *, target: Sequence[str] | None = None, **options: Any) -> list[Group]:
    """Two groups of named parameters: those that are not projected, and those that are, with `options` (`rank`, ...).

    `target`: module names whose weights are projected (`q_proj`, `mlp`, `all-linear`); None for attention and MLP.
    Parameters without a gradient are left out. Raises `InputError` where a target names no linear layer.

    Weights of linear layers are what is found: parameters with more dimensions (a convolution's, the experts that
    transformers fuses into one) stay in the first group; make groups by hand for `TensorGaLoreAdamW`.
    """
    regular, projected = _split(model, target)
    groups: list[Group] = [{"params": regular}] if regular else []
    return [*groups, {"params": projected, **options}]


def _split(model: nn.Module, target: Sequence[str] | None) -> tuple[Named, Named]:
    """The parameters that are not projected, and those that are."""
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    targets = (target,) if isinstance(target, str) else None if target is None else tuple(target)
    given = list(rows(model))
    for name in targets or ():
        if not any(is_target(row, (name,)) for row, _ in given):
            layers = sorted({row.module_path.rpartition(".")[2] for row, _ in given if row.is_matrix_of_linear})
            raise InputError(
                f"target {name!r} names no linear layer of the model; it has {', '.join(layers) or 'none'}"
            )
    regular: Named = []
    projected: Named = []
    for row, p in given:
        if p.requires_grad:
            (projected if is_target(row, targets) else regular).append((row.name, p))
    if not projected:
        raise InputError("no linear layer of attention or MLP is trained in this model; name the layers with target")
    return regular, projected


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
    """Adam-mini's partition of every floating-point parameter, by name, for `AdamMini` and `GaLoreMini`.

    `heads` overrides the config's. Raises `InputError` where query and key are there and neither tells their heads, and
    for models whose fused projections have an order of their own. (A model whose parts have heads of different sizes
    needs a partition made by hand.)
    """
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", "")
    if kind == "codegen" or (kind == "gpt_bigcode" and not getattr(config, "multi_query", True)):
        raise InputError(f"{kind} fuses query, key and value in an order of its own; give the partition by name")
    heads = heads or heads_of(model)
    return {
        row.name: partition(row.name, row.shape, heads, transposed=row.module == "conv1d")
        for row, p in rows(model)
        if p.is_floating_point()
    }


def for_trainer(
    model: nn.Module, optimizer: type[Chosen], *, target: Sequence[str] | None = None, **options: Any
) -> tuple[type[Chosen], dict[str, Any]]:
    """`Trainer(model, args, optimizer_cls_and_kwargs=for_trainer(model, GaLoreMini, lr=1e-3, rank=128))`.

    `target` chooses what is projected, as in `parameter_groups`; the other options are the optimizer's own. A pair is
    good for one Trainer.

    Of the Trainer's arguments, `learning_rate`, `weight_decay` and `adam_*` do not reach the optimizer: they are those
    given here, and weight decay is that of all parameters. Schedulers, `gradient_accumulation_steps`,
    `max_grad_norm`, `bf16` and resuming work as with any optimizer; `fp16` needs float32 weights, as always.

    With `layerwise=LayerWise(k)`, k must be the Trainer's `gradient_accumulation_steps`. `max_grad_norm` has no effect
    then, and the logged `grad_norm` is 0: gradients are gone when the Trainer looks at them (`LayerWise` can clip by
    value). `fp16` is refused at the first step; several processes at once.
    """
    if not (isinstance(optimizer, type) and issubclass(optimizer, ParameterWise)):
        raise InputError(f"for_trainer takes a class of galore_mem.optim, got {optimizer!r}")
    if options.get("rank") is not None and "rank" not in optimizer.RANGES:
        raise InputError(f"{optimizer.__name__} has no rank; leave it out")
    if issubclass(optimizer, Partitioned):
        options.setdefault("partition", partition_of(model))
    if options.get("rank") is not None:
        # rank stays an option: were the Trainer to make groups of its own, vectors in them would be refused by name
        regular, projected = _split(model, target)
        groups: list[Group] = [{"params": regular, "rank": None}] if regular else []
        params: Any = [*groups, {"params": projected}]
    else:
        params = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return optimizer, {"params": params, **options}
