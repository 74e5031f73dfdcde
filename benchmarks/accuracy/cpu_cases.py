"""Which small models are trained for real on the CPU, and how: every family, method, format, attention and loop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from galore_mem.estimator import Case
from galore_mem.families import FAMILIES
from galore_mem.memory.phases import Work
from galore_mem.setup import Setup, recipe
from galore_mem.spec.config import model_from_config
from galore_mem.spec.model import ModelSpec

# Two widths: one for formats of 16 bits, whose products the CPU computes slowly without oneDNN, one for float32
_SIZES = {
    "medium": {"vocab_size": 2048, "hidden_size": 192, "intermediate_size": 512, "num_attention_heads": 6},
    "wide": {"vocab_size": 4096, "hidden_size": 384, "intermediate_size": 1024, "num_attention_heads": 6},
}
_LAYERS = 3
_GROUPED = {"num_key_value_heads": 2}
_DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "type_vocab_size": 2}
_CLASSES = {"num_labels": 5}
# what a family calls these sizes
_CALLED = {
    "gpt2": {
        "n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
        "n_positions": "max_position_embeddings",
    },
    "opt": {"ffn_dim": "intermediate_size", "word_embed_proj_dim": "hidden_size"},
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama": {**_GROUPED, "tie_word_embeddings": False},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True, "attention_bias": True},
    "mistral": {**_GROUPED, "sliding_window": None},
    "mistral-window": {"model_type": "mistral", **_GROUPED, "sliding_window": 128},
    "qwen2": {**_GROUPED, "tie_word_embeddings": True},
    "gpt2": {},
    "gpt2-no-dropout": {"model_type": "gpt2", "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "bert": _DROPOUT,
    "bert-classes": {"model_type": "bert", "architectures": ["BertForSequenceClassification"], **_DROPOUT, **_CLASSES},
    "roberta": {**_DROPOUT, "max_position_embeddings": 514},
    "roberta-classes": {
        "model_type": "roberta", "architectures": ["RobertaForSequenceClassification"], **_DROPOUT, **_CLASSES,
        "max_position_embeddings": 514,
    },
    "qwen3": {**_GROUPED, "head_dim": 32},
    "gemma2": {**_GROUPED, "head_dim": 32, "num_hidden_layers": 4, "sliding_window": 128},
    "gemma3_text": {**_GROUPED, "head_dim": 32, "num_hidden_layers": 7, "sliding_window": 128},
    "phi3": {**_GROUPED, "pad_token_id": 0},
    "gpt_neox": {},
    "opt": {},
    "mixtral": {**_GROUPED, "num_local_experts": 4, "intermediate_size": 256},
    "deepseek_v3": {
        "num_key_value_heads": 6, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
        "first_k_dense_replace": 1, "q_lora_rank": 96, "kv_lora_rank": 64, "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 32, "v_head_dim": 32, "moe_intermediate_size": 96,
    },
    "gpt_oss": {
        **_GROUPED, "head_dim": 32, "num_hidden_layers": 2, "num_local_experts": 4, "num_experts_per_tok": 2,
        "intermediate_size": 256, "sliding_window": 64,
    },
}  # fmt: skip
EAGER = ("gemma2", "gpt_oss")  # transformers has no sdpa attention for them
TWINS = ("llama", "mistral", "qwen2", "gpt2", "bert", "roberta")
RANK = 48


@dataclass(frozen=True)
class Trained:
    """One model of `MODELS`, trained in one way."""

    model: str
    method: str = "adamw"
    implementation: str = "torch-foreach"
    recipe: str = "fp32"
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        options = _said(self.options)
        size = f"{options.pop('batch_size')}x{options.pop('seq_len')}"
        names = self.model, self.method, self.implementation, self.recipe, size
        return " ".join((*names, *map(_option, options.items())))

    @property
    def family(self) -> str:
        return MODELS[self.model].get("model_type", self.model)

    @property
    def size(self) -> str:
        return "wide" if self.recipe == "fp32" else "medium"

    def setup(self) -> Setup:
        options = {"attention": "eager"} if self.model in EAGER else {}
        return Setup(recipe(self.recipe), device="cpu", **{**options, **self.options})

    def hyperparameters(self) -> dict[str, Any]:
        from galore_mem.verify.matrix import hyperparameters

        return hyperparameters(self.method, {"rank": RANK})

    def spec(self) -> ModelSpec:
        from galore_mem.simulate.subjects.models import spec_of

        given = config(self.model, self.size)
        return model_from_config(given, self.model, "benchmark") if self.family in FAMILIES else spec_of(
            given, self.model
        )  # fmt: skip

    def work(self) -> Work:
        """As `simulate` and the real run see it."""
        from galore_mem.simulate.subjects.models import work_of

        return work_of(self.spec(), self.setup(), self.method, self.implementation, self.hyperparameters())

    def estimated(self) -> Case | None:
        """As `estimate` sees it; None where it does not know the family."""
        from galore_mem.estimator import given_for
        from galore_mem.methods.registry import method

        if self.family not in FAMILIES:
            return None
        found = method(self.method)
        given = given_for(found, self.hyperparameters())
        return Case(self.spec(), self.setup(), found, found.implementation(self.implementation), None, given)


def _option(pair: tuple[str, Any]) -> str:
    """As the command line calls it, and shorter where that is clear."""
    name, value = pair
    if name == "attention":
        return str(value)
    shown = name.removeprefix("gradient_").replace("_", "-")
    return shown if value is True else f"{shown}={value}"


def _said(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options without switches that are off."""
    return {name: value for name, value in options.items() if value is not False}


