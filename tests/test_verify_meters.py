"""Meters: the CPU's against allocations that are known, the accelerator's against counters that behave as CUDA's."""

from __future__ import annotations

import pytest
import torch
from allocations import allocations
from fake_cuda import MIB, WORKSPACE, FakeCuda

from galore_mem.verify.meters import AcceleratorMeter, CpuMeter, Peak
from galore_mem.verify.residents import tensors, total


def test_cpu_peaks_of_each_phase() -> None:
    with CpuMeter() as meter:
        meter.enter("a")
        kept = torch.zeros(1000, dtype=torch.uint8)
        del_me = torch.zeros(5000, dtype=torch.uint8)
        del del_me
        meter.enter("b")
        other = torch.zeros(300, dtype=torch.uint8)
        meter.enter("a")
        more = torch.zeros(100, dtype=torch.uint8)
        del more
    peaks = meter.peaks()
    assert peaks["a"].allocated == 6000  # 1000 + 5000; later 1000 + 300 + 100
    assert peaks["b"].allocated == 1300
    assert peaks["a"].reserved is None
    assert total([kept, other], torch.device("cpu")) == 1300


def test_cpu_meter_agrees_with_the_tests_own_reader() -> None:
    def work() -> torch.Tensor:
        a = torch.randn(64, 64)
        return torch.linalg.svd(a @ a)[0]

    with CpuMeter() as meter:
        meter.enter("work")
        result = work()
    assert meter.peaks()["work"].allocated == allocations(work).peak
    del result


# -- the accelerator's counters ------------------------------------------------------------------------


def test_counters_of_each_phase() -> None:
    """Blocks of 512 bytes, segments of 2 MiB; a phase that is entered again has its highest moment of all."""
    cuda = FakeCuda()
    with AcceleratorMeter(cuda) as meter:
        meter.enter("a")
        cuda.take(1000)  # blocks of 1,024
        cuda.take(5000)  # and 5,120
        cuda.give(5000)
        meter.enter("b")
        cuda.take(300)  # 512
        meter.enter("a")
        cuda.take(3 * MIB)
    assert meter.peaks() == {
        # allocated: 1,024 + 512 + 3 MiB; requested without rounding; 2 segments, which the driver has less
        "a": Peak(1536 + 3 * MIB, 4 * MIB, 1300 + 3 * MIB, 4 * MIB),
        "b": Peak(1536, 2 * MIB, 1300, 2 * MIB),
    }
    assert cuda.calls.count("synchronize") == 4  # before the first phase, and before counters are read


def test_a_phase_starts_at_what_is_left_from_before() -> None:
    """The warm-up's own peak is gone, what it left is not, and neither are its segments."""
    cuda = FakeCuda()
    with AcceleratorMeter(cuda) as meter:
        meter.enter("warm-up")
        cuda.take(512)
        cuda.take(10 * MIB)
        cuda.give(10 * MIB)
        meter.enter("step")
    assert meter.peaks()["step"] == Peak(512, 12 * MIB, 512, 12 * MIB)


def test_the_drivers_figure_is_of_the_device_since_the_start() -> None:
    """Not what other processes held before, nor the context; but what they take meanwhile."""
    cuda = FakeCuda(context=450 * MIB, others=1000 * MIB)
    with AcceleratorMeter(cuda) as meter:
        meter.enter("step")
        cuda.take(2 * MIB)
        cuda.others += 7 * MIB
    assert meter.peaks()["step"].device_used == 9 * MIB
    assert meter.peaks()["step"].reserved == 2 * MIB


def test_workspaces_are_what_torch_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda()
    cuda.install(monkeypatch)
    with AcceleratorMeter(cuda) as meter:
        meter.enter("step")
        cuda.multiplied()
    assert meter.workspaces == WORKSPACE
    assert meter.peaks()["step"].allocated == WORKSPACE  # where they are still counted
    assert cuda.allocated == 0


def test_out_of_memory_leaves_no_peaks_and_the_device_alone() -> None:
    cuda = FakeCuda(capacity=2**30, context=0, others=0)
    meter = AcceleratorMeter(cuda)

    def run() -> None:
        with meter:
            meter.enter("a")
            cuda.calls.clear()
            cuda.take(2**30 + 1)

    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        run()
    assert meter.peaks() == {}
    assert meter.workspaces is None
    assert cuda.calls == []


# -- what stays ----------------------------------------------------------------------------------------


class Holder:
    def __init__(self, t: torch.Tensor) -> None:
        self.matrix, self.me, self.name = t, self, "holder"


class Slotted:
    __slots__ = ("inner",)

    def __init__(self, t: torch.Tensor) -> None:
        self.inner = [t]


def test_tensors_are_found_through_any_object_and_counted_once() -> None:
    base = torch.zeros(100)
    state = {
        "step": 3,
        "exp_avg": torch.zeros(10),
        "projector": Holder(base[:5]),
        "again": (base, {"deep": Slotted(base)}),
        "nothing": None,
    }
    names = [name for name, _ in tensors(state)]
    assert names == ["exp_avg", "projector.matrix", "again.0"]  # one object is visited once
    assert total((t for _, t in tensors(state)), torch.device("cpu")) == 400 + 40  # a view keeps its whole storage
