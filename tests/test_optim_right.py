"""The optimizers against literal transcriptions of their papers (`literal.py`), in float64, step by step.

22 steps with a gap of 7 refresh at steps 0, 7, 14 and 21. ε is 1e-3, so that where it is added shows.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from literal import AdamMini as LiteralMini
from literal import AdamW as LiteralAdamW
from literal import GaLore, Literal, Projector
from literal import GaLoreMini as LiteralGaLoreMini
from literal_blocks import HEADS, KINDS, Kind
from literal_follow import follow, follow_rounded, start

from galore_mem.optim import AdamMini, GaLoreAdamW, GaLoreMini
from galore_mem.partition import partition

SETTINGS: dict[str, Any] = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}
LOW: dict[str, Any] = {"update_proj_gap": 7}
SIDES = ("std", "reverse_std", "left", "right", "full")
# tall, wide, square; a rank above the smaller side, which is clipped; sides of two and of one
SHAPES = {(10, 6): 4, (6, 10): 4, (8, 8): 3, (3, 11): 5, (12, 2): 2, (1, 7): 1}
APPROACHES = (1, 2, 3)
REFRESHES = 4

Group = dict[str, Any]


def group(name: str, p: torch.nn.Parameter, rank: int | None = None, **options: Any) -> Group:
    return {"params": [(name, p)], **({} if rank is None else {"rank": rank, **LOW, **options})}


def refreshes(literal: Literal) -> int:
    projector = literal.projector  # type: ignore[attr-defined]  # the literal of one that projects
    assert isinstance(projector, Projector)
    return projector.refreshes


# -- GaLore ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("carry", [False, True], ids=["kept", "carried"])
@pytest.mark.parametrize("proj_type", SIDES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_galore(shape: tuple[int, int], proj_type: str, carry: bool) -> None:
    p, vector = start(shape), start((7,), 101)
    low = {**LOW, "proj_type": proj_type, "carry_moments": carry}
    rank = SHAPES[shape]
    optimizer = GaLoreAdamW([group("w", p, rank, scale=0.7, **low), group("norm", vector)], **SETTINGS)
    literals: dict[torch.nn.Parameter, Literal] = {
        p: GaLore(p, rank, scale=0.7, low=low, **SETTINGS),
        vector: LiteralAdamW(vector, **SETTINGS),
    }
    follow(optimizer, literals)
    assert refreshes(literals[p]) == REFRESHES


def test_galore_with_the_defaults() -> None:
    """The defaults of the signature are the literal's: scale 0.25, gap 200, β 0.9 and 0.999, ε 1e-8, no decay."""
    p = start((6, 9))
    follow(GaLoreAdamW([("w", p)], rank=3), {p: GaLore(p, 3, low={})})


# -- Adam-mini ---------------------------------------------------------------------------------------


def found(kind: Kind) -> Any:
    return partition(kind.name, kind.shape, HEADS, transposed=kind.transposed)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_adam_mini(kind: Kind) -> None:
    p = start(kind.shape)
    optimizer = AdamMini([(kind.name, p)], partition={kind.name: found(kind)}, **SETTINGS)
    follow(optimizer, {p: LiteralMini(p, kind.blocks, transposed=kind.transposed, **SETTINGS)})


# -- GaLore-mini -------------------------------------------------------------------------------------


def mini(
    kind: Kind,
    approach: int,
    dtype: torch.dtype = torch.float64,
    settings: dict[str, Any] = SETTINGS,
    **low: Any,
) -> tuple[GaLoreMini, dict[torch.nn.Parameter, Literal]]:
    """GaLore-mini over one parameter, at rank 4, and its twin."""
    p = start(kind.shape, dtype=dtype)
    low = {**LOW, **low}
    optimizer = GaLoreMini(
        [group(kind.name, p, 4, scale=0.7, **low)],
        approach=approach,
        partition={kind.name: found(kind)},
        **settings,
    )
    twin = LiteralGaLoreMini(
        p, 4, kind.blocks, approach=approach, scale=0.7, low=low, transposed=kind.transposed, **settings
    )
    return optimizer, {p: twin}


@pytest.mark.parametrize("approach", APPROACHES)
@pytest.mark.parametrize("proj_type", SIDES)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.projected], ids=str)
def test_galore_mini(kind: Kind, proj_type: str, approach: int) -> None:
    optimizer, literals = mini(kind, approach, proj_type=proj_type)
    follow(optimizer, literals)
    assert all(refreshes(literal) == REFRESHES for literal in literals.values())


