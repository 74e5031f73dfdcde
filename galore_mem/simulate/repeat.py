"""The trace of a deep model from traces of shallow ones. No torch.

A model stacks identical layers. With more of them its program does the same things, and in each part of it (a forward
pass, a list of temporaries of all parameters) what it does for a layer some more times. So the events of a deeper run
are those of a shallow one with blocks put in, and each step of depth puts the same blocks in again. Three traces whose
depths grow by equal steps show which: a block is once in the second what it is twice in the third. Which allocation an
event of a block is about, and the layer's number in the names, are affine in how many steps were added and in which of
them it belongs to (the same layer's, the one before's, counted from the first or from the last), so three traces
give their coefficients. Each release of the result is checked to be one of what lives and is of the same kind.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

from galore_mem.simulate.trace import Allocation, Mark, Trace

LAYER = re.compile(r"(?<![^.:])\d+(?![^.:])")  # numbers between dots
TRIED = 10_000  # places for a block, in one part of a program, before it is given up


class Unlike(Exception):  # noqa: N818  # an answer, not a failure
    """The traces are not of one program at three depths. The message says where they differ."""


class Block(NamedTuple):
    """Events that each step of depth adds: `length` of them, before number `at` of a part's events."""

    at: int
    length: int


class Part(NamedTuple):
    """The events between two marks: what each is (`kinds`) and which allocation it is about (`numbers`)."""

    phase: str
    kinds: list[int]
    numbers: list[int]


class Affine(NamedTuple):
    """A number with `k` steps of depth added, in copy `r` (from 0) of what each step adds."""

    base: int
    by_depth: int
    by_copy: int = 0

    def at(self, k: int, r: int) -> int:
        return self.base + k * self.by_depth + r * self.by_copy

    @classmethod
    def of_all(cls, values: Sequence[int]) -> Affine:
        """From its values at three depths."""
        a, b, c = values
        if b - a != c - b:
            raise Unlike("a tensor's place does not move evenly with the depth")
        return cls(a, b - a)

    @classmethod
    def of_copies(cls, values: Sequence[int]) -> Affine:
        """From its value in the only copy of the second depth, and in both of the third."""
        only, first, second = values
        return cls(2 * only - first, first - only, second - first)


class Kinds:
    """Numbers for what allocations are, the same at each depth: all that is known of them but the layer's number, and
    but the size, where one of this size is not in every trace (a vector with an entry for each parameter)."""

    def __init__(self, traces: Sequence[Trace]) -> None:
        self._templates: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._numbers: dict[Hashable, int] = {}
        self._everywhere = set.intersection(*({self._sized(one) for one in t.allocations} for t in traces))

    def of(self, one: Allocation) -> int:
        key = self._sized(one)
        kind = key if key in self._everywhere else key[:-1]
        return self._numbers.setdefault(kind, len(self._numbers) + 1)

    def _sized(self, one: Allocation) -> tuple[Hashable, ...]:
        return (
            self.template(one.module)[0], self.template(one.name)[0], one.op, one.phase, one.category, one.dtype,
            one.kernel, len(one.shape), (one.nbytes, one.shape),
        )  # fmt: skip

    def template(self, text: str) -> tuple[str, tuple[int, ...]]:
        """A name with the numbers in it left open, and these."""
        if text not in self._templates:
            plain = text.replace("{", "{{").replace("}", "}}")
            self._templates[text] = LAYER.sub("{}", plain), tuple(map(int, LAYER.findall(text)))
        return self._templates[text]

    def integers(self, one: Allocation) -> tuple[int, ...]:
        """What allocations of a kind can differ in."""
        return (*self.template(one.module)[1], *self.template(one.name)[1], one.nbytes, *one.shape)

    def like(self, one: Allocation, integers: Sequence[int]) -> Allocation:
        """One of the same kind with these."""
        (module, inside), (name, more) = self.template(one.module), self.template(one.name)
        last = len(inside) + len(more)
        return replace(
            one, module=module.format(*integers[: len(inside)]), name=name.format(*integers[len(inside) : last]),
            nbytes=integers[last], shape=tuple(integers[last + 1 :]),
        )  # fmt: skip


def repeated(traces: Sequence[Trace], steps: int) -> Trace:
    """The trace with `steps` steps of depth more than the first of three. Raises `Unlike`."""
    kinds = Kinds(traces)
    found = [list(parts(trace, kinds)) for trace in traces]
    if len({tuple(part.phase for part in one) for one in found}) != 1:
        raise Unlike("the phases differ")
    made = Deeper(traces, kinds, steps)
    for three in zip(*found, strict=True):
        made.add(three)
    return made.trace


def parts(trace: Trace, kinds: Kinds) -> Iterator[Part]:
    """A trace cut at its marks."""
    of = [kinds.of(one) for one in trace.allocations]
    cuts = [Mark(0, ""), *trace.marks, Mark(len(trace.events), "")]
    for here, after in pairwise(cuts):
        events = trace.events[here.at : after.at]
        yield Part(here.phase, [of[e] if e >= 0 else -of[~e] for e in events], [max(e, ~e) for e in events])


