"""The engine's rules of ownership: which gradient is added in place, taken over or copied, and when it goes.

Each expected number counts the gradients that are alive together, the output's included: its caller holds it.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from leaves import N, highest, leaf
from simulate_runs import NUMBER

from galore_mem.dtypes import BFLOAT16
from galore_mem.memory import ops
from galore_mem.memory.tape import GRADIENTS, TEMPORARIES, WEIGHTS, Parameter, Tape
from galore_mem.verify.meters import CpuMeter


@pytest.fixture(autouse=True)
def _no_collector() -> Iterator[None]:
    """Reference counts alone must free everything."""
    gc.disable()
    yield
    gc.enable()


# -- who owns a gradient ---------------------------------------------------------------------------------


def test_a_second_gradient_is_added_in_place() -> None:
    """The output's gradient goes through the sum to silu and gelu, and is held to the end; each makes a gradient of
    its own for x: three at once, and no fourth for their sum."""
    tape = Tape()
    x = leaf(tape)
    out = ops.add(ops.silu(x.tensor()), ops.gelu(x.tensor()))
    assert highest(tape, out) == 3 * N


def test_a_shared_gradient_is_added_out_of_place() -> None:
    """x + x: both gradients are the one object that the sum received; their sum is a new tensor."""
    tape = Tape()
    x = leaf(tape)
    out = ops.add(x.tensor(), x.tensor())
    assert highest(tape, out) == 2 * N
    assert x.grad is not None


def test_a_view_is_added_out_of_place() -> None:
    """The first gradient reaches x through a view, whose base autograd holds too: output's gradient, the products
    for both views, and their sum."""
    tape = Tape()
    x = leaf(tape)
    out = ops.mul(ops.view(x.tensor(), 2, 5), ops.view(x.tensor(), 2, 5))
    assert highest(tape, out) == 4 * N


def test_halves_of_one_gradient_are_added_out_of_place() -> None:
    """Joined with itself, x receives two halves of one gradient: views of it, and a sum of its own."""
    tape = Tape()
    x = leaf(tape, (2, 5))
    out = ops.cat([x.tensor(), x.tensor()], -1)
    assert highest(tape, out) == 2 * N + N
    assert x.grad is not None
    assert x.grad.is_contiguous


def test_a_gradient_of_ones_own_is_taken_over() -> None:
    tape = Tape()
    x = leaf(tape)
    out = ops.tanh(x.tensor())
    before = tape.total
    tape.backward(out)
    assert tape.total == before + N  # the kernel's result, and no copy of it
    assert tape.live[GRADIENTS] == N


def test_a_gradient_that_another_holds_is_copied() -> None:
    """Both summands receive the output's gradient, which the caller of backward holds as well."""
    tape = Tape()
    a, b = leaf(tape), leaf(tape)
    out = ops.add(a.tensor(), b.tensor())
    assert highest(tape, out) == 3 * N  # it, and a copy for each
    assert a.grad is not None
    assert b.grad is not None
    assert a.grad.storage is not b.grad.storage


def test_the_last_holder_takes_a_shared_gradient_over() -> None:
    """Behind another operation the same gradient is copied for the first summand, then free for the second."""
    tape = Tape()
    a, b = leaf(tape), leaf(tape)
    out = ops.tanh(ops.add(a.tensor(), b.tensor()))
    assert highest(tape, out) == 3 * N  # the output's gradient, tanh's, and one copy
    assert tape.live[GRADIENTS] == 2 * N


def test_a_gradient_in_another_order_is_copied() -> None:
    """The weight lies row by row, its gradient is a transposed view."""
    tape = Tape()
    x = leaf(tape, (2, 5))
    out = ops.tanh(ops.transpose(x.tensor(), 0, 1))
    assert highest(tape, out) == 3 * N  # the output's gradient, tanh's, the copy
    assert x.grad is not None
    assert x.grad.strides == (5, 1)


def test_a_gradient_in_the_weights_own_order_is_taken_over() -> None:
    tape = Tape()
    x = leaf(tape, (2, 5), (1, 2))
    out = ops.tanh(ops.transpose(x.tensor(), 0, 1))
    assert highest(tape, out) == 2 * N
    assert x.grad is not None
    assert x.grad.strides == (1, 2)


