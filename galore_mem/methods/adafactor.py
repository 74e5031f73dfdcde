"""Adafactor: the second moment of a matrix as the product of its row and column means.

Shazeer, Stern: Adafactor: Adaptive Learning Rates with Sublinear Memory Cost, arXiv:1804.04235. A
matrix keeps m + n values, a vector all of its own.

transformers 5.23 (optimization.py:Adafactor; the Trainer's `optim="adafactor"`): states always float32;
the step works on float32 copies of a half-precision gradient and parameter. `RMS` is a tensor from the
first step on, `step` a Python int. torch 2.13 (torch/optim/_adafactor.py): states in the parameter's
format, a float32 `step` on the host; the loop is the default on every device (`foreach=None` is taken
as False, unlike in torch's other optimizers).
"""

from __future__ import annotations

from collections.abc import Iterator

from galore_mem.dtypes import FLOAT32
from galore_mem.errors import InputError
from galore_mem.memory.tape import Shape, Tensor
from galore_mem.methods.base import (
    Buffer,
    Citation,
    Hyperparameter,
    Implementation,
    Job,
    Method,
    Slot,
    Slots,
    Trained,
)  # fmt: skip
from galore_mem.methods.eager import as_float32, mean, norm


def _first_moment(job: Job) -> bool:
    return float(job.hyperparameters["beta1"]) != 0.0


def rows(shape: Shape) -> Shape:
    """What remains of a matrix (or a stack of them) when its columns are averaged: a value per row."""
    return shape[:-1]


def cols(shape: Shape) -> Shape:
    """A value per column."""
    return shape[:-2] + shape[-1:]


def factored(p: Trained) -> bool:
    return len(p.shape) >= 2


def second_moment(p: Trained) -> tuple[Buffer, ...]:
    """Row and column means of a matrix in float32; the whole second moment of a vector."""
    if factored(p):
        return (
            Buffer("exp_avg_sq_row", rows(p.shape), FLOAT32),
            Buffer("exp_avg_sq_col", cols(p.shape), FLOAT32),
        )
    return (Buffer("exp_avg_sq", p.shape, FLOAT32),)


def state_transformers(p: Trained, job: Job) -> tuple[Buffer, ...]:
    """Second moment, `RMS` and, when beta1 is set, a full `exp_avg`; all float32."""
    first = (Buffer("exp_avg", p.shape, FLOAT32),) if _first_moment(job) else ()
    return (*first, *second_moment(p), Buffer("RMS", (), FLOAT32))


def approx_sq_grad(slot: Slot, shape: Shape) -> Tensor:
    """_approx_sq_grad: `mul((row / row.mean(-1)).rsqrt_(), col.rsqrt())`, float32 and of full size."""
    r_factor = slot.new(rows(shape), FLOAT32, slot.new((*shape[:-2], 1), FLOAT32))
    c_factor = slot.new(cols(shape), FLOAT32)
    return slot.new(shape, FLOAT32, r_factor, c_factor)


def squared_plus_eps(slot: Slot, shape: Shape) -> Tensor:
    """`(t**2) + eps` in float32: the square is alive while the sum is made."""
    return slot.new(shape, FLOAT32, slot.new(shape, FLOAT32))


def step_transformers(slots: Slots, job: Job, refresh: bool) -> None:
    """Adafactor.step. Its names outlive the iteration: the previous parameter's copies and update are
    there until the next ones take their names."""
    grad: Tensor | None = None
    param: Tensor | None = None
    update: Tensor | None = None
    for slot in slots:
        shape = slot.param.shape
        grad = slot.grad
        grad = as_float32(slot, grad)
        param = slot.weight
        param = as_float32(slot, param)
        slot.keep(Buffer("RMS", (), FLOAT32))
        update = squared_plus_eps(slot, shape)
        if factored(slot.param):
            for over in (-1, -2):
                mean(slot, job, shape, FLOAT32, over)
            update = approx_sq_grad(slot, shape)
        else:
            update = slot.new(shape, FLOAT32)  # exp_avg_sq.rsqrt().mul_(grad)
        if _first_moment(job):
            update = slot.state["exp_avg"]
        slot.new(shape, FLOAT32)  # -update
    del grad, param, update


def state_torch(p: Trained, job: Job) -> tuple[Buffer, ...]:
    """`step`; `row_var`, `col_var` of a matrix, `variance` of a vector, in the parameter's format."""
    if _first_moment(job):
        raise InputError("torch.optim.Adafactor keeps no first moment: leave beta1 at 0, or use the transformers one")
    counter = Buffer("step", (), FLOAT32, host=job.on_host)
    if factored(p):
        row, col = _kept_dims(p.shape)
        return counter, Buffer("row_var", row, p.dtype), Buffer("col_var", col, p.dtype)
    return counter, Buffer("variance", p.shape, p.dtype)


