"""A run of `galore-mem verify` from what was asked to the outcomes, with its progress on stderr."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from galore_mem.errors import InputError
from galore_mem.gpus import DEFAULT_CONTEXT
from galore_mem.verify.case import BAD, Case, Outcome
from galore_mem.verify.fitting import fitting
from galore_mem.verify.kernels import LARGE
from galore_mem.verify.matrix import Wishes, chosen, device_of, model_of
from galore_mem.verify.processes import starter
from galore_mem.verify.record import Record
from galore_mem.verify.runner import run
from galore_mem.verify.snapshot import check

AT_A_TIME = 2  # small cases on the CPU, where nobody says


class Session:
    """The cases of some wishes on a device. Ctrl-C, or a record that cannot be written any more (`error`), ends `run`
    with what there is until then."""

    def __init__(
        self, wishes: Wishes, device: str, record: Path | None, *, resume: bool, tolerance: float, timeout: float,
        snapshot: Path | None,
    ) -> None:  # fmt: skip
        self.device = device_of(device)
        self.cases = cases(wishes, self.device)
        self.record = None if record is None else Record(record)
        if self.record is not None:
            self.record.check()
        self.resume, self.tolerance, self.timeout = resume, tolerance, timeout
        self.arguments = () if snapshot is None else ("--snapshot", str(check(snapshot, self.device)))
        self.interrupted = False
        self.error: InputError | None = None

    def run(self, jobs: int | None = None) -> list[Outcome]:
        """The outcomes, in the order of the cases. `jobs`: how many run at a time."""
        many = jobs or at_a_time(self.cases, self.device)
        if many > 1 and self.device != "cpu":
            raise InputError(f"--jobs {many}: cases on one card are measured one at a time; leave it out")
        found: dict[str, Outcome] = {}
        with progress(len(self.cases)) as (begun, ended), ended_as_by_ctrl_c():
            outcomes = run(
                self.cases, record=self.record, resume=self.resume, tolerance=self.tolerance, timeout=self.timeout,
                starters=[starter(self.device, self.arguments) for _ in range(many)], begun=begun,
            )  # fmt: skip
            try:
                for outcome in outcomes:
                    found[outcome.case.key] = outcome
                    ended(outcome)
            except KeyboardInterrupt:
                self.interrupted = True
            except InputError as error:
                self.error = error
            finally:
                outcomes.close()
        if self.interrupted and sys.stderr is not None:
            print(f"interrupted: {len(found)} of {len(self.cases)} cases ended; {self._later()}", file=sys.stderr)
        return [found[case.key] for case in self.cases if case.key in found]

    def _later(self) -> str:
        if self.record is None:
            return "with --record FILE a later run could go on from here with --resume"
        return f"the same command with --resume goes on from {self.record.path}"


def cases(wishes: Wishes, device: str) -> list[Case]:
    """What `chosen` says, and on a card, where nothing narrower was asked for, the LLaMA sizes that fit it."""
    found = chosen(wishes, device)
    if device == "cuda" and wishes == Wishes():
        found += fitting(room())
    return found


def room() -> int:
    """Bytes of the card that a process could have now, its CUDA context included. Another process asks: the context
    that asking makes goes with it. Raises `InputError`."""
    program = "import json; from galore_mem.verify.environment import card; print(json.dumps(card()['free_bytes']))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    try:
        return int(done.stdout.split()[-1]) + DEFAULT_CONTEXT.context
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise InputError(f"cannot ask the card how much memory is free: {last[:200]}") from None


def at_a_time(found: list[Case], device: str) -> int:
    """Small cases on the CPU go together; large ones, and those of a card, have the machine for themselves."""
    if device != "cpu" or any(model_of(name).parameter_count > LARGE for name in {case.model for case in found}):
        return 1
    return max(1, min(AT_A_TIME, os.cpu_count() or 1, len(found)))


@contextmanager
def ended_as_by_ctrl_c() -> Iterator[None]:
    """A batch system's SIGTERM and a lost terminal's SIGHUP end a run as Ctrl-C does: its processes too, and what was
    measured is shown. (Only the main thread can ask for that.)"""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = [(number, signal.signal(number, interrupt)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)


Begun = Callable[[Case], None]
Done = Callable[[Outcome], None]


@contextmanager
def progress(total: int) -> Iterator[tuple[Begun, Done]]:
    """Two functions that tell stderr which case begins and how one ended: a bar in a terminal, lines elsewhere."""
    if sys.stderr is None:  # closed by whoever started this
        yield lambda case: None, lambda outcome: None
        return
    if not sys.stderr.isatty():
        count = iter(range(1, total + 1))

        def line(outcome: Outcome) -> None:
            print(f"[{next(count)}/{total}] {outcome.status} {outcome.case}", file=sys.stderr, flush=True)

        yield lambda case: None, line
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)

        def ended(outcome: Outcome) -> None:
            bar.advance(task)
            if outcome.status in BAD:
                bar.console.print(f"{outcome.status} {outcome.case}: {outcome.detail}", markup=False, highlight=False)

        yield lambda case: bar.update(task, description=f"{case.model} {case.method} ({case.implementation})"), ended
