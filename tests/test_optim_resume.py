"""Save, load, continue equals never having stopped, to the bit: parameters, every state tensor, options and counts."""

from __future__ import annotations

import copy
import io
import zipfile
from typing import Any

import pytest
import torch
from ours import OURS, Named, Ours
from small import (
    FORMATS,
    GAP,
    PARAMS,
    RANK,
    build,
    decomposes,
    gradients,
    parameters,
    push,
    row,
    snapshot,
    train,
    values,
)
from torch.optim.lr_scheduler import LambdaLR

from galore_mem.optim import GaLoreAdamW, GaLoreMini, LayerWise, ParameterWise

STEPS = 2 * GAP + 2  # projectors are renewed at 0, GAP and 2·GAP
GALORE = row("galore")
KINDS = {"normal": None, "layer-wise": LayerWise()}
# Projectors that are compared and turned at each refresh: what they add to the state is saved too.
ADAPTIVE = {"cos_threshold": 0.1, "queue_size": 2, "gamma_proj": 2, "carry_moments": True}


def saved(content: Any) -> Any:
    """`content` through a file, as `torch.load` takes it by default."""
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def falling(optimizer: ParameterWise) -> LambdaLR:
    return LambdaLR(optimizer, lambda step: 0.9**step)


def run(named: Named, optimizer: ParameterWise, schedule: LambdaLR, steps: range, fmt: str) -> None:
    for step in steps:
        train(named, optimizer, range(step, step + 1), fmt)
        schedule.step()


def resumed(ours: Ours, content: Any, kind: LayerWise | None, fmt: str, **options: Any) -> Any:
    """Fresh objects, made with other values where a saved one must win, with what was saved in them."""
    named = parameters(fmt, seed=5)
    optimizer = build(ours, named, kind, lr=123.0, **options)
    schedule = falling(optimizer)
    with torch.no_grad():
        for name, p in named:
            p.copy_(content["weights"][name])
    optimizer.load_state_dict(content["optimizer"])
    schedule.load_state_dict(content["schedule"])
    return named, optimizer, schedule


