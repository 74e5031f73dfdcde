"""The settings' text, read as torch reads it, and the sizes that follow from them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from spec_inputs import line

from galore_mem.allocator.export import settings_text
from galore_mem.allocator.settings import UNLIMITED, AllocatorSettings, parse_settings
from galore_mem.units import GIB, KIB, MIB


@pytest.fixture
def torch_settings() -> Iterator[None]:
    """Begins and ends with torch's defaults; the size of large segments stays set until it is set again."""
    torch._C._accelerator_setAllocatorSettings("large_segment_size_mb:20")
    yield
    torch._C._accelerator_setAllocatorSettings("large_segment_size_mb:20")
    torch._C._accelerator_setAllocatorSettings("")


GOOD = {
    "": AllocatorSettings(),
    "max_split_size_mb:64": AllocatorSettings(max_split_size=64 * MIB),
    "max_split_size_mb:20": AllocatorSettings(max_split_size=20 * MIB),  # the least: a large segment
    "expandable_segments:True": AllocatorSettings(expandable_segments=True),
    "expandable_segments:False": AllocatorSettings(),
    " garbage_collection_threshold : 0.8 , max_split_size_mb : 512 ": AllocatorSettings(
        garbage_collection_threshold=0.8, max_split_size=512 * MIB
    ),
    "max_non_split_rounding_mb:64": AllocatorSettings(max_non_split_rounding=64 * MIB),
    # the rounding follows the large segment where it is not given
    "large_segment_size_mb:64": AllocatorSettings(large_segment_size=64 * MIB, max_non_split_rounding=64 * MIB),
    "max_split_size_mb:64,large_segment_size_mb:64": AllocatorSettings(
        large_segment_size=64 * MIB, max_non_split_rounding=64 * MIB, max_split_size=64 * MIB
    ),
    "roundup_power2_divisions:4": AllocatorSettings(roundup_power2_divisions=(4,) * 16),
    # 256 MiB is interval 8, 512 is 9, 1024 is 10, all above get `>`; the first value also holds below
    "roundup_power2_divisions:[256:1,512:2,1024:4,>:8]": AllocatorSettings(
        roundup_power2_divisions=(1,) * 8 + (1, 2, 4) + (8,) * 5
    ),
    # 64 MiB is interval 6, 256 is 8: interval 7 between them is named by neither and stays 0
    "roundup_power2_divisions:[64:8,256:4]": AllocatorSettings(
        roundup_power2_divisions=(8,) * 6 + (8, 0, 4) + (0,) * 7
    ),
    "roundup_power2_divisions:[]": AllocatorSettings(),
    "roundup_power2_divisions:[>:2]": AllocatorSettings(roundup_power2_divisions=(0,) + (2,) * 15),
    "roundup_power2_divisions:[1:0,2:2,>:16],expandable_segments:True": AllocatorSettings(
        roundup_power2_divisions=(0, 2) + (16,) * 14, expandable_segments=True
    ),
    "roundup_power2_divisions:[65536:2]": AllocatorSettings(roundup_power2_divisions=(2,) * 16),  # clamped to the last
    "pinned_use_background_threads:True": AllocatorSettings(),  # of host memory
}


@pytest.mark.parametrize("text", GOOD)
def test_settings_that_torch_accepts(text: str, torch_settings: None) -> None:
    torch._C._accelerator_setAllocatorSettings(text)  # accepts it, too
    assert parse_settings(text) == GOOD[text]


REFUSED = (
    "max_split_size_mb:19",
    "max_split_size_mb:10,large_segment_size_mb:11",
    "max_non_split_rounding_mb:19",
    "large_segment_size_mb:10",
    "large_segment_size_mb:64,max_split_size_mb:63",
    "garbage_collection_threshold:0",
    "garbage_collection_threshold:1.0",
    "garbage_collection_threshold:1.5",
    "roundup_power2_divisions:3",
    "roundup_power2_divisions:0",
    "roundup_power2_divisions:[256:3]",
    "roundup_power2_divisions:[100:2]",
    "roundup_power2_divisions:[0:2]",
    "expandable_segments:true",
    "expandable_segments:1",
    "max_split_size_mb:abc",
)


