"""galore-mem: how much memory a training run needs, with which method, at which moment, and why.

The services behind the commands, importable from here; each module is loaded when it is first used.

    >>> import galore_mem
    >>> result = galore_mem.estimate("llama-7b", ["galore"], rank=1024)
    >>> result.estimates[0].peak_allocated_bytes  # bytes
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from galore_mem._version import __version__

if TYPE_CHECKING:
    from galore_mem.errors import InputError
    from galore_mem.estimator import estimate
    from galore_mem.result import EstimateResult
    from galore_mem.setup import Setup
    from galore_mem.spec.model import Block, ModelSpec, ParamSpec, Role
    from galore_mem.spec.resolve import resolve

_HOMES = {
    "Block": ("galore_mem.spec.model", "Block"),
    "EstimateResult": ("galore_mem.result", "EstimateResult"),
    "InputError": ("galore_mem.errors", "InputError"),
    "ModelSpec": ("galore_mem.spec.model", "ModelSpec"),
    "ParamSpec": ("galore_mem.spec.model", "ParamSpec"),
    "Role": ("galore_mem.spec.model", "Role"),
    "Setup": ("galore_mem.setup", "Setup"),
    "estimate": ("galore_mem.estimator", "estimate"),
    "resolve": ("galore_mem.spec.resolve", "resolve"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'galore_mem' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    value = getattr(import_module(module), attribute)
    globals()[name] = value  # from now on without this function, and before a submodule of the same name
    return value


__all__ = [
    "Block",
    "EstimateResult",
    "InputError",
    "ModelSpec",
    "ParamSpec",
    "Role",
    "Setup",
    "__version__",
    "estimate",
    "resolve",
]
