"""The recorded runs that `recorded_models.py` has equivalents of: which they are, how each is traced and compared."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from allocator_recordings import real_traces
from recorded_models import First, FirstAdam, Second, Sizes, first_loss, last_rows, second_loss

from galore_mem.allocator.device import Addresses, Device
from galore_mem.allocator.events import Alloc
from galore_mem.allocator.expandable import new_allocator
from galore_mem.allocator.replay import ReplayResult, replay
from galore_mem.allocator.snapshot import read_snapshot
from galore_mem.gpus import DEFAULT_CONTEXT
from galore_mem.setup import Setup
from galore_mem.simulate.device import PLATFORMS, requests
from galore_mem.simulate.repeat import repeated
from galore_mem.simulate.result import Simulation
from galore_mem.simulate.service import simulate
from galore_mem.simulate.subjects.load import UserStep
from galore_mem.simulate.trace import Trace
from galore_mem.units import parse_bytes

FIRST = Sizes(width=512, inner=1344, layers=4, heads=16, positions=256)
SECOND = Sizes(width=2560, inner=10_240, layers=32, heads=32, positions=0)  # as many positions as the run needs
RECORDED = "recorded"  # the phase that a recording is of
CUDA = Setup(device="cuda")
Phase = Callable[[str], Any]  # tells that a phase of this name begins


class Peaks(NamedTuple):
    """Bytes of the recorded window: what `galore_mem.allocator.recorded.compare` finds when it replays the recording on
    its own addresses."""

    allocated: int
    reserved: int


@dataclass(frozen=True, slots=True)
class Run:
    """What ran. `name` is the recording's, `second` which of the two programs, `length` of a sequence."""

    name: str
    second: bool
    trains: bool
    length: int
    autocast: bool = False
    warm: int = 5  # steps before what is recorded (of the second program)
    layers: int = 0  # 0: all

    @property
    def sizes(self) -> Sizes:
        sizes = SECOND._replace(positions=self.length) if self.second else FIRST
        return sizes._replace(layers=self.layers or sizes.layers)

    def program(self) -> Callable[[Phase], None]:
        """What `module:function` would return."""
        return partial(second if self.second else first, self)

    def region(self) -> AbstractContextManager[object]:
        return torch.autocast("cuda", torch.bfloat16) if self.autocast else nullcontext()

    @property
    def platform(self) -> str:
        """Whose driver hands out addresses: the first recordings' segments lie one above the other from 0x502000000 on
        (as under Windows and its subsystem for Linux), the second's are Linux'."""
        return "linux" if self.second else "windows"

    def addresses(self) -> Addresses:
        return PLATFORMS[self.platform]()


RUNS = {
    Run("niu_fwd_ctx100_fp32", False, False, 100): Peaks(416_297_472, 463_470_592),
    Run("niu_fwd_ctx200_fp32", False, False, 200): Peaks(882_670_592, 945_815_552),
    Run("niu_fwd_ctx200_amp", False, False, 200, autocast=True): Peaks(701_606_400, 742_391_808),
    Run("niu_train_ctx100_fp32", False, True, 100): Peaks(695_675_904, 786_432_000),
    Run("niu_train_ctx150_fp32", False, True, 150): Peaks(953_719_808, 1_063_256_064),
    Run("niu_train_ctx200_fp32", False, True, 200): Peaks(1_234_635_264, 1_390_411_776),
    Run("lin_xl_fwd_ctx1024_fp32", True, False, 1024): Peaks(16_171_812_864, 16_806_576_128),
    Run("lin_xl_fwd_ctx1024_bf16", True, False, 1024, autocast=True): Peaks(22_154_463_232, 22_741_516_288),
    Run("lin_xl_fwd_ctx2048_fp32", True, False, 2048): Peaks(22_869_993_472, 25_195_184_128),
    Run("lin_xl_fwd_ctx2048_bf16", True, False, 2048, autocast=True): Peaks(27_222_108_160, 29_483_859_968),
    Run("lin_xl_fullstep_ctx128_fp32", True, True, 128): Peaks(68_711_221_760, 74_637_639_680),
    Run("lin_xl_fullstep_ctx128_bf16", True, True, 128, autocast=True): Peaks(68_630_923_776, 74_134_323_200),
    Run("lin_xl_fullstep_ctx512_fp32", True, True, 512): Peaks(70_370_929_664, 74_769_760_256),
}


class Failure(NamedTuple):
    """The numbers of an out-of-memory message: MiB asked for, and as printed what was allocated, what was reserved but
    unallocated, and what the device had free; the operation that the traceback shows, as torch names it."""

    asked: int
    allocated: str
    unallocated: str
    free: str
    operations: tuple[str, ...]

    @property
    def capacity(self) -> int:
        """Bytes that the allocator could have had: good to some 10 MiB, by the printed digits."""
        return sum(map(parse_bytes, (self.allocated, self.unallocated, self.free)))


