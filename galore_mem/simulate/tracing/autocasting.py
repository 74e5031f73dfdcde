"""Autocast for tensors without values: torch has none for `meta`.

Which operations a device's autocast takes, torch itself says (they have a kernel for its dispatch key); what is done to
each is in aten/src/ATen/autocast_mode.h: the lists below, of operations that language models and their losses use.
Casts of trained leaves to the region's format are made once and kept until the region ends (cached_cast).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

KEYS = {"cuda": "AutocastCUDA", "cpu": "AutocastCPU"}
# AT_FORALL_LOWER_PRECISION_FP: in the region's format
LOWER = (
    "conv1d", "conv2d", "conv3d", "conv_tbc", "prelu", "addmm", "addmv", "addr", "matmul", "einsum", "mm", "mv",
    "linalg_vecdot", "linear", "addbmm", "baddbmm", "bmm", "chain_matmul", "scaled_dot_product_attention",
)  # fmt: skip
# AT_FORALL_FP32: in float32
WIDE = (
    "exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal", "rsqrt", "pow.Tensor_Scalar", "pow.Tensor_Tensor",
    "pow.Scalar", "softplus", "layer_norm", "native_layer_norm", "group_norm", "rms_norm", "nll_loss", "nll_loss2d",
    "cross_entropy_loss", "kl_div", "l1_loss", "smooth_l1_loss", "huber_loss", "mse_loss", "cosine_similarity",
    "binary_cross_entropy_with_logits", "dist", "cdist", "logsumexp", "renorm",
)  # fmt: skip
# AT_FORALL_FP32_SET_OPT_DTYPE: with a result in float32, where nothing else is said
WIDE_RESULT = ("softmax.int", "log_softmax.int", "cumsum", "cumprod", "prod", "prod.dim_int", "sum", "sum.dim_IntList")
# AT_FORALL_PROMOTE: in the widest format among the operands
WIDEST = (
    "addcdiv", "addcmul", "atan2", "bilinear", "cross", "dot", "vdot", "index_put", "tensordot", "scatter_add", "cat",
    "stack", "index_copy",
)  # fmt: skip

Call = Callable[..., Any]  # an operation, as it is without autocast

_cache: dict[int, tuple[weakref.ref[Tensor], Tensor]] = {}  # a leaf, by its identity, and its cast


def takes(name: str, device: str) -> bool:
    """Does autocast on this device do anything to the operation?"""
    found: bool = torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", KEYS[device])
    return found


def enabled() -> bool:
    """Does the program run in an autocast region? (Those of all devices are torch's for the CPU, see `patches`.)"""
    return torch.is_autocast_enabled("cpu")


def forget() -> None:
    """Drops the casts that are kept: a region has ended."""
    _cache.clear()


def policy(name: str) -> Callable[[Call, tuple[Any, ...], dict[str, Any]], Any] | None:
    """What autocast does to an operation: a function of the operation and its arguments."""
    for names, done in ((LOWER, lower), (WIDE, wide), (WIDE_RESULT, partial(wide_result, name)), (WIDEST, widest)):
        if name in names:
            return done
    return None


def lower(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _cast_call(call, args, kwargs, torch.get_autocast_dtype("cpu"))


def wide(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _cast_call(call, args, kwargs, torch.float32)


def widest(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    found = torch.get_autocast_dtype("cpu")
    for t in args:
        for one in t if isinstance(t, list | tuple) else (t,):
            if isinstance(one, Tensor) and one.dtype is torch.float32:
                found = torch.float32
    return _cast_call(call, args, kwargs, found)


def wide_result(name: str, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The format is the last positional argument of softmax and its like, a keyword of sums."""
    said = kwargs.get("dtype") or next((a for a in args if isinstance(a, torch.dtype)), None)
    if said is None and args[0].is_floating_point() and args[0].dtype is not torch.float64:
        if name.endswith("softmax.int"):
            args = (*args[:2], torch.float32)
            kwargs = {}
        else:
            kwargs = {**kwargs, "dtype": torch.float32}
    return _without(call, args, kwargs)


def _cast_call(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], dtype: torch.dtype) -> Any:
    """The compiled wrapper evaluates its arguments from the last to the first."""
    named = {name: cast(value, dtype) for name, value in reversed(list(kwargs.items()))}
    listed = [cast(value, dtype) for value in reversed(args)]
    return _without(call, tuple(reversed(listed)), named)


def _without(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    torch.set_autocast_enabled("cpu", False)
    try:
        return call(*args, **kwargs)
    finally:
        torch.set_autocast_enabled("cpu", True)


def cast(value: Any, dtype: torch.dtype) -> Any:
    """cached_cast (autocast_mode.cpp)."""
    if isinstance(value, list | tuple):
        return [cast(one, dtype) for one in value]
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype in (dtype, torch.float64):
        return value
    leaf = value.dtype is torch.float32 and value.requires_grad and value.is_leaf and not value._is_view()
    if not leaf or dtype is torch.float32 or not torch.is_autocast_cache_enabled():
        return value.to(dtype)
    known = _cache.get(id(value))
    if known is None or known[0]() is not value:
        known = _cache[id(value)] = weakref.ref(value), value.to(dtype)
    return known[1]
