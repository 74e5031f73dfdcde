"""`galore-mem simulate`: the real model and the real optimizer, traced without values: which storages live when.

    >>> from galore_mem.simulate import simulate
    >>> result = simulate("llama-7b", ["galore-mini"], rank=1024)
    >>> result.estimates[0].peak_reserved_bytes  # bytes

Nothing in here is loaded before it is used: importing the package does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from galore_mem.errors import InputError

if TYPE_CHECKING:
    from galore_mem.simulate.service import simulate

NEEDED = ("torch", "transformers")


def __getattr__(name: str) -> Any:
    if name != "simulate":
        raise AttributeError(f"module 'galore_mem.simulate' has no attribute {name!r}")
    missing = [package for package in NEEDED if find_spec(package) is None]
    if missing:
        raise InputError(
            f"simulate runs the real model and optimizer and needs {' and '.join(missing)}; "
            "install galore-mem with its extra: verify"
        )
    return import_module("galore_mem.simulate.service").simulate


__all__ = ["simulate"]
