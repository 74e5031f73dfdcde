"""What a phase of a traced program allocated, as lines of text: one a tensor, by module and operation.

    saved     self_attn _softmax float32 2x4x24x24

The first word is what became of it: `saved` is alive when backward begins, `gradient` and `state` are what their names
say, `kept` is anything else that outlives its phase, `temporary` does not. A module's path begins inside its layer (`.`
is the layer itself). A size is the tensor's shape; where its storage has other bytes, they are given too. Names of
overloads and addresses are left out. So is what kernels allocate inside: that is in tables of this package, and not in
torch or transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from math import prod

import torch

from galore_mem.memory.tensor import GRADIENTS, OPTIMIZER_STATE
from galore_mem.simulate.trace import Allocation, Mark, Trace

LAYER = re.compile(r"(?<=\.)\d+(?=\.|$)")  # of a module's path: the first number between dots
OUTSIDE = "outside the layers"


@dataclass(slots=True)
class Part:
    """What one layer allocated in a phase, or all that is in none: its lines in the order of the program, each with how
    often it is there. Two parts are equal in whatever order they have them.

    `kept`: bytes of it that outlive the phase. `highest`: bytes by which the live ones rose at most since it was
    entered, which tells what lines do not: what lives together.
    """

    lines: dict[str, int] = field(default_factory=dict)
    kept: int = 0
    highest: int = 0


def parts_of(trace: Trace, phase: str) -> dict[str, Part]:
    """The parts of a phase that the program enters once, by name."""
    start, end = span(trace, phase)
    alive = set(trace.alive(end - 1))
    found: dict[str, Part] = {}
    for name, events in pieces(trace, start, end):
        part = found.setdefault(name, Part())
        part.highest = max(part.highest, rise(trace, events))
        for index in events:
            if index >= 0:
                one = trace.allocations[index]
                line = line_of(one, phase, lives=index in alive)
                part.lines[line] = part.lines.get(line, 0) + 1
                part.kept += one.nbytes * (index in alive)
    return found


def span(trace: Trace, phase: str) -> tuple[int, int]:
    """The numbers of its first event and of the one after its last."""
    marks = [*trace.marks, Mark(len(trace.events), "")]
    (found,) = [(here.at, after.at) for here, after in pairwise(marks) if here.phase == phase]
    return found


def pieces(trace: Trace, start: int, end: int) -> Iterator[tuple[str, list[int]]]:
    """Events cut where a tensor is made in another layer than the one before, without those of kernels' buffers."""
    now, named = "", []
    for event in trace.events[start:end]:
        one = trace.allocations[max(event, ~event)]
        if one.kernel:
            continue
        if event >= 0 or not now:
            now = layer_of(one)
        named.append((now, event))
    for name, together in groupby(named, key=lambda pair: pair[0]):
        yield name, [event for _, event in together]


def layer_of(one: Allocation) -> str:
    found = LAYER.search(one.module)
    return f"layer {found[0]}" if found else OUTSIDE


def rise(trace: Trace, events: Sequence[int]) -> int:
    """Bytes by which the live ones are higher, at most, than before these events."""
    live = highest = 0
    for event in events:
        live += trace.allocations[event].nbytes if event >= 0 else -trace.allocations[~event].nbytes
        highest = max(highest, live)
    return highest


def line_of(one: Allocation, phase: str, *, lives: bool) -> str:
    module = inside(one.module)
    op = re.sub(r"^aten\.|\.\w*$", "", one.op)
    size = f"{one.dtype} {'x'.join(map(str, one.shape)) or 'scalar'}"
    if one.nbytes != prod(one.shape) * getattr(torch, one.dtype).itemsize:
        size += f" in {one.nbytes} bytes"
    fate = fate_of(one, phase) if lives else "temporary"
    named = f" {one.name}" if fate == "state" else ""
    return f"{fate:<9} {module} {op} {size}{named}"


def inside(path: str) -> str:
    """A module's path from its layer on; the whole path where it is in none."""
    found = LAYER.search(path)
    return (path[found.end() + 1 :] or ".") if found else path or "-"


def fate_of(one: Allocation, phase: str) -> str:
    """Of what outlives its phase."""
    known = {GRADIENTS: "gradient", OPTIMIZER_STATE: "state"}
    return "saved" if phase == "forward" else known.get(one.category, "kept")
