"""Helpers of the tests of `galore_mem.spec`: bad input, and what must come of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st

from galore_mem.errors import InputError
from galore_mem.spec.model import ModelSpec

QUICK = settings(max_examples=150, derandomize=True, deadline=None)

TEXT = st.text(st.characters(), max_size=12)  # lone surrogates included
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


def is_one_line(message: str) -> bool:
    """Printable: no line break, no control character, no lone surrogate; and not a page."""
    return message.isprintable() and 0 < len(message) < 1200


def line(function: Callable[..., object], *arguments: object) -> str:
    """The message of the `InputError` that the call must raise: one printable line."""
    with pytest.raises(InputError) as caught:
        function(*arguments)
    assert is_one_line(str(caught.value)), str(caught.value)
    return str(caught.value)


def valid_or_one_line(function: Callable[..., ModelSpec], *arguments: object) -> ModelSpec | None:
    """The model, or None after an `InputError` of one line; any other exception fails the test."""
    message = None
    model = None
    try:
        model = function(*arguments)
    except InputError as error:
        message = str(error)
    assert message is None or is_one_line(message), message
    assert model is None or model.parameter_count == sum(row.count for row in model.parameters())
    return model


def stored(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """The bytes of a safetensors file with this header, and a length that may be wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype: Any = "F32", shape: Any = (2, 3), offsets: Any = (0, 24)) -> dict[str, Any]:
    """One tensor in the header of a safetensors file."""
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}
