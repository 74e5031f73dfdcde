"""`simulate`'s results as a table, CSV and Markdown, from runs written by hand."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from dataclasses import replace

import pytest
from simulate_traces import allocation, card, result, simulation

from galore_mem.memory.tensor import ACTIVATIONS
from galore_mem.report.simulate import at_peak, each, operation_name, phases, render, summary, what, where
from galore_mem.report.tables import narrowed, needed_width
from galore_mem.result import Unsupported
from galore_mem.setup import Setup
from galore_mem.simulate.result import Live, Place, Simulation
from galore_mem.simulate.trace import Mark, Trace
from galore_mem.units import MIB

LIVE = Live("activations", "", Place("forward", "model.layers.{i}.mlp", "aten.mul.Tensor"), (2, 3), "float32", 32, 768)


def text(*runs: Simulation, format: str = "table", everything: bool = False, **more: object) -> str:
    return render(result(*runs, **more), format, everything=everything, plain=True)


def rows(shown: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(shown)))


# -- the overview ----------------------------------------------------------------------------------------------


def test_one_row_a_method() -> None:
    """MiB; half of AdamW's peak of 114 is -50 %. (The numbers of the run are derived in test_simulate_device.)"""
    other = simulation(method="sgd")
    half = replace(other, phases=tuple(p._replace(components=(57 * MIB, 0, 0, 0, 0)) for p in other.phases))
    table = summary(result(simulation(), half))
    names = [c.name for c in table.columns]
    shown = [dict(zip(names, row, strict=True)) for row in table.rows]
    assert [(r["method"], r["state"], r["peak"], r["in"], r["reserved"], r["vs adamw"]) for r in shown] == [
        ("adamw", "24.00", "114.00", "backward", "138.00", ""), ("sgd", "24.00", "57.00", "load", "138.00", "-50.0%"),
    ]  # fmt: skip
    assert table.title == "by-hand: 12,582,912 parameters; batch 1 x 64 tokens, pure-bf16, sdpa attention"


def test_a_card_and_a_request_that_it_refused() -> None:
    """In attention's place: what ran out, where, with the numbers of torch's message."""
    table = summary(result(simulation(card=card(100)), simulation(method="sgd", card=card(130)), gpu="small-card"))
    assert [row[-1] for row in table.rows] == ["no -0.04", "tight +0.01"]  # GiB: -38 and 8 MiB
    assert table.columns[-1].name == "small-card"
    assert table.warnings == (
        "adamw: out of memory in first-step: zeros_like in (optimizer). CUDA would be out of memory: 12.00 MiB more "
        "are needed, the device has 10.00 MiB free of 100.00 MiB. In use: 74.00 MiB allocated, 16.00 MiB reserved but "
        "unallocated, 0 bytes outside the allocator.",
    )
    below = "\n".join(table.footer)
    assert "A run that ran out of memory is shown as on a card that is large enough." in below
    assert "it ran only after cached memory was released" in below


def test_what_is_assumed_and_what_was_not_run() -> None:
    below = summary(result(simulation())).footer
    assert "Assumed: it was written by hand." in below
    assert "Not run: fira (fira): needs the package fira." in below
    apart = summary(result(simulation(), replace(simulation(), assumptions=("something else",)))).footer
    assert "Assumed: it was written by hand." not in apart
    assert "Assumed for adamw (torch-foreach): it was written by hand." in apart
    assert "Assumed for adamw (torch-foreach): something else." in apart
    assert "Not counted: nothing." in below


def test_on_the_cpu_nothing_is_said_of_an_allocator() -> None:
    shown = text(simulation(setup=Setup(device="cpu")), device="cpu")
    assert "reserved" not in shown
    assert "slack" not in shown


def test_a_step_of_ones_own_has_no_batch_that_is_known() -> None:
    unknown = dict.fromkeys(("recipe", "batch_size", "seq_len", "attention", "gradient_checkpointing"))
    assert summary(result(simulation(), **unknown)).title == "by-hand: 12,582,912 parameters"


def test_title_says_how_it_is_trained() -> None:
    more = {"gradient_checkpointing": True, "layerwise": True, "gradient_accumulation": 4}
    assert summary(result(simulation(), **more)).title.endswith(
        "sdpa attention, checkpointing, 4 micro-batches, layer-wise update"
    )


# -- one run ---------------------------------------------------------------------------------------------------


def test_each_phase() -> None:
    table = phases(simulation())
    assert [c.name for c in table.columns] == [
        "phase", "allocated", "reserved", "weights", "gradients", "state", "activ.", "temp.", "incl. slack",
    ]  # fmt: skip
    assert table.rows[3] == (
        "backward", "114.00", "138.00", "24.00", "12.00", "24.00", "40.00", "14.00", "0.00",
    )  # fmt: skip
    # 138 - 114 = 24, and 24 / 138 = 17.4 %
    assert table.footer == ("reserved beyond the peak: 24.00 MiB (17.4%); 25 events.",)
    assert "given back 1 times" in phases(simulation(card=card(130))).footer[0]


