"""The tape's rules, one by one: who is counted where and until when, the order of nodes, what a checkpoint keeps."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
from leaves import N, leaf, names

from galore_mem.dtypes import BFLOAT16, FLOAT16, FLOAT32, INT64
from galore_mem.memory import ops
from galore_mem.memory.checkpoint import CPU_RNG_STATE, checkpoint
from galore_mem.memory.tape import ACTIVATIONS, GRADIENTS, TEMPORARIES, WEIGHTS, Node, Parameter, Tape, Tensor


@pytest.fixture(autouse=True)
def _no_collector() -> Iterator[None]:
    """Reference counts alone must free everything."""
    gc.disable()
    yield
    gc.enable()


# -- bytes and segments ------------------------------------------------------------------------------


def test_bytes_are_counted_in_their_category_until_the_last_reference() -> None:
    tape = Tape()
    t = tape.empty((10,), FLOAT32, WEIGHTS)
    view = t.like((5, 2))
    assert (tape.total, tape.live[WEIGHTS]) == (N, N)
    del t
    assert tape.total == N
    view.storage.move(GRADIENTS)
    assert (tape.live[WEIGHTS], tape.live[GRADIENTS]) == (0, N)
    del view
    assert tape.total == 0


def test_sizes_are_rounded_up_to_the_allocators_granularity() -> None:
    tape = Tape(granularity=512)
    kept = [tape.empty((1,), FLOAT32), tape.empty((128,), FLOAT32), tape.empty((129,), FLOAT32), tape.bytes(513)]
    assert tape.total == 512 + 512 + 1024 + 1024
    kept.clear()
    assert tape.total == 0


def test_a_segment_keeps_its_highest_moment_and_what_it_was_made_of() -> None:
    tape = Tape()
    weight = tape.empty((10,), FLOAT32, WEIGHTS)
    tape.mark("forward", 0, 1)
    passing = tape.empty((20,), FLOAT32)
    del passing
    tape.mark("forward", 0, 2)
    tape.mark("forward", 0, 1)  # entered again, with less
    passing = tape.empty((5,), FLOAT32)
    del passing, weight
    first, second = tape.peaks["forward", 0, 1], tape.peaks["forward", 0, 2]
    assert (first.total, first.live[WEIGHTS], first.live[TEMPORARIES]) == (3 * N, N, 2 * N)
    assert second.total == N  # what was alive when it was entered


def test_a_segment_entered_again_can_rise() -> None:
    tape = Tape()
    tape.mark("forward", 0, 1)
    low = tape.empty((10,), FLOAT32)
    tape.mark("forward", 0, 2)
    del low
    tape.mark("forward", 0, 1)
    high = tape.empty((30,), FLOAT32)
    assert tape.peaks["forward", 0, 1].total == 3 * N
    del high


def test_saved_temporaries_are_activations_until_their_node_has_run() -> None:
    tape = Tape()
    x = leaf(tape)
    hidden = ops.scale(x.tensor())
    out = ops.mul(hidden, hidden)
    assert (tape.live[ACTIVATIONS], tape.live[TEMPORARIES]) == (N, N)  # hidden, out
    tape.backward(out)
    assert (tape.live[ACTIVATIONS], tape.live[TEMPORARIES]) == (0, 2 * N)
    assert (tape.live[WEIGHTS], tape.live[GRADIENTS]) == (N, N)
    assert sum(tape.live) == tape.total == 4 * N


def test_saved_weights_stay_weights() -> None:
    tape = Tape()
    x, w = leaf(tape), leaf(tape)
    out = ops.mul(x.tensor(), w.tensor())
    assert tape.live[WEIGHTS] == 2 * N
    tape.backward(out)
    assert tape.live[WEIGHTS] == 2 * N


def test_nothing_is_kept_without_grad() -> None:
    tape = Tape()
    x = leaf(tape)
    with tape.no_grad():
        out = ops.tanh(ops.tanh(x.tensor()))
    assert tape.total == 2 * N
    assert out.node is None
    frozen = tape.empty((10,), FLOAT32)
    assert ops.tanh(frozen).node is None


def test_nothing_is_left_when_everything_is_dropped() -> None:
    tape = Tape(device="cpu")

    def step() -> None:
        x, w = leaf(tape, (2, 5)), leaf(tape, (5, 5))
        out = checkpoint(lambda t: ops.silu(ops.linear(t, w.tensor())), ops.linear(x.tensor(), w.tensor()))
        tape.backward(out)
        never_run = checkpoint(ops.tanh, ops.linear(x.tensor(), w.tensor()))
        assert tape.total > never_run.storage.nbytes + 2 * out.storage.nbytes

    step()
    assert (tape.total, tape.live) == (0, [0, 0, 0, 0, 0])


# -- order -----------------------------------------------------------------------------------------------


def test_the_latest_node_runs_first() -> None:
    tape = Tape()
    x = leaf(tape)
    a = ops.tanh(x.tensor())
    b = ops.silu(x.tensor())
    c = ops.relu(a)
    assert names(tape, ops.mul(b, c)) == ["Mul", "Relu", "Silu", "Tanh", "AccumulateGrad"]


def test_a_node_waits_for_all_its_gradients() -> None:
    tape = Tape()
    x = leaf(tape)
    a = ops.tanh(x.tensor())
    assert names(tape, ops.add(ops.silu(a), ops.relu(a))) == ["Add", "Relu", "Silu", "Tanh", "AccumulateGrad"]


def test_gradients_are_accumulated_before_any_other_node_runs() -> None:
    tape = Tape()
    x, w, v = leaf(tape), leaf(tape), leaf(tape)
    order = names(tape, ops.mul(ops.mul(ops.tanh(x.tensor()), w.tensor()), v.tensor()))
    assert order == ["Mul", "AccumulateGrad", "Mul", "AccumulateGrad", "Tanh", "AccumulateGrad"]


def test_leaves_ready_together_run_in_the_order_of_the_inputs() -> None:
    tape = Tape()
    first, second = leaf(tape), leaf(tape)
    order: list[str] = []
    first.hook = lambda p: order.append("first")
    second.hook = lambda p: order.append("second")
    tape.backward(ops.mul(first.tensor(), second.tensor()))
    assert order == ["first", "second"]


def test_a_part_that_nothing_used_gets_no_gradient() -> None:
    tape = Tape()
    x = leaf(tape, (2, 5))
    unused, used = ops.split(ops.tanh(x.tensor()), 1, 0)
    assert names(tape, ops.tanh(used)) == ["Tanh", "Split", "Tanh", "AccumulateGrad"]
    assert x.grad is not None
    del unused


# -- autocast --------------------------------------------------------------------------------------------


def test_autocast_casts_a_trained_weight_once_and_a_frozen_one_each_time() -> None:
    tape = Tape()
    w, x = leaf(tape, (5, 5)), tape.empty((2, 5), BFLOAT16)
    frozen = tape.empty((5, 5), FLOAT32)
    cast, product = 2 * 25, 2 * 10
    start = tape.total
    with tape.autocast_region(BFLOAT16):
        out = [ops.linear(x, w.tensor()), ops.linear(x, w.tensor())]
        assert tape.total - start == cast + 2 * product
        with tape.no_grad():
            out += [ops.linear(x, frozen)]
        assert tape.total - start == cast + 3 * product  # frozen's cast came and went
    out.clear()
    assert tape.total == start


def test_autocast_caches_only_casts_from_float32() -> None:
    tape = Tape()
    w, x = Parameter("w", tape.empty((5, 5), FLOAT16, WEIGHTS)), tape.empty((2, 5), BFLOAT16)
    w.weight.requires_grad = True
    with tape.autocast_region(BFLOAT16):
        out = [ops.linear(x, w.tensor()), ops.linear(x, w.tensor())]
        assert not tape.autocast_cache
    del out


# -- checkpointing ---------------------------------------------------------------------------------------


def test_a_checkpointed_region_keeps_its_input_only() -> None:
    tape = Tape()
    x = leaf(tape)
    out = checkpoint(lambda t: ops.tanh(ops.silu(t)), ops.scale(x.tensor()))
    assert tape.total - N == 2 * N  # the input, and the output, which the caller holds
    assert tape.live[ACTIVATIONS] == N
    del out


def test_recomputation_stops_at_the_last_tensor_that_was_saved() -> None:
    """silu saves its input, mul both factors; the product itself is not made again."""
    tape = Tape()
    x = leaf(tape)
    made: list[str] = []

    def region(t: Tensor) -> Tensor:
        hidden = ops.silu(t)
        made.append("hidden")
        out = ops.mul(hidden, hidden)
        made.append("out")
        return out

    out = checkpoint(region, x.tensor())
    assert made == ["hidden", "out"]
    tape.backward(out)
    assert made == ["hidden", "out", "hidden"]


def test_a_region_that_saved_nothing_is_not_recomputed() -> None:
    tape = Tape()
    x = leaf(tape)
    runs: list[int] = []

    def region(t: Tensor) -> Tensor:
        runs.append(1)
        return ops.shift(t)

    tape.backward(checkpoint(region, x.tensor()))
    assert len(runs) == 1
    assert x.grad is not None


def test_a_recomputed_tensor_is_dropped_when_its_node_has_used_it() -> None:
    """Backward of tanh(tanh(x)): when the inner one runs, the outer result is gone."""
    tape = Tape()
    x = leaf(tape)
    out = checkpoint(lambda t: ops.tanh(ops.tanh(t)), x.tensor())
    before = tape.total
    seen: list[int] = []

    def look(node: Node) -> None:
        seen.append(tape.total - before)

    tape.backward(out, look)
    # gradient of the output; its tanh's, with one of two results left; the last result and the last gradient
    assert seen == [N, N + N + N, N + N]


def test_on_the_cpu_a_region_keeps_the_random_state() -> None:
    tape = Tape(device="cpu")
    x = leaf(tape)
    out = checkpoint(lambda t: ops.tanh(t), x.tensor())
    assert tape.total == 2 * N + CPU_RNG_STATE
    tape.backward(out)
    assert tape.total == 3 * N


def test_a_checkpoint_without_grad_is_a_plain_call() -> None:
    tape = Tape(device="cpu")
    x = leaf(tape)
    with tape.no_grad():
        out = checkpoint(lambda t: ops.tanh(t), x.tensor())
    assert tape.total == 2 * N
    assert out.node is None


def test_ids_need_no_gradient() -> None:
    tape = Tape()
    table, ids = leaf(tape, (5, 2)), tape.empty((3,), INT64)
    tape.backward(ops.embedding(table.tensor(), ids))
    assert table.grad is not None
    assert table.grad.shape == (5, 2)
