"""The runner: whatever becomes of one case's process, the others' results stay. (Its record: test_verify_record.py.)"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from threading import Timer

import pytest

import galore_mem.verify.builders as builders
import galore_mem.verify.matrix as matrix
import galore_mem.verify.processes as processes
from galore_mem.errors import InputError
from galore_mem.verify.case import BufferPair, Case, Outcome, Sizes
from galore_mem.verify.line import dump
from galore_mem.verify.processes import Ended, Forked, Fresh
from galore_mem.verify.record import Record
from galore_mem.verify.runner import judged, run, run_one

CASE = Case("small-llama", "adamw", "torch-loop")
OTHER = Case("small-llama", "galore", "galore-mem", recipe="pure-bf16", hyperparameters={"rank": 8})
SIZES = Sizes(100, 100, 200, {"step": 500, "refresh": 600})
FINE = Outcome(
    CASE, "ok", "", SIZES, SIZES, (BufferPair("w", "exp_avg", (5, 5), "float32", 100, 100),), {"device": "cpu"}
)


def python(program: str) -> Fresh:
    """A worker that runs this program."""
    return Fresh(command=(sys.executable, "-c", program))


def answering(outcome: Outcome) -> Fresh:
    return python(f"import sys; sys.stdin.read(); print({json.dumps(dump(outcome))})")


# -- how a process can end ---------------------------------------------------------------------------


def test_an_answer_is_taken() -> None:
    assert run_one(CASE, start=answering(FINE)) == FINE


def test_a_killed_process_is_out_of_memory_or_killed_by_hand() -> None:
    outcome = run_one(CASE, start=python("import os; os.kill(os.getpid(), 9)"))
    assert (outcome.status, "SIGKILL" in outcome.detail) == ("oom", True)


def test_a_crash_names_its_signal() -> None:
    outcome = run_one(CASE, start=python("import os; os.kill(os.getpid(), 11)"))
    assert outcome.status == "failed"
    assert "SIGSEGV" in outcome.detail


def test_a_process_that_hangs_is_ended() -> None:
    outcome = run_one(CASE, timeout=0.5, start=python("import time; time.sleep(60)"))
    assert outcome.status == "failed"
    assert "within 0.5 seconds" in outcome.detail


def test_a_process_that_fails_says_its_last_line() -> None:
    outcome = run_one(CASE, start=python("raise SystemExit('no such thing')"))
    assert outcome.status == "failed"
    assert "code 1: no such thing" in outcome.detail


@pytest.mark.parametrize("said", ["", "not json", "[]", '{"status": "ok"}', "{" * 5000])
def test_an_answer_that_is_none_is_a_failure(said: str) -> None:
    assert run_one(CASE, start=python(f"print({said!r})")).status == "failed"


@pytest.mark.skipif(sys.platform != "linux", reason="address space limits are Linux's")
def test_memory_that_runs_out_is_that_cases_status() -> None:
    """The real worker with 1.6 GiB of address space; weights and gradients are 2 x 536 MB, moments as much again."""
    limited = python(
        "import resource, runpy; resource.setrlimit(resource.RLIMIT_AS, (1600 * 2**20,) * 2);"
        "runpy.run_module('galore_mem.verify.worker', run_name='__main__')"
    )
    outcome = run_one(Case("llama-130m", "adamw", "torch-loop"), start=limited)
    assert outcome.status == "oom", outcome.detail
    assert "memory" in outcome.detail


# -- forks -------------------------------------------------------------------------------------------


# the server with nothing to import and a worker that takes its case as a program
FORKS = """
import sys, galore_mem.verify.server as server, types
server.WARM = ()
worker = types.ModuleType("galore_mem.verify.worker")
worker.main = lambda: exec(sys.stdin.read())
sys.modules["galore_mem.verify.worker"] = worker
server.main()
"""


@pytest.fixture
def forks() -> Iterator[Forked]:
    started = Forked(command=(sys.executable, "-c", FORKS))
    yield started
    started.stop()


def test_each_fork_ends_as_a_process_does(forks: Forked) -> None:
    """What one prints, says, exits with or dies of is its own, and the next has a process of its own."""
    assert forks.run("print('seen')", 30) == Ended(0, "seen\n", "")
    assert forks.run("import os; os.kill(os.getpid(), 9)", 30)[:2] == (-9, "")
    failed = forks.run("global left; left = 1; raise ValueError('no')", 30)
    assert (failed.code, failed.err) == (1, "ValueError: no\n")
    assert forks.run("print('left' in globals())", 30).out == "False\n"
    assert forks.run("raise SystemExit(7)", 30).code == 7
    late = forks.run("import time; time.sleep(60)", 0.3)
    assert (late.code, late.late) == (-9, True)
    assert forks.run("import os; os.write(1, b'from below')", 30).out == "from below"


def test_a_server_that_dies_is_one_case_and_the_next_has_another(forks: Forked) -> None:
    died = forks.run("import os; os.kill(os.getppid(), 9)", 30)
    assert died.code == -9
    assert forks.run("print('again')", 30).out == "again\n"


def test_stopping_ends_what_runs() -> None:
    """From another thread, as Ctrl-C does it: the case is not waited for."""
    for start, text in (
        (Forked(command=(sys.executable, "-c", FORKS)), "import time; time.sleep(60)"),
        (python("import time; time.sleep(60)"), ""),
    ):
        Timer(1.5, start.stop).start()
        begun = time.monotonic()
        assert start.run(text, 60).code == -9
        assert time.monotonic() - begun < 30


def written(path: Path) -> bool:
    """Is there something in the file?"""
    return path.exists() and path.read_text() != ""


def test_an_interrupted_run_leaves_no_process_and_no_half_result(tmp_path: Path) -> None:
    """The second case is running when the first outcome's reader stops: it is killed, and not in the record."""
    record = Record(tmp_path / "runs.jsonl")
    slow = python(f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)")
    outcomes = run([CASE, OTHER], record=record, starters=[answering(FINE), slow])
    assert next(outcomes).case == CASE
    while not written(tmp_path / "pid"):
        time.sleep(0.05)
    outcomes.close()
    assert record.read() == [FINE]
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_forks_measure_as_fresh_processes_do() -> None:
    """The real worker, twice in one server: equal to the byte."""
    case = Case("small-tied", "galore", "galore-mem", hyperparameters={"rank": 8})
    forked = Forked()
    try:
        first, second = (run_one(case, start=forked) for _ in range(2))
    finally:
        forked.stop()
    alone = run_one(case)
    assert first.status == "ok", first.detail
    assert first.measured == second.measured == alone.measured
    assert first.buffers == alone.buffers


