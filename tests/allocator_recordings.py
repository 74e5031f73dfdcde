"""Recordings for tests: made by the model itself, and the real ones where this machine has them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from allocator_cases import Trace

from galore_mem.allocator.blocks import Block
from galore_mem.allocator.caching import CachingAllocator
from galore_mem.allocator.device import Device
from galore_mem.allocator.events import Alloc, EmptyCache, Event, Finish, Free, RecordStream
from galore_mem.allocator.expandable import new_allocator
from galore_mem.allocator.oom import OutOfMemoryError
from galore_mem.allocator.settings import AllocatorSettings
from galore_mem.allocator.snapshot import DeviceRecording, TraceEvent

VARIABLE = "GALORE_MEM_CUDA_TRACES"
CHECKOUT = Path(__file__).resolve().parent.parent


def real_traces() -> list[Path]:
    """Recordings of real GPUs: not part of the project; `GALORE_MEM_CUDA_TRACES` or a folder beside it names them."""
    folder = Path(os.environ.get(VARIABLE) or CHECKOUT.parent / "shared" / "data" / "cuda_traces")
    return sorted(folder.glob("traces/*.json.gz"))


def run(allocator: CachingAllocator, events: Sequence[Event]) -> None:
    """Serve a program that goes on after out of memory, as one does that catches it."""
    blocks: dict[int, Block] = {}
    waits: dict[int, int | None] = {}
    for event in events:
        if isinstance(event, Alloc):
            try:
                blocks[event.id] = allocator.malloc(event.size, event.stream)
            except OutOfMemoryError:
                continue
        elif isinstance(event, EmptyCache):
            allocator.empty_cache()
        elif event.id in blocks:
            block = blocks[event.id]
            if isinstance(event, RecordStream):
                allocator.record_stream(block, event.stream)
            elif isinstance(event, Free):
                allocator.free(block)
                waits[event.id] = allocator.held.get(block)
            elif isinstance(event, Finish) and waits[event.id] == allocator.held.get(block, 0):
                allocator.finish(block)


def record(
    events: Sequence[Event], settings: AllocatorSettings | None = None, capacity: int | None = None, skip: int = 0
) -> tuple[DeviceRecording, CachingAllocator]:
    """What the model does with a program, as a recording without its first `skip` events; and the model."""
    trace: Trace = []

    def observe(action: str, address: int, size: int, stream: int) -> None:
        trace.append((action, address, size, stream))

    allocator = new_allocator(settings, Device(capacity), observe)
    run(allocator, events)
    recorded = [TraceEvent(*entry) for entry in trace[skip:]]
    return DeviceRecording(0, recorded, allocator.layout()), allocator
