"""GPT-2: learned positions, fused query-key-value, `Conv1D` modules whose weights are stored (in, out).

Source: transformers `models/gpt2/{configuration,modeling}_gpt2.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

from pydantic import model_validator

from galore_mem.dtypes import BOOL, INT64
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
from galore_mem.memory.blocks import activation, attention, causal_mask, language_model_loss, split_heads
from galore_mem.memory.cache import Cache, cache
from galore_mem.memory.network import Network
from galore_mem.memory.tape import Tensor
from galore_mem.spec.model import Block, BufferSpec, Heads, ParamSpec, Role


class Config(FamilyConfig):
    """`n_inner` is never None afterwards: 4 n_embd unless given."""

    ARCHITECTURES: ClassVar[tuple[str, ...]] = ("GPT2LMHeadModel",)
    ALIASES: ClassVar[Mapping[str, str]] = {
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }
    ONLY: ClassVar[Mapping[str, Any]] = {"add_cross_attention": False}

    vocab_size: Vocabulary
    n_positions: Positions
    n_embd: Size
    n_layer: Layers
    n_head: Size
    n_inner: Size | None = None
    activation_function: Activation = "gelu_new"
    resid_pdrop: Dropout = 0.1
    embd_pdrop: Dropout = 0.1
    attn_pdrop: Dropout = 0.1
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    reorder_and_upcast_attn: bool = False
    tie_word_embeddings: bool = True

    @model_validator(mode="after")
    def _settle_sizes(self) -> Config:
        check_heads(("n_embd", self.n_embd), ("n_head", self.n_head))
        if self.n_inner is None:
            self.n_inner = 4 * self.n_embd
        return self


def heads(config: Config) -> Heads:
    """Every query head has its own key and value head."""
    return Heads(config.n_embd, config.n_head, config.n_head, config.n_embd // config.n_head)


def conv1d(path: str, into: int, out: int, role: Role) -> tuple[ParamSpec, ...]:
    """The rows of a `Conv1D`: weight (in, out), then the bias."""
    return (
        ParamSpec(f"{path}.weight", (into, out), role, "conv1d"),
        ParamSpec(f"{path}.bias", (out,), role, "conv1d"),
    )


def blocks(config: Config) -> tuple[Block, ...]:
    """The rows of `GPT2LMHeadModel.named_parameters()`."""
    hidden, inner = config.n_embd, config.n_inner or 4 * config.n_embd
    layer = (
        *norm("transformer.h.{i}.ln_1", hidden),
        *conv1d("transformer.h.{i}.attn.c_attn", hidden, 3 * hidden, Role.ATTENTION),
        *conv1d("transformer.h.{i}.attn.c_proj", hidden, hidden, Role.ATTENTION),
        *norm("transformer.h.{i}.ln_2", hidden),
        *conv1d("transformer.h.{i}.mlp.c_fc", hidden, inner, Role.MLP),
        *conv1d("transformer.h.{i}.mlp.c_proj", inner, hidden, Role.MLP),
    )
    embeddings = (
        *embedding("transformer.wte", config.vocab_size, hidden),
        *embedding("transformer.wpe", config.n_positions, hidden),
    )
    tail = norm("transformer.ln_f", hidden)
    if not config.tie_word_embeddings:
        tail += linear("lm_head", hidden, config.vocab_size, Role.HEAD, bias=False)
    return Block(embeddings), Block(layer, repeat=config.n_layer), Block(tail)


def buffers(config: Config) -> tuple[BufferSpec, ...]:
    """None since transformers 5; before, each attention has a causal mask of all positions and the number that is put
    where it hides something, though only eager attention of older releases reads them (modeling_gpt2.py of 4.57.6)."""
    positions = config.n_positions
    return (
        BufferSpec("transformer.h.{i}.attn.bias", (1, 1, positions, positions), BOOL, releases=("4.57",)),
        BufferSpec("transformer.h.{i}.attn.masked_bias", (), None, releases=("4.57",)),
    )


# -- forward pass, on sizes (transformers 5.23, models/gpt2/modeling_gpt2.py) --------------------------


def forward(net: Network, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """GPT2LMHeadModel.forward: (loss, logits, keys and values kept by the output object)."""
    past_key_values = cache(net)
    hidden_states = _decoder(net, input_ids, past_key_values)
    loss, logits = language_model_loss(net, partial(net.linear, "lm_head"), hidden_states, labels, causal=True)
    return loss, logits if past_key_values is None else (*logits, *past_key_values.held)


def _decoder(net: Network, input_ids: Tensor, past_key_values: Cache | None) -> Tensor:
    config = net.config
    inputs_embeds = net.embedded(ops.embedding(net.weight("transformer.wte.weight"), input_ids))
    position_ids = net.tape.empty((1, input_ids.shape[1]), INT64)
    position_embeds = ops.embedding(net.weight("transformer.wpe.weight"), position_ids)
    hidden_states = ops.add(inputs_embeds, position_embeds)
    mask = causal_mask(net, inputs_embeds, cached=past_key_values is not None)
    hidden_states = ops.dropout(hidden_states, config["embd_pdrop"])
    for i in net.layers():
        # the layer receives position_ids too, so a checkpointed layer keeps them
        layer = partial(_layer, net, f"transformer.h.{i}", mask, position_ids, past_key_values)
        hidden_states = net.checkpoint(layer, hidden_states)
    return _norm(net, "transformer.ln_f", hidden_states)


def _norm(net: Network, path: str, x: Tensor) -> Tensor:
    return ops.layer_norm(x, net.weight(f"{path}.weight"), net.weight(f"{path}.bias"))


def _layer(
    net: Network,
    path: str,
    mask: Tensor | None,
    position_ids: Tensor,
    past_key_values: Cache | None,
    hidden_states: Tensor,
) -> Tensor:
    residual = hidden_states
    hidden_states = _norm(net, f"{path}.ln_1", hidden_states)
    attn_output, _weights = _self_attention(net, f"{path}.attn", mask, past_key_values, hidden_states)
    hidden_states = ops.add(attn_output, residual)
    residual = hidden_states
    hidden_states = _norm(net, f"{path}.ln_2", hidden_states)
    feed_forward = _mlp(net, f"{path}.mlp", hidden_states)
    return ops.add(residual, feed_forward)


def _self_attention(
    net: Network, path: str, mask: Tensor | None, past_key_values: Cache | None, hidden_states: Tensor
) -> tuple[Tensor, Tensor | None]:
    config = net.config
    fused = net.linear(f"{path}.c_attn", hidden_states)
    query, key, value = ops.split(fused, hidden_states.shape[-1], 2)
    del fused
    key, value = split_heads(key, net.head_dim), split_heads(value, net.head_dim)
    query = split_heads(query, net.head_dim)
    if past_key_values is not None:
        key, value = past_key_values.update(key, value)
    output, weights = attention(net, query, key, value, mask, dropout=config["attn_pdrop"])
    output = ops.contiguous(ops.reshape(output, *hidden_states.shape[:-1], -1))
    output = net.linear(f"{path}.c_proj", output)
    return ops.dropout(output, config["resid_pdrop"]), weights


def _mlp(net: Network, path: str, hidden_states: Tensor) -> Tensor:
    config = net.config
    hidden_states = net.linear(f"{path}.c_fc", hidden_states)
    hidden_states = activation(config["activation_function"])(hidden_states)
    hidden_states = net.linear(f"{path}.c_proj", hidden_states)
    return ops.dropout(hidden_states, config["resid_pdrop"])
