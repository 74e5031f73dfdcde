"""`verify`'s results as a table, JSON, CSV and Markdown: what is worked out from outcomes, and how it is shown."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from typer.testing import CliRunner

from galore_mem.cli import app
from galore_mem.report.schema import schema
from galore_mem.report.tables import Column, Table, narrowed, needed_width, to_terminal
from galore_mem.report.verify import render, to_json
from galore_mem.report.verify_rows import errors, percentile, quantities, summary, way, worst
from galore_mem.report.verify_tables import overviews
from galore_mem.verify.case import STATUSES, TRAIN, BufferPair, Case, Outcome, Sizes
from galore_mem.verify.paper import paper_state
from galore_mem.verify.record import Record
from galore_mem.verify.worker import run

CASE = Case("small-llama", "adamw", "torch-loop")
OPTIONS = {"batch_size": 2, "seq_len": 64, "gradient_checkpointing": True, "device": "cpu"}
GALORE = Case("small-llama", "galore", "galore-mem", TRAIN, "pure-bf16", OPTIONS, {"rank": 8})
PREDICTED = Sizes(1000, 1000, 2000, {"forward": 4400, "step": 5000})
MEASURED = Sizes(1000, 1000, 2048, {"forward": 4000, "step": 5120})
PAIRS = (BufferPair("w", "exp_avg", (5, 5), "float32", 100, 100), BufferPair("w", "step", (), "float32", 4, None))
FINE = Outcome(CASE, "ok", "", PREDICTED, PREDICTED, PAIRS[:1], {"torch": "2.13.0", "device": "cpu"}, 1.5)
WRONG = Outcome(GALORE, "mismatch", "w: step is missing", PREDICTED, MEASURED, PAIRS, {"torch": "2.13.0", "gpu": "X"})
NOT_HERE = Outcome(Case("small-llama", "fira", "fira"), "unsupported", "needs the package fira")
DEAD = Outcome(Case("small-llama", "sgd", "torch-loop"), "oom", "its process was killed")
RAISED = Outcome(Case("small-llama", "sgd", "torch-fused"), "failed", "RuntimeError: [bold]not markup[/bold]")
ALL = (FINE, WRONG, NOT_HERE, DEAD, RAISED)


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


# -- what is worked out ------------------------------------------------------------------------------


def test_quantities_are_components_phases_and_the_highest_phase() -> None:
    """(predicted, measured, predicted - measured, and that by measured): 4400 - 4000 = 400 = 10 % of 4000."""
    found = {q.name: (q.predicted, q.measured, q.error, q.rel_error) for q in quantities(WRONG)}
    assert found == {
        "weights": (1000, 1000, 0, 0.0), "gradients": (1000, 1000, 0, 0.0),
        "optimizer_state": (2000, 2048, -48, -48 / 2048), "forward": (4400, 4000, 400, 0.1),
        "step": (5000, 5120, -120, -120 / 5120), "peak": (5000, 5120, -120, -120 / 5120),
    }  # fmt: skip
    assert [*quantities(DEAD)] == []


def test_a_phase_on_one_side_only_is_shown_and_not_compared() -> None:
    one = replace(WRONG, predicted=Sizes(1, 1, 1, {"step": 5}), measured=Sizes(1, 1, 1, {"backward": 7}))
    found = {q.name: (q.predicted, q.measured, q.error) for q in quantities(one)}
    assert (found["backward"], found["step"]) == ((None, 7, None), (5, None, None))
    assert errors([one]) == []
    assert worst([one]) is None


def test_what_a_meter_tells_besides_stands_with_its_phase() -> None:
    told = replace(MEASURED, reserved={"step": 8192, "forward": 6144}, device_used_bytes=9000)
    found = {q.name: q for q in quantities(replace(WRONG, measured=told))}
    assert (found["forward"].beside, found["step"].beside) == ({"reserved": 6144}, {"reserved": 8192})
    assert found["peak"].beside == {"reserved": 8192}  # the highest
    assert (found["device_used"].measured, found["device_used"].predicted) == (9000, None)
    shown = render([replace(WRONG, measured=told)], "table", plain=True)
    assert "reserved" in shown
    assert "8.79 KiB" in shown  # 9000 / 1024 = 8.789


def test_summary_counts_and_ranks_absolute_errors() -> None:
    """Phases: FINE's two are 0; WRONG's 400 / 4000 = 0.1 and 120 / 5120 = 0.0234375. Of [0, 0, 0.0234375, 0.1] the
    median is 0.01171875, and the 95th percentile the ceil(3.8) = 4th. Buffers: one and two, of which one differs."""
    found = summary(ALL)
    assert {status: found[status] for status in STATUSES} == dict.fromkeys(STATUSES, 1)
    assert (found["buffers_compared"], found["buffers_different"], found["phases_compared"]) == (3, 1, 4)
    assert (found["median_rel_error"], found["p95_rel_error"], found["worst_rel_error"]) == (0.01171875, 0.1, 0.1)
    assert found["worst"] == {
        "model": "small-llama", "method": "galore", "implementation": "galore-mem", "workload": "train",
        "phase": "forward", "rel_error": 0.1,
    }  # fmt: skip
    empty = summary([DEAD])
    assert (empty["worst"], empty["median_rel_error"], empty["p95_rel_error"]) == (None, None, None)


@pytest.mark.parametrize(("percent", "value"), [(5, 1.0), (50, 10.0), (95, 19.0), (96, 20.0), (100, 20.0)])
def test_percentiles_are_nearest_ranks(percent: int, value: float) -> None:
    """Of 1..20: the ceil(20 * percent / 100)-th."""
    assert percentile([float(i) for i in range(1, 21)], percent) == value


def test_the_way_of_running_says_what_is_not_the_default() -> None:
    assert way(CASE) == "small-llama, optimizer steps, fp32, cpu"
    assert way(GALORE) == "small-llama, training steps, pure-bf16, batch 2 x 64, checkpointing, cpu"
    other = replace(CASE, options={"layerwise": True}, targets=("q_proj", "v_proj"))
    assert way(other) == "small-llama, optimizer steps, fp32, layer-wise, only q_proj+v_proj, cpu"


# -- the paper's counting ----------------------------------------------------------------------------


def test_the_papers_state_of_galore() -> None:
    """small-llama at rank 8 in bfloat16, per layer: projector m·r and two moments n·r of q (96 x 120), k and v
    (48 x 120), o (120 x 96), gate and up (333 x 120) and down (120 x 333)."""
    shapes = [(96, 120), (48, 120), (48, 120), (96, 120), *[(120, 333)] * 3]
    projected = 2 * sum(8 * m + 2 * 8 * n for m, n in shapes)  # two layers
    other = 2 * (2 * 301 * 120 + 2 * 2 * 120 + 120)  # two moments: embedding, head; two norms a layer, the last one
    found = paper_state(GALORE)
    assert found is not None
    assert (found.projected_bytes, found.nbytes) == (2 * projected, 2 * (projected + other))
    assert to_json([WRONG])["cases"][0]["paper_optimizer_state_bytes"] == found.nbytes
    shown = render([WRONG], "table", plain=True)
    assert "the paper counts" in shown
    assert "m·r + 2·n·r" in shown


def test_a_model_that_is_gone_has_no_papers_state() -> None:
    gone = replace(CASE, model="/nowhere/config.json")
    assert paper_state(gone) is None
    assert to_json([Outcome(gone, "ok", "", PREDICTED, PREDICTED)])["cases"][0]["paper_optimizer_state_bytes"] is None


# -- tables ------------------------------------------------------------------------------------------


def many(*more: Outcome) -> list[Outcome]:
    """More cases than are shown in full."""
    return [*(replace(FINE, case=replace(CASE, implementation=f"torch-{i}")) for i in range(9)), *more]


def test_many_cases_have_a_line_each_under_their_way_of_running() -> None:
    shown = render(many(WRONG), "table", plain=True)
    assert "small-llama, optimizer steps, fp32, cpu: 9 cases" in shown
    assert "small-llama, training steps, pure-bf16, batch 2 x 64, checkpointing, cpu, rank 8: 1 case\n" in shown
    (line,) = [" ".join(line.split()) for line in shown.splitlines() if line.startswith("mismatch  galore")]
    # 5120 B and 5000 B in KiB: 5.00, 4.88; the worst phase is 400 B of 4000 too high
    assert line == "mismatch galore galore-mem state -48 B 5.00 KiB 4.88 KiB forward +400 B +10.000%"
    assert sum(line.startswith("ok  adamw") for line in shown.splitlines()) == 9
    assert "mismatch: galore (galore-mem): w: step is missing" in shown


def test_few_cases_have_a_block_each() -> None:
    shown = render(ALL, "table", plain=True)
    assert "mismatch: galore (galore-mem): small-llama, training steps, pure-bf16" in shown
    words = [" ".join(line.split()) for line in shown.splitlines()]
    assert "optimizer state 1.95 KiB 2.00 KiB -48 B -2.344%" in words  # 48 / 2048 = 2.34375 %
    assert "oom: sgd (torch-loop): its process was killed" in shown
    assert "2 tensors of state compared, 1 differ" in shown
    assert render(ALL, "table", plain=True, details=False).startswith(
        "small-llama, optimizer steps, fp32, cpu: 3 cases"
    )


def test_cases_that_cannot_run_are_grouped_by_reason_after_the_others() -> None:
    again = replace(NOT_HERE, case=replace(NOT_HERE.case, recipe="pure-bf16"))
    other = replace(NOT_HERE, case=replace(NOT_HERE.case, method="galore", implementation="galore-torch"))
    told = replace(FINE, detail="run without torch.compile")
    lines = render(many(NOT_HERE, again, other, told), "table", plain=True).splitlines()
    at = lines.index("unsupported: needs the package fira")
    assert lines[at + 1] == "    galore (galore-torch), fira (fira) x 2"  # the registry's order
    assert lines[lines.index("* run without torch.compile") + 1] == "    adamw (torch-loop)"
    assert any("torch-loop*" in line for line in lines)
    assert lines[-4] == "13 cases: 10 ok, 3 unsupported"


def test_the_order_does_not_depend_on_which_case_ended_first() -> None:
    for format in ("table", "json", "csv", "markdown"):
        assert render(ALL, format, plain=True) == render(ALL[::-1], format, plain=True)


def test_hyperparameters_that_differ_have_a_column() -> None:
    ranks = [replace(WRONG, case=replace(GALORE, hyperparameters={"rank": r, "update_proj_gap": 5})) for r in (8, 16)]
    (table,) = overviews(ranks)
    assert table.title.endswith("cpu, update_proj_gap 5: 2 cases")
    assert [row[[c.name for c in table.columns].index("with")] for row in table.rows] == ["rank 8", "rank 16"]


def test_every_tensor_on_request() -> None:
    assert "exp_avg" not in render([WRONG], "table", plain=True)
    lines = render([WRONG], "table", buffers=True, plain=True).splitlines()
    assert [line.split() for line in lines if line.startswith("w  ")] == [
        ["w", "exp_avg", "5", "x", "5", "float32", "100", "100", "0"],
        ["w", "step", "scalar", "float32", "4", "missing"],
    ]


def test_eighty_columns_hold_the_widest_names_with_the_peak() -> None:
    """The longest method and implementation, the longest phase, an error of whole percents."""
    names = ("galore-adafactor", "galore-torch"), ("q-galore", "galore-mem-float-weights")
    sizes = Sizes(1000, 1000, 2000, {"backward": 1023 * 2**20}), Sizes(1000, 1000, 2000, {"backward": 1000 * 2**20})
    found = [Outcome(replace(GALORE, method=m, implementation=i), "ok", "", *sizes) for m, i in names]
    (table,) = overviews(found)
    kept = [c.name for c in narrowed(table, 80).columns]
    assert kept == ["", "method", "implementation", "peak", "worst", "off"]
    assert needed_width(narrowed(table, 80)) <= 80
    assert narrowed(table, 120) == table


def test_on_a_terminal_statuses_have_colors_and_markup_stays_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setattr("sys.stdout.fileno", lambda: 1)
    monkeypatch.setattr("os.get_terminal_size", lambda descriptor: os.terminal_size((80, 24)))
    monkeypatch.delenv("NO_COLOR", raising=False)
    shown = render(many(*ALL), "table")
    assert "\x1b[1;31moom" in shown
    assert "[bold]not markup[/bold]" in shown
    assert "\x1b" not in render(many(*ALL), "table", plain=True)
    bare = to_terminal(Table("a title\nof two lines", (Column("x"),), ()), plain=False)
    assert bare.startswith("\x1b[1ma title")


def test_no_cases_at_all() -> None:
    assert render([], "table", plain=True).splitlines()[-1] == "0 cases"
    assert len(rows(render([], "csv"))) == 0
    jsonschema.Draft202012Validator(schema("verify")).validate(json.loads(render([], "json")))


# -- one row a quantity ------------------------------------------------------------------------------


def test_csv_has_a_row_for_each_case_and_quantity() -> None:
    found = rows(render(ALL, "csv"))
    step = next(row for row in found if row["method"] == "galore" and row["quantity"] == "step")
    assert {k: step[k] for k in ("predicted_bytes", "measured_bytes", "error_bytes", "rel_error")} == {
        "predicted_bytes": "5000", "measured_bytes": "5120", "error_bytes": "-120", "rel_error": "-0.0234375",
    }  # fmt: skip
    assert (step["hyperparameters"], step["batch_size"], step["gradient_checkpointing"]) == ("rank=8", "2", "True")
    dead = [row for row in found if row["status"] == "oom"]
    assert [(row["quantity"], row["measured_bytes"], row["detail"]) for row in dead] == [("", "", DEAD.detail)]
    assert [(row["buffer"], row["measured_bytes"]) for row in rows(render([WRONG], "csv", buffers=True))] == [
        ("exp_avg", "100"), ("step", ""),
    ]  # fmt: skip


def test_markdown_has_the_same_rows_and_the_reasons() -> None:
    shown = render(ALL, "markdown")
    assert "| optimizer state | 2,000 | 2,048 | -48 | -2.344% |" in shown
    compared = sum(line.startswith(("| ok ", "| mismatch ")) for line in shown.splitlines())
    assert compared == sum(bool(row["quantity"]) for row in rows(render(ALL, "csv"))) == 12
    assert "oom: sgd (torch-loop), small-llama, optimizer steps, fp32, cpu: its process was killed" in shown
    assert "unsupported: needs the package fira" in shown


# -- JSON --------------------------------------------------------------------------------------------


def valid(outcomes: Sequence[Outcome], **how: Any) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(render(outcomes, "json", **how))
    jsonschema.Draft202012Validator(schema("verify")).validate(data)
    return data


def test_json_follows_the_published_schema_whatever_became_of_a_case() -> None:
    told = replace(MEASURED, reserved={"step": 1}, requested={"step": 1}, workspaces_bytes=1, device_used_bytes=1)
    outcomes = [*ALL, replace(WRONG, measured=told, case=replace(GALORE, recipe="fp32"))]
    assert "buffers" not in valid(outcomes)["cases"][0]
    cases = {(c["method"], c["implementation"]): c for c in valid(outcomes, buffers=True)["cases"]}
    assert cases["adamw", "torch-loop"]["buffers"] == [
        {"param": "w", "buffer": "exp_avg", "shape": [5, 5], "dtype": "float32", "predicted_bytes": 100,
         "measured_bytes": 100}
    ]  # fmt: skip
    dead = cases["sgd", "torch-loop"]
    assert (dead["predicted"], dead["measured"], dead["rel_error"]) == (None, None, None)


def test_json_says_how_a_case_was_run() -> None:
    data = valid([FINE, WRONG])
    alone, whole = data["cases"]
    assert (whole["setup"]["recipe"], whole["setup"]["batch_size"], whole["setup"]["seq_len"]) == ("pure-bf16", 2, 64)
    assert whole["setup"]["gradient_checkpointing"] is True
    assert whole["hyperparameters"] == {"rank": 8}
    assert (alone["setup"]["layerwise"], alone["setup"]["batch_size"]) == (False, None)  # it has no batches
    assert whole["rel_error"]["phases"] == {"forward": 0.1, "step": -120 / 5120}


def test_environments_that_differ_stand_with_their_cases() -> None:
    data = valid([FINE, WRONG, DEAD])
    assert data["environment"] == {"torch": "2.13.0"}
    assert [c.get("environment") for c in data["cases"]] == [{"device": "cpu"}, None, {"gpu": "X"}]


def test_a_real_case_through_record_and_command_line(tmp_path: Path) -> None:
    """48-wide square attention, two layers: as `run` measures it, everything that stays is exact."""
    outcome = run(Case("small-tied", "adamw", "torch-loop", options={"device": "cpu"}))
    assert outcome.status == "ok", outcome.detail
    path = tmp_path / "record.jsonl"
    Record(path).append(outcome)
    done = CliRunner().invoke(app, ["verify", "report", str(path), "--format", "json", "--buffers"])
    data = json.loads(done.stdout)
    jsonschema.Draft202012Validator(schema("verify")).validate(data)
    (case,) = data["cases"]
    assert case["rel_error"]["optimizer_state_bytes"] == 0.0
    assert case["measured"]["optimizer_state_bytes"] == sum(b["measured_bytes"] for b in case["buffers"])
    # AdamW's paper counts two moments: all but torch's 20 step counters of 4 bytes
    assert case["measured"]["optimizer_state_bytes"] - case["paper_optimizer_state_bytes"] == 20 * 4
    assert data["summary"]["buffers_compared"] == 3 * 20


def test_the_schema_is_printed() -> None:
    done = CliRunner().invoke(app, ["schema", "verify"])
    assert json.loads(done.stdout)["title"] == "galore-mem verify"
    jsonschema.Draft202012Validator.check_schema(json.loads(done.stdout))