class Parts:
    """The same part at three depths, each with as many more layers as the one before."""

    def __init__(self, three: Sequence[Part]) -> None:
        self.a, self.b, self.c = three
        self.more = len(self.b.kinds) - len(self.a.kinds)
        if self.more < 0 or len(self.c.kinds) - len(self.b.kinds) != self.more:
            raise Unlike("the number of events does not grow evenly with the depth")

    def blocks(self) -> list[Block]:
        """Blocks of the second's events that, put into the first once, give the second, and twice the third. What is
        not in them is in all three, and what it is about moves evenly. Raises `Unlike`."""
        # where the next event of the first is, how many of the second's were put in before, and the blocks they are
        pending: list[tuple[int, int, tuple[Block, ...]]] = [(0, 0, ())]
        for _ in range(TRIED):
            if not pending:
                break
            i, put, chosen = pending.pop()
            i += self._run(i, put)
            if i == len(self.a.kinds):
                if self._twice(i, put, self.more - put):
                    return [*chosen, *([Block(i, self.more - put)] if self.more > put else [])]
                continue
            lengths = range(1, self.more - put + 1)
            options = [(self._run(i, put + n), -n) for n in lengths if self._twice(i, put, n)]
            # the last is tried first: after which most is the same, and of several the shortest
            pending += [(i, put - n, (*chosen, Block(i, -n))) for run, n in sorted(options) if run]
        raise Unlike("what a layer adds was not found")

    def _run(self, i: int, put: int) -> int:
        """How many events from number `i` of the first on are the same in all three."""
        (_, a, p), (_, b, q), (_, c, r) = self.a, self.b, self.c
        start = i
        while i < len(a):
            j, k = i + put, i + 2 * put
            if not (a[i] == b[j] == c[k] and q[j] - p[i] == r[k] - q[j]):
                break
            i += 1
        return i - start

    def _twice(self, i: int, put: int, length: int) -> bool:
        """Are the next `length` events of the second twice in the third?"""
        block = self.b.kinds[i + put : i + put + length]
        start, c = i + 2 * put, self.c.kinds
        return c[start : start + length] == block == c[start + length : start + 2 * length]


class Event(NamedTuple):
    """What happens, to which allocation, and, where one is made, its like, and what it differs from that in."""

    kind: int
    number: Affine
    like: Allocation | None = None
    integers: tuple[Affine, ...] = ()


ALL = (0, 1, 2), Affine.of_all  # an event that each depth has once
COPIES = (1, 2, 2), Affine.of_copies  # one of what is added: that of the second depth, and both of the third


class Deeper:
    """A trace at another depth, made part by part."""

    def __init__(self, traces: Sequence[Trace], kinds: Kinds, steps: int) -> None:
        self.trace = Trace(traces[0].granularity)
        self._traces, self._kinds, self._steps = traces, kinds, steps
        self._alive: dict[int, int] = {}  # what lives, and of which kind it is

    def add(self, three: Sequence[Part]) -> None:
        """A part, from the same part at three depths."""
        if three[0].phase:
            self.trace.marks.append(Mark(len(self.trace.events), three[0].phase))
        done = put = 0
        for at, length in [*Parts(three).blocks(), Block(len(three[0].kinds), 0)]:
            for i in range(done, at):
                self._happen(self._event(three, (i, i + put, i + 2 * put), *ALL), 0)
            once, twice = at + put, at + 2 * put
            added = [self._event(three, (once + q, twice + q, twice + length + q), *COPIES) for q in range(length)]
            for copy in range(self._steps):
                for event in added:
                    self._happen(event, copy)
            done, put = at, put + length

    def _event(
        self, three: Sequence[Part], places: Sequence[int], depths: Sequence[int],
        affine: Callable[[Sequence[int]], Affine],
    ) -> Event:  # fmt: skip
        numbers = [three[depth].numbers[place] for depth, place in zip(depths, places, strict=True)]
        kind, number = three[depths[0]].kinds[places[0]], affine(numbers)
        if kind < 0:
            return Event(kind, number)
        made = [self._traces[depth].allocations[n] for depth, n in zip(depths, numbers, strict=True)]
        integers = [self._kinds.integers(one) for one in made]
        if integers[0] == integers[1] == integers[2]:
            return Event(kind, number, made[0])
        return Event(kind, number, made[0], tuple(affine(values) for values in zip(*integers, strict=True)))

    def _happen(self, event: Event, copy: int) -> None:
        number = event.number.at(self._steps, copy)
        if event.like is None:
            if self._alive.pop(number, None) != -event.kind:
                raise Unlike("what is freed does not follow from shallower depths")
            self.trace.events.append(~number)
            return
        if number != len(self.trace.allocations):
            raise Unlike("what is allocated does not follow from shallower depths")
        integers = [one.at(self._steps, copy) for one in event.integers]
        self.trace.allocations.append(self._kinds.like(event.like, integers) if integers else event.like)
        self._alive[number] = event.kind
        self.trace.events.append(number)
