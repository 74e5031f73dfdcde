"""`GaLoreAdamW8bit` and `QGaLoreAdamW8bit` against literal transcriptions, each half of each step from the optimizer's
own state, as in `literal_follow.follow_rounded`: what is rounded is compared with what must be there before rounding.

With fewer than 4096 values, moments are float32 (bitsandbytes' rule): there nothing is quantized.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from literal_8bit import BLOCK, GaLore8bit, QGaLore, block_maxima, dynamic_map, values_of
from literal_follow import MOMENT, SQUARE, UPDATE, WEIGHT, gradients, largest, near, start
from torch import Tensor, nn

from galore_mem.optim.galore_8bit import GaLoreAdamW8bit
from galore_mem.optim.int8_linear import quantize_linears
from galore_mem.optim.q_galore import QGaLoreAdamW8bit

bitsandbytes = pytest.importorskip("bitsandbytes")

# the quotient of two moments is no worse rounded than the first divided by ε, which is large here for that reason
SETTINGS: dict[str, Any] = {"lr": 0.5, "betas": (0.8, 0.95), "eps": 0.5, "weight_decay": 0.1}
LOW: dict[str, Any] = {"update_proj_gap": 7}
STEPS = 22
# low-rank sizes: 48·90 = 4320 = 16·256 + 224 and 82·50 = 4100, 64·64 = 4096, 66·66 = 4356 (8 bits); 10·4 (32 bits)
CASES: dict[str, tuple[tuple[int, int], int, str]] = {
    "wide": ((64, 90), 48, "std"),
    "tall": ((82, 60), 50, "std"),
    "reverse": ((64, 90), 64, "reverse_std"),
    "full": ((70, 68), 66, "full"),
    "small": ((10, 6), 4, "std"),
}
FORMATS = [torch.float32, torch.bfloat16, torch.float16]


def test_the_tables() -> None:
    """bitsandbytes' table is the paper's; both are float32 in the end."""
    for signed in (True, False):
        table = bitsandbytes.functional.create_dynamic_map(signed=signed)
        torch.testing.assert_close(table, torch.tensor(dynamic_map(signed)), rtol=1e-6, atol=1e-9)


# bitsandbytes' CPU kernel (0.50.2) finds codes by cells of 2^-15 of the block's maximum (seen, not documented)
CELL = 2.0**-15


def quantized(state: dict[str, Any], name: str, expected: Tensor, eps: float, table: list[float]) -> None:
    """Maxima of blocks as expected, and of each value the nearest code, where neither the kernel's cell nor the
    rounding of the value before it (`eps`, at the tensor's maximum) decides otherwise."""
    maxima = torch.tensor(block_maxima(expected), dtype=torch.float64)
    kept = state[f"absmax{name[-1]}"].double()
    near(kept, maxima, eps * largest(maxima), f"{name}: maxima")
    entries = torch.tensor(table, dtype=torch.float64)
    for b, values in enumerate(expected.flatten().split(BLOCK)):
        codes = state[name].flatten()[b * BLOCK : (b + 1) * BLOCK].long()
        distance = (values[:, None] / kept[b] - entries[None, :]).abs()
        excess = distance.gather(1, codes[:, None])[:, 0] - distance.min(1).values
        assert float(excess.max()) <= CELL + 2 * eps * largest(maxima) / float(kept[b]), (name, b)


def stepped(
    optimizer: torch.optim.Optimizer, p: torch.nn.Parameter, literal: GaLore8bit, grad: Tensor, eps: float
) -> None:
    """One step of both. The update follows from moments that are rounded only after it: they are the literal's."""
    before = p.detach().clone()
    literal.take(optimizer.state.get(p, {}), before)
    p.grad = grad.clone()
    optimizer.step()
    literal.look(grad)
    state = optimizer.state[p]
    for name, expected, count in (("state1", literal.m, MOMENT), ("state2", literal.v, SQUARE)):
        if state[name].dtype == torch.uint8:
            quantized(state, name, expected, count * eps, literal.tables[name])
        else:
            near(state[name], expected, count * eps * largest(expected), name)


def allowed(literal: GaLore8bit, before: Tensor, eps: float) -> float:
    """Rounding of a weight, as in `follow_rounded`, and what the first moment's becomes: divided by ε, and projected
    back with columns of length 1, of which a row has at most r entries, together sqrt(r)."""
    m_hat = largest(literal.m) / (1 - literal.beta1**literal.t)
    moved = MOMENT * m_hat / literal.eps * literal.projector.rank**0.5 * literal.lr * literal.scale
    return eps * (WEIGHT * largest(literal.weight) + UPDATE * largest(literal.weight - before) + moved)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_galore_8bit(case: str, dtype: torch.dtype) -> None:
    shape, rank, proj_type = CASES[case]
    p, low = start(shape, dtype=dtype), {**LOW, "proj_type": proj_type}
    optimizer = GaLoreAdamW8bit([{"params": [p], "rank": rank, "scale": 0.7, **low}], **SETTINGS)
    literal = GaLore8bit(p, rank, scale=0.7, low=low, **SETTINGS)
    eps = torch.finfo(dtype).eps
    for t, grad in enumerate(gradients(shape, STEPS, dtype=dtype)):
        before = p.detach().double()
        stepped(optimizer, p, literal, grad, eps)
        state = optimizer.state[p]
        assert (state["step"], state["next_refresh"]) == (literal.t, literal.projector.next)
        literal.move()
        near(p, literal.weight, allowed(literal, before, eps), f"step {t}: weight")
    assert (state["state1"].dtype == torch.uint8) == (case != "small")
    assert literal.projector.refreshes == 4


def test_moments_are_bitsandbytes_bit_for_bit() -> None:
    """Of the low-rank gradient, as a parameter of its own; and parameters that are not projected altogether."""
    p, q, other = start((64, 90), dtype=torch.float32), start((70, 80), 1, torch.float32), None
    other = torch.nn.Parameter(q.detach().clone())
    settings = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-8}
    ours = GaLoreAdamW8bit([{"params": [p], "rank": 48, **LOW}, {"params": [q]}], weight_decay=0.1, **settings)
    low = torch.nn.Parameter(torch.zeros(48, 90))
    theirs = bitsandbytes.optim.Adam8bit([low], **settings)
    whole = bitsandbytes.optim.AdamW8bit([other], weight_decay=0.1, **settings)
    for grad, plain in zip(gradients(p.shape, 10, 0, p.dtype), gradients(q.shape, 10, 1, q.dtype), strict=True):
        p.grad, q.grad, other.grad = grad.clone(), plain.clone(), plain.clone()
        ours.step()
        low.grad = ours.state[p]["projector"].T @ grad
        theirs.step()
        whole.step()
        for name in ("state1", "state2", "absmax1", "absmax2", "qmap1", "qmap2"):
            assert torch.equal(ours.state[p][name], theirs.state[low][name]), name
            assert torch.equal(ours.state[q][name], whole.state[other][name]), name
        assert torch.equal(q, other)


