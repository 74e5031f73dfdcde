"""A slow, literal second version of the allocator: lists searched from end to end, nothing kept sorted or counted.

Written from the same source (c10/cuda/CUDACachingAllocator.cpp), function by function, and with its own constants.
"""

from __future__ import annotations

from dataclasses import dataclass, field

MIB = 1024 * 1024
FREE, USED, HELD, VOID = "inactive", "active_allocated", "active_pending_free", "unmapped"


@dataclass(eq=False)
class Piece:
    address: int
    size: int
    state: str
    requested: int = 0
    born: int = 0  # searches of its pool when it became free
    streams: set[int] = field(default_factory=set)


@dataclass(eq=False)
class Segment:
    """A native segment (page 0) or an expandable range, tiled by pieces."""

    address: int
    small: bool
    stream: int
    page: int
    pieces: list[Piece]


@dataclass
class Rules:
    max_split: int = 2**64 - 1
    rounding: int = 20 * MIB
    threshold: float = 0.0
    fraction: float = 1.0
    expandable: bool = False
    divisions: int = 0
    capacity: int = 2**50


class NoMemoryError(Exception):
    pass


class Literal:
    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.segments: list[Segment] = []
        self.trace: list[tuple[str, int, int, int]] = []
        self.next_native = 0x7000_0000_0000
        self.next_range = 0x10_0000_0000_0000
        self.searches = {True: 0, False: 0}
        self.retries = 0
        self.held: list[int] = []  # in the order of the frees

    # --- sums ----------------------------------------------------------------

    def total(self, *states: str) -> int:
        return sum(p.size for s in self.segments for p in s.pieces if p.state in states)

    @property
    def reserved(self) -> int:
        return self.total(FREE, USED, HELD)

    @property
    def inactive_split(self) -> int:
        return sum(
            p.size for s in self.segments if not s.page and len(s.pieces) > 1 for p in s.pieces if p.state == FREE
        )

    @property
    def limit(self) -> int:
        return int(self.rules.fraction * self.rules.capacity) if self.rules.fraction < 1 else 2**63

    # --- sizes ---------------------------------------------------------------

    def round_size(self, size: int) -> int:
        if size < 512:
            return 512
        d = self.rules.divisions
        if d > 1 and size > 512 * d:
            floor = 1
            while floor * 2 <= size:
                floor *= 2
            step, result = floor // d, floor
            while result < size:
                result += step
            return result
        return (size + 511) // 512 * 512

    @staticmethod
    def allocation_size(size: int) -> int:
        if size <= MIB:
            return 2 * MIB
        if size < 10 * MIB:
            return 20 * MIB
        return (size + 2 * MIB - 1) // (2 * MIB) * (2 * MIB)

    # --- malloc --------------------------------------------------------------

    def malloc(self, request: int, stream: int) -> int:
        size = self.round_size(request)
        small = size <= MIB
        if self.gc_on:
            self.searches[small] += 1
        found = self.best_fit(small, stream, size)
        if found is None:
            if self.gc_on:
                self.collect()
            found = self.alloc_block(small, stream, size)
        if found is None and self.release_available(small, stream, size):
            found = self.alloc_block(small, stream, size)
        if found is None:
            self.release_all()
            self.retries += 1
            found = self.alloc_block(small, stream, size)
        if found is None:
            self.trace.append(("oom", max(self.rules.capacity - self.reserved, 0), size, stream))
            raise NoMemoryError
        segment, piece = found
        rest = piece.size - size
        if small or self.rules.expandable:
            split = rest >= 512
        else:
            split = size < self.rules.max_split and rest > MIB
        if split:
            at = segment.pieces.index(piece)
            segment.pieces.insert(at + 1, Piece(piece.address + size, rest, FREE, born=self.searches[small]))
            piece.size = size
        piece.state, piece.requested = USED, request
        self.trace.append(("alloc", piece.address, request, stream))
        return piece.address

    @property
    def gc_on(self) -> bool:
        return self.rules.fraction < 1 and self.rules.threshold > 0

    def free_pieces(self, small: bool, stream: int | None = None) -> list[tuple[Segment, Piece]]:
        """In the order of the set: stream, size, address."""
        found = [
            (s, p)
            for s in self.segments
            if s.small == small and stream in (None, s.stream)
            for p in s.pieces
            if p.state == FREE
        ]
        return sorted(found, key=lambda sp: (sp[0].stream, sp[1].size, sp[1].address))

    def best_fit(self, small: bool, stream: int, size: int) -> tuple[Segment, Piece] | None:
        fits = [sp for sp in self.free_pieces(small, stream) if sp[1].size >= size]
        if not fits:
            return None
        i = 0
        if fits[0][0].page:
            while fits[i][0].page and i + 1 < len(fits) and self.room(*fits[i + 1]) < self.room(*fits[i]):
                i += 1
        found = fits[i][1].size
        if size < self.rules.max_split and found >= self.rules.max_split:
            return None
        if size >= self.rules.max_split and found >= size + self.rules.rounding:
            return None
        return fits[i]

    @staticmethod
    def room(segment: Segment, piece: Piece) -> int:
        at = segment.pieces.index(piece)
        after = segment.pieces[at + 1] if at + 1 < len(segment.pieces) else None
        return piece.size + (after.size if after is not None and after.state == VOID else 0)

    def alloc_block(self, small: bool, stream: int, size: int) -> tuple[Segment, Piece] | None:
        amount = self.allocation_size(size)
        if self.reserved + amount > self.limit:
            return None
        if self.rules.expandable:
            return self.expand(small, stream, size)
        if self.reserved + amount > self.rules.capacity:
            return None
        segment = Segment(self.next_native, small, stream, 0, [Piece(self.next_native, amount, FREE)])
        self.next_native += amount
        self.segments.append(segment)
        self.trace.append(("segment_alloc", segment.address, amount, stream))
        return segment, segment.pieces[0]

    # --- expandable ----------------------------------------------------------

    def expand(self, small: bool, stream: int, size: int) -> tuple[Segment, Piece] | None:
        place = self.find_room(small, stream, size)
        if place is None:
            page = 2 * MIB if small else 20 * MIB
            whole = (self.rules.capacity + self.rules.capacity // 8 + page - 1) // page * page
            segment = Segment(self.next_range, small, stream, page, [Piece(self.next_range, whole, VOID)])
            self.next_range += whole
            self.segments.append(segment)
            place = segment, segment.pieces[0]
        segment, piece = place
        start = piece.address
        if piece.state == VOID and not self.map(segment, piece, min(piece.size, size)):
            return None
        while True:
            piece = next(p for p in segment.pieces if p.address <= start < p.address + p.size)
            if piece.size >= size:
                return segment, piece
            after = segment.pieces[segment.pieces.index(piece) + 1]
            if not self.map(segment, after, min(size - piece.size, after.size)):
                return None

    def find_room(self, small: bool, stream: int, size: int) -> tuple[Segment, Piece] | None:
        ranges = [s for s in self.segments if s.page and s.small == small and s.stream == stream]
        for segment in sorted(ranges, key=lambda s: s.address):
            for i, piece in enumerate(segment.pieces):
                if piece.state != VOID:
                    continue
                first = i - 1 if i and segment.pieces[i - 1].state == FREE else i
                room = 0
                for p in segment.pieces[first:]:
                    if room >= size or p.state not in (FREE, VOID):
                        break
                    room += p.size
                if room >= size:
                    return segment, segment.pieces[first]
        return None

    def map(self, segment: Segment, piece: Piece, size: int) -> bool:
        amount = (size + segment.page - 1) // segment.page * segment.page
        if self.reserved + amount > self.rules.capacity:
            return False
        at = segment.pieces.index(piece)
        if amount < piece.size:
            segment.pieces.insert(at + 1, Piece(piece.address + amount, piece.size - amount, VOID))
        piece.size, piece.state, piece.born = amount, FREE, self.searches[segment.small]
        self.trace.append(("segment_map", piece.address, amount, segment.stream))
        self.merge(segment, piece)
        return True

    def unmap(self, segment: Segment, piece: Piece) -> None:
        page = segment.page
        first = (piece.address - segment.address + page - 1) // page
        last = (piece.address + piece.size - segment.address) // page
        if first >= last:
            return
        start, end = segment.address + first * page, segment.address + last * page
        parts = [
            Piece(piece.address, start - piece.address, FREE, born=self.searches[segment.small]),
            Piece(start, end - start, VOID),
            Piece(end, piece.address + piece.size - end, FREE, born=self.searches[segment.small]),
        ]
        at = segment.pieces.index(piece)
        segment.pieces[at : at + 1] = [p for p in parts if p.size]
        self.merge(segment, parts[1])
        self.trace.append(("segment_unmap", start, end - start, segment.stream))
        if len(segment.pieces) == 1 and segment.pieces[0].state == VOID:
            self.segments.remove(segment)

    # --- free ----------------------------------------------------------------

    def find(self, address: int) -> tuple[Segment, Piece]:
        return next((s, p) for s in self.segments for p in s.pieces if p.address == address)

    def record_stream(self, address: int, stream: int) -> None:
        segment, piece = self.find(address)
        if stream != segment.stream:
            piece.streams.add(stream)

    def free(self, address: int) -> None:
        segment, piece = self.find(address)
        assert piece.state == USED
        self.trace.append(("free_requested", address, piece.requested, segment.stream))
        if piece.streams:
            piece.state = HELD
            self.held.append(address)
        else:
            self.finish(address)

    def finish(self, address: int) -> None:
        if address in self.held:
            self.held.remove(address)
        segment, piece = self.find(address)
        self.trace.append(("free_completed", address, piece.requested, segment.stream))
        piece.state, piece.requested, piece.born = FREE, 0, self.searches[segment.small]
        piece.streams = set()
        self.merge(segment, piece)

    def merge(self, segment: Segment, piece: Piece) -> None:
        """The piece takes in neighbors of its own state."""
        at = segment.pieces.index(piece)
        if at + 1 < len(segment.pieces) and segment.pieces[at + 1].state == piece.state:
            piece.size += segment.pieces.pop(at + 1).size
        if at and segment.pieces[at - 1].state == piece.state:
            gone = segment.pieces.pop(at - 1)
            piece.address = gone.address
            piece.size += gone.size

    # --- give back -----------------------------------------------------------

    def release(self, segment: Segment) -> None:
        self.segments.remove(segment)
        self.trace.append(("segment_free", segment.address, segment.pieces[0].size, segment.stream))

    def release_all(self) -> None:
        for address in list(self.held):
            self.finish(address)
        for small in (False, True):
            pieces = self.free_pieces(small)
            for segment, _ in pieces:
                if not segment.page and len(segment.pieces) == 1:
                    self.release(segment)
            for segment, piece in pieces:
                if segment.page:
                    self.unmap(segment, piece)

    def release_available(self, small: bool, stream: int, size: int) -> bool:
        most = self.rules.max_split
        if most == 2**64 - 1:
            return False
        wanted = max(size, most)
        pieces = self.free_pieces(small, stream)
        enough = [sp for sp in pieces if sp[1].size >= wanted]
        if enough and not enough[0][0].page:
            self.release(enough[0][0])
            return True
        released = 0
        for segment, piece in reversed([sp for sp in pieces if sp[1].size < wanted]):
            if released >= wanted or piece.size < most:
                break
            if not segment.page:
                released += piece.size
                self.release(segment)
        return released >= wanted

    def collect(self) -> None:
        target = self.reserved - int(self.rules.threshold * self.limit)
        if target <= 0:
            return
        now = self.searches[False]
        old = [(s, p) for s, p in self.free_pieces(False) if len(s.pieces) == 1]
        reclaimed, freed = 0, True
        while reclaimed < target and freed and old:
            average = sum(now - p.born for _, p in old) / len(old)
            go = [(s, p) for s, p in old if not s.page and now - p.born >= average]
            freed = bool(go)
            for segment, piece in go:
                reclaimed += piece.size
                self.release(segment)
            old = [sp for sp in old if sp not in go]

    # --- the end -------------------------------------------------------------

    def layout(self) -> list[tuple[int, int, int, str]]:
        """Pieces that have memory: address, size, request, state."""
        pieces = [p for s in self.segments for p in s.pieces if p.state != VOID]
        return sorted((p.address, p.size, p.requested, p.state) for p in pieces)
