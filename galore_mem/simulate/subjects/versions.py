"""Another release of transformers than the one that is installed: what it does differently, done here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from galore_mem.errors import InputError
from galore_mem.memory.blocks import STACKS
from galore_mem.releases import modeled
from galore_mem.setup import TRANSFORMERS, Setup


def check(setup: Setup) -> None:
    """Raises `InputError` where the installed transformers cannot stand for the setup's."""
    here = modeled("transformers", TRANSFORMERS)
    if TRANSFORMERS.index(setup.transformers) > TRANSFORMERS.index(here):
        raise InputError(
            f"transformers {here} is installed, and its code cannot do what {setup.transformers} does; "
            f"give --transformers {here}"
        )


@contextmanager
def as_released(setup: Setup) -> Iterator[None]:
    """While it lasts, transformers does as the setup's release does. The differences are those that `estimate` knows
    (`galore_mem.memory.blocks.Stack`, with the place in transformers' source)."""
    here, asked = STACKS[modeled("transformers", TRANSFORMERS)], STACKS[setup.transformers]
    if asked.causal_mask_with_sdpa == here.causal_mask_with_sdpa:
        yield
        return
    import transformers.masking_utils as masks

    with patch.object(masks, "_ignore_causal_mask_sdpa", _never):
        yield


def _never(*args: Any, **kwargs: Any) -> bool:
    """No mask is left out because the attention is causal."""
    return False
