"""Pictures of simulated runs: PNG, SVG and HTML."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from simulate_traces import card, result, simulation

from galore_mem.errors import InputError
from galore_mem.report import timeline, timeline_html
from galore_mem.report.simulate_files import Files
from galore_mem.report.timeline import PANELS, Span, ceiling, check, picture, room, spans, summit
from galore_mem.setup import Setup
from galore_mem.units import GIB, MIB

POINTS = 25  # every event of the run


def page(text: str) -> tuple[list[ElementTree.Element], list[dict[str, object]]]:
    """The drawings of a page, and the numbers behind them."""
    drawn = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]
    numbers = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', text, re.DOTALL)
    return drawn, [json.loads(one) for one in numbers]


# -- what is drawn -----------------------------------------------------------------------------------------------


def test_phases_that_follow_each_other() -> None:
    """The three marks of the first step are one span."""
    line = simulation(points=POINTS).timeline
    assert line is not None
    assert list(spans(line)) == [
        Span("load", 0, 2), Span("first-step", 2, 15), Span("forward", 15, 17), Span("backward", 17, 21),
        Span("step", 21, 25),
    ]  # fmt: skip
    assert line.at[summit(line, "backward")] == 17  # the first gradient of the second step


def test_the_scale_has_room_for_the_peak_and_a_limit_that_is_near() -> None:
    """138 MiB reserved; a limit above twice that is not drawn."""
    near, far = simulation(points=POINTS, card=card(200)), simulation(points=POINTS, card=card(1000))
    assert (room(near), room(far)) == (200 * MIB, 1000 * MIB)
    assert ceiling([near]) == 200 * MIB * 118 // 100
    assert ceiling([far]) == ceiling([simulation(points=POINTS)]) == 138 * MIB * 118 // 100


@pytest.mark.parametrize("highest", [3, 4999, 7 * MIB, 130 * MIB, 900 * MIB, 1100 * MIB, 80 * GIB, 5000 * GIB])
def test_lines_of_the_grid(highest: int) -> None:
    step = timeline_html._step(highest)
    assert step * timeline_html.LINES >= highest
    lines = -(-highest // step)
    assert lines <= timeline_html.LINES
    digits = str(next(step // unit for unit in (GIB, MIB, 1024, 1) if step % unit == 0))
    assert digits.rstrip("0") in ("1", "2", "5")


# -- formats -------------------------------------------------------------------------------------------------------


def test_a_page_that_needs_nothing_else() -> None:
    """Two runs: two drawings, their numbers, and no address of anything."""
    small = simulation(points=POINTS, method="<b>", card=card(100))
    text = picture(result(simulation(points=POINTS), small, gpu="small-card"), ".html").decode()
    drawn, numbers = page(text)
    assert len(drawn) == len(numbers) == 2
    assert "://" not in text
    assert "<b>" not in text
    assert numbers[0]["events"] == 25
    words = ["".join(e.itertext()) for e in drawn[1].iter("text")]
    assert {"first-step", "backward", "room on small-card", "out of memory"} <= set(words)
    assert "out of memory" not in ["".join(e.itertext()) for e in drawn[0].iter("text")]


def test_areas_end_where_the_bytes_do() -> None:
    """At the peak the uppermost area ends at 114 MiB: y of the panel's height from TOP to HEIGHT - BOTTOM."""
    made = simulation(points=POINTS)
    [drawn], _ = page(picture(result(made), ".html").decode())
    areas = [e.get("points", "").split() for e in drawn.iter("polygon")]
    assert len(areas) == 5
    lowest = min(float(point.split(",")[1]) for area in areas for point in area)
    part = 114 * MIB / (138 * MIB * 118 // 100)
    height = timeline_html.HEIGHT - timeline_html.TOP - timeline_html.BOTTOM
    assert lowest == round(timeline_html.TOP + (1 - part) * height, 1)


def test_svg_and_png() -> None:
    """Text stays text, so that it can be searched; the same run gives the same file."""
    pytest.importorskip("matplotlib", reason="needs the extra: plot")
    answer = result(simulation(points=POINTS, card=card(100)), gpu="small-card")
    svg = picture(answer, ".svg")
    assert svg == picture(answer, ".svg")
    root = ElementTree.fromstring(svg)
    words = {"".join(e.itertext()).strip() for e in root.iter("{http://www.w3.org/2000/svg}text")}
    label = "114.00 MiB, backward: mm in model.layers.1.up"
    assert {"first-step", "reserved", "optimizer state", "out of memory", "room on small-card", label} <= words
    assert picture(answer, ".png").startswith(b"\x89PNG\r\n")


def test_on_the_cpu_nothing_is_reserved() -> None:
    made = simulation(setup=Setup(device="cpu"), points=POINTS)
    [drawn], [numbers] = page(picture(result(made), ".html").decode())
    assert numbers["reserved_bytes"] is None
    assert list(drawn.iter("polyline")) == []


# -- refused -------------------------------------------------------------------------------------------------------


def test_too_many_runs() -> None:
    many = [simulation(points=3, method=f"m{i}") for i in range(PANELS + 1)]
    with pytest.raises(InputError, match="shows up to 8 runs, these are 9"):
        picture(result(*many), ".html")


def test_kinds_of_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("run.pdf", "run"):
        with pytest.raises(InputError, match="unknown kind of picture"):
            check(Path(name))
    monkeypatch.setattr(timeline, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="needs matplotlib; install galore-mem with its extra: plot"):
        check(Path("run.png"))
    check(Path("run.html"))


def test_files_are_checked_before_anything_runs(tmp_path: Path) -> None:
    for given, expected in (
        ((tmp_path / "no" / "run.html", None, "cuda", ["adamw"]), "there is no such folder"),
        ((None, tmp_path / "run.pickle", "cpu", ["adamw"]), "leave it out with --device cpu"),
        ((None, tmp_path / "run.pickle", "cuda", []), "name one method"),
        ((None, tmp_path / "run.pickle", "cuda", ["adamw", "sgd"]), "name one method"),
    ):
        with pytest.raises(InputError, match=expected):
            Files(*given)
    assert Files(None, None, "cuda", []).points is None


def test_files_are_written(tmp_path: Path) -> None:
    """A picture that cannot be written is one line."""
    drawn, kept = tmp_path / "run.html", tmp_path / "run.pickle"
    made = simulation(points=POINTS, keep_run=True)
    Files(drawn, kept, "cuda", ["adamw"]).write(result(made), "")
    assert drawn.read_text().startswith("<!DOCTYPE html>")
    assert kept.read_bytes()[:2] == b"\x80\x04"  # a pickle of protocol 4
    with pytest.raises(InputError, match="these are 2; name one --implementation"):
        Files(None, kept, "cuda", ["adamw"]).write(result(made, replace(made)), "")
    (tmp_path / "taken.html").mkdir()
    with pytest.raises(InputError, match="cannot write"):
        Files(tmp_path / "taken.html", None, "cuda", ["adamw"]).write(result(made), "")
