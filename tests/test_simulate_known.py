"""Values that follow from shapes alone, asked for by programs that run without values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from galore_mem.errors import InputError
from galore_mem.setup import Setup, recipe
from galore_mem.simulate.session import META, Traced, trace
from galore_mem.simulate.tracing import known
from galore_mem.simulate.tracing.values import EVENLY

FP32 = Setup(recipe("fp32"), device="cpu")


def run(program: Callable[[], Any]) -> tuple[Any, Traced]:
    """What a program returns where nothing has values, and its trace."""
    found: list[Any] = []

    def traced(meter: Any) -> None:
        meter.enter("here")
        with META:
            found.append(program())

    return found, trace(traced, FP32)


def causal(n: int) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool).tril()


def filled() -> Tensor:
    t = torch.empty(2, 3, dtype=torch.long)
    t.fill_(4)
    t[:, 1].add_(torch.arange(2))  # [[4, 4, 4], [4, 5, 4]]
    return t


ASKED: dict[str, tuple[Callable[[], Any], Any]] = {
    "one of a row of positions": (lambda: torch.arange(6).view(2, 3)[1, 0].item(), 3),
    "a list": (lambda: torch.arange(6).view(2, 3)[:, -1].tolist(), [2, 5]),
    "are positions packed": (lambda: bool((torch.arange(5).diff() != 1).any()), False),
    "are two equal": (lambda: torch.equal(torch.arange(3), torch.arange(1, 4) - 1), True),
    "entries of a causal mask": (lambda: tuple(causal(5).nonzero().shape), (15, 2)),  # 5 * 6 / 2
    "what a mask selects of anything": (lambda: tuple(torch.randn(4, 4)[causal(4)].shape), (10,)),
    "after a part was changed": (lambda: filled().tolist(), [[4, 4, 4], [4, 5, 4]]),
    "nothing is selected": (lambda: tuple(torch.zeros(3, dtype=torch.bool).nonzero().shape), (0, 1)),
    "how often": (lambda: torch.zeros(3, dtype=torch.long).repeat_interleave(torch.arange(3)).shape[0], 3),  # 0 + 1 + 2
}


@pytest.mark.parametrize("name", ASKED)
def test_what_follows_from_shapes_is_answered(name: str) -> None:
    program, expected = ASKED[name]
    (found,), traced = run(program)
    assert found == expected
    assert not traced.assumed


def changed() -> Any:
    t = torch.arange(3.0)
    t.add_(torch.randn(3))
    return t.nonzero()


def too_large() -> Any:
    return torch.zeros(3, 3).nonzero()


@pytest.mark.parametrize("program", [lambda: torch.randn(3).nonzero(), changed, lambda: torch.empty(3).tolist()])
def test_what_does_not_is_refused(program: Callable[[], Any]) -> None:
    with pytest.raises(InputError, match="the program asks for values"):
        run(program)


def test_what_is_large_is_not_worked_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known, "LARGEST", 8)
    with pytest.raises(InputError, match=r"the program asks for values, by aten.nonzero"):
        run(too_large)


def routed() -> list[int]:
    """As mixtures of experts that loop: 6 tokens choose 2 of 4."""
    chosen = torch.randn(6, 4).topk(2).indices
    mask = torch.nn.functional.one_hot(chosen, 4).permute(2, 1, 0)
    return [torch.where(mask[i])[0].shape[0] for i in range(4)]


def test_experts_are_chosen_equally_often() -> None:
    """12 choices among 4 experts; the answer rests on it, and says so."""
    (found,), traced = run(routed)
    assert found == [3, 3, 3, 3]
    assert [one.answer for one in traced.assumed] == [EVENLY]


def test_a_choice_that_nobody_asks_for_is_not_told() -> None:
    _, traced = run(lambda: torch.randn(6, 4).gather(1, torch.randn(6, 4).topk(2).indices))
    assert not traced.assumed


def test_storages_are_forgotten_when_they_go() -> None:
    """The place of a storage is used again; what was known of the one before is not said of the next."""

    def program() -> Any:
        for _ in range(50):
            a = torch.ones(7)
            del a
            b = torch.randn(7)
            with pytest.raises(NotImplementedError):
                b.nonzero()
            del b

    run(program)
