"""Whatever a program does: the allocator's invariants, and the same steps as the slow literal version."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import pytest
from allocator_cases import check, program, random_program, taped
from allocator_literal import Literal, NoMemoryError, Rules
from hypothesis import given, settings
from hypothesis import strategies as st

from galore_mem.allocator.events import Alloc, EmptyCache, Event, Finish, Free, RecordStream
from galore_mem.allocator.oom import OutOfMemoryError
from galore_mem.allocator.settings import AllocatorSettings
from galore_mem.units import MIB

QUICK = settings(max_examples=40, derandomize=True, deadline=None)
CHOICES = st.lists(st.tuples(st.integers(0, 99), st.integers(0, 2**16)), max_size=90)


@dataclass(frozen=True)
class Setup:
    """One setting in both spellings; `capacity` in bytes."""

    name: str
    settings: AllocatorSettings
    rules: Rules


def _setup(name: str, capacity: int, **options: object) -> Setup:
    ours = {
        "max_split": "max_split_size", "rounding": "max_non_split_rounding", "fraction": "per_process_memory_fraction",
        "threshold": "garbage_collection_threshold", "expandable": "expandable_segments",
    }  # fmt: skip
    fields = {ours[key]: value for key, value in options.items() if key in ours}
    if "divisions" in options:
        fields["roundup_power2_divisions"] = (options["divisions"],) * 16
    return Setup(f"{name}-{capacity // MIB}", AllocatorSettings(**fields), Rules(capacity=capacity, **options))  # type: ignore[arg-type]  # fields drawn by name


# far too much memory, about enough, and too little: 40 live blocks of SIZES are about 400 MiB
SETUPS = [
    _setup(name, capacity * MIB, **options)
    for capacity, (name, options) in product(
        (100_000, 400, 130),
        (
            ("default", {}),
            ("divisions", {"divisions": 4}),
            ("max-split", {"max_split": 20 * MIB}),
            ("max-split-tight", {"max_split": 21 * MIB, "rounding": 25 * MIB}),
            ("collected", {"fraction": 0.9, "threshold": 0.4}),
            ("expandable", {"expandable": True}),
            ("expandable-max-split", {"expandable": True, "max_split": 32 * MIB, "divisions": 8}),
            ("expandable-collected", {"expandable": True, "fraction": 0.8, "threshold": 0.3}),
        ),
    )
]


def both(events: list[Event], setup: Setup, every: int = 1) -> None:
    """Run the program through both; the same trace, the same blocks, the same sums."""
    fast = taped(setup.settings, setup.rules.capacity)
    slow = Literal(setup.rules)
    blocks = {}
    waits: dict[int, int | None] = {}
    for n, event in enumerate(events):
        if isinstance(event, Alloc):
            try:
                blocks[event.id] = (
                    fast.allocator.malloc(event.size, event.stream),
                    slow.malloc(event.size, event.stream),
                )
            except OutOfMemoryError:
                with pytest.raises(NoMemoryError):
                    slow.malloc(event.size, event.stream)
        elif isinstance(event, EmptyCache):
            fast.allocator.empty_cache()
            slow.release_all()
        elif event.id in blocks:
            block, address = blocks[event.id]
            if isinstance(event, RecordStream):
                fast.allocator.record_stream(block, event.stream)
                slow.record_stream(address, event.stream)
            elif isinstance(event, Free):
                fast.allocator.free(block)
                slow.free(address)
                waits[event.id] = fast.allocator.held.get(block)
            elif isinstance(event, Finish) and waits[event.id] == fast.allocator.held.get(block, 0):
                fast.allocator.finish(block)
                slow.finish(address)
        if n % every == 0:
            check(fast.allocator)
    assert fast.trace == slow.trace
    layout = [(b.address, b.size, b.requested, b.state) for s in fast.allocator.layout() for b in s.blocks]
    assert sorted(layout) == slow.layout()
    stats = fast.allocator.stats
    assert (stats.reserved, stats.inactive_split) == (slow.reserved, slow.inactive_split)
    assert stats.num_alloc_retries == slow.retries


@pytest.mark.parametrize("setup", SETUPS, ids=lambda s: s.name)
def test_long_programs_run_as_in_the_literal_version(setup: Setup) -> None:
    both(random_program(600, seed=len(setup.name)), setup, every=50)


@QUICK
@given(CHOICES, st.sampled_from(SETUPS))
def test_any_program_keeps_the_invariants(choices: list[tuple[int, int]], setup: Setup) -> None:
    both(program(choices), setup)


@QUICK
@given(CHOICES, st.sampled_from(SETUPS))
def test_everything_freed_and_the_cache_emptied_leaves_nothing(choices: list[tuple[int, int]], setup: Setup) -> None:
    allocator = taped(setup.settings, 2**40).allocator  # nothing fails here
    blocks = {}
    for event in program(choices):
        if isinstance(event, Alloc):
            blocks[event.id] = allocator.malloc(event.size, event.stream)
        elif isinstance(event, RecordStream):
            allocator.record_stream(blocks[event.id], event.stream)
        elif isinstance(event, Free):
            allocator.free(blocks.pop(event.id))
    for block in blocks.values():
        allocator.free(block)
    held = sum(block.size for block in allocator.held)
    assert allocator.stats.allocated == 0
    assert allocator.stats.active == held
    allocator.empty_cache()  # waits for other streams, too
    check(allocator)
    assert allocator.stats.reserved == allocator.stats.active == allocator.stats.requested == 0
    assert allocator.layout() == ()
    assert list(allocator.chains()) == []


def test_the_programs_reach_what_they_should() -> None:
    """The random programs would prove little if they never ran out of memory, retried, collected or unmapped."""
    seen: set[str] = set()
    for setup in SETUPS:
        fast = taped(setup.settings, setup.rules.capacity)
        blocks = {}
        for event in random_program(600, seed=len(setup.name)):
            if isinstance(event, Alloc):
                try:
                    blocks[event.id] = fast.allocator.malloc(event.size, event.stream)
                except OutOfMemoryError:
                    seen.add("out of memory")
            elif isinstance(event, Free) and event.id in blocks:
                fast.allocator.free(blocks[event.id])
        seen |= {action for action, *_ in fast.trace}
        if fast.allocator.stats.num_alloc_retries > fast.allocator.stats.num_ooms:
            seen.add("retry that helped")
    assert seen >= {"out of memory", "oom", "retry that helped", "segment_free", "segment_map", "segment_unmap"}
