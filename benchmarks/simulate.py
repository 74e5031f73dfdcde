"""`galore-mem simulate` of large models, of LLaMA-7B beside PyTorch's MemTracker, of every model type of transformers.

    pip install '.[test]'
    python benchmarks/simulate.py [--only large memtracker families] [--again [WORD ...]] [--jobs N]

The first two parts are timed: give them a quiet machine. What has been run is in a record (benchmarks/simulate.jsonl)
and is not run again; `--again` runs it anew. The document (docs/simulate.md) is written from the record at the end;
`--only` with no part only writes it. (How right the simulation is with other methods and formats, beside real runs and
the estimate: `python benchmarks/accuracy`.)
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks" / "accuracy"))

import families  # noqa: E402  # torch, which is imported below, reads the environment
import simulate_large  # noqa: E402  # the folder is on the path from here on
from record import Part, good, part_of, read, run, tidy  # noqa: E402  # the folder is on the path from here on
from simulate_report import document  # noqa: E402  # the folder is on the path from here on

PARTS = {
    "large": Part({str(one): one for one in simulate_large.LARGE}, lambda one: simulate_large.simulated(*one), True),
    "memtracker": Part({"loop": False, "foreach": True}, simulate_large.mem_tracker, True),
    "families": part_of(families),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=PARTS, default=tuple(PARTS))
    parser.add_argument("--again", nargs="*", metavar="WORD")
    parser.add_argument("--record", type=Path, default=ROOT / "benchmarks" / "simulate.jsonl")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "simulate.md")
    parser.add_argument("--jobs", type=int, default=1)
    given = parser.parse_args()
    run({name: PARTS[name] for name in given.only}, given.record, jobs=given.jobs, again=given.again)
    wanted = [(name, key) for name, part in PARTS.items() for key in part.tasks]
    tidy(given.record, wanted)
    lines = read(given.record)
    meant = [lines[task] for task in wanted if good(lines.get(task))]
    given.output.write_text(document(meant, {name: len(part.tasks) for name, part in PARTS.items()}), encoding="utf-8")


if __name__ == "__main__":
    main()
