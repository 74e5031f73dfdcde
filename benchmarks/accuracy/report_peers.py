"""Of docs/accuracy.md, others' estimators on the runs measured on GPUs, as `python benchmarks/peers` asked them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

FOLDER = Path(__file__).resolve().parent.parent / "peers"
sys.path.append(str(FOLDER))

import report_gpu  # noqa: E402  # the folder is on the path from here on
from errors import Pair, details, percent, size_of, spread, table, text  # noqa: E402  # the folder is on the path from here on
from peers import PEERS  # noqa: E402  # the folder is on the path from here on
from record import Line, good, read  # noqa: E402  # the folder is on the path from here on

OURS = ("estimate", "estimate --reserved", "simulate")
PEAK = "peak"
COLUMNS = {"": False, "rows": True, "median, signed": True, "median": True, "95 %": True, "worst": True, "where": False}


def section(lines: Sequence[Line]) -> Iterator[str]:
    said = [line for line in read(FOLDER / "record.jsonl").values() if good(line)]
    if not said:
        return
    answered = [line for line in said if "allocated_bytes" in line["found"]]
    titles = {line["key"]: line["found"]["title"] for line in answered}
    ours = {
        (pair.predictor, row_of(pair)): pair._replace(case=titles[row_of(pair)])
        for pair in report_gpu.pairs(lines)
        if pair.what == PEAK and row_of(pair) in titles and pair.predictor in OURS
    }
    yield "## Other estimators on the same runs"
    yield intro(said)
    yield from ("### Rows that a peer can be asked exactly", compared(answered, ours, lambda f: not f["differs"]))
    yield text(
        "And all rows that it answers, also those of which it has no option for something; of what comes near, what "
        "serves it best:"
    )
    yield compared(answered, ours, lambda f: True)
    yield text(
        "By where the rows come from (rows: median, worst); a star: measured by the peer's authors, and what they "
        "fitted it to or checked it against:"
    )
    yield by_origin(answered, ours)
    yield text(
        "Some count the whole device: what they say in all, beside what was reserved plus what lies outside the "
        "allocator, on rows for which both were measured. (The context that `galore-mem` adds was measured on these "
        "cards, in these runs.)"
    )
    yield whole(answered, lines)
    yield "### How each was asked"
    yield how(said)
    yield from details("What each said of every row", every(answered, ours))


def row_of(pair: Pair) -> str:
    """The row's name is the first word of a case's."""
    return pair.case.split()[0]


def intro(said: Sequence[Line]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in {x["part"]: x["version"] for x in said}.items())
    rows, dates = {line["key"] for line in said}, sorted({line["date"] for line in said})
    return text(
        f"The {len(rows)} training runs of the section before, as others' estimators answer them: {versions}, each in "
        f"an environment of its own, offline, asked by `python benchmarks/peers` on {dates[-1]} with the exact number "
        f"of parameters and the settings that serve it best. Below each peer `galore-mem`, on exactly the rows that "
        f"the peer answered. The allocated peak is compared; which figure is used is said below. Peers were "
        f"fitted to some of these rows by their authors: there they show how well a fit fits. `galore-mem` has no "
        f"factor that is fitted to them, but its operations were checked against them."
    )


def compared(
    answered: Iterable[Line], ours: Mapping[tuple[str, str], Pair], wanted: Callable[[Mapping[str, Any]], bool]
) -> str:
    """A peer's row, then ours on the same runs."""
    rows = []
    chosen = [line for line in answered if wanted(line["found"])]
    for name in dict.fromkeys(line["part"] for line in chosen):
        own = [line for line in chosen if line["part"] == name]
        rows.append((f"**{name}** {own[0]['version']}", *cells([pair_of(line) for line in own])))
        for predictor in OURS:
            same = [ours[predictor, line["key"]] for line in own if (predictor, line["key"]) in ours]
            if same:
                rows.append((f"`{predictor}` on these", *cells(same)))
    return table(COLUMNS, rows)


