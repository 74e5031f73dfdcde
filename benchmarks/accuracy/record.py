"""Benchmarks in many small tasks: each in a process of its own, each a line of a record that an interrupted run goes on
from.

A part is a module with `cases()` (each has a `key`, unique in its part) and `run(case)` (a dictionary that JSON can
hold); a task is a part's name and a case's key.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

Task = tuple[str, str]
Line = Mapping[str, Any]

# imported before processes are forked, so that they need not do it each
WARM = (
    "torch", "torch._dynamo", "torch.profiler", "transformers", "bitsandbytes", "peft", "galore_mem.simulate.layers",
    "galore_mem.verify.workloads", "galore_mem.verify.peers", "galore_mem.verify.meters", "galore_mem.optim",
)  # fmt: skip
VERSIONS = ("galore-mem", "torch", "transformers", "peft", "bitsandbytes")


class Part(NamedTuple):
    """Tasks by what they are called in the record, and how one is run. `alone`: it is timed, and has the machine for
    itself."""

    tasks: Mapping[str, Any]
    run: Callable[[Any], dict[str, Any]]
    alone: bool = False


def part_of(module: Any) -> Part:
    """A module's `cases()` and `run`."""
    cases = list(module.cases())
    tasks = {case.key: case for case in cases}
    assert len(tasks) == len(cases), "two cases of a part have one name"
    return Part(tasks, module.run)


# -- the record ----------------------------------------------------------------------------------------------


def read(path: Path) -> dict[Task, Line]:
    """The last line of each task. (A line that was cut off as it was written is none.)"""
    found: dict[Task, Line] = {}
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            one = json.loads(line)
            found[one["part"], one["key"]] = one
            one["found"].get("failed")
        except (ValueError, LookupError, TypeError, AttributeError):
            raise SystemExit(f"{path}, line {number}: this is not a line of a record") from None
    return found


def good(line: Line | None) -> bool:
    """Is there an answer that need not be found again?"""
    return line is not None and "failed" not in line["found"]


def append(path: Path, line: Line) -> None:
    with open(path, "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # the line before was cut off
                _cut(file)
        file.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")


def _cut(file: Any) -> None:
    """Takes away what follows the last end of a line."""
    file.seek(0)
    file.truncate(file.read().rfind(b"\n") + 1)


def tidy(path: Path, order: Iterable[Task]) -> None:
    """Leaves only the last line of each of these tasks, in their order. Not while something else writes the record."""
    known = read(path)
    made = path.with_suffix(".new")
    made.write_text(
        "".join(json.dumps(known[task], separators=(",", ":")) + "\n" for task in order if task in known), "utf-8"
    )
    made.replace(path)


# -- running -------------------------------------------------------------------------------------------------


def work(part: Part, task: Task, out: Connection) -> None:
    """A task in this process, and its line to whoever waits."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever waits ends this
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 2)  # the profiler speaks there
    os.dup2(silence, 1)
    name, key = task
    start = time.perf_counter()
    try:
        found = part.run(part.tasks[key])
    except Exception as error:  # is what came out of this task
        found = {"failed": f"{type(error).__name__}: {error}"[:300]}
    out.send(line_of(name, key, time.perf_counter() - start, found))


def line_of(name: str, key: str, seconds: float, found: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "part": name, "key": key, "seconds": round(seconds, 2), **dict(installed()),
        "date": str(datetime.date.today()), "found": found,
    }  # fmt: skip


def installed() -> Iterator[tuple[str, str]]:
    for name in VERSIONS:
        with contextlib.suppress(PackageNotFoundError):
            yield name, version(name)


def results(part: Part, tasks: Sequence[Task], jobs: int) -> Iterator[dict[str, Any]]:
    """The lines of these tasks as they are ready, each from a new process, so many at once. A process that dies is its
    task's failure."""
    context = get_context("fork")
    waiting = list(reversed(tasks))
    running: dict[Any, tuple[BaseProcess, Task]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                task = waiting.pop()
                here, there = context.Pipe(duplex=False)
                process = context.Process(target=work, args=(part, task, there), daemon=True)
                process.start()
                there.close()  # so that its end is seen here
                running[here] = process, task
            for ready in wait(list(running)):
                process, task = running.pop(ready)
                try:
                    line = ready.recv()
                except EOFError:
                    process.join()
                    line = line_of(*task, 0, {"failed": f"its process ended with {process.exitcode}"})
                process.join()
                yield line
    finally:
        for process, _ in running.values():
            process.terminate()


def run(parts: Mapping[str, Part], path: Path, jobs: int, again: Sequence[str] | None = None) -> None:
    """Runs what the record does not have from these releases, and `again` what has all of these words in its name, line
    by line into the record. Ends the program where it is interrupted; what was running then is run again next time."""
    known = read(path)
    stack = tuple(installed())

    def wanted(task: Task) -> bool:
        anew = again is not None and set(again) <= set(task[1].split())
        line = known.get(task)
        return anew or line is None or not good(line) or any(line.get(name) != release for name, release in stack)

    missing = {name: [task for key in part.tasks if wanted(task := (name, key))] for name, part in parts.items()}
    if any(missing.values()):
        for module in WARM:
            with contextlib.suppress(ImportError):
                import_module(module)
    try:
        for name, tasks in missing.items():
            for number, one in enumerate(results(parts[name], tasks, 1 if parts[name].alone else jobs), 1):
                append(path, one)
                said = one["found"].get("failed", "")
                told = f"{name} {number}/{len(tasks)} {one['seconds']} s {one['key']} {said}"
                print(told.rstrip(), file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        print(f"stopped; {path} has what ran, and the same command goes on from there", file=sys.stderr)
        raise SystemExit(130) from None
