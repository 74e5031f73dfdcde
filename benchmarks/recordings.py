"""Traced and replayed without a GPU, beside recordings of real GPUs: docs/recordings.md.

    python benchmarks/recordings.py > docs/recordings.md

Simulates the equivalent of each recorded run (tests/recorded_runs.py) at its full depth, as `galore-mem simulate
--model module:function` does. Peaks are compared with figures taken from the recordings; each event with the recordings
themselves, where this machine has them (the environment variable GALORE_MEM_CUDA_TRACES, or
../shared/data/cuda_traces). Exit code 1 if a peak is farther off than 0.1 % allocated or 1 % reserved, or an
out-of-memory error is not where it was.
"""

from __future__ import annotations

import datetime
import os
import platform
import sys
import time
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from recorded_runs import (
    FAILURES,
    RUNS,
    Failure,
    Peaks,
    Run,
    peaks,
    peaks_of,
    recorded_steps,
    replayed,
    simulated,
    steps_of,
    trace_of,
)

from galore_mem.allocator.oom import format_size
from galore_mem.simulate.device import PLATFORMS
from galore_mem.simulate.trace import Trace
from galore_mem.units import MIB

HEAD = """# Recordings

Written by `python benchmarks/recordings.py` on {date}: Python {python}, torch {torch}, no GPU.

Two public repositories hold memory snapshots (`torch.cuda.memory._dump_snapshot`) of language models that their authors
ran on real GPUs, as part of Stanford's course CS336:

- `niu_*`: <https://github.com/NiuHuangxiaozi/assignment2-systems>, 23 million parameters, torch 2.6;
- `lin_*`: <https://github.com/LINYUNLinYun/CS336-assignment2-systems>, 3.4 billion parameters, torch 2.11.

The models' equivalents in `tests/recorded_models.py`, and their authors' loops around them (`tests/recorded_runs.py`),
ran here without values as programs of one's own ([own.md](own.md)): from the start of the process, for `lin_*` through
five steps before the recorded one.

*Events* are allocations and releases in the recorded window, *equal* those of the same size at the same place in the
order. Peaks are of that window, in MiB, *recorded* as a replay of the recording on its own addresses has them.
"""

TABLE = """
| run | allocations equal | events equal | allocated | recorded | error | reserved | recorded | error | s |
|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|"""

EXCEPTIONS = """
Exceptions and assumptions:

- With autocast (`amp`, `bf16`) C++ drops the casts it has kept, at the end of a region, in the order of a hash table of
  addresses. All of them go, but in an order that nothing can predict; where the recording is of a forward pass they are
  the only events that are not equal. In `niu_fwd_ctx200_amp` this decides which blocks later requests find, and so how
  much of them stays unused: the only peak that is not exact.
- `niu_train_*` were recorded with torch 2.6, for which `x[:, -1, :]` is three operations; torch 2.13 leaves out the two
  that select everything. The equivalent runs all three (`last_rows`). Without, allocated bytes are 2.7 to 4.4 % lower.
- A cuBLAS workspace has 8,519,680 B, as on cards before Hopper. `niu_*` show it; in `lin_*` it was made before.
- Where segments lie decides between free blocks of one size (`--platform`). The first recordings' lie one above the
  other, as under Windows and its subsystem for Linux; the second's as `galore_mem.simulate.addresses` has it. The other
  way around:
"""

OTHERS = """
| run | allocated | error | reserved | error |
|---|---:|---:|---:|---:|"""

ERRORS = """
## Out of memory

The second repository's logs hold six messages of runs that did not fit: a card of 94.97 GiB, and for 128 positions one
of 23.52 GiB. The capacity for the allocator is the message's own (allocated + reserved but unallocated + free). All
else is predicted: the request, its operation (for the forward pass the traceback names it), both numbers.

| run | asked for | recorded | operation | allocated | recorded | unallocated | recorded |
|---|---:|---:|---|---:|---:|---:|---:|"""


