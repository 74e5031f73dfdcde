"""A simulated run on its device: what loading leaves, phases, blocks, the peak explained, and what does not fit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from simulate_traces import MM, UP, card, simulation, step_of_two_layers

from galore_mem.allocator.events import EmptyCache
from galore_mem.allocator.events import Mark as Begins
from galore_mem.allocator.settings import parse_settings
from galore_mem.allocator.snapshot import read_snapshot
from galore_mem.evidence import CPU, Confidence
from galore_mem.memory.tape import CATEGORIES
from galore_mem.memory.tensor import TEMPORARIES
from galore_mem.setup import Setup
from galore_mem.simulate import snapshot
from galore_mem.simulate.device import on_cpu, on_cuda, requests
from galore_mem.simulate.explain import alive, layered, timeline
from galore_mem.simulate.history import history, named
from galore_mem.simulate.result import Place
from galore_mem.simulate.trace import Allocation, Mark, Trace
from galore_mem.units import MIB
from galore_mem.verify.case import BETWEEN, WARM


def phases_of(*names: str) -> list[str]:
    return [begins.phase for begins in named([Mark(i, name) for i, name in enumerate(names)])]


def modules_of(*, hooks: bool) -> list[str]:
    """Of the allocations of a step with forward, backward and update, which no module makes."""
    made = [Allocation(1, MM, "", "") for _ in range(4)]
    marks = [Mark(0, "load"), Mark(1, "forward"), Mark(2, "backward"), Mark(3, "step")]
    return [one.module for one in history(Trace(512, made, [0, 1, 2, 3], marks), hooks=hooks).allocations]


# -- the run from the start of its process -----------------------------------------------------------------


def test_of_loading_only_what_stays_is_taken() -> None:
    """Weights 0 and 2, without the 100 MiB between them; the workspace 3 comes with the first step."""
    found = history(step_of_two_layers())
    assert found.events[:4] == [0, 2, 3, 4]
    assert found.marks[:2] == [Mark(0, "load"), Mark(2, "first-step")]
    assert len(found.events) == len(step_of_two_layers().events) - 2  # the scratch, made and freed


def test_marks_are_where_they_were() -> None:
    """Two events less before the first step: each later mark is two events earlier."""
    before, after = step_of_two_layers().marks, history(step_of_two_layers()).marks
    assert [m.at for m in after[2:]] == [m.at - 2 for m in before[2:] if m.phase != BETWEEN]


@pytest.mark.parametrize(
    ("marks", "expected"),
    [
        ((WARM, WARM, WARM, BETWEEN, "forward", "backward", "step"),
         ["first-step", "first-step", "first-step", "forward", "backward", "step"]),
        # the step that renews projectors has passes without names
        (("forward", "backward", "step", BETWEEN, WARM, WARM, "refresh"),
         ["forward", "backward", "step", "forward", "backward", "refresh"]),
        # two micro-batches
        ((WARM, WARM, WARM, WARM, WARM, BETWEEN, "forward", "backward", "forward", "backward", "step"),
         ["first-step"] * 5 + ["forward", "backward", "forward", "backward", "step"]),
        # layer-wise: no update of its own, and the renewal is a backward pass
        ((WARM, WARM, BETWEEN, BETWEEN, "forward", "backward", BETWEEN, BETWEEN, WARM, "refresh"),
         ["first-step"] * 2 + ["forward", "backward", "forward", "refresh"]),
        # steps that settle what the last one left
        (("forward", "backward", "step", BETWEEN, WARM, WARM, WARM), ["forward", "backward", "step"] * 2),
    ],
)  # fmt: skip
def test_names_of_phases(marks: tuple[str, ...], expected: list[str]) -> None:
    assert phases_of(*marks) == expected


def test_what_runs_outside_of_modules() -> None:
    """Hooks of a layer-wise update run the optimizer in backward."""
    assert modules_of(hooks=False) == ["", "(batch)", "(backward)", "(optimizer)"]
    assert modules_of(hooks=True) == ["", "(batch)", "(optimizer)", "(optimizer)"]


def test_torch_is_not_needed() -> None:
    """What `estimate --reserved` may use: a trace, its history and its device are data."""
    program = "import sys, galore_mem.simulate.history, galore_mem.simulate.device; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_the_traced_allocations_stay_as_they_were() -> None:
    trace = step_of_two_layers()
    history(trace)
    assert trace == step_of_two_layers()


# -- the caching allocator -----------------------------------------------------------------------------------


def test_phases_of_a_run() -> None:
    """MiB. Live at the peaks: load 24; first step 24 + 14 + 24 + 24 + 16; forward 24 + 14 + 24 + 40; backward 12 more;
    step 24 + 14 + 24 + 24 + 16.

    Reserved: segments of 12, 12, 14, 20, 20 and, for the first gradient, 12; the second takes 12 of a freed 20, the
    first state 12 of the other; the second state needs 12 more, the temporary 16: 118. In the second step one
    activation takes the 20 that became whole again, the other needs 20 more: 138.
    """
    made = simulation()
    assert {p.name: p.allocated_bytes // MIB for p in made.phases} == {
        "load": 24, "first-step": 102, "forward": 102, "backward": 114, "step": 102,
    }  # fmt: skip
    assert {p.name: (p.reserved_bytes or 0) // MIB for p in made.phases} == {
        "load": 24, "first-step": 118, "forward": 138, "backward": 138, "step": 138,
    }  # fmt: skip
    assert made.peak_reserved_bytes == 138 * MIB
    assert made.fragmentation_bytes == (138 - 114) * MIB
    assert [p.slack_bytes for p in made.phases] == [0] * 5
    assert [n // MIB for n in made.peak.components] == [24, 12, 24, 40, 14]


def test_slack_lies_with_the_tensor_whose_block_it_is_in() -> None:
    """21.33 MiB in a segment of 22 (a multiple of 2): the rest, below 1 MiB, is not split off. Freed, and taken by a
    tensor of 21 MiB: 1 MiB is not more than 1 MiB, so it is not split off either."""
    first, second = 22_369_792, 21 * MIB  # the first is a multiple of 512
    made = [Allocation(first, MM, "", "", TEMPORARIES), Allocation(second, MM, "", "", TEMPORARIES)]
    run = on_cuda(Trace(512, made, [0, ~0, 1], [Mark(0, "load")]), parse_settings(""))
    assert run.blocks == {0: 22 * MIB, 1: 22 * MIB}
    assert run.slack(0) == 22 * MIB - first
    assert run.slack(2) == MIB
    assert run.highest()["load"].live == (0, 0, 0, 0, 22 * MIB)


def test_a_cache_that_is_emptied_where_a_phase_begins_is_none_of_it() -> None:
    """12 MiB are cached when the second phase is about to begin, and go: it needs 14 of its own, not 26."""
    made = [Allocation(n * MIB, MM, "", "") for n in (12, 14)]
    found = Trace(512, made, [0, ~0, 1], [Mark(0, "load"), Mark(2, "forward")], emptied=[2])
    assert list(requests(found))[3:5] == [EmptyCache(), Begins("forward")]
    assert on_cuda(found, parse_settings("")).most_reserved() == {"load": 12 * MIB, "forward": 14 * MIB}


def test_on_the_cpu_nothing_is_kept() -> None:
    run = on_cpu(Trace(1, [Allocation(5, MM, "", "")], [0, ~0], [Mark(0, "load")]))
    assert (run.highest()["load"].total, run.most_reserved(), run.slack(0)) == (5, {}, 0)
    made = simulation(setup=Setup(device="cpu"))
    assert (made.peak_reserved_bytes, made.fragmentation_bytes, made.retries, made.outside_allocator_bytes) == (
        None, None, None, 0,
    )  # fmt: skip


def test_a_phase_that_begins_at_its_highest() -> None:
    """What was made last before it is said to make it."""
    made = [Allocation(512, "a", "one", ""), Allocation(512, "b", "two", "")]
    trace = Trace(512, made, [0, 1, ~1, ~0], [Mark(0, "load"), Mark(0, "forward"), Mark(2, "backward")])
    run = on_cuda(trace, parse_settings(""))
    assert run.highest()["backward"].at == 1
    assert run.highest()["backward"].total == 1024


# -- a card --------------------------------------------------------------------------------------------------


def test_out_of_memory_is_found_where_it_happens() -> None:
    """100 MiB: when the second state asks for 12 MiB, 90 are reserved (12, 12, 14, 20, 20, 12), and 24 + 14 + 24 + 12
    allocated; the 16 that are not are rests of two segments of 20. What it would need is shown as without a limit."""
    made = simulation(card=card(100))
    refusal = made.refusal
    assert refusal is not None
    assert refusal.place == Place("first-step", "(optimizer)", "aten.zeros_like.default")
    sizes = (refusal.requested, refusal.tried, refusal.allocated, refusal.reserved, refusal.free)
    assert [n // MIB for n in sizes] == [12, 12, 74, 90, 10]
    assert "12.00 MiB more are needed" in refusal.message
    assert made.phases == simulation().phases
    assert made.fits is not None
    assert (made.fits.verdict, made.fits.headroom_bytes) == ("does_not_fit", (100 - 138) * MIB)


def test_cached_memory_that_has_to_be_given_back_makes_it_tight() -> None:
    """130 MiB: the second activation of the second step needs 20, and 118 are reserved. The free segments of 16 and 12
    go: 90 + 20; the gradient needs 12 again: 122, and 8 are left (6.6 % of 122)."""
    made = simulation(card=card(130))
    assert made.refusal is None
    assert (made.retries, made.peak_reserved_bytes) == (1, 122 * MIB)
    assert made.fits is not None
    assert (made.fits.verdict, made.fits.headroom_bytes) == ("tight", 8 * MIB)


@pytest.mark.parametrize(("mib", "verdict"), [(138, "tight"), (144, "tight"), (145, "fits")])
def test_verdicts(mib: int, verdict: str) -> None:
    """138 are reserved; with a band of 5 %, 6.9 more are its upper end."""
    made = simulation(card=card(mib), confidence=Confidence(CPU, 0.05, ""))
    assert made.fits is not None
    assert (made.fits.verdict, made.retries) == (verdict, 0)


@pytest.mark.parametrize(("band", "verdict"), [(0.0, "does_not_fit"), (0.25, "tight")])
def test_a_refusal_within_the_band(band: float, verdict: str) -> None:
    """100 MiB refuse what 130 serve; a card larger by the band, 100 / 0.75 = 133, would serve it."""
    made = simulation(card=card(100), confidence=Confidence(CPU, band, ""))
    assert made.refusal is not None
    assert made.fits is not None
    assert (made.fits.verdict, made.fits.headroom_bytes) == (verdict, (100 - 138) * MIB)


def test_a_fraction_of_the_card() -> None:
    """Half of 200 MiB: as a card of 100, but with all of its memory free; what is missing is missing from the half."""
    made = simulation(card=card(200), alloc_conf="per_process_memory_fraction:0.5")
    assert made.refusal is not None
    assert (made.refusal.requested, made.refusal.free) == (12 * MIB, (200 - 90) * MIB)
    assert made.fits is not None
    assert (made.fits.verdict, made.fits.headroom_bytes) == ("does_not_fit", (100 - 138) * MIB)


# -- explained -----------------------------------------------------------------------------------------------


def test_what_lives_at_the_peak() -> None:
    """Layers together, the largest first, to the byte."""
    made = simulation()
    assert made.at_peak is not None
    assert made.at_peak.place == Place("backward", UP.format(1), MM)
    rows = [(r.category, r.name, r.place.module, r.place.phase, r.repeat, r.nbytes // MIB) for r in made.at_peak.live]
    up = UP.format("{i}")
    assert rows == [
        ("activations", "", up, "forward", 2, 40),
        ("weights", f"{up}.weight", "", "load", 2, 24),
        ("optimizer_state", f"{up}.weight:exp_avg", "(optimizer)", "first-step", 2, 24),
        ("temporaries", "", "", "first-step", 1, 14),
        ("gradients", "", UP.format(1), "backward", 1, 12),  # one of a kind has its own number
    ]
    by_category = [sum(r.nbytes for r in made.at_peak.live if r.category == name) for name in CATEGORIES]
    assert tuple(by_category) == made.peak.components


def test_numbers_of_layers_and_experts() -> None:
    assert layered("model.layers.12.experts.3.w1.weight:exp_avg") == "model.layers.{i}.experts.{i}.w1.weight:exp_avg"
    assert layered("h2.conv1d") == "h2.conv1d"


def test_of_equal_peaks_the_first_of_every_step_is_named() -> None:
    """The second step's first activation is 12 MiB smaller: first step, backward and step are all 102 MiB high."""
    trace = step_of_two_layers()
    trace.allocations[11].nbytes = 8 * MIB
    made = simulation(trace)
    assert [p.allocated_bytes // MIB for p in made.phases] == [24, 102, 90, 102, 102]
    assert made.peak.name == "backward"


@pytest.mark.parametrize("points", [3, 10, 25, 100])
def test_a_timeline_keeps_the_peaks(points: int) -> None:
    made = simulation(points=points)
    line = made.timeline
    assert line is not None
    assert len(line.at) == min(points, 25)
    assert list(line.at) == sorted(line.at)
    assert max(map(sum, line.live)) == made.peak_allocated_bytes
    assert line.reserved is not None
    assert max(line.reserved) == made.peak_reserved_bytes
    assert all(held >= sum(live) for held, live in zip(line.reserved, line.live, strict=True))


def test_a_timeline_with_every_event() -> None:
    """25 events: those of the trace without the scratch of loading."""
    line = timeline(on_cuda(history(step_of_two_layers()), parse_settings("")))
    assert line.at == tuple(range(25))
    assert [sum(live) // MIB for live in line.live][:7] == [12, 24, 38, 58, 78, 90, 70]


def test_a_snapshot_that_the_viewer_opens(tmp_path: Path) -> None:
    """The recorded requests are the run's; their lines name tensor, operation and module."""
    made = simulation(keep_run=True)
    assert made.run is not None
    path = tmp_path / "run.pickle"
    snapshot.write(path, made.run, parse_settings(""))
    [device] = read_snapshot(path).devices
    assert [e.size // MIB for e in device.events if e.action == "alloc"] == [
        12, 12, 14, 20, 20, 12, 12, 12, 12, 16, 20, 20, 12, 12, 16,
    ]  # fmt: skip
    told = snapshot.describe(made.run, 8)
    assert told.category == "optimizer_state"
    assert [(f.filename, f.name) for f in told.frames] == [
        ("tensor", UP.format(0) + ".weight:exp_avg"), ("shape", "bfloat16 12 x 524288"),
        ("operation", "aten.zeros_like.default"), ("module", "(optimizer)"),
    ]  # fmt: skip


def test_rows_of_nothing() -> None:
    run = on_cuda(Trace(512, [], [], [Mark(0, "load")]), parse_settings(""))
    assert alive(run, 0) == ()


# -- addresses -----------------------------------------------------------------------------------------------


def test_whose_driver_it_is() -> None:
    """Each new segment lies above the one before under Windows, and below under Linux; of two free blocks
    of one size the lower is taken, so that a snapshot's addresses differ and what is reserved here does not."""
    linux, windows = (simulation(keep_run=True, platform=name) for name in ("linux", "windows"))
    assert linux.run is not None
    assert windows.run is not None
    assert (linux.run.platform, windows.run.platform) == ("linux", "windows")
    assert linux.peak_reserved_bytes == windows.peak_reserved_bytes
    assert any("addresses as under windows" in one for one in windows.assumptions)
    first = [
        sorted(segment.address for segment in run.replayed.layout)
        for run in (linux.run, windows.run)
        if run.replayed is not None
    ]
    assert first[0] != first[1]
