"""Replays written as memory snapshots: opened by torch's own viewer code, and read back by ours."""

from __future__ import annotations

import base64
import json
import pickle
import pickletools
import re
from pathlib import Path
from typing import Any

import pytest
from allocator_cases import random_program
from spec_inputs import line
from torch.cuda import _memory_viz

from galore_mem.allocator.device import Device
from galore_mem.allocator.events import Alloc, Event, Free, Mark
from galore_mem.allocator.export import Description, Frame, memory_snapshot, write_snapshot
from galore_mem.allocator.recorded import compare
from galore_mem.allocator.replay import ReplayResult
from galore_mem.allocator.settings import AllocatorSettings, parse_settings
from galore_mem.allocator.snapshot import read_snapshot, snapshot_from
from galore_mem.units import MIB

EVENTS: list[Event] = [
    Mark("forward"),
    Alloc(1, 5 * MIB - 7),
    Alloc(2, 3 * MIB),
    Mark("backward"),
    Free(2),
    Alloc(3, 100),
]


def told(id: int) -> Description:
    return Description(
        (Frame(f"tensor{id}"), Frame("layers.0.mlp", "model", 7)), "weights" if id == 1 else "activations"
    )


def snapshot(events: list[Event] = EVENTS, **options: Any) -> tuple[dict[str, Any], ReplayResult]:
    return memory_snapshot(events, describe=told, **options)


# what MemoryViz.js (unpickleData) implements
VIEWER = {
    "PROTO", "FRAME", "MEMOIZE", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "MARK", "STOP", "NONE", "NEWTRUE",
    "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "SHORT_BINUNICODE", "BINUNICODE", "EMPTY_DICT",
    "DICT", "SETITEM", "SETITEMS", "EMPTY_LIST", "LIST", "APPEND", "APPENDS", "EMPTY_TUPLE", "TUPLE", "TUPLE1",
    "TUPLE2", "TUPLE3",
}  # fmt: skip


def test_what_happened_and_what_is_left() -> None:
    """5 MiB - 7 and 3 MiB in a segment of 20; then 100 bytes in one of 2."""
    found, result = snapshot()
    trace = found["device_traces"][0]
    assert [(e["action"], e["size"], e["time_us"], e["user_metadata"]) for e in trace] == [
        ("segment_alloc", 20 * MIB, 1, "forward"),
        ("alloc", 5 * MIB - 7, 1, "forward"),
        ("alloc", 3 * MIB, 2, "forward"),
        ("free_requested", 3 * MIB, 4, "backward"),
        ("free_completed", 3 * MIB, 4, "backward"),
        ("segment_alloc", 2 * MIB, 5, "backward"),
        ("alloc", 100, 5, "backward"),
    ]
    assert [e["category"] for e in trace] == ["unknown", "weights", *["activations"] * 3, "unknown", "activations"]
    assert trace[1]["frames"] == [
        {"name": "tensor1", "filename": "", "line": 0},
        {"name": "layers.0.mlp", "filename": "model", "line": 7},
    ]
    assert trace[4]["frames"][0]["name"] == "tensor2"
    large, small = found["segments"]
    assert (large["segment_type"], large["total_size"], large["allocated_size"]) == ("large", 20 * MIB, 5 * MIB)
    assert (large["requested_size"], large["active_size"]) == (5 * MIB - 7, 5 * MIB)
    assert [(b["size"], b["requested_size"], b["state"]) for b in large["blocks"]] == [
        (5 * MIB, 5 * MIB - 7, "active_allocated"),
        (15 * MIB, 0, "inactive"),
    ]
    assert large["blocks"][0]["frames"] == trace[1]["frames"]
    assert small["segment_type"] == "small"
    assert result.peak_allocated_bytes == 8 * MIB


