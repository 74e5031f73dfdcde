"""Replay a recording and compare: every allocation's address, every segment event, the final layout.

Only the address of new memory is taken from the recording; all else is the model's own. With `invented=True` not even
that, so that only sizes, the order of events and the start state decide: what a prediction can know.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import NamedTuple

from galore_mem.allocator.blocks import FREE, Block, SegmentLayout
from galore_mem.allocator.caching import CachingAllocator
from galore_mem.allocator.device import AscendingAddresses, Device
from galore_mem.allocator.expandable import ExpandableAllocator
from galore_mem.allocator.oom import OutOfMemoryError
from galore_mem.allocator.restore import restore
from galore_mem.allocator.settings import AllocatorSettings
from galore_mem.allocator.snapshot import DeviceRecording, TraceEvent
from galore_mem.allocator.start import StartState, start_state
from galore_mem.allocator.steps import GIVES, SEGMENT_EVENTS, TAKES, Step, reserved_bytes, steps
from galore_mem.units import round_up


class Comparison(NamedTuple):
    """What the model did beside what was recorded, on one device. Sizes in bytes.

    A peak is that of the recorded window, the start state included. `retries` and `out_of_memory` are the model's; an
    out-of-memory error counts as matched when it came at the recorded event.
    """

    device: int
    allocations: int
    allocations_matched: int
    segment_events: int
    segment_events_matched: int
    blocks: int
    blocks_matched: int
    out_of_memory: int
    out_of_memory_matched: int
    out_of_memory_extra: int
    retries: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    recorded_peak_reserved_bytes: int
    capacity: int | None
    open_blocks: int
    first_difference: str | None

    @property
    def exact(self) -> bool:
        """Is everything as recorded?"""
        return self.first_difference is None


class _RecordedAddresses:
    """Offers the addresses of the step's recorded segment events; another size gets an address above all of them."""

    def __init__(self, above: int) -> None:
        self.offers: list[TraceEvent] = []
        self._other = AscendingAddresses(above, above + 2**56)

    def segment(self, size: int) -> int:
        for i, offer in enumerate(self.offers):
            if offer.action == "segment_alloc" and offer.size == size:
                return self.offers.pop(i).address
        return self._other.segment(size)

    def reserve(self, size: int) -> int:
        for offer in self.offers:
            if offer.action == "segment_map":
                return offer.address
        return self._other.reserve(size)


def _above(recording: DeviceRecording) -> int:
    ends = [s.address + s.size for s in recording.segments]
    ends += [e.address + e.size for e in recording.events if e.action != "oom"]
    return round_up(max(ends, default=0), 2**21)


