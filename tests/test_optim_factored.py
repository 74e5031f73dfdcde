"""GaLoreAdafactor, Flora and Tensor-GaLore where the suites over all optimizers do not look: float16's range, memory at
odd shapes, random numbers, refused options."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ledgers import measured, predicted
from low_rank import ALL, Param, program_peak, run, step_peak
from ours import OURS, Ours

from galore_mem.errors import InputError
from galore_mem.optim import Flora, GaLoreAdafactor, GaLoreAdamW, ParameterWise, TensorGaLoreAdamW
from galore_mem.optim.base import Found
from galore_mem.optim.flora import _rms_of_product

ROWS = [row for row in OURS if row.made in (GaLoreAdafactor, Flora, TensorGaLoreAdamW)]
GAP = 4

# -- memory ----------------------------------------------------------------------------------------

SHAPES = {
    "all": ALL,
    "convolution": (Param((16, 8, 3, 3), False),),
    "long": (Param((64, 640)),),
}
TENSORS = {
    # modes shorter and longer than the rank; one that is longer than the product of the others (9 columns)
    "thin": (Param((1000, 3, 3)),),
    "four": (Param((16, 24, 20, 12)),),
    "core that counts": (Param((80, 90, 4)),),
    "mixed": (Param((64, 48, 96)), *ALL, Param((100, 20, 30))),
}


@pytest.mark.parametrize("fmt", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_memory_at_odd_shapes(row: Ours, fmt: str) -> None:
    """State and peaks to the byte; float16 too, in which Adafactor's factors are worked out in float32.

    (Not the peaks of AdamW's part in float16: on the CPU, kernels over its float32 second moment and float16 gradients
    make float32 copies, which the ledger, like CUDA's, does not have.)"""

    def build(regular: list[Any], projected: list[Any], named: list[Any]) -> Any:
        return row.build([(p.label, p) for p in regular], [(p.label, p) for p in projected])

    for label, params in (TENSORS if row.made is TensorGaLoreAdamW else SHAPES).items():
        optimizer, named = run(build, params, fmt, 1)
        for given, p in zip(params, named, strict=True):
            own = {key: t for key, t in optimizer.state[p].items() if isinstance(t, torch.Tensor)}
            assert measured(own) == predicted(row.ledger.state(given.trained(fmt), row.job())), (label, given)
        for refresh in (False, True) if fmt != "float16" or row.made is not TensorGaLoreAdamW else ():
            peak = step_peak(build, params, fmt, GAP if refresh else GAP - 1)
            assert peak == program_peak(row.ledger, params, fmt, row.job(), refresh), (label, refresh)


def test_flora_by_hand() -> None:
    """256 x 688 at rank 64 in float32: both projections, 2·64·256, the low-rank update, 64·688, and a factor for each
    row and column, 256 + 688; nothing of the size 256·688. (The authors' code has five tensors of that size.)"""
    (row,) = (row for row in ROWS if str(row) == "flora")
    expected = 4 * (2 * 64 * 256 + 64 * 688 + 256 + 688)
    assert program_peak(row.ledger, (Param((256, 688)),), "float32", row.job(), False) == expected
    assert program_peak(row.ledger, (Param((688, 256)),), "float32", row.job(), False) == expected


def test_tensor_galore_by_hand() -> None:
    """64 x 48 x 96 at ranks 64, 48, 64: the most is the gradient with its first mode contracted, 48·96·64, and from it
    the second, 96·64·48. (Beside the core, 64·48·64, the way back has 48·64·64 and 64·64·48.)"""
    (row,) = (row for row in ROWS if str(row) == "tensor-galore")
    expected = 4 * (48 * 96 * 64 + 96 * 64 * 48)
    assert program_peak(row.ledger, (Param((64, 48, 96)),), "float32", row.job(), False) == expected


# -- numbers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1e-5, 1e3])
@pytest.mark.parametrize("options", [{}, {"scale_parameter": True}, {"beta1": 0.9}], ids=str)
@pytest.mark.parametrize("made", [GaLoreAdafactor, Flora])
def test_float16_range(made: Any, options: dict[str, Any], size: float) -> None:
    """Gradients of 1e-5, whose squares and whose divisors' inverses leave float16's range, and of 1e3, whose sums of
    squares do: the weights follow a float32 run. They are near 1 and rounded at 2^-11 in each of four steps; small
    gradients are multiples of 2^-24, 6e-8, and so known to 0.6 %, of updates that add up to 4·0.1."""
    torch.manual_seed(0)
    weights = {"matrix": torch.randn(24, 40), "vector": torch.randn(40), "other": torch.randn(30, 20)}
    grads = [{n: (size * torch.randn(w.shape)).half() for n, w in weights.items()} for _ in range(4)]
    ends = []
    for dtype in (torch.float16, torch.float32):
        named = [(n, torch.nn.Parameter(w.half().to(dtype))) for n, w in weights.items()]
        low = {"rank": 8, **({} if made is Flora else {"scale": 1.0})}
        groups = [{"params": named[1:]}, {"params": named[:1], **low}]
        optimizer = made(groups, lr=0.1, **options)
        for step in grads:
            for name, p in named:
                p.grad = step[name].to(dtype)
            optimizer.step()
        ends.append({name: p.detach().float() for name, p in named})
    for name, end in ends[0].items():
        # Flora's random numbers are the same in both runs: they are drawn in float32 for float16
        assert end.isfinite().all()
        assert (ends[1][name] - weights[name]).abs().mean() > 0.02, name  # it has moved
        torch.testing.assert_close(end, ends[1][name], rtol=4 * 2**-11, atol=0.02 * 0.4)


def test_rms_of_a_product_that_is_not_made() -> None:
    left, right = torch.randn(70, 5, dtype=torch.float64), torch.randn(5, 40, dtype=torch.float64)
    torch.testing.assert_close(_rms_of_product(left, right), (left @ right).square().mean().sqrt())


def test_flora_clips_the_update_that_is_applied() -> None:
    """M·A is noisier than U, by cols/r: its RMS, which would be sqrt(64/2) = 5.7 times that of M, is held at d."""
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.zeros(96, 64))
    optimizer = Flora([{"params": [("w", p)], "rank": 2}], lr=1.0, beta1=0.1, clip_threshold=0.5)
    p.grad = torch.randn(96, 64)
    optimizer.step()
    assert float(p.detach().square().mean().sqrt()) == pytest.approx(0.5, rel=1e-5)


