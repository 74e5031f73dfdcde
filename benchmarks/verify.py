"""From records of `galore-mem verify` to docs/verify.md: what was predicted, what was measured, what packages hold.

    pip install '.[peers]'
    galore-mem verify --record FILE
    python benchmarks/verify.py FILE ... [--output docs/verify.md]

Needs no torch: it reads records. Every number in the document is computed from them.
"""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from textwrap import fill

from verify_facts import facts, text
from verify_large import large

from galore_mem.methods.registry import METHODS
from galore_mem.report.tables import Column, Table, to_markdown
from galore_mem.report.verify import shared
from galore_mem.report.verify_rows import Off, hyper, percent, place, signed, way, worst
from galore_mem.report.verify_tables import closing, reasons, wrong
from galore_mem.verify.case import OPTIMIZER, TRAIN, Case, Outcome
from galore_mem.verify.matrix import SMALL, Wishes, chosen
from galore_mem.verify.record import Record
from galore_mem.verify.runner import TOLERANCE, judged

NONE = "–"


def read(paths: Sequence[Path]) -> list[Outcome]:
    """The last outcome of each case, judged."""
    found = {o.case.key: o for path in paths for o in Record(path).read()}
    return sorted((judged(o, TOLERANCE) for o in found.values()), key=place)


def bullets(said: Iterable[str]) -> str:
    lines = (fill(line, 118, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False) for line in said)
    return "\n".join(lines) + "\n"


# -- how it was made -----------------------------------------------------------------------------------


def options(case: Case) -> str:
    """A case's way of running, as options of the command line."""
    words = ["--implementation", case.implementation, "--workload", case.workload, "--recipe", case.recipe]
    for name, value in case.options.items():
        flag = f"--{name.replace('_', '-')}"
        if value is not False:
            words += [flag] if value is True else [flag, str(value)]
    for name, value in case.hyperparameters.items():
        words += ["--rank", str(value)] if name == "rank" else ["--set", f"{name}={value}"]
    if case.targets is not None:
        words += ["--target", ",".join(case.targets)]
    return " ".join(words)


def others(outcomes: Sequence[Outcome]) -> list[str]:
    """Commands for the cases that a run without further wishes has not: one for all methods that are run alike."""
    usual = {alike(case) for device in {o.case.device for o in outcomes} for case in chosen(Wishes(), device)}
    methods: dict[tuple[str, str], list[str]] = {}
    for case in (o.case for o in outcomes if alike(o.case) not in usual):
        methods.setdefault((case.model, options(case)), []).append(f"--method {case.method}")
    return [
        f"galore-mem verify --model {model} {' '.join(dict.fromkeys(names))} {how} --record FILE"
        for (model, how), names in methods.items()
    ]


def alike(case: Case) -> tuple[str, ...]:
    """Equal for cases that run the same."""
    return way(case), case.method, case.implementation, hyper(case)


def head(outcomes: Sequence[Outcome], files: Sequence[str], today: datetime.date) -> Iterator[str]:
    """Date, versions, commands."""
    common = shared([o.environment for o in outcomes if o.environment])
    yield "# Predicted and measured"
    yield text(
        f"Written by `python benchmarks/verify.py {' '.join(files)}` on {today.isoformat()}: "
        + ", ".join(f"{name} {value}" for name, value in common.items())
        + "."
    )
    yield text(
        "*Measured* is what the allocator handed out: every allocation of real steps of the real optimizer (and "
        "model), kernels' own buffers included; of optimizer state, the bytes of each storage that a tensor keeps "
        "alive. *Predicted* is what `galore-mem estimate` says. Errors are predicted minus measured."
    )
    yield text("Each case runs in a process of its own. To run them again (further commands are at the end):")
    lines = [
        "pip install '.[peers]'",
        "galore-mem verify --record FILE",
        f"python benchmarks/verify.py {' '.join(files)}",
    ]
    yield "\n".join(["```sh", *lines, "```"])


