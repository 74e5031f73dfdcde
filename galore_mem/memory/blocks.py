"""Building blocks that transformers' families share, written with the same local variables as there.

What is alive at a peak depends on which names still hold a tensor, so each function mirrors the lifetime of
the names in the code it stands for (transformers 5.23; differences of 4.57 are in `STACKS`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from galore_mem.dtypes import BOOL, FLOAT32, INT64
from galore_mem.errors import InputError
from galore_mem.memory import ops
from galore_mem.memory.attention import sdpa, sdpa_kernel
from galore_mem.memory.autocast import autocast
from galore_mem.memory.checkpoint import checkpoint
from galore_mem.memory.losses import fused_linear_cross_entropy
from galore_mem.memory.network import Network
from galore_mem.memory.tape import Tensor


class Stack(NamedTuple):
    """What a version of transformers materialises.

    `causal_mask_with_sdpa`: a causal mask is built for sdpa although `is_causal` would do (4.57:
    masking_utils.py, find_packed_sequence_indices always returns a tensor when no attention mask is given);
    then sdpa gets a mask, and keys and values are repeated for grouped queries. Not when there is a cache.
    `window_lengths`: the cache of a layer with a sliding window has its length as a tensor (cache_utils.py,
    DynamicSlidingWindowLayer).
    """

    causal_mask_with_sdpa: bool
    window_lengths: bool


class Torch(NamedTuple):
    """What a version of torch does differently. `efficient_groups`: memory-efficient attention takes fewer key heads
    than query heads; before, such a call falls back to the composite form with its materialised scores."""

    efficient_groups: bool


TORCH = {"2.13": Torch(efficient_groups=False), "2.14": Torch(efficient_groups=True)}

STACKS = {
    "4.57": Stack(causal_mask_with_sdpa=True, window_lengths=False),
    "5.23": Stack(causal_mask_with_sdpa=False, window_lengths=True),
}

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": ops.silu,
    "swish": ops.silu,
    "gelu": ops.gelu,
    "gelu_pytorch_tanh": ops.gelu,
    "gelu_new": ops.gelu_new,
    "relu": ops.relu,
    "tanh": ops.tanh,
}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The activation of this name in transformers' ACT2FN. Raises `InputError` where its memory is not described."""
    if name not in ACTIVATIONS:
        raise InputError(f"the memory of activation {name!r} is not described; described: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def rms_norm(hidden_states: Tensor, weight: Tensor) -> Tensor:
    """LlamaRMSNorm: statistics in float32, the scaled result cast back before the weight."""
    input_dtype = hidden_states.dtype
    hidden_states = ops.to(hidden_states, FLOAT32)
    variance = ops.mean_last(ops.pow(hidden_states))
    hidden_states = ops.mul(hidden_states, ops.rsqrt(ops.shift(variance)))
    return ops.mul(weight, ops.to(hidden_states, input_dtype))


def rotary(hidden_states: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """LlamaRotaryEmbedding.forward: cos and sin of (1, length, head_dim), made in float32, in the model's format."""
    tape, length = hidden_states.tape, hidden_states.shape[1]
    with tape.no_grad():
        freqs = ops.mul(tape.empty((1, length, 1), FLOAT32), tape.empty((head_dim // 2,), FLOAT32))
        emb = ops.cat([freqs, freqs], -1)
        cos = ops.scale(ops.scale(emb))
        sin = ops.scale(ops.scale(emb))
        return ops.to(cos, hidden_states.dtype), ops.to(sin, hidden_states.dtype)


def _rotate_half(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    x1, x2 = ops.narrow(x, -1, half), ops.narrow(x, -1, half)
    return ops.cat([ops.scale(x2), x1], -1)


def apply_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """apply_rotary_pos_emb: q * cos + rotate_half(q) * sin, and the same for k."""
    cos, sin = ops.unsqueeze(cos, 1), ops.unsqueeze(sin, 1)
    q_embed = ops.add(ops.mul(q, cos), ops.mul(_rotate_half(q), sin))
    k_embed = ops.add(ops.mul(k, cos), ops.mul(_rotate_half(k), sin))
    return q_embed, k_embed


def causal_mask(
    net: Network, inputs_embeds: Tensor, sliding_window: int | None = None, *, cached: bool = False
) -> Tensor | None:
    """masking_utils.py, create_causal_mask without an attention mask: None where the kernel is told `is_causal`.

    Eager attention gets an additive mask (batch, 1, length, length) in the model's format, made from a boolean one;
    sdpa gets the boolean one if the version builds it, or if a sliding window is shorter than the sequence. `cached`:
    there is a cache for keys and values.
    """
    length, batch = inputs_embeds.shape[1], inputs_embeds.shape[0]
    attention, tape = net.setup.attention, net.tape
    windowed = sliding_window is not None and length >= sliding_window
    if attention == "flash":
        return None
    if attention == "sdpa" and not windowed and (cached or not STACKS[net.setup.transformers].causal_mask_with_sdpa):
        return None
    with tape.no_grad():
        shape = (1, 1, length, length)
        mask = tape.empty(shape, BOOL)
        if windowed:  # and_masks: a second comparison of indices, then both together
            window = tape.empty(shape, BOOL)
            mask = tape.empty(shape, BOOL)
            del window
        if attention == "sdpa":
            return ops.expand(mask, batch, 1, length, length)
        return tape.empty((batch, 1, length, length), inputs_embeds.dtype)


def repeat_kv(hidden_states: Tensor, n_rep: int) -> Tensor:
    """Key or value heads repeated for each query head: a copy."""
    if n_rep == 1:
        return hidden_states
    batch, heads, length, dim = hidden_states.shape
    repeated = ops.expand(ops.unsqueeze(hidden_states, 2), batch, heads, n_rep, length, dim)
    return ops.reshape(repeated, batch, heads * n_rep, length, dim)


def attention(
    net: Network,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    dropout: float = 0.0,
    upcast: bool = False,
    downcast: bool = True,
    causal: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """The attention function of the setup: (output as batch x length x heads x head_dim, weights if materialised).

    `upcast`: the softmax is taken in float32 (the LLaMA line), not in the scores' own format (GPT-2, BERT).
    `downcast`: what it gives has the format of query and value again, also where autocast made it float32 (all but
    BERT, where dropout works on float32 then).
    """
    groups = query.shape[1] // key.shape[1]
    if net.setup.attention == "eager":
        return _eager(query, repeat_kv(key, groups), repeat_kv(value, groups), mask, dropout, upcast, downcast)
    if mask is not None:
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    if net.setup.attention == "flash":
        kernel = "flash"
    else:
        groups_too = TORCH[net.setup.torch].efficient_groups
        capability = net.setup.compute_capability
        kernel = sdpa_kernel(autocast(query), mask, capability, key, dropout, efficient_groups=groups_too)
    out = sdpa(query, key, value, mask, kernel, dropout, causal=causal and mask is None)
    return ops.contiguous(ops.transpose(out, 1, 2)), None


def _eager(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, upcast: bool, downcast: bool
) -> tuple[Tensor, Tensor]:
    weights = ops.scale(ops.matmul(query, ops.transpose(key, 2, 3)))
    if mask is not None:
        weights = ops.add(weights, mask)
    if upcast:
        weights = ops.to(ops.softmax(weights, FLOAT32), query.dtype)
    else:
        weights = ops.softmax(weights)
        if downcast:
            weights = ops.to(weights, value.dtype)
    weights = ops.dropout(weights, dropout)
    output = ops.matmul(weights, value)
    return ops.contiguous(ops.transpose(output, 1, 2)), weights


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """(batch, length, heads * head_dim) seen as (batch, heads, length, head_dim)."""
    return ops.transpose(ops.view(x, *x.shape[:-1], -1, head_dim), 1, 2)


def language_model_loss(
    net: Network, head: Callable[[Tensor], Tensor], hidden_states: Tensor, labels: Tensor, *, causal: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The head and the loss: (loss, what the model's output object holds).

    eager: logits and cross-entropy. chunked: both over 1,024 rows at a time, each checkpointed. fused: Liger's
    kernel, which leaves gradients instead of logits. `causal` losses (loss_utils.py, ForCausalLMLoss) work on a
    float32 copy of the logits and on shifted labels; masked ones (nn.CrossEntropyLoss) on the logits as they are.
    """
    net.enter("loss", "loss")
    if net.setup.loss == "eager":
        logits = head(hidden_states)
        return _token_loss(logits, labels, causal=causal), (logits,)
    rows = ops.reshape(hidden_states, -1, hidden_states.shape[-1])
    if net.setup.loss == "fused":
        return fused_linear_cross_entropy(net, rows), ()
    return _chunked_loss(rows, head, causal=causal), ()


LOSS_CHUNK = 1024  # rows at a time; libraries that chunk the loss choose theirs between 256 and a few thousand


def _chunked_loss(rows: Tensor, head: Callable[[Tensor], Tensor], *, causal: bool) -> Tensor:
    total = None
    for start in range(0, rows.shape[0], LOSS_CHUNK):
        length = min(LOSS_CHUNK, rows.shape[0] - start)
        target = rows.tape.empty((length,), INT64)

        def loss(chunk: Tensor, target: Tensor = target) -> Tensor:
            logits = head(chunk)
            return ops.cross_entropy(ops.to(logits, FLOAT32) if causal else logits, target)

        part = checkpoint(loss, ops.narrow(rows, 0, length))
        total = part if total is None else ops.add(total, part)
    assert total is not None
    return total


def _token_loss(logits: Tensor, labels: Tensor, *, causal: bool) -> Tensor:
    padded = None
    if causal:
        logits = ops.to(logits, FLOAT32)
        with labels.tape.no_grad():
            batch, length = labels.shape
            padded = labels.tape.empty((batch, length + 1), INT64)
            # the slice without the first column is contiguous, hence no copy, for a batch of one
            labels = labels.tape.empty(labels.shape, INT64) if batch > 1 else padded.like((batch, length))
    logits = ops.view(logits, -1, logits.shape[-1])
    loss = ops.cross_entropy(logits, labels)
    del padded
    return loss


def first_token(hidden_states: Tensor) -> Tensor:
    """hidden_states[:, 0]: (batch, hidden); backward writes into zeros of the whole sequence."""
    picked = ops.narrow(hidden_states, 1, 1)
    return ops.view(picked, hidden_states.shape[0], hidden_states.shape[2])