def whole(answered: Iterable[Line], lines: Iterable[Line]) -> str:
    """Of peers that count fragmentation, which vramcalc leaves out; and ours on all such runs."""
    both = [line for line in answered if line["found"]["device_bytes"] and line["part"] != "vramcalc"]
    pairs = {
        f"**{name}**": [pair_of(line, True) for line in both if line["part"] == name]
        for name in dict.fromkeys(line["part"] for line in both)
    }
    known = {line["key"] for line in both}
    for line in lines:
        found, right = line["found"], line["found"]["measured"]
        for name in OURS[1:]:
            if line["key"] in known and (found.get(name) or {}).get("reserved"):
                measured, said = right["reserved"] + right["outside"], found[name]["reserved"] + found["outside"]
                pairs.setdefault(f"`{name}`", []).append(Pair(name, found["title"], "", "", PEAK, measured, said))
    return table(COLUMNS, ((name, *cells(group)) for name, group in pairs.items()))


def by_origin(answered: Sequence[Line], ours: Mapping[tuple[str, str], Pair]) -> str:
    """A row of the table for each predictor, a column for each source of runs: rows, median, worst."""
    said = [(line["part"], line["key"], pair_of(line)) for line in answered]
    said += [(f"`{predictor}`", key, pair) for (predictor, key), pair in ours.items()]
    origins = sorted({key.split("-")[0] for _, key, _ in said})
    groups: dict[tuple[str, str], list[Pair]] = {}
    for name, key, pair in said:
        groups.setdefault((name, key.split("-")[0]), []).append(pair)
    rows = []
    for name in dict.fromkeys(name for name, _, _ in said):
        row = [name]
        for origin in origins:
            s = spread(groups[name, origin]) if (name, origin) in groups else None
            own = "*" if name in PEERS and PEERS[name].own == origin else ""
            row.append(f"{s.count}: {size_of(s.middle)}, {percent(s.worst.error, 2)}{own}" if s else "-")
        rows.append(row)
    return table({"": False, **dict.fromkeys(origins, True)}, rows)


def pair_of(line: Line, device: bool = False) -> Pair:
    found = line["found"]
    measured, predicted = ("device_bytes", "whole_bytes") if device else ("peak_allocated_bytes", "allocated_bytes")
    return Pair(line["part"], found["title"], "", "", PEAK, found[measured], found[predicted])


def cells(pairs: Sequence[Pair]) -> tuple[str, ...]:
    s = spread(pairs)
    return (
        str(s.count), percent(s.signed, 2), size_of(s.middle), size_of(s.high), percent(s.worst.error, 2), s.worst.case,
    )  # fmt: skip


def how(said: Sequence[Line]) -> str:
    """A list: the figure taken, what it was fitted to, what it could not be asked or did not answer."""
    return "\n".join(
        fill(
            f"- **{name}**. We take {peer.figure}. {peer.calibrated} {asked(own)} {missing(own)}",
            118,
            subsequent_indent="  ",
            break_on_hyphens=False,
            break_long_words=False,
        )
        for name, peer in PEERS.items()
        if (own := [line for line in said if line["part"] == name])
    )


def asked(own: Sequence[Line]) -> str:
    said = [line["found"] for line in own if "allocated_bytes" in line["found"]]
    reasons = counted(why for found in said for why in found["differs"])
    return f"Asked the nearest question: {reasons}." if reasons else "Every answered row could be asked exactly."


def missing(own: Sequence[Line]) -> str:
    """In its own words, up to the end of a sentence."""
    reasons = counted(line["found"]["refused"].split(". ")[0] for line in own if "refused" in line["found"])
    return f"No answer: {reasons}." if reasons else ""


def counted(reasons: Iterable[str]) -> str:
    every = list(reasons)
    return "; ".join(f"{why} ({every.count(why)} row{'s' * (every.count(why) > 1)})" for why in dict.fromkeys(every))


def every(answered: Sequence[Line], ours: Mapping[tuple[str, str], Pair]) -> str:
    """A measured run a row, signed errors."""
    names = list(dict.fromkeys(line["part"] for line in answered))
    errors = {(line["part"], line["key"]): percent(pair_of(line).error, 2) for line in answered}
    near = {(line["part"], line["key"]) for line in answered if line["found"]["differs"]}
    errors |= {key: f"({error})" for key, error in errors.items() if key in near}
    errors |= {key: percent(pair.error, 2) for key, pair in ours.items()}
    rows = [
        (
            found["title"],
            f"{found['peak_allocated_bytes']:,}",
            *(errors.get((name, key), "-") for name in (*OURS, *names)),
        )
        for key, found in {line["key"]: line["found"] for line in answered}.items()
    ]
    return table({"run": False, "measured": True, **dict.fromkeys((*(f"`{o}`" for o in OURS), *names), True)}, rows)
