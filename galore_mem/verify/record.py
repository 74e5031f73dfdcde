"""The record: one JSON line per outcome, appended as it comes. A killed run leaves every finished case readable."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from galore_mem.errors import InputError
from galore_mem.verify.case import STATUSES, BufferPair, Case, Outcome, Sizes

SCHEMA = "galore-mem.verify-record/1"


def dump(outcome: Outcome) -> str:
    """One line."""
    found = {"schema": SCHEMA, "environment": dict(outcome.environment), **outcome.to_json()}
    return json.dumps(found, ensure_ascii=False, separators=(",", ":"))


def load(given: Mapping[str, Any]) -> Outcome:
    """The outcome that `dump` (or the worker) wrote. Raises `InputError` for anything else."""
    try:
        named = ("model", "method", "implementation", "workload", "recipe", "options", "hyperparameters", "targets")
        case = Case.from_json({name: given[name] for name in named})
        if given["status"] not in STATUSES:
            raise InputError(f"unknown status {given['status']!r}")
        sizes = [None if given.get(key) is None else Sizes.from_json(given[key]) for key in ("predicted", "measured")]
        buffers = tuple(BufferPair(**{**b, "shape": tuple(b["shape"])}) for b in given.get("buffers", ()))
        return Outcome(
            case, given["status"], given["detail"], sizes[0], sizes[1], buffers,
            given.get("environment", {}), given.get("seconds", 0.0),
        )  # fmt: skip
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(f"this is no outcome of galore-mem verify: {error}") from None


class Record:
    """A file of outcomes. A last line without an end (the run was killed while it wrote) is dropped by the next
    `append`; any other line that is no outcome is an `InputError` with its number."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[Outcome]:
        """Every outcome in order. Raises `InputError` where the file cannot be read or is something else."""
        try:
            text = self.path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise InputError(f"{self.path} is no record: it is not text") from None
        except OSError as error:
            raise InputError(f"cannot read {self.path}: {error.strerror or error}") from None
        lines = text.split("\n")
        if lines[-1]:
            lines.pop()  # cut off
        return [self._line(number, line) for number, line in enumerate(lines, 1) if line]

    def _line(self, number: int, line: str) -> Outcome:
        try:
            given = json.loads(line)
            if not isinstance(given, dict) or given.get("schema") != SCHEMA:
                raise InputError(f"its schema is not {SCHEMA}")
            return load(given)
        except (json.JSONDecodeError, RecursionError, InputError) as error:
            raise InputError(f"{self.path}, line {number}: {error}") from None

    def append(self, outcome: Outcome) -> None:
        """Adds a line and flushes it to the disk. Raises `InputError` where that fails; what is there stays."""
        try:
            if self.path.exists() and not self.path.is_file():
                raise InputError(f"cannot write {self.path}: a record is an ordinary file")
            with open(self.path, "ab+") as file:
                _drop_cut_line(file)
                start = file.seek(0, os.SEEK_END)
                try:
                    file.write((dump(outcome) + "\n").encode())
                    file.flush()
                    os.fsync(file.fileno())
                except OSError:
                    file.truncate(start)
                    raise
        except OSError as error:
            raise InputError(f"cannot write {self.path}: {error.strerror or error}") from None


def _drop_cut_line(file: Any) -> None:
    end = file.seek(0, os.SEEK_END)
    file.seek(0)
    kept = file.read().rfind(b"\n") + 1
    if kept != end:
        file.truncate(kept)
