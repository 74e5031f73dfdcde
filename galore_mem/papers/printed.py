"""Numbers as they stand in print: how many digits they show, and what prints the same digits.

A printed "0.36" claims two decimals and no more: it is 36 units of its last digit. Rounding is done on exact
fractions and gives such units.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

_NUMBER = re.compile(r"\d+(?:\.(\d+))?")


@dataclass(frozen=True, slots=True)
class Printed:
    """A printed figure: one number, a range ("45-50") or a bound ("<10", ">90"); `low` and `high` in units of the last
    digit."""

    text: str
    low: int | None
    high: int | None
    digits: int

    @classmethod
    def parse(cls, text: str) -> Printed:
        numbers = list(_NUMBER.finditer(text))
        digits = max(len(n[1] or "") for n in numbers)
        ends = [int(Fraction(n[0]) * 10**digits) for n in numbers]
        low = None if text.startswith("<") else ends[0]
        high = None if text.startswith(">") else ends[-1]
        return cls(text, low, high, digits)

    @property
    def value(self) -> Fraction:
        """The number; of a range or bound its first."""
        end = self.high if self.low is None else self.low
        assert end is not None
        return Fraction(end, 10**self.digits)

    def is_printed_by(self, units: int) -> bool:
        """Does a value, already cut to these digits, stand for what is printed? Bounds are strict."""
        if self.low is None or self.high is None:
            return units != self.value * 10**self.digits and self.distance(units) == 0
        return self.low <= units <= self.high

    def distance(self, units: int | Fraction) -> int | Fraction:
        """How far a value in units of the last digit is from the figure."""
        if self.low is not None and units < self.low:
            return self.low - units
        if self.high is not None and units > self.high:
            return units - self.high
        return 0


def half_up(value: Fraction, digits: int) -> int:
    """Rounded to this many decimals, halves upwards, in units of the last one (values here are not negative)."""
    scale: int = 10**digits
    return (2 * value.numerator * scale + value.denominator) // (2 * value.denominator)


def truncated(value: Fraction, digits: int) -> int:
    """Cut after this many decimals, in units of the last one."""
    scale: int = 10**digits
    return value.numerator * scale // value.denominator


def text(units: int, digits: int) -> str:
    """Units of the last digit as print shows them: 30 with two digits is `0.30`."""
    scaled = str(units).rjust(digits + 1, "0")
    return f"{scaled[:-digits]}.{scaled[-digits:]}" if digits else scaled
