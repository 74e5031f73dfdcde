"""Steps an optimizer and a literal transcription side by side, and compares parameters and every buffer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from literal import Literal
from torch import Tensor

# float64: about 25 steps of a few hundred operations each, rounded at 1.1e-16, on values between 1e-3 and 10
EXACT = {"rtol": 1e-10, "atol": 1e-12}


def gradients(shape: Sequence[int], steps: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Iterator[Tensor]:
    """Gradients with the shape of real ones: a slowly moving part of low rank, and noise in every direction."""
    generator = torch.Generator().manual_seed(seed)
    steady = torch.randn(shape, generator=generator, dtype=torch.float64)
    for _ in range(steps):
        steady = 0.9 * steady + 0.5 * torch.randn(shape, generator=generator, dtype=torch.float64)
        yield (steady + 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


def start(shape: Sequence[int], seed: int = 100, dtype: torch.dtype = torch.float64) -> torch.nn.Parameter:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))


def same(actual: Tensor, expected: Tensor, what: str, **tolerance: float) -> None:
    torch.testing.assert_close(actual.detach().double(), expected, **(tolerance or EXACT), msg=lambda m: f"{what}: {m}")


def same_state(state: Mapping[str, Any], literal: Mapping[str, Any], what: str, **tolerance: float) -> None:
    """Every tensor and every counter that the literal has; and no tensor that it has not."""
    tensors = {name for name, value in state.items() if isinstance(value, Tensor)}
    assert tensors == {name for name, value in literal.items() if isinstance(value, Tensor)}, what
    for name, expected in literal.items():
        if isinstance(expected, Tensor):
            assert state[name].shape == expected.shape, f"{what}: {name}"
            same(state[name], expected, f"{what}: {name}", **tolerance)
        else:
            assert state[name] == expected, f"{what}: {name}"


def follow(
    optimizer: torch.optim.Optimizer,
    literals: Mapping[torch.nn.Parameter, Literal],
    steps: int = 22,
    *,
    lr: Callable[[int], float] | None = None,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    skip: Callable[[int, int], bool] = lambda t, i: False,
    **tolerance: float,
) -> None:
    """`lr(t)` is the literal's learning rate at step t (from 0); `skip(t, i)`: parameter i has no gradient then."""
    streams = [gradients(p.shape, steps, seed=i, dtype=p.dtype) for i, p in enumerate(literals)]
    for t in range(steps):
        given: list[Tensor] = []
        for i, (p, literal) in enumerate(literals.items()):
            grad = next(streams[i])
            p.grad = None if skip(t, i) else grad.clone()
            given.append(grad)
            if lr is not None:
                literal.lr = lr(t)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        for i, literal in enumerate(literals.values()):
            if not skip(t, i):
                literal.step(given[i])
        for i, (p, literal) in enumerate(literals.items()):
            what = f"step {t}, parameter {i} {tuple(p.shape)}"
            same(p, literal.weight, what, **tolerance)
            if literal.t:
                same_state(optimizer.state[p], literal.buffers(), what, **tolerance)
            else:
                assert not optimizer.state.get(p), what


# How far from the float64 value a rounded one may be, in units of the format's ε (twice its unit roundoff), at the
# largest magnitude of the tensor: a small element may be what large ones leave. First moment: two projections (in
# float32 their sums too), Adafactor's two factors and clipping, the average's two products and their sum: 8 roundings.
# Second moment: twice as many, for the squares. Weight: decay and sum at the weight's size; moment, both roots' sum,
# quotient, scale, projectors and product at the update's.
MOMENT, SQUARE, WEIGHT, UPDATE = 4, 8, 1, 8
SQUARES = ("exp_avg_sq", "state2")


def follow_rounded(optimizer: torch.optim.Optimizer, p: torch.nn.Parameter, literal: Literal, steps: int = 22) -> None:
    """In the parameter's format, each half of each step by itself, from the optimizer's own state and weight."""
    eps = torch.finfo(p.dtype).eps
    for t, grad in enumerate(gradients(p.shape, steps, dtype=p.dtype)):
        before = p.detach().clone()
        literal.take(optimizer.state.get(p, {}), before)
        p.grad = grad.clone()
        optimizer.step()
        literal.look(grad)
        state = optimizer.state[p]
        for name, expected in literal.buffers().items():
            if isinstance(expected, Tensor):
                count = SQUARE if name.startswith(SQUARES) else MOMENT
                near(state[name], expected, count * eps * largest(expected), f"step {t}: {name}")
            else:
                assert state[name] == expected, f"step {t}: {name}"
        literal.take(state, before)
        literal.move()
        change = largest(literal.weight - before.double())
        near(p, literal.weight, eps * (WEIGHT * largest(literal.weight) + UPDATE * change), f"step {t}: weight")


def largest(t: Tensor) -> float:
    return float(t.abs().max())


def near(actual: Tensor, expected: Tensor, atol: float, what: str) -> None:
    same(actual, expected, what, rtol=0.0, atol=atol)
