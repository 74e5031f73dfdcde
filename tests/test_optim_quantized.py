"""8-bit moments against bitsandbytes itself, their tables, and packed INT4 projectors."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from galore_mem.errors import InputError
from galore_mem.optim import GaLoreAdamW8bit, QGaLoreAdamW8bit, blockwise
from galore_mem.optim.projection import add_raised_, carried, lowered
from galore_mem.optim.quantize import INT4, grouped, packed, quantize, unpacked
from galore_mem.optim.state import Found

bitsandbytes = pytest.importorskip("bitsandbytes")

FORMATS = [torch.float32, torch.bfloat16, torch.float16]
MADE = [GaLoreAdamW8bit, QGaLoreAdamW8bit]
STEPS = 22
SETTINGS: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-6}
TABLES = ("qmap1", "qmap2")


def parameter(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.nn.Parameter:
    return torch.nn.Parameter(noise(shape, dtype, seed))


def noise(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# -- moments ---------------------------------------------------------------------------------------

# low-rank sizes: 48 · 90 = 4320, 82 · 50 = 4100, 66 · 66 = 4356 (8 bits); 4 · 90 = 360 (float32)
LOW: dict[str, tuple[tuple[int, int], int, str]] = {
    "wide": ((64, 90), 48, "std"),
    "tall": ((82, 60), 50, "std"),
    "full": ((70, 68), 66, "full"),
    "small": ((64, 90), 4, "std"),
}


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("case", LOW)
@pytest.mark.parametrize("made", MADE)
def test_the_low_rank_update_is_bitsandbytes_own(made: Any, case: str, dtype: torch.dtype) -> None:
    """To the bit, over 22 steps with refreshes at 0, 5, 10, 15 and 20: moments and maxima, and the weight, which is
    theirs projected back. Theirs is Adam8bit on a parameter of zeros with the low-rank gradient, at lr 1."""
    shape, rank, proj_type = LOW[case]
    p = parameter(shape, dtype)
    group = {"params": [p], "rank": rank, "update_proj_gap": 5, "proj_type": proj_type, "cos_threshold": None}
    ours = made([group], weight_decay=0.1, **SETTINGS)
    theirs = None
    for step in range(STEPS):
        before, grad = p.detach().clone(), noise(shape, dtype, 1 + step)
        p.grad = grad
        ours.step()
        state = ours.state[p]
        by = ours._projectors(Found(p, ours.param_groups[0], 0), state)
        low_grad = lowered(grad, by)
        if theirs is None:
            low = torch.nn.Parameter(torch.zeros_like(low_grad))
            theirs = bitsandbytes.optim.Adam8bit([low], lr=1.0, betas=SETTINGS["betas"], eps=SETTINGS["eps"])
        low.data.zero_()
        low.grad = low_grad
        theirs.step()
        for name, t in theirs.state[low].items():
            if isinstance(t, Tensor):
                assert torch.equal(state[name], t), (step, name)
        assert state["step"] == theirs.state[low]["step"] == step + 1
        before.mul_(1 - 0.01 * 0.1)
        add_raised_(before, low.data, by, 0.01 * 0.25)
        assert torch.equal(p, before), step
    assert (state["state1"].dtype is torch.uint8) == ("absmax1" in state) == (case != "small")
    assert state["next_refresh"] == 25


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("shape", [(4096,), (4095,), (5461,), (70, 80), (3, 5, 64, 8)], ids=str)
@pytest.mark.parametrize("made", MADE)
def test_other_parameters_are_bitsandbytes_own(made: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """To the bit, with weight decay, and with a learning rate that is a tensor."""
    p, q = parameter(shape, dtype), parameter(shape, dtype)
    settings = {**SETTINGS, "weight_decay": 0.1}
    ours = made([p], **{**settings, "lr": torch.tensor(settings["lr"], dtype=torch.float64)})
    theirs = bitsandbytes.optim.AdamW8bit([q], **settings)
    for step in range(STEPS):
        p.grad, q.grad = noise(shape, dtype, 1 + step), noise(shape, dtype, 1 + step)
        ours.step()
        theirs.step()
        assert torch.equal(p, q), step
        for name, t in theirs.state[q].items():
            if isinstance(t, Tensor):
                assert torch.equal(ours.state[p][name], t), (step, name)
    assert ours.state[p].keys() == theirs.state[q].keys()


def test_a_parameter_in_another_memory_order() -> None:
    """The kernels read memory in its order; a transposed parameter gets what a contiguous one gets, and keeps its."""
    plain = parameter((70, 80))
    turned = torch.nn.Parameter(plain.detach().T.contiguous().T)
    assert not turned.is_contiguous()
    ours, theirs = GaLoreAdamW8bit([turned], **SETTINGS), GaLoreAdamW8bit([plain], **SETTINGS)
    for step in range(3):
        grad = noise((70, 80), seed=1 + step)
        turned.grad, plain.grad = grad.T.contiguous().T, grad
        ours.step()
        theirs.step()
    assert torch.equal(turned, plain)
    assert not turned.is_contiguous()


def test_moments_are_carried_over() -> None:
    """At a refresh they are dequantized, turned and quantized again: off by at most half the largest distance of two
    table entries, times the block's maximum, and 2^-15 of it by which bitsandbytes' kernel may miss the nearest one.
    Float32 moments (of fewer than 4096 values) are turned exactly."""
    for rank in (48, 4):
        p = parameter((64, 90))
        optimizer = GaLoreAdamW8bit([{"params": [p], "rank": rank, "update_proj_gap": 2, "carry_moments": True}])
        for step in range(2):
            p.grad = noise((64, 90), seed=step)
            optimizer.step()
        at, state = Found(p, optimizer.param_groups[0], 0), optimizer.state[p]
        old, before = state["projector"].clone(), moments(state)
        optimizer._refresh(at, noise((64, 90), seed=9), state)
        by = {"left": state["projector"].T @ old}
        for i, (was, now) in enumerate(zip(before, moments(state), strict=True)):
            turned = carried(was, by, squares=i == 1)
            if rank == 4:
                assert torch.equal(now, turned)
                continue
            entries = state[TABLES[i]].sort().values
            reach = entries.diff().max() / 2 + 2.0**-15
            maxima = state[f"absmax{i + 1}"].repeat_interleave(256)[: turned.numel()].view(turned.shape)
            assert bool(((now - turned).abs() <= reach * maxima * (1 + 1e-6)).all())
            assert not torch.equal(now, was)


def moments(state: dict[str, Any]) -> list[Tensor]:
    """Both in float32."""
    found: list[Tensor] = []
    blockwise.change_(copy.deepcopy(state), lambda moment, second: found.append(moment.clone()) or moment)
    return found


# -- tables ----------------------------------------------------------------------------------------


def tables(optimizer: torch.optim.Optimizer) -> set[int]:
    return {s[name].data_ptr() for s in optimizer.state.values() for name in TABLES if name in s}


def three(made: Any) -> tuple[list[torch.nn.Parameter], Any]:
    """Two parameters with 8-bit moments, and one with float32 ones."""
    params = [parameter((64, 90)), parameter((4096,)), parameter((7,))]
    return params, made([{"params": params[1:]}, {"params": params[:1], "rank": 48}], lr=0.01)


def stepped(params: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, seed: int = 0) -> None:
    for p in params:
        p.grad = noise(tuple(p.shape), seed=seed)
    optimizer.step()


@pytest.mark.parametrize("made", MADE)
def test_tables_exist_once(made: Any) -> None:
    """After steps, after loading from a file, and in a copy; a state that comes later has the same ones."""
    params, optimizer = three(made)
    stepped(params[:1], optimizer)
    stepped(params, optimizer)
    assert len(tables(optimizer)) == 2
    assert not any(name in optimizer.state[params[2]] for name in TABLES)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other, fresh = three(made)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    late = parameter((5000,))
    fresh.add_param_group({"params": [late]})
    stepped([*other, late], fresh, 1)
    again = copy.deepcopy(fresh)
    late = parameter((5001,))
    again.add_param_group({"params": [late]})
    stepped([p for group in again.param_groups for p in group["params"]], again, 2)
    assert [len(tables(o)) for o in (fresh, again)] == [2, 2]
    assert not tables(fresh) & tables(optimizer)
    assert not tables(again) & tables(fresh)


@pytest.mark.parametrize("table", [None, torch.zeros(255), torch.zeros(256, dtype=torch.float16)])
def test_a_wrong_table_is_refused(table: Tensor | None) -> None:
    params, optimizer = three(GaLoreAdamW8bit)
    stepped(params, optimizer)
    state = copy.deepcopy(optimizer.state_dict())
    kept = state["state"][0]
    if table is None:
        del kept["qmap2"]
    else:
        kept["qmap2"] = table
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(InputError, match=r"parameter 0 .*'qmap2' of 256 float32 values"):
        optimizer.load_state_dict(state)
    after = optimizer.state_dict()
    assert all(torch.equal(t, after["state"][0][k]) for k, t in before["state"][0].items() if isinstance(t, Tensor))


# -- bitsandbytes itself ---------------------------------------------------------------------------


@pytest.fixture
def no_kernels() -> Iterator[None]:
    """Whether they are there is asked anew."""
    blockwise.kernels.cache_clear()
    yield
    blockwise.kernels.cache_clear()


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("made", MADE)
def test_without_bitsandbytes(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(blockwise, "import_module", missing)
    with pytest.raises(InputError, match=r"bitsandbytes 0\.49 or later.*No module named.*galore-mem\[verify\]"):
        made([parameter((3,))])


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize(("version", "fits"), [("0.48.2", False), ("0.49.0", True), ("0.50.2", True), ("1.0", True)])
def test_versions(version: str, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockwise, "import_module", lambda name: SimpleNamespace(__version__=version))
    if fits:
        blockwise.kernels()
    else:
        with pytest.raises(InputError, match=r"0\.48\.2 is installed"):
            blockwise.kernels()


def test_float64_is_for_the_cpu() -> None:
    GaLoreAdamW8bit([parameter((3,), torch.float64)])
    with pytest.raises(InputError, match=r"parameter 0 .* is float64, which bitsandbytes takes on the CPU only"):
        GaLoreAdamW8bit([torch.nn.Parameter(torch.empty(3, dtype=torch.float64, device="meta"))])


# -- INT4 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 255, 256, 257, 315])
def test_packing(count: int) -> None:
    """Two codes a byte, (count + 1) // 2 bytes; 0x21 is 1, then 2."""
    codes = torch.randint(0, 16, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))
    pairs = packed(codes)
    assert (pairs.dtype, pairs.untyped_storage().nbytes()) == (torch.uint8, (count + 1) // 2)
    for dtype in FORMATS:
        assert torch.equal(unpacked(pairs, count, dtype), codes.to(dtype))
    assert packed(torch.tensor([1, 2, 15], dtype=torch.uint8)).tolist() == [0x21, 0x0F]


ONE_SIGN = {"above": (10.0, 10.5), "below": (-3.0, -2.0), "constant": (0.3, 0.3), "zero": (0.0, 0.0)}


def spans(dtype: torch.dtype) -> Iterator[Tensor]:
    """Values of both signs in whole groups and in others; groups of one sign."""
    for count in (1, 255, 256, 700, 1024):
        yield noise((count,), dtype, count)
    for low, high in ONE_SIGN.values():
        yield torch.linspace(low, high, 300).to(dtype)


@pytest.mark.parametrize("dtype", [*FORMATS, torch.float64], ids=str)
def test_nearest_codes(dtype: torch.dtype) -> None:
    """A value is off by at most half a scale; at the ends also by what 15 scales lose when they are rounded to the
    format, and by what float32 loses. A scale is a 15th of the group's range with 0 in it: were 0 left out, the zero
    point of a group of one sign would be clamped, and with it all its codes."""
    for values in spans(dtype):
        codes, (scales, zeros) = quantize(values, INT4)
        assert (codes.dtype, tuple(scales.shape)) == (torch.uint8, (-(-values.numel() // 256), 1))
        assert int(codes.max()) <= INT4
        for (of, scale, zero), (code,) in zip(
            grouped(values.double(), scales.double(), zeros.double()), grouped(codes.double()), strict=True
        ):
            reach = of.amax(1, keepdim=True).clamp(min=0) - of.amin(1, keepdim=True).clamp(max=0)
            assert bool(((scale - reach / 15).abs() <= torch.finfo(dtype).eps * reach / 15 + 2.0**-24).all())
            off = (scale * (code - zero) - of).abs()
            assert bool((off <= scale * (0.5 + 15 * torch.finfo(dtype).eps + 1e-5)).all())
            assert bool(((zero >= 0) & (zero <= 15) & (zero == zero.round())).all())
