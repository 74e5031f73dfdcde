"""INT8 weights: their rounding, which is unbiased and leaves alone what no gradient changes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from galore_mem.optim import QGaLoreAdamW8bit
from galore_mem.optim.int8 import FEWEST, SPARE, Int8Weight, round_
from galore_mem.optim.quantize import Grid

FORMATS = [torch.float32, torch.bfloat16, torch.float16]
ONE_SIGN = {"above": (10.0, 10.5), "below": (-3.0, -2.0), "constant": (0.3, 0.3), "zero": (0.0, 0.0)}
SHAPES = [(37, 53), (16, 256), (3, 5)]


def noise(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def float_of(weight: Int8Weight) -> Tensor:
    """What codes, scales and zeros stand for, in float64."""
    return Int8Weight(weight.codes, weight.scales.double(), weight.zeros.double()).dequantized()


def scales_of(weight: Int8Weight) -> Tensor:
    """The scale of each value, in float64."""
    return weight.scales.double().repeat_interleave(256)[: weight.numel()].view(weight.shape)


def copied(weight: Int8Weight) -> Int8Weight:
    return Int8Weight(*(t.clone() for t in weight.stored))


def add(weight: Int8Weight, delta: Tensor, alpha: float = 1.0, keep: float = 1.0, seed: int = 0) -> Int8Weight:
    generator = torch.Generator().manual_seed(seed)
    weight.add_rounded_(lambda rows: delta[rows], alpha=alpha, keep=keep, generator=generator)
    return weight


@pytest.mark.parametrize("dtype", [*FORMATS, torch.float64], ids=str)
def test_int8_codes_are_nearest_and_leave_room(dtype: torch.dtype) -> None:
    """Half a scale, and what float32 loses; two codes at both ends are free."""
    given = [noise(shape, dtype) for shape in SHAPES]
    given += [noise((53, 37), dtype).T]  # of other strides
    given += [torch.linspace(low, high, 300).to(dtype).view(1, 300) for low, high in ONE_SIGN.values()]
    for values in given:
        weight = Int8Weight.of(values)
        assert bool(((float_of(weight) - values.double()).abs() <= scales_of(weight) * (0.5 + 1e-4)).all())
        assert SPARE <= int(weight.codes.min()) <= int(weight.codes.max()) <= 255 - SPARE


@pytest.mark.parametrize(("noise_is", "expected"), [(0.0, [200, 201, 255]), (1 - 2.0**-24, [200, 200, 255])])
def test_extreme_random_numbers(noise_is: float, expected: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest random number below 1, added to 200 in float32, gives 201; but 200 is a whole number already."""
    monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.full(shape, noise_is))
    values = torch.zeros(256)
    values[:3] = torch.tensor([200.0, 200.5, 255.0])
    codes, grid = torch.zeros(256, dtype=torch.uint8), Grid(torch.ones(1, 1), torch.zeros(1, 1))
    round_(codes, values, grid, torch.Generator())
    assert codes[:3].tolist() == expected


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nothing_added_changes_nothing(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """To the bit: right after rounding to the nearest codes, and after updates of all sizes, which have refitted
    groups and have not; also where a group is all zeros, or of one sign."""
    values = noise(shape, dtype)
    values.view(-1)[:256] = 0
    weight = Int8Weight.of(values)
    for step, size in enumerate((0.0, 1e-4, 1e-2, 1.0, 100.0, 1.0)):
        add(weight, noise(shape, dtype, step), size, seed=step)
        before = copied(weight)
        for again in range(5):
            add(weight, torch.zeros(shape, dtype=dtype), seed=100 + again)
        assert all(torch.equal(a, b) for a, b in zip(weight.stored, before.stored, strict=True)), size


def test_no_gradient_no_drift() -> None:
    """Through the optimizer: 12 steps with gradients of zero, refreshes at 0, 5 and 10."""
    p = torch.nn.Parameter(Int8Weight.of(noise((37, 53))))
    optimizer = QGaLoreAdamW8bit([{"params": [p], "rank": 8, "update_proj_gap": 5}])
    before = copied(p)
    for _ in range(12):
        p.grad = torch.zeros(37, 53)
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(p.stored, before.stored, strict=True))


