"""Keys and values that a decoder's output holds with `use_cache` (transformers 5.23, cache_utils.py, DynamicCache)."""

from __future__ import annotations

from galore_mem.dtypes import INT64
from galore_mem.memory import ops
from galore_mem.memory.blocks import STACKS
from galore_mem.memory.network import Network
from galore_mem.memory.tape import Tensor


class Cache:
    """What the layers put their keys and values into: `held`, which lives as long as the model's output.

    `window`: how far the layers look back, if not to the start. Each then has that length as a tensor: in host memory
    from the beginning, on an accelerator from its first keys on.
    """

    def __init__(self, net: Network, window: int | None = None) -> None:
        on_host = net.tape.device == "cpu"
        lengths = window is not None and STACKS[net.setup.transformers].window_lengths
        self.held = [net.tape.empty((), INT64) for _ in range(net.layer_count)] if lengths and on_host else []
        self._moves_lengths = lengths and not on_host

    def update(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values joined to those before them, which are none: a copy, with which the layer goes on
        (DynamicLayer.update; DynamicSlidingWindowLayer keeps views of it). Those none have the keys' format, which in
        an autocast region rotary embedding makes float32: there values are widened before they are joined."""
        if self._moves_lengths:
            self.held.append(key.tape.empty((), INT64))
        keys, values = ops.cat([key], 2), ops.cat([ops.to(value, key.dtype)], 2)
        self.held += keys, values
        return keys, values


def cache(net: Network, window: int | None = None) -> Cache | None:
    """The cache that a decoder makes; none while its layers are checkpointed (utils/generic.py,
    merge_with_config_defaults; before transformers 5 check_model_inputs there, and modeling_gpt2.py)."""
    return Cache(net, window) if net.setup.use_cache and not net.setup.gradient_checkpointing else None
