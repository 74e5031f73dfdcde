"""Layouts beside torch's own: any order of dimensions, gaps, dimensions of size 1 and expanded ones."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from galore_mem.memory.strides import (
    broadcast,
    contiguous_strides,
    is_contiguous,
    is_dense,
    result_strides,
    view_strides,
)

SIZES = st.integers(1, 3)


@st.composite
def tensors(draw: st.DrawFn, wanted: tuple[int, ...] | None = None) -> torch.Tensor:
    """A permuted tensor, perhaps with gaps, some dimensions of size 1 expanded; of `wanted` shape if one is given."""
    full = wanted or tuple(draw(st.lists(SIZES, min_size=1, max_size=4)))
    shape = [draw(st.sampled_from((1, n))) for n in full]
    order = draw(st.permutations(range(len(shape))))
    gaps = [draw(st.sampled_from((0, 0, 1))) for _ in shape]
    made = torch.empty([shape[d] + gap for d, gap in zip(order, gaps, strict=True)])
    for d, gap in enumerate(gaps):
        made = made.narrow(d, 0, made.shape[d] - gap)
    made = made.permute([order.index(d) for d in range(len(shape))])
    return made.expand(full) if draw(st.booleans()) else made


@st.composite
def pairs(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """Two tensors that broadcast together, perhaps one with fewer dimensions."""
    full = tuple(draw(st.lists(SIZES, min_size=1, max_size=4)))
    first = draw(tensors(full))
    second = draw(tensors(full[draw(st.integers(0, len(full) - 1)) :]))
    return (first, second) if draw(st.booleans()) else (second, first)


def shapes(t: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(t.shape), t.stride()


def same_layout(found: tuple[int, ...], t: torch.Tensor) -> bool:
    """Equal strides, but for dimensions of size 1, whose stride means nothing."""
    return all(a == b for a, b, size in zip(found, t.stride(), t.shape, strict=True) if size != 1)


@given(tensors())
def test_kinds_of_layout(t: torch.Tensor) -> None:
    assert is_contiguous(*shapes(t)) == t.is_contiguous()
    assert is_dense(*shapes(t)) == torch.ops.aten.is_non_overlapping_and_dense(t)
    assert same_layout(contiguous_strides(tuple(t.shape)), t.contiguous())


@given(tensors())
def test_copies_keep_the_order_of_dimensions(t: torch.Tensor) -> None:
    assert same_layout(result_strides(tuple(t.shape), shapes(t)), torch.empty_like(t))


@given(pairs())
def test_elementwise_results(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    a, b = pair
    result = a + b
    shape = broadcast(tuple(a.shape), tuple(b.shape))
    assert shape == tuple(result.shape)
    assert same_layout(result_strides(shape, shapes(a), shapes(b)), result)


@given(tensors(), st.data())
def test_views(t: torch.Tensor, data: st.DataObject) -> None:
    """A shape with two dimensions merged, or one split into itself and 1, or all in one."""
    shape = list(t.shape)
    at = data.draw(st.integers(0, len(shape) - 1))
    new = data.draw(
        st.sampled_from(
            (
                [*shape[:at], -1, *shape[at + 2 :]],
                [*shape[:at], 1, *shape[at:]],
                [-1],
                [*shape[:at], *shape[at + 1 :], -1],
            )
        )
    )
    target = tuple(torch.empty(t.shape).view(new).shape)
    try:
        seen = t.view(target)
    except RuntimeError:
        assert view_strides(*shapes(t), target) is None
    else:
        found = view_strides(*shapes(t), target)
        assert found is not None
        assert same_layout(found, seen)
