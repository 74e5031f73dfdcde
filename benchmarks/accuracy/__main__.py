"""How right are `estimate` and `simulate`? Beside real runs here and others' real runs on GPUs, and each other.

    pip install '.[test]'
    python benchmarks/accuracy [--only cpu gpu recorded agreement] [--jobs 2] [--again [WORD ...]]

What has been run is in a record (record.jsonl beside this file) and is not run again, so an interrupted run goes on
where it was; `--again` runs it anew, with words only the cases that have them all in their names (`--again gpt2
amp-bf16`). docs/accuracy.md with its figure and its cases, the README's table and what the package carries of it
(galore_mem/evidence.json) are written from the record at the end; `--only` with no part only writes them.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch, which is imported later, reads it

import evidence
import gpu_rows
import plot
import readme
from errors import Pair, apart, text
from record import VERSIONS, Line, Part, good, part_of, read, run, tidy

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
DOCUMENT, RECORD = ROOT / "docs" / "accuracy.md", HERE / "record.jsonl"
# a part's name, and its module: `cases()` and `run(case)`
PARTS = {
    "cpu": "cpu",
    "gpu": "gpu",
    "recorded": "recorded",
    "agreement": "agreement",
}
# the document's sections: a module with `section(lines)`, given the lines of this part. Those of the figure's panels
# have `pairs(lines)` too: what was predicted and what was measured (`errors.Pair`).
SECTIONS = {
    "report_limits": "gpu",
    "report_gpu": "gpu",
    "report_recorded": "recorded",
    "report_peers": "gpu",
    "report_agreement": "agreement",
    "report_cpu": "cpu",
}
MEASURED = ("cpu", "gpu")  # parts in which something was measured: what the package says of its own errors
PANELS = {"Real steps on the CPU": "report_cpu", "Others' real runs on GPUs": "report_gpu"}
BESIDE = {
    "real steps on the CPU, here": "report_cpu", "real runs on GPUs, by others": "report_gpu",
    "recordings of GPUs, of others' own models": "report_recorded",
}  # fmt: skip


def parts() -> dict[str, Part]:
    return {name: part_of(import_module(module)) for name, module in PARTS.items() if find_spec(module)}


def main() -> None:
    known = parts()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=known, default=tuple(known))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--again", nargs="*", metavar="WORD")
    parser.add_argument("--tidy", action="store_true", help="drop lines of the record that later ones replace")
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--output", type=Path, default=DOCUMENT)
    given = parser.parse_args()
    if gpu_rows.OTHER and (given.record == RECORD or given.output == DOCUMENT):
        parser.error("GALORE_MEM_GPU_RUNS names other runs: give them a --record and an --output of their own")
    run({name: known[name] for name in given.only}, given.record, given.jobs, given.again)
    if given.tidy:
        tidy(given.record, [(name, key) for name, part in known.items() for key in part.tasks])
    lines = read(given.record)
    by_part = {
        name: [lines[name, key] for key in part.tasks if (name, key) in lines] for name, part in known.items()
    }  # fmt: skip
    measured = [[line for line in by_part.get(name, ()) if good(line)] for name in MEASURED]
    if all(measured) and given.output == DOCUMENT:
        verified = ROOT / "benchmarks" / "verify.jsonl"
        compared = [line for line in by_part["agreement"] if good(line)]
        evidence.write(ROOT / "galore_mem" / "evidence.json", chain.from_iterable(measured), verified, compared)
    figure = given.output.with_suffix(".png")
    drawn = plot.draw(pairs_of(PANELS, by_part), figure)
    wanted = {name: len(part.tasks) for name, part in known.items()}
    cases = given.output.with_name(f"{given.output.stem}-cases.md")
    kept, moved = apart(document(by_part, wanted, figure.name if drawn else None), cases.name)
    of_cases = ["# Accuracy, case by case", f"Written with [{given.output.name}]({given.output.name}).", *moved]
    for path, paragraphs in ((given.output, kept), (cases, of_cases)):
        path.write_text("\n\n".join(one.rstrip() for one in paragraphs) + "\n", encoding="utf-8")
    if given.output == DOCUMENT:
        readme.write(ROOT / "README.md", pairs_of(BESIDE, by_part))


def pairs_of(reports: Mapping[str, str], by_part: Mapping[str, Sequence[Line]]) -> dict[str, list[Pair]]:
    """The pairs of reports by their title, of the parts that have been run."""
    found = {}
    for title, name in reports.items():
        lines = [line for line in by_part.get(SECTIONS[name], ()) if good(line)]
        if lines and find_spec(name):
            found[title] = list(import_module(name).pairs(lines))
    return found


def document(by_part: Mapping[str, Sequence[Line]], wanted: Mapping[str, int], figure: str | None) -> Iterator[str]:
    """Its paragraphs. Every number in it is from the record."""
    yield "# Accuracy"
    yield from head(by_part, wanted)
    yield readme.summary(pairs_of(BESIDE, by_part))
    if figure is not None:
        yield f"![Predicted against measured, and the signed errors]({figure})"
    for name, part in SECTIONS.items():
        lines = [line for line in by_part.get(part, ()) if good(line)]
        if lines and find_spec(name):
            yield from import_module(name).section(lines)


def head(by_part: Mapping[str, Sequence[Line]], wanted: Mapping[str, int]) -> Iterator[str]:
    lines = [line for group in by_part.values() for line in group if good(line)]
    dates = sorted({line["date"] for line in lines})
    stack = sorted({f"{name} {line[name]}" for line in lines for name in VERSIONS if name in line})
    counts = "; ".join(f"{name} {sum(map(good, by_part[name]))} of {count}" for name, count in wanted.items())
    days = " to ".join(dict.fromkeys((dates[0], dates[-1]))) if dates else str(datetime.date.today())
    yield text(
        f"Written by `python benchmarks/accuracy` from what was run on {days}: {', '.join(stack)}, Python "
        f"{platform.python_version()}, on a CPU. Cases in the record: {counts}. Errors are signed: positive where more "
        f"was predicted than there was. *Median* and *95 %* are of their sizes."
    )
    for line in (line for group in by_part.values() for line in group if not good(line)):
        yield text(f"**Did not run:** {line['part']} {line['key']}: {line['found']['failed']}")


if __name__ == "__main__":
    main()
