"""The history of CUDA's caching allocator during one case, as a pickle that PyTorch's memory visualizer opens
(https://pytorch.org/memory_viz). No torch at module level: the command line asks `check` before anything runs.
"""

from __future__ import annotations

import re
import tempfile
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from galore_mem.errors import InputError
from galore_mem.verify.case import Case

if TYPE_CHECKING:
    from galore_mem.verify.meters import Meter, Peak


def check(directory: Path, device: str) -> Path:
    """The directory, made if it is not there, as an absolute path. Raises `InputError` where there is no such history
    (the CPU's allocator keeps none), or where no file can be written."""
    if device != "cuda":
        raise InputError(f"--snapshot records the allocator of CUDA, and this runs on the {device}; leave it out")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise InputError(f"--snapshot: cannot write into {directory}: {error.strerror or error}") from None
    return directory.resolve()


def file_name(case: Case) -> str:
    """Of a case, always the same and no other's: its words as far as they are plain, and a digest of all of it."""
    said = str(case).replace(case.model, re.split(r"[/\\]", case.model.rstrip("/\\"))[-1], 1)
    plain = re.sub(r"[^A-Za-z0-9.=]+", "-", said)[:120].strip("-.")
    return f"{plain}-{sha256(case.key.encode()).hexdigest()[:8]}.pickle"


class Recorded:
    """A meter that also records what the allocator does, from before the first tensor on: every allocation and release
    with its stack, and as `user_metadata` the phase. The file is written when the case ends, also by an error: of a
    case that runs out of memory the history is what one wants. That it cannot be written changes no measurement."""

    def __init__(self, meter: Meter, path: Path) -> None:
        self._meter, self._path = meter, path
        self.told = "not written: the case did not run"

    def __enter__(self) -> Recorded:
        from torch.cuda.memory import _record_memory_history

        _record_memory_history("all", context="all", stacks="all", clear_history=True)
        self._meter.__enter__()
        return self

    def enter(self, phase: str) -> None:
        from torch.cuda.memory import _set_memory_metadata

        self._meter.enter(phase)
        _set_memory_metadata(phase)

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        from torch.cuda.memory import _record_memory_history

        self.told = write(self._path)  # before the meter lets go of workspaces
        _record_memory_history(None)
        self._meter.__exit__(kind, value, at)

    def peaks(self) -> dict[str, Peak]:
        return self._meter.peaks()

    @property
    def workspaces(self) -> int | None:
        return self._meter.workspaces


def write(path: Path) -> str:
    """Writes the history, whole or not at all: the path, or why there is no file."""
    from torch.cuda.memory import _dump_snapshot

    part = path.with_suffix(".part")
    try:
        _dump_snapshot(str(part))
        part.replace(path)
    except Exception as error:  # of the disk, or of a card that answers no more: the case has its result without it
        with suppress(OSError):
            part.unlink(missing_ok=True)
        return f"not written: {getattr(error, 'strerror', None) or error} ({path})"
    return str(path)
