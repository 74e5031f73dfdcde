"""Adam-mini's partition against lists of rows that are written out (`literal_blocks.py`)."""

from __future__ import annotations

from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st
from literal import Blocks
from literal_blocks import HEADS, KINDS, Kind, by_head, in_sequence, interleaved, one_by_one

from galore_mem.errors import InputError
from galore_mem.partition import Partition, by_row, partition
from galore_mem.spec.model import Heads


def expanded(part: Partition) -> list[list[int]]:
    """Row numbers of each block, as the docstring of `Partition` has it: `repeat` times the runs, block after block."""
    blocks, row = [], 0
    for _ in range(part.repeat):
        for count, size in part.runs:
            for _ in range(count):
                blocks.append(list(range(row, row + size)))
                row += size
    return blocks


def rows(kind: Kind) -> int:
    if kind.transposed:
        return kind.shape[-1]
    return prod(kind.shape[:-1] or kind.shape)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_blocks(kind: Kind) -> None:
    part = partition(kind.name, kind.shape, HEADS, transposed=kind.transposed)
    assert expanded(part) == [list(block) for block in kind.blocks]
    assert part.blocks == len(kind.blocks)
    assert part.rows == rows(kind)
    assert part.one_each == all(len(block) == 1 for block in kind.blocks)
    assert part.column == ((1, len(kind.blocks)) if kind.transposed else (len(kind.blocks), 1))
    part.check(kind.shape)


def every_row_once(blocks: Blocks) -> bool:
    found = [row for block in blocks for row in block]
    return found == list(range(len(found)))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_row_is_in_one_block(kind: Kind) -> None:
    assert every_row_once(kind.blocks)


geometries = st.builds(
    lambda per_key, kv, d, extra: Heads(per_key * kv * d + extra, per_key * kv, kv, d),
    st.integers(1, 4), st.integers(1, 4), st.integers(1, 9), st.integers(0, 7),
)  # fmt: skip


@given(geometries)
def test_any_geometry(heads: Heads) -> None:
    """Query and key by head with grouped queries, and where head_dim is not hidden_size / heads."""
    hidden, d = heads.hidden_size, heads.head_dim
    q, kv = heads.num_attention_heads, heads.num_key_value_heads
    assert expanded(partition("l.q_proj.weight", (q * d, hidden), heads)) == by_head(q, d)
    assert expanded(partition("l.k_proj.weight", (kv * d, hidden), heads)) == by_head(kv, d)
    assert expanded(partition("l.v_proj.weight", (kv * d, hidden), heads)) == one_by_one(kv * d)
    fused = in_sequence(heads)
    assert every_row_once(fused)
    size = (q + 2 * kv) * d
    assert expanded(partition("l.qkv_proj.weight", (size, hidden), heads)) == fused
    conv1d = partition("l.c_attn.weight", (hidden, size), heads, transposed=True)
    assert (expanded(conv1d), conv1d.dim) == (fused, 1)
    assert expanded(partition("l.query_key_value.weight", (3 * q * d, hidden), heads)) == interleaved(heads)


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "wq", "wk", "query", "key"])
def test_names_of_query_and_key(name: str) -> None:
    assert expanded(partition(f"layers.3.attention.{name}.weight", (20, 12), HEADS)) == by_head(4, 5)


@pytest.mark.parametrize("name", ["Wqkv.weight", "in_proj_weight", "qkv_proj.weight", "c_attn.weight"])
def test_names_of_projections_in_sequence(name: str) -> None:
    assert expanded(partition(f"layers.3.{name}", (40, 12), HEADS)) == in_sequence(HEADS)


@pytest.mark.parametrize("name", ["monkey.weight", "keys.weight", "unquery.weight", "value.weight", "wkv.weight"])
def test_a_part_of_a_name_is_not_a_name(name: str) -> None:
    """The package looks for substrings, so `monkey` is a key for it; here whole parts of the dotted name count."""
    assert expanded(partition(f"layers.3.{name}", (20, 12), HEADS)) == one_by_one(20)


@pytest.mark.parametrize("name", ["q_proj.bias", "c_attn.bias", "in_proj_bias", "norm.bias"])
def test_biases_are_taken_value_by_value(name: str) -> None:
    assert expanded(partition(name, (15,), None)) == one_by_one(15)


@pytest.mark.parametrize("shape", [(9,), ()], ids=str)
def test_other_vectors_are_one_block(shape: tuple[int, ...]) -> None:
    assert expanded(partition("norm.weight", shape, None)) == [list(range(prod(shape)))]


@pytest.mark.parametrize("name", ["l.q_proj.lora_A.default.weight", "l.c_attn.lora_B.weight"])
def test_adapters_are_taken_row_by_row(name: str) -> None:
    """Their rows are not those of the projection that they adapt."""
    assert expanded(partition(name, (20, 12), HEADS)) == one_by_one(20)


def test_by_row() -> None:
    assert expanded(by_row((3, 4))) == one_by_one(3)
    assert expanded(by_row((2, 3, 4))) == one_by_one(6)
    assert (expanded(by_row((3, 4), transposed=True)), by_row((3, 4), transposed=True).dim) == (one_by_one(4), 1)


@pytest.mark.parametrize(("name", "shape"), [
    ("l.q_proj.weight", (21, 12)),  # heads of 5 rows
    ("l.qkv_proj.weight", (45, 12)),  # 4·5 + 2·5 + 2·5 = 40
    ("l.query_key_value.weight", (40, 12)),  # 4·3·5 = 60: grouped queries are not stored so
])  # fmt: skip
def test_rows_that_heads_do_not_add_up_to(name: str, shape: tuple[int, int]) -> None:
    with pytest.raises(InputError, match=f"{name} has {shape[0]} rows"):
        partition(name, shape, HEADS)


@pytest.mark.parametrize("name", ["l.q_proj.weight", "l.c_attn.weight", "l.query_key_value.weight"])
def test_heads_that_are_needed_and_not_known(name: str) -> None:
    with pytest.raises(InputError, match=f"{name} by head, and this model's head_dim is not known"):
        partition(name, (20, 12), None)


def test_other_names_need_no_heads() -> None:
    assert expanded(partition("l.up_proj.weight", (7, 3), None)) == one_by_one(7)


@pytest.mark.parametrize("shape", [(19, 12), (12, 20), (4, 4, 12)], ids=str)
def test_a_partition_of_another_parameter(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="the partition has 20 rows, and the parameter"):
        Partition(((4, 5),)).check(shape)
