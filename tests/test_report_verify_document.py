"""docs/verify.md is computed from records: `benchmarks/verify.py` on records whose numbers are known."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from galore_mem.verify.case import TRAIN, BufferPair, Case, Outcome, Sizes
from galore_mem.verify.peers import MISREAD
from galore_mem.verify.record import Record

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PARTS = ("verify", "verify_facts", "verify_large")
Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield import_module("verify")
    for name in PARTS:
        sys.modules.pop(name, None)


def outcome(
    method: str, code: str, *pairs: BufferPair, state: int = 0, step: int = 0, model: str = "small-tied", **more: Any
) -> Outcome:
    """A case in which everything is as predicted: 1000 bytes of weights and of gradients."""
    sizes = Sizes(1000, 1000, state, {"step": step} if step else {})
    rank = {} if method == "adamw" else {"rank": 8}
    case = Case(model, method, code, recipe="fp32", options={"device": "cpu"}, hyperparameters=rank)
    return Outcome(case, "ok", more.get("detail", ""), sizes, sizes, pairs, {"torch": "2.13.0"}, 2.0)


def pair(param: str, buffer: str, shape: tuple[int, ...], fmt: str, nbytes: int) -> BufferPair:
    return BufferPair(param, buffer, shape, fmt, nbytes, nbytes)


def written(script: ModuleType, folder: Path, *outcomes: Outcome) -> str:
    for o in outcomes:
        Record(folder / "r.jsonl").append(o)
    found = script.read([folder / "r.jsonl"])
    return str(script.document(found, ["r.jsonl"], datetime.date(2026, 1, 2)))


def test_what_was_run_when_and_how_to_run_it_again(script: ModuleType, tmp_path: Path) -> None:
    text = written(script, tmp_path, outcome("adamw", "torch-loop", state=80, step=2100))
    assert "`python benchmarks/verify.py r.jsonl` on 2026-01-02: torch 2.13.0." in text
    assert "galore-mem verify --record FILE" in text
    assert "## Large models" not in text


def test_a_row_for_every_implementation_from_its_last_outcomes(script: ModuleType, tmp_path: Path) -> None:
    """Predicted 2100 and measured 2000 in the optimizer's step: +100 B, 5 % of 2000."""
    fine = outcome("adamw", "torch-loop", pair("w", "exp_avg", (20,), "float32", 80), state=80, step=2100)
    failed = Outcome(fine.case, "failed", "in a run before")
    assert fine.measured is not None
    off = Outcome(fine.case, "ok", "", fine.predicted, Sizes(1000, 1000, 80, {"step": 2000}), fine.buffers)
    gone = Outcome(Case("small-llama", "fira", "fira", TRAIN), "unsupported", "needs the package fira")
    text = written(script, tmp_path, failed, off, gone)
    assert "| adamw | torch-loop | 1 | 1 | 0 | 80 | 80 | +100 B (+5.000%) | – | – |" in text
    assert "| fira | fira | 0 | 0 | 0 | – | – | – | – | – |" in text
    assert "- unsupported: needs the package fira: fira (fira)" in text
    assert "in a run before" not in text
    assert "mismatch: adamw (torch-loop), small-tied, optimizer steps, fp32, cpu: step" in text  # 5 % are too much


def test_pinned_factors_are_found_by_their_storages(script: ModuleType, tmp_path: Path) -> None:
    """A 48 x 8 projector in float32: 48 x 8 x 4 = 1,536 bytes of elements; all of U is 48 x 48 x 4 = 9,216."""
    theirs = outcome("galore", "galore-torch", pair(Q, "projector.ortho_matrix", (48, 8), "float32", 9216))
    ours = outcome("galore", "galore-mem", pair(Q, "projector", (48, 8), "float32", 1536))
    text = written(script, tmp_path, theirs, ours)
    assert (
        "| galore | galore-torch | small-tied, optimizer steps, fp32, cpu | 1 | 1 | 1 | 1,536 | 9,216 | 7,680 | 1,536 |"
        in text
    )
    assert "Of 1 tensors of ours 0 keep more" in " ".join(text.split())


