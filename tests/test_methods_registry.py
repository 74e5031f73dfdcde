"""The table of methods: order, lookup, and what importing it costs."""

from __future__ import annotations

import subprocess
import sys

import pytest

from galore_mem.errors import InputError
from galore_mem.methods import sgd
from galore_mem.methods.registry import METHODS, method, table

# the order in which commands list them
ORDER = [
    "adamw", "sgd", "adamw-8bit", "adamw-4bit", "adamw-fp8", "adafactor", "came", "adam-mini", "lomo", "low-rank",
    "lora", "relora", "qlora", "flora", "galore", "galore-8bit", "galore-adafactor", "q-galore", "tensor-galore",
    "galore-2", "galore-mini", "galore-mini-1", "galore-mini-2", "apollo", "apollo-mini", "fira",
]  # fmt: skip


def test_order() -> None:
    assert [name for name in METHODS if name in ORDER] == [name for name in ORDER if name in METHODS]


def test_lookup() -> None:
    assert method("sgd") is sgd.METHOD
    with pytest.raises(InputError, match="did you mean adam-mini"):
        method("adam_mini")


def test_two_methods_of_one_name() -> None:
    with pytest.raises(ValueError, match="two methods are called 'sgd'"):
        table((sgd.METHOD, sgd.METHOD))


@pytest.mark.parametrize("name", METHODS)
def test_implementations_have_names_of_their_own(name: str) -> None:
    names = [i.name for i in METHODS[name].implementations]
    assert names
    assert len(set(names)) == len(names)
    for implementation in METHODS[name].implementations:
        assert implementation.equations.keys() <= {"projected", "other"}
        assert implementation.version
        assert implementation.source


def test_ledgers_import_nothing_heavy() -> None:
    heavy = ("torch", "pydantic", "numpy", "transformers", "bitsandbytes", "typer", "rich")
    program = f"import sys; import galore_mem.methods.registry; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
