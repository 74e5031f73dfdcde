"""Qwen2 and Qwen2.5: LLaMA's stack with biases on query, key and value.

Source: transformers `models/qwen2/{configuration,modeling}_qwen2.py`.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import model_validator

from galore_mem.families.base import Positions, integer
from galore_mem.families.llama import DecoderConfig, buffers, decoder_blocks, forward, heads
from galore_mem.spec.model import Block

__all__ = ["Config", "blocks", "buffers", "forward", "heads"]


LayerType = Literal["full_attention", "sliding_attention"]
FULL: LayerType = "full_attention"
SLIDING: LayerType = "sliding_attention"


class Config(DecoderConfig):
    """`sliding_window` is None unless `use_sliding_window`; then `layer_types` says which layers use it."""

    ARCHITECTURES: ClassVar[tuple[str, ...]] = ("Qwen2ForCausalLM",)

    max_position_embeddings: Positions = 32768
    use_sliding_window: bool = False
    sliding_window: Positions | None = 4096
    max_window_layers: Annotated[int, integer(0, 10**4)] = 28
    layer_types: list[LayerType] | None = None

    @model_validator(mode="after")
    def _settle_window(self) -> Config:
        if not self.use_sliding_window:
            self.sliding_window = None
        layers = self.num_hidden_layers
        if self.layer_types is None:
            full = layers if self.sliding_window is None else min(self.max_window_layers, layers)
            self.layer_types = [FULL] * full + [SLIDING] * (layers - full)
        elif len(self.layer_types) != layers:
            raise ValueError(f"layer_types has {len(self.layer_types)} entries for num_hidden_layers {layers}")
        return self


def blocks(config: Config) -> tuple[Block, ...]:
    """The rows of `Qwen2ForCausalLM.named_parameters()`."""
    return decoder_blocks(config, qkv_bias=True, o_bias=False, mlp_bias=False)
