"""Adam-mini: Adam with one second moment per block of the Hessian's partition.

Zhang, Chen, Li, Ding, Wu, Kingma, Ye, Luo, Sun: Adam-mini: Use Fewer Learning Rates To Gain More,
arXiv:2406.16793, algorithms 1 to 3. For each block b of a parameter:
M = β1·M + (1 - β1)·G;  v_b = β2·v_b + (1 - β2)·mean(G_b∘G_b)
W_b = W_b - η · M_b/(1 - β1^t) / (sqrt(v_b/(1 - β2^t)) + ε)

The blocks are those of `galore_mem.partition`, which follow adam-mini 1.1.1; unlike it, a head is `head_dim` rows
(also where that is not hidden_size / num_attention_heads), and fused projections are taken apart. The second moment
is float32, the package's in the parameter's format.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from galore_mem.errors import InputError
from galore_mem.methods import adam_mini
from galore_mem.methods.base import Buffer
from galore_mem.optim.adamw import FLOAT16_LEAST, corrections, decay
from galore_mem.optim.base import Found, Group, LayerWise, ParameterWise, State, members
from galore_mem.optim.blocks import as_rows, mean_squares, per_row
from galore_mem.partition import Partition, partition


class Partitioned(ParameterWise):
    """Adds each parameter's partition to its group, as plain tuples in `group["partition"]`.

    They come from the group, from the mapping of names that the optimizer was given, or from the names alone, which
    is enough where no query or key is among them (the number of rows in a head is not in a name).
    """

    _partitions: Mapping[str, Partition] | None = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        # plain tuples: `torch.load(weights_only=True)` takes no class of ours
        group["partition"] = [tuple(self._partition(at)) for at in members(group)]

    def _check(self, at: Found) -> None:
        super()._check(at)
        if at.p.dim() > 2 and not at.p.is_contiguous():
            raise InputError(f"{at.name} has more than two dimensions and is not contiguous; its rows cannot be viewed")
        given = at.group.get("partition")
        if given is not None and len(given) != len(at.group["params"]):
            raise InputError(f"partition has {len(given)} entries for {len(at.group['params'])} parameters")
        part = self._partition(at)
        try:
            part.check(tuple(at.p.shape))
        except InputError as error:
            raise InputError(f"{at.name}: {error}") from None

    def _partition_of(self, at: Found) -> Partition:
        if "param_names" not in at.group:
            raise InputError(
                f"{type(self).__name__} decides by names which rows share a second moment; give it "
                "model.named_parameters(), or groups from galore_mem.optim.parameter_groups(model)"
            )
        given = {} if self._partitions is None else self._partitions
        if not isinstance(given, Mapping):
            raise InputError(f"partition must map names to Partition, got {type(given).__name__}")
        if at.name in given:
            return given[at.name]
        try:
            return partition(at.name, tuple(at.p.shape), None)
        except InputError:
            other = f" (the one given has no such name, but {next(iter(given))!r})" if given else ""
            raise InputError(
                f"{at.name}: which of its rows form a head is not known; "
                f"pass partition=galore_mem.optim.partition_of(model){other}"
            ) from None

    def _partition(self, at: Found) -> Partition:
        given = at.group.get("partition")
        return self._partition_of(at) if given is None else Partition(*given[at.i])


def second_moment(grad: Tensor, state: State, group: Group, part: Partition) -> Tensor:
    """`exp_avg_sq` with this step's mean squares in it."""
    squares = mean_squares(grad, part)
    if "exp_avg_sq" not in state:
        state["exp_avg_sq"] = torch.zeros_like(squares)
    average: Tensor = state["exp_avg_sq"]
    return average.lerp_(squares, 1 - group["betas"][1])


def divisor(state: State, part: Partition, dtype: torch.dtype, eps: float) -> Tensor:
    """`sqrt(exp_avg_sq) + ε` per row, in the gradient's format; infinite where no row has had a gradient, so that what
    is divided does not move it."""
    average: Tensor = state["exp_avg_sq"]
    values = average.sqrt().add_(eps)
    if dtype is torch.float16:
        values.clamp_(min=FLOAT16_LEAST)
    values.masked_fill_(average == 0, torch.inf)
    return per_row(values, part).to(dtype)


def adam_mini_(p: Tensor, grad: Tensor, state: State, group: Group, part: Partition) -> None:
    """Adam-mini on one parameter; its temporaries are values per row."""
    if "exp_avg" not in state:
        state["exp_avg"] = torch.zeros_like(p)
    state["exp_avg"].lerp_(grad, 1 - group["betas"][0])
    second_moment(grad, state, group, part)
    factor, eps = corrections(state, group, torch.float32)
    decay(p, group)
    rows = as_rows(p)
    rows.addcdiv_(as_rows(state["exp_avg"]), divisor(state, part, p.dtype, eps), value=-float(group["lr"]) * factor)


class AdamMini(Partitioned):
    """Adam with one learning rate per head of query and key, per output row elsewhere, per value of a bias.

    `params` must have names: `model.named_parameters()`, or groups of them. `partition` maps names to
    `galore_mem.partition.Partition`; `galore_mem.optim.partition_of(model)` finds it from the model's config. A name
    that is not in it is partitioned by the name alone.

    State of an m x n matrix: `exp_avg` m·n in the parameter's format, `exp_avg_sq` one float32 per block. A step needs
    values per row only. Raises `InputError` as the other optimizers, and where a partition does not fit a parameter.
    """

    METHOD = adam_mini.METHOD

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        partition: Mapping[str, Partition] | None = None,
        layerwise: LayerWise | None = None,
        error_if_nonfinite: bool = True,
    ) -> None:
        self._partitions = partition
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults, layerwise=layerwise, error_if_nonfinite=error_if_nonfinite)

    def _update(self, at: Found, grad: Tensor | None, state: State) -> None:
        assert grad is not None
        adam_mini_(at.p, grad, state, at.group, self._partition(at))

    def _buffers(self, at: Found) -> tuple[Buffer, ...]:
        return adam_mini.buffers(self._trained(at), self._partition(at))
