"""The twin's reductions allocate CUDA's scratch: sizes derived by hand from torch's sources, those of
`test_simulate_cuda.py`, where recordings of real cards show them."""

from __future__ import annotations

from galore_mem.dtypes import BFLOAT16, FLOAT32, DType
from galore_mem.memory import ops
from galore_mem.memory.reductions import launches, reduce
from galore_mem.memory.tape import WEIGHTS, Parameter, Shape, Tape, Tensor
from galore_mem.methods.base import Slot, Trained
from galore_mem.methods.eager import norm
from galore_mem.spec.model import Role

# 2000 x 512 summed over rows: 32 blocks of 32 threads share each of 512 results, 4 in a thread, 4 B each; and a counter
# of 4 B for each of 4 groups of results
PARTIAL, COUNTERS = 4 * 512 * 32 * 32 * 4, 4 * 4
SCRATCH = PARTIAL + COUNTERS


def highest(tape: Tape) -> int:
    return max(peak.total for peak in tape.peaks.values())


def taken(shape: Shape, over: tuple[int, ...], dtype: DType = FLOAT32, tape: Tape | None = None) -> int:
    """Bytes beside the operand that a reduction needs at its highest moment."""
    tape = tape or Tape(1, "cuda")
    t = tape.empty(shape, dtype)
    reduce(t, over)
    assert tape.total == t.storage.nbytes, "scratch outlives its reduction"
    return highest(tape) - tape.total


def test_a_sum_over_rows_shares_its_results() -> None:
    assert taken((2000, 512), (0,)) == SCRATCH
    assert taken((2000, 512), (-2,)) == SCRATCH
    assert taken((2000, 512), (1,)) == 0  # a warp has a row of its own
    assert taken((1000, 512), (0,)) == 0  # 250 numbers a thread, fewer than 256


def test_partial_sums_of_half_precision_are_float32() -> None:
    assert taken((2000, 512), (0,), BFLOAT16) == SCRATCH


def test_scratch_is_in_the_allocators_blocks() -> None:
    assert taken((2000, 512), (0,), tape=Tape(512, "cuda")) == PARTIAL + 512


def test_the_card_decides_how_many_blocks_share_a_sum_of_everything() -> None:
    """128 multiprocessors with 1,536 / 512 = 3 blocks each on 8.9; 108 with 2,048 / 512 = 4 where none is named."""
    assert taken((4096, 10_000), (), tape=Tape(1, "cuda", (8, 9))) == 4 * 3 * 128 + 4
    assert taken((4096, 10_000), ()) == 4 * 4 * 108 + 4


def test_a_reduction_beyond_32_bits_is_added_up_in_float32() -> None:
    """2**17 x 2**15 of 2 B are 2**33 B, four times what 31 bits count; 2**15 results of 4 B are added up beside the
    scratch of one piece at a time."""
    found = launches((2**17, 2**15), (2**15, 1), 2, (0,), 2, 4)
    largest = max(one.partial + one.counters for one in found.scratch)
    assert found.pieces > 1
    assert taken((2**17, 2**15), (0,), BFLOAT16) == 4 * 2**15 + largest


def test_the_cpu_needs_none() -> None:
    assert taken((2000, 512), (0,), tape=Tape(1, "cpu")) == 0


def test_the_gradient_of_a_broadcast_is_summed_with_scratch() -> None:
    """A bias of 512 added to 2000 x 512: the gradient of the sum (4,096,000 B) is there while the bias's (2,048 B) is
    made of it."""
    tape = Tape(1, "cuda")
    bias = Parameter("bias", Tensor(tape.bytes(2048, WEIGHTS), (512,), FLOAT32, requires_grad=True))
    out = ops.add(tape.empty((2000, 512), FLOAT32), bias.tensor())
    before = tape.total
    tape.mark("backward", 0, 0)
    tape.backward(out)
    assert tape.peaks["backward", 0, 0].total == before + 4_096_000 + 2048 + SCRATCH


def test_a_mean_over_long_rows_of_few_tokens() -> None:
    """4 rows of 2**20 numbers: the 512 threads of a block would add 2**20 / 512 = 2048 numbers each. 108 x 4 blocks
    have room on the card, 108 for each row: 4 B x 4 rows x 108, and 4 counters, beside 4 means."""
    tape = Tape(1, "cuda")
    t = tape.empty((4, 2**20), FLOAT32)
    ops.mean_last(t)
    assert highest(tape) == t.storage.nbytes + 4 * 4 + 4 * 4 * 108 + 4 * 4


def test_a_norm_of_columns_in_a_step() -> None:
    """The result in the gradient's format, 2 B x 512, beside the scratch."""
    tape = Tape(1, "cuda")
    p = Trained("w", (2000, 512), BFLOAT16, projected=False, role=Role.MLP, module="linear")
    slot = Slot(tape, p, 0, tape.empty((), BFLOAT16), None)
    before = tape.total
    result = norm(slot, p.shape, p.dtype, 0, keep=True)
    assert result.shape == (1, 512)
    assert highest(tape) == before + 2 * 512 + SCRATCH
