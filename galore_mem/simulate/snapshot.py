"""A simulated run as a memory snapshot that PyTorch's memory visualizer opens. No torch."""

from __future__ import annotations

from pathlib import Path

from galore_mem.allocator.export import Description, Frame, memory_snapshot, write_snapshot
from galore_mem.allocator.settings import AllocatorSettings
from galore_mem.memory.tensor import CATEGORIES
from galore_mem.simulate.device import Run, card, requests


def write(path: Path, run: Run, settings: AllocatorSettings, capacity: int | None = None, other: int = 0) -> None:
    """The run on a device of this capacity, `other` bytes of which are taken: where it runs out of memory, up to there.
    Raises `InputError` where the file cannot be written."""
    snapshot, _ = memory_snapshot(
        requests(run.trace), settings, on=card(capacity, other, run.platform), describe=lambda i: describe(run, i)
    )
    write_snapshot(path, snapshot)


def describe(run: Run, index: int) -> Description:
    """An allocation as the viewer's stack: the tensor, the operation that made it, its module."""
    one = run.trace.allocations[index]
    shape = " x ".join(map(str, one.shape)) or "scalar"
    lines = [("tensor", one.name), ("shape", f"{one.dtype} {shape}" if one.dtype else "")]
    lines += [("operation", one.op), ("module", one.module)]
    return Description(tuple(Frame(text, what) for what, text in lines if text), CATEGORIES[one.category])
