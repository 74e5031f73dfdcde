"""The drift alarm: what this torch and transformers save and allocate, for small models of every family and for steps
of optimizers, traced without values. `tests/data/drift/` has what it was; `python benchmarks/drift.py` renews that.

Each subject (a family, LoRA, optimizers) is a few variants; a variant's program is traced once, on `meta`, as a card
would run it. The sizes are small, and different from each other wherever they can be, so that shapes tell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from drift_lines import OUTSIDE, Part, parts_of
from simulate_models import CONFIGS, EAGER
from torch import Tensor, nn

from galore_mem.optim import GaLoreAdafactor, GaLoreAdamW
from galore_mem.releases import modeled
from galore_mem.setup import TORCH, TRANSFORMERS, Setup, recipe
from galore_mem.simulate.quiet import quiet
from galore_mem.simulate.session import META, TraceMeter, trace
from galore_mem.simulate.subjects.models import config_of, default_head

BATCH, LENGTH = 2, 24
RECIPES = ("fp32", "pure-bf16", "amp-bf16")
GROUPED = {"num_key_value_heads": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    **CONFIGS,
    "llama": {**CONFIGS["llama"], **GROUPED},
    "qwen2": {**CONFIGS["llama"], **GROUPED},
    "gpt2": {"vocab_size": 128, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128},
}
ENCODERS = ("bert", "roberta")  # which have a causal head too
Parts = dict[str, Part]  # by "variant phase, layer"


class Subject(NamedTuple):
    """What is recorded together, in a file of its own: a function for each variant, and packages besides torch and
    transformers whose code it runs."""

    variants: Mapping[str, Callable[[], Parts]]
    packages: tuple[str, ...] = ()


def record(subject: Subject, only: Callable[[str], bool] = lambda variant: True) -> Parts:
    """What the subject's variants do now."""
    found: Parts = {}
    with quiet():
        for variant, run in subject.variants.items():
            if only(variant):
                found |= {f"{variant} {where}": part for where, part in run().items()}
    return found


# -- models ------------------------------------------------------------------------------------------------------


def train_step(
    family: str, attention: str, fmt: str, *, backward: bool = False, checkpoint: bool = False, lora: bool = False
) -> Parts:
    """What forward leaves in a small model, and what backward allocates."""
    setup = Setup(
        recipe(fmt), BATCH, LENGTH, attention, gradient_checkpointing=checkpoint,
        torch=modeled("torch", TORCH), transformers=modeled("transformers", TRANSFORMERS),
    )  # fmt: skip

    def program(meter: TraceMeter) -> None:
        meter.enter("load")
        model = model_of(family, setup)
        if lora:
            model = adapted(model)
        ids = torch.zeros((BATCH, LENGTH), dtype=torch.long, device=META)
        cast = setup.recipe.autocast is not None
        meter.enter("forward")
        with torch.autocast(META.type, torch.bfloat16, enabled=cast):
            loss: Tensor = model(input_ids=ids, labels=ids).loss
        meter.enter("backward")
        if backward:
            loss.backward()
        meter.enter("end")

    found = trace(program, setup).trace
    phases = ("forward", "backward") if backward else ("forward",)
    return {f"{phase}, {name}": part for phase in phases for name, part in parts_of(found, phase).items()}


