"""Runs one case in this process: `python -m galore_mem.verify.worker [--snapshot DIR] < case.json > outcome.json`.

The runner starts one for each case, so that nothing of one case reaches the next.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from galore_mem.errors import InputError
from galore_mem.verify.case import BETWEEN, OPTIMIZER, WARM, BufferPair, Case, Outcome, Sizes
from galore_mem.verify.environment import card, environment
from galore_mem.verify.line import dump
from galore_mem.verify.parent import end_with_parent
from galore_mem.verify.predict import Prediction, predict
from galore_mem.verify.snapshot import Recorded, check, file_name

if TYPE_CHECKING:
    from galore_mem.verify.meters import Meter

# how torch's CPU allocator, the CUDA runtime and its libraries say so, where it is no OutOfMemoryError
EXHAUSTED = ("not enough memory", "CUDA error: out of memory", "_STATUS_ALLOC_FAILED")


def run(case: Case, snapshots: Path | None = None) -> Outcome:
    """Predicts and measures a case; whatever goes wrong becomes its status. With `snapshots`, the history of CUDA's
    allocator is written into that folder."""
    start = time.perf_counter()
    here = environment(case.device)
    said, recorded, begun = None, None, False
    try:
        here |= card() if case.device == "cuda" else {}
        said = predict(case, here.get("compute_capability"))
        meter = meter_of(case)
        if snapshots is not None:
            meter = recorded = Recorded(meter, check(snapshots, case.device) / file_name(case))
        begun = True
        outcome = measure(case, said, meter)
    except InputError as error:  # what was asked for cannot be, or an optimizer refused a gradient
        outcome = Outcome(case, "failed" if begun else "unsupported", str(error))
    except MemoryError as error:
        outcome = Outcome(case, "oom", f"out of memory: {_line(error)}")
    except Exception as error:  # a case's failure is its result
        outcome = _outcome_of(case, error)
    if outcome.status == "oom" and said is not None:
        outcome = replace(outcome, predicted=said.sizes)
    if recorded is not None:
        here |= {"snapshot": recorded.told}
    return replace(outcome, environment=here, seconds=time.perf_counter() - start)


def meter_of(case: Case) -> Meter:
    from galore_mem.verify.meters import METERS

    return METERS[case.device]()


def measure(case: Case, said: Prediction, meter: Meter) -> Outcome:
    """The case's real run beside its prediction."""
    import torch

    from galore_mem.verify.builders import builder
    from galore_mem.verify.kernels import REMARK, chosen_kernels, large
    from galore_mem.verify.workloads import run_optimizer, run_train

    row = builder(case.method, case.implementation)
    row.check(case.workload, said.work)
    device = torch.device(case.device)
    torch.manual_seed(0)
    with meter, chosen_kernels(said.work), row.around():
        workload = run_optimizer if case.workload == OPTIMIZER else run_train
        found = workload(said.work, row, device, meter)
    not_compared = row.left_out(case.workload, said.work, said.sizes.phases)
    peaks = {name: peak for name, peak in meter.peaks().items() if name not in (WARM, BETWEEN)}
    compared = {name: n for name, n in said.sizes.phases.items() if name not in not_compared}
    kept = meter.workspaces or 0
    used = [peak.device_used for peak in meter.peaks().values() if peak.device_used is not None]
    sizes = Sizes(
        found.weights,
        found.gradients,
        found.optimizer_state,
        {name: peak.allocated - kept for name, peak in peaks.items()},
        {name: peak.reserved for name, peak in peaks.items() if peak.reserved is not None},
        {name: peak.requested - kept for name, peak in peaks.items() if peak.requested is not None},
        meter.workspaces,
        max(used, default=None),
    )
    told = "; ".join(filter(None, (row.told(said.work, not_compared), REMARK if large(said.work) else "")))
    expected, buffers = replace(said.sizes, phases=compared), tuple(pairs(said, found.buffers))
    return Outcome(case, "ok", told, expected, sizes, buffers, not_compared=tuple(sorted(not_compared)))


def pairs(said: Prediction, found: dict[tuple[str, str], Any]) -> Iterator[BufferPair]:
    """Every tensor of the optimizer's state, as the ledger has it and as it is."""
    left = dict(found)
    shared = {e.buffer for e in said.entries if e.kind == "optimizer_state" and e.param == "(shared)"}
    for e in said.entries:
        if e.kind != "optimizer_state" or e.param == "(shared)":
            continue
        for i in range(e.repeat):
            name = e.param.replace("{i}", str(i))
            t = left.pop((name, e.buffer), None)
            if e.host:  # it takes nothing from the device
                continue
            size = None if t is None else t.untyped_storage().nbytes()
            yield BufferPair(name, e.buffer, e.shape, e.dtype.name, e.nbytes, size)
    for (name, buffer), t in left.items():
        if buffer not in shared:
            fmt = str(t.dtype).removeprefix("torch.")
            yield BufferPair(name, buffer, tuple(t.shape), fmt, None, t.untyped_storage().nbytes())


def _outcome_of(case: Case, error: Exception) -> Outcome:
    from galore_mem.verify.builders import CannotRun

    if isinstance(error, CannotRun):
        return Outcome(case, "unsupported", str(error))
    if type(error).__name__ == "OutOfMemoryError" or any(sign in str(error) for sign in EXHAUSTED):
        return Outcome(case, "oom", _line(error))
    return Outcome(case, "failed", f"{type(error).__name__}: {_line(error)}")


def _line(error: BaseException) -> str:
    """The message without the advice that ends CUDA's."""
    return " ".join(str(error).split()).partition(" If reserved but unallocated memory is large")[0][:400]


@contextmanager
def own_stdout() -> Iterator[TextIO]:
    """What was stdout, for the outcome alone: what others print, libraries in C too, goes to stderr."""
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr), os.fdopen(kept, "w", encoding="utf-8", closefd=False) as out:
            yield out
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def main() -> None:
    end_with_parent()
    options = argparse.ArgumentParser(prog="galore_mem.verify.worker")
    options.add_argument("--snapshot", type=Path, help="a folder for the history of CUDA's allocator")
    given = options.parse_args()
    case = Case.from_json(json.load(sys.stdin))
    if case.device == "cuda":  # adam-mini wants a process for each card that it sees
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    with own_stdout() as out:
        print(dump(run(case, given.snapshot)), file=out)


if __name__ == "__main__":
    main()
