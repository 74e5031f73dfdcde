"""The record of `verify`: what is kept of a run, read again, resumed, and refused where it is not ours."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from test_verify_runner import CASE, FINE, OTHER, SIZES, answering

from galore_mem.errors import InputError
from galore_mem.verify.case import BufferPair, Case, Outcome
from galore_mem.verify.line import dump, load
from galore_mem.verify.record import Record, latest
from galore_mem.verify.runner import run


def test_outcomes_survive_the_record(tmp_path: Path) -> None:
    record = Record(tmp_path / "runs.jsonl")
    for outcome in (FINE, Outcome(OTHER, "oom", "killed")):
        record.append(outcome)
    assert record.read() == [FINE, Outcome(OTHER, "oom", "killed")]


def test_results_are_in_the_record_before_the_next_case_begins(tmp_path: Path) -> None:
    """Ctrl-C in the second case: the first is there."""
    record = Record(tmp_path / "runs.jsonl")

    def begun(case: Case) -> None:
        if case == OTHER:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(run([CASE, OTHER], record=record, starters=[answering(FINE)], begun=begun))
    assert record.read() == [FINE]


def test_resume_runs_what_is_missing_or_failed(tmp_path: Path) -> None:
    record = Record(tmp_path / "runs.jsonl")
    record.append(FINE)
    record.append(Outcome(OTHER, "failed", "crashed"))
    begun: list[Case] = []
    third = Case("small-tied", "adamw", "torch-loop")
    list(run([CASE, OTHER, third], record=record, resume=True, starters=[answering(FINE)], begun=begun.append))
    assert begun == [OTHER, third]


def test_a_cut_last_line_is_dropped_and_written_over(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    whole = dump(FINE)
    path.write_text(f"{whole}\n{whole[:40]}")
    assert Record(path).read() == [FINE]
    Record(path).append(Outcome(OTHER, "oom"))
    assert Record(path).read() == [FINE, Outcome(OTHER, "oom")]


@pytest.mark.parametrize(
    "text", ["{}\n", "[1]\n", '{"schema": "other/1"}\n', "\x00\x01\n", "{" * 10_000 + "\n", '{"schema": 1e999}\n']
)
def test_a_foreign_record_is_refused_by_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "foreign.jsonl"
    path.write_text(dump(FINE) + "\n" + text)
    with pytest.raises(InputError, match="line 2"):
        Record(path).read()


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "binary"
    path.write_bytes(b"\xff\xfe\x00\n")
    with pytest.raises(InputError, match="line 1: not text"):
        Record(path).read()


@pytest.mark.parametrize("text", ['{"important": "one line"}', "a\nfile\nof others", "a\nfile\nof others\n", "{}\n"])
def test_a_file_of_others_is_never_written(text: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    for attempt in (Record(path).check, lambda: Record(path).append(FINE)):
        with pytest.raises(InputError, match="stays as it is"):
            attempt()
    assert path.read_text() == text


def test_a_line_cut_inside_a_character_costs_that_line_only(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    name = replace(FINE, case=replace(CASE, model="\u043c"))
    path.write_text(dump(FINE) + "\n" + dump(name).encode().decode("unicode_escape")[:60] + "\n")
    path.write_bytes((dump(FINE) + "\n" + dump(FINE)[:40]).encode() + "\u043c".encode()[:1])
    assert Record(path).read() == [FINE]
    Record(path).append(name)
    assert Record(path).read() == [FINE, name]


def test_two_runs_can_write_one_record(tmp_path: Path) -> None:
    """Threads, each with a file of its own as two processes would have: no line is lost or mixed."""
    path = tmp_path / "runs.jsonl"
    with ThreadPoolExecutor(4) as pool:
        for _ in range(40):
            pool.submit(Record(path).append, FINE)
    assert Record(path).read() == [FINE] * 40


@pytest.mark.parametrize(
    "line",
    [
        json.dumps({**json.loads(dump(FINE)), "buffers": [["w", 0, 10**10, "m", [5], "float32", 20, 20]]}),
        dump(FINE).replace('"seconds":0.0', '"seconds":1' + "0" * 5000),
        dump(FINE).replace('"weights_bytes":100', '"weights_bytes":1' + "0" * 400),
        dump(FINE).replace('"seconds":0.0', '"seconds":Infinity'),
        dump(FINE).replace('"environment":{"device":"cpu"}', '"environment":{"x":NaN}'),
    ],
)
def test_hostile_numbers_are_refused(line: str) -> None:
    assert line != dump(FINE)
    with pytest.raises(InputError):
        load(line)


def test_a_full_disk_is_one_clear_error_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = Record(tmp_path / "runs.jsonl")
    record.append(FINE)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(InputError, match="No space left on device"):
            record.append(Outcome(OTHER, "oom"))
    assert record.read() == [FINE]


def test_a_record_is_an_ordinary_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="ordinary file"):
        Record(tmp_path).append(FINE)


def test_a_record_has_a_row_for_neighboring_layers(tmp_path: Path) -> None:
    """Two layers' momenta fold into one row each; what differs, and what is in no layer, has its own."""
    weights = ("model.layers.0.w.weight", "model.layers.1.w.weight")
    pairs = (
        *(BufferPair(w, "exp_avg", (2, 3), "float32", 24, 24) for w in weights),
        *(BufferPair(w, "step", (), "float32", 4, measured) for w, measured in zip(weights, (4, None), strict=True)),
        *(BufferPair("norm.weight", "exp_avg", (3,), "float32", 12, 12) for _ in range(2)),
    )
    outcome = Outcome(CASE, "ok", "", SIZES, SIZES, pairs)
    rows = json.loads(dump(outcome))["buffers"]
    assert rows[:2] == [
        ["model.layers.{i}.w.weight", 0, 2, "exp_avg", [2, 3], "float32", 24, 24],
        ["model.layers.{i}.w.weight", 0, 1, "step", [], "float32", 4, 4],
    ]
    assert len(rows) == 5
    assert load(dump(outcome)) == outcome


