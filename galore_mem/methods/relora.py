"""ReLoRA: LoRA whose factors are merged into the weights, and started again, every few thousand steps.

Lialin, Shivagunde, Muckatira, Rumshisky: ReLoRA: High-Rank Training Through Low-Rank Updates,
arXiv:2307.05695. Weights and states as LoRA's; embeddings, norms and head are trained in full. The refresh
is the merge: `weight += B·A`, one matrix at a time, after which the factors' moments are set to zero in place.

galore-mem: adapters as in peft (float32 beside a 16-bit base); the product is cast to the base's format.
relora (Guitaricet/relora 176f376, peft_pretraining/relora.py): the whole model, adapters included, in the
weights' format; the product is scaled into a second tensor.
"""

from __future__ import annotations

from dataclasses import replace

from galore_mem.dtypes import FLOAT32
from galore_mem.memory.tape import Tensor
from galore_mem.methods import adamw
from galore_mem.methods.base import (
    RANK, Citation, Hyperparameter, Implementation, Job, Method, Slot, Slots, Stored, dense,
)  # fmt: skip
from galore_mem.methods.lora import adapters, frozen, store_paper
from galore_mem.spec.model import ParamSpec

RESET = Hyperparameter("update_proj_gap", 1000, "steps between two merges of the factors into the weights")


def store(row: ParamSpec, projected: bool, job: Job) -> tuple[Stored, ...]:
    """A frozen base with float32 adapters; what is not projected is trained."""
    if not projected or len(row.shape) != 2:
        return dense(row, projected, job)
    return frozen(row, job), *adapters(row, job.rank, FLOAT32)


def store_reference(row: ParamSpec, projected: bool, job: Job) -> tuple[Stored, ...]:
    """The same, in the weights' format."""
    if not projected or len(row.shape) != 2:
        return dense(row, projected, job)
    return frozen(row, job), *adapters(row, job.rank, job.recipe.weights)


def merged(row: ParamSpec, projected: bool, job: Job) -> tuple[Stored, ...]:
    """m·n frozen with m·r + n·r trained; what is not projected is trained."""
    if not projected or len(row.shape) != 2:
        return dense(row, projected, job)
    return store_paper(row, projected, job)
