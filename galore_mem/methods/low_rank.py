"""Low-Rank: each projected weight is the product of two trained factors, W = B·A.

The baseline of GaLore (arXiv:2403.03507, table 2) and GaLore-mini (section 4); Kamalakara et al.: Exploring Low
Rank Training of Deep Neural Networks, arXiv:2209.13569. Weights mr + nr, states 2(mr + nr). The factors are
`weight_a` (r x in) and `weight_b` (out x r), in the weights' format (`galore_mem.optim.factorize`); the optimizer is
torch.optim.AdamW.
"""

from __future__ import annotations

from dataclasses import replace

from galore_mem.memory.tape import Shape
from galore_mem.methods import adamw
from galore_mem.methods.base import RANK, Citation, Implementation, Job, Method, Stored, dense
from galore_mem.spec.model import ParamSpec


def in_out(row: ParamSpec) -> tuple[int, int]:
    """Inputs and outputs of a linear layer (GPT-2's Conv1D stores its matrix as in x out)."""
    first, second = row.shape
    return (first, second) if row.module == "conv1d" else (second, first)


def factors(row: ParamSpec, r: int) -> tuple[Shape, Shape]:
    """A (r x in) and B (out x r)."""
    inputs, outputs = in_out(row)
    return (r, inputs), (outputs, r)


def store(row: ParamSpec, projected: bool, job: Job) -> tuple[Stored, ...]:
    """A and B in place of a projected weight."""
    if not projected or len(row.shape) != 2:
        return dense(row, projected, job)
    a, b = factors(row, min(job.rank, *row.shape))
    given = job.recipe.weights
    return Stored("_a", a, given, given), Stored("_b", b, given, given)


EQUATIONS = {"projected": "2·(m·r + n·r), weights m·r + n·r", "other": "2·m·n"}


def trained_by(code: Implementation) -> Implementation:
    return replace(code, store=store, linear="low-rank", equations=EQUATIONS)


METHOD = Method(
    name="low-rank",
    title="Low-Rank (W = BA)",
    citation=Citation(
        "Exploring Low Rank Training of Deep Neural Networks",
        "Kamalakara, Locatelli, Venkitesh, Ba, Gal, Gomez", "arXiv:2209.13569",
    ),
    paper=Implementation(
        "paper", "arXiv:2403.03507", "table 2: weights mr + nr, states 2mr + 2nr", adamw.moments,
        store=store, linear="low-rank", equations=EQUATIONS,
    ),
    implementations=tuple(trained_by(code) for code in (adamw.FOREACH, adamw.FUSED, adamw.LOOP)),
    hyperparameters=(RANK,),
)  # fmt: skip
