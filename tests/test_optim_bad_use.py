"""Options, parameters and groups that cannot be: one line that names the parameter where it is about one, and an
optimizer that exists goes on as if nothing had happened."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ours import OURS, Ours
from small import (
    GAP,
    PARAMS,
    RANK,
    build,
    decomposes,
    goes_on,
    parameters,
    refused,
    row,
    snapshot,
    train,
    values,
)

from galore_mem.errors import InputError
from galore_mem.optim import AdamMini, GaLoreAdamW, GaLoreMini, LayerWise
from galore_mem.optim.layerwise import has_hook
from galore_mem.partition import by_row

GALORE = row("galore")
DECOMPOSING = [ours for ours in OURS if decomposes(ours)]
LOW = [p.name for p in PARAMS if p.projected]
NAN, INF = float("nan"), float("inf")


# -- options ---------------------------------------------------------------------------------------


def bad_options(ours: Ours) -> Iterator[tuple[str, Any]]:
    """Values outside each option's range, by the range."""
    for name, allowed in ours.made.RANGES.items():
        yield from ((name, bad) for bad in (NAN, INF, -INF, "7", True, [1], 1j, torch.ones(2)))
        yield name, torch.tensor(0.5 if name != "lr" else -1.0)  # torch takes a tensor for the learning rate
        if allowed.least > -INF:
            yield name, (int if allowed.whole else float)(allowed.least - 1)
        if allowed.below < INF:
            yield name, allowed.below
        if allowed.whole:
            yield name, float(allowed.least + 1)
        if not allowed.optional:
            yield name, None
    for name, choices in ours.made.CHOICES.items():
        yield from ((name, bad) for bad in ("sideways", choices[0].upper(), None, 3))


@pytest.mark.parametrize("ours", OURS, ids=str)
def test_options_out_of_range(ours: Ours) -> None:
    named = parameters()
    regular, low = ([(n, p) for n, p in named if (n in LOW) == projected] for projected in (False, True))
    options = {"rank": RANK} if "rank" in ours.made.RANGES else {}
    seen = 0
    for name, bad in bad_options(ours):
        with pytest.raises(InputError, match=re.escape(name)) as caught:
            ours.build(regular, low, **{**options, name: bad})
        assert "\n" not in str(caught.value)
        seen += 1
    assert seen > 20
    for betas in ((1.0, 0.9), (0.9, 1.0), (-0.1, 0.9), (0.9,), 0.9, ("0.9", 0.9), (NAN, 0.9), (0.9, 0.9, 0.9), None):
        if "betas" in build(ours, parameters()).defaults:
            with pytest.raises(InputError, match="betas"):
                ours.build(regular, low, **options, betas=betas)


@pytest.mark.parametrize("rank", [0, -1, 4.0, True, "4", NAN])
def test_a_rank_says_what_it_may_be(rank: Any) -> None:
    message = rf"^rank must be a whole number of at least 1, or None, got {re.escape(repr(rank))}$"
    with pytest.raises(InputError, match=message):
        build(GALORE, parameters(), rank=rank)


@pytest.mark.parametrize("ours", [o for o in OURS if o.projects], ids=str)
def test_a_rank_above_the_shorter_side_is_clipped(ours: Ours) -> None:
    """All projected sides have at most 704 values: 10,000 is as good as each matrix's own."""
    ends = []
    for rank in (704, 10_000):
        named = parameters()
        optimizer = build(ours, named, rank=rank)
        train(named, optimizer, range(GAP + 1))
        ends.append([values(named), [snapshot([], optimizer)["state"]]])
    assert ends[0][1] == ends[1][1]
    assert all(torch.equal(p, ends[1][0][name]) for name, p in ends[0][0].items())


@pytest.mark.parametrize("approach", [0, 4, "3", None, 2.5])
def test_approaches(approach: Any) -> None:
    with pytest.raises(InputError, match="approach must be 1, 2 or 3"):
        GaLoreMini(parameters(), approach=approach)


# -- parameters and groups -------------------------------------------------------------------------

