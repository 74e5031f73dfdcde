"""What the allocator counts, under the names of `torch.cuda.memory_stats`: bytes now, and their peaks since a reset."""

from __future__ import annotations

from copy import copy


class Stats:
    """Bytes in use, their peaks, and counts of what the allocator had to do.

    allocated: blocks handed out. active: those, and freed ones that another stream may still use. requested: what was
    asked for active blocks. reserved: what the device gave. inactive_split: free pieces of segments that are partly in
    use, which cannot be given back (expandable segments are left out, as in torch).
    """

    __slots__ = (
        "active", "active_peak", "allocated", "allocated_peak", "inactive_split", "inactive_split_peak",
        "num_alloc_retries", "num_device_alloc", "num_device_free", "num_ooms", "num_sync_all_streams",
        "requested", "requested_peak", "reserved", "reserved_peak", "segments",
    )  # fmt: skip

    def __init__(self) -> None:
        self.allocated = self.allocated_peak = 0
        self.reserved = self.reserved_peak = 0
        self.requested = self.requested_peak = 0
        self.active = self.active_peak = 0
        self.inactive_split = self.inactive_split_peak = 0
        self.segments = 0  # native segments only; mapping an expandable one does not count
        self.num_alloc_retries = 0
        self.num_ooms = 0
        self.num_sync_all_streams = 0
        self.num_device_alloc = 0
        self.num_device_free = 0

    def reset_peaks(self) -> None:
        """As torch.cuda.reset_peak_memory_stats: each peak becomes what there is now."""
        self.allocated_peak = self.allocated
        self.reserved_peak = self.reserved
        self.requested_peak = self.requested
        self.active_peak = self.active
        self.inactive_split_peak = self.inactive_split

    def copy(self) -> Stats:
        return copy(self)
