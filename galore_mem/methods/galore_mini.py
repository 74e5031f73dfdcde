"""GaLore-mini: a low-rank first moment, and one second moment per block of Adam-mini's partition.

Huang, Zhang, Zhang, Luo, Sun, Wang: GaLore-mini: Low Rank Gradient Learning with Fewer Learning Rates, NeurIPS 2024
workshop, table 1: states mr + nr, the second moments' values neglected (GaLore mr + 2nr, Adam-mini mn). Three
ways to combine the two, of which the third is called GaLore-mini:
1. second moment of the low-rank gradient, dividing the low-rank first moment;
2. second moment of the gradient, dividing the low-rank first moment;
3. second moment of the gradient, dividing the first moment once it is projected back.

galore-mem (no other code is public): approaches 2 and 3 keep one value per output row, per head for query and
key (`adam_mini.py`), approach 1 one per row of the low-rank gradient. Parameters outside the targets get
Adam-mini's treatment. Second moments are float32: they are few, and in bfloat16 an average with beta2 = 0.999
stands still. Rows are divided without a full-size tensor, on the factor that carries them, the first moment
(G·Pᵀ) or the projector (Pᵀ·G); `vector_norm` reads the gradient without a copy; `weight.addmm_` adds the product.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from galore_mem.dtypes import FLOAT32
from galore_mem.memory.tape import Shape, Tensor
from galore_mem.methods import adam_mini, projection
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
)
from galore_mem.methods.eager import as_float32
from galore_mem.methods.projection import PROJ_TYPE, added, applies, cast, factor, low_shape, lowered, sides
from galore_mem.methods.svd import SVD_WORKSPACE

Partition = Callable[[Trained, Job], Shape]


def low_rows(p: Trained, job: Job) -> Shape:
    """Approach 1: a value per row of the low-rank gradient."""
    return (low_shape(p, job)[0], 1)


def state(p: Trained, job: Job, partition: Partition = adam_mini.blocks) -> tuple[Buffer, ...]:
    """`projector`, a low-rank `exp_avg`, and `exp_avg_sq` of the partition in float32."""
    if not applies(p):
        return Buffer("exp_avg", p.shape, p.dtype), Buffer("exp_avg_sq", adam_mini.blocks(p, job), FLOAT32)
    return (
        *projection.copied(p, job, p.dtype),
        Buffer("exp_avg", low_shape(p, job), p.dtype),
        Buffer("exp_avg_sq", partition(p, job), FLOAT32),
    )


def mean_square(slot: Slot, blocks: Shape) -> None:
    """`vector_norm` over each block, squared in float32 (a bias: its own square)."""
    as_float32(slot, slot.new(blocks, slot.param.dtype))


def per_row(slot: Slot, values: Tensor, rows: Shape) -> Tensor:
    """Values of blocks repeated for each of their rows, in the gradient's format."""
    if values.shape != rows:
        values = slot.new(rows, FLOAT32, values)
    return cast(slot, values)


def divisor(slot: Slot, blocks: Shape, rows: Shape) -> Tensor:
    """`sqrt(exp_avg_sq) + eps`, a value per row."""
    return per_row(slot, slot.new(blocks, FLOAT32), rows)


def step_unprojected(slot: Slot, job: Job) -> None:
    """Adam-mini; `addcdiv_` divides block by block as it adds."""
    blocks = adam_mini.blocks(slot.param, job)
    mean_square(slot, blocks)
    divisor(slot, blocks, blocks)


def step(slots: Slots, job: Job, refresh: bool, approach: int) -> None:
    """GaLoreMini.step: nothing outlives a parameter."""
    for slot in slots:
        if not applies(slot.param):
            step_unprojected(slot, job)
            continue
        if refresh:
            projection.renew(slot, job)
        low = lowered(slot, job, slot.param.dtype)
        if approach == 1:
            _in_low_rank(slot, job, low)
        elif sides(slot.param, job) == ("right",):
            _on_moment(slot, job)
        elif approach == 2:
            _through_projector(slot, job, low)
        else:
            del low  # it has joined exp_avg
            _on_projector(slot, job)
            continue
        del low


def _in_low_rank(slot: Slot, job: Job, low: Tensor) -> None:
    """Approach 1: the low-rank gradient's tensor becomes `exp_avg / divisor`."""
    blocks = low_rows(slot.param, job)
    mean_square(slot, blocks)
    divisor(slot, blocks, blocks)
    added(slot, job, low)


def _on_moment(slot: Slot, job: Job) -> None:
    """Approaches 2 and 3 where the low-rank gradient has the weight's rows: as in approach 1."""
    blocks = adam_mini.blocks(slot.param, job)
    mean_square(slot, blocks)
    divisor(slot, blocks, (slot.param.shape[0], 1))


def _through_projector(slot: Slot, job: Job, low: Tensor) -> None:
    """Approach 2 where it does not: the rows' values are averaged by the squared projector, (P∘P)ᵀ·v."""
    p = slot.param
    blocks, rows = adam_mini.blocks(p, job), (p.shape[0], 1)
    mean_square(slot, blocks)
    values = per_row(slot, slot.state["exp_avg_sq"], rows)
    carried = slot.new((job.r(p), 1), p.dtype, slot.new(factor(p, "left", job.r(p)), p.dtype), values)
    del values, carried
    added(slot, job, low)


def _on_projector(slot: Slot, job: Job) -> None:
    """Approach 3 where it does not: `projector / divisor`, then its product with `exp_avg`."""
    p = slot.param
    blocks = adam_mini.blocks(p, job)
    mean_square(slot, blocks)
    scaled = slot.new(factor(p, "left", job.r(p)), p.dtype, divisor(slot, blocks, (p.shape[0], 1)))
    added(slot, job, scaled)


def state_paper(p: Trained, job: Job) -> tuple[Buffer, ...]:
    """m·r + n·r; m·n for what is not projected."""
    if not applies(p):
        return (Buffer("exp_avg", p.shape, p.dtype),)
    r = job.r(p)
    return Buffer("projector", (p.m, r), p.dtype), Buffer("exp_avg", (r, p.n), p.dtype)


def _method(approach: int) -> Method:
    partition = low_rows if approach == 1 else adam_mini.blocks
    values = "rows of the low-rank gradient" if approach == 1 else "rows (query, key: heads)"
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
        implementations=(
            Implementation(
                name="galore-mem", version="galore-mem", source="galore_mem/optim",
                state=partial(state, partition=partition), step=partial(step, approach=approach), refreshes=True,
                equations={
                    "projected": f"m·r + n·r + {values} at 4 bytes",
                    "other": "m·n + rows at 4 bytes (query, key: heads; bias: n; norm: 1)",
                },
                not_counted=(SVD_WORKSPACE,),
            ),
        ),
        hyperparameters=(RANK, UPDATE_PROJ_GAP, PROJ_TYPE),
        projects=True,
        variants=("galore-mini-1", "galore-mini-2") if approach == 3 else (),
    )  # fmt: skip


METHODS = tuple(_method(approach) for approach in (3, 1, 2))
METHOD = METHODS[0]
