"""The same training run twice: for real, read from the CPU allocator's events, and traced."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from itertools import pairwise

import torch

from galore_mem.simulate.session import Traced, trace_work
from galore_mem.simulate.trace import Trace
from galore_mem.verify.builders import builder
from galore_mem.verify.case import Case
from galore_mem.verify.kernels import chosen_kernels
from galore_mem.verify.meters import CpuMeter, _happened
from galore_mem.verify.predict import predict
from galore_mem.verify.workloads import Measured, run_train

# Bytes. Python's numbers beside tensors become tensors of up to 8 bytes for the length of an operation, in C++, which
# no dispatch mode sees.
NUMBER = 16

Phase = tuple[str, list[int]]  # its name and what happened in it: bytes taken, negative when given back


def measured_run(case: Case) -> tuple[Measured, list[Phase]]:
    """What stays, and every event of the allocator."""
    said, row = predict(case), builder(case.method, case.implementation)
    gc.collect()
    torch.manual_seed(0)
    with CpuMeter() as meter, chosen_kernels(said.work), row.around():
        found = run_train(said.work, row, torch.device("cpu"), meter)
    stream = sorted(_happened(meter._profile), key=lambda one: one[0])
    return found, phases([what for _, what in stream])


def measured(program: Callable[[CpuMeter], Measured]) -> tuple[Measured, dict[str, int]]:
    """What stays after a program that runs for real, one thread, without oneDNN; and the most bytes in each phase."""
    gc.collect()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with CpuMeter() as meter, torch.backends.mkldnn.flags(enabled=False):
            found = program(meter)
    return found, {phase: peak.allocated for phase, peak in meter.peaks().items()}


def traced_run(case: Case) -> Traced:
    return trace_work(predict(case).work, builder(case.method, case.implementation))


def events(trace: Trace) -> list[Phase]:
    """The trace as the allocator's events."""
    found: list[Phase] = []
    ends = [*(mark.at for mark in trace.marks), len(trace.events)]
    for mark, (start, end) in zip(trace.marks, pairwise(ends), strict=True):
        sizes = [trace.allocations[max(e, ~e)].nbytes * (1 if e >= 0 else -1) for e in trace.events[start:end]]
        found.append((mark.phase, [n for n in sizes if abs(n) > NUMBER]))
    return found


def phases(stream: list[str | int]) -> list[Phase]:
    """Events cut where phases begin; what was before the first is left out."""
    found: list[Phase] = []
    for what in stream:
        if isinstance(what, str):
            found.append((what, []))
        elif found and abs(what) > NUMBER:
            found[-1][1].append(what)
    return found


def alike(a: Trace, b: Trace) -> bool:
    """Are all events, phases and allocations the same, names and sizes included?"""
    return (a.granularity, a.events, a.marks, a.allocations) == (b.granularity, b.events, b.marks, b.allocations)
