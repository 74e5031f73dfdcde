"""What torch's Python code asks about the device, answered for the simulated one while a program is traced."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from galore_mem.setup import Setup
from galore_mem.simulate.tracing import autocasting

OPTIMIZERS = sys.modules[torch.optim.Optimizer.__module__]  # torch.optim hides its submodule's name


@contextmanager
def patched(setup: Setup, follow: Callable[[Tensor, str], None]) -> Iterator[None]:
    """`follow` is told tensors that torch makes without an operation."""
    with ExitStack() as stack:
        clipping = torch.utils._foreach_utils  # (on the CPU too)
        stack.enter_context(patch.object(clipping, "_device_has_foreach_support", lambda device: True))
        for name in ("_get_foreach_kernels_supported_devices", "_get_fused_kernels_supported_devices"):
            stack.enter_context(patch.object(OPTIMIZERS, name, _with_meta(name, setup.device)))
        for name in ("is_autocast_enabled", "get_autocast_dtype"):
            stack.enter_context(patch.object(torch, name, _as_on_cpu(getattr(torch, name), setup.device)))
        region = torch.amp.autocast_mode.autocast
        stack.enter_context(patch.object(region, "__init__", _region_on_cpu(region.__init__)))
        stack.enter_context(patch.object(torch, "clear_autocast_cache", _and_ours(torch.clear_autocast_cache)))
        generic = sys.modules.get("transformers.utils.generic")
        if generic is not None:  # its maybe_autocast takes `meta` for a device without autocast
            stack.enter_context(patch.object(generic, "nullcontext", _no_autocast))
        stack.enter_context(patch.object(torch, "Generator", _on_host(torch.Generator)))
        for owner, name in ((torch, "tensor"), (torch, "as_tensor"), (torch, "asarray"), (Tensor, "new_tensor")):
            stack.enter_context(patch.object(owner, name, _followed(getattr(owner, name), follow)))
        stack.enter_context(patch.object(Tensor, f"is_{setup.device}", property(lambda t: t.is_meta)))
        if setup.device == "cpu":
            stack.enter_context(patch.object(torch, "get_rng_state", _followed(torch.get_rng_state, follow)))
            stack.enter_context(patch.object(torch.random, "fork_rng", _forked(torch.random.fork_rng)))
        yield


def _with_meta(name: str, device: str) -> Callable[[], list[str]]:
    """A list of torch's devices with kernels of a kind; `meta` is among them where the simulated one is."""
    original: Callable[[], list[str]] = getattr(OPTIMIZERS, name)

    def devices() -> list[str]:
        found = original()
        return [*found, "meta"] if device in found else found

    return devices


def _followed(make: Callable[..., Tensor], follow: Callable[[Tensor, str], None]) -> Callable[..., Tensor]:
    def made(*args: Any, **kwargs: Any) -> Tensor:
        t = make(*args, **kwargs)
        follow(t, make.__name__)
        return t

    return made


def _forked(fork: Callable[..., Any]) -> Callable[..., Any]:
    """A checkpoint on `meta` does not keep the generator's state while it runs again; one on the CPU does."""

    def forked(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("device_type") == "meta":
            kwargs["device_type"] = "cuda"  # what a checkpoint says on the CPU, with no devices
        return fork(*args, **kwargs)

    return forked


def _as_on_cpu(ask: Callable[..., Any], device: str) -> Callable[..., Any]:
    """What torch knows of the CPU's autocast, asked of `meta` or of the simulated device. (peft asks without one, which
    means CUDA: on the CPU the answer is no, whatever region the program is in.)"""

    def asked(device_type: str = "cuda") -> Any:
        return ask("cpu" if device_type in ("meta", device) else device_type)

    return asked


def _region_on_cpu(init: Callable[..., None]) -> Callable[..., None]:
    """Autocast regions of the simulated device are the CPU's, which `autocasting` reads."""

    def inited(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        init(self, "cpu" if device_type in ("meta", "cuda") else device_type, *args, **kwargs)

    return inited


def _and_ours(clear: Callable[[], None]) -> Callable[[], None]:
    def cleared() -> None:
        clear()
        autocasting.forget()

    return cleared


def _no_autocast() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", enabled=False) if autocasting.enabled() else nullcontext()


def _on_host(original: Any) -> type:
    """A class in the place of `torch.Generator`, for there is none on `meta`; the tracer takes it out of operations
    there. Its instances are the original's."""

    class Generator(original):  # type: ignore[misc]  # a class that is given
        def __new__(cls, device: Any = "cpu") -> Any:
            return original("cpu" if torch.device(device).type in ("meta", "cuda") else device)

    return Generator
