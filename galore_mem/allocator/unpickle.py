"""Read a pickle that holds data and nothing else.

A memory snapshot is a pickle, and a pickle is a program that may import and call anything. This reader knows only the
instructions that make dict (with str keys), list, tuple, str, int, float, bool and None, so a foreign file cannot run
code, take memory out of proportion to its length, or keep the reader busy. Instructions: Lib/pickletools.py, 3.11.
"""

from __future__ import annotations

from struct import unpack_from
from typing import Any

from galore_mem.errors import InputError

# one container costs some 60 bytes of memory; real snapshots have one for each 20 bytes and more
_BYTES_PER_CONTAINER = 8
_SOME_CONTAINERS = 4096

(
    _PROTO, _FRAME, _STOP, _MARK, _MEMOIZE, _BINPUT, _LONG_BINPUT, _BINGET, _LONG_BINGET,
    _SHORT_BINUNICODE, _BINUNICODE, _BINUNICODE8, _BININT, _BININT1, _BININT2, _LONG1, _BINFLOAT,
    _NONE, _NEWTRUE, _NEWFALSE, _EMPTY_DICT, _SETITEM, _SETITEMS, _EMPTY_LIST, _APPEND, _APPENDS,
    _EMPTY_TUPLE, _TUPLE, _TUPLE1, _TUPLE2, _TUPLE3,
) = b"\x80\x95.(\x94qrhj\x8cX\x8dJKM\x8aGN\x88\x89}su]ae)t\x85\x86\x87"  # fmt: skip

_CONSTANTS = {_NONE: None, _NEWTRUE: True, _NEWFALSE: False}
_TUPLES = {_EMPTY_TUPLE: 0, _TUPLE1: 1, _TUPLE2: 2, _TUPLE3: 3}
_MAX_PROTOCOL = 5


def unpickle(data: bytes, source: str) -> Any:
    """The object in a pickle. Raises `InputError` naming `source`: truncated, broken, or anything but plain data."""
    try:
        return _run(data, source)
    except (IndexError, KeyError):
        raise InputError(f"{source} is a truncated or broken pickle") from None
    except UnicodeDecodeError:
        raise InputError(f"{source} is a broken pickle: text that is not UTF-8") from None


def _set_items(target: Any, items: list[Any], source: str) -> None:
    if type(target) is not dict or len(items) % 2:
        raise InputError(f"{source} is a broken pickle: items for what is no dict")
    keys = items[::2]
    if set(map(type, keys)) - {str}:
        raise InputError(f"{source} has a dict key that is not text")
    target.update(zip(keys, items[1::2]))  # noqa: B905 -- of one length, checked above


def _append(target: Any, items: list[Any], source: str) -> None:
    if type(target) is not list:
        raise InputError(f"{source} is a broken pickle: elements for what is no list")
    target.extend(items)


def _run(data: bytes, source: str) -> Any:
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    room = _SOME_CONTAINERS + len(data) // _BYTES_PER_CONTAINER
    i = 0
    while True:
        op = data[i]  # past the end: IndexError, truncated
        i += 1
        if op == _BINGET:
            stack.append(memo[data[i]])
            i += 1
        elif op == _MEMOIZE:
            memo[len(memo)] = stack[-1]
        elif op == _SHORT_BINUNICODE:
            end = i + 1 + data[i]
            stack.append(data[i + 1 : end].decode("utf-8", "surrogatepass"))
            i = end
        elif op == _LONG_BINGET:
            stack.append(memo[int.from_bytes(data[i : i + 4], "little")])
            i += 4
        elif op == _BININT1:
            stack.append(data[i])
            i += 1
        elif op == _MARK:
            marks.append(len(stack))
        elif op in (_EMPTY_DICT, _EMPTY_LIST):
            stack.append({} if op == _EMPTY_DICT else [])
            room -= 1
        elif op == _SETITEMS:
            mark = marks.pop()
            _set_items(stack[mark - 1] if mark else None, stack[mark:], source)
            del stack[mark:]
        elif op == _LONG1:
            end = i + 1 + data[i]
            stack.append(int.from_bytes(data[i + 1 : end], "little", signed=True))
            i = end
        elif op == _BININT:
            stack.append(int.from_bytes(data[i : i + 4], "little", signed=True))
            i += 4
        elif op == _BININT2:
            stack.append(int.from_bytes(data[i : i + 2], "little"))
            i += 2
        elif op == _APPENDS:
            mark = marks.pop()
            _append(stack[mark - 1] if mark else None, stack[mark:], source)
            del stack[mark:]
        elif op in _CONSTANTS:
            stack.append(_CONSTANTS[op])
        elif op in _TUPLES or op == _TUPLE:
            start = marks.pop() if op == _TUPLE else len(stack) - _TUPLES[op]
            if start < 0:
                raise IndexError
            made = tuple(stack[start:])
            del stack[start:]
            stack.append(made)
            room -= 1
        elif op == _SETITEM:
            items = [stack.pop(), stack.pop()]
            _set_items(stack[-1], items[::-1], source)
        elif op == _APPEND:
            item = stack.pop()
            _append(stack[-1], [item], source)
        elif op in (_BINUNICODE, _BINUNICODE8):
            width = 4 if op == _BINUNICODE else 8
            end = i + width + int.from_bytes(data[i : i + width], "little")
            stack.append(data[i + width : end].decode("utf-8", "surrogatepass"))
            i = end
        elif op == _BINFLOAT:
            if i + 8 > len(data):
                raise IndexError
            stack.append(unpack_from(">d", data, i)[0])
            i += 8
        elif op == _BINPUT:
            memo[data[i]] = stack[-1]
            i += 1
        elif op == _LONG_BINPUT:
            memo[int.from_bytes(data[i : i + 4], "little")] = stack[-1]
            i += 4
        elif op == _FRAME:
            i += 8
        elif op == _PROTO:
            if data[i] > _MAX_PROTOCOL:
                raise InputError(f"{source} is a pickle of protocol {data[i]}; at most {_MAX_PROTOCOL} is known")
            i += 1
        elif op == _STOP:
            break
        else:
            raise InputError(
                f"{source} is refused: instruction {op:#04x} at byte {i - 1} makes something other than plain data"
                " (dict, list, tuple, str, int, float, bool, None)"
            )
        if room < 0:
            raise InputError(f"{source} is refused: far more containers than a snapshot of its length has")
    if len(stack) != 1 or marks or i != len(data):
        raise InputError(f"{source} is a broken pickle: it does not end with one object")
    return stack[0]
