"""Where a card's driver puts new segments, as far as recordings of real runs show it. No torch.

The allocator's choice among free blocks of one size is the lowest address, so addresses decide how memory fragments.
Seen in recordings made under Linux: address space is taken in multiples of 32 MiB, each below the one before, and what
a segment leaves of its piece serves later ones that fit. (Under Windows, and its subsystem for Linux, segments lie one
above the other: `galore_mem.allocator.device.AscendingAddresses`.) With this, seven traced runs of a large model
reserve what was recorded to the byte; with ascending addresses two of them are 0.7 and 2.4 % off (docs/recordings.md).
"""

from __future__ import annotations

from galore_mem.units import MIB, round_up

PIECE = 32 * MIB
_TOP = 0x7FFF_0000_0000
_RANGES = 0x10_0000_0000_0000  # expandable ranges are far above


class DriverAddresses:
    """Addresses from high to low, in pieces (`galore_mem.allocator.device.Addresses`). None is used twice."""

    def __init__(self, top: int = _TOP, ranges: int = _RANGES) -> None:
        self._top = top
        self._ranges = ranges
        self._left: list[tuple[int, int]] = []  # size and address of what is left of pieces

    def segment(self, size: int) -> int:
        """Of a new segment: in the smallest rest that has room, or in a new piece."""
        room = min((rest for rest in self._left if rest[0] >= size), default=None)
        if room is None:
            taken = round_up(size, PIECE)
            self._top -= taken
            room = taken, self._top
        else:
            self._left.remove(room)
        if room[0] > size:
            self._left.append((room[0] - size, room[1] + size))
        return room[1]

    def reserve(self, size: int) -> int:
        """Of a new expandable range."""
        self._ranges += size
        return self._ranges - size
