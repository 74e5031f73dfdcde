"""What CUDA's kernels allocate for themselves in a traced program: sizes derived by hand from torch's sources. Where a
recording of a real GPU shows them (other people's, see docs/recordings.md) it is named."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from galore_mem.memory.iteration import reduction
from galore_mem.memory.phases import CUBLAS_WORKSPACES, cublas_workspace
from galore_mem.memory.reductions import CARDS, processors, scratch
from galore_mem.setup import Setup, recipe
from galore_mem.simulate.addresses import DriverAddresses
from galore_mem.simulate.kernels.sorting import sort_bytes
from galore_mem.simulate.session import META, TraceMeter, trace, trace_work
from galore_mem.units import MIB
from galore_mem.verify.builders import builder
from galore_mem.verify.case import TRAIN, Case
from galore_mem.verify.matrix import hyperparameters
from galore_mem.verify.predict import predict

CUDA = Setup(recipe("fp32"), device="cuda")
A100 = CARDS[8, 0]


def taken(program: Any, setup: Setup = CUDA) -> list[int]:
    """Bytes that are asked for in the phase `here`, in order, without cuBLAS' workspaces."""
    found = trace(program, setup).trace
    start = next(mark.at for mark in found.marks if mark.phase == "here")
    made = [found.allocations[e] for e in found.events[start:] if e >= 0]
    return [one.nbytes for one in made if one.op != "cublas workspace"]


# -- reductions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "columns", "expected"),
    [
        # A thread sums for 4 results, 32 threads side by side, 4 below each other (512 / 4 threads a block). It would
        # add rows / 4 numbers: 500, so ceil(500 / 16) = 32 blocks share a result. 4 B x 512 results x 32 blocks x
        # 32 threads x 4, and a counter of 4 B for each of 512 / 4 / 32 = 4 groups of results.
        (2000, 512, (8_388_608, 16)),  # Recorded: niu_train_ctx200
        (1500, 512, (6_291_456, 16)),  # ceil(375 / 16) = 24 blocks. Recorded: niu_train_ctx150
        (1000, 512, None),  # 250 numbers a thread, fewer than 256. Recorded: nothing in niu_train_ctx100
        (2048, 2560, (41_943_040, 80)),  # 32 blocks. Recorded: lin_xl_fullstep_ctx512
        (2048, 1024, (16_777_216, 32)),  # 32 blocks. Recorded: wed_medium_train_ctx512
        (512, 2560, None),  # 128 numbers a thread
    ],
)
def test_sums_over_rows(rows: int, columns: int, expected: tuple[int, int] | None) -> None:
    over_rows = reduction((rows, columns), (columns, 1), 4, (0,), 4)
    assert scratch(over_rows, 4, A100) == expected


def test_a_sum_of_everything_fills_the_card() -> None:
    """4 numbers at once, 512 threads: one result for 40,960,000 / 4 / 512 = 20,000 numbers a thread, so as many blocks
    as the card holds: 128 multiprocessors with 1,536 / 512 = 3 each. Recorded: nothan_fullstep_fp32, 1,536 and 4 B."""
    everything = reduction((4096, 10_000), (10_000, 1), 4, (), 4)
    assert everything.shape == (40_960_000,)
    assert scratch(everything, 4, CARDS[8, 9]) == (4 * 3 * 128, 4)


def test_rows_that_are_summed_along_need_no_scratch() -> None:
    """A softmax: 2,048 sums of 50,000 numbers, more results than blocks that the card holds (108 x 4)."""
    along = reduction((2048, 50_000), (50_000, 1), 4, (-1,), 4)
    assert scratch(along, 4, A100) is None


def test_dimensions_are_ordered_and_merged() -> None:
    """8 x 128 x 64, kept at strides of a transposed product, over the first: the summed one comes first, then by
    stride; 128 and 64 do not merge, for the result has them the other way around."""
    found = reduction((8, 128, 64), (64, 512, 1), 4, (0,), 4)
    assert (found.shape, found.operand) == ((8, 64, 128), (256, 4, 2048))
    assert (found.result, found.summed, found.outputs) == ((0, 4, 256), 1, 8192)
    assert reduction((8, 128, 64), (8192, 64, 1), 4, (0, 1), 4).shape == (1024, 64)


def test_more_than_32_bits_can_count_go_in_parts() -> None:
    """2^17 rows of 2^15 numbers in bfloat16: 2^33 B. The rows are halved twice; 2^15 of them end at byte 2^31 - 2."""
    whole = reduction((2**17, 2**15), (2**15, 1), 2, (0,), 2)
    assert [part.shape for part in whole.parts()] == [(2**15, 2**15)] * 4


def test_unknown_cards_are_like_the_next_older() -> None:
    assert processors(None) == CARDS[8, 0]
    assert processors((8, 7)) == CARDS[8, 6]
    assert processors((6, 1)) == CARDS[7, 0]


