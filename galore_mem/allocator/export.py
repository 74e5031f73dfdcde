"""Write a replay as a memory snapshot that PyTorch's memory visualizer opens (pytorch.org/memory_viz, MemoryViz.js).

Keys as `torch.cuda.memory._snapshot` (torch/cuda/memory.py) makes them. Where a real snapshot has a stack trace, this
has what is known of a tensor: its name, module, operation. The viewer reads pickles of protocol 2 to 4 only.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from galore_mem.allocator.blocks import SegmentLayout
from galore_mem.allocator.device import Device
from galore_mem.allocator.events import Alloc, Event, Mark
from galore_mem.allocator.expandable import new_allocator
from galore_mem.allocator.replay import ReplayResult, replay
from galore_mem.allocator.settings import UNLIMITED, AllocatorSettings
from galore_mem.errors import InputError
from galore_mem.spec.files import shown_path
from galore_mem.units import MIB

_PROTOCOL = 4
# the viewer colors by category once one event has one; it fails (MemoryViz.js, annotate_snapshot) if none is `unknown`
UNKNOWN = "unknown"


class Frame(NamedTuple):
    """A line of the viewer's stack, shown as `filename:line:name`."""

    name: str
    filename: str = ""
    line: int = 0


class Description(NamedTuple):
    """What the viewer says of a block: frames, the innermost first, and the category that gives its color."""

    frames: Sequence[Frame] = ()
    category: str = UNKNOWN


_NOTHING = Description()
Describe = Callable[[int], Description]


def describe_nothing(_: int) -> Description:
    return _NOTHING


def memory_snapshot(
    events: Iterable[Event],
    settings: AllocatorSettings | None = None,
    *,
    on: Device | None = None,
    describe: Describe = describe_nothing,
    device: int = 0,
) -> tuple[dict[str, Any], ReplayResult]:
    """Replay the events on a device (None: one without a limit) and return the snapshot at their end, with the
    replay's result.

    `describe` tells of an allocation by its id. Times are the numbers of events, as the model knows no clock; each
    event's metadata names its phase (`Mark`).
    """
    settings = settings or AllocatorSettings()
    writer = _Writer(describe, device)
    result = replay(writer.follow(events), new_allocator(settings, on, writer.observe))
    traces: list[list[dict[str, Any]]] = [[] for _ in range(device)] + [writer.trace]
    snapshot = {
        "segments": [writer.segment(segment) for segment in result.layout],
        "device_traces": traces,
        "allocator_settings": _settings(settings),
        "external_annotations": [],
    }
    return snapshot, result


def write_snapshot(path: Path, snapshot: dict[str, Any]) -> None:
    """Write the pickle that the viewer opens. Raises `InputError` where the file system refuses."""
    try:
        with path.open("wb") as file:
            pickle.dump(snapshot, file, _PROTOCOL)
    except OSError as error:
        raise InputError(f"cannot write {shown_path(path)}: {error.strerror}") from None


class _Writer:
    """Turns what the allocator does into trace entries; knows which event it serves at the moment."""

    def __init__(self, describe: Describe, device: int) -> None:
        self._describe = describe
        self._device = device
        self._at = 0
        self._serving = 0
        self._phase = ""
        self._frames: dict[tuple[Frame, ...], list[dict[str, Any]]] = {}
        self._told: dict[int, Description] = {}  # of the blocks alive, by address
        self.trace: list[dict[str, Any]] = []

    def follow(self, events: Iterable[Event]) -> Iterable[Event]:
        for self._at, event in enumerate(events):
            if isinstance(event, Alloc):
                self._serving = event.id
            elif isinstance(event, Mark):
                self._phase = event.name
            yield event

    def _lines(self, description: Description) -> list[dict[str, Any]]:
        """One list for equal frames: the pickle then holds them once."""
        key = tuple(description.frames)
        if key not in self._frames:
            self._frames[key] = [{"name": f.name, "filename": f.filename, "line": f.line} for f in key]
        return self._frames[key]

    def observe(self, action: str, address: int, size: int, stream: int) -> None:
        block = not action.startswith("segment")
        if action == "alloc":
            self._told[address] = self._describe(self._serving)
        told = self._told.get(address, _NOTHING) if block else _NOTHING
        if action == "free_completed":
            self._told.pop(address, None)
        self.trace.append(
            {
                "action": action,
                "device_free" if action == "oom" else "addr": address,
                "size": size,
                "stream": stream,
                "time_us": self._at,
                "frames": self._lines(told),
                "category": told.category,
                "user_metadata": self._phase,
            }
        )

    def segment(self, segment: SegmentLayout) -> dict[str, Any]:
        blocks = []
        for b in segment.blocks:
            told = self._told.get(b.address, _NOTHING) if b.state != "inactive" else _NOTHING
            blocks.append(
                {
                    "address": b.address,
                    "size": b.size,
                    "requested_size": b.requested,
                    "state": b.state,
                    "frames": self._lines(told),
                }
            )
        active = [b for b in segment.blocks if b.state != "inactive"]
        return {
            "device": self._device,
            "address": segment.address,
            "total_size": segment.size,
            "allocated_size": sum(b.size for b in active if b.state == "active_allocated"),
            "active_size": sum(b.size for b in active),
            "requested_size": sum(b.requested for b in active),
            "stream": segment.stream,
            "segment_type": "small" if segment.small else "large",
            "segment_pool_id": (0, 0),
            "is_expandable": segment.expandable,
            "frames": [],
            "blocks": blocks,
        }


def settings_text(settings: AllocatorSettings) -> str:
    """The settings as PYTORCH_ALLOC_CONF spells them; nothing for defaults."""
    default = AllocatorSettings()
    rounds = ",".join(f"{1 << i}:{n}" for i, n in enumerate(settings.roundup_power2_divisions))
    rows = (
        ("large_segment_size_mb", "large_segment_size", settings.large_segment_size // MIB),
        ("max_split_size_mb", "max_split_size", settings.max_split_size // MIB),
        ("max_non_split_rounding_mb", "max_non_split_rounding", settings.max_non_split_rounding // MIB),
        ("garbage_collection_threshold", "garbage_collection_threshold", settings.garbage_collection_threshold),
        ("per_process_memory_fraction", "per_process_memory_fraction", settings.per_process_memory_fraction),
        ("expandable_segments", "expandable_segments", settings.expandable_segments),
        ("roundup_power2_divisions", "roundup_power2_divisions", f"[{rounds}]"),
    )
    return ",".join(f"{key}:{value}" for key, name, value in rows if getattr(settings, name) != getattr(default, name))


def _settings(settings: AllocatorSettings) -> dict[str, Any]:
    return {
        "PYTORCH_CUDA_ALLOC_CONF": settings_text(settings),
        "max_split_size": -1 if settings.max_split_size == UNLIMITED else settings.max_split_size,
        "garbage_collection_threshold": settings.garbage_collection_threshold,
        "expandable_segments": settings.expandable_segments,
        "roundup_power2_divisions": {str(1 << i): n for i, n in enumerate(settings.roundup_power2_divisions)},
    }
