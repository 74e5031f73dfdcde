"""AdamW with 4-bit quantized moments.

Li, Chen, Zhu: Memory Efficient Optimizers with 4-bit States, arXiv:2309.01507. torchao packs two
codes into a byte, flattened, with one float32 scale per 128 values and a table of 16 entries for each
moment of each parameter (`torchao.py`).
"""

from __future__ import annotations

from galore_mem.dtypes import INT4, UINT8
from galore_mem.methods import torchao
from galore_mem.methods.base import Buffer, Citation, Implementation, Job, Method, Trained


def state(p: Trained, job: Job) -> tuple[Buffer, ...]:
    """`step`; for each moment N/2 bytes of codes, N/128 scales and a table of 16 entries."""
    return torchao.low_bit(p, job, UINT8, per_code=2, block=128, qmap=16)


def state_paper(p: Trained, job: Job) -> tuple[Buffer, ...]:
    """Two moments at half a byte per element."""
    return Buffer("exp_avg", p.shape, INT4), Buffer("exp_avg_sq", p.shape, INT4)


METHOD = Method(
    name="adamw-4bit",
    title="4-bit AdamW",
    citation=Citation("Memory Efficient Optimizers with 4-bit States", "Li, Chen, Zhu", "arXiv:2309.01507"),
    paper=Implementation(
        "paper", "arXiv:2309.01507", "two 4-bit states, mn bytes; scales neglected", state_paper,
        equations={"other": "2·m·n at 1/2 byte"},
    ),
    implementations=(
        Implementation(
            name="torchao", version=torchao.VERSION, source="torchao/optim/adam.py:AdamW4bit, subclass_4bit.py",
            state=state, shared=torchao.learning_rate, one_each=True,
            equations={
                "other": "2·m·n at 1/2 byte + 2·(m·n/128 + 16) at 4 bytes; unquantized unless 128 divides m·n >= 4096"
            },
            not_counted=(torchao.COMPILED,),
        ),
    ),
)  # fmt: skip
