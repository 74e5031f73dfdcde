"""BERT with its masked-language-model head or a sequence classifier.

Source: transformers `models/bert/{configuration,modeling}_bert.py`. RoBERTa has the same encoder and builds on
this file.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, ClassVar

from pydantic import Field, model_validator

from galore_mem.dtypes import INT64
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
from galore_mem.families.encoder import classification_dropout, encode, first_token, layer_norm
from galore_mem.memory import ops
from galore_mem.memory.blocks import activation, language_model_loss
from galore_mem.memory.network import Network
from galore_mem.memory.tape import Tensor
from galore_mem.spec.model import Block, BufferSpec, Heads, ParamSpec, Role


class EncoderConfig(FamilyConfig):
    """The keys that BERT and RoBERTa share; `num_labels` is the length of `id2label` when that is given."""

    ONLY: ClassVar[Mapping[str, Any]] = {
        "add_cross_attention": False,
        "is_decoder": False,
        "position_embedding_type": "absolute",  # relative positions have an embedding in each layer
        "chunk_size_feed_forward": 0,
    }

    vocab_size: Vocabulary
    hidden_size: Size
    num_hidden_layers: Layers
    num_attention_heads: Size
    intermediate_size: Size
    max_position_embeddings: Positions
    type_vocab_size: Size
    hidden_act: Activation = "gelu"
    hidden_dropout_prob: Dropout = 0.1
    attention_probs_dropout_prob: Dropout = 0.1
    classifier_dropout: Dropout | None = None
    num_labels: Size | None = None
    id2label: Annotated[dict[str, Any], Field(min_length=1, max_length=2**20)] | None = Field(None, exclude=True)
    tie_word_embeddings: bool = True

    @model_validator(mode="after")
    def _settle_sizes(self) -> EncoderConfig:
        check_heads(("hidden_size", self.hidden_size), ("num_attention_heads", self.num_attention_heads))
        labels = 2 if self.id2label is None else len(self.id2label)
        if self.num_labels is None:
            self.num_labels = labels
        elif self.id2label is not None and self.num_labels != labels:
            raise ValueError(f"num_labels {self.num_labels} contradicts id2label with {labels} entries")
        return self

    @property
    def labels(self) -> int:
        return self.num_labels or 2


class Config(EncoderConfig):
    ARCHITECTURES: ClassVar[tuple[str, ...]] = ("BertForMaskedLM", "BertForSequenceClassification")


def heads(config: EncoderConfig) -> Heads:
    """Every query head has its own key and value head."""
    count = config.num_attention_heads
    return Heads(config.hidden_size, count, count, config.hidden_size // count)


def buffers(config: Config) -> tuple[BufferSpec, ...]:
    return position_buffers(config, "bert")


def position_buffers(config: EncoderConfig, model: str) -> tuple[BufferSpec, ...]:
    """What stands for position and token-type ids that are not given: one number for each position."""
    positions = (1, config.max_position_embeddings)
    return tuple(
        BufferSpec(f"{model}.embeddings.{name}", positions, INT64) for name in ("position_ids", "token_type_ids")
    )


def blocks(config: Config) -> tuple[Block, ...]:
    """The rows of `BertForMaskedLM` or `BertForSequenceClassification`, by `config.architecture`."""
    hidden = config.hidden_size
    embeddings = (
        *embedding("bert.embeddings.word_embeddings", config.vocab_size, hidden),
        *embedding("bert.embeddings.position_embeddings", config.max_position_embeddings, hidden),
        *embedding("bert.embeddings.token_type_embeddings", config.type_vocab_size, hidden),
        *norm("bert.embeddings.LayerNorm", hidden),
    )
    layers = Block(encoder_layer(config, "bert.encoder.layer.{i}"), repeat=config.num_hidden_layers)
    head = _classifier(config) if config.architecture == "BertForSequenceClassification" else _masked_lm(config)
    return Block(embeddings), layers, Block(head)


def _masked_lm(config: Config) -> tuple[ParamSpec, ...]:
    """The decoder is the word embedding and its bias the head's own, unless embeddings are not tied."""
    hidden, vocabulary = config.hidden_size, config.vocab_size
    rows = (
        ParamSpec("cls.predictions.bias", (vocabulary,), Role.HEAD, "linear"),
        *linear("cls.predictions.transform.dense", hidden, hidden, Role.HEAD),
        *norm("cls.predictions.transform.LayerNorm", hidden),
    )
    if not config.tie_word_embeddings:
        rows += linear("cls.predictions.decoder", hidden, vocabulary, Role.HEAD)
    return rows


def _classifier(config: Config) -> tuple[ParamSpec, ...]:
    hidden = config.hidden_size
    return (
        *linear("bert.pooler.dense", hidden, hidden, Role.HEAD),
        *linear("classifier", hidden, config.labels, Role.HEAD),
    )


def encoder_layer(config: EncoderConfig, path: str) -> tuple[ParamSpec, ...]:
    """One layer: self-attention with its norm after it, then the MLP with its norm after it."""
    hidden, inner = config.hidden_size, config.intermediate_size
    return (
        *linear(f"{path}.attention.self.query", hidden, hidden, Role.ATTENTION),
        *linear(f"{path}.attention.self.key", hidden, hidden, Role.ATTENTION),
        *linear(f"{path}.attention.self.value", hidden, hidden, Role.ATTENTION),
        *linear(f"{path}.attention.output.dense", hidden, hidden, Role.ATTENTION),
        *norm(f"{path}.attention.output.LayerNorm", hidden),
        *linear(f"{path}.intermediate.dense", hidden, inner, Role.MLP),
        *linear(f"{path}.output.dense", inner, hidden, Role.MLP),
        *norm(f"{path}.output.LayerNorm", hidden),
    )


# -- forward pass, on sizes (transformers 5.23, models/bert/modeling_bert.py) --------------------------


def forward(net: Network, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """BertForMaskedLM or BertForSequenceClassification, as the config's architecture says: (loss, logits)."""
    sequence_output = encode(net, "bert", input_ids, position_rows=1)
    if net.has("classifier.weight"):
        net.enter("loss", "loss")
        pooled = ops.tanh(net.linear("bert.pooler.dense", first_token(sequence_output)))
        pooled = ops.dropout(pooled, classification_dropout(net))
        logits = net.linear("classifier", pooled)
        return ops.cross_entropy(logits, labels), (logits,)
    return language_model_loss(net, partial(_head, net), sequence_output, labels, causal=False)


def _head(net: Network, hidden_states: Tensor) -> Tensor:
    hidden_states = net.linear("cls.predictions.transform.dense", hidden_states)
    hidden_states = activation(net.config["hidden_act"])(hidden_states)
    hidden_states = layer_norm(net, "cls.predictions.transform.LayerNorm", hidden_states)
    return net.linear("cls.predictions.decoder", hidden_states, bias="cls.predictions.bias")