def test_the_gradient_of_a_norms_weight() -> None:
    """2000 x 512 times 512: the product's gradient (4,096,000 B) is summed to 2,048 B, through scratch and counters."""

    def program(meter: TraceMeter) -> None:
        t, weight = torch.empty(2000, 512, device=META), torch.empty(512, device=META, requires_grad=True)
        y, grad = t * weight, torch.empty(2000, 512, device=META)
        meter.enter("here")
        y.backward(grad)

    assert taken(program) == [4_096_000, 2048, 8_388_608, 16]


# -- rows by their number -----------------------------------------------------------------------------------


def test_the_gradient_of_an_index() -> None:
    """2,000 of 10,000 rows of 512: zeros for the table, then the indices made positive, multiplied, sorted with their
    places, and one byte for a sort of one tile. Recorded: niu_train_ctx200."""

    def program(meter: TraceMeter) -> None:
        table = torch.empty(10_000, 512, device=META, requires_grad=True)
        y = table[torch.empty(10, 200, dtype=torch.int64, device=META)]
        grad = torch.empty(10, 200, 512, device=META)
        meter.enter("here")
        y.backward(grad)

    assert taken(program) == [20_480_000, *[16_000] * 5, 1]


def test_the_gradient_of_an_embedding() -> None:
    """4,096 tokens: sorted ids, places and numbers, and the sort (see below); then the gradient; then room for sums of
    ten rows: 409 + 100 of them, of 64 numbers, with where they begin."""

    def program(meter: TraceMeter) -> None:
        table = torch.empty(100, 64, device=META, requires_grad=True)
        y = torch.nn.functional.embedding(torch.empty(4096, dtype=torch.int64, device=META), table)
        grad = torch.empty(4096, 64, device=META)
        meter.enter("here")
        y.backward(grad)

    # 64 bits in 8 passes of 256 bins x 8 B, 2 tiles x 256 x 4 B, keys and values, 8 x 4 B in 256; 255 to align
    sort = 16_384 + 2048 + 2 * 32_768 + 256 + 255
    assert taken(program) == [32_768] * 3 + [sort, 25_600, 32_768, 800, 800, 8 * 509, 4 * 509 * 64]


@pytest.mark.parametrize(("capability", "tiles"), [((7, 5), 4), ((8, 0), 3), ((8, 9), 3), ((9, 0), 2), ((12, 0), 2)])
def test_the_sorts_storage(capability: tuple[int, int], tiles: int) -> None:
    """9,000 pairs by 14 bits, in tiles of 2,816, 3,840 or 4,608: two passes of 256 x 8 B, 256 x 4 B a tile, keys and
    values of 72,000 B (72,192 in 256s), counters."""
    assert sort_bytes(9000, 14, capability) == 4096 + tiles * 1024 + 2 * 72_192 + 256 + 255
    assert sort_bytes(2304, 14, capability) == 1


# -- what a dispatch mode changes -----------------------------------------------------------------------------


def test_derivatives_write_into_zeros() -> None:
    """The gradient of a maximum: zeros of the operand, and nothing else."""

    def program(meter: TraceMeter) -> None:
        y = torch.empty(10, 100, device=META, requires_grad=True).max(-1)[0]
        grad = torch.empty(10, device=META)
        meter.enter("here")
        y.backward(grad)

    assert taken(program) == [4000]


def test_a_function_of_the_users_does_not() -> None:
    """It scatters into a new tensor, and so it does for real."""

    class Chosen(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, t: torch.Tensor) -> torch.Tensor:
            return t[:, 0].clone()

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
            first = torch.zeros(10, 1, dtype=torch.int64, device=META)
            return torch.zeros(10, 100, device=META).scatter(1, first, grads[0][:, None])

    def program(meter: TraceMeter) -> None:
        y = Chosen.apply(torch.empty(10, 100, device=META, requires_grad=True))
        grad = torch.empty(10, device=META)
        meter.enter("here")
        y.backward(grad)

    assert taken(program) == [80, 4000, 4000]


def test_numbers_that_become_tensors_take_a_block() -> None:
    def program(meter: TraceMeter) -> None:
        meter.enter("here")
        made = torch.tensor([1.0, 2.0], device=META), torch.tensor(3, device=META), torch.as_tensor([1], device=META)
        made[0].new_tensor([1.0, 2.0, 3.0])

    assert taken(program) == [8, 8, 8, 12]


@pytest.mark.parametrize(("device", "nbytes"), [("cuda", 400), ("cpu", 800)])
def test_a_program_that_asks_is_told_the_device(device: str, nbytes: int) -> None:
    """As optimizers do that have a way for CUDA and one for the CPU. Afterwards tensors answer for themselves again."""

    def program(meter: TraceMeter) -> None:
        t = torch.nn.Parameter(torch.empty(10, device=META))
        meter.enter("here")
        torch.empty(100 if t.is_cuda else 200 if t.is_cpu else 300, device=META)

    assert taken(program, Setup(recipe("fp32"), device=device)) == [nbytes]
    assert torch.empty(1).is_cpu
    assert not torch.empty(1, device=META).is_cuda


