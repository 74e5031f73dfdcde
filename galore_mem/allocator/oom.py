"""Out of memory: the numbers of torch's message, in a sentence of our own."""

from __future__ import annotations

from galore_mem.errors import GaloreMemError
from galore_mem.units import GIB, KIB, MIB


def format_size(size: int) -> str:
    """As torch prints sizes in this message (c10 format_size): two decimals, a unit only above one of it, up to GiB."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if size > unit:
            return f"{size / unit:.2f} {name}"
    return f"{size} bytes"


class OutOfMemoryError(GaloreMemError):
    """A request that no cached block, no new segment and no release of cached memory could serve. Sizes in bytes.

    requested: what the caller asked for. tried: the segment that the device refused, which is what torch's message
    calls "tried to allocate". capacity and free: the device's, `free` as the driver would report it. outside: in use
    outside the allocator. allowed: the limit that per_process_memory_fraction sets, if it does. The numbers are those
    at the failure, when everything that can be released has been.
    """

    def __init__(
        self,
        *,
        requested: int,
        tried: int,
        stream: int,
        capacity: int,
        free: int,
        outside: int,
        allocated: int,
        reserved: int,
        allowed: int | None = None,
    ) -> None:
        self.requested = requested
        self.tried = tried
        self.stream = stream
        self.capacity = capacity
        self.free = free
        self.outside = outside
        self.allocated = allocated
        self.reserved = reserved
        self.allowed = allowed
        super().__init__(self._sentence())

    @property
    def unallocated(self) -> int:
        """Bytes reserved by the allocator but not allocated: pieces of segments that are partly in use."""
        return self.reserved - self.allocated

    def _sentence(self) -> str:
        limit = "" if self.allowed is None else f"; the allocator may use {format_size(self.allowed)}"
        return (
            f"CUDA would be out of memory: {format_size(self.tried)} more are needed, the device has"
            f" {format_size(self.free)} free of {format_size(self.capacity)}{limit}. In use:"
            f" {format_size(self.allocated)} allocated, {format_size(self.unallocated)} reserved but unallocated,"
            f" {format_size(self.outside)} outside the allocator."
        )
