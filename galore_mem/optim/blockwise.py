"""Both moments of Adam in 8 bits, on the block-wise kernels of bitsandbytes.

Dettmers, Lewis, Shleifer, Zettlemoyer: 8-bit Optimizers via Block-wise Quantization, arXiv:2110.02861. A moment is one
byte per element, an index into a table of 256 values between -1 (second moment: 0) and 1, and a float32 maximum per
256 elements. Tensors of fewer than 4096 elements keep both moments in float32, as in bitsandbytes' own optimizers.

bitsandbytes 0.49 and later; on the CPU its optimizers run from 0.50 on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import import_module
from re import match
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from galore_mem.errors import InputError
from galore_mem.methods.adamw_8bit import BLOCK, MIN_8BIT_SIZE

OLDEST = (0, 49)
STATES = (("state1", "absmax1", "qmap1"), ("state2", "absmax2", "qmap2"))
TABLES = ("qmap1", "qmap2")


@cache
def kernels() -> ModuleType:
    """`bitsandbytes.functional`. Raises `InputError` where it is missing or too old."""
    needed = f"8-bit moments need bitsandbytes {'.'.join(map(str, OLDEST))} or later"
    try:
        package = import_module("bitsandbytes")
        functional = import_module("bitsandbytes.functional")
    except ImportError as error:
        raise InputError(f"{needed}, which cannot be imported ({error}); install it, or galore-mem[verify]") from error
    version = str(package.__version__)
    numbers = match(r"(\d+)\.(\d+)", version)
    if numbers and tuple(map(int, numbers.groups())) < OLDEST:
        raise InputError(f"{needed}; {version} is installed")
    return functional


class Tables:
    """The two tables of an optimizer, once per device: `qmap1` has signs, `qmap2` has none."""

    def __init__(self) -> None:
        self._of: dict[tuple[str, torch.device], Tensor] = {}

    def on(self, device: torch.device) -> dict[str, Tensor]:
        for name in TABLES:
            if (name, device) not in self._of:
                made = kernels().create_dynamic_map(signed=name == "qmap1")
                self._of[name, device] = made.to(device)
        return {name: self._of[name, device] for name in TABLES}

    def adopt(self, states: Sequence[dict[str, Any]]) -> None:
        """Takes the tables of loaded states for its own, so that all share one storage again."""
        self._of.clear()
        for state in states:
            for name in TABLES:
                if name in state:
                    state[name] = self._of.setdefault((name, state[name].device), state[name])


def is_8bit(shape: Sequence[int]) -> bool:
    """Does a tensor of this shape get 8-bit moments?"""
    return torch.Size(shape).numel() >= MIN_8BIT_SIZE


def begin(state: dict[str, Any], like: Tensor, tables: Tables) -> None:
    """Puts moments of zeros for a tensor into its state."""
    if not is_8bit(like.shape):
        for moment, _, _ in STATES:
            state[moment] = torch.zeros(like.shape, dtype=torch.float32, device=like.device)
        return
    shared = tables.on(like.device)
    for moment, maxima, table in STATES:
        state[moment] = torch.zeros(like.shape, dtype=torch.uint8, device=like.device)
        state[maxima] = torch.zeros(-(-like.numel() // BLOCK), device=like.device)
        state[table] = shared[table]


def adam_(
    p: Tensor,
    grad: Tensor,
    state: Mapping[str, Any],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """bitsandbytes' AdamW of `p`, in place, with the moments of `state`, at step `state["step"] + 1`.

    `p` and `grad` have one format and are contiguous: the kernels read memory in its order.
    """
    told: dict[str, Any] = {
        "g": grad, "p": p, "state1": state["state1"], "state2": state["state2"], "beta1": betas[0], "beta2": betas[1],
        "eps": eps, "step": state.get("step", 0) + 1, "lr": lr, "weight_decay": weight_decay,
    }  # fmt: skip
    if "qmap1" in state:
        tables = {name: state[name] for name in (*TABLES, "absmax1", "absmax2")}
        kernels().optimizer_update_8bit_blockwise("adam", **told, **tables, beta3=0.0, alpha=0.0)
    else:
        kernels().optimizer_update_32bit("adam", **told)


def change_(state: dict[str, Any], by: Callable[[Tensor, bool], Tensor]) -> None:
    """Replaces both moments by what `by(moment in float32, is it the second?)` makes of them, of the same shape."""
    for i, (moment, maxima, table) in enumerate(STATES):
        if table not in state:
            state[moment].copy_(by(state[moment], i == 1))
            continue
        told = {"code": state[table], "blocksize": BLOCK}
        plain = kernels().dequantize_blockwise(state[moment], absmax=state[maxima], **told)
        kernels().quantize_blockwise(by(plain, i == 1), absmax=state[maxima], out=state[moment], **told)
