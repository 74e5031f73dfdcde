"""The record: one JSON line per outcome, appended as it comes. A killed run leaves every finished case readable."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from galore_mem.errors import InputError
from galore_mem.verify.case import Outcome
from galore_mem.verify.line import dump, load


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
            return load(line)
        except InputError as error:
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


def latest(outcomes: Iterable[Outcome]) -> list[Outcome]:
    """The last outcome of each case: one that was resumed has those before in the record too."""
    return list({o.case.key: o for o in outcomes}.values())


def _drop_cut_line(file: Any) -> None:
    end = file.seek(0, os.SEEK_END)
    file.seek(0)
    kept = file.read().rfind(b"\n") + 1
    if kept != end:
        file.truncate(kept)
