"""What the options of our optimizers may be."""

from __future__ import annotations

from math import isfinite
from numbers import Integral, Real
from typing import NamedTuple

from galore_mem.errors import InputError


class Range(NamedTuple):
    """Which values an option of a parameter group may have. `optional`: None is one of them; `above`: the
    least is not."""

    least: float = 0.0
    below: float = float("inf")
    whole: bool = False
    optional: bool = False
    above: bool = False

    def check(self, name: str, value: object) -> int | float | None:
        """The value as a plain number: numpy's cannot be loaded with `weights_only=True`. Raises `InputError` where it
        is none of this range. (NaN is in none.)"""
        if value is None and self.optional:
            return None
        number = _number(value)
        if number is None or not self._has(number):
            kind = "a whole number" if self.whole else "a number"
            least = "above" if self.above else "of at least"
            bound = f" and below {self.below:g}" if isfinite(self.below) else ""
            none = ", or None" if self.optional else ""
            raise InputError(f"{name} must be {kind} {least} {self.least:g}{bound}{none}, got {value!r}")
        return number

    def _has(self, number: float) -> bool:
        if self.whole and not isinstance(number, int):
            return False
        return self.least <= number < self.below and not (self.above and number == self.least)


def _number(value: object) -> int | float | None:
    """A number of Python; None where it is none. (True and False are not.)"""
    if isinstance(value, bool):
        return None
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else None


FRACTION = Range(0.0, 1.0)
COUNT = Range(1, whole=True)
