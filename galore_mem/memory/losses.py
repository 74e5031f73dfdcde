"""Cross-entropy fused with the head: the logits never exist as a whole."""

from __future__ import annotations

from collections.abc import Sequence

from galore_mem.dtypes import FLOAT32
from galore_mem.memory.network import Network
from galore_mem.memory.tape import Grads, Tensor
from galore_mem.units import ceil_div


def fused_linear_cross_entropy(net: Network, rows: Tensor) -> Tensor:
    """Liger-Kernel, ops/fused_linear_cross_entropy.py: gradients of the input and of the head's weight are made in the
    forward pass, from logits of one chunk of rows at a time, and saved instead of logits.

    Chunks are the next power of two of rows / ceil(vocabulary / hidden).
    """
    tape, count, hidden = rows.tape, rows.shape[0], rows.shape[1]
    weight = net.head_weight()
    vocabulary = weight.shape[0]
    chunk = 1 << (ceil_div(count, ceil_div(vocabulary, hidden)) - 1).bit_length()
    for_x, for_w = rows.requires_grad, weight.requires_grad

    def backward(saved: Sequence[Tensor], grads: Sequence[Tensor | None]) -> Grads:
        grad_x = saved[0] if for_x else None
        return grad_x, saved[-1] if for_w else None

    node = tape.node("FusedLinearCrossEntropyBackward", (rows, weight), (), backward)
    keep = [tape.empty(rows.shape, rows.dtype)] if for_x else []
    if for_w:
        keep.append(tape.empty(weight.shape, weight.dtype))
    losses = tape.empty((count,), FLOAT32)
    logits = tape.empty((min(chunk, count), vocabulary), rows.dtype)
    part = tape.empty((min(chunk, count), hidden), rows.dtype)
    del logits, part
    out = tape.empty((), FLOAT32)
    del losses
    tape.bind(node, out)
    tape.save(node, keep)
    return out
