"""The settings that a recorded snapshot says it ran under."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from galore_mem.allocator.settings import UNLIMITED, AllocatorSettings, parse_settings
from galore_mem.errors import InputError
from galore_mem.spec.files import shown

_INTERVALS = tuple(str(1 << n) for n in range(16))  # lower bounds in MiB


def _max_split(value: Any) -> int | None:
    """Bytes; -1 is how an unlimited size_t reads as a signed number."""
    if type(value) is not int or not -1 <= value < 2**63:
        return None
    return UNLIMITED if value == -1 else value


def _threshold(value: Any) -> float | None:
    return float(value) if type(value) in (int, float) and 0 <= value < 1 else None


def _switch(value: Any) -> bool | None:
    return value if type(value) is bool else None


def _divisions(value: Any) -> tuple[int, ...] | None:
    if type(value) is not dict or any(type(value.get(key, 0)) is not int for key in _INTERVALS):
        return None
    table = tuple(value.get(key, 0) for key in _INTERVALS)
    return table if all(0 <= n < 2**32 and not n & (n - 1) for n in table) else None


_FIELDS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "max_split_size": ("max_split_size", _max_split),
    "garbage_collection_threshold": ("garbage_collection_threshold", _threshold),
    "expandable_segments": ("expandable_segments", _switch),
    "roundup_power2_divisions": ("roundup_power2_divisions", _divisions),
}


def recorded_settings(raw: object, source: str) -> AllocatorSettings:
    """Settings from `allocator_settings` of a snapshot: the text for all, the single values where they are given.

    A snapshot without them (before torch 2.2) is read as made with torch's defaults. Raises `InputError`.
    """
    if raw is None:
        return AllocatorSettings()
    if type(raw) is not dict:
        raise InputError(f"{source}: allocator_settings must be an object, got {shown(raw)}")
    text = raw.get("PYTORCH_CUDA_ALLOC_CONF", raw.get("PYTORCH_ALLOC_CONF", ""))
    try:
        settings = parse_settings(text) if type(text) is str else AllocatorSettings()
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    found = {}
    for key, (name, read) in _FIELDS.items():
        if key in raw:
            found[name] = read(raw[key])
            if found[name] is None:
                raise InputError(f"{source}: allocator setting {key} cannot be {shown(raw[key])}")
    return replace(settings, **found)