def test_what_lives_at_the_peak() -> None:
    table = at_peak(simulation(), None)
    assert table.title == "at the peak, in backward: mm in model.layers.1.up: 114.00 MiB"
    assert [row[1:5] for row in table.rows] == [
        ("40.00", "2", "mm in model.layers.{i}.up", "bfloat16 20 x 524288"),
        ("24.00", "2", "model.layers.{i}.up.weight", "bfloat16 12 x 524288"),
        ("24.00", "2", "model.layers.{i}.up.weight:exp_avg", "bfloat16 12 x 524288"),
        ("14.00", "1", "cublas workspace", ""),
        ("12.00", "1", "mm in model.layers.1.up", "bfloat16 12 x 524288"),
    ]


def test_the_rest_is_one_row() -> None:
    """The three smallest of five kinds: 24 + 14 + 12 MiB, in 2 + 1 + 1 allocations."""
    table = at_peak(simulation(), 2)
    assert table.rows[2] == ("", "50.00", "4", "3 more kinds (--tensors lists them)", "", "")


def test_names_of_what_and_where() -> None:
    assert what(LIVE) == "mul in model.layers.{i}.mlp"
    assert what(LIVE._replace(name="w:exp_avg")) == "w:exp_avg"
    assert what(LIVE._replace(place=Place("step", "", "cublas workspace"))) == "cublas workspace"
    assert each(LIVE) == "float32 2 x 3"
    assert each(LIVE._replace(shape=())) == "float32 scalar"
    assert each(LIVE._replace(dtype="")) == ""
    assert where(LIVE.place) == "forward: mul in model.layers.{i}.mlp"
    assert operation_name("bitsandbytes.quantize_4bit.default") == "bitsandbytes.quantize_4bit"


@pytest.mark.parametrize(("runs", "blocks"), [(1, 1), (3, 3), (4, 0)])
def test_few_runs_are_shown_phase_by_phase(runs: int, blocks: int) -> None:
    many = [simulation(method=f"m{i}") for i in range(runs)]
    assert text(*many).count("at the peak, in") == blocks
    assert text(*many, everything=True).count("at the peak, in") == runs


@pytest.mark.parametrize("width", [80, 120])
def test_it_fits_a_terminal(width: int) -> None:
    """With the longest names of a LLaMA; in 80 columns the columns that matter stay."""
    name = "model.layers.0.post_attention_layernorm"
    trace = Trace(512, [allocation(2000, "aten._to_copy.default", name, ACTIVATIONS)], [0], [Mark(0, "forward")])
    made = replace(simulation(trace, card=card(20000)), method="galore-mini-1", implementation="galore-mem-randomized")
    tables = (summary(result(made, gpu="rtx-4060-ti-16gb")), phases(made), at_peak(made, None))
    kept = [[c.name for c in narrowed(table, width).columns] for table in tables]
    assert all(needed_width(narrowed(table, width)) <= width for table in tables)
    needed: Sequence[set[str]] = ({"method", "peak", "in", "reserved"}, {"allocated", "temp."}, {"bytes", "x", "what"})
    assert all(names <= set(columns) for names, columns in zip(needed, kept, strict=True))


# -- formats -----------------------------------------------------------------------------------------------------


def test_csv_has_a_row_for_each_phase() -> None:
    found = rows(text(simulation(card=card(100)), format="csv"))
    assert [r["phase"] for r in found] == ["load", "first-step", "forward", "backward", "step"]
    top = found[3]
    assert (top["is_peak"], top["verdict"]) == ("True", "does_not_fit")
    assert [int(top[k]) // MIB for k in ("allocated_bytes", "reserved_bytes", "activations", "slack_bytes")] == [
        114, 138, 40, 0,
    ]  # fmt: skip


def test_csv_of_what_lives_at_the_peak() -> None:
    found = rows(text(simulation(), format="csv", everything=True))
    assert sum(int(r["bytes"]) for r in found) == 114 * MIB
    assert found[0] == {
        "method": "adamw", "implementation": "torch-foreach", "category": "activations", "name": "", "phase": "forward",
        "module": "model.layers.{i}.up", "operation": "aten.mm.default", "shape": "20x524288", "dtype": "bfloat16",
        "count": "2", "bytes": str(40 * MIB),
    }  # fmt: skip


def test_markdown_is_tables() -> None:
    shown = text(simulation(), format="markdown")
    assert "| backward | 114.00 | 138.00 |" in shown
    assert "**at the peak, in backward: mm in model.layers.1.up: 114.00 MiB**" in shown
    assert all(line.count("|") == 7 for line in shown.splitlines() if line.startswith("| ░"))


def test_a_result_without_runs_that_failed() -> None:
    only = replace(result(simulation()), unsupported=(Unsupported("a", "b", "c"),))
    assert "Not run: a (b): c." in render(only, "table", everything=False, plain=True)


def test_no_color_in_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "NO_COLOR", "1")
    assert "\x1b" not in text(simulation())
