"""Which cases a run without further wishes has. No torch.

The small models were made for this: between them their matrices are wide, tall and square, smaller than the rank, below
4,096 elements and no multiple of 256, with vectors, biases, tied embeddings and grouped queries.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any

from galore_mem.errors import InputError, unknown
from galore_mem.methods.registry import METHODS, method
from galore_mem.setup import DEVICES
from galore_mem.spec.config import model_from_config
from galore_mem.spec.model import ModelSpec
from galore_mem.spec.resolve import resolve
from galore_mem.verify.case import OPTIMIZER, TRAIN, WORKLOADS, Case

_LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2,
    "max_position_embeddings": 256,
}  # fmt: skip
SMALL: dict[str, dict[str, Any]] = {
    # 3 x 21 heads' rows: q 96 x 120, k and v 48 x 120 (grouped), o 120 x 96, gate and up 333 x 120, down 120 x 333
    "small-llama": {
        **_LLAMA, "vocab_size": 301, "hidden_size": 120, "intermediate_size": 333, "num_attention_heads": 6,
        "num_key_value_heads": 3, "head_dim": 16, "tie_word_embeddings": False,
    },
    # square attention, tied embeddings, matrices below 4,096 elements
    "small-tied": {
        **_LLAMA, "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 4,
        "num_key_value_heads": 4, "tie_word_embeddings": True,
    },
    "small-qwen2": {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 256, "hidden_size": 128,
        "intermediate_size": 344, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2,
        "max_position_embeddings": 256, "tie_word_embeddings": True,
    },
    "small-gpt2": {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 256, "n_embd": 96, "n_layer": 2,
        "n_head": 6, "n_positions": 256, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    },
}  # fmt: skip
RANK = 64  # above some matrices' smaller side, below others'
# what a run without further wishes has of every implementation: between them both formats and all shapes
STEPS = (("small-tied", "fp32"), ("small-llama", "pure-bf16"))
WHOLE = "small-llama"
CHECKPOINTED = ("adamw", "lora", "galore", "galore-mini")


def model_of(name: str) -> ModelSpec:
    """A small model by name, or whatever `--model` takes."""
    if name in SMALL:
        return model_from_config(SMALL[name], name, "made for galore-mem verify")
    return resolve(name)


def hyperparameters(name: str, rank: int | None = None) -> dict[str, int]:
    """The rank, where the method has one."""
    return {h.name: RANK if rank is None else rank for h in METHODS[name].hyperparameters if h.name == "rank"}


def implementations(methods: Sequence[str] = (), implementation: str | None = None) -> Iterator[tuple[str, str]]:
    """Every method with code, by every implementation (or the one that is named)."""
    for name in methods or METHODS:
        for code in METHODS[name].implementations:
            if implementation in (None, "all", code.name):
                yield name, code.name


def chosen(
    *,
    model: str | None,
    methods: Sequence[str],
    implementation: str | None,
    workload: str | None,
    device: str,
    recipe: str | None,
    rank: int | None,
    batch_size: int,
    seq_len: int,
    gradient_checkpointing: bool,
    layerwise: bool,
) -> list[Case]:
    """The cases of a command line. Without a model: states and steps of every implementation on the small models, in
    two formats, and whole training steps, with and without checkpointing (unless methods, an implementation or the
    workload are named, only of each method's first implementation, and both only of `CHECKPOINTED`). With one: that
    model, as it is asked for."""
    codes = list(implementations([method(name).name for name in methods], implementation))
    if not codes:
        names = sorted({c.name for m in METHODS.values() for c in m.implementations})
        raise unknown("implementation", str(implementation), names)
    if workload not in (None, *WORKLOADS):
        raise unknown("workload", workload, WORKLOADS)
    common = {"device": device_of(device), "layerwise": layerwise}
    passes = {**common, "batch_size": batch_size, "seq_len": seq_len}
    found = []
    if workload in (None, OPTIMIZER):
        for name, fmt in steps(model, recipe):
            found += [Case(name, m, code, OPTIMIZER, fmt, common, hyperparameters(m, rank)) for m, code in codes]
    if workload in (None, TRAIN):
        named = workload == TRAIN or bool(methods) or implementation is not None
        for m, code in codes:
            if not named and METHODS[m].implementations[0].name != code:
                continue  # its forward and backward are those of the method's first implementation
            both = model is None and (named or m in CHECKPOINTED)
            for checkpointing in (False, True) if both else (gradient_checkpointing,):
                options = {**passes, "gradient_checkpointing": checkpointing}
                found.append(Case(model or WHOLE, m, code, TRAIN, recipe or "fp32", options, hyperparameters(m, rank)))
    return found


def steps(model: str | None, recipe: str | None) -> tuple[tuple[str, str], ...]:
    """Models and formats of the optimizers' steps."""
    if recipe is None:
        return STEPS if model is None else tuple((model, fmt) for _, fmt in STEPS)
    return tuple((name, recipe) for name in ([name for name, _ in STEPS] if model is None else [model]))


def device_of(name: str) -> str:
    """`auto` is the accelerator where there is one. Raises `InputError` for a device unknown or not here."""
    if name not in (*DEVICES, "auto"):
        raise unknown("device", name, (*DEVICES, "auto"))
    if find_spec("torch") is None:
        raise InputError("verify runs real optimizers and needs torch; install galore-mem with its extra: verify")
    if name == "cpu":
        return name
    import torch

    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise InputError("--device cuda: torch sees no CUDA device here; leave it out, or give --device cpu")
    return "cuda" if there else "cpu"
