"""How the training is run: everything besides the model and the method that decides memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from galore_mem.dtypes import BFLOAT16, FLOAT16, FLOAT32, DType
from galore_mem.errors import InputError, unknown
from galore_mem.releases import nearest

ATTENTION = ("sdpa", "eager", "flash")
LOSSES = ("eager", "fused", "chunked")
DEVICES = ("cuda", "cpu")
# Until when the loop holds what forward returned: it lets it go before backward, or after it, or after the step, or
# when the next one takes its name.
KEPT_LOGITS = ("none", "backward", "step", "next")
HELD = {
    "none": "is dropped before backward", "backward": "lives until backward is over",
    "step": "lives until the step is over", "next": "lives until the next forward pass has returned",
}  # fmt: skip
# Versions of transformers whose modeling code the families follow; the newest is the default.
TRANSFORMERS = ("4.57", "5.23")
# How a model that is not quantized comes to the card; a quantized one is read matrix by matrix.
LOADED = {
    "to-device": "model.to(device), tensor by tensor",
    "device-map": "from_pretrained with a device map, which takes a block of its size first",
}
LOADS = tuple(LOADED)
# Versions of torch that differ in which attention kernel runs; the one the tests run with is the default.
TORCH = ("2.13", "2.14")


class Recipe(NamedTuple):
    """Which format the weights, the master copy and the autocast region use.

    Gradients have the weights' format. With a `master` copy the optimizer holds, and works on, a
    second set of weights in that format, and its states follow it.
    """

    name: str
    weights: DType
    autocast: DType | None = None
    master: DType | None = None

    @property
    def trained(self) -> DType:
        """The format of the tensors the optimizer updates, hence of its states."""
        return self.master or self.weights


RECIPES = {
    r.name: r
    for r in (
        Recipe("pure-bf16", BFLOAT16),
        Recipe("pure-fp16", FLOAT16),
        Recipe("fp32", FLOAT32),
        Recipe("amp-bf16", FLOAT32, autocast=BFLOAT16),
        Recipe("amp-fp16", FLOAT32, autocast=FLOAT16),
        Recipe("bf16-fp32-master", BFLOAT16, master=FLOAT32),
    )
}


def recipe(name: str) -> Recipe:
    """The recipe of this name. Raises `InputError` with the known ones."""
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    return RECIPES[name]


@dataclass(frozen=True, slots=True)
class Setup:
    """The training loop and its inputs.

    The loop's defaults are those of the transformers Trainer: gradients are set to None after each step
    (`keep_gradients=False`; True zeroes them), the model's output is dropped before backward (`keep_logits="none"`),
    non-reentrant checkpointing, no key/value cache. A loop whose variable `outputs` is deleted after `loss.backward()`
    has `keep_logits="backward"`, one in which it lives until the step is over `"step"` (True; False is `"none"`), and
    one that binds each output to the same name without deleting the one before `"next"`. `use_cache`, which a decoder's
    config has on: the output then holds keys and values of each layer, unless they are checkpointed.

    `device` decides what differs between allocators and kernels: on `cuda` sizes are rounded to blocks of
    512 bytes, cuBLAS workspaces are resident and torch's step counters stay on the host; on `cpu`
    sizes are exact and the counters are counted.
    """

    recipe: Recipe = field(default=RECIPES["pure-bf16"])
    batch_size: int = 1
    seq_len: int = 2048
    attention: str = "sdpa"
    gradient_checkpointing: bool = False
    loss: str = "eager"
    layerwise: bool = False
    keep_gradients: bool = False
    keep_logits: str | bool = KEPT_LOGITS[0]
    use_cache: bool = False
    gradient_accumulation: int = 1
    load: str = LOADS[0]
    transformers: str = TRANSFORMERS[-1]
    torch: str = TORCH[0]
    device: str = "cuda"
    compute_capability: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "transformers", nearest("transformers", self.transformers, TRANSFORMERS))
        object.__setattr__(self, "torch", nearest("torch", self.torch, TORCH))
        if isinstance(self.keep_logits, bool):
            object.__setattr__(self, "keep_logits", "step" if self.keep_logits else "none")
        for name, value, limit in (
            ("batch-size", self.batch_size, 2**20),
            ("seq-len", self.seq_len, 2**24),
            ("gradient-accumulation", self.gradient_accumulation, 2**20),
        ):
            if not 1 <= value <= limit:
                raise InputError(f"{name} must be between 1 and {limit}, got {value}")
        for name, given, allowed in (
            ("attention", self.attention, ATTENTION),
            ("loss", self.loss, LOSSES),
            ("device", self.device, DEVICES),
            ("keep-logits-until", str(self.keep_logits), KEPT_LOGITS),
            ("load", self.load, LOADS),
        ):
            if given not in allowed:
                raise unknown(name, given, allowed)
        if self.layerwise and self.keep_gradients:
            raise InputError("--layerwise frees each gradient in the backward hook; it excludes --keep-gradients")

    @property
    def waits(self) -> bool:
        """Does a layer-wise update wait for several backward passes?"""
        return self.layerwise and self.gradient_accumulation > 1

    @property
    def loop(self) -> str:
        """What the training loop leaves behind, in words."""
        gradients = "zeroed and kept" if self.keep_gradients else "None at the start"
        cached = ", with keys and values," if self.use_cache else ""
        return f"gradients are {gradients}; the model's output{cached} {HELD[str(self.keep_logits)]}"

    @property
    def granularity(self) -> int:
        """Bytes an allocation is rounded up to: 512 on CUDA (AllocatorConfig.h, kMinBlockSize), exact on the CPU."""
        return 512 if self.device == "cuda" else 1
