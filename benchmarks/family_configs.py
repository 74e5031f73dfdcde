"""A tiny config.json of every causal and masked model type of transformers: its default config with small numbers.

Sizes are named alike across families, so one table of names serves them all; what is left is in `OWN`, by type. Of
the layers, one of each kind that the default config has (sliding and full attention, recurrent, dense and experts) is
left, and two at least.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from galore_mem.simulate.depths import cut

# names of sizes, and what they become. (Two names of one size become the same.)
SMALL = {
    64: "hidden_size d_model n_embd dim emb_dim embed_dim word_embed_proj_dim embedding_size lru_width "
    "attention_hidden_size embedding_dim pooler_hidden_size entity_emb_size input_embedding_size output_embedding_size "
    "d_latents hidden_size_global prediction_head_size true_hidden_size out_hidden_size backbone_hidden_size "
    "router_hidden_size projection_dim vision_output_dim projector_output_dim adapter_out_dim embedding_rank",
    96: "intermediate_size moe_intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim ffn_hidden_size dff dim_ff "
    "hidden_dim d_inner d_ff feed_forward_size shared_expert_intermediate_size shared_intermediate_size "
    "shared_experts_intermediate_size intermediate_size_mlp dense_intermediate_size expert_ffn_hidden_size "
    "moe_shared_expert_intermediate_size mlp_dim",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads attention_heads "
    "num_encoder_attention_heads num_decoder_attention_heads num_self_attention_heads num_cross_attention_heads "
    "index_n_heads linear_num_key_heads linear_num_value_heads linear_num_heads swa_num_attention_heads num_experts "
    "num_local_experts n_routed_experts moe_num_experts num_kv_heads zero_expert_num",
    2: "num_key_value_heads swa_num_key_value_heads num_experts_per_tok num_experts_per_token moe_k moe_topk n_group "
    "num_expert_group o_groups num_query_groups num_hash_layers",
    1: "first_k_dense_replace topk_group num_nextn_predict_layers num_mtp_layers",
    16: "head_dim qk_nope_head_dim v_head_dim dim_head d_head linear_key_head_dim linear_value_head_dim "
    "linear_head_dim "
    "swa_head_dim index_head_dim kv_lora_rank sliding_window sliding_window_size index_topk kv_channels d_kv "
    "mamba_d_state state_size ssm_state_size query_pre_attn_scalar local_attention attention_chunk_size window_size "
    "attention_window attention_window_size block_size attention_head_size hidden_size_per_layer_input "
    "mamba_chunk_size chunk_size attention_head_dim qk_rope_head_dim",
    8: "rotary_dim laurel_rank time_step_rank mamba_dt_rank",
    32: "q_lora_rank o_lora_rank max_window_layers",
    512: "vocab_size vocab_size_per_layer_input max_position_embeddings n_positions n_ctx max_seq_len "
    "max_target_positions max_source_positions entity_vocab_size audio_vocab_size decoder_vocab_size context_length "
    "model_max_length",
}  # fmt: skip
SIZES = {name: size for size, names in SMALL.items() for name in names.split()}
LAYERS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "num_encoder_layers",
    "depth",
)  # fmt: skip
FEWEST = 2
LABELS = ("id2label", "label2id", "per_layer_config")
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
ZAMBA = {
    "num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2, "attention_hidden_size": 128,
    "attention_head_dim": 32,
}  # fmt: skip
# what a default config lacks, or what its checks ask for
OWN: dict[str, dict[str, Any]] = {
    "blt": {"encoder_hash_byte_group_vocab": 512},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8}},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "num_experts_per_tok": 2},
    "esm": {"vocab_size": 512, "pad_token_id": 1, "mask_token_id": 2},
    "dots3_note": {
        "text_config": {"num_key_value_heads": 4, "n_routed_experts": 8}, "vision_config": {"adapter_in_dim": 64},
        "audio_config": {"adapter_input_size": 64},
    },
    "dots3_note_text": {"num_key_value_heads": 4, "n_routed_experts": 8},
    "esmc": {"num_key_value_heads": 4, "num_attention_heads": 4},
    "gemma3n_text": {"num_kv_shared_layers": 0, "intermediate_size": 96},
    "gemma4": {"text_config": {"global_head_dim": 16}},
    "gemma4_text": {"global_head_dim": 16},
    "gemma4_assistant": {
        "text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "global_head_dim": 16}
    },
    "gemma4_unified": {"text_config": {"global_head_dim": 16}},
    "gemma4_unified_assistant": {"text_config": {"global_head_dim": 16}},
    "gemma4_unified_text": {"global_head_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2, "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "hidden_size": 64},
    "ministral": {"head_dim": 16},
    "ministral3": {"rope_parameters": {**ROPE, "original_max_position_embeddings": 512, "llama_4_scaling_beta": 0.1}},
    "mobilebert": {"intra_bottleneck_size": 32, "true_hidden_size": 32, "hidden_size": 64},
    "nemotron": {"num_key_value_heads": 2},
    "perceiver": {"max_position_embeddings": 64},
    "phi4_multimodal": {
        "vision_config": {"image_size": 28, "crop_size": 28},
        "audio_config": {"num_blocks": 2, "nemo_conv_channels": 32},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 16,
        "indexer_compress_ratio": 4, "hc_lowrank": 16,
    },
    "reformer": {"axial_pos_shape": [8, 8], "axial_pos_embds_dim": [16, 48], "attn_layers": ["local", "lsh"]},
    "roc_bert": {"shape_vocab_size": 512, "pronunciation_vocab_size": 512},
    "xmod": {"default_language": "en_XX"},
    "zamba": ZAMBA,
    "zamba2": ZAMBA,
}  # fmt: skip


OWN["qwen4_exp"] = {"text_config": OWN["qwen4_exp_text"]}


def config(kind: str) -> dict[str, Any]:
    """The keys of a tiny config.json."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    default: Any = CONFIG_MAPPING[kind]
    own = OWN.get(kind, {})
    try:
        made = default()
    except Exception:  # it refuses its own default values
        made = default(**own)
    return {"model_type": kind, **merged(dict(smaller(shallow(made.to_dict()))), own)}