# -- products of groups, and of codes ---------------------------------------------------------------------------


@pytest.mark.parametrize(("capability", "more"), [((8, 0), []), ((9, 0), [3 * 8 * 6 + 5 * 36])])
def test_products_of_groups(capability: tuple[int, int], more: list[int]) -> None:
    """Five experts, 40 rows: on Hopper three pointers (of an even number) and 36 B for each group."""

    def program(meter: TraceMeter) -> None:
        rows = torch.empty(40, 32, dtype=torch.bfloat16, device=META)
        experts, ends = torch.empty(5, 32, 24, dtype=torch.bfloat16, device=META), torch.empty(5, device=META)
        meter.enter("here")
        torch._grouped_mm(rows, experts, ends.to(torch.int32))

    setup = Setup(device="cuda", compute_capability=capability)
    assert taken(program, setup) == [20, 40 * 24 * 2, *more]


def test_efficient_attention_of_groups() -> None:
    """torch 2.14's kernel on a T4: four query heads and two key heads of 64 x 16 in float16. The output and a float32 a
    row; gradients of query, key and value; a float32 a row, and for each head a tile of 64 x 64 and 16 B of locks. Then
    the leaves' gradients, in their own layout."""

    def program(meter: TraceMeter) -> None:
        q, k, v = (
            torch.empty(1, heads, 64, 16, dtype=torch.float16, device=META, requires_grad=True) for heads in (4, 2, 2)
        )
        grad = torch.empty(1, 64, 4, 16, dtype=torch.float16, device=META).transpose(1, 2)
        meter.enter("here")
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        out.backward(grad)

    setup = Setup(recipe("pure-fp16"), device="cuda", torch="2.14", compute_capability=(7, 5))
    gradients = [8192, 4096, 4096]
    assert taken(program, setup) == [8192, 1024, *gradients, 1024, 4 * (64 * 64 * 4 + 16), *gradients]


# -- branches by card, beside the estimate --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "method", "implementation", "fmt", "options"),
    [
        ((7, 5), "adamw", "torch-foreach", "pure-fp16", {}),  # math: no efficient kernel for grouped heads
        ((7, 5), "adamw", "torch-foreach", "pure-fp16", {"attention": "eager"}),  # half_to_float
        ((7, 5), "lora", "peft", "pure-fp16", {"gradient_checkpointing": True}),
        ((7, 5), "qlora", "peft", "pure-fp16", {"batch_size": 8}),  # 2,048 rows: the weight of codes is made
        ((9, 0), "adamw", "torch-fused", "amp-bf16", {}),
        (None, "adamw-8bit", "bitsandbytes", "pure-bf16", {}),
    ],
)
def test_peaks_are_the_estimates(
    capability: tuple[int, int] | None, method: str, implementation: str, fmt: str, options: dict[str, Any]
) -> None:
    """But for two blocks of 512 B: scalars, or QLoRA's table of codes (1,024 B, one for all matrices), which its ledger
    lacks. The estimate has the loss (a block) in the step."""
    passes = {"batch_size": 1, "seq_len": 256, "device": "cuda", **options}
    case = Case("small-llama", method, implementation, TRAIN, fmt, passes, hyperparameters(method))
    said = predict(case, capability, slack=False)
    peaks = trace_work(said.work, builder(method, implementation)).trace.peaks()
    workspaces = CUBLAS_WORKSPACES * cublas_workspace(said.work.setup)
    assert workspaces == (2 * 32 * MIB if capability == (9, 0) else 2 * 8_519_680)
    for phase in ("forward", "backward", "step"):
        loss = 512 if phase == "step" else 0
        assert 0 <= peaks[phase].total - workspaces - said.sizes.phases[phase] + loss <= 2 * 512


# -- addresses ------------------------------------------------------------------------------------------------------


def test_addresses_go_down_in_pieces() -> None:
    """100 MiB take 128, and what is left of it serves 20 MiB; 30 do not fit, and take the 32 below."""
    addresses = DriverAddresses(top=1024 * MIB)
    found = [addresses.segment(size * MIB) // MIB for size in (100, 20, 30, 8, 2)]
    assert found == [896, 996, 864, 1016, 894]


def test_segments_do_not_overlap() -> None:
    addresses = DriverAddresses()
    sizes = [2 * MIB, 20 * MIB, 26 * MIB, 12 * MIB, 14 * MIB] * 20
    spans = sorted((start, start + size) for size in sizes for start in [addresses.segment(size)])
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    assert addresses.reserve(MIB) + MIB <= addresses.reserve(MIB)
