"""Do they train? A small LLaMA on real text with every method, as the table of docs/training.md.

    python benchmarks/train.py [--jobs N] [--only METHOD ...]     what is not in the record yet, then the report
    python benchmarks/train.py --report                           the report only

Every finished run is one line of the record (`--record`), written at once: after Ctrl-C or a crash the same command
goes on with the runs that are missing. `--redo METHOD ...` drops a method's lines first.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from train_methods import METHODS
from train_report import write
from train_run import Run, Settings, corpus, train

ROOT = Path(__file__).resolve().parent.parent


def read(record: Path) -> list[dict[str, Any]]:
    """The lines of a record. One that a crash cut off is dropped, from the file too."""
    text = record.read_text(encoding="utf-8") if record.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    lines = [json.loads(line) for line in whole.splitlines()]
    if whole != text:
        print(f"{record}: dropped a line that was cut off", file=sys.stderr)
        rewrite(record, lines)
    return lines


def rewrite(record: Path, lines: list[dict[str, Any]]) -> None:
    """Puts these lines into the record, whole or not at all."""
    fresh = record.with_suffix(".new")
    fresh.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    fresh.replace(record)


def append(record: Path, line: dict[str, Any]) -> None:
    with record.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def key(line: dict[str, Any]) -> Run:
    return Run(line["method"], line["lr"], line["seed"])


def planned(methods: list[str], seeds: int) -> Iterator[Run]:
    """One seed of everything first, so that an unfinished record is a whole table already."""
    for seed in range(seeds):
        for name in methods:
            for lr in METHODS[name].learning_rates:
                yield Run(name, lr, seed)


def quiet() -> None:
    """Workers: Ctrl-C ends them at once, and libraries keep their advice to themselves."""
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, signal.SIG_DFL)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore", FutureWarning)


def train_all(runs: list[Run], settings: Settings, record: Path, jobs: int) -> None:
    """Trains in `jobs` processes and records each run as it ends."""
    began = time.monotonic()
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), quiet) as pool:
        try:
            waiting: dict[Future[dict[str, Any]], Run] = {pool.submit(train, run, settings): run for run in runs}
            done = 0
            while waiting:
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    append(record, future.result())
                    done += 1
                    show(waiting.pop(future), future.result(), done, len(runs), time.monotonic() - began)
        except BaseException:  # Ctrl-C too: the children end, and it is raised again
            for child in multiprocessing.active_children():
                child.terminate()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def show(run: Run, line: dict[str, Any], done: int, total: int, seconds: float) -> None:
    left = seconds / done * (total - done) / 60
    result = "diverged" if line["validation_loss"] is None else f"validation loss {line['validation_loss']:.4f}"
    print(f"{done}/{total} {run}: {result}, {line['seconds']:.0f} s; {left:.0f} min left", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, default=ROOT / "benchmarks" / "training.jsonl")
    parser.add_argument("--report", action="store_true", help="train nothing")
    parser.add_argument("--document", type=Path, default=ROOT / "docs" / "training.md")
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--redo", nargs="+", choices=METHODS, default=[], metavar="METHOD")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--steps", type=int, default=Settings.steps, help="fewer for a trial; give it a record")
    given = parser.parse_args()
    for stop in (signal.SIGINT, signal.SIGTERM):  # also in the background, where a shell turns the first one off
        signal.signal(stop, signal.default_int_handler)
    settings = Settings(steps=given.steps, warmup=given.steps // 10)
    lines = read(given.record)
    if given.redo:
        lines = [line for line in lines if line["method"] not in given.redo]
        rewrite(given.record, lines)
    if any(line["settings"] != asdict(settings) for line in lines):
        parser.error(f"{given.record} has runs with other settings; name another --record")
    if not given.report:
        if any(line["corpus"]["digest"] != corpus().digest for line in lines):
            parser.error(f"{given.record} has runs on another Python's standard library; name another --record")
        have = {key(line) for line in lines}
        runs = [run for run in planned(given.only, given.seeds) if run not in have]
        print(f"{len(runs)} runs to go, {len(lines)} in {given.record}", file=sys.stderr, flush=True)
        try:
            train_all(runs, settings, given.record, given.jobs)
        except KeyboardInterrupt:
            print("stopped; finished runs are kept, the same command goes on", file=sys.stderr)
            return 130
    write(read(given.record), settings, given.document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
