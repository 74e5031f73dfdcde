"""The conventions a size table may follow. Few, named, each with its reason; they are data, tried in this order.

A cell is `formula` x `counts` x `unit`, brought to the printed digits by `rounding`:

- formula: which elements are added up. One per row of a table, the paper's own first;
- counts and unit: how many elements the model has and what "G" means. One choice for a whole table;
- rounding: one choice for a whole table.

W is the number of parameters, N that of the parameters outside projected matrices (embeddings, head,
norms), L = sum of r(m + n) over the projected matrices, and X = L + N, which GaLore's appendix C.2 calls the
parameters "on low-rank adaptors".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction

from galore_mem.papers.ledger import BYTE, Ledger, of_model
from galore_mem.papers.printed import half_up, truncated

BF16, FP32 = 2, 4  # bytes
MILLION = 10**6


@dataclass(frozen=True, slots=True)
class Subject:
    """One cell's model, method and rank, the label of its size, and what other tables print for it (bytes)."""

    model: str
    method: str
    rank: int
    nominal: int
    elsewhere: Mapping[str, Fraction] = field(default_factory=dict)

    @property
    def own(self) -> Ledger:
        return of_model(self.model, self.method, self.rank)

    @property
    def parameters(self) -> int:
        """W."""
        return of_model(self.model, "adamw", self.rank).weight_count

    @property
    def adaptors(self) -> int:
        """X: the factors of the projected matrices, and every other parameter once."""
        return of_model(self.model, "low-rank", self.rank).weight_count


Count = Callable[[int], int]
Parts = tuple[Fraction, Fraction]  # bytes of weights, bytes of optimizer states


@dataclass(frozen=True, slots=True)
class Formula:
    """Which elements a row adds up, at how many bytes each."""

    name: str
    why: str
    parts: Callable[[Subject, Count], Parts]


@dataclass(frozen=True, slots=True)
class Scale:
    """How elements are counted, and how many bytes the printed unit has."""

    counts: str
    unit: str
    unit_bytes: int

    @property
    def name(self) -> str:
        return f"{self.counts} counts, {self.unit}"

    def count(self, subject: Subject) -> Count:
        return COUNTS[self.counts](subject)


# -- counts ----------------------------------------------------------------------------------------


def _config(subject: Subject) -> Count:
    return int


def _nominal(subject: Subject) -> Count:
    whole = subject.parameters

    def count(elements: int) -> int:
        millions = subject.nominal if elements == whole else half_up(Fraction(elements, MILLION), 0)
        return millions * MILLION

    return count


COUNTS: Mapping[str, Callable[[Subject], Count]] = {"config": _config, "nominal": _nominal}
COUNTS_WHY = {
    "config": "exact counts of the released configuration",
    # Exact adaptor counts beside nominal sizes print the same cells but one: Table 6's LoRA weights at 350M are 1.04,
    # which 350 M + 185 M give and 350 M + 185.22 M do not (1.045).
    "nominal": "the label of the size for the full model (60M), whole millions for every other count",
}

# -- units -----------------------------------------------------------------------------------------

UNITS: Mapping[str, tuple[tuple[str, int], ...]] = {
    "G": (("G = 1e9 B", 10**9), ("G = 1024e6 B", 1024 * MILLION), ("G = GiB", 2**30)),
    "M": (("M = 1e6 B", MILLION), ("M = MiB", 2**20)),
}
UNITS_WHY = {
    "G = 1e9 B": "SI",
    "G = 1024e6 B": "millions of parameters times bytes is megabytes; these divided by 1024",
    "G = GiB": "2^30 bytes",
    "M = 1e6 B": "SI",
    "M = MiB": "2^20 bytes",
}


def scales(unit: str) -> tuple[Scale, ...]:
    """Every reading of a unit, the plainest first."""
    return tuple(Scale(counts, name, size) for counts in COUNTS for name, size in UNITS[unit])


# -- rounding --------------------------------------------------------------------------------------


def _rounded(weights: Fraction, states: Fraction, digits: int) -> int:
    return half_up(weights + states, digits)


def _parts_rounded(weights: Fraction, states: Fraction, digits: int) -> int:
    return half_up(weights, digits) + half_up(states, digits)


def _truncated(weights: Fraction, states: Fraction, digits: int) -> int:
    return truncated(weights + states, digits)


