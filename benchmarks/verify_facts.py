"""What published packages hold beyond what one would expect, beside ours on the same model: facts of a record.

Each is found in the record's numbers; one whose cases the record has not is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from textwrap import fill
from typing import NamedTuple

from galore_mem.dtypes import dtype
from galore_mem.report.tables import Column, Table, to_markdown
from galore_mem.report.verify_rows import way
from galore_mem.verify.case import OPTIMIZER, BufferPair, Outcome
from galore_mem.verify.peers import MISREAD

OURS = "galore-mem"


class Fact(NamedTuple):
    """`said` under a heading, and the numbers. `columns`: those that `TEXT` names are text."""

    title: str
    said: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


TEXT = ("method", "implementation", "run", "its arguments")


def facts(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """What the record has of each fact."""
    ran = [o for o in outcomes if o.measured is not None and o.predicted is not None]
    for fact in (pinned(ran), codes(ran), copies(ran), tables(ran), misread(ran)):
        if fact.rows:
            yield f"### {fact.title}"
            yield text(fact.said)
            columns = tuple(Column(name, right=name not in TEXT) for name in fact.columns)
            yield to_markdown(Table("", columns, tuple(fact.rows)))


def text(said: str) -> str:
    return fill(" ".join(said.split()), 118, break_long_words=False, break_on_hyphens=False)


def ours(o: Outcome, outcomes: Sequence[Outcome]) -> Outcome | None:
    """The same case by our implementation."""
    for other in outcomes:
        same = other.case.method == o.case.method and other.case.implementation == OURS
        if same and way(other.case) == way(o.case) and other.case.hyperparameters == o.case.hyperparameters:
            return other
    return None


def who(o: Outcome) -> tuple[str, str, str]:
    return o.case.method, o.case.implementation, way(o.case)


def projectors(o: Outcome | None) -> list[BufferPair]:
    return [] if o is None else [b for b in o.buffers if b.buffer.startswith("projector")]


def held(found: Sequence[BufferPair]) -> int:
    """Bytes of the storages that these tensors keep alive."""
    return sum(b.measured_bytes or 0 for b in found)


def elements(b: BufferPair) -> int:
    """Bytes of the tensor's own elements."""
    return dtype(b.dtype).nbytes(b.shape)


def pinned(outcomes: Sequence[Outcome]) -> Fact:
    """Tensors that are views of larger storages. Of each implementation and format the case where most is pinned."""
    most: dict[tuple[str, str, str], tuple[int, Outcome, list[BufferPair]]] = {}
    for o in outcomes:
        views = [b for b in o.buffers if b.predicted_bytes is not None and (b.measured_bytes or 0) > elements(b)]
        extra = held(views) - sum(map(elements, views))
        key = (o.case.method, o.case.implementation, o.case.recipe)
        if extra > most.get(key, (0, o, views))[0]:
            most[key] = extra, o, views
    rows = []
    for extra, o, views in most.values():
        whole = sum(b.measured_bytes == 4 * max(b.shape) ** 2 for b in views)
        names = {b.buffer for b in views}
        every = [b for b in o.buffers if b.buffer in names]
        own = projectors(ours(o, outcomes))
        rows.append((
            *who(o), f"{len(every):,}", f"{len(views):,}", f"{whole:,}", f"{sum(map(elements, every)):,}",
            f"{held(every):,}", f"{extra:,}", f"{held(own):,}" if own else "",
        ))  # fmt: skip
    mine = [b for o in outcomes if o.case.implementation.startswith(OURS) for b in o.buffers]
    larger = sum((b.measured_bytes or 0) > elements(b) for b in mine if b.predicted_bytes is not None)
    return Fact(
        "Projectors that keep the whole SVD factor alive",
        "`U[:, :rank]` is a view: in float32, where no cast makes a copy, the projector's storage is all of U (or "
        "Vh), s·s·4 bytes for a matrix with smaller side s, whatever the rank. (A rank at or above s has nothing to "
        f"pin.) Of {len(mine):,} tensors of ours {larger:,} keep more than their elements alive.",
        ("method", "implementation", "run", "projectors", "that are views", "of s·s·4 bytes", "bytes of elements",
         "bytes held", "pinned", "held by ours"),
        rows,
    )  # fmt: skip