def test_tensor_galore_does_not_mind_the_layout() -> None:
    """A parameter in channels_last: the same steps as a contiguous one, in another order of sums."""
    ends = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(6, 5, 4, 3, dtype=torch.float64).contiguous(memory_format=layout))
        optimizer = TensorGaLoreAdamW([{"params": [("w", p)], "rank": 3, "update_proj_gap": 2}], lr=0.1)
        for _ in range(4):
            p.grad = torch.randn(6, 5, 4, 3, dtype=torch.float64).contiguous(memory_format=layout)
            optimizer.step()
        assert p.is_contiguous(memory_format=layout)
        ends.append(p.detach())
    torch.testing.assert_close(ends[0], ends[1].contiguous(), rtol=1e-10, atol=1e-12)


def test_tensor_galore_finds_the_factors_of_a_low_rank_gradient_at_random_too() -> None:
    """A gradient of Tucker rank 3 in every mode: both ways span its fibres, mode by mode."""
    torch.manual_seed(0)
    core = torch.randn(3, 3, 3, dtype=torch.float64)
    fibres = [torch.randn(d, 3, dtype=torch.float64) for d in (9, 8, 7)]
    grad = torch.einsum("abc,ia,jb,kc->ijk", core, *fibres)
    spans = []
    for svd in ("exact", "randomized"):
        p = torch.nn.Parameter(torch.zeros_like(grad))
        optimizer = TensorGaLoreAdamW([{"params": [("w", p)], "rank": 3, "svd": svd}])
        p.grad = grad.clone()
        optimizer.step()
        spans.append([f @ f.T for f in (optimizer.state[p][f"projector.{mode}"] for mode in range(3))])
    for exact, randomized, fibre in zip(*spans, fibres, strict=True):
        torch.testing.assert_close(exact, randomized, rtol=0, atol=1e-10)
        torch.testing.assert_close(exact @ fibre, fibre, rtol=1e-10, atol=1e-10)