Rounding = Callable[[Fraction, Fraction, int], int]  # in units of the last digit
ROUNDINGS: Mapping[str, Rounding] = {
    "rounded": _rounded, "sum of rounded parts": _parts_rounded, "truncated": _truncated,
}  # fmt: skip
ROUNDINGS_WHY = {
    "rounded": "the nearest value with the printed digits, halves upwards",
    "sum of rounded parts": "weights and states rounded first, as a reader adding up two printed tables would do",
    "truncated": "further digits cut off",
}

# -- formulas --------------------------------------------------------------------------------------


def _weigh(elements: Mapping[int, int], count: Count) -> Fraction:
    return Fraction(sum(count(n) * bits for bits, n in elements.items()), BYTE)


def _own_weights(s: Subject, count: Count) -> Fraction:
    """The weights of the ledger; where they hold the whole model, its parameters and what is added to them."""
    ledger, whole = s.own, s.parameters
    extra = ledger.weight_count - whole
    if extra >= 0 and ledger.weights.keys() == {BF16 * BYTE}:
        return Fraction(BF16 * (count(whole) + count(extra)))
    return _weigh(ledger.weights, count)


def _own(s: Subject, count: Count) -> Parts:
    """The method's ledger. States that are a whole multiple of what is trained follow its count (Adam's two)."""
    ledger = s.own
    weights = _own_weights(s, count)
    if len(ledger.states) == 1 and ledger.state_count % ledger.trained_count == 0:
        (bits,) = ledger.states
        times = ledger.state_count // ledger.trained_count
        return weights, Fraction(count(ledger.trained_count) * times * bits, BYTE)
    return weights, _weigh(ledger.states, count)


def _adaptors_with_rest(s: Subject, count: Count) -> Parts:
    x = count(s.adaptors)
    return Fraction(BF16 * (count(s.parameters) + x)), Fraction(BF16 * 2 * x)


def _three_quarters(s: Subject, count: Count) -> Parts:
    return Fraction(BF16 * count(s.parameters)), Fraction(BF16 * 3 * count(s.adaptors), 2)


def _projector_in_16_bits(s: Subject, count: Count) -> Parts:
    weights, states = _own(s, count)
    return weights, states + count(s.own.projectors)


def _projected_only(s: Subject, count: Count, width: int) -> Parts:
    ledger = of_model(s.model, s.method, s.rank, only_projected=True)
    adapters = ledger.trained_count if ledger.frozen_count else 0
    weights = BF16 * count(s.parameters) + width * count(adapters)
    return Fraction(weights), Fraction(width * count(ledger.state_count))


def _projected(s: Subject, count: Count) -> Parts:
    return _projected_only(s, count, BF16)


def _projected_fp32(s: Subject, count: Count) -> Parts:
    return _projected_only(s, count, FP32)


def _less_half_the_weights(s: Subject, count: Count) -> Parts:
    weights = count(s.parameters)
    return Fraction(weights), s.elsewhere["GaLore"] - BF16 * weights


OWN = "own formula"
FORMULAS: Mapping[str, Formula] = {
    f.name: f
    for f in (
        Formula(OWN, "the formula the paper states, read off the method's ledger", _own),
        Formula("W+X", "weights W + X, states 2X: GaLore C.2 counts embeddings, head and norms among the adaptors "
                "(42.7M at 60M), so they are trained, as in ReLoRA, and their weights counted twice",
                _adaptors_with_rest),
        Formula("1.5X", "GaLore's states as 3/4 of LoRA's 2X: mr + 2nr is 3/4 of 2mr + 2nr where m = n; here for every "
                "matrix and for embeddings, head and norms as well", _three_quarters),
        Formula("16-bit projector", "8-bit moments and the projector in BF16: how Q-GaLore (section 4.2.2) describes "
                "8-bit GaLore, and what its code keeps", _projector_in_16_bits),
        Formula("projected", "states of the projected matrices only", _projected),
        Formula("projected fp32", "states and adapters of the projected matrices only, in 32 bits", _projected_fp32),
        Formula("GaLore - W", "the cell GaLore prints less one byte per parameter: INT8 weights, and still GaLore's "
                "BF16 states", _less_half_the_weights),
    )
}  # fmt: skip


def reasons() -> dict[str, str]:
    """Every convention by name, with the reason for trying it."""
    formulas = {f"formula {f.name}": f.why for f in FORMULAS.values()}
    counts = {f"{name} counts": why for name, why in COUNTS_WHY.items()}
    return formulas | counts | UNITS_WHY | ROUNDINGS_WHY
