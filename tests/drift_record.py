"""The drift alarm's records as text, and what is said where they and the present differ.

A file has a line of versions, then blocks: the names of all the parts that are alike, each in brackets, and below what
they are. A block's first line has its bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from drift_lines import Part

FOLDER = Path(__file__).resolve().parent / "data" / "drift"
BASE = ("torch", "transformers")  # packages whose code every subject runs
BYTES = re.compile(r"(\d+) bytes kept, (\d+) more at the highest")
COUNT = re.compile(r"(.*) times (\d+)")
SHOWN = 30  # differing lines that a message shows
COMMAND = "python benchmarks/drift.py"

Parts = dict[str, Part]
Versions = dict[str, str]


class Record(NamedTuple):
    """What a subject did under some versions."""

    versions: Versions
    parts: Parts


# -- text --------------------------------------------------------------------------------------------------------


def installed(packages: tuple[str, ...] = ()) -> Versions:
    return {name: version(name).partition("+")[0] for name in (*BASE, *packages)}


def text_of(record: Record) -> str:
    """The file's text."""
    return "".join(f"{line}\n" for line in _lines(record))


def _lines(record: Record) -> Iterator[str]:
    yield f"# Written by `{COMMAND}` (what this is: tests/drift_lines.py)."
    yield f"made with {_shown(record.versions)}"
    places: dict[str, list[str]] = {}
    for place, part in record.parts.items():
        places.setdefault("\n".join(_block(part)), []).append(place)
    for block, alike in places.items():
        yield ""
        yield from (f"[{place}]" for place in alike)
        yield block


def _block(part: Part) -> Iterator[str]:
    yield f"{part.kept} bytes kept, {part.highest} more at the highest"
    for line, count in part.lines.items():
        yield line if count == 1 else f"{line} times {count}"


def _shown(versions: Versions) -> str:
    return ", ".join(f"{name} {number}" for name, number in versions.items())


def read(text: str) -> Record:
    """The record in a file's text."""
    (_, made), *blocks = (block.splitlines() for block in text.split("\n\n"))
    versions = dict(one.split() for one in made.removeprefix("made with ").split(", "))
    parts: Parts = {}
    for block in blocks:
        places = [line[1:-1] for line in block if line.startswith("[")]
        part = _part(block[len(places) :])
        parts |= dict.fromkeys(places, part)
    return Record(versions, parts)


def _part(block: list[str]) -> Part:
    sizes = BYTES.fullmatch(block[0])
    assert sizes is not None, block[0]
    lines: dict[str, int] = {}
    for line in block[1:]:
        more = COUNT.fullmatch(line)
        lines |= {more[1]: int(more[2])} if more else {line: 1}
    return Part(lines, int(sizes[1]), int(sizes[2]))


# -- differences ---------------------------------------------------------------------------------------------------


def changes(was: Part, now: Part) -> Iterator[str]:
    """A table's rows: how often a line was there, how often it is now."""
    for line in {**was.lines, **now.lines}:
        before, after = was.lines.get(line, 0), now.lines.get(line, 0)
        if before != after:
            yield f"{before:>9} {after:>9}  {line}"
    if was.kept != now.kept:
        yield f"{was.kept:>9} {now.kept:>9}  bytes kept"
    if was.highest != now.highest:
        yield f"{was.highest:>9} {now.highest:>9}  bytes more at the highest"


def differences(subject: str, was: Record, now: Record) -> str:
    """What changed, by part, with versions and what to do; empty where nothing did."""
    rows = {
        place: "\n".join(changes(was.parts.get(place, Part()), now.parts.get(place, Part())))
        for place in {**was.parts, **now.parts}
    }
    found = [(place, table) for place, table in rows.items() if table]
    if not found:
        return ""
    shown = list(_tables(found))
    more = [f"... and {len(shown) - SHOWN} lines more"] if len(shown) > SHOWN else []
    told = (
        *stamps(was.versions, now.versions),
        f"when `estimate` and `simulate` have followed the change, renew the record: {COMMAND} {subject}",
    )
    return "\n".join(
        (f"{subject}: what is saved and allocated is not what it was", *shown[:SHOWN], *more, *(f"- {t}" for t in told))
    )


def _tables(found: list[tuple[str, str]]) -> Iterator[str]:
    """The same change in many parts once."""
    found = sorted(found, key=lambda pair: [table for _, table in found].index(pair[1]))
    for table, places in groupby(found, key=lambda pair: pair[1]):
        yield "; ".join(place for place, _ in places)
        yield f"{'was':>9} {'now':>9}"
        yield from table.split("\n")


def stamps(was: Versions, now: Versions) -> Iterator[str]:
    """Both sides' versions, and which of the packages is another release."""
    yield f"the record was made with {_shown(was)}; installed are {_shown(now)}"
    other = [name for name in now if minor(now[name]) != minor(was.get(name, ""))]
    if other:
        yield f"another minor version is installed of {' and of '.join(other)}: look there first"
    elif was != now:
        yield "the minor versions are the same"
    else:
        yield "the versions are the same: look at this package first"


def minor(number: str) -> list[str]:
    return number.split(".")[:2]
