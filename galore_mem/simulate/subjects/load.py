"""A training step of the user's own: `module:function`, which returns a model, its optimizer and a batch."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from galore_mem.errors import InputError, unknown
from galore_mem.simulate.quiet import last_line

REFERENCE = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):([A-Za-z_]\w*)\Z", re.ASCII)
RETURNS = "(model, optimizer, batch)"


@dataclass
class UserStep:
    """What `module:function` names. `told` is filled when the function has been called: what is known of what it
    returned."""

    reference: str
    function: Callable[[], Any]
    told: dict[str, Any] = field(default_factory=dict)

    def build(self) -> Any:
        """What the function returns. Raises `InputError` where its parameters could not be followed."""
        try:
            made = self.function()
        except SystemExit as error:
            raise InputError(f"it ended the program: {last_line(error)}") from error
        if not isinstance(made, tuple) or len(made) < 3:
            return made  # which is refused
        model, optimizer, batch, *more = made
        if isinstance(model, torch.nn.Module) and isinstance(optimizer, torch.optim.Optimizer):
            self._note(model, optimizer)
        return model, optimizer, without_values(batch) if callable(batch) else batch, *more

    def _note(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        parameters = list(model.parameters())
        elsewhere = sorted({p.device.type for p in parameters} - {"meta"})
        if elsewhere:
            raise InputError(
                f"its model is on {', '.join(elsewhere)}; name no device there: tensors are made where the simulation "
                "wants them"
            )
        self.told = {
            "parameters": sum(p.numel() for p in parameters),
            "formats": sorted({str(p.dtype).removeprefix("torch.") for p in parameters}),
            "optimizer": type(optimizer).__name__,
            "package": type(optimizer).__module__.partition(".")[0],
        }

    def failed(self, error: Exception) -> InputError:
        """An exception of the function, or of a step with what it returned, in one line."""
        when = "failed in its training step" if self.told else "failed"
        return InputError(f"{self.reference} {when}: {last_line(error)}{line_of(error)}")


def without_values(make: Callable[[], Any]) -> Callable[[], Any]:
    """A function that makes batches, called where tensors have no values."""

    def made() -> Any:
        with torch.device("meta"):
            return make()

    return made


def is_reference(text: str) -> bool:
    """Is this `module:function`?"""
    return REFERENCE.match(text) is not None


def load(reference: str) -> UserStep:
    """The function that `module:function` names; the module is looked for in the current directory first. Raises
    `InputError`."""
    match = REFERENCE.match(reference)
    if match is None:
        raise InputError(f"cannot read {reference!r}; write module:function, for a function that returns {RETURNS}")
    name, attribute = match[1], match[2]
    if name.endswith(".py"):
        raise InputError(f"{reference} names a file; write {name[:-3]}:{attribute}")
    module = imported(name)
    if not hasattr(module, attribute):
        raise unknown(f"function of {name}", attribute, [n for n, v in vars(module).items() if callable(v)])
    function = getattr(module, attribute)
    if not callable(function):
        raise InputError(
            f"{reference} is no function that returns {RETURNS}, but of the type {type(function).__name__}"
        )
    return UserStep(reference, function)


def imported(name: str) -> Any:
    """The module of this name. Raises `InputError` where there is none, or its code fails."""
    with working_directory_first():
        try:
            return import_module(name)
        except ModuleNotFoundError as error:
            if error.name is not None and (name + ".").startswith(error.name + "."):
                raise InputError(
                    f"there is no module {error.name!r} in {os.getcwd()}, or among what is installed; --model takes "
                    "module:function for a file module.py here"
                ) from error
            raise InputError(f"importing {name} failed: {last_line(error)}{line_of(error)}") from error
        except (Exception, SystemExit) as error:
            raise InputError(f"importing {name} failed: {last_line(error)}{line_of(error)}") from error


@contextmanager
def working_directory_first() -> Iterator[None]:
    """Modules are looked for where the user is, before what is installed."""
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        yield
    finally:
        if here in sys.path:
            sys.path.remove(here)


def line_of(error: BaseException) -> str:
    """Where in the user's own files an exception came from: the innermost line in the current directory."""
    found, at = "", error.__traceback__
    while at is not None:
        path = Path(at.tb_frame.f_code.co_filename)
        if path.is_relative_to(os.getcwd()):
            found = f" ({path.relative_to(os.getcwd())}, line {at.tb_lineno})"
        at = at.tb_next
    return found
