"""Where a command's answer goes: standard output or a file. Answers are data; everything else goes to stderr."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from galore_mem.errors import InputError, unknown

FORMATS = ("table", "json", "csv", "markdown")


def check_format(name: str) -> str:
    """The format's name. Raises `InputError` for one that does not exist."""
    if name not in FORMATS:
        raise unknown("format", name, FORMATS)
    return name


def check_output(output: Path | None) -> None:
    """Raises `InputError` where `write` could not work, before what takes long is begun."""
    if output is None:
        return
    target = os.path.realpath(output)
    if os.path.isdir(target):
        raise InputError(f"cannot write {str(output)!r}: not a file")
    if not os.path.isdir(os.path.dirname(target)):
        raise InputError(f"cannot write {output}: there is no such folder")


def dump_json(data: Any) -> str:
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"


def write(text: str, output: Path | None) -> None:
    """Prints the text, or puts it into the file, whole or not at all. Raises `InputError` if that cannot be done."""
    if output is None:
        _print(text)
        return
    try:
        check_output(output)
        target = Path(os.path.realpath(output))
        if target.exists() and not target.is_file():  # a pipe or a device is written to, never replaced
            target.write_text(text, encoding="utf-8")
        else:
            _replace(target, text)
    except OSError as error:
        raise InputError(f"cannot write {output}: {error.strerror or error}") from None


def _replace(target: Path, text: str) -> None:
    """Writes a file beside the target and puts it in its place, with the mode that the target has or would get."""
    mode = target.stat().st_mode & 0o7777 if target.exists() else 0o666 & ~_umask()
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name[:100]}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, mode)
        os.replace(name, target)
    except BaseException:  # the half-written file goes, whatever it was, and it is raised again
        os.unlink(name)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


PLAIN = str.maketrans({"█": "#", "▓": "=", "▒": "+", "░": ".", "·": "-", "×": "x", "−": "-"})


def _print(text: str) -> None:
    """Standard output, in the characters it can take."""
    stream = sys.stdout
    if stream is None:  # closed by the caller
        raise InputError("standard output is closed; give --output FILE")
    try:
        text.encode(stream.encoding or "utf-8")
    except UnicodeEncodeError:
        encoding = stream.encoding or "ascii"
        text = text.translate(PLAIN).encode(encoding, errors="replace").decode(encoding)
    try:
        stream.write(text)
        stream.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # what is buffered has nowhere to go
        raise InputError(f"cannot write to standard output: {error.strerror or error}") from None
