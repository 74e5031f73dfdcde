"""galore-mem: how much memory a training run needs, with which method, at which moment, and why."""

from __future__ import annotations

from galore_mem._version import __version__

__all__ = ["__version__"]
