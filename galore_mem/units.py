"""Whole-number helpers, and the one place where bytes become text.

Everything inside the package is `int` bytes; GiB is 2**30 and is spelled GiB.
"""

from __future__ import annotations

import re

from galore_mem.errors import InputError

KIB, MIB, GIB, TIB = 2**10, 2**20, 2**30, 2**40

_SUFFIXES = {
    "": 1, "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": KIB, "mib": MIB, "gib": GIB, "tib": TIB,
}  # fmt: skip
_SIZE = re.compile(r"\s*(\d{1,15})(?:\.(\d{1,9}))?\s*([a-zA-Z]*)\s*\Z", re.ASCII)


def ceil_div(a: int, b: int) -> int:
    """The smallest integer that is not below a / b."""
    return -(-a // b)


def round_up(a: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is not below a."""
    return -(-a // multiple) * multiple


def format_bytes(n: int, digits: int = 2) -> str:
    """Bytes as text in the largest binary unit that leaves at least one whole unit: `12.55 GiB`."""
    for unit, name in ((TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(n) >= unit:
            return f"{n / unit:.{digits}f} {name}"
    return f"{n} B"


def parse_bytes(text: str) -> int:
    """`24GiB`, `80 GB`, `1.5gib` or a plain number of bytes, as bytes. Raises `InputError`."""
    match = _SIZE.match(text)
    if match is None or match[3].lower() not in _SUFFIXES:
        raise InputError(f"cannot read {text!r} as a size; write for example 24GiB, 80GB or a number of bytes")
    unit = _SUFFIXES[match[3].lower()]
    fraction = match[2] or ""
    return int(match[1] + fraction) * unit // int(10 ** len(fraction))
