"""What CUDA's reductions (sums, means, maxima) allocate: scratch for partial results of several blocks of threads.

Where a result is the sum of so many elements that one block would have to add 256 of them in a thread, several blocks
share it (aten/src/ATen/native/cuda/Reduce.cuh of torch 2.13, setReduceConfig, gpu_reduce_kernel). Each leaves what it
has in memory of the caching allocator, and a counter says which is the last. How many share depends on the card.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import NamedTuple

from galore_mem.memory.iteration import Reduction, reduction
from galore_mem.memory.strides import Shape
from galore_mem.memory.tensor import Tensor
from galore_mem.units import ceil_div

WARP, THREADS = 32, 512  # threads of a warp; most of a block
VECTOR = 4  # elements that a thread loads at once
LEAST, MOST = 16, 256  # elements that a thread adds


class Processors(NamedTuple):
    """Of a card: how many streaming multiprocessors, and how many threads each can hold."""

    multiprocessors: int
    threads: int


# One common card of each compute capability, from NVIDIA's data sheets (count) and the CUDA programming guide's table
# of technical specifications (threads): V100, T4, A100, RTX A6000, RTX 4090, H100 SXM, B200, RTX 5090.
CARDS = {
    (7, 0): Processors(80, 2048), (7, 5): Processors(40, 1024), (8, 0): Processors(108, 2048),
    (8, 6): Processors(84, 1536), (8, 9): Processors(128, 1536), (9, 0): Processors(132, 2048),
    (10, 0): Processors(148, 2048), (12, 0): Processors(170, 1536),
}  # fmt: skip
DEFAULT = (8, 0)


def processors(capability: tuple[int, int] | None) -> Processors:
    """Of the newest card in the table that is not newer than this one."""
    return CARDS[max((known for known in CARDS if known <= (capability or DEFAULT)), default=min(CARDS))]


class Scratch(NamedTuple):
    """Bytes of partial results and of the counters; none where no result is shared."""

    partial: int
    counters: int


def scratch(r: Reduction, element: int, card: Processors) -> Scratch | None:
    """Of one launch; `element`: bytes of a partial result."""
    outputs = r.outputs
    inputs = prod(r.shape) // outputs
    summed = r.summed
    along = summed == len(r.shape) or r.operand[0] < r.operand[summed]  # is the fastest dimension summed over?
    width, height, vector = (inputs, outputs, 1) if along else (outputs, inputs, 1)
    if r.shape and r.operand[0 if along else summed] == r.itemsize:
        if along and width >= 128 and summed == 1:
            width //= VECTOR
        elif not along:
            vector = _vector(r)
            width //= vector
    width, height = _block(width, height, THREADS // vector)
    threads, values = width * height, ceil_div(inputs, width) if along else inputs
    across = 1 if along else width  # results that a block makes
    if values < min(height * LEAST, MOST):
        return None  # each warp has a result of its own
    values = ceil_div(values, height)
    grid = ceil_div(outputs // vector, across)
    room = card.multiprocessors * (card.threads // threads)
    if values < MOST or grid > room:
        return None
    sharing = max(min(ceil_div(room, grid), ceil_div(values, LEAST)), ceil_div(values, MOST))
    if sharing < 2:
        return None
    return Scratch(element * outputs * sharing * (1 if along else width * vector), 4 * grid)


class Launches(NamedTuple):
    """What one reduction allocates besides its result. `pieces`: in how many it is launched (those of a half-precision
    result are added up in float32, `AccumulationBuffer`); `scratch` of each that has some, freed before the next's."""

    pieces: int
    scratch: tuple[Scratch, ...]


@lru_cache(maxsize=4096)
def launches(
    shape: Shape, strides: Shape, itemsize: int, over: tuple[int, ...], out_itemsize: int, element: int,
    capability: tuple[int, int] | None = None, offset: int = 0,
) -> Launches:  # fmt: skip
    """Of an operand (shape; strides and offset in elements) that is reduced over some of its dimensions (none given:
    over all); `element`: bytes of a partial result."""
    if not prod(shape):
        return Launches(1, ())
    parts = reduction(shape, strides, itemsize, over, out_itemsize, offset).parts()
    found = (scratch(part, element, processors(capability)) for part in parts)
    return Launches(len(parts), tuple(one for one in found if one is not None))


def reduce(t: Tensor, over: tuple[int, ...] = ()) -> None:
    """What CUDA allocates, and gives back, while the sum (or the mean, or the norm) of a floating tensor over these
    dimensions (none given: over all) is computed in its own format. To be called when the result is there."""
    tape = t.tape
    if tape.device != "cuda":
        return
    half = t.dtype.bits == 16
    itemsize = t.dtype.bits // 8
    found = launches(t.shape, t.strides, itemsize, over, itemsize, 4 if half else itemsize, tape.capability)
    gone = {dim % len(t.shape) for dim in over} or range(len(t.shape))
    results = prod(n for dim, n in enumerate(t.shape) if dim not in gone)
    accumulator = tape.bytes(4 * results) if half and found.pieces > 1 else None
    for one in found.scratch:
        buffers = tape.bytes(one.partial), tape.bytes(one.counters)
        del buffers
    del accumulator


def _vector(r: Reduction) -> int:
    """Results that a thread makes at once: as many as divide everything (get_output_vec_size)."""
    vector, first = VECTOR, r.summed
    steps = [stride // r.itemsize for dim, stride in enumerate(r.operand) if dim != first]
    for n in (r.offset, r.shape[first], *steps):
        while n % vector:
            vector //= 2
    return vector


def _block(width: int, height: int, most: int) -> tuple[int, int]:
    """set_block_dimension: powers of two, as wide as a warp or, where it is low, wider."""
    width, height = (most if n >= most else 1 << max(n.bit_length() - 1, 0) for n in (width, height))
    high = min(height, most // min(width, WARP))
    return min(width, most // high), high
