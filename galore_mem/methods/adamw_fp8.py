"""AdamW with both moments in 8-bit floating point.

Fishman, Chmiel, Banner, Soudry: Scaling FP8 training to trillion-token LLMs, arXiv:2409.12517. torchao
stores both moments as float8_e4m3fn with one float32 scale per 256 values and no table (`torchao.py`).
"""

from __future__ import annotations

from galore_mem.dtypes import FLOAT8
from galore_mem.methods import torchao
from galore_mem.methods.base import Buffer, Citation, Implementation, Job, Method, Trained


def state(p: Trained, job: Job) -> tuple[Buffer, ...]:
    """`step`; for each moment N bytes of float8 codes and N/256 scales."""
    return torchao.low_bit(p, job, FLOAT8, per_code=1, block=256, qmap=0)


def state_paper(p: Trained, job: Job) -> tuple[Buffer, ...]:
    """Two moments at one byte per element."""
    return Buffer("exp_avg", p.shape, FLOAT8), Buffer("exp_avg_sq", p.shape, FLOAT8)


METHOD = Method(
    name="adamw-fp8",
    title="FP8 AdamW",
    citation=Citation(
        "Scaling FP8 training to trillion-token LLMs", "Fishman, Chmiel, Banner, Soudry", "arXiv:2409.12517"
    ),
    paper=Implementation(
        "paper", "arXiv:2409.12517", "two FP8 moments, 2mn bytes; scales neglected", state_paper,
        equations={"other": "2·m·n at 1 byte"},
    ),
    implementations=(
        Implementation(
            name="torchao", version=torchao.VERSION, source="torchao/optim/adam.py:AdamWFp8, subclass_fp8.py",
            state=state, shared=torchao.learning_rate, one_each=True,
            equations={
                "other": "2·m·n at 1 byte + 2·m·n/256 at 4 bytes; unquantized unless 256 divides m·n >= 4096"
            },
            not_counted=(torchao.COMPILED,),
        ),
    ),
)  # fmt: skip