@pytest.mark.parametrize("approach", APPROACHES)
@pytest.mark.parametrize("proj_type", SIDES)
@pytest.mark.parametrize("kind", [KINDS[0], KINDS[5]], ids=str)
def test_galore_mini_carries_moments_over(kind: Kind, proj_type: str, approach: int) -> None:
    """Of approach 1 also the second moments, which are of low-rank rows."""
    optimizer, literals = mini(kind, approach, proj_type=proj_type, carry_moments=True)
    follow(optimizer, literals)


@pytest.mark.parametrize("approach", APPROACHES)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.projected], ids=str)
def test_galore_mini_gives_other_parameters_adam_mini(kind: Kind, approach: int) -> None:
    p = start(kind.shape)
    optimizer = GaLoreMini([group(kind.name, p)], approach=approach, partition={kind.name: found(kind)}, **SETTINGS)
    follow(optimizer, {p: LiteralMini(p, kind.blocks, **SETTINGS)})


# -- when a projector is renewed ---------------------------------------------------------------------


def lazily(made: type, shape: tuple[int, int], **low: Any) -> tuple[Any, torch.nn.Parameter, Literal]:
    p = start(shape)
    if made is GaLoreAdamW:
        return GaLoreAdamW([group("w", p, 3, **low)], **SETTINGS), p, GaLore(p, 3, low={**LOW, **low}, **SETTINGS)
    rows = [[i] for i in range(shape[0])]
    literal = LiteralGaLoreMini(p, 3, rows, low={**LOW, **low}, **SETTINGS)
    return GaLoreMini([group("w", p, 3, **low)], **SETTINGS), p, literal


MADE = [GaLoreAdamW, GaLoreMini]
# From gap 2, after every third refresh that is compared with one before; 40 steps.
# times 2:   0 2 4 6 | 10 14 18 | 26 34; times 1.5, rounded down: 0 2 4 6 | 9 12 15 | 19 23 27 | 33 39
GROWN = {2.0: (9, 8), 1.5: (12, 6)}


@pytest.mark.parametrize("proj_type", ["std", "full"])
@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("gamma", GROWN)
def test_the_gap_grows(made: type, proj_type: str, gamma: float) -> None:
    optimizer, p, literal = lazily(
        made, (7, 9), update_proj_gap=2, cos_threshold=0.0, gamma_proj=gamma, queue_size=3, proj_type=proj_type
    )
    follow(optimizer, {p: literal}, steps=40)
    assert (refreshes(literal), optimizer.state[p]["gap"]) == GROWN[gamma]


@pytest.mark.parametrize("proj_type", ["std", "full"])
@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("threshold", [0.5, 0.6, 0.7, 0.99])
def test_the_gap_grows_where_projectors_are_alike(made: type, proj_type: str, threshold: float) -> None:
    """The gradients drift; similarities are 0.2 to 0.9. Similarities are float32 means: 1e-6."""
    optimizer, p, literal = lazily(
        made, (7, 9), update_proj_gap=2, cos_threshold=threshold, queue_size=2, proj_type=proj_type
    )
    follow(optimizer, {p: literal}, steps=40)
    state, projector = optimizer.state[p], literal.projector  # type: ignore[attr-defined]  # the literal of one that projects
    assert state["similarities"] == pytest.approx(projector.similarities, rel=1e-6)
    assert (state.get("gap", 2), state["next_refresh"]) == (projector.gap, projector.next)
    if threshold == 0.99:
        assert refreshes(literal) == 20


@pytest.mark.parametrize("made", MADE)
def test_the_gap_grows_after_each_of_some_was_alike(made: type) -> None:
    """Rank 1, and a gradient along one axis or another: similarities are 1 or 0. With a queue of 3 and a threshold of
    0.5, the axes 0 0 0 1 1 1 1 make 1 1 0 1 1 1: only the last three are all alike, at the seventh refresh, step 12.
    Its gap of 4 leads to 16 and 20, where 1 1 follow, and to 24, whose axis is another: it stays 4."""
    p = start((4, 5))
    rest = {"update_proj_gap": 2, "cos_threshold": 0.5, "queue_size": 3}
    optimizer = made([group("w", p, 1, **rest)], **SETTINGS)
    axes = {0: 0, 2: 0, 4: 0, 6: 1, 8: 1, 10: 1, 12: 1, 16: 1, 20: 1, 24: 2}
    refreshed = []
    for t in range(28):
        axis = axes.get(t, 3)
        p.grad = torch.zeros(4, 5, dtype=torch.float64)
        p.grad[axis, axis] = -2.0
        before = optimizer.state[p].get("next_refresh", 0)
        optimizer.step()
        if optimizer.state[p]["next_refresh"] != before:
            refreshed.append(t)
    assert refreshed == list(axes)
    assert optimizer.state[p]["gap"] == 4


