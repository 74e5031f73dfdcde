"""What our optimizers do not keep and do not make, in numbers derived from the shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from low_rank import FORMATS, TALL, WIDE, Param, run, step_peak
from ours import OURS, RANK, Ours

from galore_mem.optim import GaLoreAdamW, GaLoreMini
from galore_mem.partition import by_row

M, N = 256, 688
BYTES = {"float32": 4, "bfloat16": 2}


def builder(made: Any, **options: Any) -> Any:
    def build(regular: list[Any], projected: list[Any], named: list[Any]) -> Any:
        group = {"params": [(p.label, p) for p in projected], "rank": RANK, "update_proj_gap": 4}
        if made is GaLoreMini:
            options["partition"] = {p.label: by_row(tuple(p.shape)) for p in projected}
        return made([group], lr=1e-3, **options)

    return build


@pytest.mark.parametrize("shape", [WIDE, TALL], ids=["wide", "tall"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_a_galore_step_needs_the_low_rank_gradient_only(fmt: str, shape: tuple[int, int]) -> None:
    """r·l = 64 · 688 = 44,032 elements; the bar was 2·r·l + m·n, galore-torch takes 3·r·l + 2·m·n."""
    peak = step_peak(builder(GaLoreAdamW), (Param(shape),), fmt, 3)
    assert peak == RANK * N * BYTES[fmt] == 44_032 * BYTES[fmt]
    assert peak < (2 * RANK * N + M * N) * BYTES[fmt]


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_galore_mini_step_makes_nothing_of_the_weights_size(fmt: str) -> None:
    """Wide: the low-rank gradient (64 x 688) is gone when the projector (256 x 64) is divided. Tall: rows are divided
    on the first moment, in the gradient's tensor, beside 688 values in float32 and as many flags (rows without a
    gradient), or as many values in bfloat16."""
    wide = step_peak(builder(GaLoreMini), (Param(WIDE),), fmt, 3)
    tall = step_peak(builder(GaLoreMini), (Param(TALL),), fmt, 3)
    values = N * 4 + (N * 2 if fmt == "bfloat16" else N)
    assert wide == 44_032 * BYTES[fmt]
    assert tall == 44_032 * BYTES[fmt] + values


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("ours", OURS, ids=str)
def test_no_state_tensor_is_a_view_of_more(ours: Ours, fmt: str) -> None:
    """galore-torch's float32 projector keeps the SVD's whole factor alive: 256 x 256 for 256 x 64."""

    def build(regular: list[Any], projected: list[Any], named: list[Any]) -> Any:
        return ours.build([(p.label, p) for p in regular], [(p.label, p) for p in projected])

    optimizer, named = run(build, (Param(WIDE), Param(TALL), Param((512,), False)), fmt, 1)
    for p in named:
        tensors = [t for t in optimizer.state[p].values() if isinstance(t, torch.Tensor)]
        assert tensors
        for t in tensors:
            assert t.untyped_storage().nbytes() == t.numel() * t.element_size()
            assert t.grad_fn is None
            assert not t.requires_grad
