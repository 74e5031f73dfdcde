"""Linear layers with INT8 weights (`int8.py`).

The float matrix exists only while a product needs it: in the forward pass, and in the backward pass for the gradient of
the input. What autograd keeps is the input and the codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from galore_mem.errors import InputError
from galore_mem.optim.groups import parameter_groups
from galore_mem.optim.int8 import Int8Weight

SCALES, ZEROS = "weight_scales", "weight_zeros"  # beside `weight` in a state_dict


class Product(torch.autograd.Function):
    """`rows @ weight.T + bias`, or `rows @ weight + bias` where the weight is stored in x out."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Int8Weight, bias: Tensor | None, transposed: bool, dtype: torch.dtype
    ) -> Tensor:
        for_rows, for_weight = ctx.needs_input_grad[:2]
        ctx.transposed, ctx.dtype = transposed, dtype
        ctx.save_for_backward(rows if for_weight else None, *(weight.stored if for_rows else ()))
        matrix = weight.dequantized(dtype)
        if not transposed:
            matrix = matrix.T
        return rows @ matrix if bias is None else torch.addmm(bias, rows, matrix)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, *inner = ctx.saved_tensors
        for_rows = for_weight = for_bias = None
        if inner:
            matrix = Int8Weight(*inner).dequantized(ctx.dtype)
            for_rows = grad @ (matrix.T if ctx.transposed else matrix)
            del matrix
        if rows is not None:
            for_weight = rows.T @ grad if ctx.transposed else grad.T @ rows
        if ctx.needs_input_grad[2]:
            for_bias = grad.sum(0)
        return for_rows, for_weight, for_bias, None, None


class Int8Layer(nn.Module):
    """What both layers below share. A `state_dict` has plain tensors: `weight` (the codes), `weight_scales` and
    `weight_zeros`; one with a float `weight` loads too, rounded to the nearest codes."""

    transposed = False

    @property
    def int8(self) -> Int8Weight:
        """The weight."""
        weight = self.weight
        assert isinstance(weight, Int8Weight)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        weight = self.int8
        dtype = weight.dtype
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x = x.to(dtype)
        rows = x.reshape(-1, x.shape[-1])
        out: Tensor = Product.apply(rows, weight, self.bias, self.transposed, dtype)  # type: ignore[no-untyped-call]  # torch has no types for it
        return out.view(*x.shape[:-1], out.shape[-1])

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """`.to(...)` and the like: the weight remains the same parameter wherever an ordinary one would. (For a tensor
        of its own class torch would take another, without the hooks of a layer-wise update.)"""
        weight: Any = self.int8
        with torch.no_grad():
            moved = fn(weight.detach())
            grad = None if weight.grad is None else fn(weight.grad)
        if not isinstance(moved, Int8Weight):
            raise InputError("this conversion loses INT8 weights; call dequantize_linears(model) first")
        del self._parameters["weight"]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch has no types for it
        weight.grad = None
        if torch._has_compatible_shallow_copy_type(weight, moved):
            weight.become_(moved)
        else:  # to the meta device
            weight = nn.Parameter(moved, requires_grad=weight.requires_grad)
        weight.grad = grad
        self._parameters = {"weight": weight, **self._parameters}  # its place in `parameters()`
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, t in zip(("weight", SCALES, ZEROS), self.int8.stored, strict=True):
            destination[prefix + name] = t

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Puts the three tensors together again, for torch's own loading."""
        name = prefix + "weight"
        grid = {prefix + key: state_dict.pop(prefix + key, None) for key in (SCALES, ZEROS)}
        if name in state_dict and not state_dict[name].is_floating_point():
            missing = [key for key, t in grid.items() if t is None]
            missing_keys += missing
            try:
                given = self.int8 if missing else Int8Weight(state_dict[name], *grid.values())
            except InputError as error:
                error_msgs.append(f"{name}: {error}")
                given = self.int8
            state_dict[name] = given
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


class Int8Linear(Int8Layer, nn.Linear):
    """`nn.Linear` whose weight is INT8. Makes a float one first, as `nn.Linear` does, and rounds it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _become(self, Int8Linear, Int8Weight.of(self.weight))


class Int8Conv1D(Int8Layer):
    """transformers' Conv1D (GPT-2's linear layer, weight in x out) with an INT8 weight. `quantize_linears` makes it."""

    transposed = True


def _become(layer: nn.Module, kind: type[nn.Module], weight: Tensor) -> None:
    """The same object with another weight, and the class that goes with it."""
    trained = next(p.requires_grad for name, p in layer.named_parameters() if name == "weight")
    layer.register_parameter("weight", nn.Parameter(weight, requires_grad=trained))
    layer.__class__ = kind


def quantize_linears(model: nn.Module, target: Sequence[str] | None = None) -> nn.Module:
    """Turns the linear layers that `parameter_groups(model, target=target)` projects into INT8 ones, in place: each
    remains the same object, with its hooks. Returns the model.

    Call it before the optimizer is made. A saved INT8 model loads into an INT8 model, so that a run resumes from it
    (with the Trainer too); `from_pretrained` knows nothing of codes: save what `dequantize_linears` returns for that.

    Raises `InputError`, before anything has changed, where a target names no linear layer, where a layer is of another
    class than `nn.Linear` and transformers' `Conv1D`, and where its weight belongs to another module too.
    """
    everywhere = [p for _, p in model.named_parameters(remove_duplicate=False)]
    chosen: list[tuple[nn.Module, Tensor]] = []
    for name, p in parameter_groups(model, target=target)[-1]["params"]:
        layer = model.get_submodule(name.rpartition(".")[0])
        if isinstance(p, Int8Weight):
            continue
        if type(layer) is not nn.Linear and type(layer).__name__ != "Conv1D":
            raise InputError(f"{name} is in a {type(layer).__name__}; INT8 weights are for nn.Linear and Conv1D")
        if sum(p is other for other in everywhere) > 1:
            raise InputError(f"{name} is shared by two modules; leave it out of the target, or untie it")
        chosen.append((layer, p))
    for layer, p in chosen:
        _become(layer, Int8Linear if isinstance(layer, nn.Linear) else Int8Conv1D, Int8Weight.of(p))
    return model


def dequantize_linears(model: nn.Module) -> nn.Module:
    """Turns the INT8 layers of a model back into float ones, in place, with the values that they have. Returns it."""
    for layer in model.modules():
        if isinstance(layer, Int8Linear):
            _become(layer, nn.Linear, layer.int8.dequantized())
        elif isinstance(layer, Int8Conv1D):
            _become(layer, import_module("transformers.pytorch_utils").Conv1D, layer.int8.dequantized())
    return model
