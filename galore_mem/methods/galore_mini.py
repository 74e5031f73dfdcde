"""GaLore-mini: a low-rank first moment, and one second moment per block of Adam-mini's partition.

Huang, Zhang, Zhang, Luo, Sun, Wang: GaLore-mini: Low Rank Gradient Learning with Fewer Learning Rates, NeurIPS 2024
workshop, table 1: states mr + nr, the second moments' values neglected (GaLore mr + 2nr, Adam-mini mn). Three
ways to combine the two, of which the third is called GaLore-mini:
1. second moment of the low-rank gradient, dividing the low-rank first moment;
2. second moment of the gradient, dividing the low-rank first moment;
3. second moment of the gradient, dividing the first moment once it is projected back.

galore-mem (no other code is public): approaches 2 and 3 keep one value per output row, per head for query and
key (`galore_mem/partition.py`), approach 1 one per row of the low-rank gradient. Parameters outside the targets get
Adam-mini's treatment. Second moments are float32: they are few, and in bfloat16 an average with beta2 = 0.999
stands still. Rows are divided without a full-size tensor, on the factor that carries them, the first moment
or the projector; `vector_norm` reads the gradient without a copy; `weight.addmm_` adds the product.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from galore_mem.dtypes import at_least_float32
from galore_mem.methods import adam_mini, projection
from galore_mem.methods.adam_mini import divisor, mean_squares, per_row
from galore_mem.methods.base import (
    RANK,
    UPDATE_PROJ_GAP,
    Buffer,
    Citation,
    Implementation,
    Job,
    Method,
    Slot,
    Slots,
    Trained,
    kept_whole,
)
from galore_mem.methods.projection import PROJ_TYPE, added, applies, factor, low_shape, lowered, sides
from galore_mem.methods.randomized import randomized
from galore_mem.methods.svd import SVD_WORKSPACE
from galore_mem.partition import Partition, by_row


def partition(p: Trained, job: Job, approach: int) -> Partition:
    """The blocks that share a second moment: the parameter's, or each row of the low-rank gradient (approach 1)."""
    if approach == 1 and applies(p):
        return by_row(low_shape(p, job), transposed=p.module == "conv1d")
    return adam_mini.blocks(p, job)


def buffers(p: Trained, job: Job, part: Partition) -> tuple[Buffer, ...]:
    """`projector`, a low-rank `exp_avg`, and `exp_avg_sq` of the partition in float32."""
    if not applies(p):
        return adam_mini.buffers(p, part)
    return (
        *projection.copied(p, job, p.dtype),
        Buffer("exp_avg", low_shape(p, job), p.dtype),
        Buffer("exp_avg_sq", part.column, at_least_float32(p.dtype)),
    )


def state(p: Trained, job: Job, approach: int) -> tuple[Buffer, ...]:
    """As `buffers`, by the parameter's name."""
    return buffers(p, job, partition(p, job, approach))


def step(
    slots: Slots, job: Job, refresh: bool, approach: int, renew: Callable[[Slot, Job], None] = projection.renew
) -> None:
    """GaLoreMini.step: nothing outlives a parameter, nothing of its size is made."""
    for slot in slots:
        part = partition(slot.param, job, approach)
        if not applies(slot.param):
            adam_mini.step_one(slot, part)
            continue
        if refresh:
            renew(slot, job)
        low = lowered(slot, job, slot.param.dtype)
        side = "right" if part.dim else "left"  # of the projector that rows go through, if they are projected
        if approach == 1 or side not in sides(slot.param, job):
            mean_squares(slot, part, low.shape if approach == 1 else None)
            divisor(slot, part)
        elif approach == 2:
            mean_squares(slot, part)
            through(slot, job, part, side)
        else:
            del low  # it has joined exp_avg
            mean_squares(slot, part)
            low = slot.new(factor(slot.param, side, job.r(slot.param)), slot.param.dtype, divisor(slot, part))
        added(slot, job, low)
        del low


def through(slot: Slot, job: Job, part: Partition, side: str) -> None:
    """Approach 2 where rows are projected: their values are averaged by the squared projector, (P∘P)ᵀ·v."""
    p = slot.param
    values = adam_mini.cast(slot, per_row(slot, part, slot.state["exp_avg_sq"]), p.dtype)
    squared = slot.new(factor(p, side, job.r(p)), p.dtype)
    slot.new((job.r(p),), p.dtype, values, squared)


def state_paper(p: Trained, job: Job) -> tuple[Buffer, ...]:
    """m·r + n·r; m·n for what is not projected."""
    if not applies(p):
        return (Buffer("exp_avg", p.shape, p.dtype),)
    r = job.r(p)
    return Buffer("projector", (p.m, r), p.dtype), Buffer("exp_avg", (r, p.n), p.dtype)


def _ours(approach: int) -> Implementation:
    values = "rows of the low-rank gradient" if approach == 1 else "rows (query, key: heads)"
    return Implementation(
        name="galore-mem", version="galore-mem", source="galore_mem/optim",
        state=partial(state, approach=approach), step=partial(step, approach=approach), refreshes=True,
        compresses=projection.compressed if approach == 1 else kept_whole,  # a mean of squares is not linear
        equations={
            "projected": f"m·r + n·r + {values} at 4 bytes",
            "other": "m·n + rows at 4 bytes (query, key: heads; bias: n; norm: 1)",
        },
        not_counted=(SVD_WORKSPACE,),
    )  # fmt: skip


def _method(approach: int) -> Method:
    ours = _ours(approach)
    return Method(
        name="galore-mini" if approach == 3 else f"galore-mini-{approach}",
        title="GaLore-mini" if approach == 3 else f"GaLore-mini (approach {approach})",
        citation=Citation(
            "GaLore-mini: Low Rank Gradient Learning with Fewer Learning Rates",
            "Huang, Zhang, Zhang, Luo, Sun, Wang", "NeurIPS 2024 workshop",
        ),
        paper=Implementation(
            "paper", "NeurIPS 2024 workshop", "table 1: mr + nr, all second moments taken as eliminated", state_paper,
            equations={"projected": "m·r + n·r", "other": "m·n"},
        ),
        implementations=(ours, randomized(ours, partial(step, approach=approach))),
        hyperparameters=(RANK, UPDATE_PROJ_GAP, PROJ_TYPE),
    )  # fmt: skip


METHODS = tuple(_method(approach) for approach in (3, 1, 2))
METHOD = METHODS[0]
