"""Small models of many families, by the keys of their config.json."""

from __future__ import annotations

from typing import Any

from galore_mem.memory.phases import Work
from galore_mem.setup import Setup, recipe
from galore_mem.simulate.subjects.models import spec_of, work_of
from galore_mem.verify.matrix import hyperparameters

SMALL = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128,
}  # fmt: skip
_GROUPED = {"num_key_value_heads": 2, "head_dim": 16}
_EAGER = {"attention": "eager"}  # transformers has no sdpa attention for the family
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**SMALL, "tie_word_embeddings": False},
    "mistral": {**SMALL, **_GROUPED, "sliding_window": 16},
    "qwen3": {**SMALL, **_GROUPED},
    "gemma2": {**SMALL, **_GROUPED, "sliding_window": 16},
    "gemma3_text": {**SMALL, **_GROUPED, "sliding_window": 16},
    "phi3": {**SMALL, "num_key_value_heads": 2, "pad_token_id": 0},
    "gpt_neox": SMALL,
    "opt": {**SMALL, "ffn_dim": 96, "word_embed_proj_dim": 64},
    "mixtral": {**SMALL, **_GROUPED, "num_local_experts": 4},
    "deepseek_v3": {
        **SMALL, "num_key_value_heads": 4, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2,
        "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16, "v_head_dim": 16, "moe_intermediate_size": 32,
    },
    "gpt_oss": {**SMALL, **_GROUPED, "num_local_experts": 4, "sliding_window": 16},
    "bert": SMALL,
    "roberta": SMALL,
    # one key head for four query heads, which is broadcast
    "falcon": {**SMALL, "multi_query": True, "new_decoder_architecture": False},
    "diffllama": {**SMALL, "num_key_value_heads": 2},  # parameters by torch.normal
    "doge": {**SMALL, "num_key_value_heads": 2},  # a mask with a gradient
    "afmoe": {
        **SMALL, **_GROUPED, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2,
        "num_dense_layers": 1, "sliding_window": 16,
    },  # a parameter that the model freezes
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
