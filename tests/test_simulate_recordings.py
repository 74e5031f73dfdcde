"""Traced and replayed without a GPU, beside what real GPUs recorded: the workloads of two public sets of recordings.

The recordings are not part of the project: what they show is carried as figures (`recorded_runs.py`), and where this
machine has them (GALORE_MEM_CUDA_TRACES, or a folder beside the project) every event is compared. All thirteen at full
depth: `benchmarks/recordings.py`.
"""

from __future__ import annotations

from collections import Counter
from functools import cache

import pytest
from recorded_runs import FAILURES, RUNS, Run, extended, failed_at, peaks, recorded_steps, replayed, steps_of, traced

from galore_mem.allocator.oom import format_size
from galore_mem.simulate.addresses import DriverAddresses
from galore_mem.simulate.trace import Trace
from galore_mem.units import MIB

BY_NAME = {run.name: run for run in (*RUNS, *FAILURES)}
# the small model in full, and of the large one a pass and a step whose reserved bytes depend on where segments lie
FIRST = [name for name in BY_NAME if name.startswith("niu")]
SECOND = ["lin_xl_fwd_ctx1024_bf16", "lin_xl_fullstep_ctx512_fp32"]
# at the end of a region, autocast drops the casts it has kept in the order of a hash table of addresses
UNORDERED = "niu_fwd_ctx200_amp"


@cache
def found(name: str) -> Trace:
    run = BY_NAME[name]
    return extended(run) if run.second else traced(run)


@pytest.mark.parametrize("name", [name for name in FIRST if name != UNORDERED] + SECOND)
def test_peaks_are_the_recorded_ones(name: str) -> None:
    """Allocated and reserved, to the byte."""
    run = BY_NAME[name]
    assert peaks(replayed(found(name), run.addresses())) == RUNS[run]


def test_peaks_where_the_order_of_releases_is_not_known() -> None:
    """Reserved to the byte. Which free block a request finds decides how much of it, up to 1 MiB, stays in it unused:
    allocated bytes differ by 0.08 %."""
    run = BY_NAME[UNORDERED]
    said, recorded = peaks(replayed(found(UNORDERED), run.addresses())), RUNS[run]
    assert said.reserved == recorded.reserved
    assert said.allocated == pytest.approx(recorded.allocated, rel=1e-3)


@pytest.mark.parametrize("name", FIRST + SECOND)
def test_every_event_of_a_recording(name: str) -> None:
    """Each allocation and each release, in size and order."""
    run = BY_NAME[name]
    recorded = steps_of(run)
    if recorded is None:
        pytest.skip("the recordings of real GPUs are not on this machine (GALORE_MEM_CUDA_TRACES)")
    said = recorded_steps(found(name))
    if run.autocast:
        assert [n for n in said if n > 0] == [n for n in recorded if n > 0]
        assert Counter(said) == Counter(recorded)
    else:
        assert said == recorded


@pytest.mark.parametrize("name", ["xl_ctx1024_full_step_none", "xl_ctx2048_full_step_bf16", "xl_ctx128_full_step_bf16"])
def test_out_of_memory_where_it_was_recorded(name: str) -> None:
    """The request, its operation, and both numbers of the message as printed; the capacity is the message's own."""
    run: Run = BY_NAME[name]
    message = FAILURES[run]
    result = replayed(found(name), DriverAddresses(), message.capacity)
    failure = result.out_of_memory
    assert failure is not None
    assert failure.tried == message.asked * MIB
    assert format_size(failure.allocated) == message.allocated
    assert format_size(failure.unallocated) == message.unallocated
    assert failed_at(found(name), result) in message.operations
