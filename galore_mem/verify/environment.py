"""Where a case ran: machine, device, versions, and the settings that decide what an allocator does."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from galore_mem.errors import InputError
from galore_mem.verify.builders import PIP

# variables that change how memory is taken (PyTorch's and the CUDA runtime's documentation of environment variables)
SETTINGS = (
    "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "CUBLAS_WORKSPACE_CONFIG", "CUBLASLT_WORKSPACE_SIZE",
    "TORCH_CUBLASLT_UNIFIED_WORKSPACE", "TORCH_CUDNN_SDPA_DEPRIORITIZED", "CUDA_MODULE_LOADING", "CUDA_VISIBLE_DEVICES",
)  # fmt: skip

UNCOUNTED = "PYTORCH_NO_CUDA_MEMORY_CACHING"


def environment(device: str) -> dict[str, Any]:
    """What a record says of the place; of a card there is more in `card`."""
    found: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform(), "device": device}
    return {**found, **dict(versions()), **{name: os.environ[name] for name in SETTINGS if name in os.environ}}


def versions() -> Iterator[tuple[str, str]]:
    """Every package that a builder's row needs, as pip calls it, with its release; those that are missing are left
    out."""
    from galore_mem.verify.peers import BUILDERS

    needed = {module for row in BUILDERS.values() for module in row.needs} | {"torch", "transformers"}
    for package in sorted(PIP.get(module, module.replace("_", "-")) for module in needed):
        try:
            yield package, version(package)
        except PackageNotFoundError:
            continue


def card() -> dict[str, Any]:
    """The CUDA device, before the first tensor of a case. Its free bytes are the driver's: this process's context is
    already taken off, and so is what other processes hold. Raises `InputError` where torch sees no such device, or
    counts nothing on it."""
    import torch
    from torch.utils.collect_env import get_nvidia_driver_version, run

    if not torch.cuda.is_available():
        raise InputError("torch sees no CUDA device here; give --device cpu")
    if os.environ.get(UNCOUNTED):
        raise InputError(f"torch counts no memory with {UNCOUNTED}={os.environ[UNCOUNTED]}; unset it")
    free, total = torch.accelerator.get_memory_info()
    return {
        "gpu": torch.cuda.get_device_name(),
        "compute_capability": torch.cuda.get_device_capability(),
        "capacity_bytes": total,
        "free_bytes": free,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "driver": get_nvidia_driver_version(run),
        "allocator": torch.cuda.get_allocator_backend(),
        "linalg": str(torch.backends.cuda.preferred_linalg_library()).rpartition(".")[2],
    }
