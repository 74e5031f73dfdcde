"""Each family's forward and backward pass on sizes, beside the real model on torch's CPU allocator.

A case builds the transformers model from the same config with random weights, runs one step to warm up and
one under the profiler, and compares the highest moment of the forward pass (with the loss) and of the
backward pass, above the weights, with the twin's. Only tensors without dimensions may differ: the twin does
not follow each scalar (a loss, a count, a constant).
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from allocations import allocations
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from galore_mem.families import FAMILIES, family
from galore_mem.memory.phases import Work, training
from galore_mem.methods.adamw import LOOP
from galore_mem.methods.base import Job
from galore_mem.methods.registry import METHODS
from galore_mem.setup import Setup, recipe
from galore_mem.spec.config import model_from_config

RANK = 16
SCALARS = 128  # bytes: at most sixteen scalars of eight bytes are alive at once

LLAMA = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "max_position_embeddings": 1024,
}
BERT = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "max_position_embeddings": 514,
    "type_vocab_size": 2,
}
GPT2 = {"vocab_size": 1024, "n_embd": 256, "n_layer": 3, "n_head": 8, "n_positions": 512}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
NO_DROPOUT_BERT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **LLAMA},
    "llama-gqa": {"model_type": "llama", **LLAMA, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "llama-biases": {"model_type": "llama", **LLAMA, "attention_bias": True, "mlp_bias": True, "head_dim": 48},
    "mistral": {"model_type": "mistral", **LLAMA, "num_key_value_heads": 4, "sliding_window": None},
    "mistral-window": {"model_type": "mistral", **LLAMA, "num_key_value_heads": 4, "sliding_window": 64},
    "qwen2": {"model_type": "qwen2", **LLAMA, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "gpt2": {"model_type": "gpt2", **GPT2, **NO_DROPOUT},
    "gpt2-dropout": {"model_type": "gpt2", **GPT2},
    "bert": {"model_type": "bert", **BERT, **NO_DROPOUT_BERT},
    "bert-dropout": {"model_type": "bert", **BERT},
    "bert-classes": {"model_type": "bert", **BERT, "architectures": ["BertForSequenceClassification"]},
    "roberta": {"model_type": "roberta", **BERT},
    "roberta-classes": {"model_type": "roberta", **BERT, "architectures": ["RobertaForSequenceClassification"]},
}


@dataclass(frozen=True)
class Case:
    config: str
    attention: str = "eager"
    checkpointing: bool = False
    batch_size: int = 2
    seq_len: int = 256
    recipe: str = "fp32"
    lora: tuple[str, ...] = ()  # linears that get adapters of rank 16; everything else is then frozen

    def __str__(self) -> str:
        mode = "-checkpointing" if self.checkpointing else ""
        lora = f"-lora-{'+'.join(self.lora)}" if self.lora else ""
        return f"{self.config}-{self.attention}{mode}-{self.batch_size}x{self.seq_len}-{self.recipe}{lora}"


def _sdpa_runs_its_cpu_kernel(config: str) -> bool:
    """With dropout, sdpa falls back to its composite form on the CPU, which no card takes: eager covers dropout."""
    return not config.endswith("dropout") and not config.startswith(("roberta", "bert-classes"))


QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_SEVEN = (*QKVO, "gate_proj", "up_proj", "down_proj")

CASES = [
    Case(config, attention, checkpointing)
    for config in CONFIGS
    for attention in ("eager", "sdpa")
    for checkpointing in (False, True)
    if attention == "eager" or _sdpa_runs_its_cpu_kernel(config)
] + [
    Case("llama", batch_size=1, seq_len=512),
    Case("llama-gqa", "sdpa", batch_size=1, seq_len=512),
    Case("llama", recipe="pure-bf16"),
    Case("llama-gqa", "sdpa", recipe="pure-bf16"),
    Case("llama-gqa", "sdpa", True, recipe="pure-bf16"),
    Case("gpt2", "sdpa", batch_size=1, seq_len=512),
    Case("gpt2-dropout", recipe="pure-bf16"),
    Case("roberta", recipe="pure-bf16"),
    Case("qwen2", recipe="amp-bf16"),
    Case("llama", "sdpa", recipe="amp-bf16"),
    Case("llama", "sdpa", True, recipe="amp-bf16"),
    Case("gpt2", recipe="amp-bf16"),
    Case("llama", "eager", True, recipe="amp-bf16"),
    Case("bert", recipe="amp-bf16"),
    # attention dropout: the composite form, which autocast runs as a whole
    Case("bert-dropout", "sdpa", recipe="amp-bf16"),
    Case("gpt2-dropout", "sdpa", True, recipe="amp-bf16"),
    Case("llama-gqa", "sdpa", lora=QKVO),
    Case("llama-gqa", "sdpa", recipe="pure-bf16", lora=QKVO),
    Case("llama-gqa", "sdpa", True, recipe="pure-bf16", lora=QKVO),
    Case("llama", "eager", True, recipe="pure-bf16", lora=ALL_SEVEN),
    Case("llama", "sdpa", True, recipe="fp32", lora=ALL_SEVEN),
    Case("llama", "sdpa", recipe="amp-bf16", lora=QKVO),
    Case("llama", "sdpa", True, recipe="fp32", lora=("lm_head",)),
    Case("llama", "sdpa", recipe="pure-bf16", lora=("lm_head",)),
    Case("gpt2", "sdpa", recipe="pure-bf16", lora=("c_attn",)),
]


def _classes(config: dict[str, Any]) -> Any:
    architecture = (config.get("architectures") or [""])[0]
    if architecture.endswith("SequenceClassification"):
        return AutoModelForSequenceClassification
    return AutoModelForMaskedLM if config["model_type"] in ("bert", "roberta") else AutoModelForCausalLM


def measured(case: Case) -> tuple[int, int]:
    """Peak bytes above the weights in forward and in backward, from the allocator's own events."""
    config = CONFIGS[case.config]
    setup = recipe(case.recipe)
    hf = CONFIG_MAPPING[config["model_type"]](**{k: v for k, v in config.items() if k != "model_type"})
    torch.manual_seed(0)
    model = _classes(config).from_config(hf, attn_implementation=case.attention)
    model = model.to(getattr(torch, setup.weights.name))
    if case.lora:
        model = get_peft_model(model, LoraConfig(r=RANK, target_modules=list(case.lora), task_type="CAUSAL_LM"))
    model = model.train()
    model.config.use_cache = False
    if case.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    classes = _classes(config) is AutoModelForSequenceClassification
    ids = torch.randint(5, hf.vocab_size, (case.batch_size, case.seq_len))
    target = torch.zeros(case.batch_size, dtype=torch.long) if classes else ids

    def forward() -> torch.Tensor:
        inputs, labels = ids.clone(), target.clone()
        autocast = None if setup.autocast is None else getattr(torch, setup.autocast.name)
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            return model(input_ids=inputs, labels=labels).loss

    forward().backward()
    model.zero_grad()
    gc.collect()
    gc.disable()
    try:
        with torch.backends.mkldnn.flags(enabled=False):  # its scratch space depends on the processor
            first = allocations(forward)
            second = allocations(first.value.backward)
    finally:
        gc.enable()
    return first.peak, first.live + second.peak