# -- all methods and implementations -----------------------------------------------------------------


def overview(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """One row for every method and implementation of the registry."""
    columns = (
        Column("method"), Column("implementation"), Column("cases", right=True),
        Column("tensors of state", right=True), Column("that differ", right=True),
        Column("bytes, predicted", right=True), Column("measured", right=True), Column("optimizer steps", right=True),
        Column("training steps", right=True), Column("with checkpointing", right=True),
    )  # fmt: skip
    rows = [
        row(name, c.name, [o for o in outcomes if (o.case.method, o.case.implementation) == (name, c.name)])
        for name, method in METHODS.items()
        for c in method.implementations
    ]
    yield to_markdown(Table("", columns, tuple(rows)))
    yield text(
        "Cases, tensors and bytes of state are those of all cases of a row that ran. The last three columns: the error "
        f"of the phase whose peak is predicted worst. {NONE}: not in the record, or no phase that is compared; why is "
        "said below where it could not run."
    )
    yield bullets(folded([*closing(outcomes), *wrong(outcomes, where=True), *reasons(outcomes)]))


def row(method: str, implementation: str, found: Sequence[Outcome]) -> tuple[str, ...]:
    """What all cases of an implementation say together."""
    ran = [o for o in found if o.predicted is not None and o.measured is not None]
    pairs = [b for o in ran for b in o.buffers]
    sides = ([getattr(o, side).optimizer_state_bytes for o in ran] for side in ("predicted", "measured"))
    ways = (
        [o for o in ran if o.case.workload == OPTIMIZER],
        [o for o in ran if o.case.workload == TRAIN and not o.case.setup().gradient_checkpointing],
        [o for o in ran if o.case.workload == TRAIN and o.case.setup().gradient_checkpointing],
    )
    return (
        method, implementation, str(len(ran)), f"{len(pairs):,}", f"{sum(not b.equal for b in pairs):,}",
        *(f"{sum(side):,}" if side else NONE for side in sides), *(shown(worst(part)) for part in ways),
    )  # fmt: skip


def shown(off: Off | None) -> str:
    """`-12 B (-0.001%)`."""
    if off is None:
        return NONE
    return "0" if off.phase.error == 0 else f"{signed(off.phase.error)} ({percent(off.phase.rel_error)})"


def folded(lines: Sequence[str]) -> Iterator[str]:
    """Lines, each with the indented ones below it."""
    whole = ""
    for line in lines:
        if line.startswith(" "):
            whole += (" " if whole.endswith(":") else ": ") + line.strip()
            continue
        if whole:
            yield whole
        whole = line.removeprefix("* ")
    if whole:
        yield whole


# -- the document ------------------------------------------------------------------------------------


def places(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    """Outcomes by what they ran on: the CPU, or a card."""
    found: dict[str, list[Outcome]] = {}
    for o in outcomes:
        name = "CPU" if o.case.device == "cpu" else str(o.environment.get("gpu", o.case.device))
        found.setdefault(name, []).append(o)
    return found


def document(outcomes: Sequence[Outcome], files: Sequence[str], today: datetime.date) -> str:
    parts = [*head(outcomes, files, today)]
    for name, found in places(outcomes).items():
        small = [o for o in found if o.case.model in SMALL]
        big = [o for o in found if o.case.model not in SMALL]
        if small:
            parts += [f"## Every method and implementation, small models, {name}", *overview(small)]
            parts += [f"## What the packages really hold, {name}", *facts(small)]
        if big:
            parts += [f"## Large models, {name}", *large(big)]
    if more := others(outcomes):
        parts += ["## Commands of the cases that the run above has not", "\n".join(["```sh", *more, "```"])]
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "docs" / "verify.md")
    given = parser.parse_args()
    files = [str(path) for path in given.records]
    given.output.write_text(document(read(given.records), files, datetime.date.today()), encoding="utf-8")


if __name__ == "__main__":
    main()