def config(name: str, size: str) -> dict[str, Any]:
    """The model's config.json."""
    sizes = {**_SIZES[size], "num_hidden_layers": _LAYERS, "max_position_embeddings": 512}
    given = {"model_type": name, **sizes, **MODELS[name]}
    return given | {theirs: given[ours] for theirs, ours in _CALLED.get(given["model_type"], {}).items()}


def shape(batch: int, length: int, **more: Any) -> dict[str, Any]:
    return {"batch_size": batch, "seq_len": length, **more}


CHECKPOINTED = {"gradient_checkpointing": True}
EAGERLY = {"attention": "eager"}
# Every family of the twin in every format and attention, checkpointed or not. The shapes differ: the CPU's attention
# has other tiles from 192 tokens on, and what is the largest is not the same in short and long sequences.
CROSSED = [
    (code, fmt, shape(batch, length, **attention, **checkpointed))
    for fmt, code, shapes in (
        ("fp32", "torch-foreach", ((1, 448), (4, 128))),
        ("pure-bf16", "torch-loop", ((1, 256), (2, 96))),
        ("amp-bf16", "torch-fused", ((1, 320), (3, 96))),
    )
    for attention, (batch, length) in zip(({}, EAGERLY), shapes, strict=True)
    for checkpointed in ({}, CHECKPOINTED)
]
# and those that only the simulation knows
FAMILY_WAYS = (
    ("adamw", "torch-foreach", "fp32", shape(3, 128)),
    ("adamw", "torch-loop", "pure-bf16", shape(1, 256, **CHECKPOINTED)),
    ("adamw", "torch-foreach", "amp-bf16", shape(2, 96, **EAGERLY)),
    ("galore", "galore-mem", "fp32", shape(1, 320, **CHECKPOINTED)),
)
EXPERTS = ("mixtral", "deepseek_v3", "gpt_oss")  # each expert is a product of its own: slow, so they are shorter
EXPERTS_WAYS = (
    ("adamw", "torch-foreach", "fp32", shape(3, 64)),
    ("adamw", "torch-loop", "pure-bf16", shape(1, 96, **CHECKPOINTED)),
    ("adamw", "torch-foreach", "amp-bf16", shape(2, 48, **EAGERLY)),
    ("galore", "galore-mem", "fp32", shape(1, 128, **CHECKPOINTED)),
)
VARIANTS = ("llama-tied", "mistral-window", "gpt2-no-dropout", "bert-classes", "roberta-classes")
VARIED = (
    ("torch-foreach", "fp32", shape(2, 256)),
    ("torch-foreach", "amp-bf16", shape(2, 192, **CHECKPOINTED)),
)
# methods with float32 weights, each on some family; of the published methods those that differ most
FP32 = (
    ("gpt2", "adafactor", "transformers"), ("qwen2", "adam-mini", "galore-mem"), ("bert", "sgd", "torch-foreach"),
    ("mistral", "adamw-8bit", "bitsandbytes"), ("gpt2", "galore", "galore-mem"), ("qwen2", "galore-8bit", "galore-mem"),
    ("roberta", "galore-mini", "galore-mem"), ("bert", "galore", "galore-mem"), ("mistral", "flora", "galore-mem"),
    ("llama", "low-rank", "torch-loop"), ("qwen2", "relora", "galore-mem"), ("llama", "q-galore", "galore-mem"),
    ("mistral", "galore-2", "galore-mem"), ("gpt2", "tensor-galore", "galore-mem"),
    ("qwen2", "galore-adafactor", "galore-mem"), ("bert", "galore-mini-1", "galore-mem"),
)  # fmt: skip
LAYERWISE = (
    ("llama", "galore", "galore-mem", "pure-bf16"), ("llama", "galore-mini", "galore-mem", "pure-bf16"),
    ("qwen2", "adamw", "torch-loop", "fp32"), ("gpt2", "galore", "galore-mem", "fp32"),
    ("mistral", "adamw", "torch-foreach", "amp-bf16"), ("bert", "sgd", "torch-loop", "fp32"),
    ("gpt2", "adafactor", "transformers", "fp32"), ("qwen2", "galore-8bit", "galore-mem", "pure-bf16"),
    ("roberta", "adam-mini", "galore-mem", "fp32"), ("qwen3", "galore", "galore-mem", "fp32"),
)  # fmt: skip
ADAPTERS = (
    ("llama", "lora", "peft", "amp-bf16", shape(1, 320)),
    ("llama", "lora", "peft-loop", "fp32", shape(2, 256, **CHECKPOINTED)),
    ("mistral", "lora", "peft", "pure-bf16", shape(2, 128, **CHECKPOINTED)),
    ("qwen2", "lora", "peft-fused", "amp-bf16", shape(2, 128, **EAGERLY)),
    ("gpt2", "lora", "peft", "fp32", shape(3, 128)),
    ("gpt2", "lora", "peft", "pure-bf16", shape(1, 256, **CHECKPOINTED)),
    ("bert", "lora", "peft", "fp32", shape(2, 128)),
    ("roberta", "lora", "peft", "amp-bf16", shape(2, 128, **EAGERLY)),
    ("qwen3", "lora", "peft", "amp-bf16", shape(2, 128, **CHECKPOINTED)),
    ("llama", "qlora", "peft", "fp32", shape(2, 128)),
    ("llama", "qlora", "peft", "pure-bf16", shape(1, 256, **CHECKPOINTED)),
    ("llama", "qlora", "peft", "amp-bf16", shape(2, 128, **EAGERLY)),
    ("qwen2", "qlora", "peft-loop", "pure-bf16", shape(1, 192)),
    ("mistral", "qlora", "peft", "fp32", shape(2, 128, **CHECKPOINTED)),
)
ACCUMULATED = (
    ("qwen2", "adamw", "torch-foreach", "fp32", shape(1, 256, gradient_accumulation=3)),
    ("gpt2", "adamw", "torch-loop", "amp-bf16", shape(1, 192, gradient_accumulation=2)),
    ("llama", "galore", "galore-mem", "pure-bf16", shape(2, 64, gradient_accumulation=2, **CHECKPOINTED)),
    ("llama", "lora", "peft", "fp32", shape(2, 128, gradient_accumulation=2)),
    ("mixtral", "adamw", "torch-foreach", "fp32", shape(1, 192, gradient_accumulation=2)),
)
# the training loop's own: until when it holds what forward returned, and whether it zeroes gradients
LOOPS = (
    *(
        (model, "adamw", code, fmt, shape(*size, keep_logits=kept))
        for model, code, fmt, size in (
            ("llama", "torch-foreach", "fp32", (2, 256)), ("gpt2", "torch-loop", "pure-bf16", (1, 192)),
            ("qwen2", "torch-foreach", "amp-bf16", (2, 128)), ("bert", "torch-fused", "fp32", (2, 128)),
            ("opt", "torch-foreach", "fp32", (2, 128)),
        )
        for kept in ("backward", "step")
    ),
    ("llama", "adamw", "torch-foreach", "fp32", shape(2, 256, keep_gradients=True)),
    ("gpt2", "adamw", "torch-fused", "amp-bf16", shape(2, 128, keep_gradients=True, **CHECKPOINTED)),
    ("mistral", "sgd", "torch-loop", "pure-bf16", shape(1, 128, keep_gradients=True)),
    ("qwen2", "galore", "galore-mem", "fp32", shape(1, 256, keep_gradients=True)),
    ("llama", "lora", "peft", "fp32", shape(2, 128, keep_gradients=True)),
    ("llama", "adamw", "torch-foreach", "fp32", shape(2, 128, keep_gradients=True, keep_logits="step")),
    ("qwen2", "adamw", "torch-loop", "fp32", shape(1, 128, gradient_accumulation=2, keep_logits="step")),
    ("roberta", "adamw", "torch-foreach", "fp32", shape(2, 128, keep_logits="step", **CHECKPOINTED)),
    ("qwen2", "galore", "galore-mem", "pure-bf16", shape(1, 128, layerwise=True, keep_logits="step")),
    ("gpt_neox", "adamw", "torch-foreach", "fp32", shape(2, 128, keep_gradients=True, keep_logits="backward")),
)  # fmt: skip