# -- random numbers --------------------------------------------------------------------------------


def test_flora_draws_other_numbers_for_other_names_and_seeds() -> None:
    def seeds(names: tuple[str, ...], seed: int) -> list[int]:
        named = [(name, torch.nn.Parameter(torch.zeros(6, 6))) for name in names]
        optimizer = Flora([{"params": named, "rank": 2}], seed=seed)
        for _, p in named:
            p.grad = torch.ones(6, 6)
        optimizer.step()
        return [optimizer.state[p]["seed"] for _, p in named]

    found = [*seeds(("a", "b"), 0), *seeds(("a", "b"), 1)]
    assert len(set(found)) == 4
    assert seeds(("a", "b"), 1) == found[2:]


def test_a_randomized_projector_has_other_numbers_for_other_names_seeds_and_steps() -> None:
    """(A CPU generator takes the lower 32 bits of a seed: all three have to be in them.)"""
    drawn = set()
    for seed in (0, 1, 2):
        optimizer = GaLoreAdamW([{"params": [("w", torch.nn.Parameter(torch.zeros(3, 3)))], "rank": 2}], seed=seed)
        at = Found(optimizer.param_groups[0]["params"][0], optimizer.param_groups[0], 0)
        drawn |= {float(torch.rand((), generator=optimizer._generator(at, {"step": step}))) for step in (0, 1, 200)}
    assert len(drawn) == 9


# -- refused ---------------------------------------------------------------------------------------

BAD: tuple[tuple[dict[str, Any], str], ...] = (
    ({"eps": 1e-8}, r"eps must be two numbers \(of squared gradients, of the parameter's RMS\), got 1e-08"),
    ({"eps": (1e-30, -1.0)}, r"eps\[1\] must be a number of at least 0, got -1.0"),
    ({"eps": (0.0, 1e-3)}, r"eps\[0\] must be above 0"),
    ({"clip_threshold": 0}, "clip_threshold must be above 0; give None for no clipping"),
    ({"clip_threshold": float("nan")}, "clip_threshold must be a number of at least 0, or None, got nan"),
    ({"decay_rate": 0.8}, "decay_rate must be a number of at least -1 and below 0, got 0.8"),
    ({"beta1": 1.0}, "beta1 must be a number of at least 0 and below 1.*, got 1.0"),
    ({"rank": 0}, "rank must be a whole number of at least 1"),
)


@pytest.mark.parametrize(("options", "said"), BAD, ids=lambda value: str(value)[:40])
@pytest.mark.parametrize("made", [GaLoreAdafactor, Flora])
def test_options_out_of_range(made: type[ParameterWise], options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        made([("w", torch.nn.Parameter(torch.zeros(4, 4)))], **options)


@pytest.mark.parametrize(
    ("made", "shape"), [(Flora, (5,)), (Flora, (2, 3, 4)), (GaLoreAdafactor, (2, 3, 4)), (TensorGaLoreAdamW, (5,))]
)
def test_shapes_that_cannot_be_projected(made: type[ParameterWise], shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"^up\.weight has the shape .*put it into a group without rank"):
        made([{"params": [("up.weight", torch.nn.Parameter(torch.zeros(shape)))], "rank": 2}])  # type: ignore[call-arg]  # options by name


def test_options_of_flora_alone() -> None:
    for options, said in (({"kappa": 0}, "kappa"), ({"seed": -1}, "seed"), ({"beta1": None}, "beta1")):
        with pytest.raises(InputError, match=f"{said} must be a"):
            Flora([("w", torch.nn.Parameter(torch.zeros(4, 4)))], **options)  # type: ignore[arg-type]  # options by name
