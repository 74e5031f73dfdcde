"""Python's garbage collector at rest, where reference counts free what is to be freed. No torch."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused(*, freeze: bool = False) -> Iterator[None]:
    """The collector does not come by itself; afterwards it does again, unless it did not before.

    `freeze`: a `gc.collect()` inside looks at what was made inside alone. (Afterwards nothing is frozen, whatever was.)
    """
    was = gc.isenabled()
    gc.disable()
    if freeze:
        gc.freeze()
    try:
        yield
    finally:
        if freeze:
            gc.unfreeze()
        if was:
            gc.enable()