def test_the_pickle_is_one_that_the_viewer_reads(tmp_path: Path) -> None:
    path = tmp_path / "snapshot.pickle"
    write_snapshot(path, snapshot(random_program(500, seed=1))[0])
    found = list(pickletools.genops(path.read_bytes()))
    assert {opcode.name for opcode, _, _ in found} <= VIEWER
    assert next(argument for opcode, argument, _ in found if opcode.name == "PROTO") <= 4
    # JavaScript's numbers are exact up to 2**53
    assert max(argument for opcode, argument, _ in found if isinstance(argument, int)) < 2**53


@pytest.mark.parametrize("text", ["", "expandable_segments:True", "max_split_size_mb:32"])
def test_torchs_viewer_code_opens_it(text: str) -> None:
    """segsum and trace compute from the snapshot; trace_plot and segment_plot embed it in a page."""
    found, result = snapshot(random_program(300, seed=2), settings=parse_settings(text))
    total = re.search(r"total_reserved: (\S+)", _memory_viz.segsum(found))
    assert total is not None
    assert total[1] == str(_memory_viz.Bytes(result.stats.reserved))
    listed = _memory_viz.trace(found)
    assert listed.count("cudaMalloc(") == sum(e["action"] == "segment_alloc" for e in found["device_traces"][0])
    for page in (_memory_viz.trace_plot(found), _memory_viz.segment_plot(found)):
        files = re.search(r"const local_files = (\[.*\])", page)
        assert files is not None
        embedded = base64.b64decode(json.loads(files[1])[0]["base64"])
        assert pickle.loads(embedded) == found
    assert "Active Memory Timeline" in _memory_viz.trace_plot(found)
    flame: list[str] = []
    _memory_viz.memory(found, format_flamegraph=lambda lines: flame.append(lines) or "")
    active = [row.rsplit(" ", 1) for row in flame[0].splitlines() if ";active" in row]
    assert sum(int(size) for _, size in active) == result.stats.active
    assert sum(int(size) for stack, size in active if "<gaps>" not in stack) == result.stats.requested > 0
    assert all("model:7:layers.0.mlp;:0:tensor" in stack for stack, _ in active if "<gaps>" not in stack)


@pytest.mark.parametrize(
    "text", ["", "expandable_segments:True", "max_split_size_mb:32,roundup_power2_divisions:[1:4,>:2]"]
)
def test_what_is_written_is_read_back(text: str, tmp_path: Path) -> None:
    """The file, read as a recording, replays exactly under the settings it names."""
    options = parse_settings(text)
    events = random_program(600, seed=4)
    found, result = snapshot(events, settings=options, on=Device(600 * MIB), device=2)
    path = tmp_path / "snapshot.pickle"
    write_snapshot(path, found)
    recording = read_snapshot(path)
    assert recording.settings == options
    [device] = recording.devices
    assert device.device == 2
    assert device.segments == result.layout
    again = compare(device, options, 600 * MIB)
    assert again.first_difference is None
    assert again.peak_reserved_bytes == result.peak_reserved_bytes


def test_out_of_memory_is_in_the_trace() -> None:
    found, result = snapshot([Alloc(1, 40 * MIB)], on=Device(30 * MIB))
    assert result.out_of_memory_at == 0
    [event] = found["device_traces"][0]
    assert (event["action"], event["device_free"], event["size"]) == ("oom", 30 * MIB, 40 * MIB)
    assert "raise OutOfMemoryError # 40.0MiB requested, 30.0MiB free in CUDA" in _memory_viz.trace(found)
    assert snapshot_from(found).devices[0].events[0].address == 30 * MIB


def test_without_a_description_nothing_is_said() -> None:
    found, _ = memory_snapshot(EVENTS, AllocatorSettings())
    assert {tuple(e["frames"]) for e in found["device_traces"][0]} == {()}
    assert {e["category"] for e in found["device_traces"][0]} == {"unknown"}


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert "cannot write" in line(write_snapshot, tmp_path / "no" / "x.pickle", snapshot()[0])