class _Run:
    """One replay; `note` keeps the first difference."""

    def __init__(
        self,
        recording: DeviceRecording,
        settings: AllocatorSettings,
        start: StartState,
        capacity: int | None,
        limits: dict[int, int],
        invented: bool,
    ) -> None:
        """`limits`: the capacity at single events, where it is not the one that holds elsewhere."""
        self.recording = recording
        self.capacity = capacity
        self.limits = limits
        self.offered = _RecordedAddresses(_above(recording))
        addresses = AscendingAddresses(_above(recording), _above(recording) + 2**56) if invented else self.offered
        self.emitted: list[TraceEvent] = []
        kind = ExpandableAllocator if _expands(settings, start.segments) else CachingAllocator
        self.allocator = kind(settings, Device(capacity, addresses=addresses), self._observe)
        self.blocks: dict[int, Block] = restore(self.allocator, start.segments)  # by recorded address
        self.waiting = {a: (b, self.allocator.held[b]) for a, b in self.blocks.items() if b in self.allocator.held}
        self.difference: str | None = None
        self.matched: Counter[str] = Counter()
        self.refusals: list[int] = []  # what would have been reserved where the device may have refused memory

    def _observe(self, action: str, address: int, size: int, stream: int) -> None:
        if action in SEGMENT_EVENTS:
            self.emitted.append(TraceEvent(action, address, size, stream))

    def note(self, at: int, text: str) -> None:
        if self.difference is None:
            self.difference = f"event {at}: {text}"

    def run(self) -> None:
        for step, following in pairwise([*steps(self.recording.events), None]):
            assert step is not None
            self.offered.offers = [e for e in step.before if e.action in TAKES]
            self.emitted.clear()
            releases = self._releases_itself(step)
            for address in step.finished:
                if not (releases and self._would_serve(self.waiting.get(address, (None, 0))[0], step.event)):
                    self._finish(address)
            if step.gives and not releases:
                self.allocator.empty_cache()
            if step.event.action == "free_requested":
                self._free(step, following)
            else:
                getattr(self, "_" + step.event.action)(step)
            for address in step.finished:
                self._finish(address)
            self._compare_segments(step)

    def _releases_itself(self, step: Step) -> bool:
        """Will the model give back memory in this step without being told to?"""
        event = step.event
        if not step.starved or not event.size:
            return False
        missing = self.allocator.missing(event.size, event.stream)
        if missing and step.gives:
            self.refusals.append(self.allocator.stats.reserved + missing)
        return self.allocator.would_release(event.size, event.stream)

    def _would_serve(self, block: Block | None, event: TraceEvent) -> bool:
        """Would this block, once free, have served the request, so that nothing had to be given back for it?

        It did not, so it can only have become free while the allocator waited for all streams, after its search.
        """
        if block is None:
            return False
        if self.allocator.settings.expandable_segments:
            return True  # or it would have made less memory necessary
        return self.allocator.serves(block.pool, _merged(block), event.size, event.stream)

    def _compare_segments(self, step: Step) -> None:
        if step.before == self.emitted:
            self.matched["segments"] += len(step.before)
            return
        self.matched["segments"] += (Counter(step.before) & Counter(self.emitted)).total()
        self.note(step.at, f"segment events {_listed(self.emitted)}, recorded {_listed(step.before)}")

    def _alloc(self, step: Step) -> None:
        _, address, size, stream = step.event
        if not size:
            return
        try:
            block = self.allocator.malloc(size, stream)
        except OutOfMemoryError as error:
            self.matched["extra out of memory"] += 1
            self.note(step.at, str(error))
            return
        self.blocks[address] = block
        if block.address == address:
            self.matched["allocations"] += 1
        else:
            self.note(step.at, f"{size} bytes lie at {block.address:#x}, recorded at {address:#x}")

    def _free(self, step: Step, following: Step | None) -> None:
        """Free a block. Its completion may directly follow for two reasons: nothing held it; or it was held, and the
        next request made the allocator wait for all streams. The second, if the free block would have served that
        request, before or after the cache was emptied."""
        address = step.event.address
        block = self.blocks.pop(address, None)
        if block is None:
            return  # its allocation failed here
        held = step.delayed
        if not held and following is not None and following.starved and self._would_serve(block, following.event):
            held = following.event.action == "oom" or (block.area is None and not _alone(block))
            if held:
                following.finished.insert(0, address)
        if held:
            self.allocator.record_stream(block, block.pool.stream + 1)
        self.allocator.free(block)
        if held:
            self.waiting[address] = block, self.allocator.held[block]

    def _finish(self, address: int) -> None:
        """A held block is free, unless the allocator has waited for all streams since."""
        block, ticket = self.waiting.pop(address, (None, 0))
        if block is not None and self.allocator.held.get(block) == ticket:
            self.allocator.finish(block)

    def _oom(self, step: Step) -> None:
        """The request must fail here, too; what others than the allocator had in use is known at this event."""
        device = self.allocator.device
        if step.at in self.limits:
            device.capacity = self.limits[step.at]
        try:
            block = self.allocator.malloc(max(step.event.size, 1), step.event.stream)
        except OutOfMemoryError:
            self.matched["out of memory"] += 1
        else:
            self.note(step.at, f"out of memory was recorded, but {step.event.size} bytes are there")
            self.allocator.free(block)
        device.capacity = self.capacity

    def _end(self, step: Step) -> None:
        """Nothing more was asked for."""


