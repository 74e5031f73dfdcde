"""Programs that ask for what a simulation has not, values or a card: said in one line, with the place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NamedTuple

import torch

from galore_mem.errors import InputError
from galore_mem.simulate.tracing.places import Mixed

# how torch says that a tensor on `meta` has no values, and that there is no card
VALUES = ("meta tensor", "Meta tensor", "meta device", "data-independent implementation", "passed to Tensor.__format__")
CARD = ("not compiled with CUDA", "no NVIDIA driver", "No CUDA GPUs")
LIBRARIES = ("torch", "galore_mem")


class Place(NamedTuple):
    """A line of the program that runs, and the names that it sees."""

    frame: FrameType
    line: int

    @property
    def library(self) -> bool:
        """Is it not the program's own?"""
        return str(self.frame.f_globals.get("__name__", "")).partition(".")[0] in LIBRARIES


@contextmanager
def refused(path_of: Callable[[torch.nn.Module], str]) -> Iterator[None]:
    """Raises `InputError` where what runs inside asks for values, or for a card. `path_of` names a module."""
    try:
        yield
    except InputError:
        raise
    except Mixed as error:
        raise InputError(
            f"an operation finds tensors on the card and in host memory, as it would with a real one: {error}"
            f"{_line(list(_places(error.__traceback__)))}; move them to one device"
        ) from error
    except (NotImplementedError, RuntimeError, TypeError, AssertionError) as error:
        said = str(error)
        places = list(_places(error.__traceback__))
        if any(sign in said for sign in CARD):
            raise InputError(
                f"the program asks for a CUDA device{_line(places)}, and there is none; with --device cpu, ask "
                f"torch.cuda.is_available() before"
            ) from error
        if any(sign in said for sign in VALUES):
            raise InputError(
                f"the program asks for values, by {_operation(places, said)}{_module(places, path_of)}{_line(places)}; "
                f"a simulation has none: it needs a model whose sizes do not depend on them"
            ) from error
        raise


def _places(at: TracebackType | None) -> Iterator[Place]:
    """From the outermost to where the error was raised."""
    while at is not None:
        yield Place(at.tb_frame, at.tb_lineno)
        at = at.tb_next


def _operation(places: Sequence[Place], said: str) -> str:
    for place in reversed(places):
        op: Any = place.frame.f_locals.get("func")
        if place.frame.f_code.co_name == "__torch_dispatch__" and isinstance(op, torch._ops.OpOverload):
            return str(op)
    return "a conversion to numpy" if "numpy" in said else "the printing of a tensor" if "format" in said else said


def _module(places: Sequence[Place], path_of: Callable[[torch.nn.Module], str]) -> str:
    for place in reversed(places):
        owner = place.frame.f_locals.get("self")
        if isinstance(owner, torch.nn.Module):
            return f" in {path_of(owner) or type(owner).__name__}"
    return ""


def _line(places: Sequence[Place]) -> str:
    for place in reversed(places):
        if not place.library:
            return f" ({Path(place.frame.f_code.co_filename).name}, line {place.line})"
    return ""
