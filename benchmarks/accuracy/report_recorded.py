"""Of docs/accuracy.md, the recorded runs of their authors' own models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from errors import PEAK, Pair, by_what, text
from record import Line


def pairs(lines: Sequence[Line]) -> Iterator[Pair]:
    for line in lines:
        found = line["found"]
        for what, name in ((PEAK, "peak"), ("reserved", "reserved")):
            names = line["key"], found["family"], found["method"]
            yield Pair("simulate", *names, what, found["measured"][name], found["simulate"][name])


def section(lines: Sequence[Line]) -> Iterator[str]:
    yield "## Recorded runs of others' own models"
    yield text(
        f"{len(lines)} memory snapshots that two authors took of their own models on GPUs. Equivalent models were "
        "traced without values and replayed through the allocator's model, from the start of the process; event by "
        "event: [recordings.md](recordings.md)."
    )
    yield by_what(pairs(lines))
