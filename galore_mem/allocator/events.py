"""What a program asks of the allocator, in order: the stream of events that a tracer records and `replay` consumes."""

from __future__ import annotations

from typing import NamedTuple


class Alloc(NamedTuple):
    """`size` bytes are asked for, on a stream; `id` names the block until it is freed. A size of 0 takes no block."""

    id: int
    size: int
    stream: int = 0


class Free(NamedTuple):
    """The block is given back."""

    id: int


class RecordStream(NamedTuple):
    """Another stream uses the block (Tensor.record_stream): a free takes effect only when that stream is done."""

    id: int
    stream: int


class Finish(NamedTuple):
    """The other streams are done with a block that was freed."""

    id: int


class EmptyCache(NamedTuple):
    """torch.cuda.empty_cache()."""


class Mark(NamedTuple):
    """A phase begins; it ends at the next mark. Peaks are reset here, as torch.cuda.reset_peak_memory_stats does."""

    name: str


Event = Alloc | Free | RecordStream | Finish | EmptyCache | Mark
