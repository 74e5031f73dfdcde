"""Which rows share a second moment, written out as lists of row numbers.

Adam-mini, arXiv:2406.16793, algorithm 3, and the package since 1.1: query and key by head; value, attention's output,
MLP, embedding and head by output row (of the last two: by token); norms as a whole; biases one by one.
"""

from __future__ import annotations

from dataclasses import dataclass

from literal import Blocks

from galore_mem.spec.model import Heads

# 12 / 4 = 3, but a head has 5 rows; two query heads share a key head
HEADS = Heads(hidden_size=12, num_attention_heads=4, num_key_value_heads=2, head_dim=5)


def by_head(heads: int, head_dim: int, first: int = 0) -> list[list[int]]:
    """Head h is rows h·d to h·d + d - 1."""
    return [[first + h * head_dim + k for k in range(head_dim)] for h in range(heads)]


def one_by_one(rows: int, first: int = 0) -> list[list[int]]:
    return [[first + i] for i in range(rows)]


def in_sequence(heads: Heads) -> list[list[int]]:
    """All queries, then all keys, then all values."""
    d = heads.head_dim
    q = heads.num_attention_heads * d
    k = heads.num_key_value_heads * d
    return [
        *by_head(heads.num_attention_heads, d),
        *by_head(heads.num_key_value_heads, d, first=q),
        *one_by_one(k, first=q + k),
    ]


def interleaved(heads: Heads) -> list[list[int]]:
    """Head by head: its query, its key, its values."""
    d, blocks = heads.head_dim, []
    for h in range(heads.num_attention_heads):
        at = 3 * h * d
        blocks.append([at + i for i in range(d)])
        blocks.append([at + d + i for i in range(d)])
        blocks += [[at + 2 * d + i] for i in range(d)]
    return blocks


@dataclass(frozen=True)
class Kind:
    """A parameter with its blocks."""

    name: str
    shape: tuple[int, ...]
    blocks: Blocks
    transposed: bool = False
    projected: bool = True

    def __str__(self) -> str:
        return self.name


FUSED = (
    Kind("h.0.self_attn.qkv_proj.weight", (40, 12), in_sequence(HEADS)),
    Kind("h.0.attn.c_attn.weight", (12, 40), in_sequence(HEADS), transposed=True),
    Kind("h.0.attention.query_key_value.weight", (60, 12), interleaved(HEADS)),
)
KINDS = (
    Kind("h.0.self_attn.q_proj.weight", (20, 12), by_head(4, 5)),
    Kind("h.0.self_attn.k_proj.weight", (10, 12), by_head(2, 5)),
    Kind("h.0.self_attn.v_proj.weight", (10, 12), one_by_one(10)),
    Kind("h.0.self_attn.o_proj.weight", (12, 20), one_by_one(12)),
    Kind("h.0.mlp.up_proj.weight", (9, 12), one_by_one(9)),
    Kind("h.0.mlp.c_proj.weight", (14, 12), one_by_one(12), transposed=True),
    *FUSED,
    Kind("embed_tokens.weight", (15, 12), one_by_one(15), projected=False),
    Kind("lm_head.weight", (15, 12), one_by_one(15), projected=False),
    Kind("h.0.self_attn.q_proj.bias", (20,), one_by_one(20), projected=False),
    Kind("h.0.attn.c_attn.bias", (40,), one_by_one(40), projected=False),
    Kind("h.0.input_layernorm.weight", (12,), [list(range(12))], projected=False),
    Kind("conv.weight", (4, 3, 2, 2), one_by_one(24), projected=False),
)
