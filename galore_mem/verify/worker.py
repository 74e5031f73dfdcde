"""Runs one case in this process: `python -m galore_mem.verify.worker < case.json > outcome.json`.

The runner starts one for each case, so that nothing of one case reaches the next.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from galore_mem.errors import InputError
from galore_mem.verify.case import OPTIMIZER, BufferPair, Case, Outcome, Sizes
from galore_mem.verify.predict import Prediction, predict

SEEN = ("torch", "transformers", "bitsandbytes", "peft", "torchao", "galore-torch", "pytorch-optimizer", "adam-mini")


def run(case: Case) -> Outcome:
    """Predicts and measures a case; whatever goes wrong becomes its status."""
    start = time.perf_counter()
    try:
        said = predict(case)
        outcome = measure(case, said)
    except InputError as error:
        outcome = Outcome(case, "unsupported", str(error))
    except MemoryError as error:
        outcome = Outcome(case, "oom", f"out of memory: {_line(error)}")
    except Exception as error:  # a case's failure is its result
        outcome = _outcome_of(case, error)
    return replace(outcome, environment=environment(case.device), seconds=time.perf_counter() - start)


def measure(case: Case, said: Prediction) -> Outcome:
    """The case's real run beside its prediction."""
    import torch

    from galore_mem.verify.builders import builder
    from galore_mem.verify.kernels import REMARK, chosen_kernels, large
    from galore_mem.verify.meters import METERS
    from galore_mem.verify.workloads import BETWEEN, WARM, run_optimizer, run_train

    row = builder(case.method, case.implementation)
    row.check(case.workload, said.work)
    device = torch.device(case.device)
    torch.manual_seed(0)
    with METERS[case.device]() as meter, chosen_kernels(said.work), row.around():
        workload = run_optimizer if case.workload == OPTIMIZER else run_train
        found = workload(said.work, row, device, meter)
    not_compared = row.left_out(case.workload, said.work, said.sizes.phases)
    left_out = {WARM, BETWEEN, *not_compared}
    peaks = {name: peak for name, peak in meter.peaks().items() if name not in left_out}
    expected = replace(said.sizes, phases={name: n for name, n in said.sizes.phases.items() if name not in left_out})
    sizes = Sizes(
        found.weights,
        found.gradients,
        found.optimizer_state,
        {name: peak.allocated for name, peak in peaks.items()},
        {name: peak.reserved for name, peak in peaks.items() if peak.reserved is not None},
    )
    told = "; ".join(filter(None, (row.told(said.work, not_compared), REMARK if large(said.work) else "")))
    return Outcome(case, "ok", told, expected, sizes, tuple(pairs(said, found.buffers)))


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


def environment(device: str) -> dict[str, Any]:
    """Where a case ran: device, versions, allocator settings."""
    found: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform(), "device": device}
    for package in SEEN:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        if name in os.environ:
            found[name] = os.environ[name]
    if device == "cuda":
        import torch

        found["gpu"] = torch.cuda.get_device_name()
        found["capacity_bytes"] = torch.cuda.get_device_properties(0).total_memory
    return found


def _outcome_of(case: Case, error: Exception) -> Outcome:
    from galore_mem.verify.builders import Unsupported

    if isinstance(error, Unsupported):
        return Outcome(case, "unsupported", str(error))
    if type(error).__name__ == "OutOfMemoryError" or "not enough memory" in str(error):
        return Outcome(case, "oom", _line(error))
    return Outcome(case, "failed", f"{type(error).__name__}: {_line(error)}")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:400]


def main() -> None:
    case = Case.from_json(json.load(sys.stdin))
    with redirect_stdout(sys.stderr):  # the outcome is all that stdout carries
        outcome = run(case)
    json.dump({**outcome.to_json(), "environment": outcome.environment}, sys.stdout)


if __name__ == "__main__":
    main()
