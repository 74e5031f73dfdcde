"""Cards: what torch reports as their memory, their compute capability, and what a CUDA context takes.

`capacity` is `torch.cuda.mem_get_info`'s total as printed in out-of-memory messages (GiB, two decimals), where one
was found; otherwise the nominal size less 2 %, as drivers keep some. `context` is what lay outside torch's allocator
in such messages (process in use - allocated - cached), or where others measured it on the card.
"""

from __future__ import annotations

from typing import NamedTuple

from galore_mem.errors import InputError, unknown
from galore_mem.units import GIB, format_bytes, parse_bytes


class Gpu(NamedTuple):
    """A card: bytes available to a process, compute capability, and the CUDA context's bytes with their evidence."""

    name: str
    capacity: int
    capability: tuple[int, int] | None
    context: int
    evidence: str


MESSAGES = "out-of-memory messages published by users"
TYPICAL = "typical of 24 to 80 GiB cards (0.37 to 0.67 GiB in " + MESSAGES + ")"
_CONTEXT = 0.50


def _gib(x: float) -> int:
    return round(x * 100) * GIB // 100


class _Row(NamedTuple):
    name: str
    gib: float
    capability: tuple[int, int]
    context: float | None = None  # GiB, where this card shows it
    reported: bool = False  # is `gib` what torch printed, or the nominal size?
    source: str = MESSAGES  # of the context


_ROWS = (
    _Row("t4", 14.74, (7, 5), 0.14, reported=True, source="measured on this card by fitcheck-llm 0.3.1"),
    _Row("v100-16gb", 16, (7, 0)),
    _Row("v100-32gb", 32, (7, 0)),
    _Row("rtx-3060", 12, (8, 6)),
    _Row("rtx-3090", 24, (8, 6)),
    _Row("rtx-4060-ti-16gb", 16, (8, 9)),
    _Row("rtx-4080", 16, (8, 9)),
    _Row("rtx-4090", 23.52, (8, 9), 0.46, reported=True),
    _Row("rtx-5090", 32, (12, 0)),
    _Row("rtx-a6000", 48, (8, 6), 0.69, source="measured on this card by vramcalc 0.1.2"),
    _Row("rtx-6000-ada", 48, (8, 9)),
    _Row("a10g", 21.99, (8, 6), 0.29, reported=True),
    _Row("l4", 24, (8, 9)),
    _Row("l40s", 48, (8, 9)),
    _Row("a100-40gb", 39.39, (8, 0), 0.53, reported=True),
    _Row("a100-80gb", 79.15, (8, 0), 0.51, reported=True),
    _Row("h100-80gb", 79.11, (9, 0), 0.67, reported=True),
    _Row("h100-94gb", 94, (9, 0)),
    _Row("h200", 141, (9, 0)),
    _Row("b200", 178.35, (10, 0), 0.70, reported=True),
)


def _card(row: _Row) -> Gpu:
    gib = row.gib if row.reported else row.gib * 0.98
    context, why = (row.context, row.source) if row.context is not None else (_CONTEXT, TYPICAL)
    return Gpu(row.name, _gib(gib), row.capability, _gib(context), why)


GPUS = {row.name: _card(row) for row in _ROWS}

DEFAULT_CONTEXT = Gpu("default", 0, None, _gib(_CONTEXT), TYPICAL)


def gpu(text: str) -> Gpu:
    """A card by name, or a plain capacity such as `24GiB`. Raises `InputError`."""
    name = text.strip().lower().replace("_", "-").replace(" ", "-")
    if name in GPUS:
        return GPUS[name]
    if text[:1].isdigit():
        capacity = parse_bytes(text)
        if capacity < GIB // 4:
            meant = [g for g in GPUS if text.strip().lower() in g]
            hint = f"did you mean {', '.join(meant)}?" if meant else "give a capacity such as 24GiB"
            raise InputError(f"--gpu {text} would be a card of {format_bytes(capacity)}; {hint}")
        return Gpu(text, capacity, None, DEFAULT_CONTEXT.context, TYPICAL)
    raise unknown("GPU", text, GPUS)