WHOLE, COMPLEX = torch.zeros(4, 4, dtype=torch.int64), torch.zeros(4, 4, dtype=torch.complex64)
EIGHT = torch.zeros(4, 4).to(torch.float8_e4m3fn)
MATRIX, VECTOR, CUBE = (torch.nn.Parameter(torch.zeros(shape)) for shape in ((4, 6), (5,), (2, 3, 4)))
GROUPS: dict[str, tuple[Any, str]] = {
    "vector": ({"params": [("a", MATRIX), ("b.bias", VECTOR)], "rank": 2}, r"^b\.bias has the shape \(5,\); .*rank"),
    "three dimensions": ({"params": [("conv", CUBE)], "rank": 2}, r"^conv has the shape \(2, 3, 4\); .*rank"),
    "whole numbers": (
        {"params": [("a", MATRIX), ("codes", WHOLE)]},
        "^codes is torch.int64; .* take torch.float16, torch.bfloat16",
    ),
    "complex": ({"params": [("phase", COMPLEX)], "rank": 2}, "^phase is torch.complex64; "),
    "eight bits": ({"params": [("small", EIGHT)]}, "^small is torch.float8_e4m3fn; "),
    "empty": ({"params": []}, r"group \d"),
    "none": ({"params": None}, r"group \d must be a dict with params"),
    "a none among them": ({"params": [("a", MATRIX), ("b", None)]}, r"group \d: .*NoneType"),
    "without params": ({"rank": 2}, r"group \d must be a dict with params"),
    "no dict": ([MATRIX], r"group \d must be a dict with params, got list"),
    "a set": ({"params": {MATRIX, VECTOR}}, r"group \d: .*ordered"),
    "not a leaf": ({"params": [("a", MATRIX * 2)]}, r"group \d: .*non-leaf"),
    "names for some": ({"params": [("a", MATRIX), VECTOR]}, r"group \d: .*names"),
    "without names": ({"params": [MATRIX]}, r"group \d: .*names"),
    "no number": ({"params": [("a", MATRIX)], "rank": "2"}, "^rank must be a whole number"),
    "a bad lr": ({"params": [("a", MATRIX)], "lr": -1.0}, "^lr must be a number of at least 0"),
}


@pytest.mark.parametrize("layerwise", [None, LayerWise()], ids=["step", "layer-wise"])
@pytest.mark.parametrize("case", GROUPS)
def test_groups_that_cannot_be(case: str, layerwise: LayerWise | None) -> None:
    """Added to an optimizer that has steps behind it."""
    group, message = GROUPS[case]
    named = parameters()
    optimizer = build(GALORE, named, layerwise)
    train(named, optimizer, range(2))
    with refused(named, optimizer, message):
        optimizer.add_param_group(group)
    assert not any(has_hook(p) for p in (MATRIX, VECTOR, CUBE))
    goes_on(GALORE, named, optimizer, range(2, GAP + 2))


@pytest.mark.parametrize("case", GROUPS)
def test_groups_that_cannot_be_from_the_start(case: str) -> None:
    """The first group is fine, and its parameters are free again when the second is refused."""
    group, message = GROUPS[case]
    fine = torch.nn.Parameter(torch.zeros(3))
    first = {"params": [("fine", fine)]}
    with pytest.raises(InputError, match=message):
        GaLoreAdamW([first, group], layerwise=LayerWise())
    assert not has_hook(fine)
    assert first == {"params": [("fine", fine)]}


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_a_parameter_twice() -> None:
    """Twice in a group it would be updated twice (torch warns only)."""
    with pytest.raises(InputError, match=r"^tied is in group 0 twice$"):
        GaLoreAdamW([("first", MATRIX), ("tied", MATRIX)])
    with pytest.raises(InputError, match=r"group 1: .*more than one parameter group"):
        GaLoreAdamW([{"params": [("first", MATRIX)]}, {"params": [("tied", MATRIX)], "rank": 2}])


@pytest.mark.parametrize(
    "params", [[], (), iter(()), None, 7, MATRIX], ids=["list", "tuple", "iterator", "none", "7", "p"]
)
@pytest.mark.parametrize("made", sorted({ours.made for ours in OURS}, key=lambda made: made.__name__))
def test_no_parameters(made: Any, params: Any) -> None:
    with pytest.raises(InputError, match=r"no parameters|params must be an iterable"):
        made(params)


