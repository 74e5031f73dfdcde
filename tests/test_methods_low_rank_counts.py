"""Projected methods by arithmetic alone: what papers print, what was measured of packages, what holds for all."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from ledgers import job
from low_rank import HEADS, TALL, WIDE, Param, program_peak

from galore_mem.errors import InputError
from galore_mem.memory.tape import Shape
from galore_mem.methods.base import Implementation, Job
from galore_mem.methods.registry import METHODS

M, N, R = 256, 688, 64
LOW = N * R  # elements of a moment: 44,032
FULL = M * N  # of the matrix: 176,128
PROJECTED = [m.name for m in METHODS.values() if m.projects and m.implementations[0].linear in ("dense", "int8")]
CODES = [(name, code.name) for name in PROJECTED for code in METHODS[name].implementations]


def state_bytes(of: Implementation, given: Param, how: Job, fmt: str = "float32") -> int:
    return sum(b.nbytes for b in of.state(given.trained(fmt), how))


def told(name: str, rank: int = R, **more: int | float | str) -> Job:
    known = {h.name for h in METHODS[name].hyperparameters}
    return job(name, {**({"rank": rank} if "rank" in known else {}), **more}, "cpu", HEADS)


# -- papers ----------------------------------------------------------------------------------------


def paper_elements(name: str, params: list[Param], rank: int) -> int:
    code, how = METHODS[name].paper, job(name, {"rank": rank} if METHODS[name].projects else {}, "cpu", HEADS)
    return sum(state_bytes(code, p, how) for p in params) // 4


def test_layer_of_section_3_2() -> None:
    """GaLore-mini, section 3.2: four h x h and two h x 4h matrices, h = 4096, r = 1024.

    AdamW 2·(4 + 8)·h² = 24·h² = 24 · 16,777,216 = 402,653,184; Adam-mini 12·h²; GaLore mr + 2nr: 4·3·hr + 2·9·hr
    = 30·hr = 30 · 4,194,304 = 125,829,120; GaLore-mini mr + nr: 4·2·hr + 2·5·hr = 18·hr = 75,497,472.
    """
    h, r = 4096, 1024
    layer = [Param((h, h))] * 4 + [Param((h, 4 * h)), Param((4 * h, h))]
    found = {name: paper_elements(name, layer, r) for name in ("adamw", "adam-mini", "galore", "galore-mini")}
    assert found == {
        "adamw": 24 * h * h, "adam-mini": 12 * h * h, "galore": 30 * h * r, "galore-mini": 18 * h * r,
    }  # fmt: skip
    assert found == {
        "adamw": 402_653_184, "adam-mini": 201_326_592, "galore": 125_829_120, "galore-mini": 75_497_472,
    }  # fmt: skip
    assert 10 * (found["galore"] - found["galore-mini"]) == 4 * found["galore"]  # 40 %
    assert 10_000 * (found["adamw"] - found["galore-mini"]) == 8_125 * found["adamw"]  # 81.25 %


# bytes at one element of e bytes, for m <= n; what the papers count for a projected and for another matrix
PAPERS: dict[str, Callable[[int, int, int, int], tuple[int, int]]] = {
    "galore": lambda m, n, r, e: (e * (m * r + 2 * n * r), e * 2 * m * n),
    "galore-2": lambda m, n, r, e: (e * (m * r + 2 * n * r), e * 2 * m * n),
    "tensor-galore": lambda m, n, r, e: (e * (m * r + 2 * n * r), e * 2 * m * n),
    "galore-8bit": lambda m, n, r, e: (m * r + 2 * n * r, 2 * m * n),
    "q-galore": lambda m, n, r, e: ((m * r + 1) // 2 + 2 * n * r, 2 * m * n),
    "galore-adafactor": lambda m, n, r, e: (e * (m * r + n + r), e * (m + n)),
    "galore-mini": lambda m, n, r, e: (e * (m * r + n * r), e * m * n),
    "galore-mini-1": lambda m, n, r, e: (e * (m * r + n * r), e * m * n),
    "galore-mini-2": lambda m, n, r, e: (e * (m * r + n * r), e * m * n),
    "flora": lambda m, n, r, e: (e * (n * r + n + m) + 8, e * (m * n + n + m)),  # a seed of 8 bytes
    "apollo": lambda m, n, r, e: (e * (2 * n * r + 1) + 8, e * 2 * m * n),
    "apollo-mini": lambda m, n, r, e: (e * (2 * n + 1) + 8, e * 2 * m * n),
    "fira": lambda m, n, r, e: (e * (m * r + 2 * n * r + 1), e * 2 * m * n),
}


@pytest.mark.parametrize("rank", [1, 16, 64, 10**6])
@pytest.mark.parametrize("shape", [WIDE, TALL, (64, 64), (1000, 3), (64, 66)])
@pytest.mark.parametrize("name", PROJECTED)
def test_papers_count(name: str, shape: Shape, rank: int) -> None:
    """The rank is never above the shorter side; the larger side is n, whichever way the matrix lies."""
    m, n = sorted(shape)
    code, r = METHODS[name].paper, min(rank, m)
    for fmt, size in (("float32", 4), ("bfloat16", 2)):
        expected = PAPERS[name](m, n, r, size)
        how = told(name, rank)
        assert state_bytes(code, Param(shape), how, fmt) == expected[0]
        assert state_bytes(code, Param(shape, projected=False), how, fmt) == expected[1]


# -- what was measured of the packages, at 256 x 688 and 688 x 256 with r = 64 ---------------------

# (method, implementation): bytes of state in float32 and bfloat16
STATES: dict[tuple[str, str], tuple[int, int]] = {
    # the view keeps U (256 x 256) alive: 4·(256² + 2·44,032); in bfloat16 2·(256·64 + 2·44,032)
    ("galore", "galore-torch"): (614_400, 208_896),
    # a copy: 4·(256·64 + 2·44,032)
    ("galore", "pytorch-optimizer"): (417_792, 208_896),
    # always float32: 4·(256² + 688 + 64 + 1)
    ("galore-adafactor", "galore-torch"): (265_156, 265_156),
    # 4·256² (bfloat16 2·256·64) + 2·44,032 codes + 2·172 maxima at 4; two shared tables of 1,024 come on top
    ("galore-8bit", "galore-torch"): (353_636 - 2_048 - 4, 124_260 - 2_048 - 4),  # 4: see test_methods_low_rank.py
    # 256·64 bytes, 2·64 scales and zeros and a vector of 256 at 4 (2), 2·44,032 codes, 2·172 maxima at 4
    ("q-galore", "q-galore-torch"): (109_408 - 2_048, 108_640 - 2_048),
    # 4·(256·64 + 2·44,032 + 1)
    ("apollo", "apollo-torch"): (417_796, 208_898),
    # rank 1: 4·(256 + 2·688 + 1)
    ("apollo-mini", "apollo-torch"): (6_532, 3_266),
    # as galore-torch, and a norm
    ("fira", "fira"): (614_404, 208_898),
}

# peak of a steady step in float32 and bfloat16, without the scalars (12 to 20 bytes) that the CPU makes of numbers;
# L = 44,032 and F = 176,128 elements
PEAKS: dict[tuple[str, str], tuple[int, int]] = {
    ("galore", "galore-mem"): (4 * LOW, 2 * LOW),
    ("galore", "galore-torch"): (4 * (3 * LOW + 2 * FULL), 2 * (3 * LOW + 2 * FULL)),  # 1,937,420 and 968,714
    ("galore", "pytorch-optimizer"): (4 * (2 * LOW + FULL), 2 * (2 * LOW + FULL)),  # 1,056,780
    # low-rank gradient and update, then both products; bfloat16: the parameter's copy too; 1,761,292 and 2,465,804
    ("galore-adafactor", "galore-torch"): (4 * (2 * LOW + 2 * FULL), 4 * (2 * LOW + 3 * FULL)),
    # and the scales of 688 channels: 1,940,176 and 970,092
    ("apollo", "apollo-torch"): (4 * (3 * LOW + 2 * FULL + N), 2 * (3 * LOW + 2 * FULL + N)),
    ("apollo-mini", "apollo-torch"): (4 * (3 * N + 2 * FULL), 2 * (3 * N + 2 * FULL)),  # 1,417,300 and 708,654
    ("fira", "fira"): (4 * (3 * LOW + 4 * FULL + N), 2 * (3 * LOW + 4 * FULL + N)),  # 3,349,204 and 1,674,606
}  # fmt: skip
MEASURED = {
    ("galore", "galore-torch"): (1_937_420, 968_714),
    ("galore", "pytorch-optimizer"): (1_056_780, None),
    ("galore-adafactor", "galore-torch"): (1_761_292, 2_465_804),
    ("apollo", "apollo-torch"): (1_940_176, 970_092),
    ("apollo-mini", "apollo-torch"): (1_417_300, 708_654),
    ("fira", "fira"): (3_349_204, 1_674_606),
}


@pytest.mark.parametrize("shape", [WIDE, TALL])
@pytest.mark.parametrize("key", STATES, ids="-".join)
def test_measured_states(key: tuple[str, str], shape: Shape) -> None:
    code, how = METHODS[key[0]].implementation(key[1]), told(key[0])
    found = tuple(state_bytes(code, Param(shape), how, fmt) for fmt in ("float32", "bfloat16"))
    assert found == STATES[key]


@pytest.mark.parametrize("shape", [WIDE, TALL])
@pytest.mark.parametrize("key", PEAKS, ids="-".join)
def test_measured_peaks(key: tuple[str, str], shape: Shape) -> None:
    code, how = METHODS[key[0]].implementation(key[1]), told(key[0])
    for i, fmt in enumerate(("float32", "bfloat16")):
        peak = program_peak(code, (Param(shape),), fmt, how, False)
        assert peak == PEAKS[key][i]
        real = MEASURED.get(key, (None, None))[i]
        assert real is None or 0 <= real - peak <= 24


def test_8bit_galore_torch_on_a_gpu() -> None:
    """The low-rank gradient, the weight's clone and the low-rank stand-in: 2·L + F. Then the clone is the weight and
    the low-rank gradient has taken the full one's place, so that both products come to 2·L + 2·F - F."""
    how = Job(told("galore-8bit").hyperparameters, told("galore-8bit").recipe, "cuda")
    code = METHODS["galore-8bit"].implementation("galore-torch")
    for fmt, size in (("float32", 4), ("bfloat16", 2)):
        assert program_peak(code, (Param(WIDE),), fmt, how, False) == size * (2 * LOW + FULL)


