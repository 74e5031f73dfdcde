"""`estimate` through the allocator: the whole run on sizes, replayed on a card. No torch.

The closed form counts tensors. Here the same twin runs with every layer, step after step, and its allocations go
through the model of the CUDA caching allocator: what its blocks leave unused (slack) is in the peaks, as
`torch.cuda.max_memory_allocated` has it, and what it reserves is known.
"""

from __future__ import annotations

from typing import NamedTuple

from galore_mem.allocator.settings import AllocatorSettings
from galore_mem.collector import paused
from galore_mem.dtypes import NF4
from galore_mem.errors import InputError
from galore_mem.memory.phases import PHASES, Work
from galore_mem.memory.whole import whole
from galore_mem.result import Phase
from galore_mem.simulate.device import on_cuda
from galore_mem.simulate.loads import QUANTIZED, Read, loaded
from galore_mem.simulate.trace import Allocation, Mark, Trace

PEFT = "0.21"  # the release that the ledgers follow (galore_mem/methods/lora.py)


class Followed(NamedTuple):
    """Each phase's highest moment in the allocator's blocks, with what was reserved then; the most that ever was."""

    phases: tuple[Phase, ...]
    reserved: int


def follow(work: Work, settings: AllocatorSettings | None = None) -> Followed:
    """The run on a CUDA card without a limit. Raises `InputError` for a setup on the CPU, which has no such
    allocator."""
    if work.setup.device != "cuda":
        raise InputError("--reserved follows the CUDA allocator; leave it out with --device cpu")
    with paused():  # reference counts free what the twin makes; the collector would only look at it again and again
        run = on_cuda(trace(work), settings or AllocatorSettings())
    highest, reserved = run.highest(), run.most_reserved()
    phases = tuple(
        Phase(name, highest[name].live, None, reserved[name], run.slack(highest[name].at))
        for name in PHASES
        if name in highest
    )
    return Followed(phases, max(reserved.values()))


def trace(work: Work) -> Trace:
    """The whole run as the allocator meets it."""
    log = whole(work)
    made = [Allocation(n, "", "", "", category) for n, category in zip(log.sizes, log.categories, strict=True)]
    for number, (name, fmt) in log.stored.items():
        made[number].name, made[number].dtype = name, QUANTIZED if fmt is NF4 else fmt.name
    quantized = any(fmt is NF4 for _, fmt in log.stored.values())
    read = Read(work.setup.recipe.weights.bits // 8, PEFT) if quantized else None
    found = Trace(work.setup.granularity, made, log.events)
    begin = log.marks[1][0]
    before = loaded(found, begin, work.setup.load, read)
    moved = len(before) - begin
    found.events = before + log.events[begin:]
    found.marks = [Mark(at + moved if at else 0, phase) for at, phase in log.marks]
    return found
