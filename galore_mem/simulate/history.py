"""A traced run as its device meets it: what loading leaves there, then step by step, in the phases of the report.

The traced program makes its model where nothing has values, one way or another. A real one reads it from a file and
puts it on the device tensor by tensor; or, where it is quantized, matrix by matrix (`galore_mem.simulate.loads`). So
of all that happens before the first step only what stays is taken, in the order in which it was made or read; and the
libraries' workspaces, which exist from the first product on, come after it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from galore_mem.setup import LOADS
from galore_mem.simulate.loads import Read, loaded
from galore_mem.simulate.result import FIRST, LOAD
from galore_mem.simulate.trace import WORKSPACE, Mark, Trace
from galore_mem.verify.case import BETWEEN, WARM

FORWARD, BACKWARD, UPDATE = "forward", "backward", "step"  # the parts of a step
# what runs outside of every module, by part; in hooks of a layer-wise update, the optimizer runs in backward
OUTSIDE = {FORWARD: "(batch)", BACKWARD: "(backward)", UPDATE: "(optimizer)"}
IN_HOOKS = {**OUTSIDE, BACKWARD: "(optimizer)"}


class Begins(NamedTuple):
    """From event number `at` on, the program is in this phase of the report, and this part of a step."""

    at: int
    phase: str
    part: str


def history(trace: Trace, *, hooks: bool = False, load: str = LOADS[0], read: Read | None = None) -> Trace:
    """The events and marks of a run from the start of its process. The first mark of a trace is where the model is
    made, the second where the first step begins. What no module allocates is said to be the optimizer's, or whose it
    is; `hooks`: the optimizer runs in those of a layer-wise update; `load`, `read`: as for `loads.loaded`."""
    begin = trace.marks[1].at if len(trace.marks) > 1 else len(trace.events)
    found = replace(trace, allocations=list(trace.allocations), events=[], marks=[], emptied=[])
    before = loaded(replace(trace, allocations=found.allocations, emptied=found.emptied), begin, load, read)
    kernels = [i for i in trace.alive(begin - 1) if trace.allocations[i].kernel]
    found.events += [*before, *kernels, *trace.events[begin:]]
    moved = len(found.events) - len(trace.events)
    found.emptied += [at + moved for at in trace.emptied if at >= begin]
    steps = [at._replace(at=at.at + moved) for at in named(trace.marks[1:])]
    if steps:
        steps[0] = steps[0]._replace(at=len(before))
    found.marks += [Mark(0, LOAD), *(Mark(at, phase) for at, phase, _ in steps)]
    if steps:
        _place(found, steps, IN_HOOKS if hooks else OUTSIDE)
    return found


def _place(trace: Trace, steps: Sequence[Begins], outside: Mapping[str, str]) -> None:
    """Gives what is allocated outside of modules a place; libraries' own workspaces have none."""
    ends = [*(step.at for step in steps[1:]), len(trace.events)]
    for step, end in zip(steps, ends, strict=True):
        for event in trace.events[step.at : end]:
            if event >= 0:
                one = trace.allocations[event]
                if not one.module and one.op != WORKSPACE:
                    trace.allocations[event] = replace(one, module=outside[step.part])


def named(marks: Sequence[Mark]) -> Iterator[Begins]:
    """Marks with the report's phases: `verify` names those of the two steps that it compares, and nothing of others.

    Steps before the first that it names are the first step's. What is between two steps belongs to what came before:
    nothing but releases (or, of some layer-wise updates, the last parameter's).
    """
    seen = False
    for body in steps_of(marks):
        seen = seen or any(mark.phase != WARM for mark in body)
        last = len(body) - 1
        for i, mark in enumerate(body):
            part = UPDATE if i == last and len(body) % 2 else (FORWARD, BACKWARD)[i % 2]
            yield Begins(mark.at, mark.phase if mark.phase != WARM else part if seen else FIRST, part)


def steps_of(marks: Sequence[Mark]) -> Iterator[list[Mark]]:
    """The marks of each step: forward and backward of each micro-batch, then (unless hooks do it) the update."""
    body: list[Mark] = []
    for mark in marks:
        if mark.phase != BETWEEN:
            body.append(mark)
        elif body:
            yield body
            body = []
    if body:
        yield body
