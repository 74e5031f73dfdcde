"""`torch.cuda` of a card that is not there: what a program of one's own says to it, and is told by it.

Nothing reaches CUDA. Statistics of the allocator are those of the trace until now (reserved: as allocated); streams,
events and the generators of random numbers do nothing; emptying the cache is noted, for the allocator's model does it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from galore_mem.setup import Setup
from galore_mem.simulate.tracing.places import CARD, HOST, META, NO_CODE, Places
from galore_mem.simulate.tracing.tracer import Tracer
from galore_mem.units import GIB

# whose code would go on to call CUDA, if it were there; a program's own decides where to put its tensors
LIBRARIES = ("torch", "transformers", "bitsandbytes", "peft", "accelerate", "triton", "torchao")
MEMORY = 80 * GIB  # what a program is told that the card has
CAPABILITY = (8, 0)  # where none is said


@contextmanager
def simulated(setup: Setup, places: Places, tracer: Tracer) -> Iterator[None]:
    """While it lasts, a program's devices are those of the simulation, and `torch.cuda` answers for it."""
    context = torch.utils._device.DeviceContext
    moved = Moved(places, tracer)
    with ExitStack() as stack:
        for name, made in moved.methods().items():
            stack.enter_context(patch.object(Tensor, name, made))
        stack.enter_context(patch.object(nn.Parameter, "__new__", moved.parameter(nn.Parameter.__new__)))
        stack.enter_context(patch.object(context, "__init__", _on_meta(context.__init__, places)))
        stack.enter_context(patch.object(torch, "compile", _eager(torch.compile, places)))
        if "torch._dynamo" in sys.modules:  # what was compiled before
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        loader = torch.utils.data.DataLoader
        stack.enter_context(patch.object(loader, "__init__", _in_this_process(loader.__init__)))
        for name in ("tensor", "as_tensor", "asarray"):
            stack.enter_context(patch.object(torch, name, moved.maker(getattr(torch, name))))
        stack.enter_context(patch.object(torch._tensor_str, "_str", moved.shown(torch._tensor_str._str)))
        stack.enter_context(_defaults())
        if places.has_card:
            for owner, functions in _card(setup, tracer):
                for name, function in functions.items():
                    stack.enter_context(patch.object(owner, name, function, create=True))
        yield


@contextmanager
def announced() -> Iterator[None]:
    """A module that asks as it is imported is told that there is a card (`device = "cuda" if ...` outside of its
    functions)."""
    here = torch.cuda.is_available
    with patch.object(torch.cuda, "is_available", lambda: here() if _of_library() else True):
        yield


@contextmanager
def _defaults() -> Iterator[None]:
    """What a program sets for the process is as before afterwards."""
    dtype, device = torch.get_default_dtype(), getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        if getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None) is not device:
            torch.set_default_device(None if device is None else device.device)


def _on_meta(init: Callable[..., None], places: Places) -> Callable[..., None]:
    """Default devices, in which torch makes some tensors itself."""

    def inited(self: Any, device: Any) -> None:
        init(self, device)
        if self.device.type == ("cuda" if places.has_card else "cpu"):
            self.device = META

    return inited


def _eager(compiled: Callable[..., Any], places: Places) -> Callable[..., Any]:
    """Nothing is compiled."""

    def noted(*args: Any, **kwargs: Any) -> Any:
        places.compiled = True
        return compiled(*args, **{**kwargs, "disable": True})

    return noted


def _in_this_process(init: Callable[..., None]) -> Callable[..., None]:
    """Batches are loaded in the process that is traced."""

    def inited(self: Any, *args: Any, **kwargs: Any) -> None:
        alone = {"num_workers": 0, "pin_memory": False, "persistent_workers": False, "prefetch_factor": None}
        init(self, *args, **{**kwargs, **{name: value for name, value in alone.items() if name in kwargs}})

    return inited


