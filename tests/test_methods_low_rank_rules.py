"""What holds for every projected method: clipped ranks, untouched vectors, steps that leave nothing behind."""

from __future__ import annotations

import pytest
from ledgers import job
from low_rank import ALL, HEADS, TALL, WIDE, Param, laid_out, program_peak

from galore_mem.memory.tape import GRADIENTS, OPTIMIZER_STATE, TEMPORARIES, WEIGHTS
from galore_mem.methods.base import Buffer, Implementation, Job, Slots
from galore_mem.methods.registry import METHODS

M, N, R = 256, 688, 64
PROJECTED = [m.name for m in METHODS.values() if m.projects and m.implementations[0].linear in ("dense", "int8")]
CODES = [(name, code.name) for name in PROJECTED for code in METHODS[name].implementations]


def told(name: str, rank: int = R) -> Job:
    known = {h.name for h in METHODS[name].hyperparameters}
    return job(name, {"rank": rank} if "rank" in known else {}, "cpu", HEADS)


def buffers(of: Implementation, given: Param, how: Job) -> tuple[Buffer, ...]:
    return of.state(given.trained("bfloat16"), how)


# their random projectors, paddings and conditions take the rank as it is given
UNCLIPPED = {("apollo", "apollo-torch"), ("apollo-mini", "apollo-torch"), ("tensor-galore", "neuraloperator"),
             ("flora", "flora-opt")}  # fmt: skip


@pytest.mark.parametrize("key", [key for key in CODES if key not in UNCLIPPED], ids="-".join)
def test_rank_is_clipped(key: tuple[str, str]) -> None:
    code = METHODS[key[0]].implementation(key[1])
    for shape in (WIDE, TALL, (64, 64), (1000, 3)):
        above, at = told(key[0], 10**6), told(key[0], min(shape))
        assert buffers(code, Param(shape), above) == buffers(code, Param(shape), at)


@pytest.mark.parametrize("key", CODES, ids="-".join)
def test_vectors_in_the_targets_are_not_projected(key: tuple[str, str]) -> None:
    code, how = METHODS[key[0]].implementation(key[1]), told(key[0])
    assert buffers(code, Param((512,)), how) == buffers(code, Param((512,), projected=False), how)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("refresh", [False, True], ids=["step", "refresh"])
@pytest.mark.parametrize("key", CODES, ids="-".join)
def test_a_step_leaves_the_state_as_the_ledger_has_it(key: tuple[str, str], refresh: bool, device: str) -> None:
    """Nothing temporary is left, no weight is lost, each buffer is there once and has its size; where the code replaces
    gradients by low-rank ones, or takes them, fewer bytes of them remain."""
    code = METHODS[key[0]].implementation(key[1])
    how = Job(told(key[0]).hyperparameters, told(key[0]).recipe, device, HEADS)
    tape, slots = laid_out(code, ALL, "float32", how)
    before = list(tape.live)
    code.step(Slots(tape, slots, None), how, refresh)
    after = list(tape.live)
    assert after[TEMPORARIES] == 0
    assert after[WEIGHTS] == before[WEIGHTS]
    assert after[GRADIENTS] <= before[GRADIENTS]
    assert after[OPTIMIZER_STATE] == before[OPTIMIZER_STATE]
    for slot in slots:
        for b in code.state(slot.param, how):
            if b.nbytes > 8:
                assert slot.state[b.name].storage.nbytes == b.nbytes, (slot.param.name, b.name)


def test_ours_need_the_least() -> None:
    """The step of ours is at most the low-rank gradient, its update and one full-size product."""
    for fmt, size in (("float32", 4), ("bfloat16", 2)):
        for name in ("galore", "galore-2", "galore-mini", "galore-mini-1", "galore-mini-2", "tensor-galore"):
            code = METHODS[name].implementation("galore-mem")
            for shape in (WIDE, TALL):
                assert program_peak(code, (Param(shape),), fmt, told(name), False) <= size * (2 * N * R + M * N)
