"""Small models trained for real on the CPU beside their simulation: which cases, and how one is run."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from galore_mem.families import FAMILIES
from galore_mem.memory.phases import Work
from galore_mem.setup import Setup, recipe
from galore_mem.spec.config import model_from_config
from galore_mem.spec.model import ModelSpec

_SIZES = {
    "vocab_size": 320, "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 6,
    "max_position_embeddings": 512,
}  # fmt: skip
_GROUPED = {"num_key_value_heads": 2, "head_dim": 16}
_BERT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "type_vocab_size": 2}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {**_SIZES, **_GROUPED, "tie_word_embeddings": False},
    "mistral": {**_SIZES, **_GROUPED, "sliding_window": None},
    "qwen2": {**_SIZES, "num_key_value_heads": 2},
    "gpt2": {"vocab_size": 320, "n_embd": 96, "n_layer": 3, "n_head": 6, "n_positions": 512},
    "bert": {**_SIZES, **_BERT},
    "roberta": {**_SIZES, **_BERT, "max_position_embeddings": 514},
    "qwen3": {**_SIZES, **_GROUPED},
    "gemma2": {**_SIZES, **_GROUPED, "num_hidden_layers": 4, "sliding_window": 128},
    "gemma3_text": {**_SIZES, **_GROUPED, "num_hidden_layers": 7, "sliding_window": 128},
    "phi3": {**_SIZES, "num_key_value_heads": 2, "pad_token_id": 0},
    "gpt_neox": _SIZES,
    "opt": {**_SIZES, "ffn_dim": 256, "word_embed_proj_dim": 96},
    "mixtral": {**_SIZES, **_GROUPED, "num_local_experts": 4},
    "deepseek_v3": {
        **_SIZES, "num_key_value_heads": 6, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2,
        "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 48, "kv_lora_rank": 32, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16, "v_head_dim": 16, "moe_intermediate_size": 64,
    },
    "gpt_oss": {**_SIZES, **_GROUPED, "num_hidden_layers": 4, "num_local_experts": 4, "sliding_window": 128},
}  # fmt: skip
EAGER = ("gemma2", "gpt_oss")  # transformers has no sdpa attention for them
RANK = 32
COUNTED = ("forward", "backward", "step", "refresh")


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
        return " ".join(
            (self.model, self.method, self.implementation, self.recipe, *map(_option, self.options.items()))
        )

    def work(self) -> Work:
        from galore_mem.simulate.models import work_of
        from galore_mem.verify.matrix import hyperparameters

        options = {"attention": "eager"} if self.model in EAGER else {}
        setup = Setup(recipe(self.recipe), device="cpu", **{**options, **self.options})
        given = hyperparameters(self.method, {"rank": RANK})
        return work_of(spec(self.model), setup, self.method, self.implementation, given)


def _option(pair: tuple[str, Any]) -> str:
    name, value = pair
    return name if value is True else f"{name}={value}"


def spec(name: str) -> ModelSpec:
    from galore_mem.simulate.models import spec_of

    config = {"model_type": name, **MODELS[name]}
    return model_from_config(config, name, "benchmark") if name in FAMILIES else spec_of(config, name)


def size(batch: int, length: int, **more: Any) -> dict[str, Any]:
    return {"batch_size": batch, "seq_len": length, **more}


CHECKPOINTED = {"gradient_checkpointing": True}
# every family in two ways, with two lengths: the CPU's attention has other tiles from 192 and from 768 on
FAMILY_WAYS = (
    ("torch-foreach", "fp32", size(3, 64)),
    ("torch-loop", "pure-bf16", size(1, 320, **CHECKPOINTED)),
)
# LLaMA and GPT-2 in every format and attention, checkpointed or not
CROSSED = [
    (fmt, size(batch, length, attention=attention, gradient_checkpointing=checkpointed))
    for fmt in ("fp32", "pure-bf16", "amp-bf16")
    for attention, (batch, length) in (("sdpa", (1, 320)), ("eager", (3, 256)))
    for checkpointed in (False, True)
]
METHODS = (
    ("sgd", "torch-foreach"), ("adamw", "torch-fused"), ("adamw", "torch-loop"), ("adamw-8bit", "bitsandbytes"),
    ("adafactor", "transformers"), ("adam-mini", "galore-mem"), ("low-rank", "torch-foreach"), ("lora", "peft"),
    ("qlora", "peft"), ("relora", "galore-mem"), ("flora", "galore-mem"), ("galore", "galore-mem"),
    ("galore-8bit", "galore-mem"), ("galore-adafactor", "galore-mem"), ("q-galore", "galore-mem"),
    ("tensor-galore", "galore-mem"), ("galore-2", "galore-mem"), ("galore-mini", "galore-mem"),
    ("galore-mini-1", "galore-mem"), ("galore-mini-2", "galore-mem"),
)  # fmt: skip
SPECIAL = (
    *(Trained("llama", m, "galore-mem", "pure-bf16", size(2, 256, layerwise=True)) for m in ("galore", "galore-mini")),
    Trained("qwen2", "adamw", "torch-loop", "fp32", size(1, 256, layerwise=True)),
    Trained("gpt2", "galore", "galore-mem", "fp32", size(1, 256, layerwise=True)),
    *(
        Trained("qwen2", "adamw", "torch-foreach", fmt, size(1, 256, gradient_accumulation=3))
        for fmt in ("fp32", "amp-bf16")
    ),
    Trained("llama", "galore", "galore-mem", "pure-bf16", size(3, 64, gradient_accumulation=2, **CHECKPOINTED)),
    Trained("llama", "lora", "peft", "amp-bf16", size(1, 320)),
    Trained("llama", "qlora", "peft", "pure-bf16", size(1, 320, **CHECKPOINTED)),
    Trained("mistral", "lora", "peft", "pure-bf16", size(2, 256, **CHECKPOINTED)),
    Trained("gpt2", "lora", "peft", "fp32", size(3, 256)),
    Trained("deepseek_v3", "galore", "galore-mem", "fp32", size(2, 64)),
    Trained("mixtral", "galore-mini", "galore-mem", "pure-bf16", size(2, 64)),
    Trained("qwen3", "galore", "galore-mem", "pure-bf16", size(2, 256)),
    Trained("bert", "adamw", "torch-loop", "amp-bf16", size(3, 256, attention="eager")),
    Trained("roberta", "galore", "galore-mem", "fp32", size(1, 320)),
)


def cases() -> Iterator[Trained]:
    for name in MODELS:
        for implementation, fmt, options in FAMILY_WAYS:
            yield Trained(name, "adamw", implementation, fmt, options)
    for name in ("llama", "gpt2"):
        for fmt, options in CROSSED:
            yield Trained(name, "adamw", "torch-foreach", fmt, options)
    for method, implementation in METHODS:
        yield Trained("llama", method, implementation, "pure-bf16", size(2, 128))
    yield from SPECIAL


def run(case: Trained) -> dict[str, Any]:
    """Both runs of a case: the highest moment of each phase and the tensors that stay, in bytes."""
    import torch

    from galore_mem.simulate.layers import trace_layers
    from galore_mem.verify.builders import builder
    from galore_mem.verify.kernels import chosen_kernels
    from galore_mem.verify.meters import CpuMeter
    from galore_mem.verify.workloads import run_train

    work, row = case.work(), builder(case.method, case.implementation)
    row.check("train", work)
    simulated = trace_layers(work, row, full=True)
    gc.collect()
    torch.manual_seed(0)
    with CpuMeter() as meter, chosen_kernels(work), row.around():
        found = run_train(work, row, torch.device("cpu"), meter)
    peaks = simulated.trace.peaks()
    return {
        **asdict(case),
        "phases": {p: [peak.allocated, peaks[p].total] for p, peak in meter.peaks().items() if p in COUNTED},
        "stays": [list(found[:3]), list(simulated.measured[:3])],
    }