@pytest.mark.parametrize("dtype", [*FORMATS, torch.float64], ids=str)
@pytest.mark.parametrize(("alpha", "keep"), [(1e-5, 1.0), (1e-3, 1.0), (0.1, 1.0), (1e-4, 0.99), (0.0, 0.4)])
def test_rounding_is_unbiased(alpha: float, keep: float, dtype: torch.dtype) -> None:
    """The mean of 500 roundings against the exact value, for steps of about 0.02, 2 and 200 scales (a group's range of
    6 over 250 codes, at values of deviation 1 scaled by 0.02), for weight decay, and where groups shrink and refit.

    One rounding is off by at most a scale s, with a deviation of at most s/2. So the mean of 500 has one of at most
    s/2/sqrt(500); 1961 of them stay below 5.5 deviations with a probability of 1 - 1e-4, and their mean, below 4
    deviations, with about the same."""
    start = Int8Weight.of((noise((37, 53)) * 0.02).to(dtype))
    delta = noise((37, 53), dtype, 1)
    exact = keep * float_of(start) + alpha * delta.double()
    total, count = torch.zeros_like(exact), 500
    for trial in range(count):
        rounded = add(copied(start), delta, alpha, keep, seed=trial)
        total += float_of(rounded)
        assert bool(((float_of(rounded) - exact).abs() <= scales_of(rounded) * (1 + 1e-3)).all())
    off = (total / count - exact) / (scales_of(rounded) / 2 / count**0.5)
    assert float(off.abs().max()) < 5.5
    assert abs(float(off.mean())) * off.numel() ** 0.5 < 4


def test_updates_far_below_a_scale_add_up() -> None:
    """1000 times 0.01 scales are 10; rounded to the nearest they were lost. A value's sum has a deviation of
    sqrt(1000 · 0.01 · 0.99) = 3.1, the mean of 1961 of them 0.07; five of those."""
    weight = Int8Weight.of(noise((37, 53)))
    start, scales = float_of(weight), scales_of(weight)
    delta = (0.01 * scales).float()
    for step in range(1000):
        add(weight, delta, seed=step)
    moved = (float_of(weight) - start) / scales
    assert abs(float(moved.mean()) - 10) < 5 * 3.1 / 1961**0.5


def test_groups_follow_their_values() -> None:
    """Values that grow past the codes, and values that shrink: the scale follows, so that at least 127 codes lie
    between a group's least and largest value. Zeros can start."""
    weight = Int8Weight.of(noise((16, 256)))
    for keep, size in ((1.0, 50.0), (0.3, 0.0), (0.3, 0.0), (0.01, 0.0)):
        exact = keep * float_of(weight) + size * noise((16, 256), seed=5).double()
        add(weight, noise((16, 256), seed=5), size, keep)
        assert bool(((float_of(weight) - exact).abs() <= scales_of(weight) * (1 + 1e-3)).all())
        reach = weight.codes.int().amax(1) - weight.codes.int().amin(1)
        assert int(reach.min()) >= FEWEST
    zeros = add(Int8Weight.of(torch.zeros(2, 300)), noise((2, 300)), 1e-3)
    off = float_of(zeros) - 1e-3 * noise((2, 300)).double()
    assert bool((off.abs() <= scales_of(zeros) * (1 + 1e-3)).all())
    assert float(scales_of(zeros).max()) < 1e-4


def test_rounding_depends_on_seed_parameter_and_step() -> None:
    def codes(name: str, seed: int, steps: int = 1) -> Tensor:
        p = torch.nn.Parameter(Int8Weight.of(noise((37, 53))))
        optimizer = QGaLoreAdamW8bit([{"params": [(name, p)], "rank": 8, "seed": seed, "lr": 0.1}])
        for _ in range(steps):
            p.grad = noise((37, 53), seed=3)
            optimizer.step()
        return p.codes

    assert torch.equal(codes("a", 0), codes("a", 0))
    assert not torch.equal(codes("a", 0), codes("b", 0))
    assert not torch.equal(codes("a", 0), codes("a", 1))