def codes(outcomes: Sequence[Outcome]) -> Fact:
    """Bytes a value of Q-GaLore's projectors, on the models that every implementation ran on."""
    found = [o for o in outcomes if o.case.method == "q-galore"]
    published = {way(o.case) for o in found if not o.case.implementation.startswith(OURS)}
    rows = []
    for o in found:
        coded = [b for b in projectors(o) if not dtype(b.dtype).floating]
        values = sum(prod(b.shape) for b in coded)
        if coded and way(o.case) in published:
            rows.append((*who(o), f"{len(coded):,}", f"{values:,}", f"{held(coded):,}", f"{held(coded) / values:.2f}"))
    return Fact(
        "INT4 projectors",
        "q-galore-torch rounds projectors to 16 levels and stores each in a byte of its own.",
        ("method", "implementation", "run", "projectors", "values", "bytes of codes", "bytes a value"),
        rows,
    )


def copies(outcomes: Sequence[Outcome]) -> Fact:
    """What a step needs besides weights, gradients and state, by how torch runs over the parameters."""
    rows = []
    for o in outcomes:
        m = o.measured
        kind = o.case.implementation.removeprefix("torch-")
        plain = o.case.method == "adamw" and o.case.workload == OPTIMIZER and not o.case.setup().layerwise
        if m is None or not plain or kind not in ("foreach", "fused", "loop") or "step" not in m.phases:
            continue
        more = m.phases["step"] - m.weights_bytes - m.gradients_bytes - m.optimizer_state_bytes
        rows.append((*who(o), f"{m.weights_bytes:,}", f"{more:,}", f"{more / m.weights_bytes:.2f}"))
    return Fact(
        "The copy that foreach makes",
        "AdamW's `foreach` (torch's default on CUDA) makes the denominators of all parameters before it uses the "
        "first: its step needs another copy of all of them. `fused` and the loop do not.",
        ("method", "implementation", "run", "bytes of parameters", "step needs besides", "copies of all parameters"),
        rows,
    )


def tables(outcomes: Sequence[Outcome]) -> Fact:
    """The quantization maps of 8-bit states: of each tensor, or of all together (which no parameter owns)."""
    rows = []
    for o in outcomes:
        if o.measured is None or o.case.method != "adamw-8bit" or o.case.workload != OPTIMIZER:
            continue
        quantized = [b for b in o.buffers if dtype(b.dtype).name == "uint8"]
        own = [b for b in o.buffers if b.buffer.endswith("qmap")]
        shared = o.measured.optimizer_state_bytes - held(o.buffers)
        if quantized:
            rows.append((
                *who(o), f"{len(quantized):,}", f"{held(own):,}", f"{shared:,}",
                f"{(held(own) + shared) / len(quantized):,.0f}",
            ))  # fmt: skip
    return Fact(
        "Quantization maps",
        "256 float32 values for each kind of moment: bitsandbytes has one pair for the optimizer, torchao one map for "
        "each tensor.",
        ("method", "implementation", "run", "quantized tensors", "bytes of their own maps", "bytes of shared ones",
         "bytes a tensor"),
        rows,
    )  # fmt: skip


def misread(outcomes: Sequence[Outcome]) -> Fact:
    """8-bit GaLore packages on bitsandbytes 0.50: as they are, `unorm_vec` beside each state; or set back to 0.49."""
    rows = []
    for o in outcomes:
        extra = [b for b in o.buffers if b.buffer.endswith("unorm_vec")]
        if o.measured is None or not (extra or MISREAD in o.detail):
            continue
        own = ours(o, outcomes)
        beside = "" if own is None or own.measured is None else f"{own.measured.optimizer_state_bytes:,}"
        rows.append((
            *who(o), "set back" if MISREAD in o.detail else "as it is", f"{len(extra):,}", f"{held(extra):,}",
            f"{o.measured.optimizer_state_bytes:,}", beside,
        ))  # fmt: skip
    return Fact(
        "8-bit GaLore on bitsandbytes 0.50 and later",
        f"galore-torch 1.0: {MISREAD}.",
        ("method", "implementation", "run", "its arguments", "unorm_vec", "their bytes", "bytes of state", "ours"),
        rows,
    )
