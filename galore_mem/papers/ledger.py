"""Element counts of a model under a method, read off the method's `paper` ledger.

Nothing is re-derived here: what `galore_mem.methods` says a paper counts is what is compared with the
figures that the paper prints. Counts are kept apart by bits per element, so that 8-bit states and
4-bit projectors need no formula of their own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod

from galore_mem.memory.network import trained_as
from galore_mem.methods.base import Job
from galore_mem.methods.registry import method as find_method
from galore_mem.setup import RECIPES
from galore_mem.spec.model import Heads, ModelSpec, ParamSpec, Role, Shape, is_target
from galore_mem.spec.resolve import resolve

Row = tuple[ParamSpec, int, bool]  # a parameter, how often it occurs, whether low-rank treatment applies
BYTE = 8


@dataclass(frozen=True, slots=True)
class Ledger:
    """Elements of the `weights`, by bits per element, and how many of them are frozen; elements of the optimizer's
    `states`, likewise, and how many of them are in `projectors`."""

    weights: Mapping[int, int]
    frozen_count: int
    states: Mapping[int, int]
    projectors: int

    @property
    def weight_count(self) -> int:
        return sum(self.weights.values())

    @property
    def trained_count(self) -> int:
        return self.weight_count - self.frozen_count

    @property
    def state_count(self) -> int:
        return sum(self.states.values())

    @property
    def weight_bytes(self) -> int:
        """Whole bytes: every count here is even where elements are four bits wide."""
        return _bits(self.weights) // BYTE

    @property
    def state_bytes(self) -> int:
        return _bits(self.states) // BYTE


def _bits(elements: Mapping[int, int]) -> int:
    return sum(bits * count for bits, count in elements.items())


@lru_cache(maxsize=16)
def model(name: str) -> ModelSpec:
    """The bundled specification of this name."""
    return resolve(name)


@lru_cache(maxsize=256)
def of_model(name: str, method: str, rank: int, *, only_projected: bool = False, paper: bool = True) -> Ledger:
    """The ledger of a bundled model; with `only_projected`, of its projected matrices alone; with `paper=False`, of
    the method's default implementation."""
    spec = model(name)
    rows = ((row, repeat, is_target(row, None)) for row, repeat in spec.groups())
    return _count((r for r in rows if r[2] or not only_projected), method, rank, spec.heads, paper)


@lru_cache(maxsize=256)
def of_matrices(shapes: tuple[Shape, ...], method: str, rank: int) -> Ledger:
    """The ledger of weight matrices of these shapes, all of them projected."""
    rows = [(ParamSpec(f"{i}.weight", shape, Role.MLP, "linear"), 1, True) for i, shape in enumerate(shapes)]
    return _count(rows, method, rank, None, paper=True)


def _count(rows: Iterable[Row], method: str, rank: int, heads: Heads | None, paper: bool) -> Ledger:
    found = find_method(method)
    code = found.paper if paper else found.implementation(None)
    hyperparameters = {h.name: h.default for h in found.hyperparameters} | {"rank": rank}
    job = Job(hyperparameters, RECIPES["pure-bf16"], heads=heads)
    weights: Counter[int] = Counter()
    states: Counter[int] = Counter()
    frozen = projectors = 0
    for row, repeat, projected in rows:
        for stored in code.store(row, projected, job):
            elements = prod(stored.shape) * repeat
            weights[stored.dtype.bits] += elements
            if stored.grad is None:
                frozen += elements
                continue
            for buffer in code.state(trained_as(row, stored, projected, job), job):
                elements = prod(buffer.shape) * repeat
                states[buffer.dtype.bits] += elements
                projectors += elements if buffer.name == "projector" else 0
    return Ledger(weights, frozen, states, projectors)