def test_q_galore_torch_on_a_gpu() -> None:
    """`float_weight`, the weight and `saved_data`; five tensors and four values per group of 256 that live through the
    rounding; the chosen values, those plus zeros, those clamped: eleven. The codes' storage is gone meanwhile, and the
    low-rank gradient has taken the full one's place."""
    how = Job(told("q-galore").hyperparameters, told("q-galore").recipe, "cuda")
    code = METHODS["q-galore"].implementation("q-galore-torch")
    for fmt, size in (("float32", 4), ("bfloat16", 2)):
        expected = size * (11 * FULL + 4 * FULL // 256 - FULL + LOW) - FULL
        assert program_peak(code, (Param(WIDE),), fmt, how, False) == expected


def test_tucker_ranks() -> None:
    """64 x 48 x 3 at rank 16: ours clips the last mode to 3; tensorly pads it to 6."""
    given, how = Param((64, 48, 3)), told("tensor-galore", 16)
    for name, last in (("galore-mem", 3), ("neuraloperator", 6)):
        code = METHODS["tensor-galore"].implementation(name)
        core = (16, 16, last)
        assert [b.shape for b in code.state(given.trained(), how)] == [(64, 16), (48, 16), (3, last), core, core]
    assert state_bytes(METHODS["tensor-galore"].paper, given, how) == 4 * (64 * 16 + 48 * 16 + 9 + 2 * 768)


def test_logical_and_pinned_bytes() -> None:
    """The view's own elements are 256·64; its storage is 256·256."""
    projector = METHODS["galore"].implementation("galore-torch").state(Param(WIDE).trained(), told("galore"))[0]
    assert (projector.name, projector.shape) == ("projector.ortho_matrix", (256, 64))
    assert (projector.nbytes, projector.dtype.nbytes(projector.shape)) == (262_144, 65_536)


def test_sides() -> None:
    """reverse_std projects the longer side: n·r for the projector, m·r for each moment; full both, r·r a moment."""

    def shapes(of: Shape, kind: str) -> list[Shape]:
        code = METHODS["galore"].implementation("galore-mem")
        return [b.shape for b in code.state(Param(of).trained(), told("galore", proj_type=kind))]

    assert shapes(WIDE, "std") == shapes(WIDE, "left") == [(256, 64), (64, 688), (64, 688)]
    assert shapes(TALL, "std") == shapes(TALL, "right") == [(64, 256), (688, 64), (688, 64)]
    assert shapes(WIDE, "reverse_std") == shapes(WIDE, "right") == [(64, 688), (256, 64), (256, 64)]
    assert shapes((64, 64), "std") == [(64, 64)] * 3
    assert shapes(WIDE, "full") == [(256, 64), (64, 688), (64, 64), (64, 64)]
    with pytest.raises(InputError, match="did you mean std"):
        shapes(WIDE, "stdd")
    for name in ("fira", "apollo"):
        if any(h.name == "proj_type" for h in METHODS[name].hyperparameters):
            with pytest.raises(InputError, match="one side"):
                METHODS[name].implementations[0].state(Param(WIDE).trained(), told(name, proj_type="full"))
