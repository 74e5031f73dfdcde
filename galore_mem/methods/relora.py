"""ReLoRA: LoRA whose factors are merged into the weights, and started again, every few thousand steps.

Lialin, Shivagunde, Muckatira, Rumshisky: ReLoRA: High-Rank Training Through Low-Rank Updates,
arXiv:2307.05695. Weights and states as LoRA's; embeddings, norms and head are trained in full. The refresh
is the merge: `weight += B·A`, one matrix at a time, after which the factors' moments are set to zero in place.

galore-mem: adapters as in peft (float32 beside a 16-bit base); the product is cast to the base's format.
relora (Guitaricet/relora 176f376, peft_pretraining/relora.py): the whole model, adapters included, in the
weights' format; the product is scaled into a second tensor.
"""

from __future__ import annotations

from collections.abc import Iterator

from galore_mem.dtypes import FLOAT32
from galore_mem.memory.tape import Tensor
from galore_mem.methods import adamw
from galore_mem.methods.base import (
    RANK,
    Citation,
    Hyperparameter,
    Implementation,
    Job,
    Method,
    Slot,
    Slots,
    Stored,
    dense,
)
from galore_mem.methods.lora import adapters, frozen, store_paper
from galore_mem.spec.model import ParamSpec

RESET = Hyperparameter("update_proj_gap", 1000, "steps between two merges of the factors into the weights", least=1)


def store(row: ParamSpec, projected: bool, job: Job) -> tuple[Stored, ...]:
    """A frozen base with float32 adapters; what is not projected is trained."""
    if not projected or len(row.shape) != 2:
        return dense(row, projected, job)
    return frozen(row, job), *adapters(row, job.rank, FLOAT32)


def store_reference(row: ParamSpec, projected: bool, job: Job) -> tuple[Stored, ...]:
    """The same, in the weights' format."""
    if not projected or len(row.shape) != 2:
        return dense(row, projected, job)
    return frozen(row, job), *adapters(row, job.rank, job.recipe.weights, "weight")


def store_merged(row: ParamSpec, projected: bool, job: Job) -> tuple[Stored, ...]:
    """m·n frozen with m·r + n·r trained; what is not projected is trained."""
    if not projected or len(row.shape) != 2:
        return dense(row, projected, job)
    return store_paper(row, projected, job)


def products(slots: Slots) -> Iterator[tuple[Slot, Tensor]]:
    """Each B·A (out x in) in the factors' format, with the slot of its B; the one before is gone by then."""
    inputs = 0
    for slot in slots:
        if ".lora_A." in slot.param.name:
            inputs = slot.param.shape[1]
        elif ".lora_B." in slot.param.name:
            yield slot, slot.new((slot.param.shape[0], inputs), slot.param.dtype)


def step(slots: Slots, job: Job, refresh: bool) -> None:
    """AdamW; at a merge, B·A and its cast to the base's format."""
    adamw.step_foreach(slots, job, refresh)
    if refresh:
        for slot, product in products(slots):
            if job.recipe.weights is not product.dtype:
                slot.new(product.shape, job.recipe.weights)
            del product


def step_reference(slots: Slots, job: Job, refresh: bool) -> None:
    """AdamW; at a merge, B·A and `* scale`."""
    adamw.step_foreach(slots, job, refresh)
    if refresh:
        for slot, product in products(slots):
            slot.new(product.shape, product.dtype)
            del product


METHOD = Method(
    name="relora",
    title="ReLoRA",
    citation=Citation(
        "ReLoRA: High-Rank Training Through Low-Rank Updates",
        "Lialin, Shivagunde, Muckatira, Rumshisky", "arXiv:2307.05695",
    ),
    paper=Implementation(
        "paper", "arXiv:2307.05695", "LoRA's counts: weights mn + mr + nr, states 2mr + 2nr", adamw.moments,
        store=store_merged, linear="lora",
        equations={"projected": "2·(m·r + n·r), weights m·n + m·r + n·r", "other": "2·m·n"},
    ),
    implementations=(
        Implementation(
            name="galore-mem", version="galore-mem, torch 2.13", source="galore_mem/optim, torch/optim/adam.py",
            state=adamw.state, step=step, store=store, linear="lora", refreshes=True,
            one_by_one=False, layerwise=False,
            equations={"projected": "2·(m·r + n·r) at 4 bytes, weights m·n + m·r + n·r", "other": "2·m·n"},
            notes=("a merge needs both factors of a matrix at once: no layer-wise update",),
        ),
        Implementation(
            name="relora", version="relora 176f376, torch 2.13", source="peft_pretraining/relora.py",
            state=adamw.state, step=step_reference, store=store_reference, linear="lora", refreshes=True,
            one_by_one=False, layerwise=False,
            equations={"projected": "2·(m·r + n·r), weights m·n + m·r + n·r", "other": "2·m·n"},
        ),
    ),
    hyperparameters=(RANK, RESET),
    projects=True,
)  # fmt: skip
