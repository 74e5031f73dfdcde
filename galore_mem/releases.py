"""Which of the releases that are described here stands for another one. No torch."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from galore_mem.errors import unknown


def nearest(package: str, release: str, known: tuple[str, ...]) -> str:
    """The described release of the same major version that is nearest to this one, the newer of two. Raises
    `InputError` where there is none."""
    asked = _numbers(release)
    alike = [one for one in known if asked and _numbers(one)[0] == asked[0]]
    if not alike:
        raise unknown(f"{package} version", release, known)
    minor = asked[1] if len(asked) > 1 else 0
    return min(reversed(alike), key=lambda one: abs(_numbers(one)[1] - minor))


def modeled(package: str, known: tuple[str, ...]) -> str:
    """The described release that stands for the installed one; the newest where none is installed."""
    try:
        return nearest(package, version(package), known)
    except PackageNotFoundError:
        return known[-1]


def _numbers(text: str) -> list[int]:
    """Major and minor version; nothing of what is no release."""
    parts = text.split("+")[0].split(".")[:2]
    return [int(part) for part in parts] if all(part.isdecimal() for part in parts) else []
