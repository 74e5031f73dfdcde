"""LoRA: frozen weights, and two trained factors beside each projected one.

Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen: LoRA: Low-Rank Adaptation of Large Language Models,
arXiv:2106.09685. Weights mn + mr + nr, of which mr + nr are trained; states 2(mr + nr).

peft 0.21 (peft/tuners/lora/layer.py): `lora_A` (r x in) and `lora_B` (out x r) beside the frozen base, in
float32 where the base is 16-bit (`autocast_adapter_dtype`); everything else is frozen; the rank is not
clipped. `peft` takes torch.optim.AdamW with foreach, `peft-fused` and `peft-loop` its other two ways.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from galore_mem.dtypes import FLOAT32, DType
from galore_mem.methods import adamw
from galore_mem.methods.base import RANK, Citation, Implementation, Job, Method, Stored, StoreRule
from galore_mem.methods.low_rank import factors
from galore_mem.spec.model import ParamSpec

VERSION = "peft 0.21, torch 2.13"


def adapters(row: ParamSpec, r: int, dtype: DType, part: str = "default.weight") -> tuple[Stored, Stored]:
    """`lora_A` and `lora_B`; `part` is what follows (peft names its adapters, and the first is `default`)."""
    a, b = factors(row, r)
    return Stored(f".lora_A.{part}", a, dtype, dtype), Stored(f".lora_B.{part}", b, dtype, dtype)


def frozen(row: ParamSpec, job: Job) -> Stored:
    return Stored("", row.shape, job.recipe.weights, None)


def store(row: ParamSpec, projected: bool, job: Job) -> tuple[Stored, ...]:
    """The frozen base, and float32 adapters beside a projected weight."""
    if not projected or len(row.shape) != 2:
        return (frozen(row, job),)
    return frozen(row, job), *adapters(row, job.rank, FLOAT32)


def store_paper(row: ParamSpec, projected: bool, job: Job) -> tuple[Stored, ...]:
    """m·n frozen, m·r + n·r trained, in one format."""
    if not projected or len(row.shape) != 2:
        return (frozen(row, job),)
    return frozen(row, job), *adapters(row, min(job.rank, *row.shape), job.recipe.weights)


def under_peft(store: StoreRule, linear: str, equations: Mapping[str, str]) -> tuple[Implementation, ...]:
    """AdamW's implementations as the optimizer of a peft model."""
    return tuple(
        replace(
            code,
            name="peft" if code is adamw.FOREACH else code.name.replace("torch", "peft"),
            version=VERSION,
            source=f"peft/tuners/lora/layer.py, {code.source}",
            store=store,
            linear=linear,
            equations=equations,
        )
        for code in (adamw.FOREACH, adamw.FUSED, adamw.LOOP)
    )


EQUATIONS = {"projected": "2·(m·r + n·r) at 4 bytes, weights m·n + m·r + n·r", "other": "0 (frozen)"}

METHOD = Method(
    name="lora",
    title="LoRA",
    citation=Citation(
        "LoRA: Low-Rank Adaptation of Large Language Models",
        "Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen", "arXiv:2106.09685",
    ),
    paper=Implementation(
        "paper", "arXiv:2106.09685", "GaLore-mini table 1: weights mn + mr + nr, states 2mr + 2nr", adamw.moments,
        store=store_paper, linear="lora",
        equations={"projected": "2·(m·r + n·r), weights m·n + m·r + n·r", "other": "0 (frozen)"},
    ),
    implementations=under_peft(store, "lora", EQUATIONS),
    hyperparameters=(RANK,),
)  # fmt: skip
