"""Recorded memory snapshots: what the allocator of a real run did, and how its memory lay at the end.

Two formats: the pickle of `torch.cuda.memory._dump_snapshot` (torch/cuda/memory.py, `_snapshot`), and the gzipped JSON
`cuda-alloc-trace/1` that keeps the same numbers without the stacks. Nothing in a file is trusted: each problem is one
`InputError`.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterable, Mapping
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from galore_mem.allocator.blocks import STATE_NAMES, BlockLayout, SegmentLayout
from galore_mem.allocator.settings import AllocatorSettings
from galore_mem.allocator.snapshot_settings import recorded_settings
from galore_mem.allocator.unpickle import unpickle
from galore_mem.errors import InputError, unknown
from galore_mem.spec.files import parse_object, read_file, shown, shown_path
from galore_mem.units import MIB, format_bytes

LIMIT = 512 * MIB  # bytes of a file, and of what a compressed one holds
TRACE_SCHEMA = "cuda-alloc-trace/1"
MAX_BYTES = 2**48  # a size above 256 TiB is no memory
MAX_ADDRESS = 2**57  # five-level page tables
MAX_STREAM = 2**64  # a stream is a pointer
ACTIONS = frozenset(
    {
        "alloc", "free_requested", "free_completed", "segment_alloc", "segment_free", "segment_map", "segment_unmap",
        "snapshot", "oom",
    }
)  # fmt: skip
_STATES = {name: name for name in STATE_NAMES.values()} | {
    "active_awaiting_free": "active_pending_free",  # its name in the documentation
    "active_pending_free": "active_pending_free",
}


class TraceEvent(NamedTuple):
    """An action of the allocator, as TraceEntry: sizes of blocks are the requested ones. `oom` has the device's free
    bytes for an address."""

    action: str
    address: int
    size: int
    stream: int


class DeviceRecording(NamedTuple):
    """One device: events in order, and the segments when the snapshot was taken, by address."""

    device: int
    events: list[TraceEvent]
    segments: tuple[SegmentLayout, ...]


class Recording(NamedTuple):
    """A snapshot: its devices that did anything, and the settings under which they did."""

    devices: tuple[DeviceRecording, ...]
    settings: AllocatorSettings


def read_snapshot(path: Path, settings: AllocatorSettings | None = None) -> Recording:
    """The recording in a file; `settings` replace the recorded ones. Raises `InputError`."""
    source = shown_path(path)
    data = _decompress(read_file(path, LIMIT), source)
    if data[:1] == b"{":
        return _from_json(parse_object(data, source), source, settings)
    if data[:1] == b"\x80":
        return snapshot_from(unpickle(data, source), source, settings)
    raise InputError(f"{source} is neither a pickled memory snapshot (protocol 2 or newer) nor a {TRACE_SCHEMA} trace")


def _decompress(data: bytes, source: str) -> bytes:
    if data[:2] != b"\x1f\x8b":
        return data
    try:
        with gzip.GzipFile(fileobj=BytesIO(data)) as file:
            plain = file.read(LIMIT + 1)
    except (OSError, EOFError, zlib.error):
        raise InputError(f"{source} is a truncated or broken gzip file") from None
    if len(plain) > LIMIT:
        raise InputError(f"{source} is too large: more than {format_bytes(LIMIT)} when unpacked")
    return plain


# --- pieces ------------------------------------------------------------------


def _number(value: object, what: str, source: str, limit: int) -> int:
    if type(value) is not int or not 0 <= value < limit:
        raise InputError(f"{source}: {what} must be a whole number from 0 to {limit - 1}, got {shown(value)}")
    return value


def _of(kind: type, value: Any, what: str, source: str) -> Any:
    if type(value) is not kind:
        name = {dict: "an object", list: "a list", str: "text", bool: "true or false"}[kind]
        raise InputError(f"{source}: {what} must be {name}, got {shown(value)}")
    return value


def _text(value: object) -> str:
    return value if type(value) is str else shown(value)


def _event(action: object, address: object, size: object, stream: object, what: str, source: str) -> TraceEvent:
    if (
        type(action) is str and type(address) is int and type(size) is int and type(stream) is int
        and action in ACTIONS and 0 <= address < MAX_ADDRESS and 0 <= size < MAX_BYTES and 0 <= stream < MAX_STREAM
    ):  # fmt: skip
        return TraceEvent(action, address, size, stream)
    if type(action) is not str or action not in ACTIONS:
        raise InputError(f"{source}: {what}: {unknown('action', _text(action), ACTIONS)}")
    return TraceEvent(
        action,
        _number(address, f"{what}: address", source, MAX_ADDRESS),
        _number(size, f"{what}: size", source, MAX_BYTES),
        _number(stream, f"{what}: stream", source, MAX_STREAM),
    )


def _block(address: int, size: object, requested: object, state: object, what: str, source: str) -> BlockLayout:
    if type(state) is not str or state not in _STATES:
        raise InputError(f"{source}: {what}: {unknown('state', _text(state), _STATES)}")
    bytes_ = _number(size, f"{what}: size", source, MAX_BYTES)
    asked = _number(requested, f"{what}: requested size", source, MAX_BYTES)
    if not bytes_ or (state != "inactive" and asked > bytes_):
        raise InputError(f"{source}: {what}: a block of {bytes_} bytes cannot hold {asked}")
    return BlockLayout(address, bytes_, 0 if state == "inactive" else asked, _STATES[state])


def _segment(raw: Mapping[str, Any], blocks: Iterable[tuple[Any, Any, Any]], what: str, source: str) -> SegmentLayout:
    """A segment from its fields and (size, requested size, state) of the blocks that must tile it."""
    start = address = _number(raw.get("address"), f"{what}: address", source, MAX_ADDRESS)
    total = _number(raw.get("total_size"), f"{what}: total size", source, MAX_BYTES)
    kind = raw.get("segment_type")
    if kind not in ("small", "large"):
        raise InputError(f"{source}: {what}: segment type must be small or large, got {shown(kind)}")
    expandable = _of(bool, raw.get("is_expandable", False), f"{what}: is_expandable", source)
    laid = []
    for n, (size, requested, state) in enumerate(blocks):
        laid.append(_block(address, size, requested, state, f"{what}, block {n}", source))
        address += laid[-1].size
    if address != start + total or not laid:
        raise InputError(f"{source}: {what}: its {len(laid)} blocks are {address - start} bytes, it has {total}")
    stream = _number(raw.get("stream"), f"{what}: stream", source, MAX_STREAM)
    return SegmentLayout(start, total, stream, kind == "small", expandable, tuple(laid))


def _apart(segments: list[SegmentLayout], source: str) -> tuple[SegmentLayout, ...]:
    segments.sort()
    for a, b in pairwise(segments):
        if a.address + a.size > b.address:
            raise InputError(f"{source}: segments at {a.address:#x} and {b.address:#x} overlap")
    return tuple(segments)


def _no_private_pool(pool: object, source: str) -> None:
    if pool is not None and list(_sequence(pool, "pool id", source)) != [0, 0]:
        raise InputError(f"{source} has private pools (CUDA graphs or MemPool), which are not modeled")


def _sequence(value: Any, what: str, source: str) -> list[Any] | tuple[Any, ...]:
    if type(value) not in (list, tuple):
        raise InputError(f"{source}: {what} must be a list, got {shown(value)}")
    return value  # type: ignore[no-any-return]  # a list or a tuple, as checked


# --- the two formats ---------------------------------------------------------


def snapshot_from(snapshot: object, source: str = "snapshot", settings: AllocatorSettings | None = None) -> Recording:
    """The recording in the object that `torch.cuda.memory._snapshot()` returns. Raises `InputError`."""
    whole = _of(dict, snapshot, "the snapshot", source)
    traces = _of(list, whole.get("device_traces"), "device_traces", source)
    segments: dict[int, list[SegmentLayout]] = {}
    for n, raw in enumerate(_of(list, whole.get("segments"), "segments", source)):
        what = f"segment {n}"
        fields = _of(dict, raw, what, source)
        _no_private_pool(fields.get("segment_pool_id"), source)
        blocks = [_of(dict, b, f"{what}: a block", source) for b in _of(list, fields.get("blocks"), what, source)]
        device = _number(fields.get("device", 0), f"{what}: device", source, max(len(traces), 1))
        rows = [(b.get("size"), b.get("requested_size", b.get("size")), b.get("state")) for b in blocks]
        segments.setdefault(device, []).append(_segment(fields, rows, what, source))

    def events(n: int, trace: object) -> list[TraceEvent]:
        found = []
        for i, raw in enumerate(_of(list, trace, f"trace {n}", source)):
            what = f"trace {n}, event {i}"
            e = _of(dict, raw, what, source)
            address = e.get("device_free" if e.get("action") == "oom" else "addr")
            found.append(_event(e.get("action"), address, e.get("size"), e.get("stream"), what, source))
        return found

    return _recording(
        ((n, events(n, trace), segments.get(n, [])) for n, trace in enumerate(traces)),
        settings or recorded_settings(whole.get("allocator_settings"), source),
        source,
    )


def _from_json(whole: Mapping[str, Any], source: str, settings: AllocatorSettings | None) -> Recording:
    if whole.get("schema") != TRACE_SCHEMA:
        raise InputError(f"{source}: schema must be {TRACE_SCHEMA!r}, got {shown(whole.get('schema'))}")

    def row(raw: object, what: str, least: int) -> list[Any]:
        values: list[Any] = _of(list, raw, what, source)
        if len(values) < least:
            raise InputError(f"{source}: {what} must have {least} values, got {len(values)}")
        return values

    def segment(raw: object, what: str) -> SegmentLayout:
        fields = _of(dict, raw, what, source)
        _no_private_pool(fields.get("pool"), source)
        rows = [row(b, f"{what}, block {n}", 4) for n, b in enumerate(_of(list, fields.get("blocks"), what, source))]
        return _segment(fields, [(b[1], b[2], b[3]) for b in rows], what, source)

    def device(n: int, raw: object) -> tuple[int, list[TraceEvent], list[SegmentLayout]]:
        fields = _of(dict, raw, f"device entry {n}", source)
        events = []
        for i, e in enumerate(_of(list, fields.get("events"), f"device entry {n}: events", source)):
            what = f"device entry {n}, event {i}"
            action, address, size, stream = row(e, what, 4)[:4]
            events.append(_event(action, address, size, stream, what, source))
        raws = _of(list, fields.get("segments"), f"device entry {n}: segments", source)
        segments = [segment(s, f"device entry {n}, segment {i}") for i, s in enumerate(raws)]
        return _number(fields.get("device"), f"device entry {n}: device", source, 2**16), events, segments

    return _recording(
        (device(n, raw) for n, raw in enumerate(_of(list, whole.get("devices"), "devices", source))),
        settings or recorded_settings(whole.get("allocator_settings"), source),
        source,
    )


def _recording(
    devices: Iterable[tuple[int, list[TraceEvent], list[SegmentLayout]]], settings: AllocatorSettings, source: str
) -> Recording:
    found = tuple(
        DeviceRecording(n, events, _apart(segments, source)) for n, events, segments in devices if events or segments
    )
    if not found:
        raise InputError(f"{source} has neither events nor segments; was torch.cuda.memory._record_memory_history on?")
    return Recording(found, settings)