def test_a_view_taken_over_keeps_its_whole_storage() -> None:
    """Rows of a joined gradient lie as the weight does, so the first part keeps the storage of both."""
    tape = Tape()
    a, b = leaf(tape, (2, 5)), leaf(tape, (3, 5))
    tape.backward(ops.tanh(ops.cat([a.tensor(), b.tensor()], 0)))
    assert a.grad is not None
    assert b.grad is not None
    assert a.grad.storage is b.grad.storage
    assert tape.live[GRADIENTS] == 5 * 5 * 4


def test_a_later_gradient_is_added_to_the_first_in_place() -> None:
    tape = Tape()
    x = leaf(tape)
    tape.backward(ops.tanh(x.tensor()))
    first = x.grad
    out = ops.tanh(x.tensor())
    assert highest(tape, out) == 2 * N  # the output's gradient and tanh's
    assert x.grad is first
    assert tape.live[GRADIENTS] == N


def test_a_broadcast_gradient_is_summed_and_then_cast() -> None:
    """float32 product of (4, 10) by a bfloat16 weight of (10): output's gradient, both products (of which the wide one
    goes when it is summed), the sum, its cast."""
    tape = Tape()
    x = leaf(tape, (4, 10))
    w = Parameter("w", tape.empty((10,), BFLOAT16, WEIGHTS))
    w.weight.requires_grad = True
    out = ops.mul(x.tensor(), w.tensor())
    tape.backward(out)
    assert w.grad is not None
    assert w.grad.dtype is BFLOAT16
    assert tape.live[GRADIENTS] == 4 * N + N // 2


# -- hooks -----------------------------------------------------------------------------------------------


def test_a_hook_runs_after_each_accumulation_when_what_was_added_is_gone() -> None:
    """Both times there is one gradient to see. (Real ones: `test_a_real_hook_finds_one_gradient`.)"""
    tape = Tape()
    x = leaf(tape)
    seen: list[int] = []
    x.hook = lambda p: seen.append(tape.live[GRADIENTS] + tape.live[TEMPORARIES])
    for _ in range(2):
        out = ops.tanh(x.tensor())
        tape.backward(out)
        del out
    assert seen == [2 * N + N, 2 * N + N]  # output, output's gradient and x's


def test_a_gradient_dropped_in_its_hook_is_free_at_once() -> None:
    tape = Tape()
    x, y = leaf(tape), leaf(tape)
    seen: list[int] = []

    def drop(p: Parameter) -> None:
        p.grad = None
        seen.append(tape.live[GRADIENTS])

    x.hook = y.hook = drop
    tape.backward(ops.mul(x.tensor(), y.tensor()))
    assert seen == [0, 0]


@pytest.mark.parametrize("turned", [False, True])
def test_a_real_hook_finds_one_gradient(turned: bool) -> None:
    """A parameter of 4 MB, whose hook makes 12 MB, lets the gradient of 4 MB go and makes 16 MB: 20 MB at most,
    whether the gradient is taken over or copied for its layout; and with one that it is added to."""
    p = torch.nn.Parameter(torch.zeros(1000, 1000))
    drops = False

    def hook(q: torch.Tensor) -> None:
        torch.empty(3_000_000)
        if drops:
            q.grad = None
            torch.empty(4_000_000)

    p.register_post_accumulate_grad_hook(hook)
    with CpuMeter() as meter:
        for phase in ("forward", "backward"):
            meter.enter(phase)
            Made.apply(p, turned).backward()  # type: ignore[no-untyped-call]  # torch has no types for it
            drops = True
    for phase in ("forward", "backward"):
        assert abs(meter.peaks()[phase].allocated - (20_000_000 - 4_000_000)) <= NUMBER  # the parameter was there


class Made(torch.autograd.Function):
    """A number whose gradient is a new tensor, in the parameter's layout or turned."""

    @staticmethod
    def forward(ctx: Any, p: torch.Tensor, turned: bool) -> torch.Tensor:
        ctx.turned = turned
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        made = torch.empty(1000, 1000)
        return made.t() if ctx.turned else made, None
