"""The programs of docs/own.md run: simulated on a card, and, on the CPU, simulated and for real."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonschema
import pytest
import torch
from simulate_runs import measured

from galore_mem.report.schema import schema
from galore_mem.setup import Setup
from galore_mem.simulate import simulate
from galore_mem.simulate.programs import Marker, run_program, takes_marker, told_by_calls
from galore_mem.simulate.result import FIRST
from galore_mem.simulate.steps import run_step
from galore_mem.verify.case import WARM
from galore_mem.verify.meters import CpuMeter
from galore_mem.verify.workloads import Measured

PAGE = Path(__file__).resolve().parent.parent / "docs" / "own.md"
CPU = torch.device("cpu")
FUNCTIONS = {
    "plain": ["load", "first-step", "forward", "backward", "step"],
    "main": ["load", "forward", "backward", "step"],
    "inference": ["load", "first-step", "forward"],
    "distill": ["load", "program", "first step", "teacher", "student", "backward", "update"],
}
# Bytes. Python's numbers beside tensors become tensors of up to 8 bytes for the length of an operation, in C++, which
# no dispatch mode sees.
NUMBERS = 32


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The page's code as a module."""
    name = "own_page"
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == len(FUNCTIONS)
    folder = tmp_path_factory.mktemp("page")
    (folder / f"{name}.py").write_text("\n\n".join(blocks))
    sys.path.insert(0, str(folder))
    yield __import__(name)
    sys.path.remove(str(folder))
    del sys.modules[name]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_on_a_card(name: str, programs: ModuleType) -> None:
    result = simulate(f"own_page:{name}", gpu="24GiB")
    jsonschema.validate(result.to_json(), schema("simulate"))
    [made] = result.estimates
    assert [phase.name for phase in made.phases] == FUNCTIONS[name]
    assert made.fits is not None
    assert made.fits.verdict == "fits"
    weights = {"plain": 256 * 1024 + 1024 + 1024 * 10 + 10, "distill": 2560 * (256 + 64) + 2560 + 2 * 64}
    if name in weights:  # (teacher's and student's: of n rows each, n = 2048 and 512)
        assert made.weights_bytes == 4 * weights[name]
    assert (made.gradients_bytes == 0) == (name == "inference")


def really(name: str, programs: ModuleType) -> dict[str, int]:
    """The most bytes of each phase of a real run on the CPU."""
    function: Callable[..., Any] = getattr(programs, name)

    def program(meter: CpuMeter) -> Measured:
        marker = Marker(meter)
        meter.enter("load")
        if name in ("plain", "inference"):
            return run_step(function, Setup(device="cpu"), 1, CPU, meter)
        if name == "distill":
            made = function()
            assert takes_marker(made, named=False)
            run_program(made, marker)
        else:
            with told_by_calls(marker):
                function()
        return Measured(0, 0, 0, {})

    return {FIRST if phase == WARM else phase: peak for phase, peak in measured(program)[1].items()}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_beside_a_real_run(name: str, programs: ModuleType) -> None:
    [made] = simulate(f"own_page:{name}", setup=Setup(device="cpu")).estimates
    found = really(name, programs)
    for phase in made.phases[name == "plain" :]:  # (of a step's load, only what stays is looked at)
        assert phase.allocated_bytes == pytest.approx(found[phase.name], abs=NUMBERS), phase.name
