"""QLoRA: LoRA on weights of four bits.

Dettmers, Pagnoni, Holtzman, Zettlemoyer: QLoRA: Efficient Finetuning of Quantized LLMs, arXiv:2305.14314. The base
takes 4 bits and, with double quantization, 8/64 + 32/(64·256) = 0.127 bits more per element for its scales.

transformers 5.23 replaces every linear layer but the output embedding by bitsandbytes' Linear4bit, whether it gets
adapters or not (quantizers/base.py, get_keys_to_not_convert; integrations/bitsandbytes.py); other layers of a head, as
BERT's, are replaced too. Per matrix (bitsandbytes 0.50.2, functional.py,
quantize_4bit): packed codes; one scale per 64 elements, in float32 or, with `double_quant`, one byte, then with
float32 scales per 256 of those, their offset, and a copy of the 256-entry table of 8-bit codes; the 16 NF4
values. peft.prepare_model_for_kbit_training casts all other 16-bit parameters to float32; the adapters are
float32 too. Everything but the adapters is frozen. A quantized layer casts its bias to the compute format in its first
forward pass, for good (bitsandbytes/nn/modules.py, Linear4bit.forward).
"""

from __future__ import annotations

from dataclasses import replace

from galore_mem.dtypes import FLOAT32, NF4, UINT8, DType
from galore_mem.methods import adamw
from galore_mem.methods.base import RANK, Citation, Hyperparameter, Implementation, Job, Method, Stored
from galore_mem.methods.lora import adapters, frozen, under_peft
from galore_mem.spec.model import ParamSpec, Role
from galore_mem.units import ceil_div

DOUBLE_QUANT = Hyperparameter("double_quant", 1, "1: the scales of NF4 blocks are quantized too; 0: they are float32")
BLOCK, NESTED_BLOCK = 64, 256


# the output embeddings of the families, where they are no other parameter's; a bias may belong to the head around them
KEPT = frozenset(("lm_head", "lm_head.decoder", "cls.predictions", "cls.predictions.decoder"))


def kept(row: ParamSpec) -> bool:
    """Is this a parameter of the output embedding?"""
    return row.role is Role.HEAD and row.name.rpartition(".")[0] in KEPT


def quantizes(row: ParamSpec) -> bool:
    """Is this the weight of a linear layer other than the output embedding?"""
    return row.is_matrix_of_linear and len(row.shape) == 2 and not kept(row)


def rest(row: ParamSpec, job: Job) -> DType:
    """The format of what is not quantized: float32, but for biases of quantized layers."""
    bias = row.module in ("linear", "conv1d") and len(row.shape) == 1 and not kept(row)
    return (job.recipe.autocast or job.recipe.weights) if bias else FLOAT32


def scales(row: ParamSpec, job: Job) -> tuple[Stored, ...]:
    """The scales of a matrix's NF4 blocks (`weight.quant_state`)."""
    blocks = ceil_div(row.count, BLOCK)
    if not job.number("double_quant"):
        return (Stored(".absmax", (blocks,), FLOAT32, None),)
    return (
        Stored(".absmax", (blocks,), UINT8, None),
        Stored(".nested_absmax", (ceil_div(blocks, NESTED_BLOCK),), FLOAT32, None),
    )


def tables(job: Job) -> tuple[Stored, ...]:
    """The lookup tables each matrix has of its own, and the offset of its scales."""
    values = Stored(".quant_map", (16,), FLOAT32, None)
    if not job.number("double_quant"):
        return (values,)
    return values, Stored(".nested_quant_map", (256,), FLOAT32, None), Stored(".nested_offset", (), FLOAT32, None)


def store(row: ParamSpec, projected: bool, job: Job) -> tuple[Stored, ...]:
    """NF4 codes with their scales and tables, and adapters beside a projected weight; the rest in float32."""
    if not quantizes(row):
        return (Stored("", row.shape, rest(row, job), None), *(adapters(row, job.rank, FLOAT32) if projected else ()))
    base = Stored("", row.shape, NF4, None), *scales(row, job), *tables(job)
    return *base, *(adapters(row, job.rank, FLOAT32) if projected else ())


def store_paper(row: ParamSpec, projected: bool, job: Job) -> tuple[Stored, ...]:
    """4 bits and the scales for a quantized weight; the rest, and the adapters, in the recipe's format."""
    base = (Stored("", row.shape, NF4, None), *scales(row, job)) if quantizes(row) else (frozen(row, job),)
    if not projected or len(row.shape) != 2:
        return base
    return *base, *adapters(row, min(job.rank, *row.shape), job.recipe.weights)


WEIGHTS = "weights 4.127 bits·m·n + m·r + n·r (without double quantization 4.5 bits)"

EQUATIONS = {"projected": f"2·(m·r + n·r) at 4 bytes, {WEIGHTS}", "other": "0 (frozen)"}

METHOD = Method(
    name="qlora",
    title="QLoRA",
    citation=Citation(
        "QLoRA: Efficient Finetuning of Quantized LLMs", "Dettmers, Pagnoni, Holtzman, Zettlemoyer", "arXiv:2305.14314"
    ),
    paper=Implementation(
        "paper", "arXiv:2305.14314", "NF4 with double quantization; LoRA's states 2mr + 2nr", adamw.moments,
        store=store_paper, linear="nf4",
        equations={"projected": f"2·(m·r + n·r), {WEIGHTS}", "other": "0 (frozen)"},
    ),
    implementations=tuple(
        replace(code, not_counted=("one more 8-bit table (1 KiB) that bitsandbytes keeps per process",))
        for code in under_peft(store, "nf4", EQUATIONS)
    ),
    hyperparameters=(RANK, DOUBLE_QUANT),
)  # fmt: skip
