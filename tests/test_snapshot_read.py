"""Snapshot files, real formats and hostile ones: a recording, or one line."""

from __future__ import annotations

import gzip
import json
import pickle
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from allocator_snapshots import SNAPSHOT, TRACE, A
from hypothesis import given, settings
from hypothesis import strategies as st
from spec_inputs import JSON, is_one_line, line

from galore_mem.allocator import snapshot as snapshot_module
from galore_mem.allocator.blocks import BlockLayout, SegmentLayout
from galore_mem.allocator.settings import AllocatorSettings, parse_settings
from galore_mem.allocator.snapshot import Recording, TraceEvent, read_snapshot, snapshot_from
from galore_mem.errors import InputError
from galore_mem.units import MIB

LAID = SegmentLayout(
    A,
    20 * MIB,
    0,
    False,
    False,
    (
        BlockLayout(A, 5 * MIB, 5 * MIB - 7, "active_allocated"),
        BlockLayout(A + 5 * MIB, 15 * MIB, 0, "inactive"),
    ),
)


def read(tmp_path: Path, data: bytes) -> Recording:
    path = tmp_path / "snapshot.pickle"
    path.write_bytes(data)
    return read_snapshot(path)


def refused(tmp_path: Path, data: bytes) -> str:
    message = line(read, tmp_path, data)
    assert "snapshot.pickle" in message
    return message


# --- the two formats ---------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        *(pickle.dumps(SNAPSHOT, protocol) for protocol in (2, 3, 4, 5)),
        gzip.compress(pickle.dumps(SNAPSHOT)),
        json.dumps(TRACE).encode(),
        gzip.compress(json.dumps(TRACE).encode()),
    ],
    ids=["2", "3", "4", "5", "pickle.gz", "json", "json.gz"],
)
def test_both_formats_say_the_same(tmp_path: Path, data: bytes) -> None:
    recording = read(tmp_path, data)
    [device] = recording.devices
    assert device.device == 0
    assert device.segments == (LAID,)
    assert device.events[1] == TraceEvent("alloc", A, 5 * MIB - 7, 0)
    assert device.events[5] == TraceEvent("oom", 77, 5, 0)
    assert len(device.events) == 7
    assert recording.settings == AllocatorSettings()


def test_several_devices() -> None:
    two = deepcopy(SNAPSHOT)
    two["device_traces"][1] = two["device_traces"][0][:1]
    two["segments"].append(two["segments"][0] | {"device": 1, "blocks": [{"size": 20 * MIB, "state": "inactive"}]})
    first, second = snapshot_from(two).devices
    assert (first.device, second.device) == (0, 1)
    assert second.segments[0].blocks == (BlockLayout(A, 20 * MIB, 0, "inactive"),)  # old files have no requested size
    assert len(second.events) == 1


@pytest.mark.parametrize(
    ("recorded", "settings_"),
    [
        (None, AllocatorSettings()),
        (
            {"max_split_size": 64 * MIB, "garbage_collection_threshold": 0.5},
            "max_split_size_mb:64,garbage_collection_threshold:0.5",
        ),
        (
            {"PYTORCH_CUDA_ALLOC_CONF": "large_segment_size_mb:32", "expandable_segments": True},
            "large_segment_size_mb:32,expandable_segments:True",
        ),
        ({"PYTORCH_ALLOC_CONF": "per_process_memory_fraction:0.5"}, "per_process_memory_fraction:0.5"),
        ({"roundup_power2_divisions": {"1": 0, "2": 4}}, "roundup_power2_divisions:[1:0,2:4]"),
    ],
)  # fmt: skip
def test_recorded_settings(recorded: Any, settings_: AllocatorSettings | str) -> None:
    expected = parse_settings(settings_) if isinstance(settings_, str) else settings_
    assert snapshot_from(SNAPSHOT | {"allocator_settings": recorded}).settings == expected


def test_settings_may_be_given_instead() -> None:
    mine = AllocatorSettings(expandable_segments=True)
    assert snapshot_from(SNAPSHOT | {"allocator_settings": "?"}, settings=mine).settings is mine