# -- learning rates, missing gradients ---------------------------------------------------------------


def everything(settings: dict[str, Any]) -> list[tuple[torch.optim.Optimizer, dict[torch.nn.Parameter, Literal]]]:
    made: list[tuple[torch.optim.Optimizer, dict[torch.nn.Parameter, Literal]]] = []
    p, q = start((6, 9)), start((5,), 101)
    made.append(
        (
            GaLoreAdamW([group("w", p, 3), group("norm", q)], **settings),
            {p: GaLore(p, 3, low=LOW, **settings), q: LiteralAdamW(q, **settings)},
        )
    )
    for approach in APPROACHES:
        p, q = start((6, 9)), start((5,), 101)
        rows = [[i] for i in range(6)]
        made.append(
            (
                GaLoreMini([group("w", p, 3), group("norm", q)], approach=approach, **settings),
                {
                    p: LiteralGaLoreMini(p, 3, rows, approach=approach, low=LOW, **settings),
                    q: LiteralMini(q, [list(range(5))], **settings),
                },
            )
        )
    p, q = start((6, 9)), start((5,), 101)
    made.append(
        (
            AdamMini([("w", p), ("norm", q)], **settings),
            {p: LiteralMini(p, rows, **settings), q: LiteralMini(q, [list(range(5))], **settings)},
        )
    )
    return made


@pytest.mark.parametrize("which", range(5))
def test_schedulers(which: int) -> None:
    """Weight decay is multiplied by the learning rate of its step."""
    optimizer, literals = everything(SETTINGS)[which]
    rate = lambda t: 1.0 / (1 + t) + (t % 3)  # noqa: E731  # a schedule in a line
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    follow(optimizer, literals, lr=lambda t: 0.02 * rate(t), scheduler=scheduler)


@pytest.mark.parametrize("which", range(5))
def test_a_parameter_without_a_gradient_stays(which: int) -> None:
    """Its step is not counted, nor is its weight decayed: torch does so. The first has none in steps 0 and 7."""
    optimizer, literals = everything(SETTINGS)[which]
    follow(optimizer, literals, skip=lambda t, i: t in ((0, 7), (3,))[i])


# -- other formats -----------------------------------------------------------------------------------

# weights of the size of an update, so that the update shows beside the weight's rounding
ROUNDED: dict[str, Any] = {"lr": 0.5, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}
FORMATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("proj_type", ["left", "right", "full"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_galore_rounded(shape: tuple[int, int], proj_type: str, dtype: torch.dtype) -> None:
    p, low, rank = start(shape, dtype=dtype), {**LOW, "proj_type": proj_type}, SHAPES[shape]
    follow_rounded(
        GaLoreAdamW([group("w", p, rank, scale=0.7, **low)], **ROUNDED),
        p, GaLore(p, rank, scale=0.7, low=low, **ROUNDED),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_adam_mini_rounded(kind: Kind, dtype: torch.dtype) -> None:
    p = start(kind.shape, dtype=dtype)
    optimizer = AdamMini([(kind.name, p)], partition={kind.name: found(kind)}, **ROUNDED)
    follow_rounded(optimizer, p, LiteralMini(p, kind.blocks, transposed=kind.transposed, **ROUNDED))
    assert optimizer.state[p]["exp_avg_sq"].dtype == torch.float32


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("approach", APPROACHES)
@pytest.mark.parametrize("proj_type", ["left", "right", "full"])
@pytest.mark.parametrize("kind", [KINDS[0], KINDS[5], KINDS[7]], ids=str)
def test_galore_mini_rounded(kind: Kind, proj_type: str, approach: int, dtype: torch.dtype) -> None:
    optimizer, literals = mini(kind, approach, dtype, ROUNDED, proj_type=proj_type)
    ((p, literal),) = literals.items()
    follow_rounded(optimizer, p, literal)
    assert optimizer.state[p]["exp_avg_sq"].dtype == torch.float32
