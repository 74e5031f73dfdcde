"""Bytes of LAPACK's workspaces on the CPU: the library that torch was built with is asked (a call with lwork = -1).

Their sizes are the library's own (MKL's are not those of the reference LAPACK). torch rounds the answers up and
allocates them (aten/src/ATen/native/BatchLinearAlgebraKernel.cpp). Where the library does not show its functions, as
where torch loads it in another way, nothing is known and nothing is counted.
"""

from __future__ import annotations

import ctypes
import struct
import sys
from functools import cache
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import torch


class _Format(NamedTuple):
    letter: str  # of LAPACK's names
    number: type[ctypes.c_float] | type[ctypes.c_double]
    bits: tuple[str, str]  # the format and an integer of its size, for struct


FORMATS = {
    torch.float32: _Format("s", ctypes.c_float, ("<f", "<i")),
    torch.float64: _Format("d", ctypes.c_double, ("<d", "<q")),
}
NAMES = {"win32": "torch_cpu.dll", "darwin": "libtorch_cpu.dylib"}


def geqrf(m: int, n: int, dtype: torch.dtype) -> int:
    """Of a QR decomposition of an m x n matrix."""
    return _asked("geqrf", dtype, (m, n), max(1, n))


def orgqr(m: int, n: int, k: int, dtype: torch.dtype) -> int:
    """Of making n columns of an orthogonal matrix out of k reflections."""
    return _asked("orgqr", dtype, (m, n, k), max(1, n))


def syevd(n: int, dtype: torch.dtype) -> tuple[int, int]:
    """Of the eigenvectors of a symmetric matrix: numbers, and integers."""
    function, fmt = _function("syevd", dtype)
    if function is None:
        return 0, 0
    work, room, info, rows = fmt.number(), ctypes.c_int(), ctypes.c_int(), ctypes.c_int(n)
    nothing, ask = (fmt.number * 1)(), ctypes.c_int(-1)
    function(b"V", b"L", _at(rows), nothing, _at(rows), nothing, _at(work), _at(ask), _at(room), _at(ask), _at(info))
    return ctypes.sizeof(work) * _up(work.value, fmt), 4 * room.value


def _asked(name: str, dtype: torch.dtype, sizes: tuple[int, ...], least: int) -> int:
    function, fmt = _function(name, dtype)
    if function is None:
        return 0
    work, info = fmt.number(), ctypes.c_int()
    nothing, rows = (fmt.number * 1)(), ctypes.c_int(max(1, sizes[0]))
    given = [_at(ctypes.c_int(size)) for size in sizes]
    function(*given, nothing, _at(rows), nothing, _at(work), _at(ctypes.c_int(-1)), _at(info))
    return ctypes.sizeof(work) * max(least, _up(work.value, fmt))


def _at(value: Any) -> Any:
    return ctypes.byref(value)


def _up(value: float, fmt: _Format) -> int:
    """The next number of the format, rounded up: an answer above 2^24 need not be exact."""
    number, integer = fmt.bits
    (bits,) = struct.unpack(integer, struct.pack(number, value))
    following: float = struct.unpack(number, struct.pack(integer, bits + 1))[0]
    return ceil(following)


@cache
def _function(name: str, dtype: torch.dtype) -> tuple[Any, _Format]:
    fmt = FORMATS.get(dtype, FORMATS[torch.float32])
    if dtype not in FORMATS:
        return None, fmt
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / NAMES.get(sys.platform, "libtorch_cpu.so")))
        return getattr(library, f"{fmt.letter}{name}_"), fmt
    except (OSError, AttributeError):
        return None, fmt
