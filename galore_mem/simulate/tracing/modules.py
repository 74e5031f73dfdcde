"""Where in the model the program is: the path of the module whose forward runs, or has run for a backward function."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch


class Modules:
    """Follows calls of modules. `on_root` is told each outermost module as it is called."""

    def __init__(self, on_root: Callable[[torch.nn.Module], None]) -> None:
        self._on_root = on_root
        self._names: dict[int, str] = {}
        self._stack = [""]
        # autograd numbers its nodes as they are made: those from `_starts[i]` on belong to `_paths[i]`
        self._starts: list[int] = [0]
        self._paths: list[str] = [""]

    @property
    def path(self) -> str:
        """Of the module that runs now."""
        return self._stack[-1]

    def path_of(self, node: Any) -> str:
        """Of the module that ran when this node of the graph was made."""
        return self._paths[bisect_right(self._starts, node._sequence_nr()) - 1]

    @contextmanager
    def followed(self) -> Iterator[None]:
        original = torch.nn.Module.__call__

        def call(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            if len(self._stack) == 1 and torch._C._current_graph_task_id() == -1:
                self._names.update({id(m): path for path, m in module.named_modules()})
                self._on_root(module)
            self._enter(self._names.get(id(module)) or type(module).__name__)
            try:
                return original(module, *args, **kwargs)
            finally:
                self._stack.pop()
                self._note()

        with patch.object(torch.nn.Module, "__call__", call):
            yield

    def _enter(self, path: str) -> None:
        self._stack.append(path)
        self._note()

    def _note(self) -> None:
        self._starts.append(torch._C._autograd._get_sequence_nr())
        self._paths.append(self._stack[-1])