class Moved:
    """Tensors' own methods that name or tell devices, and what makes tensors of a program's numbers."""

    def __init__(self, places: Places, tracer: Tracer) -> None:
        self._places, self._tracer = places, tracer
        self._to = Tensor.to
        self._format: Any = Tensor.__format__

    def methods(self) -> dict[str, Any]:
        places = self._places
        return {
            "device": property(places.named),
            "is_cuda": property(lambda t: places.has_card and places.named(t).type == "cuda"),
            "is_cpu": property(lambda t: places.named(t).type == "cpu"),
            "to": lambda t, *args, **kwargs: self.to(t, *args, **kwargs),
            "cuda": lambda t, *args, **kwargs: self.cuda(t, *args, **kwargs),
            "cpu": lambda t, memory_format=torch.preserve_format: self.to(t, HOST, memory_format=memory_format),
            "pin_memory": lambda t, device=None: t,
            "is_pinned": lambda t, device=None: False,
            "record_stream": lambda t, stream: None,
            "get_device": lambda t: 0 if t.is_cuda else -1,
            "new_tensor": lambda t, data, **kwargs: self.new_tensor(t, data, **kwargs),
            "numpy": self.numpy(Tensor.numpy),
            "tolist": self.listed(Tensor.tolist),
            "__format__": lambda t, spec: (
                format(t.item(), spec) if t.is_meta and not t.dim() else self._format(t, spec)
            ),
        }

    def cuda(self, t: Tensor, device: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        if not self._places.has_card:
            raise AssertionError("Torch not compiled with CUDA enabled")
        return self.to(t, CARD)

    def to(self, t: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        copy = kwargs.pop("copy", False)
        if args and type(args[0]) is int:  # which torch takes for a device that is there
            args = (CARD, *args[1:])
        if args and isinstance(args[0], Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        elif isinstance(kwargs.get("other"), Tensor):
            other = kwargs.pop("other")
            args = (other.device, other.dtype)
        device, dtype, _, fmt = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None and device.type == "cuda" and not self._places.has_card:
            raise AssertionError("Torch not compiled with CUDA enabled")
        if type(t).__torch_dispatch__ is not NO_CODE:
            device = None if device is None else META if device.type == "cuda" else device
            return self._moved(t, device, dtype, fmt, copy=copy)
        if device is None or not self._places.has_card:  # (in host memory is where all tensors are)
            return self._moved(t, None, dtype, fmt, copy=copy)
        to_host, there = device.type == "cpu", self._places.holds(t)
        if to_host == there:
            return self._moved(t, None, dtype, fmt, copy=copy)
        return self._moved(t, HOST if to_host else META, dtype, fmt, copy=True)

    def _moved(self, t: Tensor, device: Any, dtype: Any, fmt: Any, *, copy: bool) -> Tensor:
        more = {} if fmt is None else {"memory_format": fmt}
        if device is None:
            return self._to(t, dtype or t.dtype, copy=copy, **more)
        return self._to(t, device, dtype or t.dtype, copy=copy, **more)

    def maker(self, make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """A function that makes a tensor of what Python holds, on the device that is asked for."""

        def made(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
            kwargs.pop("pin_memory", None)
            grad = kwargs.pop("requires_grad", False)
            found = make(data, *args, **kwargs)
            if device is not None:
                found = self.to(found, device)
            return found.requires_grad_() if grad else found

        return made

    def new_tensor(self, t: Tensor, data: Any, *, dtype: Any = None, device: Any = None, **kwargs: Any) -> Tensor:
        return torch.tensor(data, dtype=dtype or t.dtype, device=device or t.device, **kwargs)

    def parameter(self, new: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Parameters have no values, whatever they are made of."""

        def made(cls: Any, data: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
            if data is not None and not data.is_meta and type(data) in (Tensor, nn.Parameter):
                with _disable_current_modes():
                    like = torch.empty_strided(data.shape, data.stride(), dtype=data.dtype, device=META)
                self._places.in_host = self._places.has_card
                self._places.keeps(like)
                self._tracer.replace(data, like)
                data = like
            return new(cls, data, *args, **kwargs)

        return made

    # -- values that leave torch ---------------------------------------------------------------------------

    def numpy(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def made(t: Tensor, **kwargs: Any) -> Any:
            return original(self._tracer.values(t) if t.is_meta else t, **kwargs)

        return made

    def listed(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def made(t: Tensor) -> Any:
            return original(self._tracer.values(t) if t.is_meta else t)

        return made

    def shown(self, original: Callable[..., str]) -> Callable[..., str]:
        def text(t: Tensor, **kwargs: Any) -> str:
            if t.is_meta and not t.dim():
                return f"tensor({t.item()})"
            with self._places.below():
                return original(t, **kwargs)

        return text


# -- torch.cuda ----------------------------------------------------------------------------------------


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


class Silent:
    """A stream or an event: it does nothing, and takes no time."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *args: Any) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Any) -> float:
        return 1.0

    record = synchronize = wait = wait_stream = wait_event = _nothing

    def record_event(self, event: Any = None) -> Any:
        return event or Silent()


def _card(setup: Setup, tracer: Tracer) -> Iterator[tuple[Any, Mapping[str, Any]]]:
    """What is replaced: where, and by its name."""
    capability = setup.compute_capability or CAPABILITY
    answers = Answers(tracer)
    here = torch.cuda.is_available
    about = SimpleNamespace(
        name="simulated", total_memory=MEMORY, major=capability[0], minor=capability[1], multi_processor_count=108
    )
    memory = answers.functions()
    for owner in (torch.cuda, torch.cuda.memory):
        yield owner, memory
    yield torch.cuda, {
        "_lazy_init": _nothing, "init": _nothing, "is_available": lambda: here() if _of_library() else True,
        "is_initialized": lambda: True, "is_bf16_supported": lambda *a, **k: capability >= (8, 0),
        "device_count": lambda: 1, "current_device": lambda: 0, "set_device": _nothing, "synchronize": _nothing,
        "get_device_name": lambda *a: "simulated", "get_device_capability": lambda *a: capability,
        "get_device_properties": lambda *a: about, "ipc_collect": _nothing,
        "manual_seed": _nothing, "manual_seed_all": _nothing, "seed": _nothing, "seed_all": _nothing,
        "initial_seed": lambda: 0, "set_rng_state": _nothing, "set_rng_state_all": _nothing,
        "get_rng_state": lambda *a: torch.default_generator.get_state(),
        "get_rng_state_all": lambda: [torch.default_generator.get_state()],
        "Event": Silent, "Stream": Silent, "stream": lambda s: nullcontext(), "set_stream": _nothing,
        "current_stream": Silent, "default_stream": Silent, "device": lambda d: nullcontext(),
    }  # fmt: skip
    yield torch._C, {  # what the functions above, imported by their names, go on to call
        "_cuda_synchronize": _nothing, "_cuda_setDevice": _nothing, "_cuda_getDevice": lambda: 0,
    }  # fmt: skip
    yield torch.cuda.random, {"manual_seed_all": _nothing, "manual_seed": _nothing}
    yield torch.cuda.amp.common, {"amp_definitely_not_available": lambda: False}
    ranges = dict.fromkeys(("rangePushA", "rangePop", "rangeStartA", "rangeEnd", "markA"), lambda *a: 0)
    yield torch.cuda.nvtx, {"_nvtx": SimpleNamespace(**ranges)}
    yield torch.cuda.profiler, {"start": _nothing, "stop": _nothing}


def _of_library() -> bool:
    """Is it a library that asks whether there is a card?"""
    return str(sys._getframe(2).f_globals.get("__name__", "")).partition(".")[0] in LIBRARIES


class Answers:
    """Of the allocator's statistics."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer
        self._since = 0

    def functions(self) -> dict[str, Callable[..., Any]]:
        now, most = lambda *a, **k: self.now(), lambda *a, **k: self.most()
        return {
            "memory_allocated": now, "memory_reserved": now, "memory_cached": now,
            "max_memory_allocated": most, "max_memory_reserved": most, "max_memory_cached": most,
            "reset_peak_memory_stats": self.reset, "reset_max_memory_allocated": self.reset,
            "reset_max_memory_cached": self.reset, "reset_accumulated_memory_stats": _nothing,
            "memory_stats": self.stats, "memory_summary": lambda *a, **k: "",
            "mem_get_info": lambda *a: (max(MEMORY - self.now(), 0), MEMORY),
            "empty_cache": self.empty, "set_per_process_memory_fraction": _nothing,
            "_record_memory_history": _nothing, "_dump_snapshot": _nothing, "memory_snapshot": lambda *a, **k: [],
        }  # fmt: skip

    def now(self) -> int:
        return self._levels()[-1]

    def most(self) -> int:
        return max(self._levels()[self._since :])

    def _levels(self) -> list[int]:
        """Bytes after each event, in the allocator's blocks, and before the first."""
        trace, levels = self._tracer.trace, [0]
        for event in trace.events:
            size = trace.nbytes(max(event, ~event))
            levels.append(levels[-1] + (size if event >= 0 else -size))
        return levels

    def reset(self, *args: Any) -> None:
        self._since = len(self._tracer.trace.events)

    def empty(self) -> None:
        self._tracer.trace.emptied.append(len(self._tracer.trace.events))

    def stats(self, *args: Any) -> dict[str, int]:
        now, most = self.now(), self.most()
        kinds = ("allocated_bytes", "reserved_bytes", "active_bytes", "requested_bytes")
        return {f"{kind}.all.{what}": n for kind in kinds for what, n in (("current", now), ("peak", most))}