# -- Q-GaLore ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_q_galore(case: str, dtype: torch.dtype) -> None:
    """A float weight, which is not rounded."""
    shape, rank, proj_type = CASES[case]
    p, low = start(shape, dtype=dtype), {**LOW, "proj_type": proj_type}
    optimizer = QGaLoreAdamW8bit([{"params": [p], "rank": rank, "scale": 0.7, **low}], **SETTINGS)
    literal = QGaLore(p, rank, scale=0.7, low=low, state=lambda: optimizer.state[p], **SETTINGS)
    eps = torch.finfo(dtype).eps
    for t, grad in enumerate(gradients(shape, STEPS, dtype=dtype)):
        before = p.detach().double()
        stepped(optimizer, p, literal, grad, eps)
        state = optimizer.state[p]
        assert (state["step"], state["next_refresh"]) == (literal.t, literal.projector.next)
        literal.move()
        near(p, literal.weight, allowed(literal, before, eps), f"step {t}: weight")
    assert literal.projector.refreshes == 4


def test_q_galore_refreshes_lazily() -> None:
    """The paper's threshold of 0.4; from gap 2, doubled after two alike. A rounded projector meets an exact one."""
    p, low = start((10, 6), dtype=torch.float32), {"update_proj_gap": 2, "queue_size": 2}
    optimizer = QGaLoreAdamW8bit([{"params": [p], "rank": 4, **low}], **SETTINGS)
    literal = QGaLore(p, 4, low=low, state=lambda: optimizer.state[p], **SETTINGS)
    for grad in gradients(p.shape, 60, dtype=p.dtype):
        stepped(optimizer, p, literal, grad, torch.finfo(p.dtype).eps)
        state, projector = optimizer.state[p], literal.projector
        assert (state["next_refresh"], state.get("gap", 2)) == (projector.next, projector.gap)
        assert state.get("similarities", []) == pytest.approx(projector.similarities, rel=1e-6)
    assert 2 < literal.projector.gap < 60


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["wide", "tall", "full"])
def test_q_galore_rounds_int8_weights_to_either_side(case: str, dtype: torch.dtype) -> None:
    """What a weight stands for after a step is the float update's result, rounded to one of the two codes beside it (of
    the group's new grid); and in the mean it is that result.

    The mean: the slope of what happened against what should have, over N = 22·m·n values. A step's error is at most a
    scale s long, with a deviation of s/2, so the slope's is below s/2/(rms of the update·sqrt(N)); five of them.
    """
    shape, rank, proj_type = CASES[case]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(shape[1], shape[0], dtype=dtype))
    quantize_linears(model, target=["0"])
    p, low = model[0].weight, {**LOW, "proj_type": proj_type}
    settings = {**SETTINGS, "lr": 4e-4}
    optimizer = QGaLoreAdamW8bit([{"params": [p], "rank": rank, "scale": 0.7, **low}], **settings)
    literal = QGaLore(torch.zeros(shape), rank, scale=0.7, low=low, state=lambda: optimizer.state[p], **settings)
    eps = torch.finfo(dtype).eps
    products = squares = worst = 0.0
    for grad in gradients(shape, STEPS, dtype=dtype):
        before = stands_for(p)
        literal.take(optimizer.state.get(p, {}), before)
        p.grad = grad.clone()
        optimizer.step()
        literal.look(grad)
        literal.move()
        happened, meant = stands_for(p) - before, literal.weight - before
        scale = p.scales.double().repeat_interleave(BLOCK)[: p.numel()].view(shape)
        reach = scale + UPDATE * eps * largest(meant) + allowed(literal, literal.weight, eps)
        assert bool(((happened - meant).abs() <= reach).all())
        products += float((happened * meant).sum())
        squares += float((meant * meant).sum())
        worst = max(worst, largest(scale))
    # rounded to the nearest code, most updates were lost
    assert worst > 3 * (squares / (STEPS * p.numel())) ** 0.5
    assert abs(products / squares - 1) < 5 * worst / 2 / squares**0.5


def stands_for(weight: Any) -> Tensor:
    codes, scales, zeros = (t.flatten().tolist() for t in (weight.codes, weight.scales, weight.zeros))
    return torch.tensor(values_of(codes, scales, zeros), dtype=torch.float64).view(weight.shape)
