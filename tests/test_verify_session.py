"""What `galore-mem verify` runs when little is said, and what becomes of it: cases, progress, an interrupt, options."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import pytest
from typer.testing import CliRunner

from galore_mem.cli import app
from galore_mem.errors import InputError
from galore_mem.methods.registry import METHODS
from galore_mem.setup import recipe
from galore_mem.units import GIB
from galore_mem.verify import processes, session
from galore_mem.verify.case import OPTIMIZER, TRAIN, Case, Outcome, Sizes
from galore_mem.verify.fitting import SIZES, fitting
from galore_mem.verify.fitting import fits as estimated_to_fit
from galore_mem.verify.line import dump
from galore_mem.verify.matrix import FORMATS, SHAPES, SMALL, Wishes, chosen, model_of
from galore_mem.verify.processes import Ended
from galore_mem.verify.record import Record
from galore_mem.verify.session import Session, at_a_time, room

EVERYTHING = chosen(Wishes(), "cpu")


# -- which cases -------------------------------------------------------------------------------------


def test_a_run_without_wishes_has_every_implementation_in_two_formats() -> None:
    registry = {(m.name, code.name) for m in METHODS.values() for code in m.implementations}
    for model, fmt in product(SHAPES, FORMATS):
        found = [c for c in EVERYTHING if (c.workload, c.model, c.recipe) == (OPTIMIZER, model, fmt)]
        assert {(c.method, c.implementation) for c in found} == registry
        assert len(found) == len(registry)
    trained = {c.method for c in EVERYTHING if c.workload == TRAIN}
    assert trained == set(METHODS)
    assert len({c.key for c in EVERYTHING}) == len(EVERYTHING)
    assert {c.model for c in EVERYTHING} == set(SMALL)


def test_the_default_cases_have_every_kind_of_shape() -> None:
    """What the issue of exactness lists: wide, tall, square, vectors, a rank above a side, few elements, element counts
    that are no multiple of 256, tied embeddings, grouped queries, biases and transposed weights."""
    models = [model_of(name) for name in SHAPES]
    shapes = {row.shape for model in models for row in model.parameters()}
    matrices = {shape for shape in shapes if len(shape) == 2}
    assert any(a > b for a, b in matrices)
    assert any(a < b for a, b in matrices)
    assert any(a == b for a, b in matrices)
    assert any(len(shape) == 1 for shape in shapes)
    assert any(min(shape) < 64 < max(shape) for shape in matrices)  # the default rank is 64
    assert any(a * b < 4096 for a, b in matrices)
    assert any(a * b > 4096 and a * b % 256 for a, b in matrices)
    heads = [model.heads for model in models]
    assert any(h is not None and h.num_attention_heads > h.num_key_value_heads for h in heads)
    assert any(model.config.get("tie_word_embeddings") for model in models)
    assert {recipe(fmt).weights.name for fmt in FORMATS} == {"float32", "bfloat16"}


def test_ways_to_train_are_all_there() -> None:
    ways = [c for c in EVERYTHING if c.workload == TRAIN]
    for option in ({"attention": "eager"}, {"gradient_accumulation": 2}, {"layerwise": True}):
        [(name, value)] = option.items()
        assert any(c.options.get(name) == value for c in ways), option
    assert {c.recipe for c in ways} == {"fp32", "pure-bf16", "amp-bf16"}
    assert {c.options.get("gradient_checkpointing") for c in ways} >= {False, True}


def test_wishes_narrow_the_cases() -> None:
    one = chosen(Wishes(methods=("adamw",), implementation="torch-loop", workload=TRAIN), "cpu")
    assert [c.options["gradient_checkpointing"] for c in one] == [False, True]
    [single] = chosen(
        Wishes("small-gpt2", ("galore",), "galore-mem", TRAIN, "amp-bf16", options={"seq_len": 8, "layerwise": True},
               hyperparameters={"rank": 4, "proj_type": "full"}), "cpu",
    )  # fmt: skip
    assert single.hyperparameters == {"rank": 4, "proj_type": "full"}
    assert single.options["seq_len"] == 8
    assert single.options["batch_size"] == 2
    steps = chosen(Wishes(methods=("adamw",), workload=OPTIMIZER, options={"seq_len": 8, "layerwise": True}), "cpu")
    assert all(c.options == {"device": "cpu", "layerwise": True} for c in steps)


@pytest.mark.parametrize(
    ("wishes", "said"),
    [
        (Wishes(implementation="nobodys"), "no method has an implementation 'nobodys'"),
        (Wishes(methods=("galor",)), "unknown method 'galor'"),
        (Wishes(workload="sideways"), "unknown workload"),
        (Wishes(recipe="fp7"), "unknown recipe"),
        (Wishes(options={"batch_size": -1}), "batch"),
        (Wishes(options={"attention": "sparse"}), "attention"),
        (Wishes(methods=("adamw",), hyperparameters={"momentum": 1}), "unknown hyperparameter"),
        (Wishes(methods=("galore",), hyperparameters={"rank": 0}), "rank must be at least 1"),
    ],
)
def test_wishes_that_no_case_can_have(wishes: Wishes, said: str) -> None:
    with pytest.raises(InputError, match=said):
        chosen(wishes, "cpu")


# -- what fits a card --------------------------------------------------------------------------------


def test_a_card_gets_the_largest_llama_that_the_estimate_fits_to_it() -> None:
    found = list(fitting(24 * GIB))
    sizes = {(c.method, bool(c.options["layerwise"])): c.model for c in found}
    order = [name for name, _ in SIZES]
    for (name, layerwise), model in sizes.items():
        rank = dict(SIZES)[model]
        assert estimated_to_fit(name, model, rank, 24 * GIB, layerwise=layerwise)
        if model != order[0]:
            larger = order[order.index(model) - 1]
            assert not estimated_to_fit(name, larger, dict(SIZES)[larger], 24 * GIB, layerwise=layerwise)
    # LLaMA-7B's weights, gradients and two moments in bfloat16 are 4 x 12.55 GiB; with GaLore-mini at rank 1024 and
    # one gradient at a time 12.55 + 5.26 GiB and one matrix more
    assert sizes["adamw", False] == "llama-1b"
    assert sizes["galore-mini", True] == "llama-7b"
    assert {c.method for c in found} == set(METHODS)


def test_nothing_fits_a_card_that_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    smallest, rank = SIZES[-1]
    assert not estimated_to_fit("galore-mini", smallest, rank, GIB // 2, layerwise=True)  # its context takes 0.5 GiB
    monkeypatch.setattr("galore_mem.verify.fitting.fits", lambda *_, **__: False)
    assert list(fitting(GIB // 2)) == []


# -- how they are run --------------------------------------------------------------------------------


def test_small_cases_on_the_cpu_go_together_and_others_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    small, large = Case("small-llama", "adamw", "torch-loop"), Case("llama-130m", "adamw", "torch-loop")
    assert at_a_time([small, small, small], "cpu") == 2
    assert at_a_time([small], "cpu") == 1
    assert at_a_time([small, large], "cpu") == 1
    assert at_a_time([small, small], "cuda") == 1
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert at_a_time([small, small], "cpu") == 1


def test_cases_on_a_card_go_one_at_a_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    on_card = played(monkeypatch, tmp_path)
    on_card.device = "cuda"
    with pytest.raises(InputError, match="one at a time"):
        on_card.run(jobs=2)


def test_the_room_on_a_card_is_asked_of_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """20 GiB are free beside its context of 0.5 GiB; a machine without a card says so in one line."""
    done = subprocess.CompletedProcess([], 0, f"{20 * GIB}\n", "")
    monkeypatch.setattr(session.subprocess, "run", lambda *_, **__: done)
    assert room() == 20 * GIB + GIB // 2
    monkeypatch.setattr(session.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1, "", "no card"))
    with pytest.raises(InputError, match="no card"):
        room()


SIZED = Sizes(1, 1, 2, {"step": 5})


class Played:
    """Stands for processes: says that each case is fine, and is interrupted from a given one on."""

    def __init__(self, interrupt: int | None = None) -> None:
        self.given = 0
        self.interrupt = interrupt

    def run(self, given: str, timeout: float) -> Ended:
        self.given += 1
        if self.interrupt is not None and self.given >= self.interrupt:
            raise KeyboardInterrupt
        return Ended(0, dump(Outcome(Case.from_json(json.loads(given)), "ok", "", SIZED, SIZED)), "")

    def stop(self) -> None:
        return


def played(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, interrupt: int | None = None) -> Session:
    monkeypatch.setattr(session, "starter", lambda device, arguments: Played(interrupt))
    wishes = Wishes(methods=("adamw",), workload=OPTIMIZER)
    return Session(
        wishes, "cpu", tmp_path / "r.jsonl", resume=True, tolerance=0.02, timeout=9, snapshot=None
    )  # fmt: skip


def test_an_interrupt_keeps_what_was_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C in the third of twelve cases: two are shown and recorded, and a later run has the other ten to do."""
    stopped = played(monkeypatch, tmp_path, interrupt=3)
    assert [o.case for o in stopped.run(jobs=1)] == stopped.cases[:2]
    assert stopped.interrupted
    said = capsys.readouterr().err
    assert "[2/12] ok small-tied adamw torch-fused optimizer fp32" in said
    assert "interrupted: 2 of 12 cases ended; the same command with --resume goes on from" in said
    assert len(Record(tmp_path / "r.jsonl").read()) == 2
    later = played(monkeypatch, tmp_path)
    assert [o.case for o in later.run(jobs=1)] == later.cases
    assert not later.interrupted
    assert len(Record(tmp_path / "r.jsonl").read()) == 12


