"""Errors that a user can act on.

Every problem with what the user gave is an `InputError`: one line that says what was given, what is
allowed and what to do next. The command line prints that line and exits with 2; nothing else is
caught, so a defect in this package is never dressed up as bad input.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class GaloreMemError(Exception):
    """Base of the errors this package raises on purpose."""


class InputError(GaloreMemError, ValueError):
    """The input or the usage is wrong; the message is one line for the user."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


def unknown(kind: str, given: str, allowed: Iterable[str]) -> InputError:
    """The error for a name that is not in a table: names the nearest entries, then where to look."""
    return InputError(f"unknown {kind} {_shown(given)}; {_hint(given, allowed)}")


def unknown_of(methods: Sequence[str], kind: str, given: str, allowed: Iterable[str]) -> InputError:
    """As `unknown`, for something that methods have: those that were named, or (none were) any."""
    if methods:
        return unknown(f"{kind} of {', '.join(methods)}", given, allowed)
    article = "an" if kind[0] in "aeiou" else "a"
    return InputError(f"no method has {article} {kind} {_shown(given)}; {_hint(given, allowed)}")


def _shown(given: str) -> str:
    return repr(given if len(given) <= 80 else given[:77] + "...")


def _hint(given: str, allowed: Iterable[str]) -> str:
    """The nearest names, or the known ones where none is near."""
    names = sorted(allowed)
    low = given.lower()
    begun = [name for name in names if low and name.startswith(low)]
    near = (begun + [n for n in difflib.get_close_matches(low, names, n=3, cutoff=0.5) if n not in begun])[:3]
    if near:
        return f"did you mean {', '.join(near)}?"
    return "known: " + (", ".join(names[:40]) or "none") + (", ..." if len(names) > 40 else "")
