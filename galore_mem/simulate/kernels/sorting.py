"""What CUDA allocates to add rows by their number: the backward of an index and of an embedding sort the numbers.

Sizes follow aten/src/ATen/native/cuda/Indexing.cu (index_put_with_sort_kernel), cuda/Embedding.cu
(embedding_dense_backward_cuda), cuda/EmbeddingBackwardKernel.cu and CUB's radix sort (CUDA 13.0,
cub/device/dispatch/dispatch_radix_sort.cuh and tuning/tuning_radix_sort.cuh) of 8-byte keys with 8-byte values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from galore_mem.memory import ops
from galore_mem.simulate.kernels import RESULTS, Program, Recorder, nbytes
from galore_mem.units import ceil_div, round_up

ONE_TILE = 256 * 9  # pairs that one block of threads sorts (SingleTilePolicy)
# pairs of a tile by compute capability (OnesweepPolicy, after RegBoundScaling halves its items for 8 bytes)
TILES = {(7, 0): 256 * 11, (8, 0): 384 * 10, (9, 0): 384 * 12}
RADIX_BITS, BINS, PORTION = 8, 256, 2**28 - 1
ALIGNED = 256  # AliasTemporaries
WORD = 8  # bytes of an index
UNSORTED = 3072  # tokens that the embedding's backward handles without sorting


def sort_bytes(pairs: int, bits: int, capability: tuple[int, int] | None) -> int:
    """CUB's temporary storage to sort by the lowest bits (InvokeSingleTile, InvokeOnesweep)."""
    if pairs <= ONE_TILE:
        return 1
    tile = TILES[max((known for known in TILES if known <= (capability or (8, 0))), default=min(TILES))]
    passes, portions = ceil_div(bits, RADIX_BITS), ceil_div(pairs, PORTION // tile * tile)
    copies = WORD * pairs if passes > 1 else 0  # of keys, and of values
    parts = (portions * passes * BINS * 8, ceil_div(min(pairs, PORTION), tile) * BINS * 4, copies, copies,
             portions * passes * 4)  # fmt: skip
    return sum(round_up(part, ALIGNED) for part in parts) + ALIGNED - 1


def index_put(args: tuple[Any, ...], capability: tuple[int, int] | None) -> Program | None:
    """Of index_put with accumulation: one number a row in place of several indices, and the rows sorted by it."""
    table, indices, values = args[0], [i for i in args[1] if i is not None], args[2]
    if not (len(args) > 3 and args[3]) or not indices or any(i.dtype is torch.bool for i in indices):
        return None
    rows = torch.broadcast_shapes(*(i.shape for i in indices)).numel()
    each = WORD * rows
    program: list[int] = []
    for number, i in enumerate(indices):
        here = len([step for step in program if step > 0])
        own = WORD * i.numel()
        program += [own, own, ~here]  # remainder, product; the product of the first stays
        if number:
            program.append(~(here + 1))
    if not values.is_contiguous():
        program.append(nbytes(values))
    first = len([step for step in program if step > 0])
    inside = table.numel() // max(_indexed(args), 1)  # elements of a row
    largest = max(table.numel() // inside - 1, 0) if inside else 0
    sort = sort_bytes(rows, max(largest.bit_length(), 1), capability)
    return (*program, each, each, each, sort, ~(first + 3), ~(first + 2), RESULTS)


def _indexed(args: tuple[Any, ...]) -> int:
    """Rows of the table: the product of the dimensions that are indexed."""
    found = 1
    for size, index in zip(args[0].shape, args[1], strict=False):
        found *= size if index is not None else 1
    return found


def embedding_backward(indices: Tensor, grad: Tensor, capability: tuple[int, int] | None) -> Program | None:
    """Sorted tokens and their places, the gradient, then sums of ten rows each, as the twin has them."""
    tokens = indices.numel()
    if tokens <= UNSORTED:
        return None
    words = WORD * tokens
    tape = Recorder("cuda")
    partial = ops.partial_sums(tape, tokens, tuple(grad.shape))
    sums = tuple(tape.program)
    del partial
    sort = sort_bytes(tokens, 64, capability)
    return (words, words, words, sort, ~3, ~2, RESULTS, *sums)
