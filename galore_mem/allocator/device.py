"""The device under the allocator: how much memory it has, and which addresses it hands out."""

from __future__ import annotations

from typing import Protocol

from galore_mem.errors import InputError
from galore_mem.units import TIB

_FIRST_ADDRESS = 0x7000_0000_0000
_RANGES = 0x10_0000_0000_0000  # expandable ranges are invented from here on, far above segments
UNKNOWN_TOTAL = 4 * TIB  # bytes assumed for the address range of an expandable segment when the capacity is not given


class Addresses(Protocol):
    """Where new memory lies. The allocator's choices depend on it only between free blocks of one size."""

    def segment(self, size: int) -> int:
        """Address of a new segment of `size` bytes."""

    def reserve(self, size: int) -> int:
        """Address of a new expandable range of `size` bytes."""


class AscendingAddresses:
    """Each new segment lies right above all earlier ones; no address is used twice."""

    def __init__(self, first: int = _FIRST_ADDRESS, first_range: int = _RANGES) -> None:
        self._next = first
        self._next_range = first_range

    def segment(self, size: int) -> int:
        self._next += size
        return self._next - size

    def reserve(self, size: int) -> int:
        self._next_range += size
        return self._next_range - size


class Device:
    """A device of `capacity` bytes (None: no limit) of which `other` bytes are in use outside the allocator.

    Outside are the CUDA context, other libraries and other processes.
    """

    __slots__ = ("addresses", "capacity", "other")

    def __init__(self, capacity: int | None = None, other: int = 0, addresses: Addresses | None = None) -> None:
        if capacity is not None and not 0 <= other <= capacity:
            raise InputError(f"a device of {capacity} bytes cannot have {other} bytes in use by others")
        self.capacity = capacity
        self.other = other
        self.addresses: Addresses = addresses or AscendingAddresses()

    @property
    def total(self) -> int:
        return UNKNOWN_TOTAL if self.capacity is None else self.capacity

    def free(self, reserved: int) -> int:
        """Bytes left when the allocator holds `reserved` (cudaMemGetInfo); never below 0."""
        return max(self.total - self.other - reserved, 0)

    def fits(self, reserved: int, size: int) -> bool:
        """Would cudaMalloc of `size` bytes succeed?"""
        return self.capacity is None or self.other + reserved + size <= self.capacity
