"""Errors that a user can act on.

Every problem with what the user gave is an `InputError`: one line that says what was given, what is
allowed and what to do next. The command line prints that line and exits with 2; nothing else is
caught, so a defect in this package is never dressed up as bad input.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GaloreMemError(Exception):
    """Base of the errors this package raises on purpose."""


class InputError(GaloreMemError, ValueError):
    """The input or the usage is wrong; the message is one line for the user."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


def unknown(kind: str, given: str, allowed: Iterable[str]) -> InputError:
    """The error for a name that is not in a table: names the nearest entries, then where to look."""
    names = sorted(allowed)
    low = given.lower()
    begun = [name for name in names if low and name.startswith(low)]
    near = (begun + [n for n in difflib.get_close_matches(low, names, n=3, cutoff=0.5) if n not in begun])[:3]
    shown = given if len(given) <= 80 else given[:77] + "..."
    if near:
        return InputError(f"unknown {kind} {shown!r}; did you mean {', '.join(near)}?")
    listed = ", ".join(names) if len(names) <= 40 else ", ".join(names[:40]) + ", ..."
    return InputError(f"unknown {kind} {shown!r}; known: {listed}")