def _merged(block: Block) -> int:
    """Bytes of the free block that this one would become part of."""
    neighbors = [b for b in (block.previous, block.next) if b is not None and b.state == FREE]
    return block.size + sum(b.size for b in neighbors)


def _alone(block: Block) -> bool:
    """Is all else of its segment free?"""
    before, after = block.previous, block.next
    return (before is None or (before.state == FREE and before.previous is None)) and (
        after is None or (after.state == FREE and after.next is None)
    )


def _listed(events: list[TraceEvent]) -> str:
    shown = ", ".join(f"{e.action} {e.size} at {e.address:#x}" for e in events[:3])
    return f"[{shown}{', ...' if len(events) > 3 else ''}]"


def _expands(settings: AllocatorSettings, segments: tuple[SegmentLayout, ...]) -> bool:
    return settings.expandable_segments or any(s.expandable for s in segments)


def compare(
    recording: DeviceRecording,
    settings: AllocatorSettings,
    capacity: int | None = None,
    *,
    invented: bool = False,
    start: StartState | None = None,
) -> Comparison:
    """Replay the recorded events from the recorded start and compare. Raises `InputError` if they contradict it.

    `capacity`: bytes the allocator can reserve on this device; None: what `implied_capacity` finds.
    """
    start = start or start_state(recording, settings)
    limits: dict[int, int] = {}
    if capacity is None:
        capacity = implied_capacity(recording, settings, start)
        limits = _limits(recording, start)
    run = _Run(recording, settings, start, capacity, limits, invented)
    run.run()
    events = recording.events
    recorded = {(b.address, b.size, b.requested, b.state) for s in recording.segments for b in s.blocks}
    laid = {(b.address, b.size, b.requested, b.state) for s in run.allocator.layout() for b in s.blocks}
    if laid != recorded:
        run.note(len(events), f"{len(recorded - laid)} of {len(recorded)} blocks at the end are not as recorded")
    failures = sum(e.action == "oom" for e in events)
    return Comparison(
        device=recording.device,
        allocations=sum(e.action == "alloc" for e in events),
        allocations_matched=run.matched["allocations"],
        segment_events=sum(e.action in SEGMENT_EVENTS for e in events),
        segment_events_matched=run.matched["segments"],
        blocks=len(recorded),
        blocks_matched=len(recorded & laid),
        out_of_memory=failures,
        out_of_memory_matched=run.matched["out of memory"],
        out_of_memory_extra=run.matched["extra out of memory"],
        retries=run.allocator.stats.num_alloc_retries,
        peak_allocated_bytes=run.allocator.stats.allocated_peak,
        peak_reserved_bytes=run.allocator.stats.reserved_peak,
        recorded_peak_reserved_bytes=max(reserved_bytes(recording, start)),
        capacity=capacity,
        open_blocks=len(start.open_blocks),
        first_difference=run.difference,
    )


def implied_capacity(recording: DeviceRecording, settings: AllocatorSettings, start: StartState) -> int | None:
    """The least capacity for the allocator that explains what was recorded, or None when nothing points to one.

    After out of memory the driver reported what was free: reserved + free is the capacity (the most of several, as what
    others have in use may change). Otherwise memory that was given back right before new memory was taken is either an
    emptied cache or a retry; it is read as a retry if no cached block would have done, and the new memory would have
    exceeded the most that was ever reserved.
    """
    most = max(reserved_bytes(recording, start))
    limits = _limits(recording, start)
    if limits:
        return max(*limits.values(), most)
    if not any(e.action in GIVES for e in recording.events):
        return None
    run = _Run(recording, settings, start, None, {}, invented=False)
    run.run()
    return most if any(refused > most for refused in run.refusals) else None


def _limits(recording: DeviceRecording, start: StartState) -> dict[int, int]:
    """The capacity at each out-of-memory event, by its index: what was reserved, and what the driver said was free."""
    reserved = list(reserved_bytes(recording, start))
    return {i: reserved[i] + e.address for i, e in enumerate(recording.events) if e.action == "oom"}
