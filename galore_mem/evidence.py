"""What stands behind a prediction: runs in which it was compared with measured memory, and by how much it was off.

`evidence.json` is written by the accuracy suite (`python benchmarks/accuracy`) from its record; docs/accuracy.md is the
same in words. No torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from galore_mem.setup import Setup
from galore_mem.units import round_up

FILE = Path(__file__).with_name("evidence.json")
GPU, CPU, APART, FORMULA = "gpu", "cpu", "apart", "formula"  # classes, from the strongest
CLASSES = {
    GPU: "this family and method, on GPUs, by others", CPU: "this family and method, in real steps on the CPU",
    APART: "family, method and way to train were each measured, but not together",
    FORMULA: "the family, the method or the way to train was never measured; the band is assumed",
}  # fmt: skip
FOLLOWED = "estimate --reserved"
OWN = "module:function"  # family, method and implementation of a training step that is not ours
ASSUMED = 0.05  # the band where nothing was measured: an assumption, and said to be one
LEAST = 0.001  # no smaller band is promised, whatever the runs showed
BY_GUESS = "the band is assumed"
SEGMENT = 2 << 20  # bytes: the allocator reserves in multiples of it (c10/cuda/CUDACachingAllocator.h, kSmallBuffer)


class Compared(NamedTuple):
    """Runs of a family with a method by an implementation in one place (`cpu`, or a card's name): how many, the lowest
    and highest signed error of the predicted peak, as a share of the measured one, and the ways in which they trained
    (`ways`)."""

    place: str
    family: str
    method: str
    implementation: str
    runs: int
    lowest: float
    highest: float
    ways: tuple[str, ...] = ()

    @property
    def worst(self) -> float:
        return max(abs(self.lowest), abs(self.highest))


class Confidence(NamedTuple):
    """The class of evidence behind a prediction, and how far the measured peak may be from the predicted one: between
    `1 - band` and `1 + band` times it. `reserved_band` is the same of the reserved peak, where one is predicted.
    `slack`: of a peak from so many bytes on, the share that the allocator's blocks may add which the prediction knows
    nothing of, the largest size first."""

    evidence: str
    band: float
    text: str
    reserved_band: float | None = None
    slack: tuple[tuple[int, float], ...] = ()

    def above(self, nbytes: int) -> float:
        """The band's upper end for a peak of so many bytes."""
        return max(self.band, next((share for least, share in self.slack if nbytes >= least), 0.0))

    def short(self, nbytes: int) -> str:
        """The wider end of the band of a peak of so many bytes, and its class, in a few letters."""
        return f"{self.above(nbytes):.1%} {self.evidence}"

    def told(self, nbytes: int) -> str:
        """The same in words."""
        above = self.above(nbytes)
        more = f"; unused room in the allocator's blocks may add up to {above:.1%}" if above > self.band else ""
        return f"{self.text}{more}"

    def low(self, nbytes: int) -> int:
        return int(nbytes * (1 - self.band))

    def high(self, nbytes: int) -> int:
        return math.ceil(nbytes * (1 + self.above(nbytes)))

    def high_reserved(self, nbytes: int) -> int:
        """Of a predicted reserved peak, what may be reserved at most."""
        return math.ceil(nbytes * (1 + max(self.band, self.reserved_band or 0.0)))

    def to_json(self, nbytes: int) -> dict[str, Any]:
        """With the band of a peak of so many bytes."""
        return {
            "evidence": self.evidence, "band": self.band, "band_above": self.above(nbytes),
            "low_bytes": self.low(nbytes), "high_bytes": self.high(nbytes), "reserved_band": self.reserved_band,
            "text": self.told(nbytes),
        }  # fmt: skip


class Reserve(NamedTuple):
    """What the caching allocator held of the device at its highest, as a multiple of the allocated peak, in published
    runs with one kind of attention."""

    pairs: int
    lowest: float
    median: float
    highest: float

    def bytes(self, allocated: int) -> tuple[int, int, int]:
        """The lowest, the usual and the highest reserved peak for an allocated one."""
        low, usual, high = (round_up(int(allocated * share), SEGMENT) for share in self[1:])
        return low, usual, high

    @property
    def text(self) -> str:
        return (
            f"in {self.pairs} published GPU runs the allocator reserved {self.lowest:.2f} to {self.highest:.2f} times "
            f"what was allocated (median {self.median:.2f}); --reserved and simulate follow the allocator itself"
        )

    def to_json(self, allocated: int) -> dict[str, Any]:
        low, usual, high = self.bytes(allocated)
        return {"low_bytes": low, "usual_bytes": usual, "high_bytes": high, "pairs": self.pairs, "text": self.text}


@lru_cache(maxsize=1)
def _data() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return found


def compared(predictor: str) -> tuple[Compared, ...]:
    """All that a predictor was compared with. (On the CPU, where no allocator is followed, `--reserved` changes
    nothing.)"""
    own = tuple(Compared._make((*told, tuple(ways))) for *told, ways in _data()["errors"].get(predictor, ()))
    return own if predictor != FOLLOWED else own + tuple(row for row in compared("estimate") if row.place == CPU)


def reserve(attention: str) -> Reserve | None:
    """The published pairs of this attention; None where there are none."""
    row = _data()["reserved"].get(attention)
    return None if row is None else Reserve(*row)


def confidence(
    predictor: str, setup: Setup, family: str | None, method: str, implementation: str, settings: str = ""
) -> Confidence:
    """The evidence for `estimate`'s or `simulate`'s peak of one run; `settings` are its allocator's.

    `gpu`: the family with the method was measured on a GPU (by others); `cpu`: in real steps on the CPU, so that what
    a card does differently rests on PyTorch's sources and on the errors of other runs on GPUs; `apart`: family, method
    and way to train were each measured, but not together; `formula`: one of them never was.
    """
    usual = _data().get("usual", {}).get(predictor, 0.0)
    asked = Asked(setup.device, family, method, implementation, ways(setup, settings))
    found = weighed(compared(predictor), usual, asked)
    on_card = setup.device == "cuda"
    return found._replace(
        band=max(found.band, LEAST),
        reserved_band=_data()["usual_reserved"].get(predictor) if on_card else None,
        slack=tuple((least, share) for least, share in _data()["slack"].get(predictor, ())) if on_card else (),
    )


def ways(setup: Setup, settings: str = "") -> tuple[str, ...]:
    """Of a setup, what decides which operations run, and how the allocator serves them."""
    switches = {
        "gradient checkpointing": setup.gradient_checkpointing, "a layer-wise update": setup.layerwise,
        "gradient accumulation": setup.gradient_accumulation > 1, "keys and values": setup.use_cache,
        f"allocator settings {settings}": bool(settings),
    }  # fmt: skip
    named = (f"recipe {setup.recipe.name}", f"attention {setup.attention}", f"loss {setup.loss}")
    return *named, *(way for way, on in switches.items() if on)


class Asked(NamedTuple):
    """A run whose peak is predicted."""

    device: str
    family: str | None
    method: str
    implementation: str
    ways: tuple[str, ...] = ()


def weighed(rows: Iterable[Compared], usual: float, asked: Asked) -> Confidence:
    """The same from given comparisons. `usual`: what 95 of 100 runs on GPUs stay within; less is promised of none, for
    a run that happened to be exact says nothing of the next."""
    rows = tuple(rows)
    cards = [row for row in rows if row.place != CPU] if asked.device == "cuda" else []
    here = [row for row in rows if row.place == CPU]
    on_card, on_cpu = _same(cards, asked), _same(here, asked)
    general = _worst(cards or here)
    if on_card and not _unseen(on_card, asked):
        band = max(_worst(on_card), usual)
        return Confidence(GPU, band, f"{_runs(on_card)} of this family and method on {_places(on_card)}, by others")
    if on_cpu and not _unseen(on_cpu, asked):
        band = max(_worst(on_cpu), general if asked.device == "cuda" else 0.0)
        behind = f"; the band is the largest error of {_runs(cards)} of others on GPUs" if cards else ""
        return Confidence(CPU, band, f"{_runs(on_cpu)} of this family and method on the CPU{behind}")
    by_method = [row for row in rows if (row.method, row.implementation) == asked[2:4]]
    by_family = [row for row in rows if row.family == asked.family]
    missing = [*["this family"] * (not by_family), *["this method"] * (not by_method), *_unseen(rows, asked)]
    if missing:
        return Confidence(
            FORMULA, max(general, ASSUMED), f"nothing of {' and '.join(missing)} was measured; {BY_GUESS}"
        )
    band = max(general, _worst([*by_method, *by_family]))
    apart = _unseen([*on_card, *on_cpu], asked) if on_card or on_cpu else ()
    text = (
        f"{_runs([*on_card, *on_cpu])} of this family and method, {' and '.join(apart)} with others" if apart else
        f"{_runs(by_family)} of the family with other methods, {_runs(by_method)} of the method elsewhere"
    )  # fmt: skip
    return Confidence(APART, band, f"{text}; the band is the largest error of any")


def _same(rows: Iterable[Compared], asked: Asked) -> list[Compared]:
    return [row for row in rows if (row.family, row.method, row.implementation) == asked[1:4]]


def _unseen(rows: Iterable[Compared], asked: Asked) -> list[str]:
    """Ways to train that no run had."""
    seen = {way for row in rows for way in row.ways}
    return [way for way in asked.ways if way not in seen]


def _worst(rows: Iterable[Compared]) -> float:
    return max((row.worst for row in rows), default=0.0)


def _runs(rows: Iterable[Compared]) -> str:
    count = sum(row.runs for row in rows)
    return f"{count} measured run" + "s" * (count != 1)


def _places(rows: Iterable[Compared]) -> str:
    return ", ".join(sorted({row.place for row in rows}))
