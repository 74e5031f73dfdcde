"""Does an estimate fit a card? No torch."""

from __future__ import annotations

from galore_mem.gpus import Gpu
from galore_mem.result import Estimate, Fit


def fit(made: Estimate, card: Gpu) -> Fit:
    """The verdict for a card. It fits where there is room for the upper end of the band with what allocators usually
    reserve beyond it, and does not where there is none for the lower end."""
    peak, outside = made.peak_allocated_bytes, made.outside_allocator_bytes
    low, high = (made.confidence.low(peak), made.confidence.high(peak)) if made.confidence else (peak, peak)
    usual = high if made.reserve is None else max(high, made.reserve.bytes(high)[1])
    if made.peak_reserved_bytes is not None and made.confidence is not None:
        usual = made.confidence.high_reserved(made.peak_reserved_bytes)
    return Fit(card.name, card.capacity, card.capacity - made.device_bytes, between(low, usual, card, outside))


def between(low: int, high: int, card: Gpu, outside: int) -> str:
    """The verdict where the allocator needs from `low` to `high` bytes, beside those outside it."""
    room = card.capacity - outside
    return "does_not_fit" if low > room else "fits" if high <= room else "tight"
