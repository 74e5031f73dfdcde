"""Others' estimators: where they come from, and how each is asked about a measured run.

Each is given what serves it best: the model's exact number of parameters, and, of options that say almost what the run
does, the one that comes nearest. What it has no option for is listed (`differs`), and such rows are counted apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from rows import ATTENTION, Run

METHODS = ("adamw", "lora", "qlora")  # that peers know at all
QUANTIZED = "no option for quantized weights"


class Ask(NamedTuple):
    """Arguments of the peer's Python function, and what of the run they cannot say."""

    settings: Mapping[str, Any]
    differs: tuple[str, ...] = ()


def weights(run: Run) -> str:
    """The format of the base model's weights."""
    return run.dtype if run.precision == "pure" else "fp32"


def moments(run: Run) -> tuple[str, ...]:
    """Of peers that always have AdamW's moments in fp32."""
    full = run.rank is None and weights(run) != "fp32"
    return ("AdamW's moments always in fp32, where 16-bit weights have 16-bit ones",) if full else ()


class Peer(NamedTuple):
    """`ask`: how a run is put to it, or why it cannot be; `figure`: which of its numbers is taken for the allocated
    peak; `own`: which rows its authors measured (the first word of their names); `calibrated`: what they fitted to
    them."""

    package: str
    version: str
    requirements: tuple[str, ...]
    ask: Callable[[Run], Ask | str]
    figure: str
    own: str
    calibrated: str


def vramcalc(run: Run) -> Ask | str:
    """`vramcalc.estimate`; its LoRA is on q, k, v and o, its adapters are fp32."""
    if run.quantization != "none":
        return QUANTIZED
    return Ask({
        "mode": "train", "dtype": run.dtype, "precision": run.precision, "optimizer": "adamw", "batch": run.batch_size,
        "seq_len": run.seq_len, "lora_rank": run.rank, "grad_checkpoint": run.checkpointing, "attn_impl": run.attention,
    })  # fmt: skip


def fitcheck(run: Run) -> Ask | str:
    """`fitcheck.estimate`; `flash_attn` is what its authors' runs with sdpa are. States of a full run in 16 bits where
    the run's are; of LoRA's fp32 adapters, and under autocast, in fp32."""
    full = run.rank is None
    differs: tuple[str, ...] = ()
    if run.precision == "amp":
        differs = ("no autocast: asked for fp32, which comes nearest",)
    elif full and run.dtype != "fp32":
        differs = ("always adds an fp32 master copy to 16-bit weights that are trained",)
    states = "bf16" if full and weights(run) != "fp32" else "fp32"
    return Ask({
        "precision": weights(run), "quantization": run.quantization, "double_quant": run.double_quant,
        "optimizer": "adamw", "optimizer_dtype": states, "batch_size": run.batch_size, "seq_len": run.seq_len,
        "lora_rank": run.rank, "lora_targets": list(ATTENTION), "grad_checkpoint": run.checkpointing,
        "flash_attn": run.fused,
    }, differs)  # fmt: skip


def torch_preflight(run: Run) -> Ask | str:
    """`torch_preflight.vram.estimate_config`; a model that it does not have is resolved from its config, as with
    `--online`. `flash_attention` is "flash attention / SDPA" there."""
    if run.quantization != "none":
        return QUANTIZED
    lora = "LoRA only as a number of trainable parameters (in Python, no flag), in the base's dtype"
    differs = (lora,) if run.rank is not None else moments(run)
    precision = "amp" if run.precision == "amp" else "fp32" if run.dtype == "fp32" else f"pure-{run.dtype}"
    return Ask({
        "precision": precision, "optimizer": "adamw",
        "batch_size": run.batch_size, "seq_len": run.seq_len, "gradient_checkpointing": run.checkpointing,
        "flash_attention": run.fused,
    }, differs)  # fmt: skip


def ftuneai(run: Run) -> Ask | str:
    """`ftuneai.Estimator` with the model added to its table; `dtype` is the weights', which it reads from there. Flash
    attention is off: its command line has no flag for it, and with it the sdpa rows' median error is 43 % instead of
    13 %."""
    method = "full" if run.rank is None else "lora" if run.quantization == "none" else "qlora"
    differs = ("no autocast: fp32 weights, everything else in 16 bits",) if run.precision == "amp" else moments(run)
    lora = {"lora_rank": run.rank, "lora_target": "attention_all"} if run.rank else {}
    return Ask({
        "method": method, "quantization": {"none": "none", "nf4": "4bit"}[run.quantization],
        "batch_size": run.batch_size, "seq_length": run.seq_len, "gradient_checkpointing": run.checkpointing,
        "optimizer": "adamw", "flash_attention": False, **lora,
        "dtype": {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[weights(run)],
    }, differs)  # fmt: skip


PEERS = {
    "vramcalc": Peer(
        package="vramcalc",
        version="0.1.2",
        requirements=("vramcalc==0.1.2",),
        ask=vramcalc,
        figure="its `total`, which leaves the context out",
        own="a6000",
        calibrated="The `a6000` rows are its authors' own: terms of its formulas were set to what such runs left over.",
    ),
    "fitcheck": Peer(
        package="fitcheck-llm",
        version="0.3.1",
        requirements=("fitcheck-llm==0.3.1", "click==8.5.1", "huggingface-hub==2.4.0", "rich==15.0.0"),
        ask=fitcheck,
        figure="its `total_mib` less `overhead_mib` (context and fragmentation)",
        own="t4",
        calibrated="The `t4` rows are its authors' own: the copies of logits and scores that it counts, and its "
        "overheads, were fitted to such runs.",
    ),
    "torch-preflight": Peer(
        package="torch-preflight",
        version="0.5.0",
        requirements=(
            "torch-preflight[hub]==0.5.0", "huggingface-hub==2.4.0", "libcst==1.9.0", "PyYAML==6.0.3", "rich==15.0.0",
        ),
        ask=torch_preflight,
        figure="its total less `cuda_context` and `fragmentation`; its authors' own rows are asked as they record "
        "them, without flash attention",
        own="preflight",
        calibrated="The `preflight` rows are its authors' own: context and fragmentation, which are not in the figure "
        "taken, were measured on them.",
    ),
    "ftuneai": Peer(
        package="ftuneai",
        version="0.4.1",
        requirements=("ftuneai==0.4.1", "PyYAML==6.0.3"),
        ask=ftuneai,
        figure="its `total_gb`, overhead (a fifth of the rest) included, which its own validator compares with a peak; "
        "without its factor for flash attention, also where the run is sdpa's: its command line does not have it, and "
        "with it the median of those rows is three times as far off",
        own="",
        calibrated="It was fitted to no row of the set, but to LoRA and QLoRA runs of its authors on A100, V100 and "
        "H200.",
    ),
}  # fmt: skip
