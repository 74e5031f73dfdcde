"""RoBERTa: BERT's encoder; other embeddings order, heads and tokenizer sizes.

Source: transformers `models/roberta/{configuration,modeling}_roberta.py`, version 5 (which registers the position
embedding last).
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar

from galore_mem.families.base import embedding, linear, norm
from galore_mem.families.bert import EncoderConfig, encoder_layer, heads, position_buffers
from galore_mem.families.encoder import classification_dropout, encode, first_token, layer_norm
from galore_mem.memory import ops
from galore_mem.memory.blocks import language_model_loss
from galore_mem.memory.network import Network
from galore_mem.memory.tape import Tensor
from galore_mem.spec.model import Block, BufferSpec, ParamSpec, Role

__all__ = ["Config", "blocks", "buffers", "heads"]


class Config(EncoderConfig):
    ARCHITECTURES: ClassVar[tuple[str, ...]] = ("RobertaForMaskedLM", "RobertaForSequenceClassification")


def blocks(config: Config) -> tuple[Block, ...]:
    """The rows of `RobertaForMaskedLM` or `RobertaForSequenceClassification`, by `config.architecture`."""
    hidden = config.hidden_size
    embeddings = (
        *embedding("roberta.embeddings.word_embeddings", config.vocab_size, hidden),
        *embedding("roberta.embeddings.token_type_embeddings", config.type_vocab_size, hidden),
        *norm("roberta.embeddings.LayerNorm", hidden),
        *embedding("roberta.embeddings.position_embeddings", config.max_position_embeddings, hidden),
    )
    layers = Block(encoder_layer(config, "roberta.encoder.layer.{i}"), repeat=config.num_hidden_layers)
    head = _classifier(config) if config.architecture == "RobertaForSequenceClassification" else _masked_lm(config)
    return Block(embeddings), layers, Block(head)


def buffers(config: Config) -> tuple[BufferSpec, ...]:
    return position_buffers(config, "roberta")


def _masked_lm(config: Config) -> tuple[ParamSpec, ...]:
    """The decoder is the word embedding and its bias the head's own, unless embeddings are not tied."""
    hidden, vocabulary = config.hidden_size, config.vocab_size
    rows = (
        ParamSpec("lm_head.bias", (vocabulary,), Role.HEAD, "linear"),
        *linear("lm_head.dense", hidden, hidden, Role.HEAD),
        *norm("lm_head.layer_norm", hidden),
    )
    if not config.tie_word_embeddings:
        rows += linear("lm_head.decoder", hidden, vocabulary, Role.HEAD)
    return rows


def _classifier(config: Config) -> tuple[ParamSpec, ...]:
    hidden = config.hidden_size
    return (
        *linear("classifier.dense", hidden, hidden, Role.HEAD),
        *linear("classifier.out_proj", hidden, config.labels, Role.HEAD),
    )


# -- forward pass, on sizes (transformers 5.23, models/roberta/modeling_roberta.py) --------------------


def forward(net: Network, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """RobertaForMaskedLM or RobertaForSequenceClassification, as the config's architecture says: (loss, logits)."""
    sequence_output = encode(net, "roberta", input_ids, position_rows=input_ids.shape[0])
    if net.has("classifier.dense.weight"):
        net.enter("loss", "loss")
        logits = _classify(net, sequence_output)
        return ops.cross_entropy(logits, labels), (logits,)
    return language_model_loss(net, partial(_head, net), sequence_output, labels, causal=False)


def _head(net: Network, features: Tensor) -> Tensor:
    x = net.linear("lm_head.dense", features)
    x = ops.gelu(x)
    x = layer_norm(net, "lm_head.layer_norm", x)
    return net.linear("lm_head.decoder", x, bias="lm_head.bias")


def _classify(net: Network, features: Tensor) -> Tensor:
    dropout = classification_dropout(net)
    x = first_token(features)
    x = ops.dropout(x, dropout)
    x = net.linear("classifier.dense", x)
    x = ops.tanh(x)
    x = ops.dropout(x, dropout)
    return net.linear("classifier.out_proj", x)