@pytest.mark.parametrize(
    ("changed", "where"),
    [
        ({"options": {"batch_size": "x"}}, "batch_size': 'x'"),
        ({"options": {"batch_size": -1}}, "batch"),
        ({"options": {"speed": 1}}, "unknown option"),
        ({"recipe": "fp7"}, "recipe"),
        ({"model": 5}, "model"),
        ({"hyperparameters": [1]}, "hyperparameters"),
        ({"targets": [1]}, "targets"),
        ({"predicted": {**SIZES.to_json(), "phases": {"step": "x"}}}, "phases.step"),
        ({"measured": {**SIZES.to_json(), "weights_bytes": None}}, "weights_bytes"),
        ({"measured": {**SIZES.to_json(), "weights_bytes": -1}}, "weights_bytes"),
        ({"detail": 7}, "detail"),
        ({"status": "fine"}, "status"),
        ({"environment": []}, "environment"),
        ({"seconds": "x"}, "seconds"),
        ({"buffers": [["w", None, 1, "exp_avg", [5], "float32", "x", 4]]}, "buffers"),
        ({"bogus": 1}, "bogus"),
    ],
)
def test_a_line_with_a_wrong_value_is_refused_by_its_name(changed: dict[str, object], where: str) -> None:
    with pytest.raises(InputError, match=where):
        load(json.dumps({**json.loads(dump(FINE)), **changed}))


def test_a_case_that_was_resumed_counts_as_it_ended_last() -> None:
    failed = Outcome(CASE, "failed", "crashed")
    assert latest([failed, Outcome(OTHER, "oom"), FINE]) == [FINE, Outcome(OTHER, "oom")]


def test_a_case_from_elsewhere_is_refused() -> None:
    with pytest.raises(InputError, match="workload"):
        Case("m", "adamw", "torch-loop", "sideways")
    with pytest.raises(InputError, match="option"):
        Case("m", "adamw", "torch-loop", options={"speed": 1})
