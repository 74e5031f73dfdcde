"""Large models under `galore-mem simulate`: LLaMA-7B beside PyTorch's MemTracker, and the largest public models.

    pip install '.[test]'
    python benchmarks/simulate.py [--only large memtracker] [--again [WORD ...]]

Both parts are timed: give them a quiet machine. What has been run is in a record (benchmarks/simulate.jsonl) and is not
run again; `--again` runs it anew. The document (docs/simulate.md) is written from the record at the end; `--only` with
no part only writes it. (How right the simulation is, beside real runs and the estimate: `python benchmarks/accuracy`.)
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks" / "accuracy"))

import simulate_large  # noqa: E402  # torch, which is imported below, reads the environment
from record import Part, good, read, run, tidy  # noqa: E402
from simulate_report import document  # noqa: E402

PARTS = {
    "large": Part({str(one): one for one in simulate_large.LARGE}, lambda one: simulate_large.simulated(*one), True),
    "memtracker": Part({"loop": False, "foreach": True}, simulate_large.mem_tracker, True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=PARTS, default=tuple(PARTS))
    parser.add_argument("--again", nargs="*", metavar="WORD")
    parser.add_argument("--record", type=Path, default=ROOT / "benchmarks" / "simulate.jsonl")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "simulate.md")
    given = parser.parse_args()
    run({name: PARTS[name] for name in given.only}, given.record, jobs=1, again=given.again)
    wanted = [(name, key) for name, part in PARTS.items() for key in part.tasks]
    tidy(given.record, wanted)
    lines = read(given.record)
    meant = [lines[task] for task in wanted if good(lines.get(task))]
    given.output.write_text(document(meant, {name: len(part.tasks) for name, part in PARTS.items()}), encoding="utf-8")


if __name__ == "__main__":
    main()
