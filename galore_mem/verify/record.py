"""The record: one JSON line per outcome, appended as it comes. A killed run leaves every finished case readable."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from galore_mem.errors import InputError
from galore_mem.verify.case import Outcome
from galore_mem.verify.line import SCHEMA, dump, load

START = f'{{"schema":"{SCHEMA}"'.encode()  # of every line


class Record:
    """A file of outcomes. A last line without an end (the run was killed while it wrote) is not read, and the next
    `append` writes over it; that is done to a line of a record only: any other file is an `InputError`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def check(self) -> None:
        """Raises `InputError` where nothing could be appended, before anything is measured."""
        with self._opened():
            pass

    def read(self) -> list[Outcome]:
        """Every outcome in order. Raises `InputError`, with the number of a line, where the file is something else."""
        try:
            if self.path.exists() and not self.path.is_file():
                raise InputError(f"{self.path} is no record: not an ordinary file")
            lines = self.path.read_bytes().split(b"\n")[:-1]
        except OSError as error:
            raise InputError(f"cannot read {self.path}: {error.strerror or error}") from None
        return [self._line(number, line) for number, line in enumerate(lines, 1) if line]

    def _line(self, number: int, line: bytes) -> Outcome:
        try:
            return load(line.decode())
        except UnicodeDecodeError:
            raise InputError(f"{self.path}, line {number}: not text") from None
        except InputError as error:
            raise InputError(f"{self.path}, line {number}: {error}") from None

    def append(self, outcome: Outcome) -> None:
        """Adds a line and flushes it to the disk. Raises `InputError` where that fails; what is there stays."""
        with self._opened() as (file, start):
            file.truncate(start)
            try:
                file.write((dump(outcome) + "\n").encode())
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                file.truncate(start)
                raise

    @contextmanager
    def _opened(self) -> Iterator[tuple[BinaryIO, int]]:
        """The file, locked, and where its next line begins."""
        try:
            if self.path.exists() and not self.path.is_file():
                raise InputError(f"cannot write {self.path}: a record is an ordinary file")
            with open(self.path, "ab+") as file:
                _lock(file)
                yield file, self._end(file)
        except OSError as error:
            raise InputError(f"cannot write {self.path}: {error.strerror or error}") from None

    def _end(self, file: BinaryIO) -> int:
        """After the last whole line. Raises `InputError` where what follows it is no beginning of ours."""
        file.seek(0)
        head = file.read(len(START))
        kept = file.seek(0, os.SEEK_END)
        cut = b""
        while kept > 0:  # back from the end, for records are long
            begin = max(0, kept - 65_536)
            file.seek(begin)
            found = file.read(kept - begin)
            place = found.rfind(b"\n")
            cut = found[place + 1 :] + cut
            kept = begin + place + 1
            if place >= 0:
                break
        if not all(START.startswith(begin[: len(START)]) for begin in (head, cut)):
            raise InputError(f"{self.path} is no record, and stays as it is: name another file")
        return kept


def _lock(file: BinaryIO) -> None:
    """Two runs may write one record: each waits for the other's line. (Where there are no such locks, not.)"""
    with suppress(ImportError):
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX)


def latest(outcomes: Iterable[Outcome]) -> list[Outcome]:
    """The last outcome of each case: one that was resumed has those before in the record too."""
    return list({o.case.key: o for o in outcomes}.values())