def test_a_full_disk_in_the_middle_loses_no_result(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The record takes two of twelve outcomes: these are shown, and one line says why the command ends."""
    appended = Record.append

    def full(record: Record, outcome: Outcome) -> None:
        if record.path.exists() and len(record.read()) == 2:
            raise InputError("cannot write r.jsonl: No space left on device")
        appended(record, outcome)

    monkeypatch.setattr(Record, "append", full)
    monkeypatch.setattr(session, "starter", lambda device, arguments: Played())
    result = CliRunner().invoke(
        app, ["verify", "--method", "adamw", "--workload", "optimizer", "--device", "cpu", "--jobs", "1", "--record",
              str(tmp_path / "r.jsonl")],
    )  # fmt: skip
    assert "2 cases: 2 ok" in result.stdout
    assert str(result.exception) == "cannot write r.jsonl: No space left on device"
    assert len(Record(tmp_path / "r.jsonl").read()) == 2


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    outcomes = played(monkeypatch, tmp_path).run()
    assert len(outcomes) == 12
    assert "12/12" in shown.getvalue()
    assert "adamw (torch-" in shown.getvalue()


def written(path: Path) -> bool:
    """Is there something in the file?"""
    return path.exists() and path.read_text() != ""


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_ctrl_c_by_a_signal(tmp_path: Path) -> None:
    """The command itself: SIGINT while its first case runs. One line, code 130, no traceback, no process left."""
    program = "import galore_mem.verify.processes as p, sys; p.SERVER = p.WORKER = (sys.executable, '-c', {!r});"
    hanging = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    start = (
        program.format(hanging)
        + "p.Forked.__init__.__defaults__ = ((), p.SERVER); sys.argv = ['galore-mem', 'verify', '--method', 'adamw'];"
        + "from galore_mem.cli import main; main()"
    )
    start = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);" + start  # not ignored, as tests
    # that a shell has put into the background would have it
    running = subprocess.Popen([sys.executable, "-c", start], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    until = time.monotonic() + 60
    while not written(tmp_path / "pid") and time.monotonic() < until:
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=300)
    assert running.returncode == 130
    assert "interrupted: 0 of 18 cases ended" in err
    assert "Traceback" not in err
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


# -- the command line --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--resume"], "name it with --record FILE"),
        (["--snapshot", "x", "--device", "cpu"], "leave it out"),
        (["--device", "tpu"], "unknown device"),
        (["--model", "no-such-model"], "no-such-model"),
        (["--set", "rank"], "name=value"),
        (["--rank", "0"], "rank must be at least 1"),
        (["--format", "xml"], "unknown format"),
        (["--batch-size", "0"], "batch"),
        (["--target", "nothing"], "nothing"),
        (["--record", "/nonexistent/r.jsonl"], "cannot write /nonexistent/r.jsonl"),
        (["--record", "/dev/full"], "ordinary file"),
        (["--output", "/nonexistent/o.txt"], "no such folder"),
        (["report", "r.jsonl"], "--method is an option of verify, not of report"),
    ],
)
def test_what_cannot_be_run_is_said_before_anything_runs(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "starter", lambda *_: pytest.fail("a process was started"))
    result = CliRunner().invoke(app, ["verify", "--method", "galore", *arguments])
    assert isinstance(result.exception, InputError)
    assert said in str(result.exception)
