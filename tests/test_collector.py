"""The collector rests while it is told to, and is afterwards as it was."""

from __future__ import annotations

import gc
import weakref
from contextlib import suppress

import pytest

from galore_mem.collector import paused


class Cycle:
    """An object that reference counts do not free."""

    def __init__(self) -> None:
        self.itself = self


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("enabled", [False, True])
def test_the_collector_is_as_it_was(enabled: bool, freeze: bool) -> None:
    """Also where one pause lies in another, and where the program fails."""
    was = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        with suppress(KeyError), paused(freeze=freeze):
            with paused():
                assert not gc.isenabled()
            assert not gc.isenabled()
            raise KeyError
        assert gc.isenabled() == enabled
        assert gc.get_freeze_count() == 0
    finally:
        (gc.enable if was else gc.disable)()


@pytest.mark.parametrize(("freeze", "stays"), [(False, False), (True, True)])
def test_what_was_there_is_looked_at_or_not(freeze: bool, stays: bool) -> None:
    """A frozen cycle from before survives a `gc.collect()`; one that was made inside does not."""
    with paused():  # from here on nothing comes by itself
        before = weakref.ref(Cycle())
        with paused(freeze=freeze):
            inside = weakref.ref(Cycle())
            gc.collect()
            assert (before() is not None, inside() is not None) == (stays, False)
