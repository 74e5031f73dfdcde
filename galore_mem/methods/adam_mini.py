"""Adam-mini: a full first moment, and one second moment per block of a partition.

Zhang, Chen, Li, Ding, Wu, Kingma, Ye, Luo, Sun: Adam-mini: Use Fewer Learning Rates To Gain More,
arXiv:2406.16793. Query and key are partitioned by head, other matrices (embedding and head included)
by output row, so that a matrix keeps mn values and one per head or row.

adam-mini 1.1.1 (adam_mini/adam_mini.py) decides by substrings of the lower-cased name, in this order:
`bias` (Adam), query and key, then embedding, head, value, MLP and attention output; what is left gets
a single value. Its heads are blocks of hidden_size^2 / num_attention_heads elements, so models with
another head_dim are refused or grouped wrongly, and a vector under a row-wise name fails. Ours
(`galore_mem/partition.py`, `galore_mem/optim/adam_mini.py`) takes a head to be `head_dim` rows, which holds
with grouped queries and any head_dim, takes fused projections apart, and keeps second moments in float32:
they are few, and in bfloat16 an average with beta2 = 0.999 stands still. pytorch_optimizer 4.1.0
(optimizer/adam_mini.py) has the rules of Adam-mini before 1.1: float32 states, Adam for embedding and
head, one value per MLP matrix.
"""

from __future__ import annotations

from math import prod

from galore_mem.dtypes import BOOL, DType, at_least_float32
from galore_mem.memory.tape import Shape, Tensor
from galore_mem.methods import adam_mini_peers as peers
from galore_mem.methods.base import Buffer, Citation, Implementation, Job, Method, Slot, Slots, Trained, kept_whole
from galore_mem.methods.eager import norm
from galore_mem.partition import Partition, partition


def blocks(p: Trained, job: Job) -> Partition:
    """The rows of a parameter that share a second moment."""
    return partition(p.name, p.shape, job.heads, transposed=p.module == "conv1d")


def buffers(p: Trained, part: Partition) -> tuple[Buffer, ...]:
    """`exp_avg` of the parameter's shape and format, `exp_avg_sq` of the partition's in float32."""
    return (
        Buffer("exp_avg", p.shape, p.dtype),
        Buffer("exp_avg_sq", part.column, at_least_float32(p.dtype)),
    )


def state(p: Trained, job: Job) -> tuple[Buffer, ...]:
    """As `buffers`, by the parameter's name. The step is a Python int."""
    return buffers(p, blocks(p, job))


# -- pieces of step programs: values per row and per block ------------------------------------------


def mean_squares(slot: Slot, part: Partition, given: Shape | None = None) -> Tensor:
    """`vector_norm` over each row of the gradient (or of a matrix of the shape `given`), squared in float32; then the
    means of blocks."""
    p = slot.param
    along = prod(given or p.shape) // part.rows
    norms = norm(slot, (along, part.rows) if part.dim else (part.rows, along), p.dtype, 1 - part.dim, keep=True)
    rows = cast(slot, norms, at_least_float32(p.dtype))
    del norms
    return rows if part.one_each else joined(slot, part, rows, [count for count, _ in part.runs])


def divisor(slot: Slot, part: Partition) -> Tensor:
    """`sqrt(exp_avg_sq) + eps`, a value per row in the gradient's format."""
    values = slot.new((part.blocks,), at_least_float32(slot.param.dtype))
    slot.new((part.blocks,), BOOL)  # which blocks have had no gradient
    return cast(slot, per_row(slot, part, values), slot.param.dtype)


def per_row(slot: Slot, part: Partition, values: Tensor) -> Tensor:
    """Values of blocks, repeated for each of their rows."""
    return values if part.one_each else joined(slot, part, values, [count * size for count, size in part.runs])


def joined(slot: Slot, part: Partition, given: Tensor, lengths: list[int]) -> Tensor:
    """A piece for each run of blocks with more than a row, and then all of them one after the other."""
    pieces = [
        slot.new((part.repeat, n), given.dtype) for n, (_, size) in zip(lengths, part.runs, strict=True) if size > 1
    ]
    if len(lengths) == 1:
        return pieces.pop()
    return slot.new((part.repeat, sum(lengths)), given.dtype, given, pieces)


def cast(slot: Slot, tensor: Tensor, dtype: DType) -> Tensor:
    return tensor if tensor.dtype is dtype else slot.new(tensor.shape, dtype, tensor)


def step_one(slot: Slot, part: Partition) -> None:
    """adam_mini_: values per row; `addcdiv_` divides as it adds."""
    mean_squares(slot, part)
    divisor(slot, part)


def step(slots: Slots, job: Job, refresh: bool) -> None:
    """AdamMini.step: nothing outlives a parameter, nothing of its size is made."""
    for slot in slots:
        step_one(slot, blocks(slot.param, job))


def state_paper(p: Trained, job: Job) -> tuple[Buffer, ...]:
    """mn: the second moment's values are neglected."""
    return (Buffer("exp_avg", p.shape, p.dtype),)


METHOD = Method(
    name="adam-mini",
    title="Adam-mini",
    citation=Citation(
        "Adam-mini: Use Fewer Learning Rates To Gain More",
        "Zhang, Chen, Li, Ding, Wu, Kingma, Ye, Luo, Sun", "arXiv:2406.16793",
    ),
    paper=Implementation(
        "paper", "arXiv:2406.16793", "GaLore-mini Table 1: mn", state_paper, equations={"other": "m·n"}
    ),
    implementations=(
        Implementation(
            name="galore-mem", version="galore-mem", source="galore_mem/optim",
            state=state, step=step, compresses=kept_whole,
            equations={"other": "m·n + rows (query, key: heads; bias: 2·n; norm: n + 1)"},
        ),
        peers.OFFICIAL,
        peers.PYTORCH_OPTIMIZER,
    ),
)  # fmt: skip
