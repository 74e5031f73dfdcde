"""AdamW in torch.optim: the baseline every other method is compared with.

torch/optim/adamw.py (2.13) hands over to `adam.py`, with three ways to run the step:
`foreach` (the default for CUDA tensors), the loop (the default on the CPU) and `fused`.
"""

from __future__ import annotations

from galore_mem.dtypes import FLOAT32
from galore_mem.methods.base import Buffer, Citation, Implementation, Job, Method, Slots, Trained


def moments(p: Trained, job: Job) -> tuple[Buffer, ...]:
    """Two moments of the parameter's own shape and format."""
    return Buffer("exp_avg", p.shape, p.dtype), Buffer("exp_avg_sq", p.shape, p.dtype)


def state(p: Trained, job: Job) -> tuple[Buffer, ...]:
    """`step` (a float32 scalar, on the host unless fused), `exp_avg`, `exp_avg_sq`."""
    return (Buffer("step", (), FLOAT32, host=job.on_host), *moments(p, job))


def state_fused(p: Trained, job: Job) -> tuple[Buffer, ...]:
    """As `state`, with the step counter beside the parameter: the fused kernel reads it there."""
    return (Buffer("step", (), FLOAT32), *moments(p, job))


def step_foreach(slots: Slots, job: Job, refresh: bool) -> None:
    """_multi_tensor_adam: `torch._foreach_sqrt(exp_avg_sqs)` is one more copy of everything at once."""
    exp_avg_sq_sqrt = [slot.like() for slot in slots]
    del exp_avg_sq_sqrt


def step_loop(slots: Slots, job: Job, refresh: bool) -> None:
    """_single_tensor_adam: `denom = (exp_avg_sq.sqrt() / bias_correction2_sqrt).add_(eps)`; the previous
    parameter's denom is alive until the assignment."""
    denom = None
    for slot in slots:
        denom = slot.like(slot.like())
    del denom


FOREACH = Implementation(
    name="torch-foreach", version="torch 2.13", source="torch/optim/adam.py:_multi_tensor_adam",
    one_by_one=False,
    state=state, step=step_foreach, equations={"other": "2·m·n"},
    notes=("foreach makes one more copy of all trained parameters during the step",),
)  # fmt: skip
FUSED = Implementation(
    name="torch-fused", version="torch 2.13", source="torch/optim/adam.py:_fused_adam",
    state=state_fused, equations={"other": "2·m·n"},
)  # fmt: skip
LOOP = Implementation(
    name="torch-loop", version="torch 2.13", source="torch/optim/adam.py:_single_tensor_adam",
    state=state, step=step_loop, equations={"other": "2·m·n"},
)  # fmt: skip

METHOD = Method(
    name="adamw",
    title="AdamW",
    citation=Citation("Decoupled Weight Decay Regularization", "Loshchilov, Hutter", "arXiv:1711.05101"),
    paper=Implementation(
        "paper", "arXiv:1711.05101", "GaLore-mini Table 1: 2mn", moments, equations={"other": "2·m·n"}
    ),
    implementations=(FOREACH, FUSED, LOOP),
)