@pytest.mark.parametrize("first", KINDS)
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("ours", OURS, ids=str)
def test_a_resumed_run_is_the_run(ours: Ours, fmt: str, first: str) -> None:
    """Saved between two refreshes (after GAP - 1 steps) and right before one (after GAP); continued as the same kind
    and as the other. A `lr` of 123 in the fresh optimizer would show at once."""
    named = parameters(fmt)
    optimizer = build(ours, named, KINDS[first])
    schedule = falling(optimizer)
    files = {}
    for stop in (GAP - 1, GAP):
        run(named, optimizer, schedule, range(stop - 1 if files else 0, stop), fmt)
        content = {"weights": values(named), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
        files[stop] = saved(content)
    run(named, optimizer, schedule, range(GAP, STEPS), fmt)
    end = snapshot(named, optimizer)
    for stop, content in files.items():
        for kind in KINDS.values():
            again, fresh, timed = resumed(ours, content, kind, fmt)
            run(again, fresh, timed, range(stop, STEPS), fmt)
            assert snapshot(again, fresh) == end, (stop, kind)
            assert timed.state_dict() == schedule.state_dict()


@pytest.mark.parametrize("fmt", ["float32", "bfloat16"])
@pytest.mark.parametrize("ours", [o for o in OURS if decomposes(o)], ids=str)
def test_what_a_refresh_learns_is_saved(ours: Ours, fmt: str) -> None:
    """With adaptive refreshes the similarities seen and each parameter's gap are part of the state."""
    named = parameters(fmt)
    optimizer = build(ours, named, **ADAPTIVE)
    schedule = falling(optimizer)
    run(named, optimizer, schedule, range(2 * GAP + 1), fmt)
    content = {"weights": values(named), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
    content = saved(content)
    run(named, optimizer, schedule, range(2 * GAP + 1, 6 * GAP), fmt)
    # two refreshes with similar projectors (GAP, 2·GAP) double the gap: the next is at 2·GAP + 2·GAP
    low = dict(named)["up_proj.weight"]
    assert optimizer.state[low]["gap"] == 2 * GAP
    again, fresh, timed = resumed(ours, content, None, fmt, **ADAPTIVE)
    run(again, fresh, timed, range(2 * GAP + 1, 6 * GAP), fmt)
    assert snapshot(again, fresh) == snapshot(named, optimizer)


@pytest.mark.parametrize("step", [GAP - 1, GAP], ids=["between", "at a refresh"])
@pytest.mark.parametrize("clip", [None, 0.5], ids=["no clipping", "clipping"])
@pytest.mark.parametrize("ours", OURS, ids=str)
def test_saved_within_an_accumulation(ours: Ours, clip: float | None, step: int) -> None:
    """After one of three backward passes. The low-rank sums are in the state; gradients that stay whole are the
    user's to keep and to put back."""
    how = LayerWise(3, clip)
    named = parameters()
    optimizer = build(ours, named, how)
    train(named, optimizer, range(step), micro=3)
    push(named, gradients(3 * step))
    kept = {name: p.grad for name, p in named if p.grad is not None}
    content = saved({"weights": values(named), "optimizer": optimizer.state_dict(), "gradients": kept})

    again = parameters(seed=5)
    fresh = build(ours, again, how)
    with torch.no_grad():
        for name, p in again:
            p.copy_(content["weights"][name])
            p.grad = content["gradients"].get(name)
    fresh.load_state_dict(content["optimizer"])
    for these, theirs in ((named, optimizer), (again, fresh)):
        push(these, gradients(3 * step + 1))
        push(these, gradients(3 * step + 2))
        assert all(p.grad is None for _, p in these)
        theirs.step()
        train(these, theirs, range(step + 1, STEPS), micro=3)
    assert snapshot(again, fresh) == snapshot(named, optimizer)


# -- copies ----------------------------------------------------------------------------------------


def pickled(both: Any) -> Any:
    file = io.BytesIO()
    torch.save(both, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("how", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ours", OURS, ids=str)
def test_a_copy_goes_its_own_way(ours: Ours, kind: str, how: Any) -> None:
    """A copy of parameters and optimizer continues like the original, layer-wise too, and leaves that alone."""
    named = parameters()
    optimizer = build(ours, named, KINDS[kind])
    train(named, optimizer, range(GAP - 1))
    before = snapshot(named, optimizer)
    again, fresh = how((named, optimizer))
    assert snapshot(again, fresh) == before
    train(again, fresh, range(GAP - 1, STEPS))
    assert snapshot(named, optimizer) == before
    train(named, optimizer, range(GAP - 1, STEPS))
    assert snapshot(again, fresh) == snapshot(named, optimizer)
    if kind == "layer-wise":
        push(again, gradients(0))
        assert all(p.grad is None for _, p in again)


def test_a_copy_with_a_scheduler_and_a_clip_value() -> None:
    """A scheduler wraps the `step` of the optimizer it is for: a copy must have one of its own. And it still clips."""
    named = parameters()
    optimizer = build(GALORE, named, LayerWise(clip_value=0.1))
    falling(optimizer)
    train(named, optimizer, range(2))
    before = snapshot(named, optimizer)
    again, fresh = copy.deepcopy((named, optimizer))
    train(again, fresh, range(2, 4))
    assert snapshot(named, optimizer) == before
    train(named, optimizer, range(2, 4))
    assert snapshot(again, fresh) == snapshot(named, optimizer)


def test_a_shallow_copy_does_not_update_twice() -> None:
    named, twin = parameters(), parameters()
    optimizer, alone = (build(GALORE, these, LayerWise()) for these in (named, twin))
    copy.copy(optimizer)
    train(named, optimizer, range(2))
    train(twin, alone, range(2))
    assert snapshot(named, optimizer) == snapshot(twin, alone)


def test_a_copy_partitions_later_groups_too() -> None:
    """What the optimizer was told at first is copied with it."""
    named = parameters()
    first = {"params": [(n, p) for n, p in named if n == "up_proj.weight"], "rank": RANK}
    later = {"params": [(n, p) for n, p in named if n == "q_proj.weight"], "rank": RANK}
    partition = build(row("galore-mini"), parameters())._partitions  # type: ignore[attr-defined]  # of a GaLoreMini
    fresh = copy.deepcopy(GaLoreMini([first], partition=partition))
    fresh.add_param_group(later)
    assert fresh.param_groups[1]["partition"] == [(((2, 8),), 1, 0)]


# -- the file --------------------------------------------------------------------------------------


def ledger_bytes(ours: Ours, fmt: str) -> int:
    """What the method's ledger says is kept for all parameters, and once for the optimizer."""
    how = ours.job(RANK)
    own = sum(b.nbytes for p in PARAMS for b in ours.ledger.state(p.trained(fmt), how))
    return own + sum(b.nbytes for b in ours.ledger.shared(how))


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("ours", OURS, ids=str)
def test_the_file_holds_the_ledgers_tensors(ours: Ours, fmt: str) -> None:
    """A view would be saved with its whole storage. `torch.save` writes a zip file with one record per storage;
    what else is in it (numbers, names, alignment) is below 512 bytes per record and 4 KiB in all."""
    named = parameters(fmt)
    optimizer = build(ours, named)
    train(named, optimizer, range(GAP + 1), fmt)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    records = [entry.file_size for entry in zipfile.ZipFile(file).infolist() if "/data/" in entry.filename]
    assert sum(records) == ledger_bytes(ours, fmt)
    assert len(file.getvalue()) < sum(records) + 512 * len(records) + 4096


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("ours", OURS, ids=str)
def test_a_loaded_state_is_no_larger(ours: Ours, fmt: str) -> None:
    named = parameters(fmt)
    optimizer = build(ours, named)
    train(named, optimizer, range(1), fmt)
    fresh = build(ours, parameters(fmt))
    given = saved(optimizer.state_dict())
    fresh.load_state_dict(given)
    tensors = [t for state in fresh.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    assert sum(storages.values()) == ledger_bytes(ours, fmt)
    theirs = [t for state in given["state"].values() for t in state.values() if isinstance(t, torch.Tensor)]
    assert not storages.keys() & {t.untyped_storage().data_ptr() for t in theirs}


# -- what loading replaces -------------------------------------------------------------------------


def test_users_hooks_see_a_state_and_can_change_it() -> None:
    """As torch documents them: `before` may return another state, `after` finds it loaded."""
    named = parameters()
    optimizer = build(GALORE, named)
    train(named, optimizer, range(1))
    fresh = build(GALORE, parameters())
    seen = []

    def before(_: object, state: dict[str, Any]) -> dict[str, Any]:
        seen.append(all(isinstance(kept["exp_avg"], torch.Tensor) for kept in state["state"].values()))
        return {**state, "param_groups": [{**group, "lr": 0.5} for group in state["param_groups"]]}

    fresh.register_load_state_dict_pre_hook(before)
    fresh.register_load_state_dict_post_hook(lambda o: seen.append(o.param_groups[0]["lr"]))
    fresh.load_state_dict(optimizer.state_dict())
    assert seen == [True, 0.5]


def test_a_state_moves_between_formats() -> None:
    """A bfloat16 run continues in float32: tensors are widened, so nothing is lost."""
    named = parameters("bfloat16")
    optimizer = build(GALORE, named)
    train(named, optimizer, range(2), "bfloat16")
    fresh = build(GALORE, parameters())
    fresh.load_state_dict(saved(optimizer.state_dict()))
    for old, new in zip(optimizer.state.values(), fresh.state.values(), strict=True):
        assert new["exp_avg"].dtype is torch.float32
        assert torch.equal(new["exp_avg"], old["exp_avg"].float())


def test_options_that_a_saved_group_lacks_are_those_of_the_optimizer() -> None:
    """A file of an earlier version, without an option that came later."""
    named = parameters()
    optimizer = build(GALORE, named)
    train(named, optimizer, range(1))
    old = saved(optimizer.state_dict())
    for group in old["param_groups"]:
        del group["carry_moments"]
    fresh = build(GALORE, parameters(), carry_moments=True)
    fresh.load_state_dict(old)
    assert [group["carry_moments"] for group in fresh.param_groups] == [False, True]


def test_distributed_checkpoints_know_the_state() -> None:
    """torch.distributed.checkpoint's own way to save and load, under parameters' full names."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    def made(seed: int) -> tuple[torch.nn.Module, ParameterWise]:
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(12, 16), torch.nn.Linear(16, 8))
        low = [(n, p) for n, p in model.named_parameters() if p.dim() == 2]
        rest = [(n, p) for n, p in model.named_parameters() if p.dim() < 2]
        return model, GaLoreAdamW([{"params": rest}, {"params": low, "rank": 4, "update_proj_gap": 2}])

    def steps(model: torch.nn.Module, optimizer: ParameterWise, numbers: range) -> None:
        for i in numbers:
            model(torch.randn(3, 12, generator=torch.Generator().manual_seed(i))).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    model, optimizer = made(0)
    steps(model, optimizer, range(3))
    state = get_optimizer_state_dict(model, optimizer)
    again, fresh = made(1)
    again.load_state_dict(model.state_dict())
    set_optimizer_state_dict(again, fresh, state)
    for these, theirs in ((model, optimizer), (again, fresh)):
        steps(these, theirs, range(3, 6))
    assert snapshot([*model.named_parameters()], optimizer) == snapshot([*again.named_parameters()], fresh)
