"""The update in the backward pass: its options, and the hook of one parameter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakMethod

import torch
from torch import Tensor

from galore_mem.errors import InputError
from galore_mem.optim.options import COUNT, Range


@dataclass(frozen=True, slots=True)
class LayerWise:
    """The update in the backward pass: each parameter as soon as its gradient is complete, which is then freed.

    `gradient_accumulation_steps`: backward passes per update. What is projected is summed in the low-rank space
    (projection is linear), where the method and `clip_value` allow it; other gradients stay until they are complete,
    as does that of a parameter whose projector is about to be renewed. `clip_value` clamps each complete gradient to
    [-clip_value, clip_value], as `torch.nn.utils.clip_grad_value_` does.

    Call `optimizer.step()` after the last backward pass as usual: it updates parameters that had no gradient in some
    of them, and schedulers expect it. More backward passes than announced are an `InputError`. To throw away what has
    been summed so far, call the optimizer's `zero_grad()`; the model's does not reach the low-rank sums.

    Keep the optimizer: parameters do not, and without it nothing is updated.

    Save after `step()`. The sums of an accumulation that is not complete are in the optimizer's state, but not the
    gradients that stay whole: whoever saves in between keeps every `p.grad` too, and puts it back after loading.

    Cannot be combined with what needs all gradients at once, or changes them between backward pass and step: clipping
    by norm, a loss scaler (float16 autocast), more than one process, and gradient checkpointing of the reentrant kind
    where it runs a shared parameter's backward pass in two parts.
    """

    gradient_accumulation_steps: int = 1
    clip_value: float | None = None

    def __post_init__(self) -> None:
        COUNT.check("gradient_accumulation_steps", self.gradient_accumulation_steps)
        Range(optional=True).check("clip_value", self.clip_value)
        if self.clip_value == 0:
            raise InputError("clip_value must be above 0: no gradient would be left")


class Hook:
    """Calls the optimizer's method `run(p, group, i)` when a backward pass has added to the gradient of the parameter
    at this place. The optimizer is held weakly: parameters hold their hooks where Python's collector does not look, and
    neither would ever be freed."""

    def __init__(self, run: Callable[[Tensor, int, int], None], group: int, i: int) -> None:
        self.run, self.group, self.i = WeakMethod(run), group, i

    def __call__(self, p: Tensor) -> None:
        run = self.run()
        if run is not None:
            with torch.no_grad():
                run(p, self.group, self.i)

    def register(self, p: Tensor) -> Any:
        """Returns torch's handle, whose `remove()` takes the hook away."""
        return p.register_post_accumulate_grad_hook(self)


def has_hook(p: Tensor) -> bool:
    """Is the parameter updated in the backward pass by one of our optimizers?"""
    hooks = (getattr(p, "_post_accumulate_grad_hooks", None) or {}).values()
    return any(isinstance(hook, Hook) and hook.run() is not None for hook in hooks)


def distributed() -> bool:
    """Is this one of several processes?"""
    return (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    )