def test_bytes_a_value_of_int4_projectors(script: ModuleType, tmp_path: Path) -> None:
    """2,304 values in 2,304 bytes, and in 1,152."""
    theirs = outcome("q-galore", "q-galore-torch", pair(Q, "projector.ortho_matrix", (9, 256), "uint8", 2304))
    ours = outcome("q-galore", "galore-mem", pair(Q, "projector", (48, 48), "int4", 1152))
    text = written(script, tmp_path, theirs, ours)
    assert "| 1 | 2,304 | 2,304 | 1.00 |" in text
    assert "| 1 | 2,304 | 1,152 | 0.50 |" in text


def test_the_copy_of_foreach(script: ModuleType, tmp_path: Path) -> None:
    """The step's peak less weights, gradients and state (1000 + 1000 + 2000): 1000 of foreach, 250 of the loop."""
    foreach = outcome("adamw", "torch-foreach", state=2000, step=5000)
    text = written(script, tmp_path, foreach, outcome("adamw", "torch-loop", state=2000, step=4250))
    assert "torch-foreach | small-tied, optimizer steps, fp32, cpu | 1,000 | 1,000 | 1.00 |" in text
    assert "torch-loop | small-tied, optimizer steps, fp32, cpu | 1,000 | 250 | 0.25 |" in text


def test_arguments_that_bitsandbytes_misreads(script: ModuleType, tmp_path: Path) -> None:
    theirs = outcome("galore-8bit", "galore-torch", state=500, detail=f"{MISREAD}; patched")
    text = written(script, tmp_path, theirs, outcome("galore-8bit", "galore-mem", state=400))
    assert "| set back | 0 | 0 | 500 | 400 |" in text
    as_it_is = outcome("galore-8bit", "galore-torch", pair(Q, "unorm_vec", (1,), "float32", 4), state=504)
    (tmp_path / "r.jsonl").unlink()
    assert "| as it is | 1 | 4 | 504 |" in written(script, tmp_path, as_it_is)


def test_savings_on_the_projected_linears_and_on_the_whole_model(script: ModuleType, tmp_path: Path) -> None:
    """GaLore 100 bytes on q_proj and 100 on the embedding, GaLore-mini 60 and 50, AdamW 400 and 100: on the linear
    1 - 60/100 = 40 % and 1 - 60/400 = 85 %; on the whole 1 - 110/200 = 45 % and 1 - 110/500 = 78 %."""

    def run(method: str, code: str, inside: int, outside: int) -> Outcome:
        pairs = (pair(Q, "s", (), "float32", inside), pair("model.embed_tokens.weight", "s", (), "float32", outside))
        return outcome(method, code, *pairs, state=inside + outside, step=3000, model="llama-60m")

    runs = run("galore", "galore-mem", 100, 100), run("galore-mini", "galore-mem", 60, 50)
    text = written(script, tmp_path, *runs, run("adamw", "torch-loop", 400, 100), run("adamw", "torch-fused", 400, 100))
    rows = {line.split(" | ")[2]: line.split(" | ") for line in text.splitlines() if line.startswith("| llama-60m")}
    galore, adamw = rows["galore (galore-mem)"], rows["adamw (torch-fused, torch-loop)"]
    assert galore[3:9] == ["100", "60", "40.0%", "200", "110", "45.0%"]
    assert adamw[3:9] == ["400", "60", "85.0%", "500", "110", "78.0%"]
    assert galore[-1] == "40 % (abstract, section 3.2) |"
    assert adamw[-1] == "81 % (abstract); 81.25 % (section 3.2) |"
    # the formulas on LLaMA-60M's layers, h = 512, f = 1376, r = 8: mr + nr = 4 x 2hr + 3 (hr + fr) = 11hr + 3fr against
    # mr + 2nr = 15hr + 6fr: 1 - (5632 + 4128) / (7680 + 8256) = 38.8 %
    assert galore[9] == "38.8%"
    assert "| galore-mini | galore-mem | llama-60m, optimizer steps, fp32, cpu, rank 8 | 2,110 | 2,110 | step |" in text
    assert (
        "galore-mem verify --model llama-60m --method galore --method galore-mini --implementation galore-mem" in text
    )