class Row(NamedTuple):
    run: Run
    said: Peaks
    other: Peaks
    seconds: float
    cells: tuple[str, str]  # allocations and events equal

    @property
    def fine(self) -> bool:
        recorded = RUNS[self.run]
        return (
            abs(self.said.allocated / recorded.allocated - 1) <= 1e-3
            and abs(self.said.reserved / recorded.reserved - 1) <= 1e-2
        )


def equal(found: Trace, run: Run) -> tuple[str, str]:
    """How many allocations, and how many events, are the recorded ones."""
    recorded = steps_of(run)
    if recorded is None:
        return "not here", "not here"
    said = recorded_steps(found)
    taken, there = ([n for n in steps if n > 0] for steps in (said, recorded))
    same = sum(a == b for a, b in zip(taken, there, strict=False))
    events = f"{sum(a == b for a, b in zip(said, recorded, strict=False)):,} of {len(recorded):,}"
    reordered = said != recorded and Counter(said) == Counter(recorded)
    return f"{same:,} of {len(there):,}", events + (" (the others in another order)" if reordered else "")


def rows() -> Iterator[Row]:
    for run in RUNS:
        print(f"{run.name:40}", end="\r", file=sys.stderr, flush=True)
        begin = time.perf_counter()
        made = simulated(run)
        seconds = time.perf_counter() - begin
        (other,) = PLATFORMS.keys() - {run.platform}
        found = trace_of(made)
        yield Row(run, peaks_of(made), peaks(replayed(found, PLATFORMS[other]())), seconds, equal(found, run))


def error(said: int, recorded: int) -> str:
    return "exact" if said == recorded else f"{said / recorded - 1:+.3%}"


def mib(n: int) -> str:
    return f"{n / MIB:,.2f}"


def line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def show(row: Row) -> str:
    said, recorded = row.said, RUNS[row.run]
    return line(
        row.run.name, *row.cells,
        mib(said.allocated), mib(recorded.allocated), error(said.allocated, recorded.allocated),
        mib(said.reserved), mib(recorded.reserved), error(said.reserved, recorded.reserved), f"{row.seconds:.1f}",
    )  # fmt: skip


def show_other(row: Row) -> str:
    said, recorded = row.other, RUNS[row.run]
    return line(
        row.run.name, mib(said.allocated), error(said.allocated, recorded.allocated),
        mib(said.reserved), error(said.reserved, recorded.reserved),
    )  # fmt: skip


def show_failure(run: Run, message: Failure) -> tuple[bool, str]:
    print(f"{run.name:40}", end="\r", file=sys.stderr, flush=True)
    failure = simulated(run, capacity=message.capacity).refusal
    if failure is None:
        return False, line(
            run.name, "nothing: it fits", f"{message.asked} MiB", "", "", message.allocated, "", message.unallocated
        )
    operation = failure.place.operation
    said = format_size(failure.allocated), format_size(failure.reserved - failure.allocated)
    fine = (
        failure.tried == message.asked * MIB
        and said == (message.allocated, message.unallocated)
        and operation in message.operations
    )
    asked = f"{failure.tried // MIB} MiB"
    cells = (asked, f"{message.asked} MiB", operation, said[0], message.allocated, said[1], message.unallocated)
    return fine, line(run.name, *cells)


def main() -> int:
    found = list(rows())
    failures = [show_failure(run, message) for run, message in FAILURES.items()]
    print(file=sys.stderr)
    print(
        HEAD.format(
            date=datetime.datetime.now(tz=datetime.UTC).date(), python=platform.python_version(),
            torch=version("torch"),
        ).rstrip()
    )  # fmt: skip
    print("\n".join((TABLE, *map(show, found))))
    print(EXCEPTIONS.rstrip())
    print("\n".join((OTHERS, *map(show_other, found))))
    print("\n".join((ERRORS, *(text for _, text in failures))))
    return int(not all(row.fine for row in found) or not all(fine for fine, _ in failures))


if __name__ == "__main__":
    raise SystemExit(main())