def test_what_is_not_installed_needs_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builders, "find_spec", lambda name: None)
    nobody = python("raise SystemExit('was started')")
    [gone] = run([CASE], starters=[nobody])
    assert (gone.status, gone.detail) == ("unsupported", "needs the package torch, which is not installed")
    [unbuilt] = run([Case("small-llama", "relora", "relora", "train")], starters=[nobody])
    assert unbuilt.status == "unsupported"


def test_a_phase_that_was_lost_is_no_success() -> None:
    lost = replace(FINE, measured=Sizes(100, 100, 200, {"step": 500}))
    assert judged(lost, 0.02).detail == "refresh: predicted 600, and not measured"
    assert judged(replace(lost, not_compared=("refresh",)), 0.02).status == "ok"
    assert judged(replace(FINE, measured=None), 0.02).status == "failed"
    assert judged(FINE, float("nan")).status == "mismatch"
    kept, found = replace(SIZES, workspaces_bytes=17), replace(SIZES, workspaces_bytes=0)
    assert "workspaces_bytes" in judged(replace(FINE, predicted=kept, measured=found), 0.02).detail


def test_a_phase_without_bytes_is_a_mismatch_and_no_division() -> None:
    nothing = replace(FINE, measured=Sizes(100, 100, 200, {"step": 0, "refresh": 600}))
    assert judged(nothing, 0.02).detail == "step: measured 0, predicted 500"