@pytest.mark.parametrize("text", REFUSED)
def test_settings_that_torch_refuses(text: str, torch_settings: None) -> None:
    with pytest.raises((ValueError, RuntimeError)):
        torch._C._accelerator_setAllocatorSettings(text)
    assert line(parse_settings, text).startswith("allocator setting ")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("max_split_size_mb", "cannot read allocator setting 'max_split_size_mb'; write key:value,key:value"),
        ("max_split_size_mb:", "cannot read allocator setting 'max_split_size_mb:'; write key:value,key:value"),
        (",", "cannot read allocator setting ''; write key:value,key:value"),
        (
            "roundup_power2_divisions:[1:2",
            "cannot read allocator setting 'roundup_power2_divisions:[1:2'; write key:value,key:value",
        ),
        ("max_split_size_mb:64abc", "allocator setting max_split_size_mb must be a whole number, got '64abc'"),
        ("max_split_size_mb:-1", "allocator setting max_split_size_mb must be a whole number, got '-1'"),
        ("max_split_size_mb:" + "9" * 40, None),
        ("max_split_size_mb:64,max_split_size_mb:64", "allocator setting 'max_split_size_mb' is given twice"),
        ("expandable", "cannot read allocator setting 'expandable'; write key:value,key:value"),
        ("expandable:True", "unknown allocator setting 'expandable'; did you mean expandable_segments?"),
        ("backend:cudaMallocAsync", "allocator setting backend:'cudaMallocAsync' is not modeled; only native is"),
        (
            "per_process_memory_fraction:1.1",
            "allocator setting per_process_memory_fraction must be between 0 and 1, got '1.1'",
        ),
        ("per_process_memory_fraction:nan", None),
        (
            "roundup_power2_divisions:[64]",
            "allocator setting roundup_power2_divisions lists boundary:divisions pairs, got '64'",
        ),
    ],
)
def test_what_torch_reads_carelessly_is_refused(text: str, says: str | None) -> None:
    message = line(parse_settings, text)
    assert says is None or message == says


def test_cudas_own_settings() -> None:
    """torch's CPU build does not know them (CUDAAllocatorConfig.h)."""
    assert parse_settings("per_process_memory_fraction:0.5").per_process_memory_fraction == 0.5
    assert parse_settings("backend:native,release_lock_on_cudamalloc:True") == AllocatorSettings()


@pytest.mark.parametrize("text", GOOD)
def test_settings_are_written_as_they_are_read(text: str) -> None:
    assert parse_settings(settings_text(GOOD[text])) == GOOD[text]


# --- sizes -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "block"),
    [
        (1, 512), (511, 512), (512, 512), (513, 1024), (1024, 1024), (1025, 1536),
        (MIB - 1, MIB), (MIB, MIB), (MIB + 1, MIB + 512), (10 * GIB + 1, 10 * GIB + 512),
    ],
)  # fmt: skip
def test_a_block_is_a_multiple_of_512(size: int, block: int) -> None:
    assert AllocatorSettings().round_size(size) == block


@pytest.mark.parametrize(
    ("size", "divisions", "block"),
    [
        (1200 * KIB, 4, 1280 * KIB),  # between 1024 and 2048 KiB in steps of 256
        (1280 * KIB, 4, 1280 * KIB),
        (1281 * KIB, 4, 1536 * KIB),
        (1793 * KIB, 4, 2048 * KIB),  # the last step ends at the next power of two
        (1024 * KIB, 4, 1024 * KIB),  # a power of two stays
        (2 * KIB, 4, 2 * KIB),  # 4 divisions hold above 512 * 4 = 2 KiB only
        (2 * KIB + 1, 4, 2 * KIB + 512),  # there: steps of 2048 / 4
        (2 * KIB - 511, 4, 2 * KIB),  # below: multiples of 512
        (100 * KIB + 1, 1, 100 * KIB + 512),  # one division is none
        (65 * MIB, 2, 96 * MIB),
        (97 * MIB, 2, 128 * MIB),
    ],
)
def test_a_block_is_a_step_between_powers_of_two(size: int, divisions: int, block: int) -> None:
    """roundup_power2_next_division; steps of a power of two divided by the divisions."""
    assert AllocatorSettings(roundup_power2_divisions=(divisions,) * 16).round_size(size) == block


def test_divisions_depend_on_the_size() -> None:
    """[64:8,256:4]: 8 divisions below 128 MiB (100 -> 104 in steps of 8), none from there (200 MiB + 1 -> + 512), 4
    from 256 (300 -> 320 in steps of 64), none above 512."""
    settings = parse_settings("roundup_power2_divisions:[64:8,256:4]")
    assert settings.round_size(100 * MIB) == 104 * MIB
    assert settings.round_size(200 * MIB + 1) == 200 * MIB + 512
    assert settings.round_size(300 * MIB) == 320 * MIB
    assert settings.round_size(600 * MIB + 1) == 600 * MIB + 512
    # below 1 MiB the first interval counts: 100 KiB lies between 64 and 128 in steps of 8
    assert settings.round_size(100 * KIB) == 104 * KIB


@pytest.mark.parametrize(
    ("rounded", "segment"),
    [
        (512, 2 * MIB), (MIB, 2 * MIB),
        (MIB + 512, 20 * MIB), (10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB), (10 * MIB + 512, 12 * MIB), (12 * MIB, 12 * MIB), (GIB + 512, GIB + 2 * MIB),
    ],
)  # fmt: skip
def test_segments(rounded: int, segment: int) -> None:
    """2 MiB for the small pool, 20 MiB below 10 MiB, then multiples of 2 MiB."""
    assert AllocatorSettings().segment_size(rounded) == segment


def test_another_large_segment_size() -> None:
    settings = parse_settings("large_segment_size_mb:64")
    assert settings.segment_size(MIB + 512) == settings.segment_size(10 * MIB - 512) == 64 * MIB
    assert settings.segment_size(10 * MIB) == 10 * MIB


def test_unlimited_is_the_largest_size_t() -> None:
    assert AllocatorSettings().max_split_size == UNLIMITED == 2**64 - 1
