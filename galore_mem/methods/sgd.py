"""SGD with momentum in torch.optim: one buffer of the parameter's shape, or none.

torch/optim/sgd.py (2.13) has three ways to run the step: `foreach` (the default for CUDA tensors), the
loop (the default on the CPU) and `fused`. There is no step counter. The first step clones the gradient
into `momentum_buffer` where later steps update it in place, so it needs no more than they do.
"""

from __future__ import annotations

from galore_mem.memory.tape import Tensor
from galore_mem.methods.base import (
    Buffer,
    Citation,
    Hyperparameter,
    Implementation,
    Job,
    Method,
    Slots,
    Trained,
)  # fmt: skip


def _set(job: Job, name: str) -> bool:
    return float(job.hyperparameters[name]) != 0.0


def state(p: Trained, job: Job) -> tuple[Buffer, ...]:
    """`momentum_buffer`, of the parameter's own shape and format; nothing when momentum is 0."""
    return (Buffer("momentum_buffer", p.shape, p.dtype),) if _set(job, "momentum") else ()


def step_foreach(slots: Slots, job: Job, refresh: bool) -> None:
    """_multi_tensor_sgd: with weight decay, `torch._foreach_add(grads, params)` is a second copy of all
    gradients until the momentum buffers take their place; Nesterov's look-ahead is added in place."""
    grads = [slot.like() for slot in slots] if _set(job, "weight_decay") else []
    del grads


def step_loop(slots: Slots, job: Job, refresh: bool) -> None:
    """_single_tensor_sgd: `grad = grad.add(param, alpha=weight_decay)`, then with Nesterov
    `grad = grad.add(buf, alpha=momentum)`, otherwise `grad = buf`."""
    grad: Tensor | None = None
    for slot in slots:
        grad = slot.grad
        if _set(job, "weight_decay"):
            grad = slot.like(grad)
        if _set(job, "momentum"):
            grad = slot.like(grad) if _set(job, "nesterov") else slot.state["momentum_buffer"]
    del grad


FOREACH = Implementation(
    name="torch-foreach", version="torch 2.13", source="torch/optim/sgd.py:_multi_tensor_sgd",
    one_by_one=False,
    state=state, step=step_foreach, equations={"other": "m·n"},
    notes=("with weight decay, foreach makes one more copy of all gradients during the step",),
)  # fmt: skip
FUSED = Implementation(
    name="torch-fused", version="torch 2.13", source="torch/optim/sgd.py:_fused_sgd",
    state=state, equations={"other": "m·n"},
)  # fmt: skip
LOOP = Implementation(
    name="torch-loop", version="torch 2.13", source="torch/optim/sgd.py:_single_tensor_sgd",
    state=state, step=step_loop, equations={"other": "m·n"},
)  # fmt: skip

METHOD = Method(
    name="sgd",
    title="SGD with momentum",
    citation=Citation(
        "On the importance of initialization and momentum in deep learning",
        "Sutskever, Martens, Dahl, Hinton", "ICML 2013",
    ),
    paper=Implementation("paper", "ICML 2013", "equation 1: one velocity, mn", state, equations={"other": "m·n"}),
    implementations=(FOREACH, FUSED, LOOP),
    hyperparameters=(
        Hyperparameter("momentum", 0.9, "momentum factor; 0 keeps no buffer"),
        Hyperparameter("weight_decay", 0.0, "coupled weight decay; above 0 it needs a copy of the gradient"),
        Hyperparameter("nesterov", 0, "1 for Nesterov momentum"),
    ),
)  # fmt: skip