def model_of(family: str, setup: Setup) -> Any:
    """As transformers builds it, on `meta`."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    config = config_of({"model_type": family, **FAMILIES[family]})
    masked = family in ENCODERS or default_head(config) == "ForMaskedLM"
    kind: Any = AutoModelForMaskedLM if masked else AutoModelForCausalLM
    with META:
        fmt = getattr(torch, setup.recipe.weights.name)
        model = kind.from_config(config, dtype=fmt, attn_implementation=setup.attention)
    model.to(META)  # what functions make that ask no device (torch.normal)
    model.train()
    model.config.use_cache = False
    if setup.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def adapted(model: Any) -> Any:
    """With LoRA, as peft makes it; low_cpu_mem_usage makes the adapters on `meta`."""
    import peft

    config = peft.LoraConfig(r=8, lora_dropout=0.05, target_modules=["q_proj", "v_proj", "o_proj", "down_proj"])
    return peft.get_peft_model(model, config, low_cpu_mem_usage=True)


def family(name: str) -> Subject:
    found: dict[str, Callable[[], Parts]] = {}
    attentions = ("eager",) if name in EAGER else ("eager", "sdpa")
    for attention in attentions:
        for fmt in RECIPES:
            # once for each family: the formulas of backward are torch's, and the same in the others but for casts
            backward = (attention, fmt) == (attentions[-1], "pure-bf16")
            found[f"{attention} {fmt}"] = partial(train_step, name, attention, fmt, backward=backward)
    found["checkpointing pure-bf16"] = partial(train_step, name, attentions[-1], "pure-bf16", checkpoint=True)
    return Subject(found)


# -- optimizers --------------------------------------------------------------------------------------------------

GAP = 2  # GaLore's steps between two projectors
RANK = 8
STEPS = ("first step", "second step", "third step")
Factory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def galore(kind: Any, params: list[nn.Parameter]) -> Any:
    """Matrices are projected, vectors are not."""
    low = {"params": [p for p in params if p.dim() > 1], "rank": RANK, "update_proj_gap": GAP}
    return kind([{"params": [p for p in params if p.dim() == 1]}, low])


def of_transformers(params: list[nn.Parameter]) -> Any:
    from transformers.optimization import Adafactor

    return Adafactor(params, lr=1e-3, relative_step=False, scale_parameter=False)  # type: ignore[no-untyped-call]  # transformers has no types there


OPTIMIZERS: dict[str, tuple[Factory, int]] = {  # and how many steps differ from each other
    "AdamW loop": (lambda params: torch.optim.AdamW(params, foreach=False), 2),
    "AdamW foreach": (lambda params: torch.optim.AdamW(params, foreach=True), 2),
    "AdamW fused": (lambda params: torch.optim.AdamW(params, fused=True), 2),
    "AdamW foreach amsgrad": (lambda params: torch.optim.AdamW(params, foreach=True, amsgrad=True), 2),
    "SGD momentum foreach": (lambda params: torch.optim.SGD(params, momentum=0.9, foreach=True), 2),
    "Adafactor loop": (lambda params: torch.optim.Adafactor(params, foreach=False), 2),
    "Adafactor foreach": (lambda params: torch.optim.Adafactor(params, foreach=True), 2),
    "Adafactor of transformers": (of_transformers, 2),
    "GaLoreAdamW": (partial(galore, GaLoreAdamW), 3),
    "GaLoreAdafactor": (partial(galore, GaLoreAdafactor), 3),
}


def steps(make: Factory, count: int, fmt: str) -> Parts:
    """What an optimizer's steps allocate, over two matrices and their biases."""
    setup = Setup(recipe(fmt), torch=modeled("torch", TORCH), transformers=modeled("transformers", TRANSFORMERS))

    def program(meter: TraceMeter) -> None:
        meter.enter("load")
        weights = getattr(torch, setup.recipe.weights.name)
        model = nn.Sequential(nn.Linear(48, 80), nn.Linear(80, 16)).to(device=META, dtype=weights)
        optimizer = make(list(model.parameters()))
        for phase in STEPS[:count]:
            meter.enter("between")
            model(torch.zeros(LENGTH, 48, dtype=weights, device=META)).sum().backward()
            meter.enter(phase)
            optimizer.step()
            meter.enter("after")
            optimizer.zero_grad()

    found = trace(program, setup).trace
    return {phase: parts_of(found, phase).get(OUTSIDE, Part()) for phase in STEPS[:count]}


def optimizers() -> Iterator[tuple[str, Callable[[], Parts]]]:
    for name, (make, count) in OPTIMIZERS.items():
        for fmt in ("fp32", "pure-bf16"):
            yield f"{name} {fmt}", partial(steps, make, count, fmt)


def lora() -> Iterator[tuple[str, Callable[[], Parts]]]:
    for fmt in RECIPES:
        yield f"sdpa {fmt}", partial(train_step, "llama", "sdpa", fmt, backward=fmt == "pure-bf16", lora=True)


SUBJECTS: dict[str, Subject] = {name: family(name) for name in FAMILIES} | {
    "llama-lora": Subject(dict(lora()), ("peft",)),
    "optimizers": Subject(dict(optimizers())),
}
