"""What a model is given and what it returns, whatever form its author chose: a batch in, a loss out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from galore_mem.errors import InputError

Loss = Callable[[Any, Any], Tensor]  # of the model's output and the batch
KNOWN = "a number, an object or dictionary with `loss`, or a tuple that begins with it"


class Output(NamedTuple):
    """What the training loop reads: the loss, and the model's own output, which it may keep."""

    loss: Tensor
    of_model: Any


def call(model: nn.Module, batch: Any) -> Any:
    """The model's output for a batch: a mapping is its keyword arguments, a list or tuple its arguments, anything else
    its only one."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, list | tuple) else model(batch)


def loss_of(output: Any) -> Tensor:
    """The loss in a model's output. Raises `InputError` where there is none."""
    found = output
    if isinstance(output, Mapping):
        found = output.get("loss")
    elif hasattr(output, "loss"):
        found = output.loss
    elif isinstance(output, list | tuple) and output:
        found = output[0]
    if not isinstance(found, Tensor) or found.numel() != 1 or not found.is_floating_point():
        raise InputError(
            f"the model returned {_shown(output)}, where no loss is found; it must return {KNOWN} (a model of "
            f"transformers does when the batch has labels), or give a function of output and batch after the batch"
        )
    if not found.requires_grad:
        raise InputError("the loss depends on no parameter that is trained: backward would have nothing to do")
    return found


def _shown(output: Any) -> str:
    if isinstance(output, Tensor):
        return f"a tensor of shape {tuple(output.shape)}"
    if isinstance(output, Mapping):
        return f"{type(output).__name__} with {', '.join(map(str, output)) or 'nothing'}"
    return type(output).__name__


class Called:
    """A model as the training loop calls it."""

    def __init__(self, model: nn.Module, loss: Loss | None = None) -> None:
        self._model, self._loss = model, loss

    def __call__(self, batch: Any) -> Output:
        output = call(self._model, batch)
        return Output(loss_of(output) if self._loss is None else loss_of(self._loss(output, batch)), output)
