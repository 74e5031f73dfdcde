"""From the record to what the package carries of it, `galore_mem/evidence.json`: how far each predictor's peaks were
off, by family, method and place; and how much of the device allocators held beyond a peak."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from record import Line

from galore_mem.units import GIB

PREDICTORS = ("estimate", "estimate --reserved", "simulate")
WAYS = {
    "attention": "sdpa",
    "loss": "eager",
    "gradient_checkpointing": False,
    "layerwise": False,
    "gradient_accumulation": 1,
    "use_cache": False,
}  # what decides which operations run, and with what a case has that does not say
DIGITS = 6
SIZES = (*(GIB << n for n in range(6, -1, -1)), 0)  # bytes


def write(path: Path, lines: Iterable[Line], verified: Path, compared: Iterable[Line]) -> None:
    """`verified` is a record of `galore-mem verify`, which has the packages that the suite does without; `compared`
    are `estimate`'s runs beside `simulate`'s."""
    found = [*(line["found"] for line in lines), *trained(verified)]
    text = json.dumps(
        {
            "source": "written by `python benchmarks/accuracy` from its record; see docs/accuracy.md",
            "errors": {name: errors(found, name) for name in PREDICTORS},
            "usual": {name: high(abs(error) for one, error in off(found, name) if "gpu" in one) for name in PREDICTORS},
            "usual_reserved": {name: high(reserved_off(found, name)) for name in PREDICTORS[1:]},
            "reserved": reserved(found),
            "slack": {"estimate": slack([line["found"] for line in compared])},
        },
        indent=1,
    )
    path.write_text(text + "\n", encoding="utf-8")


def trained(record: Path) -> Iterator[dict[str, Any]]:
    """Whole training steps of `verify`, as the suite's cases are."""
    from galore_mem.verify.matrix import model_of
    from galore_mem.verify.record import Record, latest

    for outcome in latest(Record(record).read()):
        case, said, real = outcome.case, outcome.predicted, outcome.measured
        if case.workload == "train" and said is not None and real is not None:
            yield {
                "family": model_of(case.model).family, "method": case.method, "implementation": case.implementation,
                "recipe": case.recipe, "options": case.options, "measured": {"peak": real.peak_allocated_bytes},
                "estimate": {"peak": max(said.phases[name] for name in real.phases if name in said.phases)},
            }  # fmt: skip


def of(found: Mapping[str, Any], way: str) -> Any:
    return found.get(way) or found.get("options", {}).get(way) or WAYS[way]


def ways(found: Mapping[str, Any]) -> tuple[str, ...]:
    """How a model was trained, in the package's words."""
    from galore_mem.evidence import ways
    from galore_mem.setup import Setup, recipe

    name = found.get("recipe") or found.get("options", {}).get("recipe") or "fp32"
    return ways(Setup(recipe(name), seq_len=1, **{way: of(found, way) for way in WAYS}))


def errors(found: Iterable[Mapping[str, Any]], predictor: str) -> list[list[Any]]:
    """Rows of `galore_mem.evidence.Compared`."""
    groups: dict[tuple[str, ...], list[float]] = {}
    how: dict[tuple[str, ...], set[str]] = {}
    for one, error in off(found, predictor):
        key = one.get("gpu", "cpu"), one["family"], one["method"], one["implementation"]
        groups.setdefault(key, []).append(error)
        how.setdefault(key, set()).update(ways(one))
    return [
        [*key, len(of), round(min(of), DIGITS), round(max(of), DIGITS), sorted(how[key])]
        for key, of in sorted(groups.items())
    ]


def high(sizes: Iterable[float]) -> float:
    """What 95 of 100 errors stay within."""
    found = list(sizes)
    if len(found) < 2:
        return max(found, default=0.0)
    return round(quantiles(found, n=20, method="inclusive")[-1], DIGITS)


def reserved_off(found: Iterable[Mapping[str, Any]], predictor: str) -> Iterator[float]:
    """Sizes of the errors of reserved peaks."""
    for one in found:
        said = (one.get(predictor) or {}).get("reserved")
        if said and one["measured"].get("reserved"):
            yield abs(said / one["measured"]["reserved"] - 1)


def off(found: Iterable[Mapping[str, Any]], predictor: str) -> Iterator[tuple[Mapping[str, Any], float]]:
    """Each run whose peak was measured and predicted, with the signed error."""
    for one in found:
        if one.get(predictor) and (one["measured"].get("peak") or one["measured"].get("phases")):
            yield one, peak(one[predictor]) / peak(one["measured"]) - 1


def peak(of: Mapping[str, Any]) -> int:
    """The highest allocated bytes of a step."""
    return int(of.get("peak") or max(of["phases"].values()))


def reserved(found: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Rows of `galore_mem.evidence.Reserve` by attention, from runs whose reserved peak was recorded."""
    groups: dict[str, list[float]] = {}
    for one in found:
        if one["measured"].get("reserved"):
            groups.setdefault(of(one, "attention"), []).append(one["measured"]["reserved"] / peak(one["measured"]))
    return {
        kind: [len(of), *(round(n, 4) for n in (min(of), median(of), max(of)))] for kind, of in sorted(groups.items())
    }


def slack(found: Sequence[Mapping[str, Any]]) -> list[tuple[int, float]]:
    """From a peak of so many bytes on, what 95 of 100 runs have at most in blocks that tensors do not fill, as a share
    of it; the largest first. (Larger ones have no more than smaller ones.)"""
    shares: list[tuple[int, float]] = []
    for one in found:
        own, blocks = (max(of) for of in zip(*sizes(one), strict=True))
        shares.append((own, blocks / own - 1))
    rows: list[tuple[int, float]] = []
    for least in SIZES:
        of_size = [share for own, share in shares if own >= least and all(own < n or n <= least for n in SIZES)]
        rows.append((least, max([high(of_size), *(share for _, share in rows)])))
    return rows


def sizes(one: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    """Bytes of a phase's tensors, as `simulate` has them, and with what they leave in their blocks."""
    for name, (_, own) in one["phases"].items():
        yield own, own + one["slack"].get(name, 0)
