"""Number formats: how many bits an element takes, and what mixing two of them gives.

Names are torch's (`bfloat16`, `float8_e4m3fn`); the packed 4-bit formats, which torch stores inside
uint8 tensors, have names of their own here so that a ledger can say what the bytes mean.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from galore_mem.errors import unknown


@dataclass(frozen=True, slots=True, eq=False)  # one object a format, compared by identity
class DType:
    """A number format: `bits` per stored element; `rank` orders floating formats for promotion (0: not floating)."""

    name: str
    bits: int
    rank: int = 0

    @property
    def floating(self) -> bool:
        return self.rank > 0

    def nbytes(self, shape: Iterable[int]) -> int:
        """Bytes of a dense tensor of this shape; packed formats round the total up to whole bytes."""
        return -(-prod(shape) * self.bits // 8)

    def __str__(self) -> str:
        return self.name


FLOAT64 = DType("float64", 64, 4)
FLOAT32 = DType("float32", 32, 3)
FLOAT16 = DType("float16", 16, 1)
BFLOAT16 = DType("bfloat16", 16, 1)
FLOAT8 = DType("float8_e4m3fn", 8)
INT64 = DType("int64", 64)
INT32 = DType("int32", 32)
INT8 = DType("int8", 8)
UINT8 = DType("uint8", 8)
BOOL = DType("bool", 8)
INT4 = DType("int4", 4)  # two values per byte
NF4 = DType("nf4", 4)  # bitsandbytes NormalFloat4, two values per byte

_BY_NAME = {
    d.name: d for d in (FLOAT64, FLOAT32, FLOAT16, BFLOAT16, FLOAT8, INT64, INT32, INT8, UINT8, BOOL, INT4, NF4)
}


def dtype(name: str) -> DType:
    """The format of this name. Raises `InputError` for an unknown one (never a silent default)."""
    try:
        return _BY_NAME[name]
    except KeyError:
        raise unknown("dtype", name, _BY_NAME) from None


def at_least_float32(d: DType) -> DType:
    """The format for averages that must not stand still: float32, or wider where the tensor is."""
    return d if d.rank >= FLOAT32.rank else FLOAT32


def of_squares(d: DType) -> DType:
    """The format in which ours keep a second moment of `d`: float16 cannot, squares below 2.4e-4 leave its range."""
    return FLOAT32 if d is FLOAT16 else d


def promote(a: DType, b: DType) -> DType:
    """The format of `a op b` for two tensors that both have dimensions (torch's type promotion).

    float16 with bfloat16 gives float32; otherwise the wider floating format wins.
    """
    if a is b:
        return a
    if a.rank == b.rank:
        return FLOAT32
    return a if a.rank > b.rank else b
