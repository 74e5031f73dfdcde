"""How right is `galore-mem simulate`? Beside real runs on the CPU, PyTorch's MemTracker, itself, and `estimate`.

    pip install '.[test]'
    python benchmarks/simulate.py [--only cpu agreement large memtracker] [--jobs 2]

What has been run is in a record (benchmarks/simulate.jsonl) and is not run again, so an interrupted run goes on where
it was; `--again` runs it anew. `large` and `memtracker` are timed and have the machine for themselves. The document
(docs/simulate.md) is written from the record at the end; `--only` with no part only writes it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent

import simulate_agreement  # noqa: E402  # torch, which is imported below, reads the environment
import simulate_cpu  # noqa: E402
import simulate_large  # noqa: E402
from simulate_report import document  # noqa: E402

# before processes are forked, so that they need not do it each
WARM = (
    "torch", "torch._dynamo", "torch.profiler", "transformers", "bitsandbytes", "peft", "galore_mem.simulate.layers",
    "galore_mem.verify.workloads", "galore_mem.verify.peers", "galore_mem.verify.meters", "galore_mem.optim",
)  # fmt: skip


class Part(NamedTuple):
    """Tasks by what they are called in the record, and how one is run (in a process of its own)."""

    tasks: Mapping[str, Any]
    run: Callable[[Any], dict[str, Any]]
    alone: bool = False


PARTS = {
    "cpu": Part({case.key: case for case in simulate_cpu.cases()}, simulate_cpu.run),
    "agreement": Part({case.key: case for case in simulate_agreement.cases()}, simulate_agreement.run),
    "large": Part({str(one): one for one in simulate_large.LARGE}, lambda one: simulate_large.simulated(*one), True),
    "memtracker": Part({"loop": False, "foreach": True}, simulate_large.mem_tracker, True),
}


def work(task: tuple[str, str]) -> dict[str, Any]:
    """A line of the record."""
    part, key = task
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 2)  # the profiler speaks there
    os.dup2(silence, 1)
    start = time.perf_counter()
    try:
        found = PARTS[part].run(PARTS[part].tasks[key])
    except Exception as error:  # is what came out of this task
        found = {"failed": f"{type(error).__name__}: {error}"[:300]}
    versions = {name: version(name) for name in ("galore-mem", "torch", "transformers")}
    return {
        "part": part, "key": key, "seconds": round(time.perf_counter() - start, 2), **versions,
        "date": str(datetime.date.today()), "found": found,
    }  # fmt: skip


def read(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The last line of each task that did not fail. (A line that was cut off as it was written is none.)"""
    found = {}
    for line in path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else ():
        one = json.loads(line)
        if "failed" not in one["found"]:
            found[one["part"], one["key"]] = one
    return found


def run(tasks: Sequence[tuple[str, str]], jobs: int) -> Iterator[dict[str, Any]]:
    """Each in a new process."""
    with get_context("fork").Pool(jobs, maxtasksperchild=1) as pool:
        yield from pool.imap_unordered(work, tasks, chunksize=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=PARTS, default=tuple(PARTS))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--record", type=Path, default=ROOT / "benchmarks" / "simulate.jsonl")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "simulate.md")
    given = parser.parse_args()
    known = {} if given.again else read(given.record)
    if given.only:
        for module in WARM:
            import_module(module)
    for name in given.only:
        tasks = [(name, key) for key in PARTS[name].tasks if (name, key) not in known]
        for number, one in enumerate(run(tasks, 1 if PARTS[name].alone else given.jobs), 1):
            with open(given.record, "a", encoding="utf-8") as file:
                file.write(json.dumps(one, separators=(",", ":")) + "\n")
            said = one["found"].get("failed", "")
            print(f"{name} {number}/{len(tasks)} {one['seconds']} s {one['key']} {said}", file=sys.stderr, flush=True)
    lines = read(given.record)
    meant = [lines[name, key] for name, part in PARTS.items() for key in part.tasks if (name, key) in lines]
    given.output.write_text(document(meant, {name: len(part.tasks) for name, part in PARTS.items()}), encoding="utf-8")


if __name__ == "__main__":
    main()
