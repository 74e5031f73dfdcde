"""Flora: momentum in a random subspace that is made again from a seed, on top of Adafactor.

Hao, Cao, Mou: Flora: Low-Rank Adapters Are Secretly Gradient Compressors, ICML 2024, arXiv:2402.03293. The
momentum of a matrix takes n·r (algorithm 2); Adafactor's second moment n + m. The projections are not stored.

galore-mem: momentum in the gradient's format, compressed where the rank is below m, second moments in float32. The
step makes the projection twice, as it is and with the second moment's factors in it, and the low-rank update; the
product of momentum and projection goes into the weight (`addmm_`). In float16 all but state and weight is float32.

flora-opt (BorealisAI/flora-opt f329bbc, flora_opt/optimizers/torch/flora.py): everything in float32, half
precision through copies; `RMS`, a float32 scalar. A momentum is projected where the rank is at most m and
n at most 4·m, elsewhere it is full; without `beta1` there is none. Nothing outlives a parameter. The refresh
(every `kappa` steps) carries the momentum over to the next projection.
"""

from __future__ import annotations

from galore_mem.dtypes import FLOAT32, INT64, at_least_float32
from galore_mem.memory.tape import Shape, Tensor
from galore_mem.methods import adafactor
from galore_mem.methods.adafactor import approx_sq_grad, squared_plus_eps
from galore_mem.methods.base import (
    RANK,
    Buffer,
    Citation,
    Hyperparameter,
    Implementation,
    Job,
    Method,
    Slot,
    Slots,
    Trained,
    kept_whole,
)
from galore_mem.methods.eager import as_float32, mean
from galore_mem.methods.galore_adafactor import factors, in_range, means, normalized, own, widened
from galore_mem.methods.projection import applies, cast, low_shape

BETA1 = Hyperparameter("beta1", 0.9, "decay of the momentum; 0 (None in the code) keeps none")
KAPPA = Hyperparameter("kappa", 1000, "steps between two projections of Flora's momentum", least=1)
MAX_RATIO = 4


def momentum(job: Job) -> bool:
    return float(job.hyperparameters["beta1"]) > 0.0


def compressed(p: Trained, job: Job) -> bool:
    """Is the momentum of this parameter projected? (At the full rank nothing would be saved.)"""
    return momentum(job) and applies(p) and job.rank < p.m


def state(p: Trained, job: Job) -> tuple[Buffer, ...]:
    """`exp_avg` (low-rank where `compressed`), the second moment; seed and step are Python ints."""
    shape = low_shape(p, job) if compressed(p, job) else p.shape
    first = (Buffer("exp_avg", shape, p.dtype),) if momentum(job) else ()
    return *first, *means(p.shape, at_least_float32(p.dtype))


def step(slots: Slots, job: Job, refresh: bool) -> None:
    """Flora.step: what is not compressed is a copy of the gradient, which becomes the update in place."""
    for slot in slots:
        if compressed(slot.param, job):
            _step_compressed(slot, job, refresh)
            continue
        update = own(slot)
        normalized(slot, update)
        cast(slot, update)
        del update


def _step_compressed(slot: Slot, job: Job, refresh: bool) -> None:
    p = slot.param
    low, small = low_shape(p, job), (job.rank, p.m)
    grad: Tensor | None = slot.grad
    assert grad is not None
    grad = in_range(slot, grad)
    dtype = grad.dtype
    by_row, by_col = factors(slot, p.shape, dtype)
    if refresh:
        old = slot.new(small, dtype)
        new = slot.new(small, dtype)
        turn = slot.new((job.rank, job.rank), dtype)
        average = in_range(slot, slot.state["exp_avg"])
        moved = slot.new(low, dtype)
        del old, turn, average, moved
    else:
        new = slot.new(small, dtype)
    scaled = slot.new(small, dtype)
    update = slot.new(low, dtype, scaled)
    del scaled
    cast(slot, update)
    del update
    average = in_range(slot, slot.state["exp_avg"])
    grams = [widened(slot, slot.new((job.rank, job.rank), dtype)) for _ in range(2)]
    del average, grams
    cast(slot, new)
    del by_row, by_col, grad, new


def compressed_reference(p: Trained, job: Job) -> bool:
    """Is the momentum of this parameter projected?"""
    return momentum(job) and applies(p) and p.m >= job.rank and p.n <= MAX_RATIO * p.m


def low_shape_reference(p: Trained, job: Job) -> Shape:
    """r x cols of a wide matrix, rows x r of another."""
    return (job.rank, p.shape[1]) if p.shape[0] < p.shape[1] else (p.shape[0], job.rank)


def projector_shape(p: Trained, job: Job) -> Shape:
    return (job.rank, p.shape[0]) if p.shape[0] < p.shape[1] else (p.shape[1], job.rank)


def second_moment(p: Trained) -> tuple[Buffer, ...]:
    """Row and column means of a matrix; of other shapes the whole."""
    return adafactor.second_moment(p) if len(p.shape) == 2 else (Buffer("exp_avg_sq", p.shape, FLOAT32),)