def cases() -> Iterator[Trained]:
    seen = set()
    for case in _all():
        if case.key not in seen:
            seen.add(case.key)
            yield case


def _all() -> Iterator[Trained]:
    for name in TWINS:
        for code, fmt, options in CROSSED:
            yield Trained(name, "adamw", code, fmt, options)
    for name in VARIANTS:
        for code, fmt, options in VARIED:
            yield Trained(name, "adamw", code, fmt, options)
    for name in MODELS:
        if name not in (*TWINS, *VARIANTS):
            for method, code, fmt, options in EXPERTS_WAYS if name in EXPERTS else FAMILY_WAYS:
                given = {k: v for k, v in options.items() if k != "attention"} if name in EAGER else options
                yield Trained(name, method, code, fmt, given)
    for method, code in here():
        yield Trained("llama", method, code, "pure-bf16", shape(1, 128))
        yield Trained("llama", method, code, "amp-bf16", shape(2, 64, gradient_accumulation=2))
        yield Trained("llama", method, code, "fp32", shape(2, 96, layerwise=layerwise(method, code), **CHECKPOINTED))
    for name, method, code in FP32:
        yield Trained(name, method, code, "fp32", shape(2, 192))
    for name, method, code, fmt in LAYERWISE:
        yield Trained(name, method, code, fmt, shape(1, 192, layerwise=True))
    for given in (*ADAPTERS, *ACCUMULATED, *LOOPS):
        yield Trained(*given)


def layerwise(method: str, implementation: str) -> bool:
    """Is there a layer-wise update?"""
    from galore_mem.methods.registry import METHODS

    return METHODS[method].implementation(implementation).layerwise


PACKAGES = ("torch", "transformers", "bitsandbytes", "peft")  # a reader need install no more
# bitsandbytes 0.50 asks a library that its CPU build does not have for pages, from 100,000 elements on
NOT_HERE = (("adamw-8bit", "bitsandbytes-paged"),)


def here() -> Iterator[tuple[str, str]]:
    """Every method by every implementation that these packages build."""
    from galore_mem.verify.builders import every
    from galore_mem.verify.peers import BUILDERS

    for name in every():
        if name in BUILDERS and name not in NOT_HERE and set(BUILDERS[name].needs) <= set(PACKAGES):
            yield name
