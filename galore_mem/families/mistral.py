"""Mistral: LLaMA's stack without biases, with attention limited to a sliding window in some versions.

Source: transformers `models/mistral/{configuration,modeling}_mistral.py`.
"""

from __future__ import annotations

from typing import ClassVar

from galore_mem.families.base import Positions, Size
from galore_mem.families.llama import DecoderConfig, buffers, decoder_blocks, forward, heads
from galore_mem.spec.model import Block

__all__ = ["Config", "blocks", "buffers", "forward", "heads"]


class Config(DecoderConfig):
    """`sliding_window` is 4096 when the key is absent and None (full attention) when it is null."""

    ARCHITECTURES: ClassVar[tuple[str, ...]] = ("MistralForCausalLM",)

    num_key_value_heads: Size  # transformers' default is 8, and null is refused
    max_position_embeddings: Positions = 131072
    sliding_window: Positions | None = 4096


def blocks(config: Config) -> tuple[Block, ...]:
    """The rows of `MistralForCausalLM.named_parameters()`."""
    return decoder_blocks(config, qkv_bias=False, o_bias=False, mlp_bias=False)
