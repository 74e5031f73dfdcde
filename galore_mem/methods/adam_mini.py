"""Adam-mini: a full first moment, and one second moment per block of a partition.

Zhang, Chen, Li, Ding, Wu, Kingma, Ye, Luo, Sun: Adam-mini: Use Fewer Learning Rates To Gain More,
arXiv:2406.16793. Query and key are partitioned by head, other matrices (embedding and head included)
by output row, so that a matrix keeps mn values and one per head or row.

adam-mini 1.1.1 (adam_mini/adam_mini.py) decides by substrings of the lower-cased name, in this order:
`bias` (Adam), query and key, then embedding, head, value, MLP and attention output; what is left gets
a single value. Its heads are blocks of hidden_size^2 / num_attention_heads elements, so models with
another head_dim are refused or grouped wrongly, and a vector under a row-wise name fails. Ours takes a
head to be `head_dim` rows, which holds with grouped queries and any head_dim. pytorch_optimizer 4.1.0
(optimizer/adam_mini.py) has the rules of Adam-mini before 1.1: float32 states, Adam for embedding and
head, one value per MLP matrix.
"""

from __future__ import annotations

from math import prod

from galore_mem.errors import InputError
from galore_mem.memory.tape import Shape
from galore_mem.methods import adam_mini_peers as peers
from galore_mem.methods.base import Buffer, Citation, Implementation, Job, Method, Slots, Trained

QUERY_KEY = frozenset(("q_proj", "k_proj", "wq", "wk", "query", "key"))


def blocks(p: Trained, job: Job) -> Shape:
    """Shape of our second moment: () for a norm's weight, that of a bias itself, (heads, 1) for query and
    key, one per row (all dimensions but the last) elsewhere."""
    if p.name.rpartition(".")[2] == "bias":
        return p.shape
    if len(p.shape) < 2:
        return ()
    if QUERY_KEY.isdisjoint(p.name.split(".")):
        return (*p.shape[:-1], 1)
    if job.heads is None:
        raise InputError(
            f"adam-mini partitions {p.name} by head, and this model's head_dim is not known; give its config.json"
        )
    rows, head_dim = prod(p.shape[:-1]), job.heads.head_dim
    if rows % head_dim:
        raise InputError(f"adam-mini: {p.name} has {rows} rows, not a multiple of the model's head_dim {head_dim}")
    return (rows // head_dim, 1)


def state(p: Trained, job: Job) -> tuple[Buffer, ...]:
    """`exp_avg` of the parameter's shape, `exp_avg_sq` of `blocks`; both in the parameter's format. The
    step is a Python int."""
    return Buffer("exp_avg", p.shape, p.dtype), Buffer("exp_avg_sq", blocks(p, job), p.dtype)


def step(slots: Slots, job: Job, refresh: bool) -> None:
    """AdamMini.step: per block the mean square, then `exp_avg / denom` in the one full-size buffer, added
    to the weight in place."""
    for slot in slots:
        shape = blocks(slot.param, job)
        mean_square = slot.new(shape, slot.param.dtype)
        del mean_square
        denom = slot.new(shape, slot.param.dtype)
        update = slot.like(denom)
        del denom, update


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
            state=state, step=step, equations={"other": "m·n + rows (query, key: heads; bias: 2·n; norm: n + 1)"},
        ),
        peers.OFFICIAL,
        peers.PYTORCH_OPTIMIZER,
    ),
)  # fmt: skip
