"""Whole cases on a device that behaves as CUDA does (`fake_cuda.py`), from the worker's input to its output.

No GPU has run them. What these tests show is that the harness asks the right things at the right time, that tensors
land where the ledger has them, and that the estimate for CUDA (blocks of 512 bytes, counters on the host, two cuBLAS
workspaces) is what a device that allocates so would see. What CUDA's kernels need inside is not in the fake: SVDs
(`refresh` is at most the estimate here), and attention (eager, which has the same operations everywhere).
"""

from __future__ import annotations

import io
import json
import os
import pickle
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import bitsandbytes  # noqa: F401  # before the fake, or it would look for its CUDA kernels
import pytest
import torch
from fake_cuda import BLOCK, MIB, WORKSPACE, FakeCuda

from galore_mem.errors import InputError
from galore_mem.verify.builders import every
from galore_mem.verify.case import OPTIMIZER, RESIDENTS, TRAIN, Case, Outcome, Sizes
from galore_mem.verify.kernels import chosen_kernels
from galore_mem.verify.line import load
from galore_mem.verify.matrix import hyperparameters
from galore_mem.verify.peers import BUILDERS
from galore_mem.verify.predict import predict
from galore_mem.verify.record import Record
from galore_mem.verify.snapshot import check, file_name
from galore_mem.verify.worker import main, run

ALONE = [key for key, row in BUILDERS.items() if OPTIMIZER in row.workloads and "tensorly" not in row.needs]  # (slow)
TRAINED = [
    ("adamw", "torch-foreach"), ("adamw-8bit", "bitsandbytes"), ("lora", "peft"), ("galore", "galore-mem"),
    ("q-galore", "galore-mem"),
]  # fmt: skip
PARAMETERS = 20  # tensors of small-tied: 2 layers of 9, the embedding, the last norm


@contextmanager
def installed(cuda: FakeCuda) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        cuda.install(patch)
        with cuda:
            yield


def on_card(one: Case, snapshots: Path | None = None, cuda: FakeCuda | None = None) -> Outcome:
    """The outcome of a case on a card of its own, as in a process of its own."""
    with installed(cuda or FakeCuda()):
        return run(one, snapshots)


def case(
    method: str, implementation: str, workload: str = OPTIMIZER, model: str = "small-tied", **options: Any
) -> Case:
    passes = {"batch_size": 2, "seq_len": 32, "attention": "eager"} if workload == TRAIN else {}
    return Case(
        model,
        method,
        implementation,
        workload,
        "fp32",
        {"device": "cuda", **passes, **options},
        hyperparameters(method),
    )


def sizes(outcome: Outcome) -> tuple[Sizes, Sizes]:
    """What was predicted and measured, the residents being equal to the byte, each tensor of them."""
    assert outcome.status == "ok", outcome.detail
    assert outcome.predicted is not None
    assert outcome.measured is not None
    assert [getattr(outcome.predicted, r) for r in RESIDENTS] == [getattr(outcome.measured, r) for r in RESIDENTS]
    assert all(b.equal for b in outcome.buffers)
    return outcome.predicted, outcome.measured


def off(predicted: Sizes, measured: Sizes) -> dict[str, int]:
    """Bytes measured above the prediction, by phase that has one."""
    return {name: measured.phases[name] - p for name, p in predicted.phases.items()}


# -- optimizers alone --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "implementation"), ALONE, ids=["-".join(key) for key in ALONE])
def test_optimizer(method: str, implementation: str) -> None:
    """What stays, to the byte, and steps but for scalars, which the estimate leaves out: a block of 512 bytes each.
    Packages hold two at most. Ours look first at two numbers of each gradient, which say whether it is finite: three
    blocks a parameter with the answer, and four to find the last. LOMO's update is in the backward pass, with the
    harness' own scalars: one for each parameter, their sum and its gradient."""
    model = "small-qwen2" if implementation == "q-galore-torch" else "small-tied"  # its groups of 256 do not fit others
    outcome = on_card(case(method, implementation, model=model))
    if "not installed" in outcome.detail:
        pytest.skip(outcome.detail)
    predicted, measured = sizes(outcome)
    ours = implementation.startswith("galore-mem")
    most = (3 * PARAMETERS + 4 if ours else PARAMETERS + 2 if method == "lomo" else 2) * BLOCK
    excess = off(predicted, measured)
    assert 0 <= excess.pop("step", 0) <= most
    assert all(more <= most for more in excess.values())  # of a refresh the fake sees less than there is
    assert predicted.workspaces_bytes is None
    assert measured.workspaces_bytes in (0, WORKSPACE)