SCORES, POWERS = ("aten.div.Tensor",), ("aten.exp.default",)
BACKWARD = ("aten.div.Tensor", "aten.new_empty_strided.default", "aten._to_copy.default")  # it shows no more
# cs336_systems/results/memory_profiles/logs/ of the second repository, at 86eb1ab, 766895c, eac34c7 and d7b9b89: two
# messages from a card of 94.97 GiB for each length but 128, which ran on one of 23.52 GiB. All
# fail in the first or second step
FAILURES = {
    Run("xl_ctx2048_full_step_none", True, True, 2048, warm=1): Failure(
        2048, "91.51 GiB", "1.97 GiB", "869.88 MiB", SCORES
    ),
    Run("xl_ctx2048_full_step_bf16", True, True, 2048, True, warm=1): Failure(
        2048, "91.86 GiB", "835.44 MiB", "1.65 GiB", POWERS
    ),
    Run("xl_ctx1024_full_step_none", True, True, 1024, warm=1): Failure(
        512, "88.96 GiB", "5.10 GiB", "263.75 MiB", SCORES
    ),
    Run("xl_ctx1024_full_step_bf16", True, True, 1024, True, warm=1): Failure(
        512, "92.28 GiB", "1.77 GiB", "281.75 MiB", BACKWARD
    ),
    Run("xl_ctx128_full_step_none", True, True, 128, warm=1): Failure(
        100, "22.81 GiB", "169.18 MiB", "77.69 MiB", BACKWARD
    ),
    Run("xl_ctx128_full_step_bf16", True, True, 128, True, warm=1): Failure(
        100, "22.72 GiB", "246.04 MiB", "91.69 MiB", BACKWARD
    ),
}


# -- the programs -----------------------------------------------------------------------------------------


def first(run: Run, phase: Phase) -> None:
    """Three passes from the start of the process; what a pass makes lives until the next has made its own."""
    phase(RECORDED)
    with torch.device("cuda"):
        model = First(run.sizes)
    optimizer = FirstAdam(model.parameters()) if run.trains else None
    ids = torch.randint(0, 10_000, (10, run.length)).to("cuda")
    targets = torch.randint(0, 10_000, (10,)).to("cuda") if run.trains else None
    for _ in range(3):
        if optimizer is None:
            with run.region():
                model(ids)
            continue
        optimizer.zero_grad()
        logits = model(ids)
        last = last_rows(logits)
        loss = first_loss(last, targets)
        loss.backward()
        optimizer.step()
    phase("end")


def second(run: Run, phase: Phase) -> None:
    """The recording is of the step after some. One that only computes does so without gradients."""
    model = Second(run.sizes).to("cuda")
    ids, targets = (torch.randint(0, 10_000, (4, run.length), device="cuda") for _ in range(2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with nullcontext() if run.trains else torch.no_grad(), run.region():
            logits = model(ids)
        if run.trains:
            loss = second_loss(logits, targets)
            loss.backward()
            optimizer.step()

    phase("warm-up")
    for _ in range(run.warm):
        step()
    phase(RECORDED)
    step()
    phase("end")


# -- tracing and comparing --------------------------------------------------------------------------------


def simulated(run: Run, *, platform: str | None = None, capacity: int | None = None) -> Simulation:
    """The run's equivalent as `galore-mem simulate --model module:function` has it. `capacity`: bytes of a card for the
    allocator (None: as many as it takes)."""
    gpu = None if capacity is None else f"{capacity + DEFAULT_CONTEXT.context}B"
    step = UserStep(run.name, run.program)
    result = simulate(step, setup=CUDA, gpu=gpu, platform=platform or run.platform, keep_run=True)
    return result.estimates[0]


def peaks_of(made: Simulation) -> Peaks:
    """Of the recorded phase."""
    found = next(phase for phase in made.phases if phase.name == RECORDED)
    assert found.reserved_bytes is not None
    return Peaks(found.allocated_bytes, found.reserved_bytes)


def trace_of(made: Simulation) -> Trace:
    """What it allocates, from its start to the end of what is recorded."""
    assert made.run is not None
    found = made.run.trace
    end = next(mark.at for mark in found.marks if mark.phase == "end")
    return replace(found, events=found.events[:end], marks=found.marks[:-1])


def traced(run: Run) -> Trace:
    return trace_of(simulated(run))


def extended(run: Run) -> Trace:
    """The same, from traces of two, three and four layers."""
    shallow = range(2, 5)
    return repeated([traced(replace(run, layers=n)) for n in shallow], run.sizes.layers - shallow[0])


def replayed(found: Trace, addresses: Addresses, capacity: int | None = None) -> ReplayResult:
    return replay(requests(found), new_allocator(None, Device(capacity, addresses=addresses)))


def peaks(result: ReplayResult) -> Peaks:
    """Of the recorded phase."""
    last = result.phases[-1]
    return Peaks(last.peak_allocated_bytes, last.peak_reserved_bytes)


def failed_at(found: Trace, result: ReplayResult) -> str:
    """The operation whose request could not be served."""
    assert result.out_of_memory_at is not None
    event = list(requests(found))[result.out_of_memory_at]
    assert isinstance(event, Alloc)
    return found.allocations[event.id].op


def recorded_steps(found: Trace) -> list[int]:
    """Of the recorded phase: bytes taken, negative when given back."""
    start = next(mark.at for mark in found.marks if mark.phase == RECORDED)
    return [found.allocations[max(e, ~e)].nbytes * (1 if e >= 0 else -1) for e in found.events[start:]]


def steps_of(run: Run) -> list[int] | None:
    """The same of the recording, where this machine has it."""
    path = next((path for path in real_traces() if path.name.split(".")[0] == run.name), None)
    if path is None:
        return None
    (device,) = read_snapshot(path).devices
    signs = {"alloc": 1, "free_requested": -1}
    return [signs[e.action] * e.size for e in device.events if e.action in signs]