def test_names_are_needed_for_partitions() -> None:
    with pytest.raises(InputError, match=r"AdamMini decides by names .*named_parameters"):
        AdamMini([MATRIX])
    with pytest.raises(InputError, match=r"GaLoreMini decides by names .*named_parameters"):
        GaLoreMini([{"params": [MATRIX], "rank": 2}])
    with pytest.raises(
        InputError,
        match=r"^layer.q_proj.weight: .*form a head is not known; pass partition=galore_mem.optim.partition_of",
    ):
        AdamMini([("layer.q_proj.weight", MATRIX)])


@pytest.mark.parametrize("made", [AdamMini, GaLoreMini])
def test_a_partition_that_does_not_fit(made: Any) -> None:
    named = [("a.weight", torch.nn.Parameter(torch.zeros(4, 6)))]
    with pytest.raises(InputError, match=r"^a.weight: the partition has 5 rows, and the parameter 4"):
        made(named, partition={"a.weight": by_row((5, 6))})
    with pytest.raises(InputError, match=r"^a.weight: the partition has 5 rows, and the parameter 4"):
        made([{"params": named, "partition": [by_row((5, 6))]}])
    with pytest.raises(InputError, match=r"^partition has 2 entries for 1 parameters$"):
        made([{"params": named, "partition": [by_row((4, 6))] * 2}])


@pytest.mark.parametrize("made", [AdamMini, GaLoreMini])
def test_a_partition_told_in_a_group_can_be_saved(made: Any, tmp_path: Path) -> None:
    """`weights_only=True` takes tuples, not a `Partition`."""
    optimizer = made([{"params": [("a", MATRIX)], "partition": [by_row((4, 6))]}])
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    optimizer.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert optimizer.param_groups[0]["partition"] == [(((4, 1),), 1, 0)]


# -- layer-wise ------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, -1, 1.0, True, "2", None, NAN])
def test_accumulation_steps(steps: Any) -> None:
    with pytest.raises(InputError, match="gradient_accumulation_steps must be a whole number of at least 1"):
        LayerWise(steps)


@pytest.mark.parametrize("value", [0, 0.0, -1.0, NAN, INF, True, "1"])
def test_clip_values(value: Any) -> None:
    with pytest.raises(InputError, match="clip_value must be"):
        LayerWise(clip_value=value)


@pytest.mark.parametrize("layerwise", [True, False, 2, {"clip_value": 1.0}, LayerWise])
def test_layerwise_is_a_layerwise(layerwise: Any) -> None:
    with pytest.raises(InputError, match="layerwise must be a LayerWise or None"):
        GaLoreAdamW([MATRIX], layerwise=layerwise)


def test_numbers_of_numpy_become_pythons(tmp_path: Path) -> None:
    """A learning rate out of `np.logspace` is usual, and `weights_only=True` refuses it in a file."""
    numbers = {"lr": np.float64(0.01), "eps": np.float32(0.5), "rank": np.int64(2), "betas": [np.float64(0.5), 0.25]}
    optimizer = GaLoreAdamW([("a", MATRIX)], **numbers)  # type: ignore[arg-type]  # wrong on purpose
    group = optimizer.param_groups[0]
    assert [type(group[name]) for name in ("lr", "eps", "rank")] == [float, float, int]
    assert group["betas"] == (0.5, 0.25)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    optimizer.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))


def test_parts_of_a_parameter(tmp_path: Path) -> None:
    """A shard (FSDP, tensor parallelism) has other singular vectors than the matrix."""
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        shard = torch.nn.Parameter(distribute_tensor(torch.zeros(4, 6), init_device_mesh("cpu", (1,)), [Shard(0)]))
        with pytest.raises(InputError, match=r"^a.weight is a distributed tensor; .* whole parameters"):
            GaLoreAdamW([("a.weight", shard)], rank=2)
    finally:
        torch.distributed.destroy_process_group()


def test_several_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One process that torch.distributed knows about is fine."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        GaLoreAdamW([MATRIX], layerwise=LayerWise()).remove_hooks()
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: 2)
        with pytest.raises(InputError, match="one process only"):
            GaLoreAdamW([MATRIX], layerwise=LayerWise())
        assert not has_hook(MATRIX)
        GaLoreAdamW([MATRIX])  # after DDP has reduced the gradients, any number
    finally:
        torch.distributed.destroy_process_group()
