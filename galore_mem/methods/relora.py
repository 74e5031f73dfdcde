"""ReLoRA: LoRA whose factors are merged into the weights, and started again, every few thousand steps.

Lialin, Shivagunde, Muckatira, Rumshisky: ReLoRA: High-Rank Training Through Low-Rank Updates,
arXiv:2307.05695. Weights and states as LoRA's; embeddings, norms and head are trained in full. The refresh
is the merge: `weight += B·A`, one matrix at a time, after which the factors start with new moments.

galore-mem (galore_mem/optim/relora.py): adapters as in peft (float32 beside a 16-bit base); both factors are cast to
the base's format and multiplied into it (`addmm_`). relora (Guitaricet/relora 176f376, peft_pretraining/relora.py):
the whole model, adapters included, in the weights' format; the product is scaled into a second tensor.
"""

from __future__ import annotations

from collections.abc import Iterator

from galore_mem.dtypes import FLOAT32
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
from galore_mem.methods.eager import converted
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


def pairs(slots: Slots) -> Iterator[tuple[Slot, Slot]]:
    """The slots of each A and of its B, which follows."""
    a: Slot | None = None
    for slot in slots:
        if ".lora_A." in slot.param.name:
            a = slot
        elif ".lora_B." in slot.param.name:
            assert a is not None
            yield a, slot


def merge(slots: Slots, job: Job) -> None:
    """merge_and_restart: A and B in the base's format, where theirs is another."""
    for pair in pairs(slots):
        casts = [converted(slot, slot.weight, job.recipe.weights) for slot in pair]
        del casts


def merge_reference(slots: Slots, job: Job) -> None:
    """merge_and_reinit: B·A (out x in) in the factors' format, then `* scale`."""
    for a, b in pairs(slots):
        product = b.new((b.param.shape[0], a.param.shape[1]), b.param.dtype)
        b.new(product.shape, product.dtype)
        del product


def step(slots: Slots, job: Job, refresh: bool) -> None:
    """AdamW; then, at times, a merge."""
    adamw.step_foreach(slots, job, refresh)
    if refresh:
        merge(slots, job)


def step_reference(slots: Slots, job: Job, refresh: bool) -> None:
    """AdamW; then, at times, a merge."""
    adamw.step_foreach(slots, job, refresh)
    if refresh:
        merge_reference(slots, job)


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
)  # fmt: skip
