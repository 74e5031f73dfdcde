"""The encoder that BERT and RoBERTa share, on sizes (transformers 5.23, models/bert/modeling_bert.py).

RoBERTa's code is a copy of BERT's with another name in front, other position ids and other heads.
"""

from __future__ import annotations

from functools import partial

from galore_mem.dtypes import INT64
from galore_mem.memory import ops
from galore_mem.memory.blocks import activation, attention, first_token, split_heads
from galore_mem.memory.network import Network
from galore_mem.memory.tape import Tensor


def layer_norm(net: Network, path: str, x: Tensor) -> Tensor:
    """The LayerNorm module at `path`."""
    return ops.layer_norm(x, net.weight(f"{path}.weight"), net.weight(f"{path}.bias"))


def encode(net: Network, model: str, input_ids: Tensor, *, position_rows: int) -> Tensor:
    """The hidden states of the last layer: (batch, length, hidden_size).

    `position_rows`: how many rows the position ids have: 1 (BERT, a slice of a buffer) or the batch (RoBERTa, which
    computes them from the input's padding).
    """
    hidden_states = _embed(net, f"{model}.embeddings", input_ids, position_rows)
    for i in net.layers():
        hidden_states = net.checkpoint(partial(_layer, net, f"{model}.encoder.layer.{i}"), hidden_states)
    return hidden_states


def _embed(net: Network, path: str, input_ids: Tensor, position_rows: int) -> Tensor:
    batch, length = input_ids.shape
    if position_rows == 1:
        positions = net.buffer((1, length), INT64)
        types = ops.expand(net.tape.empty((1, length), INT64), batch, length)  # gathered from a buffer of zeros
    else:
        positions, types = net.tape.empty((batch, length), INT64), net.tape.empty((batch, length), INT64)
    inputs_embeds = net.embedded(ops.embedding(net.weight(f"{path}.word_embeddings.weight"), input_ids))
    type_embeddings = ops.embedding(net.weight(f"{path}.token_type_embeddings.weight"), types)
    embeddings = ops.add(inputs_embeds, type_embeddings)
    position_embeddings = ops.embedding(net.weight(f"{path}.position_embeddings.weight"), positions)
    embeddings = ops.add(embeddings, position_embeddings)
    embeddings = layer_norm(net, f"{path}.LayerNorm", embeddings)
    return ops.dropout(embeddings, net.config["hidden_dropout_prob"])


def _layer(net: Network, path: str, hidden_states: Tensor) -> Tensor:
    attention_output, _weights = _attention(net, f"{path}.attention", hidden_states)
    intermediate = _intermediate(net, f"{path}.intermediate", attention_output)
    return _output(net, f"{path}.output", intermediate, attention_output)


def _attention(net: Network, path: str, hidden_states: Tensor) -> tuple[Tensor, Tensor | None]:
    output, weights = _self_attention(net, f"{path}.self", hidden_states)
    return _output(net, f"{path}.output", output, hidden_states), weights


def _self_attention(net: Network, path: str, hidden_states: Tensor) -> tuple[Tensor, Tensor | None]:
    query = split_heads(net.linear(f"{path}.query", hidden_states), net.head_dim)
    key = split_heads(net.linear(f"{path}.key", hidden_states), net.head_dim)
    value = split_heads(net.linear(f"{path}.value", hidden_states), net.head_dim)
    dropout = net.config["attention_probs_dropout_prob"]
    output, weights = attention(net, query, key, value, None, dropout=dropout, downcast=False, causal=False)
    return ops.contiguous(ops.reshape(output, *hidden_states.shape[:-1], -1)), weights


def _output(net: Network, path: str, hidden_states: Tensor, residual: Tensor) -> Tensor:
    hidden_states = net.linear(f"{path}.dense", hidden_states)
    hidden_states = ops.dropout(hidden_states, net.config["hidden_dropout_prob"])
    return layer_norm(net, f"{path}.LayerNorm", ops.add(hidden_states, residual))


def _intermediate(net: Network, path: str, hidden_states: Tensor) -> Tensor:
    hidden_states = net.linear(f"{path}.dense", hidden_states)
    return activation(net.config["hidden_act"])(hidden_states)


def classification_dropout(net: Network) -> float:
    """`classifier_dropout`, or `hidden_dropout_prob` where it is not set."""
    given = net.config.get("classifier_dropout")
    return float(net.config["hidden_dropout_prob"] if given is None else given)


__all__ = ["classification_dropout", "encode", "first_token", "layer_norm"]
