"""Which cases a run without further wishes has. No torch.

The small models were made for this: between them their matrices are wide, tall and square, smaller than the rank, below
4,096 elements and no multiple of 256, with vectors, biases, tied embeddings and grouped queries.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from galore_mem.errors import InputError, unknown, unknown_of
from galore_mem.estimator import check
from galore_mem.methods.registry import METHODS, method
from galore_mem.setup import DEVICES
from galore_mem.spec.config import model_from_config
from galore_mem.spec.model import ModelSpec
from galore_mem.spec.resolve import resolve
from galore_mem.verify.case import ALONE, OPTIMIZER, TRAIN, WORKLOADS, Case

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
# what a run without options has of every implementation: both formats on shapes of every kind
FORMATS = ("fp32", "pure-bf16")
SHAPES = ("small-tied", "small-llama")
WHOLE = "small-llama"
CHECKPOINTED = ("adamw", "lora", "galore", "galore-mini")
PASSES = {"batch_size": 2, "seq_len": 64}
# what a run without wishes trains these in, besides: other ways, and other models
VARIED = ("adamw", "galore", "galore-mini")
WAYS: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("pure-bf16", {}), ("amp-bf16", {}), ("fp32", {"attention": "eager"}), ("fp32", {"gradient_accumulation": 2}),
    ("fp32", {"layerwise": True}),
)  # fmt: skip
OTHERS = ("small-tied", "small-qwen2", "small-gpt2")


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a command line asks for. None, or nothing: everything that a run without wishes has.

    `options` are the setup's that were given, by the names of the command line (`case.NAMED`); `hyperparameters` go to
    the methods that have them.
    """

    model: str | None = None
    methods: Sequence[str] = ()
    implementation: str | None = None
    workload: str | None = None
    recipe: str | None = None
    targets: tuple[str, ...] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    hyperparameters: Mapping[str, int | float | str] = field(default_factory=dict)

    @property
    def narrowed(self) -> bool:
        """Does it ask for some methods, implementations or workloads and not for all?"""
        return self.workload == TRAIN or bool(self.methods) or self.implementation is not None


def model_of(name: str) -> ModelSpec:
    """A small model by name, or whatever `--model` takes."""
    if name in SMALL:
        return model_from_config(SMALL[name], name, "made for galore-mem verify")
    return resolve(name)


def hyperparameters(name: str, given: Mapping[str, int | float | str | None] | None = None) -> dict[str, Any]:
    """Those given that the method has, and a rank where it has one."""
    known = {h.name for h in METHODS[name].hyperparameters}
    wanted = {"rank": RANK, **{key: value for key, value in (given or {}).items() if value is not None}}
    return {key: value for key, value in wanted.items() if key in known}


def implementations(methods: Sequence[str] = (), implementation: str | None = None) -> Iterator[tuple[str, str]]:
    """Every method with code, by every implementation (or the one that is named)."""
    for name in methods or METHODS:
        for code in METHODS[name].implementations:
            if implementation in (None, "all", code.name):
                yield name, code.name


def chosen(wishes: Wishes, device: str) -> list[Case]:
    """The cases of a command line. Without a model: states and steps of every implementation on the small models, in
    two formats, and whole training steps, with and without checkpointing (unless methods, an implementation or the
    workload are named, only of each method's first implementation, and both only of `CHECKPOINTED`). With one: that
    model, as it is asked for. Raises `InputError` for wishes that no case can have."""
    names = list(dict.fromkeys(method(name).name for name in wishes.methods))
    codes = list(implementations(names, wishes.implementation))
    if not codes:
        known = {c.name for name in names or METHODS for c in METHODS[name].implementations}
        raise unknown_of(names, "implementation", str(wishes.implementation), known)
    if wishes.workload not in (None, *WORKLOADS):
        raise unknown("workload", wishes.workload, WORKLOADS)
    found: list[Case] = []
    if wishes.workload in (None, OPTIMIZER):
        found += [case for name, fmt in steps(wishes) for case in optimizers(wishes, device, codes, name, fmt)]
    if wishes.workload in (None, TRAIN):
        found += trainings(wishes, device, codes)
    if wishes == Wishes():
        found += variations(device)
    for case in found[:1] + found[-1:]:  # what is wrong with one is said before any runs
        setup, told = case.setup(), wishes.hyperparameters
        check(model_of(case.model), setup, names, "implementation", wishes.targets, told)
    return found


def steps(wishes: Wishes) -> list[tuple[str, str]]:
    """Models and formats of the optimizers' steps."""
    names = SHAPES if wishes.model is None else (wishes.model,)
    return [(name, fmt) for name in names for fmt in (FORMATS if wishes.recipe is None else (wishes.recipe,))]


def optimizers(wishes: Wishes, device: str, codes: Sequence[tuple[str, str]], model: str, fmt: str) -> Iterator[Case]:
    """Steps on random gradients."""
    options = {"device": device, **{k: v for k, v in wishes.options.items() if k in ALONE}}
    for m, code in codes:
        hyper = hyperparameters(m, wishes.hyperparameters)
        yield Case(model, m, code, OPTIMIZER, fmt, options, hyper, wishes.targets)


def trainings(wishes: Wishes, device: str, codes: Sequence[tuple[str, str]]) -> Iterator[Case]:
    """Whole training steps."""
    model, fmt, given = wishes.model or WHOLE, wishes.recipe or "fp32", wishes.options
    for m, code in codes:
        if not wishes.narrowed and METHODS[m].implementations[0].name != code:
            continue  # its forward and backward are those of the method's first implementation
        both = wishes.model is None and "gradient_checkpointing" not in given
        both = both and (wishes.narrowed or m in CHECKPOINTED)
        for checkpointing in (False, True) if both else (given.get("gradient_checkpointing", False),):
            options = {"device": device, **PASSES, **given, "gradient_checkpointing": checkpointing}
            hyper = hyperparameters(m, wishes.hyperparameters)
            yield Case(model, m, code, TRAIN, fmt, options, hyper, wishes.targets)


def variations(device: str) -> Iterator[Case]:
    """Whole training steps of some methods in every way that there is, and of other models."""
    for m in VARIED:
        made, hyper = METHODS[m].implementations[0].name, hyperparameters(m)
        for fmt, options in WAYS:
            yield Case(WHOLE, m, made, TRAIN, fmt, {"device": device, **PASSES, **options}, hyper)
        for model in OTHERS:
            yield Case(model, m, made, TRAIN, "fp32", {"device": device, **PASSES}, hyper)


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
