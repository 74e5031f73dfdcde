"""`GaLoreAdafactor` and `TensorGaLoreAdamW` against literal transcriptions, as in `test_optim_right.py`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from literal import AdamW, GaLore, Literal
from literal_follow import follow, follow_rounded, start
from literal_more import Adafactor, GaLoreAdafactor, TensorGaLore

from galore_mem.optim.galore_adafactor import GaLoreAdafactor as OurGaLoreAdafactor
from galore_mem.optim.tensor_galore import TensorGaLoreAdamW

LOW: dict[str, Any] = {"update_proj_gap": 7}
SIDES = ("std", "reverse_std", "left", "right", "full")
SHAPES = {(10, 6): 4, (6, 10): 4, (8, 8): 3, (3, 11): 5, (12, 2): 2, (1, 7): 1}
REFRESHES = 4
FORMATS = (torch.float32, torch.bfloat16, torch.float16)

# -- Adafactor ---------------------------------------------------------------------------------------

ADAFACTOR: dict[str, dict[str, Any]] = {
    "plain": {"lr": 0.02},
    # ε1 so large that where it is added shows; d so small that updates are clipped
    "clipped": {"lr": 0.02, "eps": (1e-2, 1e-3), "clip_threshold": 0.5, "weight_decay": 0.1},
    "unclipped": {"lr": 0.02, "clip_threshold": None, "decay_rate": -0.6},
    "moment": {"lr": 0.02, "beta1": 0.8, "weight_decay": 0.1},
    # the paper's: ρ_t = min(1e-2, 1/sqrt(t)) times the weight's size; 0.3 > 1/sqrt(t) from step 12 on
    "relative": {"lr": 0.3, "scale_parameter": True, "relative_step": True, "weight_decay": 0.1},
    "everything": {"lr": 0.3, "beta1": 0.8, "scale_parameter": True, "relative_step": True, "clip_threshold": 0.7},
}


@pytest.mark.parametrize("options", ADAFACTOR)
@pytest.mark.parametrize("shape", [*SHAPES, (7,), (2, 3, 4), (2, 2, 3, 2)], ids=str)
def test_adafactor(shape: tuple[int, ...], options: str) -> None:
    p, settings = start(shape), ADAFACTOR[options]
    follow(OurGaLoreAdafactor([p], **settings), {p: Adafactor(p, **settings)})


@pytest.mark.parametrize("options", ["clipped", "unclipped", "everything"])
@pytest.mark.parametrize("proj_type", SIDES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_galore_adafactor(shape: tuple[int, int], proj_type: str, options: str) -> None:
    p, low, settings = start(shape), {**LOW, "proj_type": proj_type}, ADAFACTOR[options]
    group = {"params": [p], "rank": SHAPES[shape], "scale": 0.7, **low}
    literal = GaLoreAdafactor(p, SHAPES[shape], scale=0.7, low=low, **settings)
    follow(OurGaLoreAdafactor([group], **settings), {p: literal})
    assert literal.projector.refreshes == REFRESHES


@pytest.mark.parametrize("options", ["plain", "moment"])
@pytest.mark.parametrize("proj_type", SIDES)
def test_galore_adafactor_carries_moments_over(proj_type: str, options: str) -> None:
    p, settings = start((9, 6)), ADAFACTOR[options]
    low = {**LOW, "proj_type": proj_type, "carry_moments": True}
    group = {"params": [p], "rank": 4, **low}
    follow(OurGaLoreAdafactor([group], **settings), {p: GaLoreAdafactor(p, 4, low=low, **settings)})


def test_a_small_weight_moves_by_its_least_size() -> None:
    """RMS(W) below ε2: ε2 takes its place."""
    p = start((5, 6))
    p.data.mul_(1e-6)
    settings = {"lr": 0.01, "scale_parameter": True}
    follow(OurGaLoreAdafactor([p], **settings), {p: Adafactor(p, **settings)})


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("proj_type", ["left", "right", "full"])
@pytest.mark.parametrize("shape", [(10, 6), (3, 11), (12, 2)], ids=str)
def test_galore_adafactor_rounded(shape: tuple[int, int], proj_type: str, dtype: torch.dtype) -> None:
    """With a first moment, from which the update follows (without one it is not in the state)."""
    p, low, settings = start(shape, dtype=dtype), {**LOW, "proj_type": proj_type}, {**ADAFACTOR["moment"], "lr": 0.5}
    group = {"params": [p], "rank": SHAPES[shape], "scale": 0.7, **low}
    literal = GaLoreAdafactor(p, SHAPES[shape], scale=0.7, low=low, **settings)
    follow_rounded(OurGaLoreAdafactor([group], **settings), p, literal)


# -- Tensor-GaLore -----------------------------------------------------------------------------------

SETTINGS: dict[str, Any] = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}
# a rank above a mode's length; a mode longer than the product of the others; four and five modes
TENSORS = {(4, 5, 6): 3, (2, 7, 3): 4, (9, 2, 2): 5, (3, 4, 2, 5): 2, (2, 3, 2, 3, 2): 2}


@pytest.mark.parametrize("carry", [False, True], ids=["kept", "carried"])
@pytest.mark.parametrize("shape", TENSORS, ids=str)
def test_tensor_galore(shape: tuple[int, ...], carry: bool) -> None:
    p, low = start(shape), {**LOW, "carry_moments": carry}
    group = {"params": [p], "rank": TENSORS[shape], "scale": 0.7, **low}
    literal = TensorGaLore(p, TENSORS[shape], scale=0.7, **low, **SETTINGS)
    follow(TensorGaLoreAdamW([group], **SETTINGS), {p: literal})
    assert literal.refreshes == REFRESHES


def test_tensor_galore_with_matrices_and_others() -> None:
    """Matrices are GaLore's, unprojected parameters AdamW's."""
    tensor, matrix, other, vector = start((3, 4, 5)), start((6, 8)), start((2, 3, 4)), start((5,))
    groups = [{"params": [tensor, matrix], "rank": 3, **LOW}, {"params": [other, vector]}]
    literals: dict[torch.nn.Parameter, Literal] = {
        tensor: TensorGaLore(tensor, 3, **LOW, **SETTINGS),
        matrix: GaLore(matrix, 3, low=LOW, **SETTINGS),
        other: AdamW(other, **SETTINGS),
        vector: AdamW(vector, **SETTINGS),
    }
    follow(TensorGaLoreAdamW(groups, **SETTINGS), literals)


def test_tensor_galore_at_full_rank_where_singular_vectors_are_axes() -> None:
    """A gradient with one element per slice of every mode, of different sizes: the factors are signed permutations, and
    AdamW's elementwise step commutes with them."""
    side = 4
    first = torch.zeros(side, side, side, dtype=torch.float64)
    for i, (j, k) in enumerate(zip((2, 0, 3, 1), (1, 3, 2, 0), strict=True)):
        first[i, j, k] = (-1.0) ** i * (1 + i)
    p, q = start(first.shape), start(first.shape)
    group = {"params": [p], "rank": side, "scale": 1.0, "update_proj_gap": 1000}
    optimizer, reference = TensorGaLoreAdamW([group], **SETTINGS), torch.optim.AdamW([q], **SETTINGS)
    generator = torch.Generator().manual_seed(0)
    for t in range(22):
        grad = first if t == 0 else torch.randn(first.shape, generator=generator, dtype=torch.float64)
        p.grad, q.grad = grad.clone(), grad.clone()
        optimizer.step()
        reference.step()
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("shape", TENSORS, ids=str)
def test_tensor_galore_rounded(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    p, settings = start(shape, dtype=dtype), {**SETTINGS, "lr": 0.5}
    group = {"params": [p], "rank": TENSORS[shape], "scale": 0.7, **LOW}
    literal = TensorGaLore(p, TENSORS[shape], scale=0.7, **LOW, **settings)
    follow_rounded(TensorGaLoreAdamW([group], **settings), p, literal)
