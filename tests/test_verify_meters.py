"""Meters: the CPU's against allocations that are known, CUDA's logic against counters that behave as torch.cuda's."""

from __future__ import annotations

import pytest
import torch
from allocations import allocations

from galore_mem.verify.meters import CpuMeter, CudaMeter
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


class FakeCuda:
    """Counters as torch.cuda has them: `reset_peak_memory_stats` sets the peak to what is allocated now."""

    def __init__(self) -> None:
        self.now = self.peak = self.reserved = self.reserved_peak = 0
        self.calls: list[str] = []

    def allocate(self, n: int) -> None:
        self.now += n
        self.peak = max(self.peak, self.now)
        self.reserved = max(self.reserved, -(-self.now // 2**21) * 2**21)
        self.reserved_peak = max(self.reserved_peak, self.reserved)

    def synchronize(self) -> None:
        self.calls.append("synchronize")

    def empty_cache(self) -> None:
        self.reserved = -(-self.now // 2**21) * 2**21

    def reset_peak_memory_stats(self) -> None:
        self.peak, self.reserved_peak = self.now, self.reserved

    def max_memory_allocated(self) -> int:
        return self.peak

    def max_memory_reserved(self) -> int:
        return self.reserved_peak


def test_cuda_peaks_of_each_phase() -> None:
    cuda = FakeCuda()
    with CudaMeter(cuda) as meter:
        meter.enter("a")
        cuda.allocate(1000)
        cuda.allocate(5000)
        cuda.allocate(-5000)
        meter.enter("b")
        cuda.allocate(300)
        meter.enter("a")
        cuda.allocate(100)
    peaks = meter.peaks()
    assert peaks["a"].allocated == 6000
    assert peaks["b"].allocated == 1300
    assert peaks["b"].reserved == 2**21  # a segment of 2 MiB
    assert cuda.calls  # the device has finished before a counter is read


def test_cuda_out_of_memory_leaves_no_peaks() -> None:
    cuda = FakeCuda()
    meter = CudaMeter(cuda)

    def run() -> None:
        with meter:
            meter.enter("a")
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with pytest.raises(torch.OutOfMemoryError):
        run()
    assert meter.peaks() == {}


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