def test_bytes_of_one_step() -> None:
    """AdamW foreach: weights, gradients, two moments and a copy, each tensor in blocks of its own. The fake's counters
    say the same of what was asked for, of segments, and through the driver."""
    shapes = [
        (97, 48), (48,),
        *2 * [(48, 48), (48, 48), (48, 48), (48, 48), (80, 48), (80, 48), (48, 80), (48,), (48,)],
    ]  # fmt: skip
    asked = [4 * torch.Size(shape).numel() for shape in shapes]
    blocks = sum(-(-n // BLOCK) * BLOCK for n in asked)
    predicted, measured = sizes(on_card(case("adamw", "torch-foreach")))
    assert len(shapes) == PARAMETERS
    assert predicted.phases == measured.phases == {"step": 5 * blocks}
    assert measured.requested == {"step": 5 * sum(asked)}
    assert measured.reserved == {"step": 2 * MIB}
    assert measured.device_used_bytes == 2 * MIB
    assert measured.workspaces_bytes == 0


def test_step_counters_are_where_the_ledger_has_them() -> None:
    """On the host; the fused kernel reads them on the device."""
    for kind, found in (("foreach", False), ("fused", True)):
        outcome = on_card(case("adamw", f"torch-{kind}"))
        sizes(outcome)
        assert any(b.buffer == "step" for b in outcome.buffers) is found


def test_layerwise() -> None:
    """One gradient at a time; products in the autograd thread, hence one workspace. The harness' own scalars, one for
    each parameter, their sum and its gradient, are all that is not predicted."""
    predicted, measured = sizes(on_card(case("galore", "galore-mem", layerwise=True)))
    assert measured.gradients_bytes == 97 * 48 * 4  # the embedding's
    assert measured.workspaces_bytes == WORKSPACE
    assert 0 <= off(predicted, measured)["step"] <= (PARAMETERS + 2) * BLOCK


# -- whole training steps ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "implementation"), TRAINED, ids=["-".join(key) for key in TRAINED])
def test_train(method: str, implementation: str) -> None:
    """Forward and backward to the byte; LLaMA's rotary frequencies, transformers' copy of them and both workspaces are
    predicted and found."""
    predicted, measured = sizes(on_card(case(method, implementation, TRAIN)))
    excess = off(predicted, measured)
    assert excess["forward"] == excess["backward"] == 0
    step = excess["step"] + BLOCK  # the harness has let go of the loss, which is predicted: one block
    assert 0 <= step <= (3 * PARAMETERS + 4) * BLOCK if implementation == "galore-mem" else step == 0
    assert predicted.workspaces_bytes == measured.workspaces_bytes == 2 * WORKSPACE
    assert measured.device_used_bytes is not None
    assert measured.device_used_bytes >= 2 * WORKSPACE + measured.peak_allocated_bytes


def test_train_without_rotary_buffers() -> None:
    """GPT-2: forward and backward to the byte."""
    predicted, measured = sizes(on_card(case("adamw", "torch-foreach", TRAIN, "small-gpt2")))
    assert off(predicted, measured) == {"forward": 0, "backward": 0, "step": -BLOCK}  # the loss


def test_the_prediction_is_of_this_card() -> None:
    """Workspaces of 32 MiB from compute capability 9.0 on; phases are without them."""
    one = case("adamw", "torch-foreach", TRAIN)
    older, newer = (predict(one, capability).sizes for capability in ((8, 9), (9, 0)))
    assert (older.workspaces_bytes, newer.workspaces_bytes) == (2 * WORKSPACE, 2 * 32 * MIB)
    assert older.phases == newer.phases


# -- faults ------------------------------------------------------------------------------------------------


def test_out_of_memory_is_that_cases_status(tmp_path: Path) -> None:
    """GPT-2 does not fit into 3 MiB beside the context and other processes; LLaMA's 0.9 MB do. What was predicted is
    kept with the message."""
    record = Record(tmp_path / "runs.jsonl")
    for model in ("small-tied", "small-gpt2", "small-tied"):
        record.append(on_card(case("adamw", "torch-foreach", model=model), cuda=FakeCuda((450 + 1000 + 3) * MIB)))
    before, bad, after = record.read()
    assert (before.status, bad.status, after.status) == ("ok", "oom", "ok")
    assert before.measured is not None
    assert after.measured is not None
    assert before.measured.phases == after.measured.phases
    assert bad.detail.startswith("CUDA out of memory. Tried to allocate")
    assert bad.detail.endswith("is reserved by PyTorch but unallocated.")  # without the advice
    assert bad.measured is None
    assert bad.predicted is not None
    assert bad.predicted.peak_allocated_bytes > 3 * MIB


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`",
    ],
    ids=["runtime", "cublas", "cusolver"],
)
def test_libraries_that_run_out_of_memory(message: str) -> None:
    class Exhausted(FakeCuda):
        def take(self, nbytes: int) -> None:
            raise RuntimeError(message)

    outcome = on_card(case("adamw", "torch-foreach"), cuda=Exhausted())
    assert (outcome.status, outcome.detail) == ("oom", message)


def test_without_cuda() -> None:
    outcome = run(case("adamw", "torch-foreach"))
    assert outcome.status == "unsupported"
    assert outcome.detail == "torch sees no CUDA device here; give --device cpu"
    assert outcome.environment["torch"] == torch.__version__


def test_an_allocator_that_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")
    outcome = on_card(case("adamw", "torch-foreach"))
    assert outcome.status == "unsupported"
    assert outcome.detail == "torch counts no memory with PYTORCH_NO_CUDA_MEMORY_CACHING=1; unset it"


# -- the allocator's history -------------------------------------------------------------------------------


def history(folder: Path, one: Case) -> list[dict[str, Any]]:
    """The events of the file that a case has left, the only one."""
    (path,) = folder.iterdir()
    assert path.name == file_name(one)
    with path.open("rb") as file:
        (events,) = pickle.load(file)["device_traces"]
    return list(events)


def test_snapshot(tmp_path: Path) -> None:
    """From the first tensor on, each phase by name; with stacks; off again afterwards. It changes no measurement."""
    one, cuda = case("galore", "galore-mem"), FakeCuda()
    recorded, plain = on_card(one, tmp_path / "new", cuda), on_card(one)
    assert recorded.measured == plain.measured
    assert recorded.environment["snapshot"] == str(tmp_path / "new" / file_name(one))
    assert "snapshot" not in plain.environment
    events = history(tmp_path / "new", one)
    assert (events[0]["action"], events[0]["size"], events[0]["user_metadata"]) == ("alloc", 97 * 48 * 4, "warm-up")
    assert {e["user_metadata"] for e in events} == {"warm-up", "between", "step", "refresh"}
    assert [call for call in cuda.calls if call.startswith("history")] == [
        "history all [('context', 'all'), ('stacks', 'all')]", "history None []",
    ]  # fmt: skip


def test_snapshot_of_a_case_that_runs_out_of_memory(tmp_path: Path) -> None:
    one = case("adamw", "torch-foreach", model="small-gpt2")
    outcome = on_card(one, tmp_path, FakeCuda((450 + 1000 + 2) * MIB))
    assert outcome.status == "oom"
    assert history(tmp_path, one)[-1]["action"] == "oom"
    assert outcome.environment["snapshot"] == str(tmp_path / file_name(one))


def test_a_snapshot_that_cannot_be_written_costs_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(value: object, file: io.BufferedWriter) -> None:
        file.write(b"begun")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.cuda.memory.pickle.dump", full)
    outcome = on_card(case("adamw", "torch-foreach"), tmp_path)
    sizes(outcome)
    assert outcome.environment["snapshot"].startswith("not written: No space left on device (")
    assert list(tmp_path.iterdir()) == []


def test_where_there_is_no_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        InputError, match="--snapshot records the allocator of CUDA, and this runs on the cpu; leave it"
    ):
        check(tmp_path, "cpu")
    outcome = run(Case("small-tied", "adamw", "torch-loop"), tmp_path)
    assert (outcome.status, "--snapshot" in outcome.detail) == ("unsupported", True)
    file = tmp_path / "file"
    file.write_text("")
    for folder in (file, file / "below"):
        with pytest.raises(InputError, match="--snapshot: cannot write into"):
            check(folder, "cuda")
    monkeypatch.chdir(tmp_path)
    assert check(Path("a") / "b", "cuda") == tmp_path / "a" / "b"
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_file_names() -> None:
    """Readable, plain, of bounded length; other cases have others."""
    one = case("galore", "galore-mem")
    assert file_name(one).startswith("small-tied-galore-galore-mem-optimizer-fp32-rank=64-")
    elsewhere = Case("../../weights of Zoë/config.json", "adamw", "torch-loop")
    assert file_name(elsewhere).startswith("config.json-adamw-torch-loop-optimizer-fp32-")
    others = [
        one, case("galore", "galore-mem", layerwise=True), elsewhere, Case("x" * 300, "adamw", "torch-loop"),
        Case("other/config.json", "adamw", "torch-loop"), Case("...", "adamw", "torch-loop"),
    ]  # fmt: skip
    names = [file_name(other) for other in others]
    assert len(set(names)) == len(names)
    assert all(name.isascii() and len(name) < 150 and name[0] not in ".-" and "/" not in name for name in names)


# -- the process -------------------------------------------------------------------------------------------


def test_worker_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """The case on stdin, the folder as an argument, the outcome on stdout and nothing else, whoever prints. Of several
    cards it sees the first."""

    class Talking(FakeCuda):
        def synchronize(self, device: Any = None) -> None:
            os.write(1, b"a library in C\n")
            print("a package")

    one = case("adamw", "torch-loop")
    monkeypatch.setattr(sys, "argv", ["worker", "--snapshot", str(tmp_path)])
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(one.to_json())))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    with installed(Talking()):
        main()
    said = capfd.readouterr()
    assert "a library in C" in said.err
    assert "a package" in said.err
    outcome = load(said.out)
    assert outcome.environment["CUDA_VISIBLE_DEVICES"] == "2"
    assert outcome.case == one
    predicted, measured = sizes(outcome)
    assert predicted.phases == measured.phases
    assert Path(outcome.environment["snapshot"]).exists()


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The card, with what is free before the first tensor; settings that are made; releases of what is installed."""
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    cuda = FakeCuda()
    cuda.take(5 * MIB)  # 3 segments
    found = on_card(case("adamw", "torch-loop"), cuda=cuda).environment
    expected: Mapping[str, Any] = {
        "device": "cuda", "gpu": "Fake GPU", "compute_capability": (8, 9), "capacity_bytes": 8 * 2**30,
        "free_bytes": 8 * 2**30 - (450 + 1000 + 6) * MIB, "allocator": "native",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True", "torch": torch.__version__,
    }  # fmt: skip
    assert expected.items() <= found.items()
    assert {"cuda", "driver", "linalg", "transformers", "bitsandbytes", "peft"} <= found.keys()
    assert "CUBLAS_WORKSPACE_CONFIG" not in found


def test_what_is_changed_on_the_cpu_is_left_alone_on_cuda() -> None:
    work = predict(case("adamw", "torch-loop")).work
    with installed(FakeCuda()):
        before = torch.cuda.synchronize, torch.get_num_threads(), torch.backends.mkldnn.enabled
        for key in (("galore-8bit", "galore-torch"), ("q-galore", "q-galore-torch")):
            with chosen_kernels(work), BUILDERS[key].around():
                assert (torch.cuda.synchronize, torch.get_num_threads(), torch.backends.mkldnn.enabled) == before


def test_cpu_remarks_are_not_told_on_cuda() -> None:
    for method, implementation in every():
        row = BUILDERS.get((method, implementation))
        if row is not None and row.on_cpu:
            work = predict(case(method, implementation)).work
            assert not any(remark in row.told(work, {}) for remark in row.on_cpu)


# -- records -----------------------------------------------------------------------------------------------


def test_sizes_of_earlier_records() -> None:
    stays = {"weights_bytes": 1, "gradients_bytes": 2, "optimizer_state_bytes": 3}
    assert Sizes.from_json({**stays, "phases": {"step": 4}}) == Sizes(1, 2, 3, {"step": 4})
    with_reserved = {**stays, "peak_allocated_bytes": 4, "phases": {"step": 4}, "reserved": {"step": 5}}
    assert Sizes.from_json(with_reserved) == Sizes(1, 2, 3, {"step": 4}, {"step": 5})


def test_sizes_survive_the_record() -> None:
    """What is not known is absent, and 0 is known."""
    full = Sizes(1, 2, 3, {"step": 4}, {"step": 8}, {"step": 3}, 0, 9)
    shown = json.loads(json.dumps(full.to_json()))
    assert shown.items() >= {"requested": {"step": 3}, "workspaces_bytes": 0, "device_used_bytes": 9}.items()
    assert Sizes.from_json(shown) == full
    assert set(Sizes(1, 2, 3, {}).to_json()) == {*RESIDENTS, "peak_allocated_bytes", "phases"}
