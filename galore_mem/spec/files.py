"""Reading what a user points at: bounded, regular files only, and every problem one line.

A path may be a pipe, a device, a directory, 100 GiB long or not JSON at all; none of that may hang the program,
fill its memory or end in a traceback.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from galore_mem.errors import InputError
from galore_mem.units import MIB, format_bytes

CONFIG_LIMIT = 4 * MIB  # the largest published config.json files have some 100 KiB


def shown(value: object, limit: int = 60) -> str:
    """A value that the user gave, as one short piece of text for an error message."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return repr(value if len(value) <= limit else value[: limit - 3] + "...")
    if isinstance(value, int):
        return str(value) if value.bit_length() <= 128 else f"an integer of {value.bit_length()} bits"
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, dict | list | tuple):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    return f"a {type(value).__name__}"


def shown_path(path: Path | str) -> str:
    """A path for an error message: quoted, and shortened from the left, where it says least."""
    text = str(path)
    return repr(text if len(text) <= 160 else "..." + text[-157:])


def status(path: Path) -> os.stat_result | None:
    """What the file system says of this path, or None when nothing is there. Raises `InputError` if it may not say."""
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise InputError(f"cannot read {shown_path(path)}: {error.strerror}") from None
    except ValueError:  # a NUL in the path, or characters the file system's encoding does not have
        raise InputError(f"{shown_path(path)} is not a valid path") from None


def is_file(path: Path) -> bool:
    """Is a regular file there? Raises `InputError` when that cannot be known."""
    found = status(path)
    return found is not None and stat.S_ISREG(found.st_mode)


def is_folder(path: Path) -> bool:
    """Is a folder there? Raises `InputError` when that cannot be known."""
    found = status(path)
    return found is not None and stat.S_ISDIR(found.st_mode)


def list_folder(path: Path) -> list[Path]:
    """What a folder holds, sorted. Raises `InputError` when it cannot be read."""
    try:
        return sorted(path.iterdir())
    except OSError as error:
        raise InputError(f"cannot read {shown_path(path)}: {error.strerror}") from None


def open_file(path: Path) -> tuple[BinaryIO, int]:
    """The opened regular file and its size. Raises `InputError` for anything else; never waits for a pipe."""
    found = status(path)
    if found is None:
        raise InputError(f"there is no file {shown_path(path)}")
    if not stat.S_ISREG(found.st_mode):
        what = "a folder" if stat.S_ISDIR(found.st_mode) else "not a regular file"
        raise InputError(f"cannot read {shown_path(path)}: it is {what}")
    try:
        return path.open("rb"), found.st_size
    except OSError as error:
        raise InputError(f"cannot read {shown_path(path)}: {error.strerror}") from None


def read_some(file: BinaryIO, count: int, path: Path) -> bytes:
    """Up to `count` bytes of an opened file. Raises `InputError` where the disk does."""
    try:
        return file.read(count)
    except OSError as error:
        raise InputError(f"cannot read {shown_path(path)}: {error.strerror}") from None


def read_file(path: Path, limit: int) -> bytes:
    """The bytes of a regular file of at most `limit` bytes. Raises `InputError`."""
    file, size = open_file(path)
    with file:
        data = b"" if size > limit else read_some(file, limit + 1, path)
    if size > limit or len(data) > limit:
        raise InputError(f"{shown_path(path)} is too large: more than {format_bytes(limit)}; is it the right file?")
    return data


def decode(data: bytes, source: str) -> str:
    """UTF-8 text, with or without a byte order mark. Raises `InputError`."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{source} is not UTF-8 text (byte {error.start})") from None


def _refuse_constant(name: str) -> NoReturn:
    raise InputError(f"{name} is not a JSON number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]  # set.add returns None, which is false
        raise InputError(f"key {shown(twice)} is given twice")
    return result


def parse_object(data: bytes, source: str) -> dict[str, Any]:
    """A JSON object. Raises `InputError` naming `source`: not UTF-8, not JSON, NaN, a key twice, not an object."""
    text = decode(data, source)
    try:
        value = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique)
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{source} is not JSON: {error.msg} at line {error.lineno} column {error.colno}") from None
    except ValueError:  # more digits than Python converts (sys.set_int_max_str_digits)
        raise InputError(f"{source} has an integer of thousands of digits") from None
    except RecursionError:
        raise InputError(f"{source} is nested too deeply") from None
    if not isinstance(value, dict):
        raise InputError(f"{source} must be a JSON object, got {shown(value)}")
    return value


def read_object(path: Path, limit: int = CONFIG_LIMIT) -> dict[str, Any]:
    """The JSON object in a file of at most `limit` bytes. Raises `InputError`."""
    return parse_object(read_file(path, limit), shown_path(path))