# --- files -------------------------------------------------------------------


def test_what_is_no_snapshot_is_refused(tmp_path: Path) -> None:
    assert "is neither a pickled memory snapshot" in refused(tmp_path, b"")
    assert "is neither a pickled memory snapshot" in refused(tmp_path, b"GIF89a")
    assert "is neither a pickled memory snapshot" in refused(tmp_path, pickle.dumps(SNAPSHOT, 0))
    assert "there is no file" in line(read_snapshot, tmp_path / "absent")
    assert "it is a folder" in line(read_snapshot, tmp_path)


def test_truncated_files_are_refused(tmp_path: Path) -> None:
    packed = gzip.compress(json.dumps(TRACE).encode())
    assert refused(tmp_path, packed[:-20]).endswith("is a truncated or broken gzip file")
    assert refused(tmp_path, packed[:30] + b"\xff\xff" + packed[32:]).endswith("is a truncated or broken gzip file")
    assert "is not JSON" in refused(tmp_path, json.dumps(TRACE).encode()[:-20])
    assert "is a truncated or broken pickle" in refused(tmp_path, pickle.dumps(SNAPSHOT)[:-20])
    assert "is nested too deeply" in refused(tmp_path, b'{"a":' + b"[" * 100_000)


def test_what_unpacks_to_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot_module, "LIMIT", 100_000)
    bomb = gzip.compress(b"{" + b" " * 10**6)
    assert len(bomb) < 2000
    assert refused(tmp_path, bomb).endswith("is too large: more than 97.66 KiB when unpacked")
    assert "is too large" in refused(tmp_path, b"\x80" * 100_001)


# --- contents ----------------------------------------------------------------


def edited(path: str, value: Any) -> dict[str, Any]:
    """SNAPSHOT with another value at a path such as segments.0.address."""
    whole = deepcopy(SNAPSHOT)
    *names, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    inner: Any = whole
    for name in names:
        inner = inner[name]
    inner[last] = value
    return whole


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("segments", None, "x: segments must be a list, got null"),
        ("device_traces", {}, "x: device_traces must be a list, got an object of 0"),
        ("device_traces.0", "a", "x: trace 0 must be a list, got 'a'"),
        ("device_traces.0.1", [], "x: trace 0, event 1 must be an object, got a list of 0"),
        (
            "device_traces.0.1.action",
            "malloc",
            "x: trace 0, event 1: unknown action 'malloc'; did you mean alloc, segment_alloc?",
        ),
        ("device_traces.0.1.action", 7, None),
        (
            "device_traces.0.1.addr",
            -1,
            f"x: trace 0, event 1: address must be a whole number from 0 to {2**57 - 1}, got -1",
        ),
        ("device_traces.0.1.addr", 1.5, None),
        ("device_traces.0.1.addr", True, None),
        (
            "device_traces.0.1.size",
            2**48,
            f"x: trace 0, event 1: size must be a whole number from 0 to {2**48 - 1}, got {2**48}",
        ),
        ("device_traces.0.1.size", 10**30, None),
        ("device_traces.0.1.stream", None, None),
        ("device_traces.0.5.device_free", None, None),
        ("segments.0", 3, "x: segment 0 must be an object, got 3"),
        ("segments.0.address", "0x7f", None),
        ("segments.0.total_size", 21 * MIB, f"x: segment 0: its 2 blocks are {20 * MIB} bytes, it has {21 * MIB}"),
        ("segments.0.blocks", [], f"x: segment 0: its 0 blocks are 0 bytes, it has {20 * MIB}"),
        ("segments.0.blocks.0", [], "x: segment 0: a block must be an object, got a list of 0"),
        ("segments.0.blocks.0.size", 0, f"x: segment 0, block 0: a block of 0 bytes cannot hold {5 * MIB - 7}"),
        (
            "segments.0.blocks.0.requested_size",
            6 * MIB,
            f"x: segment 0, block 0: a block of {5 * MIB} bytes cannot hold {6 * MIB}",
        ),
        (
            "segments.0.blocks.0.state",
            "active",
            "x: segment 0, block 0: unknown state 'active'; did you mean active_allocated, active_awaiting_free,"
            " active_pending_free?",
        ),
        ("segments.0.segment_type", "medium", "x: segment 0: segment type must be small or large, got 'medium'"),
        ("segments.0.is_expandable", 1, "x: segment 0: is_expandable must be true or false, got 1"),
        ("segments.0.device", 2, "x: segment 0: device must be a whole number from 0 to 1, got 2"),
        (
            "segments.0.segment_pool_id",
            (0, 1),
            "x has private pools (CUDA graphs or MemPool), which are not modeled",
        ),
        ("segments.0.segment_pool_id", 5, "x: pool id must be a list, got 5"),
        ("allocator_settings", [], "x: allocator_settings must be an object, got a list of 0"),
        ("allocator_settings.max_split_size", -2, "x: allocator setting max_split_size cannot be -2"),
        ("allocator_settings.garbage_collection_threshold", 1.0, None),
        ("allocator_settings.expandable_segments", "True", None),
        ("allocator_settings.roundup_power2_divisions", {"1": 3}, None),
        (
            "allocator_settings.PYTORCH_CUDA_ALLOC_CONF",
            "max_split_size_mb:1",
            "x: allocator setting max_split_size_mb must be at least 20, got '1'",
        ),
    ],
)
def test_contents_that_cannot_be_are_refused(path: str, value: Any, says: str | None) -> None:
    message = line(snapshot_from, edited(path, value), "x")
    assert message.startswith("x")
    assert says is None or message == says


