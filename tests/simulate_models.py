"""Small models of many families, by the keys of their config.json."""

from __future__ import annotations

from typing import Any

from galore_mem.memory.phases import Work
from galore_mem.setup import Setup, recipe
from galore_mem.simulate.subjects.models import spec_of, work_of
from galore_mem.verify.matrix import hyperparameters

_SIZES = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128,
}  # fmt: skip
_GROUPED = {"num_key_value_heads": 2, "head_dim": 16}
_EAGER = {"attention": "eager"}  # transformers has no sdpa attention for the family
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**_SIZES, "tie_word_embeddings": False},
    "mistral": {**_SIZES, **_GROUPED, "sliding_window": 16},
    "qwen3": {**_SIZES, **_GROUPED},
    "gemma2": {**_SIZES, **_GROUPED, "sliding_window": 16},
    "gemma3_text": {**_SIZES, **_GROUPED, "sliding_window": 16},
    "phi3": {**_SIZES, "num_key_value_heads": 2, "pad_token_id": 0},
    "gpt_neox": _SIZES,
    "opt": {**_SIZES, "ffn_dim": 96, "word_embed_proj_dim": 64},
    "mixtral": {**_SIZES, **_GROUPED, "num_local_experts": 4},
    "deepseek_v3": {
        **_SIZES, "num_key_value_heads": 4, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2,
        "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16, "v_head_dim": 16, "moe_intermediate_size": 32,
    },
    "gpt_oss": {**_SIZES, **_GROUPED, "num_local_experts": 4, "sliding_window": 16},
    "bert": _SIZES,
    "roberta": _SIZES,
}  # fmt: skip
EAGER = ("gemma2", "gpt_oss")
RANK = 16


def config(family: str, **more: Any) -> dict[str, Any]:
    return {"model_type": family, **CONFIGS[family], **more}


def work(
    family: str, method: str = "adamw", implementation: str = "torch-loop", fmt: str = "fp32",
    more: dict[str, Any] | None = None, **options: Any,
) -> Work:  # fmt: skip
    """A small training run of a family."""
    ways = {"device": "cpu", "batch_size": 2, "seq_len": 32, **(_EAGER if family in EAGER else {}), **options}
    spec = spec_of(config(family, **(more or {})), family)
    given = hyperparameters(method, {"rank": RANK})
    return work_of(spec, Setup(recipe(fmt), **ways), method, implementation, given)
