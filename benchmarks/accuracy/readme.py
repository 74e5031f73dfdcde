"""The table of the README, between its two marks: how far each predictor was off, in a line each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from errors import Pair, grouped, percent, size_of, spread, table

BEGIN, END = "<!-- accuracy: written by `python benchmarks/accuracy` -->", "<!-- /accuracy -->"
COMMANDS = ("estimate", "estimate --reserved", "simulate")
KINDS = {"peak": "allocated peak", "reserved": "reserved peak"}


def rewritten(text: str, kinds: Mapping[str, Sequence[Pair]]) -> str:
    """The README with its table as the record has it. `kinds`: pairs by what they were measured beside."""
    before, mark, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (mark and end):
        raise ValueError(f"the README has no {BEGIN} ... {END}")
    return f"{before}{BEGIN}\n\n{summary(kinds)}\n{END}{after}"


def summary(kinds: Mapping[str, Sequence[Pair]]) -> str:
    columns = {"predictor": False, "beside": False, "of": False, "runs": True, "median": True, "95 %": True}
    return table({**columns, "worst": True}, _rows(kinds)).rstrip() + "\n"


def _rows(kinds: Mapping[str, Sequence[Pair]]) -> Iterator[tuple[str, ...]]:
    for beside, pairs in kinds.items():
        for what, named in KINDS.items():
            groups = grouped((pair for pair in pairs if pair.what == what), lambda pair: pair.predictor)
            for predictor in (name for name in COMMANDS if name in groups):
                s = spread(groups[predictor])
                yield (
                    f"`{predictor}`", beside, named, str(s.count), size_of(s.middle), size_of(s.high),
                    percent(s.worst.error),
                )  # fmt: skip


def write(path: Path, kinds: Mapping[str, Sequence[Pair]]) -> None:
    path.write_text(rewritten(path.read_text(encoding="utf-8"), kinds), encoding="utf-8")
