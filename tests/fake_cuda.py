"""A CUDA device for a machine without one: tensors that are asked for on `cuda` live on the CPU, say that they are on
`cuda:0`, and are counted as torch's caching allocator counts them.

What it is: every storage that an operation returns, from its birth to its death, in blocks of 512 bytes; segments of
2 MiB; one cuBLAS workspace for each thread (forward, autograd) that has multiplied matrices; an end of the memory. What
it is not: CUDA's kernels. What they need inside (SVD drivers, sorting, reductions), and which attention kernel runs, is
not seen here; and blocks have no addresses, so nothing is fragmented.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
MIB = 2**20
BLOCK, SEGMENT = 512, 2 * MIB
WORKSPACE = 8_519_680  # CublasHandlePool.cpp: 2 x 4096 + 8 x 16 KiB
PRODUCTS = {"mm", "bmm", "addmm", "addmm_", "baddbmm", "addmv"}


class FakeCuda:
    """The device, its allocator's counters, and the functions of torch that tell of them.

    `context`: bytes that a process takes before its first tensor; `others`: what other processes hold.
    """

    def __init__(self, capacity: int = 8 * 2**30, context: int = 450 * MIB, others: int = 1000 * MIB) -> None:
        self.capacity, self.context, self.others = capacity, context, others
        self.allocated = self.requested = self.reserved = 0
        self.peaks = {"allocated_bytes": 0, "reserved_bytes": 0, "requested_bytes": 0}
        self.workspaces: dict[str, int] = {}
        self.events: list[dict[str, Any]] | None = None  # None: no history is recorded
        self.metadata = ""
        self.calls: list[str] = []
        self._on: dict[int, int] = {}  # storages on the device, and their bytes
        self._modes = ExitStack()

    # -- memory --------------------------------------------------------------------------------------------

    def holds(self, t: Tensor) -> bool:
        """Is it on the device? (A tensor that stands for others is where they are.)"""
        if hasattr(t, "__tensor_flatten__"):
            return any(self.holds(getattr(t, name)) for name in t.__tensor_flatten__()[0])
        return t.untyped_storage()._cdata in self._on

    def take(self, nbytes: int) -> None:
        """A block. Raises `torch.OutOfMemoryError` as CUDA's allocator does."""
        block = -(-nbytes // BLOCK) * BLOCK
        needed = -(-(self.allocated + block) // SEGMENT) * SEGMENT
        if needed > self.capacity - self.context - self.others:
            self._happened("oom", nbytes)
            raise torch.OutOfMemoryError(self._message(nbytes))
        self.allocated += block
        self.requested += nbytes
        self.reserved = max(self.reserved, needed)
        self._happened("alloc", nbytes)
        self._raise_peaks()

    def give(self, nbytes: int) -> None:
        self.allocated -= -(-nbytes // BLOCK) * BLOCK
        self.requested -= nbytes
        self._happened("free_completed", nbytes)

    def born(self, t: Tensor) -> None:
        """A tensor has been made on the device."""
        kept = t.untyped_storage()
        if kept.nbytes() and kept._cdata not in self._on:
            self.take(kept.nbytes())
            self._on[kept._cdata] = kept.nbytes()
            weakref.finalize(kept, self._died, kept._cdata)

    def multiplied(self) -> None:
        thread = "autograd" if torch._C._current_graph_task_id() != -1 else "forward"
        if thread not in self.workspaces:
            self.take(WORKSPACE)
            self.workspaces[thread] = WORKSPACE

    def _died(self, key: int) -> None:
        self.give(self._on.pop(key))

    def _raise_peaks(self) -> None:
        now = {"allocated_bytes": self.allocated, "reserved_bytes": self.reserved, "requested_bytes": self.requested}
        self.peaks = {name: max(most, now[name]) for name, most in self.peaks.items()}

    def _happened(self, action: str, size: int) -> None:
        if self.events is not None:
            self.events.append({"action": action, "size": size, "frames": [], "user_metadata": self.metadata})

    def _message(self, nbytes: int) -> str:
        """The allocator's, with its advice (CUDACachingAllocator.cpp)."""
        free = self.get_memory_info()[0]
        return (
            f"CUDA out of memory. Tried to allocate {nbytes / MIB:.2f} MiB. GPU 0 has a total capacity of "
            f"{self.capacity / MIB:.2f} MiB of which {free / MIB:.2f} MiB is free. Including non-PyTorch memory, this "
            f"process has {(self.context + self.reserved) / MIB:.2f} MiB memory in use. Of the allocated memory "
            f"{self.allocated / MIB:.2f} MiB is allocated by PyTorch, and "
            f"{(self.reserved - self.allocated) / MIB:.2f} MiB is reserved by PyTorch but unallocated. If reserved but "
            "unallocated memory is large try setting PYTORCH_ALLOC_CONF=expandable_segments:True to avoid "
            "fragmentation.  See documentation for Memory Management  (https://pytorch.org/docs/stable/notes/cuda.html)"
        )

    # -- what torch.accelerator, torch.cuda and torch._C have ----------------------------------------------

    def synchronize(self, device: Any = None) -> None:
        self.calls.append("synchronize")

    def empty_cache(self) -> None:
        self.reserved = -(-self.allocated // SEGMENT) * SEGMENT

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        """Peaks start again at what is there now."""
        self.peaks = dict.fromkeys(self.peaks, 0)
        self._raise_peaks()

    def memory_allocated(self, device: Any = None) -> int:
        return self.allocated

    def memory_stats(self, device: Any = None) -> dict[str, int]:
        return {f"{name}.all.peak": most for name, most in self.peaks.items()}

    def get_memory_info(self, device: Any = None) -> tuple[int, int]:
        """(free, total) of the device, whoever holds the rest."""
        return self.capacity - self.context - self.others - self.reserved, self.capacity

    def clear_workspaces(self) -> None:
        for size in self.workspaces.values():
            self.give(size)
        self.workspaces.clear()

    def record_history(self, enabled: str | None = "all", *, clear_history: bool = False, **how: Any) -> None:
        self.calls.append(f"history {enabled} {sorted(how.items())}")
        if enabled is not None and (self.events is None or clear_history):
            self.events = []

    def snapshot(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {"segments": [], "device_traces": [list(self.events or ())]}

    def set_metadata(self, metadata: str) -> None:
        self.metadata = metadata

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Puts it in the place of the real functions."""
        for name in (
            "synchronize", "empty_cache", "reset_peak_memory_stats", "memory_allocated", "memory_stats",
            "get_memory_info",
        ):  # fmt: skip
            patch.setattr(torch.accelerator, name, getattr(self, name))
        for module, name, value in (
            (torch.cuda, "is_available", lambda: True),
            (torch.cuda, "synchronize", self.synchronize),
            (torch.cuda, "get_device_name", lambda device=None: "Fake GPU"),
            (torch.cuda, "get_device_capability", lambda device=None: (8, 9)),
            (torch.cuda, "get_allocator_backend", lambda: "native"),
            (torch.cuda.memory, "_record_memory_history", self.record_history),
            (torch.cuda.memory, "_snapshot", self.snapshot),
            (torch.cuda.memory, "_set_memory_metadata", self.set_metadata),
            (torch, "Generator", Generator),
        ):
            patch.setattr(module, name, value)
        patch.setattr(torch._C, "_cuda_clearCublasWorkspaces", self.clear_workspaces, raising=False)

    # -- tensors that say they are there -------------------------------------------------------------------

    def __enter__(self) -> FakeCuda:
        placing = Placing(self)
        self._modes.enter_context(placing)
        self._modes.enter_context(Counting(self, placing))
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self._modes.close()


class Placing(TorchFunctionMode):
    """Calls that name a device: `cuda` becomes `cpu`, and `asked` says for the call what was meant."""

    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__()
        self.cuda = cuda
        self.asked: torch.device | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__":
            return self._read(getattr(func, "__self__", None), func, args)
        if name == "backward":  # inside `Tensor.backward` the mode is off, and nodes name devices
            with self:
                return backward(args[0])
        if name == "cpu":
            func, name, args = Tensor.to, "to", (*args, CPU)
        elif name in ("to", "type_as") and isinstance(args[-1], Tensor) and len(args) == 2:  # as another tensor
            func, name, args = Tensor.to, "to", (args[0], self.place(args[1]), args[1].dtype)
        named = next(filter(None, map(meant, [*args, *kwargs.values()])), None)
        if named is None or func is torch.device or name == "_parse_to":
            return func(*args, **kwargs)
        if name == "to" and self.place(args[0]).type != named.type:
            kwargs = {**kwargs, "copy": True}
        before, self.asked = self.asked, named
        try:
            return func(
                *(CPU if meant(a) else a for a in args), **{k: CPU if meant(a) else a for k, a in kwargs.items()}
            )
        finally:
            self.asked = before

    def place(self, t: Tensor) -> torch.device:
        return CUDA if self.cuda.holds(t) else CPU

    def _read(self, attribute: Any, func: Any, args: Any) -> Any:
        if attribute is Tensor.device and self.cuda.holds(args[0]):
            return CUDA
        if attribute is Tensor.is_cuda:
            return self.cuda.holds(args[0])
        return func(*args)


def backward(loss: Tensor) -> None:
    """What `torch.autograd.backward` does."""
    start = (torch.ones_like(loss),)
    _engine_run_backward((loss,), start, False, False, (), allow_unreachable=True, accumulate_grad=True)


class Generator(torch.Generator):
    """The CPU's, wherever its numbers are wanted."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        return super().__new__(cls, CPU)


def meant(value: Any) -> torch.device | None:
    """The device that an argument names."""
    if isinstance(value, str) and value.split(":")[0] in ("cuda", "cpu"):
        return torch.device(value)
    return value if isinstance(value, torch.device) and value.type in ("cuda", "cpu") else None


class Counting(TorchDispatchMode):
    """Operations: what they return is where they were asked to put it, or where a tensor they read is."""

    def __init__(self, cuda: FakeCuda, placing: Placing) -> None:
        super().__init__()
        self.cuda, self.placing = cuda, placing

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind.__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl for kind in types):
            return NotImplemented  # a tensor that stands for others: its own operations follow
        given = list(plain(args, kwargs))
        there = any(self.cuda.holds(t) for t in given)
        if there and func.overloadpacket.__name__ in PRODUCTS:
            self.cuda.multiplied()
        made = func(*args, **(kwargs or {}))
        asked = self.placing.asked
        if there if asked is None else asked.type == "cuda":
            # `torch.tensor` makes its storage before any operation is seen
            known = set() if func is torch.ops.aten.lift_fresh.default else {t.untyped_storage()._cdata for t in given}
            for t in plain(made):
                if t.untyped_storage()._cdata not in known:
                    self.cuda.born(t)
        return made


def plain(*values: Any) -> Iterator[Tensor]:
    return (t for t in tree_leaves(values) if isinstance(t, Tensor))
