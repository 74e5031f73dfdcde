"""The machinery of `benchmarks/accuracy`: a record that runs go on from, and errors whose numbers are known."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

SUITE = Path(__file__).parents[1] / "benchmarks" / "accuracy"


@pytest.fixture
def suite(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The suite's modules, by attribute."""
    monkeypatch.syspath_prepend(str(SUITE))
    names = [path.stem for path in SUITE.glob("*.py") if path.stem != "__main__"]
    before = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    yield SimpleNamespace(**{name: import_module(name) for name in ("record", "errors", "evidence", "readme")})
    for name in names:
        sys.modules.pop(name, None)
    sys.modules.update(before)


def answer(task: Any) -> dict[str, Any]:
    if task == "dies":
        os._exit(3)
    if task == "fails":
        raise ValueError("no such size")
    return {"said": task}


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_what_failed_is_run_again_and_what_was_answered_is_not(
    suite: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suite.record, "WARM", ())
    path = tmp_path / "r.jsonl"
    part = suite.record.Part({name: name for name in ("good", "fails", "dies")}, answer)
    suite.record.run({"p": part}, path, jobs=2)
    found = suite.record.read(path)
    assert found["p", "good"]["found"] == {"said": "good"}
    assert found["p", "fails"]["found"] == {"failed": "ValueError: no such size"}
    assert found["p", "dies"]["found"] == {"failed": "its process ended with 3"}
    assert [suite.record.good(found["p", key]) for key in part.tasks] == [True, False, False]
    suite.record.run({"p": part}, path, jobs=1)
    assert [one["key"] for one in lines(path)][3:] == ["fails", "dies"]
    suite.record.run({"p": part}, path, jobs=1, again=["good"])
    assert [one["key"] for one in lines(path)][5:] == ["good", "fails", "dies"]
    suite.record.run({"p": part}, path, jobs=1, again=[])
    assert len(lines(path)) == 3 + 2 + 3 + 3
    suite.record.tidy(path, [("p", "dies"), ("p", "good"), ("p", "never")])
    assert [one["key"] for one in lines(path)] == ["dies", "good"]


