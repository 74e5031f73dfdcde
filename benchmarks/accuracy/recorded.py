"""Recorded runs of their authors' own models on GPUs (docs/recordings.md), traced and replayed: `module:function`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from galore_mem.evidence import OWN

TESTS = Path(__file__).resolve().parent.parent.parent / "tests"
GPU = "recorded GPUs"


@dataclass(frozen=True)
class Recorded:
    """One run, by its recording's name."""

    key: str


def cases() -> Iterator[Recorded]:
    yield from (Recorded(run.name) for run in _runs().RUNS)


def run(case: Recorded) -> dict[str, Any]:
    """Bytes of the recorded window: the most allocated, and the most reserved."""
    runs = _runs()
    ((which, right),) = ((run, right) for run, right in runs.RUNS.items() if run.name == case.key)
    said = runs.peaks_of(runs.simulated(which))
    return {
        "family": OWN, "method": OWN, "implementation": OWN, "gpu": GPU, "options": {"attention": OWN},
        "recipe": "amp-bf16" if which.autocast else "fp32",
        "measured": {"peak": right.allocated, "reserved": right.reserved}, "estimate": None,
        "simulate": {"peak": said.allocated, "reserved": said.reserved},
    }  # fmt: skip


def _runs() -> Any:
    sys.path.insert(0, str(TESTS))
    import recorded_runs

    return recorded_runs