def predicted(case: Case) -> tuple[int, int]:
    config = CONFIGS[case.config]
    model = model_from_config(config, case.config, "test")
    setup = Setup(
        recipe=recipe(case.recipe),
        batch_size=case.batch_size,
        seq_len=case.seq_len,
        attention=case.attention,
        gradient_checkpointing=case.checkpointing,
        device="cpu",
    )
    code = METHODS["lora"].implementations[0] if case.lora else LOOP
    job = Job({"rank": RANK}, setup.recipe, "cpu", model.heads)
    work = Work(model, setup, code, job, case.lora or None, family(config["model_type"]).forward)
    peaks = {name: sum(moment.live) for name, moment in training(work).peaks.items()}
    return max(peaks["forward"], peaks["loss"]) - peaks["load"], peaks["backward"] - peaks["load"]


def scalars(case: Case) -> int:
    """What the twin may miss: each adapter's product with a number also keeps that number for backward."""
    return SCALARS + 8 * len(case.lora) * CONFIGS[case.config].get("num_hidden_layers", 3)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_peaks_equal_the_real_models(case: Case) -> None:
    assert predicted(case) == pytest.approx(measured(case), rel=0, abs=scalars(case))


def test_every_family_has_a_case() -> None:
    assert {c["model_type"] for c in CONFIGS.values()} == set(FAMILIES)