def test_a_line_that_was_cut_off_is_none_and_goes(suite: Any, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    first, second = ({"part": "p", "key": key, "found": {}} for key in "ab")
    suite.record.append(path, first)
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"part":"p","ke')
    assert list(suite.record.read(path)) == [("p", "a")]
    suite.record.append(path, second)
    assert lines(path) == [first, second]


def pair(suite: Any, measured: int, predicted: int, case: str = "", what: str = "peak", by: str = "simulate") -> Any:
    return suite.errors.Pair(by, case, "llama", "adamw", what, measured, predicted)


def test_spread(suite: Any) -> None:
    """Errors -3 %, 0, +1 %, +2 %: signed median 0.5 %; sizes 0, 1, 2, 3 %: median 1.5 %, and 95 % of the way from the
    first to the fourth is 2.85 steps on: 2.85 %."""
    pairs = [pair(suite, 100, n, str(n)) for n in (97, 100, 101, 102)]
    found = suite.errors.spread(pairs)
    assert (found.count, found.equal, found.worst.case) == (4, 1, "97")
    assert found.signed == pytest.approx(0.005)
    assert found.middle == pytest.approx(0.015)
    assert found.high == pytest.approx(0.0285)


def test_nothing_that_was_predicted_is_infinitely_wrong(suite: Any) -> None:
    assert pair(suite, 0, 0).error == 0
    assert pair(suite, 0, 1).error == float("inf")


def test_percents_say_that_an_error_is_not_nothing(suite: Any) -> None:
    shown = [suite.errors.percent(value) for value in (0, 0.0123456, -0.00000412, 3e-10)]
    assert shown == ["0", "+1.235 %", "-0.0004 %", "+0.00000003 %"]


def test_the_worst_of_each_group_and_predictor(suite: Any) -> None:
    pairs = [pair(suite, 100, 98, "a"), pair(suite, 100, 101, "b"), pair(suite, 100, 100, "a", by="estimate")]
    written: str = suite.errors.by_predictor(pairs, lambda one: one.family, "family")
    assert written.splitlines()[2:] == [
        "| llama | `estimate` | 1 | 0 | 0 |  |", "| llama | `simulate` | 2 | -2.000 % | -2.000 % | a: peak |",
    ]  # fmt: skip


def test_what_can_be_opened_goes_into_another_document(suite: Any) -> None:
    kept, moved = suite.errors.apart(
        ["# A", "## B `c` d", "text", *suite.errors.details("Two", "1", "2"), "end"], "x.md"
    )
    assert kept == ["# A", "## B `c` d", "text", "Two: [x.md](x.md#b-c-d).", "end"]
    assert moved == ["## B `c` d", "Two.", "1", "2"]


def test_a_foreign_record_is_refused_in_one_line(suite: Any, tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    for line in ("{", "[]", '{"part": "cpu"}', '{"part": "cpu", "key": "a", "found": 1}'):
        path.write_text(line + "\n", encoding="utf-8")
        with pytest.raises(SystemExit, match="line 1: this is not a line of a record"):
            suite.record.read(path)


def test_another_release_is_run_again(suite: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {"p": suite.record.Part({"a": "a"}, answer)}
    for release, lines in (("1", 1), ("1", 1), ("2", 2)):
        monkeypatch.setattr(suite.record, "installed", lambda release=release: iter([("torch", release)]))
        suite.record.run(parts, tmp_path / "r.jsonl", 1)
        assert len((tmp_path / "r.jsonl").read_text(encoding="utf-8").splitlines()) == lines


def test_two_cases_of_one_name_are_refused(suite: Any) -> None:
    module = ModuleType("m")
    module.cases = lambda: [SimpleNamespace(key="a")] * 2  # type: ignore[attr-defined]  # a module by hand
    module.run = answer  # type: ignore[attr-defined]  # a module by hand
    with pytest.raises(AssertionError, match="one name"):
        suite.record.part_of(module)


# -- what the package and the README take of it ----------------------------------------------------------------


def run_of(family: str, peak: int, said: dict[str, int | None], **more: Any) -> dict[str, Any]:
    told = {name: None if peak is None else {"peak": peak} for name, peak in said.items()}
    what = {"family": family, "method": "adamw", "implementation": "torch-foreach", "recipe": "fp32", "options": {}}
    return {"found": {**what, "measured": {"peak": peak}, **told, **more}}


def test_what_the_package_carries(suite: Any, tmp_path: Path) -> None:
    """Two runs of llama here, off by -1 % and +2 %; one of bert, which `estimate` does not know; one on a card, which
    reserved 1.5 times its peak."""
    lines = [
        run_of("llama", 1000, {"estimate": 990, "simulate": 1000}),
        run_of("llama", 1000, {"estimate": 1020, "simulate": 1001}, options={"attention": "eager"}),
        run_of("bert", 1000, {"estimate": None, "simulate": 1000}),
        run_of(
            "llama", 1000, {"estimate": 1003, "simulate": 1000}, gpu="t4", measured={"peak": 1000, "reserved": 1500}
        ),
    ]
    record = tmp_path / "verify.jsonl"
    record.touch()
    both = {"phases": {"forward": [990, 1000], "step": [500, 500]}, "slack": {"forward": 30, "step": 600}}
    suite.evidence.write(tmp_path / "found.json", lines, record, [{"found": both}])
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    usual = ["attention sdpa", "loss eager", "recipe fp32"]
    assert found["errors"]["estimate"] == [
        ["cpu", "llama", "adamw", "torch-foreach", 2, -0.01, 0.02, ["attention eager", *usual]],
        ["t4", "llama", "adamw", "torch-foreach", 1, 0.003, 0.003, usual],
    ]
    assert [row[:2] for row in found["errors"]["simulate"]] == [["cpu", "bert"], ["cpu", "llama"], ["t4", "llama"]]
    # the forward pass was highest (1,000 B); with what blocks leave empty the step is (1,100 B)
    assert found["slack"]["estimate"][-1] == [0, pytest.approx(0.1)]
    assert {share for _, share in found["slack"]["estimate"][:-1]} == {0}
    assert found["reserved"] == {"sdpa": [1, 1.5, 1.5, 1.5]}


def test_the_readmes_table(suite: Any) -> None:
    """Of three runs off by 0, -1 and +3 %: 1 % at the median, 2.8 % for 95 of a hundred (between 1 and 3)."""
    pair = suite.errors.Pair
    pairs = [pair("estimate", str(n), "llama", "adamw", "peak", 1000, n) for n in (1000, 990, 1030)]
    pairs.append(pair("estimate", "other", "llama", "adamw", "forward", 1000, 2000))
    text = f"before\n{suite.readme.BEGIN}\nold\n{suite.readme.END}\nafter"
    found = suite.readme.rewritten(text, {"real steps": pairs})
    assert "old" not in found
    assert found.startswith("before\n")
    assert found.endswith("\nafter")
    assert "| `estimate` | real steps | allocated peak | 3 | 1.000 % | 2.800 % | +3.000 % |" in found
    with pytest.raises(ValueError, match="the README has no"):
        suite.readme.rewritten("nothing", {})
