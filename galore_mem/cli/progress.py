"""What is being done, on a terminal's stderr; nothing elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Begun = Callable[[int, int, str], None]  # which of how many begins, and what it is


@contextmanager
def progress() -> Iterator[Begun]:
    """A function that tells which of how many runs begins."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield lambda number, of, what: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task("", total=None)
        yield lambda number, of, what: shown.update(task, completed=number, total=of, description=what)
