"""Where a command's answer goes: standard output or a file. Answers are data; everything else goes to stderr."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import typer

from galore_mem.errors import InputError, unknown

FORMATS = ("table", "json", "csv", "markdown")


def check_format(name: str) -> str:
    """The format's name. Raises `InputError` for one that does not exist."""
    if name not in FORMATS:
        raise unknown("format", name, FORMATS)
    return name


def dump_json(data: Any) -> str:
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"


def write(text: str, output: Path | None) -> None:
    """Prints the text, or puts it into the file, whole or not at all. Raises `InputError` if that cannot be done."""
    if output is None:
        typer.echo(text, nl=False)
        return
    try:
        handle, name = tempfile.mkstemp(dir=output.parent or Path(), prefix=f".{output.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.chmod(name, 0o644)
            os.replace(name, output)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        raise InputError(f"cannot write {output}: {error.strerror or error}") from None
