"""Every method, in the order they are listed: the one place to add a line for a new file."""

from __future__ import annotations

from galore_mem.errors import unknown
from galore_mem.methods import (
    adafactor,
    adam_mini,
    adamw,
    adamw_4bit,
    adamw_8bit,
    adamw_fp8,
    apollo,
    apollo_mini,
    came,
    fira,
    flora,
    galore,
    galore_2,
    galore_8bit,
    galore_adafactor,
    galore_mini,
    lomo,
    lora,
    low_rank,
    q_galore,
    qlora,
    relora,
    sgd,
    tensor_galore,
)
from galore_mem.methods.base import Method

_ORDER = (
    adamw.METHOD,
    sgd.METHOD,
    adamw_8bit.METHOD,
    adamw_4bit.METHOD,
    adamw_fp8.METHOD,
    adafactor.METHOD,
    came.METHOD,
    adam_mini.METHOD,
    lomo.METHOD,
    low_rank.METHOD,
    lora.METHOD,
    relora.METHOD,
    qlora.METHOD,
    flora.METHOD,
    galore.METHOD,
    galore_8bit.METHOD,
    galore_adafactor.METHOD,
    q_galore.METHOD,
    tensor_galore.METHOD,
    galore_2.METHOD,
    *galore_mini.METHODS,
    apollo.METHOD,
    apollo_mini.METHOD,
    fira.METHOD,
)


def table(methods: tuple[Method, ...]) -> dict[str, Method]:
    """Methods by name, in order. Raises `ValueError` for a name that occurs twice."""
    by_name: dict[str, Method] = {}
    for entry in methods:
        if entry.name in by_name:
            raise ValueError(f"two methods are called {entry.name!r}")
        by_name[entry.name] = entry
    return by_name


METHODS = table(_ORDER)


def method(name: str) -> Method:
    """The method of this name. Raises `InputError` with the known ones."""
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    return METHODS[name]