def _kept_dims(shape: Shape) -> tuple[Shape, Shape]:
    return (*shape[:-1], 1), (*shape[:-2], 1, shape[-1])


def step_loop(slots: Slots, job: Job, refresh: bool) -> None:
    """_single_tensor_adafactor: `row_var @ col_var` becomes the update, under two names."""
    row_mean = col_mean = grad_squared = var_estimate = update = None
    for slot in slots:
        shape, dtype = slot.param.shape, slot.param.dtype
        if factored(slot.param):
            row, _ = _kept_dims(shape)
            row_mean = norm(slot, shape, dtype, -1, keep=True)
            col_mean = norm(slot, shape, dtype, -2, keep=True)
            var_estimate = slot.new(shape, dtype)
            mean(slot, job, row, dtype, -2, keep=True)
        else:
            grad_squared = slot.like()
            var_estimate = slot.like()
        update = var_estimate
    del row_mean, col_mean, grad_squared, var_estimate, update


def step_foreach(slots: Slots, job: Job, refresh: bool) -> None:
    """_multi_tensor_adafactor: matrices and vectors as two groups, in the order they are met; the first
    group's updates keep their name until the second's replace them."""
    updates: list[Tensor] = []
    for matrices in dict.fromkeys(factored(slot.param) for slot in slots):
        updates = _updates_of_matrices(slots, job) if matrices else _updates_of_vectors(slots)
    del updates


def group(slots: Slots, *, matrices: bool) -> Iterator[Slot]:
    """The matrices or the vectors among the parameters, each pass over them a stage of the program."""
    return (slot for slot in slots if factored(slot.param) is matrices)


def _updates_of_matrices(slots: Slots, job: Job) -> list[Tensor]:
    for over in (-1, -2):
        means = [
            norm(slot, slot.param.shape, slot.param.dtype, over, keep=True) for slot in group(slots, matrices=True)
        ]
        del means
    updates = [slot.like() for slot in group(slots, matrices=True)]
    averages = [
        mean(slot, job, _kept_dims(slot.param.shape)[0], slot.param.dtype, -2, keep=True)
        for slot in group(slots, matrices=True)
    ]
    del averages
    return updates


def _updates_of_vectors(slots: Slots) -> list[Tensor]:
    squared = [slot.like() for slot in group(slots, matrices=False)]
    del squared
    return [slot.like() for slot in group(slots, matrices=False)]


def state_paper(p: Trained, job: Job) -> tuple[Buffer, ...]:
    """m + n values for a matrix, n for a vector; no first moment unless beta1 is set. The paper's states
    are float32."""
    first = (Buffer("exp_avg", p.shape, FLOAT32),) if _first_moment(job) else ()
    return (*first, *second_moment(p))


EQUATIONS = {"other": "m + n at 4 bytes (+ m·n with beta1); vectors n"}
TRANSFORMERS = Implementation(
    name="transformers", version="transformers 5.23", source="transformers/optimization.py:Adafactor",
    state=state_transformers, step=step_transformers, equations=EQUATIONS,
    notes=("half-precision gradients and parameters are copied to float32 one parameter at a time",),
)  # fmt: skip
TORCH_LOOP = Implementation(
    name="torch-loop", version="torch 2.13", source="torch/optim/_adafactor.py:_single_tensor_adafactor",
    state=state_torch, step=step_loop, equations={"other": "m + n; vectors n"},
    not_counted=("scratch space of the CPU's bfloat16 matrix product (oneDNN; it depends on the processor)",),
)  # fmt: skip
TORCH_FOREACH = Implementation(
    name="torch-foreach", version="torch 2.13", source="torch/optim/_adafactor.py:_multi_tensor_adafactor",
    one_by_one=False,
    state=state_torch, step=step_foreach, equations=TORCH_LOOP.equations,
    notes=("foreach makes one update the size of each trained parameter at once",),
    not_counted=TORCH_LOOP.not_counted,
)  # fmt: skip

METHOD = Method(
    name="adafactor",
    title="Adafactor",
    citation=Citation(
        "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", "Shazeer, Stern", "arXiv:1804.04235"
    ),
    paper=Implementation(
        "paper", "arXiv:1804.04235", "section 3: row and column means, m + n", state_paper, equations=EQUATIONS
    ),
    implementations=(TRANSFORMERS, TORCH_LOOP, TORCH_FOREACH),
    hyperparameters=(
        Hyperparameter("beta1", 0.0, "decay of the first moment; 0 (None in the code) keeps none"),
    ),
)  # fmt: skip
