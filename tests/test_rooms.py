"""The package's floors, as CONTRIBUTING.md draws them: what a room imports is on its own floor or below."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import galore_mem

PACKAGE = Path(galore_mem.__file__).parent
FLOORS = (
    ("errors", "units", "dtypes", "releases", "collector", "_version"),
    ("setup", "gpus"),
    ("spec", "families", "memory", "methods", "partition"),
    ("allocator", "optim", "ledger", "evidence", "result", "verdict", "papers"),
    ("estimator", "followed", "simulate", "verify"),
    ("report",),
    ("cli",),
    ("__init__", "__main__"),
)
DATA = ("model_specs", "__pycache__")  # the specs are in the package where it is installed
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def rooms() -> list[str]:
    return sorted(
        {path.stem if path.is_file() else path.name for path in PACKAGE.iterdir() if path.suffix in ("", ".py")}
    )


def imported(path: Path) -> Iterator[tuple[str, int]]:
    """The rooms that a module imports from, anywhere in it, with the line."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "galore_mem":
                yield (parts[1] if parts[1:2] and parts[1] in FLOOR else "_version"), node.lineno  # the package's own


@pytest.mark.parametrize("room", FLOOR)
def test_nothing_from_floors_above(room: str) -> None:
    path = PACKAGE / room
    modules = sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
    wrong = [
        f"{module.relative_to(PACKAGE)}:{line} imports {other}"
        for module in modules
        for other, line in imported(module)
        if FLOOR[other] > FLOOR[room]
    ]
    assert wrong == []


def test_every_room_has_a_floor() -> None:
    assert [room for room in rooms() if room not in (*FLOOR, *DATA)] == []


def test_contributing_lists_every_room() -> None:
    text = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    missing = [
        room for room in FLOOR if not room.startswith("_") and f"`{room}.py`" not in text and f"`{room}/`" not in text
    ]
    assert missing == []
