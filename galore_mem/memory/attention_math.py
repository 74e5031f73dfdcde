"""Scaled dot-product attention written out in matrix products: what runs where no fused kernel can."""

from __future__ import annotations

from galore_mem.dtypes import BFLOAT16, BOOL, FLOAT16, FLOAT32
from galore_mem.memory import ops
from galore_mem.memory.tape import Tensor


def sdpa_math(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, *, causal: bool) -> Tensor:
    """aten/src/ATen/native/transformers/attention.cpp, _scaled_dot_product_attention_math, with its local names:
    16-bit inputs are computed in float32, and the scores are there as a whole."""
    query_acc, key_acc, value_acc = _accurate(q), _accurate(k), _accurate(v)
    query = ops.scale(query_acc)
    if causal and mask is None:
        mask = _causal(query, k.shape[2])
    groups = q.shape[1] // k.shape[1]
    key_expanded, value_expanded = _repeat_interleave(key_acc, groups), _repeat_interleave(value_acc, groups)
    attn = ops.matmul(query, ops.scale(ops.transpose(key_expanded, 2, 3)))
    if mask is not None:
        attn = ops.add_(attn, mask)
    attn = ops.safe_softmax(attn)
    attn = ops.dropout(attn, dropout)
    weights = ops.to(attn, q.dtype)  # returned too, and dropped by the caller
    out = ops.to(ops.matmul(attn, value_expanded), q.dtype)
    del weights
    return out


def _accurate(t: Tensor) -> Tensor:
    return ops.to(t, FLOAT32) if t.dtype in (FLOAT16, BFLOAT16) else t


def _causal(query: Tensor, keys: int) -> Tensor:
    """ones.tril(), then additive: boolean twice, and once in the query's format."""
    tape, shape = query.tape, (query.shape[2], keys)
    ones = tape.empty(shape, BOOL)
    lower = tape.empty(shape, BOOL)
    del ones
    mask = tape.empty(shape, query.dtype)
    del lower
    return mask


def _repeat_interleave(t: Tensor, groups: int) -> Tensor:
    if groups == 1:
        return t
    batch, heads, length, dim = t.shape
    expanded = ops.expand(ops.unsqueeze(t, 2), batch, heads, groups, length, dim)
    return ops.view(ops.contiguous(expanded), batch, heads * groups, length, dim)
