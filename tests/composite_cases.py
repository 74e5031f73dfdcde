"""Pieces of real models beside the twin: the lifetimes of names, and gradients that meet."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.nn.functional as F  # noqa: N812 # its customary name
from op_cases import HEADS, ONEDNN, PER_THREAD, ROW, TILES, B, D, H, K, N, S, conv1d, heads
from side_by_side import Case, Frozen, Ids
from torch.utils.checkpoint import checkpoint
from transformers.activations import NewGELUActivation
from transformers.models.llama.modeling_llama import (
    LlamaRMSNorm,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from galore_mem.dtypes import BFLOAT16, FLOAT32
from galore_mem.memory import blocks, ops
from galore_mem.memory import checkpoint as twin
from galore_mem.memory.attention import sdpa
from galore_mem.memory.tape import Tensor

_NORM = LlamaRMSNorm(D)
_NEW_GELU = NewGELUActivation().forward


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.func.functional_call(_NORM, {"weight": weight}, (x,))


def rotated(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    q, k = apply_rotary_pos_emb(heads(q), heads(k), cos, sin)
    return q * k


def rotated_twin(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    q, k = blocks.apply_rotary(ops.transpose(q, 1, 2), ops.transpose(k, 1, 2), cos, sin)
    return ops.mul(q, k)


def mlp(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def mlp_twin(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return ops.linear(ops.mul(ops.silu(ops.linear(x, gate)), ops.linear(x, up)), down)


MLP = ((N, D), (N, D), (D, N))


def eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    module = SimpleNamespace(num_key_value_groups=q.shape[2] // k.shape[2], training=True)
    return eager_attention_forward(module, heads(q), heads(k), heads(v), mask, scaling=K**-0.5, dropout=0.0)[0]


def eager_twin(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    query, key, value = (ops.transpose(t, 1, 2) for t in (q, k, v))
    groups = query.shape[1] // key.shape[1]
    key, value = blocks.repeat_kv(key, groups), blocks.repeat_kv(value, groups)
    weights = ops.scale(ops.matmul(query, ops.transpose(key, 2, 3)))
    if mask is not None:
        weights = ops.add(weights, mask)
    weights = ops.to(ops.softmax(weights, FLOAT32), query.dtype)
    output = ops.matmul(weights, value)
    return ops.contiguous(ops.transpose(output, 1, 2))


def attention(x: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, o: torch.Tensor) -> torch.Tensor:
    query, key, value = (F.linear(x, w).view(B, S, -1, K).transpose(1, 2) for w in (q, k, v))
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    out = out.transpose(1, 2).contiguous()
    return F.linear(out.reshape(B, S, -1), o)


def attention_twin(x: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> Tensor:
    query, key, value = (blocks.split_heads(ops.linear(x, w), K) for w in (q, k, v))
    out = sdpa(query, key, value, None, "cpu")
    out = ops.contiguous(ops.transpose(out, 1, 2))
    return ops.linear(ops.reshape(out, B, S, -1), o)


PROJECTIONS = ((D, D), (2 * K, D), (2 * K, D), (D, D))


def layer(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
    """A decoder layer, names as in LlamaDecoderLayer.forward."""
    residual = x
    x = rms_norm(x, weights[0])
    x = attention(x, *weights[1:5])
    x = residual + x
    residual = x
    x = rms_norm(x, weights[5])
    x = mlp(x, *weights[6:9])
    return residual + x


def layer_twin(x: Tensor, *weights: Tensor) -> Tensor:
    residual = x
    x = blocks.rms_norm(x, weights[0])
    x = attention_twin(x, *weights[1:5])
    x = ops.add(residual, x)
    residual = x
    x = blocks.rms_norm(x, weights[5])
    x = mlp_twin(x, *weights[6:9])
    return ops.add(residual, x)


LAYER = ((D,), *PROJECTIONS, (D,), *MLP)
KERNELS = {**TILES, **ONEDNN}


def gpt2(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
    """GPT2Block.forward with sdpa and without dropout."""
    residual = x
    hidden = F.layer_norm(x, (D,), *weights[:2])
    query, key, value = conv1d(hidden, *weights[2:4]).split(D, dim=2)
    query, key, value = (t.view(B, S, H, K).transpose(1, 2) for t in (query, key, value))
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    out = out.transpose(1, 2).contiguous().reshape(B, S, D)
    hidden = conv1d(out, *weights[4:6]) + residual
    residual = hidden
    hidden = F.layer_norm(hidden, (D,), *weights[6:8])
    hidden = conv1d(_NEW_GELU(conv1d(hidden, *weights[8:10])), *weights[10:12])
    return residual + hidden


def gpt2_twin(x: Tensor, *weights: Tensor) -> Tensor:
    residual = x
    hidden = ops.layer_norm(x, *weights[:2])
    query, key, value = ops.split(ops.conv1d(hidden, *weights[2:4]), D, 2)
    query, key, value = (blocks.split_heads(t, K) for t in (query, key, value))
    out = sdpa(query, key, value, None, "cpu")
    out = ops.reshape(ops.contiguous(ops.transpose(out, 1, 2)), B, S, D)
    hidden = ops.add(ops.conv1d(out, *weights[4:6]), residual)
    residual = hidden
    hidden = ops.layer_norm(hidden, *weights[6:8])
    hidden = ops.conv1d(ops.gelu_new(ops.conv1d(hidden, *weights[8:10])), *weights[10:12])
    return ops.add(residual, hidden)


GPT2 = ((D,), (D,), (D, 3 * D), (3 * D,), (D, D), (D,), (D,), (D,), (D, N), (N,), (N, D), (D,))


def tied(ids: torch.Tensor, labels: torch.Tensor, table: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    embedded = F.embedding(ids, table)
    x = rms_norm(embedded, weight)
    return F.cross_entropy(F.linear(x, table).float().view(-1, table.shape[0]), labels)


def tied_twin(ids: Tensor, labels: Tensor, table: Tensor, weight: Tensor) -> Tensor:
    embedded = ops.embedding(table, ids)
    x = blocks.rms_norm(embedded, weight)
    logits = ops.to(ops.linear(x, table), FLOAT32)
    return ops.cross_entropy(ops.view(logits, -1, table.shape[0]), labels)


# -- programs made of others -----------------------------------------------------------------------------


def checkpointed(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def run(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        return checkpoint(lambda x: function(x, *weights), x, use_reentrant=False)

    return run


def checkpointed_twin(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, *weights: twin.checkpoint(lambda x: function(x, *weights), x)


def twice(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda x, *weights: function(function(x, *weights), *weights)


def under_autocast(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def run(*inputs: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return function(*inputs)

    return run


def under_autocast_twin(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(*inputs: Tensor) -> Tensor:
        with inputs[0].tape.autocast_region(BFLOAT16):
            return function(*inputs)

    return run


AUTOCAST = {"float32": "oneDNN reorders operands into blocked copies"}

CASES = [
    Case("RMSNorm", (ROW, (D,)), rms_norm, blocks.rms_norm, numbers=True),
    Case("rotary", (HEADS, HEADS, Frozen((1, S, K)), Frozen((1, S, K))), rotated, rotated_twin),
    Case("SwiGLU", (ROW, *MLP), mlp, mlp_twin, scratch=ONEDNN),
    Case("NewGELU", (ROW,), _NEW_GELU, ops.gelu_new, numbers=True),
    Case("GPT-2", (ROW, *GPT2), gpt2, gpt2_twin, numbers=True, scratch={**KERNELS, **PER_THREAD}),
    Case("eager attention", (HEADS, HEADS, HEADS), eager, eager_twin, numbers=True, scratch=ONEDNN),
    Case(
        "eager attention with a mask",
        (HEADS, HEADS, HEADS, Frozen((B, 1, S, S))),
        eager,
        eager_twin,
        numbers=True,
        scratch=ONEDNN,
    ),
    Case(
        "eager attention, grouped queries",
        (HEADS, (B, S, 2, K), (B, S, 2, K)),
        eager,
        eager_twin,
        numbers=True,
        scratch=ONEDNN,
    ),
    Case("three projections of one input", (ROW, *PROJECTIONS), attention, attention_twin, scratch=KERNELS),
    Case("layer", (ROW, *LAYER), layer, layer_twin, numbers=True, scratch=KERNELS),
    Case("two layers of shared weights", (ROW, *LAYER), twice(layer), twice(layer_twin), numbers=True, scratch=KERNELS),
    Case(
        "tied embedding",
        (Ids((B, S), 50), Ids((B * S,), 50), (50, D), (D,)),
        tied,
        tied_twin,
        numbers=True,
        scratch=ONEDNN,
    ),
    Case("checkpointed MLP", (ROW, *MLP), checkpointed(mlp), checkpointed_twin(mlp_twin), scratch=ONEDNN),
    Case(
        "checkpointed activation",
        (ROW,),
        checkpointed(lambda x: (x * x).tanh()),
        checkpointed_twin(lambda x: ops.tanh(ops.mul(x, x))),
    ),
    Case("checkpointed norm", (ROW, (D,)), checkpointed(rms_norm), checkpointed_twin(blocks.rms_norm), numbers=True),
    Case(
        "checkpointed layer",
        (ROW, *LAYER),
        checkpointed(layer),
        checkpointed_twin(layer_twin),
        numbers=True,
        scratch=KERNELS,
    ),
    Case(
        "two checkpointed layers",
        (ROW, *LAYER),
        twice(checkpointed(layer)),
        twice(checkpointed_twin(layer_twin)),
        numbers=True,
        scratch=KERNELS,
    ),
    Case(
        "autocast MLP",
        (ROW, *MLP),
        under_autocast(mlp),
        under_autocast_twin(mlp_twin),
        scratch=AUTOCAST,
        dtypes=("float32",),
    ),
    Case(
        "autocast layers of shared weights",
        (ROW, *LAYER),
        under_autocast(twice(layer)),
        under_autocast_twin(twice(layer_twin)),
        numbers=True,
        scratch={**TILES, **AUTOCAST},
        dtypes=("float32",),
    ),
    Case(
        "autocast checkpointed layers",
        (ROW, *LAYER),
        under_autocast(twice(checkpointed(layer))),
        under_autocast_twin(twice(checkpointed_twin(layer_twin))),
        numbers=True,
        scratch={**TILES, **AUTOCAST},
        dtypes=("float32",),
    ),
]
