"""LLaMA: LLaMA 1 to 3.3, TinyLlama, SmolLM2, and the models of the GaLore paper.

Source: transformers `models/llama/{configuration,modeling}_llama.py`. Mistral and Qwen2 are the same stack of
blocks and build on this file.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar

from pydantic import model_validator

from galore_mem.dtypes import FLOAT32, INT64
from galore_mem.families.base import (
    Activation,
    Dropout,
    FamilyConfig,
    Layers,
    Positions,
    Size,
    Vocabulary,
    check_heads,
    embedding,
    linear,
    norm,
)
from galore_mem.memory import ops
from galore_mem.memory.blocks import (
    activation,
    apply_rotary,
    attention,
    causal_mask,
    language_model_loss,
    rms_norm,
    rotary,
    split_heads,
)
from galore_mem.memory.cache import Cache, cache
from galore_mem.memory.network import Network
from galore_mem.memory.tape import Tensor
from galore_mem.spec.model import Block, BufferSpec, Heads, ParamSpec, Role


class DecoderConfig(FamilyConfig):
    """The keys that LLaMA, Mistral and Qwen2 share; `num_key_value_heads` and `head_dim` are never None afterwards."""

    vocab_size: Vocabulary
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Layers
    num_attention_heads: Size
    num_key_value_heads: Size | None
    head_dim: Size | None = None
    hidden_act: Activation = "silu"
    attention_dropout: Dropout = 0.0
    max_position_embeddings: Positions
    tie_word_embeddings: bool = False

    @model_validator(mode="after")
    def _settle_heads(self) -> DecoderConfig:
        heads = self.num_attention_heads
        if self.head_dim is None:
            check_heads(("hidden_size", self.hidden_size), ("num_attention_heads", heads))
            self.head_dim = self.hidden_size // heads
        if self.num_key_value_heads is None:
            self.num_key_value_heads = heads
        if heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {heads} is not a multiple of num_key_value_heads {self.num_key_value_heads}"
            )
        return self


class Config(DecoderConfig):
    ARCHITECTURES: ClassVar[tuple[str, ...]] = ("LlamaForCausalLM",)

    num_key_value_heads: Size | None = None
    max_position_embeddings: Positions = 2048
    attention_bias: bool = False
    mlp_bias: bool = False


def heads(config: DecoderConfig) -> Heads:
    """Query heads in groups that share one key and value head."""
    count = config.num_attention_heads
    return Heads(
        hidden_size=config.hidden_size,
        num_attention_heads=count,
        num_key_value_heads=config.num_key_value_heads or count,
        head_dim=config.head_dim or config.hidden_size // count,
    )


def blocks(config: Config) -> tuple[Block, ...]:
    """The rows of `LlamaForCausalLM.named_parameters()`."""
    attention, mlp = config.attention_bias, config.mlp_bias
    return decoder_blocks(config, qkv_bias=attention, o_bias=attention, mlp_bias=mlp)


def buffers(config: DecoderConfig) -> tuple[BufferSpec, ...]:
    """LlamaRotaryEmbedding: the frequencies, float32 in every model, and what they were before a scaling changes them:
    a copy since transformers 5, before it the same tensor under a second name (modeling_llama.py of 4.57.6)."""
    frequencies = (heads(config).head_dim // 2,)
    return (
        BufferSpec("model.rotary_emb.inv_freq", frequencies, FLOAT32),
        BufferSpec("model.rotary_emb.original_inv_freq", frequencies, FLOAT32, releases=("5.23",)),
    )


def decoder_blocks(config: DecoderConfig, *, qkv_bias: bool, o_bias: bool, mlp_bias: bool) -> tuple[Block, ...]:
    """Embedding, identical layers, final norm, and the head unless it is the embedding itself."""
    hidden = config.hidden_size
    layer = decoder_layer(config, qkv_bias=qkv_bias, o_bias=o_bias, mlp_bias=mlp_bias)
    tail = norm("model.norm", hidden, bias=False)
    if not config.tie_word_embeddings:
        tail += linear("lm_head", hidden, config.vocab_size, Role.HEAD, bias=False)
    return (
        Block(embedding("model.embed_tokens", config.vocab_size, hidden)),
        Block(layer, repeat=config.num_hidden_layers),
        Block(tail),
    )


def decoder_layer(config: DecoderConfig, *, qkv_bias: bool, o_bias: bool, mlp_bias: bool) -> tuple[ParamSpec, ...]:
    """One layer: grouped-query attention, gated MLP, two RMSNorms."""
    hidden, inner = config.hidden_size, config.intermediate_size
    geometry = heads(config)
    query = geometry.num_attention_heads * geometry.head_dim
    key_value = geometry.num_key_value_heads * geometry.head_dim
    attention, mlp = "model.layers.{i}.self_attn", "model.layers.{i}.mlp"
    return (
        *linear(f"{attention}.q_proj", hidden, query, Role.ATTENTION, bias=qkv_bias),
        *linear(f"{attention}.k_proj", hidden, key_value, Role.ATTENTION, bias=qkv_bias),
        *linear(f"{attention}.v_proj", hidden, key_value, Role.ATTENTION, bias=qkv_bias),
        *linear(f"{attention}.o_proj", query, hidden, Role.ATTENTION, bias=o_bias),
        *linear(f"{mlp}.gate_proj", hidden, inner, Role.MLP, bias=mlp_bias),
        *linear(f"{mlp}.up_proj", hidden, inner, Role.MLP, bias=mlp_bias),
        *linear(f"{mlp}.down_proj", inner, hidden, Role.MLP, bias=mlp_bias),
        *norm("model.layers.{i}.input_layernorm", hidden, bias=False),
        *norm("model.layers.{i}.post_attention_layernorm", hidden, bias=False),
    )


# -- forward pass, on sizes (transformers 5.23, models/llama/modeling_llama.py) ------------------------


def forward(net: Network, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """LlamaForCausalLM.forward: (loss, logits, keys and values kept by the output object)."""
    past_key_values = cache(net, net.config.get("sliding_window"))
    hidden_states = _decoder(net, input_ids, past_key_values)
    loss, logits = language_model_loss(net, partial(net.linear, "lm_head"), hidden_states, labels, causal=True)
    return loss, logits if past_key_values is None else (*logits, *past_key_values.held)


def _decoder(net: Network, input_ids: Tensor, past_key_values: Cache | None) -> Tensor:
    inputs_embeds = net.embedded(ops.embedding(net.weight("model.embed_tokens.weight"), input_ids))
    mask = causal_mask(net, inputs_embeds, net.config.get("sliding_window"), cached=past_key_values is not None)
    hidden_states = inputs_embeds
    position_ids = net.tape.empty((1, input_ids.shape[1]), INT64)
    cos, sin = rotary(hidden_states, net.head_dim)
    for i in net.layers():
        # the layer receives position_ids too, so a checkpointed layer keeps them
        layer = partial(_layer, net, f"model.layers.{i}", mask, cos, sin, position_ids, past_key_values)
        hidden_states = net.checkpoint(layer, hidden_states)
    return rms_norm(hidden_states, net.weight("model.norm.weight"))


def _layer(
    net: Network,
    path: str,
    mask: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor,
    past_key_values: Cache | None,
    hidden_states: Tensor,
) -> Tensor:
    residual = hidden_states
    hidden_states = rms_norm(hidden_states, net.weight(f"{path}.input_layernorm.weight"))
    hidden_states, _weights = _self_attention(net, f"{path}.self_attn", mask, cos, sin, past_key_values, hidden_states)
    hidden_states = ops.add(residual, hidden_states)
    residual = hidden_states
    hidden_states = rms_norm(hidden_states, net.weight(f"{path}.post_attention_layernorm.weight"))
    hidden_states = _mlp(net, f"{path}.mlp", hidden_states)
    return ops.add(residual, hidden_states)


def _self_attention(
    net: Network,
    path: str,
    mask: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    past_key_values: Cache | None,
    hidden_states: Tensor,
) -> tuple[Tensor, Tensor | None]:
    query = split_heads(net.linear(f"{path}.q_proj", hidden_states), net.head_dim)
    key = split_heads(net.linear(f"{path}.k_proj", hidden_states), net.head_dim)
    value = split_heads(net.linear(f"{path}.v_proj", hidden_states), net.head_dim)
    query, key = apply_rotary(query, key, cos, sin)
    if past_key_values is not None:
        key, value = past_key_values.update(key, value)
    dropout = net.config.get("attention_dropout", 0.0)
    output, weights = attention(net, query, key, value, mask, dropout=dropout, upcast=True)
    output = ops.reshape(output, *hidden_states.shape[:-1], -1)
    return net.linear(f"{path}.o_proj", output), weights


def _mlp(net: Network, path: str, x: Tensor) -> Tensor:
    act = activation(net.config.get("hidden_act", "silu"))
    return net.linear(
        f"{path}.down_proj", ops.mul(act(net.linear(f"{path}.gate_proj", x)), net.linear(f"{path}.up_proj", x))
    )
