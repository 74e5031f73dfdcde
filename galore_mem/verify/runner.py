"""Runs cases, each in a process of its own, and judges what came out. No torch in here."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from queue import SimpleQueue
from threading import Event, Lock

from galore_mem.errors import InputError
from galore_mem.verify.builders import CannotRun, builder, without
from galore_mem.verify.case import DONE, RESIDENTS, BufferPair, Case, Outcome
from galore_mem.verify.environment import environment
from galore_mem.verify.line import load
from galore_mem.verify.predict import predict
from galore_mem.verify.processes import Ended, Fresh, Starter
from galore_mem.verify.record import Record, latest

TIMEOUT = 1800.0  # seconds for one case
TOLERANCE = 0.02  # of a phase's peak


def run(
    cases: Sequence[Case],
    *,
    record: Record | None = None,
    resume: bool = False,
    tolerance: float = TOLERANCE,
    timeout: float = TIMEOUT,
    starters: Sequence[Starter] = (),
    begun: Callable[[Case], None] = lambda case: None,
) -> Generator[Outcome, None, None]:
    """The outcome of each case as it comes, in the record before it is given out. As many run at a time as there are
    `starters` (default: one). With `resume`, cases that were measured last time are not run again.

    However the iteration ends, no process is left."""
    known: dict[str, Outcome] = {}
    if resume and record is not None and record.path.exists():
        known = {o.case.key: o for o in latest(record.read()) if o.status in DONE}
    yield from (judged(known[case.key], tolerance) for case in cases if case.key in known)
    all_starters = starters or (Fresh(),)
    idle: SimpleQueue[Starter] = SimpleQueue()
    for one in all_starters:
        idle.put(one)
    writing, ending = Lock(), Event()

    def work(case: Case) -> Outcome:
        begun(case)
        outcome = lacking(case)
        if outcome is None:
            start = idle.get()
            try:
                outcome = run_one(case, timeout, start)
            finally:
                idle.put(start)
        else:
            outcome = replace(outcome, environment=environment(case.device))
        if ending.is_set():  # it did not end by itself
            raise CancelledError
        if record is not None:
            with writing:
                record.append(outcome)
        return judged(outcome, tolerance)

    with ThreadPoolExecutor(len(all_starters)) as pool:
        order = {pool.submit(work, case): number for number, case in enumerate(cases) if case.key not in known}
        waiting: set[Future[Outcome]] = set(order)
        try:
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                # what came out well is given out first, in the order of the cases
                for future in sorted(done, key=lambda one: (failed(one), order[one])):
                    yield future.result()
        finally:
            ending.set()
            for future in waiting:
                future.cancel()
            for one in all_starters:
                one.stop()


def failed(future: Future[Outcome]) -> bool:
    return future.exception() is not None


def lacking(case: Case) -> Outcome | None:
    """What can be said of a case without a process: that its packages are not installed, or that nothing builds it."""
    try:
        gone = builder(case.method, case.implementation).missing()
    except CannotRun as error:
        return Outcome(case, "unsupported", str(error))
    return Outcome(case, "unsupported", without(gone)) if gone else None


def run_one(case: Case, timeout: float = TIMEOUT, start: Starter | None = None) -> Outcome:
    """One case in a process of its own. However that ends, there is an outcome."""
    try:
        ended = (start or Fresh()).run(json.dumps(case.to_json()), timeout)
    except OSError as error:
        return unmeasured(case, "failed", f"no process could be started: {error.strerror or error}")
    if ended.late:
        return replace(unmeasured(case, "failed", f"no result within {timeout:g} seconds"), seconds=timeout)
    if ended.code < 0:
        return unmeasured(case, *_killed(-ended.code))
    try:
        if ended.code == 0:
            return load(ended.out.rstrip().rpartition("\n")[2])  # libraries may have spoken before
    except InputError:
        pass
    last = last_line(ended)
    status = "oom" if "out of memory" in last.lower() else "failed"  # bitsandbytes' kernels end the process
    return unmeasured(case, status, f"its process ended with code {ended.code}: {last}")


def unmeasured(case: Case, status: str, detail: str) -> Outcome:
    """The outcome of a case whose process said nothing, with what was predicted of it."""
    try:
        predicted = predict(case).sizes
    except InputError:
        predicted = None
    return Outcome(case, status, detail, predicted, environment=environment(case.device))


def last_line(ended: Ended) -> str:
    return (ended.err.strip().splitlines() or ["it said nothing"])[-1][:300]


def _killed(number: int) -> tuple[str, str]:
    name = signal.Signals(number).name if number in {int(s) for s in signal.Signals} else str(number)
    if number == signal.SIGKILL:  # what the kernel sends when memory runs out
        return "oom", f"its process was killed ({name}): out of memory, or by hand"
    return "failed", f"its process was killed by {name}"


def judged(outcome: Outcome, tolerance: float) -> Outcome:
    """`ok` where every tensor that stays has the predicted bytes and every phase's peak is within the tolerance (with
    what the builder says of the run as detail); `mismatch`, with the first difference, otherwise."""
    if outcome.status not in DONE:
        return outcome
    if outcome.measured is None or outcome.predicted is None:
        return replace(outcome, status="failed", detail="it holds no measurement")
    difference = next(_differences(outcome, tolerance), None)
    if difference is not None:
        return replace(outcome, status="mismatch", detail=difference)
    return replace(outcome, status="ok", detail=outcome.detail if outcome.status == "ok" else "")


def different(b: BufferPair) -> str:
    if b.measured_bytes is None:
        return f"{b.buffer} is missing, predicted {b.predicted_bytes:,} bytes"
    said = "not predicted" if b.predicted_bytes is None else f"predicted {b.predicted_bytes:,}"
    return f"{b.buffer} has {b.measured_bytes:,} bytes, {said}"


def _differences(outcome: Outcome, tolerance: float) -> Iterator[str]:
    predicted, measured = outcome.predicted, outcome.measured
    assert predicted is not None
    assert measured is not None
    for b in outcome.buffers:
        if not b.equal:
            yield f"{b.param}: {different(b)}"
    for name in RESIDENTS:
        p, m = getattr(predicted, name), getattr(measured, name)
        if p != m:
            yield f"{name}: measured {m:,}, predicted {p:,} ({p - m:+,})"
    p, m = predicted.workspaces_bytes, measured.workspaces_bytes
    if p is not None and m is not None and p != m:
        yield f"workspaces_bytes: measured {m:,}, predicted {p:,}"
    for name in predicted.phases:
        if name not in measured.phases and name not in outcome.not_compared:
            yield f"{name}: predicted {predicted.phases[name]:,}, and not measured"
    for name, m in measured.phases.items():
        p = predicted.phases.get(name)
        if p is None:
            if name not in outcome.not_compared:
                yield f"{name}: measured {m:,}, and there is no prediction"
        elif not abs(p - m) <= tolerance * m:
            part = f" ({(p - m) / m:+.2%})" if m else ""
            yield f"{name}: measured {m:,}, predicted {p:,}{part}"
