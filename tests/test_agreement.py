"""`estimate` and `simulate` agree on a CUDA card, phase by phase: a sample of `benchmarks/accuracy/agreement.py`.

Each row is there for an operation that was once missing on one side.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "accuracy"))

from agreement import BUNDLED, EVERY_WAY, Both, runs  # the suite is no package
from differences import LOSS, differences

from galore_mem.estimator import budget
from galore_mem.simulate.layers import trace_layers
from galore_mem.verify.builders import builder

# The scalar that the loop keeps; the table of 256 float32 that bitsandbytes has for the scales of all NF4 matrices.
KEPT = 1_024
SAMPLE = (
    Both(BUNDLED, "llama-130m", "adamw", "torch-foreach", 1, 2048),
    Both(BUNDLED, "smollm2-135m", "lora", "peft", 8, 256, checkpointing=True),  # grouped queries
    Both(BUNDLED, "gpt2-125m", "galore", "galore-mem", 1, 1024, recipe="pure-fp16"),  # second moments in float32
    Both(EVERY_WAY, "gpt2-125m", "galore-mini", "galore-mem", 2, 256),  # norms of columns
    Both(EVERY_WAY, "gpt2-125m", "flora", "galore-mem", 2, 256, layerwise=True),
    Both(EVERY_WAY, "roberta-base", "adamw", "torch-foreach", 2, 256, True, "amp-fp16", "eager"),  # softmax in float32
    Both(EVERY_WAY, "llama-130m", "qlora", "peft", 2, 256, recipe="amp-bf16"),  # no casts by peft in CUDA's autocast
    Both(EVERY_WAY, "bert-base-uncased", "qlora", "peft", 2, 256),  # a head of which one layer is quantized
)


@pytest.mark.parametrize("case", SAMPLE, ids=lambda case: case.key)
def test_every_phase_is_the_same(case: Both) -> None:
    if not runs(case):
        pytest.skip("a package that it needs is not installed")
    peaks = trace_layers(case.work(), builder(case.method, case.implementation)).trace.peaks()
    said = {phase.name: phase.allocated_bytes for phase in budget(case.case()).phases}
    said["forward"] = max(said["forward"], said["loss"])
    compared = {"forward", "backward", "step", "refresh"} & peaks.keys() & said.keys()
    assert len(compared) >= 2
    assert {name for name in compared if abs(said[name] - peaks[name].total) > KEPT} == set()


def test_differences_are_named() -> None:
    """The loop keeps a loss, a block. NF4 matrices share a table of 256 float32, which the first of them made."""
    case, quantized = SAMPLE[0], SAMPLE[6]
    found: dict[str, Any] = differences(case.work(), builder(case.method, case.implementation))
    assert found == {"forward": [], "backward": [], "step": [[LOSS, -512]]}
    if runs(quantized):
        found = differences(quantized.work(), builder(quantized.method, quantized.implementation))
        ((name, size),) = found["forward"]
        assert (name.endswith("base_layer.weight"), size) == (True, 1024)