def state_reference(p: Trained, job: Job) -> tuple[Buffer, ...]:
    """`exp_avg` (low-rank where `compressed_reference`), the second moment, `RMS`; seed and step are Python ints."""
    shape = low_shape_reference(p, job) if compressed_reference(p, job) else p.shape
    first = (Buffer("exp_avg", shape, FLOAT32),) if momentum(job) else ()
    return *first, *second_moment(p), Buffer("RMS", (), FLOAT32)


def step_reference(slots: Slots, job: Job, refresh: bool) -> None:
    """flora_step_, parameter by parameter; it takes the gradient from the parameter."""
    for slot in slots:
        p = slot.param
        grad, slot.grad = slot.grad, None
        grad = as_float32(slot, grad)
        param: Tensor | None = slot.weight
        param = as_float32(slot, param)
        slot.keep(Buffer("RMS", (), FLOAT32))
        update = squared_plus_eps(slot, p.shape)
        if len(p.shape) == 2:
            for over in (-1, -2):
                mean(slot, job, p.shape, FLOAT32, over)
            update = approx_sq_grad(slot, p.shape)
        else:
            update = slot.new(p.shape, FLOAT32)
        raw: Tensor | None = None
        if compressed_reference(p, job):
            raw = _compressed_momentum(slot, job, refresh)
        elif momentum(job):
            scaled = full(slot), full(slot)  # update * (1 - b1), exp_avg * b1
            update = full(slot)
            del scaled
        slot.new(p.shape, FLOAT32)  # -update
        del grad, param, update, raw


def full(slot: Slot, *alive: object) -> Tensor:
    return slot.new(slot.param.shape, FLOAT32, *alive)


def _compressed_momentum(slot: Slot, job: Job, refresh: bool) -> Tensor:
    """`raw_update`, which is kept; `update * (1 - b1) + up_proj(exp_avg) * b1`; at a refresh the momentum up
    and down again; then the update's own projection joins it."""
    low = low_shape_reference(slot.param, job)
    raw = full(slot)
    scaled = full(slot)
    raised = full(slot, _raised(slot, job))
    total = full(slot)
    del scaled, raised, total
    if refresh:
        moved = slot.new(low, FLOAT32, _raised(slot, job), _projector(slot, job))
        del moved
    decayed = slot.new(low, FLOAT32)
    added = slot.new(low, FLOAT32, _projector(slot, job))
    added = slot.new(low, FLOAT32, added)
    total = slot.new(low, FLOAT32)
    del decayed, added, total
    return raw


def _projector(slot: Slot, job: Job) -> Tensor:
    """`stable_randn(...) / sqrt(rank)`."""
    shape = projector_shape(slot.param, job)
    return slot.new(shape, FLOAT32, slot.new(shape, FLOAT32))


def _raised(slot: Slot, job: Job) -> Tensor:
    return full(slot, _projector(slot, job))


def state_paper(p: Trained, job: Job) -> tuple[Buffer, ...]:
    """n·r momentum with m + n of Adafactor's; a full momentum for what is not projected."""
    r = job.r(p) if applies(p) else 0
    shape = (r, p.n) if r else p.shape
    first = (Buffer("exp_avg", shape, p.dtype),) if momentum(job) else ()
    seed = (Buffer("seed", (), INT64),) if r else ()
    return *first, *(Buffer(b.name, b.shape, p.dtype) for b in second_moment(p)), *seed


METHOD = Method(
    name="flora",
    title="Flora",
    citation=Citation(
        "Flora: Low-Rank Adapters Are Secretly Gradient Compressors", "Hao, Cao, Mou", "arXiv:2402.03293"
    ),
    paper=Implementation(
        "paper", "arXiv:2402.03293", "algorithm 2 on Adafactor: nr + n + m and a seed", state_paper,
        equations={"projected": "n·r + n + m", "other": "m·n + n + m"},
    ),
    implementations=(
        Implementation(
            name="galore-mem", version="galore-mem", source="galore_mem/optim", state=state, step=step, refreshes=True,
            compresses=kept_whole,
            equations={
                "projected": "n·r, and n + m at 4 bytes (m·n in place of n·r where r is m)",
                "other": "m·n, and n + m at 4 bytes",
            },
            notes=("a step makes each random projection again from its seed: 2·m·r + n·r beside the state",),
        ),
        Implementation(
            name="flora-opt", version="flora-opt f329bbc", source="flora_opt/optimizers/torch/flora.py",
            state=state_reference, step=step_reference, refreshes=True,
            equations={
                "projected": "(n·r + n + m + 1) at 4 bytes (m·n in place of n·r where r > m or n > 4·m)",
                "other": "(m·n + n + m + 1) at 4 bytes",
            },
            notes=("without beta1, the package's default, Flora keeps no momentum and is Adafactor",),
        ),
    ),
    hyperparameters=(RANK, BETA1, KAPPA),
)  # fmt: skip
