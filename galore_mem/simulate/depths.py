"""Which layers of a model are alike, and at which depths its others follow from shallow ones. No torch."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from galore_mem.errors import InputError

TRACED = 3  # depths that show what a period of layers adds (`galore_mem.simulate.repeat`)
FIRST = 2  # layers at the shallowest: the first and the last are not like those between


@dataclass(frozen=True, slots=True)
class Pattern:
    """A stack of layers: some at the beginning that do not repeat, then `periods` times the same `period` layers, then
    some at the end."""

    before: int
    period: int
    periods: int
    after: int

    @property
    def layers(self) -> int:
        return self.before + self.period * self.periods + self.after

    def kept(self, periods: int) -> list[int]:
        """The layers that are left where the period is repeated only so often."""
        return [*range(self.before + self.period * periods), *range(self.layers - self.after, self.layers)]

    def depths(self, more: int = 0) -> tuple[int, ...]:
        """Periods of the shallow models that are traced: as few as there can be, or with so many more."""
        outside = self.before + self.after
        fewest = max(1, -(-(FIRST - outside) // self.period)) + more
        return tuple(fewest + i for i in range(TRACED))

    def pays(self, more: int = 0) -> bool:
        """Have the shallow models fewer layers together than the model?"""
        return sum(len(self.kept(periods)) for periods in self.depths(more)) < self.layers


def patterns(kinds: Sequence[Hashable]) -> Iterator[Pattern]:
    """Every pattern of a stack: for each period the longest stretch in which layers are like those a period before."""
    for period in range(1, len(kinds) // 2 + 1):
        start, best = 0, (0, 0)
        for i in range(period, len(kinds) + 1):
            if i == len(kinds) or kinds[i] != kinds[i - period]:
                best = max(best, (i - start, -start))
                start = i - period + 1
        length, before = best[0], -best[1]
        periods = length // period
        if periods > 1:
            yield Pattern(before, period, periods, len(kinds) - before - periods * period)


def pattern(kinds: Sequence[Hashable]) -> Pattern | None:
    """The pattern whose shallow models have the fewest layers; None where none has fewer than the model."""
    found = [one for one in patterns(kinds) if one.pays()]
    return min(found, key=lambda one: sum(len(one.kept(p)) for p in one.depths()), default=None)


def cut(config: Mapping[str, Any], key: str, kept: Sequence[int]) -> dict[str, Any]:
    """A model's config with some of its layers: their number, under `key`, and every list with an entry for each."""
    layers = config[key]
    if not isinstance(layers, int):
        raise InputError(f"{key} must be an integer, got {layers!r}")
    return {
        name: [value[i] for i in kept] if isinstance(value, list | tuple) and len(value) == layers else value
        for name, value in config.items()
    } | {key: len(kept)}
