"""Adam-mini's partition: which rows of a parameter share one second moment.

Zhang, Chen, Li, Ding, Wu, Kingma, Ye, Luo, Sun: Adam-mini, arXiv:2406.16793, algorithm 3 ("Partition for
Transformers"), in the form of the adam-mini package since 1.1: query and key by head, embeddings, head, value,
attention output and MLP by output row, biases element by element, norms as a whole. The ledgers and the optimizers
both take their blocks from here.

Rows are slices along one dimension: the first, or the last of a Conv1D, which stores in x out. A parameter of more
than two dimensions is taken as a matrix whose rows are all its dimensions but the last.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import NamedTuple

from galore_mem.errors import InputError
from galore_mem.spec.model import Heads, Shape

QUERY_KEY = frozenset(("q_proj", "k_proj", "wq", "wk", "query", "key"))
# fused projections: query, key and value one after the other, or head by head (GPT-NeoX, BLOOM)
IN_SEQUENCE = frozenset(("c_attn", "qkv_proj", "Wqkv", "in_proj_weight"))
BY_HEAD = frozenset(("query_key_value",))


class Partition(NamedTuple):
    """Blocks of consecutive rows: `repeat` times the `runs`, each a number of blocks and the rows in one of them.

    `dim` is 0 where rows are the first dimension (of an N-dimensional parameter: all but the last), 1 where they are
    the columns of the stored matrix.
    """

    runs: tuple[tuple[int, int], ...]
    repeat: int = 1
    dim: int = 0

    @property
    def blocks(self) -> int:
        return self.repeat * sum(count for count, _ in self.runs)

    @property
    def rows(self) -> int:
        return self.repeat * sum(count * size for count, size in self.runs)

    @property
    def one_each(self) -> bool:
        """Is every row a block of its own?"""
        return all(size == 1 for _, size in self.runs)

    @property
    def column(self) -> Shape:
        """Shape of one value per block, so that it broadcasts over what the rows hold."""
        return (1, self.blocks) if self.dim else (self.blocks, 1)

    def check(self, parameter: Shape) -> None:
        """Raises `InputError` where the blocks do not add up to the parameter's rows."""
        rows = parameter[-1] if self.dim else prod(parameter[:-1] or parameter)
        if self.rows != rows:
            raise InputError(f"the partition has {self.rows} rows, and the parameter {rows} (its shape: {parameter})")


def by_row(shape: Shape, *, transposed: bool = False) -> Partition:
    """Every output row on its own."""
    return Partition(((shape[-1] if transposed else prod(shape[:-1]), 1),), dim=int(transposed))


def partition(name: str, shape: Shape, heads: Heads | None, *, transposed: bool = False) -> Partition:
    """The blocks of a parameter, by the dotted parts of its name; `transposed` says that it is stored in x out.

    A head is `head_dim` rows, which holds with grouped queries and where head_dim is not hidden_size /
    num_attention_heads. Raises `InputError` where heads are needed and not known, or do not divide the rows.
    """
    parts = frozenset(name.split("."))
    if name.rpartition(".")[2].endswith("bias"):
        return Partition(((prod(shape), 1),))
    if len(shape) < 2:
        return Partition(((1, prod(shape)),))
    rows = by_row(shape, transposed=transposed)
    if not parts & (QUERY_KEY | IN_SEQUENCE | BY_HEAD) or any(part.startswith("lora_") for part in parts):
        return rows  # an adapter's factors have rows of their own, and few
    if heads is None:
        raise InputError(
            f"adam-mini partitions {name} by head, and this model's head_dim is not known; give its config.json"
        )
    d = heads.head_dim
    if parts & QUERY_KEY:
        runs: Iterable[tuple[int, int]] = ((rows.rows // d, d),)
        repeat = 1
    elif parts & IN_SEQUENCE:
        queries, keys = heads.num_attention_heads, heads.num_key_value_heads
        runs, repeat = ((queries, d), (keys, d), (keys * d, 1)), 1
    else:
        runs, repeat = ((1, d), (1, d), (d, 1)), heads.num_attention_heads
    found = rows._replace(runs=tuple(runs), repeat=repeat)
    if found.rows != rows.rows or (parts & QUERY_KEY and rows.rows > heads.num_attention_heads * d):
        raise InputError(
            f"adam-mini: {name} has {rows.rows} rows, which this model's heads do not add up to "
            f"(head_dim {d}, {heads.num_attention_heads} query and {heads.num_key_value_heads} key-value heads); "
            "for galore_mem.optim give its partition by name"
        )
    return found