def shallow(given: Mapping[str, Any]) -> dict[str, Any]:
    """With one layer of each kind, and two at least. A kind is what the lists with an entry for each layer say."""
    key = next((name for name in LAYERS if isinstance(given.get(name), int)), None)
    if key is None:
        return dict(given)
    count = given[key]
    lists = [value for value in given.values() if isinstance(value, list) and len(value) == count > 1]
    kinds = [repr([value[i] for value in lists]) for i in range(count)]
    kept = sorted({kinds.index(one) for one in kinds})
    kept += [i for i in range(count) if i not in kept][: max(0, FEWEST - len(kept))]
    return cut(given, key, sorted(kept)) if lists else {**given, key: FEWEST}


def smaller(given: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What a tiny config says otherwise than the default one."""
    for name, value in given.items():
        if isinstance(value, dict):
            inner = dict(smaller(shallow(value))) if name not in LABELS else {}
            if inner:
                kept = {"model_type": value["model_type"]} if "model_type" in value else {}
                yield name, kept | inner
        elif name.endswith("token_id") and isinstance(value, int) and value > 4:
            yield name, 1
        elif isinstance(value, bool) or value is None:
            continue
        elif name == "num_key_value_heads" and value == given.get("num_attention_heads"):
            yield name, SIZES["num_attention_heads"]  # no groups, and latent attention has none
        elif name in SIZES and isinstance(value, int) and value > SIZES[name]:
            yield name, SIZES[name]
        elif name in LAYERS or name.endswith("_types"):
            yield name, value


def merged(given: dict[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """With more keys, in nested dictionaries too; None takes one away."""
    for name, value in more.items():
        if isinstance(value, dict) and isinstance(given.get(name), dict):
            given[name] = merged(given[name], value)
        else:
            given[name] = value
    return given
