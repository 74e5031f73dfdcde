"""Runs cases, each in a process of its own: what one leaves behind, or how it dies, does not reach the next.

No torch in here.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from galore_mem.errors import InputError
from galore_mem.verify.case import RESIDENTS, Case, Outcome
from galore_mem.verify.record import Record, load

TIMEOUT = 1800.0  # seconds for one case
TOLERANCE = 0.02  # of a phase's peak
WORKER = (sys.executable, "-m", "galore_mem.verify.worker")


def run(
    cases: Iterable[Case],
    *,
    record: Record | None = None,
    resume: bool = False,
    tolerance: float = TOLERANCE,
    timeout: float = TIMEOUT,
    worker: tuple[str, ...] = WORKER,
    begun: Callable[[Case], None] = lambda case: None,
) -> Iterator[Outcome]:
    """The outcome of each case, in order, written to the record before it is given out. With `resume`, cases that the
    record has (and that did not fail) are not run again."""
    known = {}
    if resume and record is not None and record.path.exists():
        known = {o.case.key: o for o in record.read() if o.status not in ("failed", "oom")}
    for case in cases:
        if case.key in known:
            yield judged(known[case.key], tolerance)
            continue
        begun(case)
        outcome = run_one(case, timeout, worker)
        if record is not None:
            record.append(outcome)
        yield judged(outcome, tolerance)


def run_one(case: Case, timeout: float = TIMEOUT, worker: tuple[str, ...] = WORKER) -> Outcome:
    """One case in a process of its own. However that ends, there is an outcome."""
    try:
        done = subprocess.run(
            worker, input=json.dumps(case.to_json()), capture_output=True, text=True, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        return Outcome(case, "failed", f"no result within {timeout:g} seconds", seconds=timeout)
    if done.returncode < 0:
        return _killed(case, -done.returncode)
    try:
        if done.returncode == 0:
            return load(json.loads(done.stdout))
    except (json.JSONDecodeError, InputError):
        pass
    last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
    return Outcome(case, "failed", f"its process ended with code {done.returncode}: {last[:300]}")


def _killed(case: Case, number: int) -> Outcome:
    name = signal.Signals(number).name if number in {int(s) for s in signal.Signals} else str(number)
    if number == signal.SIGKILL:  # what the kernel sends when memory runs out
        return Outcome(case, "oom", f"its process was killed ({name}): out of memory, or by hand")
    return Outcome(case, "failed", f"its process was killed by {name}")


def judged(outcome: Outcome, tolerance: float) -> Outcome:
    """`ok` where every tensor that stays has the predicted bytes and every phase's peak is within the tolerance (with
    what the builder says of the run as detail); `mismatch`, with the first difference, otherwise."""
    if outcome.status not in ("ok", "mismatch") or outcome.measured is None or outcome.predicted is None:
        return outcome
    difference = next(_differences(outcome, tolerance), None)
    if difference is not None:
        return replace(outcome, status="mismatch", detail=difference)
    return replace(outcome, status="ok", detail=outcome.detail if outcome.status == "ok" else "")


def _differences(outcome: Outcome, tolerance: float) -> Iterator[str]:
    predicted, measured = outcome.predicted, outcome.measured
    assert predicted is not None
    assert measured is not None
    for b in outcome.buffers:
        if not b.equal:
            yield f"{b.param}: {b.buffer} has {b.measured_bytes} bytes, predicted {b.predicted_bytes}"
    for name in RESIDENTS:
        p, m = getattr(predicted, name), getattr(measured, name)
        if p != m:
            yield f"{name}: measured {m:,}, predicted {p:,} ({p - m:+,})"
    for name, m in measured.phases.items():
        p = predicted.phases.get(name)
        if p is None:
            yield f"{name}: measured {m:,}, and there is no prediction"
        elif abs(p - m) > tolerance * m:
            yield f"{name}: measured {m:,}, predicted {p:,} ({(p - m) / m:+.2%})"
