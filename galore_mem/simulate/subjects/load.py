"""A program of the user's own: `module:function`, which returns model, optimizer and batch, or is the program."""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
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
    """What `module:function` names. `told` is filled when it has been called: what is known of the models and
    optimizers that it returned, or that have run."""

    reference: str
    function: Callable[[], Any]
    told: dict[str, Any] = field(default_factory=dict)

    def call(self, *given: Any) -> Any:
        """What the function returns. Raises `InputError` for what is returned by mistake."""
        try:
            made = self.function(*given)
        except SystemExit as error:
            raise InputError(f"it ended the program: {last_line(error)}") from error
        if inspect.iscoroutine(made):
            made.close()
            raise InputError(
                "it is an async function, which nobody awaits; give one that is called (asyncio.run in it)"
            )
        return made

    def returned(self, model: Any, optimizer: Any) -> None:
        """Notes what is known of a model and its optimizer."""
        self.ran([model], [] if optimizer is None else [optimizer])

    def ran(self, models: Sequence[torch.nn.Module], optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Notes what is known of the models and optimizers of a program."""
        parameters = {id(p): p for model in models for p in model.parameters()}.values()
        modules = [module for model in models for module in model.modules()]
        kinds = sorted({type(one).__name__ for one in optimizers})
        packages = sorted({type(one).__module__.partition(".")[0] for one in optimizers})
        self.told = {
            "parameters": sum(p.numel() for p in parameters),
            "formats": sorted({str(p.dtype).removeprefix("torch.") for p in parameters}),
            "optimizer": ", ".join(kinds) or None,
            "package": ", ".join(packages) or None,
            "compiled": any(type(m).__name__ == "OptimizedModule" or m._compiled_call_impl for m in modules),
            "recurrent": sorted({type(m).__name__ for m in modules if isinstance(m, torch.nn.RNNBase)}),
        }

    def failed(self, error: Exception) -> InputError:
        """An exception of the function, or of a step with what it returned, in one line."""
        when = "failed in its training step" if self.told.get("optimizer") else "failed"
        return InputError(f"{self.reference} {when}: {last_line(error)}{line_of(error)}")


def is_reference(text: str) -> bool:
    """Is this `module:function`?"""
    return REFERENCE.match(text) is not None


def load(reference: str, device: str = "cuda") -> UserStep:
    """The function that `module:function` names; the module is looked for in the current directory first. `device` is
    the simulated one, for which a module may ask as it is imported. Raises `InputError`."""
    match = REFERENCE.match(reference)
    if match is None:
        raise InputError(f"cannot read {reference!r}; write module:function, for a function that returns {RETURNS}")
    name, attribute = match[1], match[2]
    if name.endswith(".py"):
        raise InputError(f"{reference} names a file; write {name[:-3]}:{attribute}")
    module = imported(name, card=device == "cuda")
    if not hasattr(module, attribute):
        raise unknown(f"function of {name}", attribute, [n for n, v in vars(module).items() if callable(v)])
    function = getattr(module, attribute)
    if not callable(function):
        raise InputError(
            f"{reference} is no function that returns {RETURNS}, but of the type {type(function).__name__}"
        )
    return UserStep(reference, function)


def imported(name: str, *, card: bool = True) -> Any:
    """The module of this name. Raises `InputError` where there is none, or its code fails."""
    from galore_mem.simulate.tracing.card import announced

    with working_directory_first(), announced() if card else nullcontext():
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