def test_only_what_was_measured_last_time_is_left_out(tmp_path: Path) -> None:
    record = Record(tmp_path / "runs.jsonl")
    for outcome in (FINE, Outcome(CASE, "failed", "later"), Outcome(OTHER, "unsupported", "needs the package x")):
        record.append(outcome)
    begun: list[Case] = []
    list(run([CASE, OTHER], record=record, resume=True, starters=[answering(FINE)], begun=begun.append))
    assert begun == [CASE, OTHER]


def test_what_killed_a_case_leaves_its_prediction() -> None:
    outcome = run_one(CASE, start=python("import os; os.kill(os.getpid(), 9)"))
    assert outcome.predicted is not None
    assert outcome.predicted.weights_bytes > 0
    assert outcome.environment["device"] == "cpu"


def test_a_process_that_cannot_be_started_is_that_cases_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*_: object, **__: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(processes.subprocess, "Popen", none_left)
    assert run_one(CASE).detail == "no process could be started: Cannot allocate memory"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell a process of its parent's end")
def test_nothing_outlives_a_runner_that_is_killed(tmp_path: Path) -> None:
    """SIGKILL to the process that started a case by a fork: the server and the case end."""
    told = f"open({str(tmp_path / 'pid')!r}, 'w').write(f'{{os.getpid()}} {{os.getppid()}}')"
    case = f"import os, time; {told}; time.sleep(60)"
    program = (
        f"import sys; from galore_mem.verify.processes import Forked;"
        f"Forked(command=(sys.executable, '-c', {FORKS!r})).run({case!r}, 60)"
    )
    runner = subprocess.Popen([sys.executable, "-c", program])
    while not written(tmp_path / "pid"):
        time.sleep(0.05)
    runner.kill()
    runner.wait()
    until = time.monotonic() + 20
    pids = [int(pid) for pid in (tmp_path / "pid").read_text().split()]
    while any(alive(pid) for pid in pids) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in pids)


def alive(pid: int) -> bool:
    """Does the process run? (One that has ended and was not waited for does not.)"""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


# -- the verdict -------------------------------------------------------------------------------------


def test_a_byte_of_state_is_a_mismatch_and_a_peak_has_a_tolerance() -> None:
    state = Outcome(CASE, "ok", "", SIZES, Sizes(100, 100, 201, SIZES.phases))
    assert judged(state, 0.02).status == "mismatch"
    assert "optimizer_state_bytes: measured 201, predicted 200 (-1)" in judged(state, 0.02).detail
    peak = Outcome(CASE, "ok", "", SIZES, Sizes(100, 100, 200, {"step": 505, "refresh": 600}))
    assert judged(peak, 0.02).status == "ok"  # 5 of 505 is 0.99 %
    assert judged(peak, 0.005).status == "mismatch"


def test_a_buffer_that_is_missing_or_not_predicted_is_a_mismatch() -> None:
    for pair in (BufferPair("w", "step", (), "float32", 4, None), BufferPair("w", "junk", (3,), "float32", None, 12)):
        assert judged(Outcome(CASE, "ok", "", SIZES, SIZES, (pair,)), 0.02).status == "mismatch"
    assert judged(FINE, 0.0).status == "ok"


def test_errors_are_signed_and_relative_to_the_measurement() -> None:
    said = Outcome(CASE, "ok", "", Sizes(50, 100, 0, {"step": 450}), Sizes(100, 100, 0, {"step": 500}))
    assert said.rel_error() == {
        "weights_bytes": -0.5, "gradients_bytes": 0.0, "optimizer_state_bytes": 0.0,
        "peak_allocated_bytes": -0.1, "phases": {"step": -0.1},
    }  # fmt: skip


# -- what is not here --------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda"])
def test_without_torch_there_is_one_line(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="needs torch; install galore-mem with its extra: verify"):
        matrix.device_of(device)


def test_a_device_that_is_not_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(InputError, match="torch sees no CUDA device"):
        matrix.device_of("cuda")
    with pytest.raises(InputError, match="unknown device 'gpu'"):
        matrix.device_of("gpu")
    assert matrix.device_of("auto") == "cpu"
