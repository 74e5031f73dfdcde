"""Pickles that are programs, broken, or made to take memory: plain data, or one line, and nothing is ever called."""

from __future__ import annotations

import pickle
import struct
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from allocator_snapshots import SNAPSHOT, A
from hypothesis import given, settings
from hypothesis import strategies as st
from spec_inputs import is_one_line, line

from galore_mem.allocator.snapshot import read_snapshot, snapshot_from
from galore_mem.allocator.unpickle import unpickle
from galore_mem.errors import InputError


def refused(tmp_path: Path, data: bytes) -> str:
    path = tmp_path / "snapshot.pickle"
    path.write_bytes(data)
    return line(read_snapshot, path)


class Harmful:
    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.call = call
        self.arguments = arguments

    def __reduce__(self) -> Any:
        return self.call, self.arguments


def marker(path: str) -> None:
    Path(path).write_text("the pickle ran")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pickle_that_calls_something_is_refused(tmp_path: Path, protocol: int) -> None:
    ran = tmp_path / "ran"
    evil = SNAPSHOT | {"segments": [Harmful(marker, str(ran))]}
    message = refused(tmp_path, pickle.dumps(evil, protocol))
    assert "is refused: instruction 0x" in message
    assert message.endswith("makes something other than plain data (dict, list, tuple, str, int, float, bool, None)")
    assert not ran.exists()


@pytest.mark.parametrize(
    "value",
    [
        OrderedDict(a=1),
        {1, 2},
        frozenset((1,)),
        b"bytes",
        bytearray(b"x"),
        complex(1, 2),
        2**3000,
        range(3),
        print,
        Path,
    ],
    ids=lambda v: type(v).__name__,
)
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_other_types_are_refused(tmp_path: Path, value: Any, protocol: int) -> None:
    assert " is refused: instruction " in refused(tmp_path, pickle.dumps(SNAPSHOT | {"x": value}, protocol))


EVERY_INSTRUCTION = [bytes([n]) for n in range(256)]


@pytest.mark.parametrize(
    "tail", [b"", b"\x00" * 12, b"os\nsystem\n.", b"\xff" * 12], ids=["end", "zeros", "names", "ones"]
)
def test_every_instruction_is_data_or_refused(tail: bytes) -> None:
    """One line for each, or a plain object; nothing hangs, nothing else is raised."""
    for start in (b"\x80\x04", b"\x80\x04]", b"\x80\x04}(", b"\x80\x04K\x01K\x02"):
        for instruction in EVERY_INSTRUCTION:
            try:
                unpickle(start + instruction + tail, "x")
            except InputError as error:
                assert is_one_line(str(error))  # noqa: PT017 -- most are refused, some are data


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"\x80\x04.", "x is a broken pickle: it does not end with one object"),
        (b"\x80\x04K\x01K\x02.", "x is a broken pickle: it does not end with one object"),
        (b"\x80\x04K\x01.junk", "x is a broken pickle: it does not end with one object"),
        (b"\x80\x04(K\x01.", "x is a broken pickle: it does not end with one object"),
        (b"\x80\x06N.", "x is a pickle of protocol 6; at most 5 is known"),
        (b"\x80\x04h\x05.", "x is a truncated or broken pickle"),  # a memo that was never set
        (b"\x80\x04e.", "x is a truncated or broken pickle"),
        (b"\x80\x04N(K\x01e.", "x is a broken pickle: elements for what is no list"),
        (b"\x80\x04]K\x01s.", "x is a truncated or broken pickle"),
        (b"\x80\x04]K\x01K\x02s.", "x is a broken pickle: items for what is no dict"),
        (b"\x80\x04}(K\x01e.", "x is a broken pickle: elements for what is no list"),
        (b"\x80\x04}(K\x01u.", "x is a broken pickle: items for what is no dict"),
        (b"\x80\x04}K\x01K\x02s.", "x has a dict key that is not text"),
        (b"\x80\x04\x8c\x02\xff\xff.", "x is a broken pickle: text that is not UTF-8"),
        (b"\x80\x04X\xff\xff\xff\xffabc.", "x is a truncated or broken pickle"),
        (b"\x80\x04G\x00.", "x is a truncated or broken pickle"),
        (b"\x80\x04K\x01\x86.", "x is a truncated or broken pickle"),
    ],
)
def test_broken_pickles(data: bytes, says: str) -> None:
    assert line(unpickle, data, "x") == says


def test_memory_is_bounded_by_the_length_of_the_file() -> None:
    """A memo index of four billion costs the C unpickler 32 GiB; a million empty dicts in a megabyte are no snapshot; a
    tuple of itself, doubled forty times, takes forever to hash as a key."""
    assert unpickle(b"\x80\x04Nr\xff\xff\xff\xff.", "x") is None
    many = b"\x80\x04" + b"]" * 1_000_000 + b"."
    assert line(unpickle, many, "x").startswith("x is refused: far more containers than")
    doubled = b"\x80\x04}" + b"K\x01" + b"\x94h\x00\x86" * 40 + b"Ns."
    assert line(unpickle, doubled, "x") == "x has a dict key that is not text"


TEXTS = st.text(st.characters(), max_size=300)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**200), 2**200) | st.floats(allow_nan=False) | TEXTS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.lists(inner, max_size=5).map(tuple)
        | st.dictionaries(st.text(max_size=4), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=150, derandomize=True, deadline=None)
@given(PLAIN, st.sampled_from([2, 3, 4, 5]))
def test_plain_data_is_read_as_pickle_reads_it(value: Any, protocol: int) -> None:
    data = pickle.dumps(value, protocol)
    found = unpickle(data, "x")
    assert found == value
    assert repr(found) == repr(value)  # types, too: True is not 1


@settings(max_examples=300, derandomize=True, deadline=None)
@given(st.integers(0, 3000), st.binary(min_size=1, max_size=4), st.integers(0, 3000))
def test_a_damaged_pickle_is_data_or_one_line(at: int, patch: bytes, cut: int) -> None:
    whole = pickle.dumps(SNAPSHOT)
    at, cut = at % len(whole), cut % len(whole)
    data = whole[:at] + patch + whole[at + len(patch) :]
    for damaged in (data, data[:cut], whole[:cut]):
        message = "read"
        try:
            snapshot_from(unpickle(damaged, "x"), "x")
        except InputError as error:
            message = str(error)
        assert is_one_line(message)


def test_a_snapshot_is_read_at_a_few_megabytes_a_second() -> None:
    """Slow enough files would keep the reader busy: 100,000 events (about 5 MB) take seconds, not minutes."""
    event = SNAPSHOT["device_traces"][0][1]
    data = pickle.dumps(SNAPSHOT | {"device_traces": [[event | {"addr": A + n} for n in range(20_000)]]})
    begin = time.process_time()
    snapshot_from(unpickle(data, "x"), "x")
    assert time.process_time() - begin < 5


def test_the_float_of_a_pickle_is_big_endian() -> None:
    assert unpickle(b"\x80\x02G" + struct.pack(">d", 1.5) + b".", "x") == 1.5
