"""Gradients that cannot be used, and decompositions that fail: parameters, state and counts are as they were, and the
optimizer goes on as if nothing had happened."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from ours import OURS, Named, Ours
from small import (
    GAP,
    LR,
    build,
    decomposes,
    goes_on,
    gradients,
    parameters,
    push,
    refused,
    row,
    snapshot,
    train,
)

from galore_mem.errors import InputError
from galore_mem.optim import GaLoreAdamW, LayerWise, ParameterWise

GALORE = row("galore")
DECOMPOSING = [ours for ours in OURS if decomposes(ours)]
NAN, INF = float("nan"), float("inf")


# -- gradients -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("ours", OURS, ids=str)
def test_one_gradient_is_not_finite(ours: Ours, bad: float) -> None:
    """One value of one parameter, of each in turn, in a step without refresh and in one with."""
    named = parameters()
    optimizer = build(ours, named)
    for step in range(GAP + 1):
        if step >= GAP - 1:
            for name, _ in named:
                grads = gradients(step)
                grads[name].view(-1)[-1] = bad
                push(named, grads)
                with refused(named, optimizer, f"^{name} has a NaN or infinite gradient; nothing was updated$"):
                    optimizer.step()
                optimizer.zero_grad()
        train(named, optimizer, range(step, step + 1))
    goes_on(ours, named, optimizer, range(GAP + 1, GAP + 2))


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("ours", OURS, ids=str)
def test_one_gradient_is_not_finite_in_the_backward_pass(ours: Ours, passes: int) -> None:
    """Its parameter is as it was; the error comes out of `backward()`. After `zero_grad()` the run goes on."""
    named = parameters()
    optimizer = build(ours, named, LayerWise(passes))
    train(named, optimizer, range(2), micro=passes)
    for name, p in named:
        other = [(n, q) for n, q in named if n != name]
        grads = gradients(50)
        grads[name].view(-1)[0] = NAN
        if passes > 1:
            push(named, gradients(51))  # a good micro-batch before
        optimizer.zero_grad()
        kept = snapshot([(name, p)], optimizer)
        with pytest.raises(InputError, match=f"^{name} has a NaN or infinite gradient; its update was left out$"):
            push([(name, p)], grads)
        optimizer.zero_grad()
        assert snapshot([(name, p)], optimizer) == kept
        push(other, gradients(52))
        optimizer.zero_grad()
    for micro in range(passes):
        push(named, gradients(60 + micro))
    optimizer.step()
    assert all(torch.isfinite(p).all() and p.grad is None for _, p in named)


@pytest.mark.parametrize("refresh", [False, True], ids=["between", "refresh"])
@pytest.mark.parametrize("ours", DECOMPOSING, ids=str)
def test_whoever_allows_nan_gets_nan(ours: Ours, refresh: bool) -> None:
    """Without the check a step takes it; a refresh cannot (LAPACK refuses), and says so before anything has changed."""
    named = parameters()
    optimizer = build(ours, named)
    optimizer.error_if_nonfinite = False
    train(named, optimizer, range(GAP if refresh else GAP - 1))
    grads = gradients(GAP)
    grads["down_proj.weight"][0, 0] = NAN
    push(named, grads)
    if refresh:
        with refused(named, optimizer, r"^down_proj.weight has a NaN or infinite gradient"):
            optimizer.step()
        goes_on(ours, named, optimizer, range(GAP, GAP + 2))
    else:
        optimizer.step()
        assert dict(named)["down_proj.weight"].isnan().any()
        assert not dict(named)["up_proj.weight"].isnan().any()


@pytest.mark.parametrize("layerwise", [None, LayerWise(), LayerWise(clip_value=1.0), LayerWise(2)], ids=str)
def test_sparse_gradients(layerwise: LayerWise | None) -> None:
    table = torch.nn.Embedding(8, 4, sparse=True)
    other = torch.nn.Parameter(torch.zeros(3))
    named: Named = [("other", other), ("table", table.weight)]
    optimizer = GaLoreAdamW(named, LR, layerwise=layerwise)
    with refused([("table", table.weight)], optimizer, "^table has a sparse gradient"):
        table(torch.tensor([1, 2])).sum().backward()
        other.grad = torch.ones(3)
        optimizer.step()


def test_a_gradient_of_another_shape() -> None:
    """torch refuses to set one, but not to change the parameter under it."""
    named = parameters()
    optimizer = build(GALORE, named)
    push(named, gradients(0))
    p = dict(named)["o_proj.weight"]
    p.data = torch.zeros(3, 5)
    with refused(named, optimizer, r"^o_proj.weight: its gradient is \(12, 12\), not \(3, 5\)$"):
        optimizer.step()


# -- decompositions --------------------------------------------------------------------------------


@contextmanager
def no_decomposition_converges() -> Iterator[None]:
    def fails(*_: Any, **__: Any) -> Any:
        raise torch.linalg.LinAlgError("the algorithm failed to converge")

    with pytest.MonkeyPatch.context() as patched:
        for name in ("svd", "eigh", "qr"):
            patched.setattr(torch.linalg, name, fails)
        yield


@pytest.mark.parametrize("layerwise", [None, LayerWise()], ids=["step", "layer-wise"])
@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
@pytest.mark.parametrize("ours", DECOMPOSING, ids=str)
def test_an_svd_that_does_not_converge(ours: Ours, first: bool, layerwise: LayerWise | None) -> None:
    """Its parameter is as it was, projector, moments and counts: the same gradient tried again gives what an
    undisturbed run has."""
    named, twin = ([(n, p) for n, p in parameters() if n == "down_proj.weight"] for _ in range(2))
    optimizer, undisturbed = build(ours, named, layerwise, carry_moments=True), build(ours, twin, carry_moments=True)
    steps = 0 if first else GAP
    train(named, optimizer, range(steps))
    message = r"^down_proj.weight: the SVD of its gradient \(24, 704\) does not converge"
    with no_decomposition_converges(), refused(named, optimizer, message):
        push(named, gradients(steps))
        optimizer.step()
    optimizer.step()  # the gradient is still there
    optimizer.zero_grad()
    train(named, optimizer, range(steps + 1, steps + 3))
    train(twin, undisturbed, range(steps + 3))
    assert snapshot(named, optimizer) == snapshot(twin, undisturbed)


def pathological() -> Mapping[str, torch.Tensor]:
    """Gradients for a matrix of 24 x 704 that decompositions are known to dislike; their squares are in range."""
    random = torch.randn(24, 704, generator=torch.Generator().manual_seed(0))
    single = torch.zeros(24, 704)
    single[3, 5] = 1.0
    return {
        "zero": torch.zeros(24, 704), "ones": torch.ones(24, 704), "one entry": single,
        "rank 1": random[:, :1] @ random[:1], "denormal": random * 1e-40, "tiny": random * 1e-30,
        "large": random * 1e15, "of all sizes": random * torch.logspace(-30, 2, 24)[:, None],
    }  # fmt: skip


def tried(named: Named, optimizer: ParameterWise, grad: torch.Tensor) -> bool:
    """A step with one gradient for the wide matrix: done, or refused by name with nothing changed?"""
    push(named, {"down_proj.weight": grad.to(named[0][1].dtype)})
    before = snapshot(named, optimizer)
    try:
        optimizer.step()
    except InputError as error:
        if not str(error).startswith("down_proj.weight: the SVD of its gradient"):
            raise
        assert snapshot(named, optimizer) == before
        return False
    finally:
        optimizer.zero_grad()
    return True


@pytest.mark.parametrize("fmt", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", pathological())
@pytest.mark.parametrize("ours", OURS, ids=str)
def test_finite_gradients_never_make_nan(ours: Ours, case: str, fmt: str) -> None:
    """At refreshes (steps 0 and GAP) and between; ordinary steps after them work too."""
    named = [(n, p) for n, p in parameters(fmt) if n == "down_proj.weight"]
    optimizer = build(ours, named)
    for step in range(GAP + 2):
        grad = pathological()[case] if step in (0, 1, GAP) else gradients(step, fmt)["down_proj.weight"]
        assert tried(named, optimizer, grad)
        assert bool(named[0][1].isfinite().all()), step


@pytest.mark.parametrize("fmt", ["float32", "bfloat16"])
@pytest.mark.parametrize("ours", DECOMPOSING, ids=str)
def test_a_projector_of_a_huge_gradient(ours: Ours, fmt: str) -> None:
    """1e37, whose products are infinite: the projector is finite, or refused."""
    named = [(n, p) for n, p in parameters(fmt) if n == "down_proj.weight"]
    optimizer = build(ours, named)
    if tried(named, optimizer, torch.randn(24, 704, generator=torch.Generator().manual_seed(0)) * 1e37):
        state = optimizer.state[named[0][1]]
        found = [t for name, t in state.items() if name.startswith("projector")]
        assert found
        assert all(bool(t.isfinite().all()) for t in found)