def test_segments_that_overlap_are_refused() -> None:
    twice = SNAPSHOT | {"segments": [SNAPSHOT["segments"][0], SNAPSHOT["segments"][0] | {"address": A + 10 * MIB}]}
    assert line(snapshot_from, twice, "x") == f"x: segments at {A:#x} and {A + 10 * MIB:#x} overlap"


def test_an_empty_snapshot_says_why_it_may_be() -> None:
    nothing = {"segments": [], "device_traces": [[], []]}
    assert line(snapshot_from, nothing, "x").endswith("was torch.cuda.memory._record_memory_history on?")
    assert line(snapshot_from, [1], "x") == "x: the snapshot must be an object, got a list of 1"


def device_entry(**change: Any) -> dict[str, Any]:
    return {"devices": [TRACE["devices"][0] | change]}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"schema": "cuda-alloc-trace/9"}, "schema must be 'cuda-alloc-trace/1', got 'cuda-alloc-trace/9'"),
        ({"devices": None}, "devices must be a list, got null"),
        ({"devices": [3]}, "device entry 0 must be an object, got 3"),
        (device_entry(events=[["alloc", 1]]), "device entry 0, event 0 must have 4 values, got 2"),
        (device_entry(events=[[[], 1, 2, 3]]), "device entry 0, event 0: unknown action"),
        (device_entry(segments=[{"blocks": [[1]]}]), "device entry 0, segment 0, block 0 must have 4 values, got 1"),
        (device_entry(device="cuda:0"), "device entry 0: device must be a whole number"),
    ],
)
def test_traces_that_cannot_be_are_refused(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    assert says in refused(tmp_path, json.dumps(TRACE | change).encode())


@settings(max_examples=150, derandomize=True, deadline=None)
@given(
    st.sampled_from([
        "segments", "segments.0", "segments.0.blocks", "segments.0.blocks.1", "segments.0.stream", "device_traces",
        "device_traces.0", "device_traces.0.3", "device_traces.0.3.size", "allocator_settings", "segments.0.address",
    ]),
    JSON,
)  # fmt: skip
def test_any_contents_are_read_or_refused_in_one_line(path: str, value: Any) -> None:
    message = "read"
    try:
        snapshot_from(edited(path, value), "x")
    except InputError as error:
        message = str(error)
    assert is_one_line(message)
