"""The allocator's settings, as `PYTORCH_ALLOC_CONF` spells them.

Sources (torch 2.13): constants and defaults c10/core/AllocatorConfig.h, grammar and bounds
c10/core/AllocatorConfig.cpp, CUDA's own keys c10/cuda/CUDAAllocatorConfig.h.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from galore_mem.errors import InputError, unknown
from galore_mem.spec.files import shown
from galore_mem.units import MIB

MIN_BLOCK = 512  # kMinBlockSize: every block is a multiple of it
SMALL_SIZE = MIB  # kSmallSize: up to here a request is served from the small pool
SMALL_BUFFER = 2 * MIB  # kSmallBuffer: a segment of the small pool, and a page of an expandable one
MIN_LARGE_ALLOC = 10 * MIB  # kMinLargeAlloc: from here a segment is the request rounded up, not `large_segment_size`
ROUND_LARGE = 2 * MIB  # kRoundLarge: such segments are multiples of it
UNLIMITED = 2**64 - 1  # numeric_limits<size_t>::max()
MAX_REQUEST = 2**60  # bytes; NativeCachingAllocator refuses a request of one exbibyte or more

_INTERVALS = 16  # kRoundUpPowerOfTwoIntervals: sizes from 1 MiB (and below) to 32 GiB (and above), by powers of two
_FIRST_INTERVAL = MIB.bit_length() - 1

# known to torch, without effect on which bytes the native allocator takes: host memory, locks, error timing
_WITHOUT_EFFECT = frozenset(
    {
        "pinned_use_background_threads", "pinned_max_round_threshold_mb", "pinned_max_cached_size_mb",
        "pinned_use_cuda_host_register", "pinned_use_hip_host_register", "pinned_num_register_threads",
        "pinned_reserve_segment_size_mb", "pinned_free_catch_all", "release_lock_on_cudamalloc",
        "release_lock_on_hipmalloc", "graph_capture_record_stream_reuse", "throw_on_cudamalloc_oom",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class AllocatorSettings:
    """Settings of one device's allocator; sizes in bytes. The defaults are torch's."""

    max_split_size: int = UNLIMITED
    max_non_split_rounding: int = 20 * MIB
    roundup_power2_divisions: tuple[int, ...] = (0,) * _INTERVALS
    garbage_collection_threshold: float = 0.0
    expandable_segments: bool = False
    large_segment_size: int = 20 * MIB
    per_process_memory_fraction: float = 1.0

    def round_size(self, size: int) -> int:
        """Bytes of the block that a request of `size` > 0 bytes asks for (DeviceCachingAllocator::round_size)."""
        if size < MIN_BLOCK:
            return MIN_BLOCK
        interval = min(max(size.bit_length() - 1 - _FIRST_INTERVAL, 0), _INTERVALS - 1)
        divisions = self.roundup_power2_divisions[interval]
        if divisions <= 1 or size <= MIN_BLOCK * divisions:
            return -(-size // MIN_BLOCK) * MIN_BLOCK
        # the power of two below, cut in equal steps; an exact power of two is a step already
        step = (1 << (size.bit_length() - 1)) // divisions
        return -(-size // step) * step

    def segment_size(self, rounded: int) -> int:
        """Bytes asked of the device for a block of `rounded` bytes (get_allocation_size)."""
        if rounded <= SMALL_SIZE:
            return SMALL_BUFFER
        if rounded < MIN_LARGE_ALLOC:
            return self.large_segment_size
        return -(-rounded // ROUND_LARGE) * ROUND_LARGE


_WHOLE = re.compile(r"\d{1,18}\Z", re.ASCII)
_DECIMAL = re.compile(r"\d{1,18}(\.\d{0,18})?\Z|\.\d{1,18}\Z", re.ASCII)


def _whole(key: str, value: str) -> int:
    if not _WHOLE.match(value):
        raise InputError(f"allocator setting {key} must be a whole number, got {shown(value)}")
    return int(value)


def _at_least(key: str, value: str, least: int) -> int:
    """A number of MiB that is at least `least` bytes, in bytes."""
    size = _whole(key, value) * MIB
    if size < least:
        raise InputError(f"allocator setting {key} must be at least {least // MIB}, got {shown(value)}")
    return min(size, UNLIMITED)


def _fraction(key: str, value: str, allowed: str, accept: Callable[[float], bool]) -> float:
    number = float(value) if _DECIMAL.match(value) else -1.0
    if not accept(number):
        raise InputError(f"allocator setting {key} must be {allowed}, got {shown(value)}")
    return number


def _truth(key: str, value: str) -> bool:
    if value not in ("True", "False"):
        raise InputError(f"allocator setting {key} must be True or False, got {shown(value)}")
    return value == "True"


def _divisions(key: str, value: str) -> int:
    number = _whole(key, value)
    if number & (number - 1):
        raise InputError(f"allocator setting {key}: divisions must be 0 or a power of two, got {shown(value)}")
    return number


def _roundup(key: str, value: str) -> tuple[int, ...]:
    """Divisions of each interval: one number for all, or a list `[256:1,512:2,>:8]` of boundaries in MiB.

    As in parseRoundUpPower2Divisions the first boundary's divisions hold below it too, `>` holds above the last
    boundary named before it, and an interval between two boundaries that are not neighbors stays at 0.
    """
    if not value.startswith("["):
        number = _divisions(key, value)
        if not number:
            raise InputError(f"allocator setting {key} must be a power of two, got '0'; leave it out to round to 512")
        return (number,) * _INTERVALS
    table = [0] * _INTERVALS
    last = 0
    first = True
    for item in value[1:-1].split(",") if value != "[]" else ():
        boundary, colon, divisions = item.partition(":")
        if not colon:
            raise InputError(f"allocator setting {key} lists boundary:divisions pairs, got {shown(item)}")
        number = _divisions(key, divisions)
        if boundary == ">":
            table[last + 1 :] = [number] * (_INTERVALS - last - 1)
            continue
        size = _whole(key, boundary)
        if size == 0 or size & (size - 1):
            raise InputError(f"allocator setting {key}: boundaries are powers of two (MiB) or >, got {shown(boundary)}")
        last = min(size.bit_length() - 1, _INTERVALS - 1)
        if first:
            table[:last] = [number] * last
            first = False
        table[last] = number
    return tuple(table)


def _backend(key: str, value: str) -> None:
    if value != "native":
        raise InputError(f"allocator setting backend:{shown(value)} is not modeled; only native is")


def _pairs(text: str) -> dict[str, str]:
    """Key and value of each setting, in order; a value may be a list in brackets."""
    text = "".join(text.split())
    pairs: dict[str, str] = {}
    for item in re.split(r",(?![^\[]*\])", text) if text else ():
        key, colon, value = item.partition(":")
        if not key or not colon or not value or value.startswith("[") != value.endswith("]"):
            raise InputError(f"cannot read allocator setting {shown(item)}; write key:value,key:value")
        if key in pairs:
            raise InputError(f"allocator setting {shown(key)} is given twice")
        pairs[key] = value
    return pairs


def parse_settings(text: str) -> AllocatorSettings:
    """The settings of a PYTORCH_ALLOC_CONF text such as `max_split_size_mb:256,roundup_power2_divisions:[64:8,>:1]`.

    Raises `InputError` for what torch refuses, and for what it reads carelessly (`64abc`, a key twice, -1).
    """
    pairs = _pairs(text)
    # read first, as it is the least value of two others
    segment = _at_least("large_segment_size_mb", pairs.pop("large_segment_size_mb", "20"), MIN_LARGE_ALLOC + MIB)
    found: dict[str, Any] = {"large_segment_size": segment, "max_non_split_rounding": segment}
    readers: dict[str, tuple[str, Callable[[str, str], Any]]] = {
        "max_split_size_mb": ("max_split_size", lambda k, v: _at_least(k, v, segment)),
        "max_non_split_rounding_mb": ("max_non_split_rounding", lambda k, v: _at_least(k, v, segment)),
        "garbage_collection_threshold": (
            "garbage_collection_threshold",
            lambda k, v: _fraction(k, v, "between 0 and 1, both excluded", lambda x: 0 < x < 1),
        ),
        "per_process_memory_fraction": (
            "per_process_memory_fraction",
            lambda k, v: _fraction(k, v, "between 0 and 1", lambda x: 0 <= x <= 1),
        ),
        "roundup_power2_divisions": ("roundup_power2_divisions", _roundup),
        "expandable_segments": ("expandable_segments", _truth),
        "backend": ("", _backend),
    }
    for key, value in pairs.items():
        if key in readers:
            name, read = readers[key]
            result = read(key, value)
            if name:
                found[name] = result
        elif key not in _WITHOUT_EFFECT:
            raise unknown("allocator setting", key, [*readers, "large_segment_size_mb", *_WITHOUT_EFFECT])
    return AllocatorSettings(**found)
