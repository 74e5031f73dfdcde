"""Where an operation of torch decides by device: what it would do on the simulated one.

Tensors without values are on the device `meta`, so composite operations that ask for the device take its branch. Such
operations are replaced while a program is traced, above autograd and for calls from C++ too: by kernels for a dispatch
key that no build of torch uses (`AutocastIPU`), which is switched on for the traced program only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from galore_mem.memory.attention import sdpa_kernel
from galore_mem.memory.blocks import TORCH
from galore_mem.setup import Setup
from galore_mem.simulate.kernels import Recorder
from galore_mem.simulate.tracing.autocasting import LOWER, WIDE, WIDE_RESULT, WIDEST, enabled, policy, takes

aten = torch.ops.aten
KEY = "AutocastIPU"
HALF = (torch.float16, torch.bfloat16)

_running: list[Setup] = []  # the setup that is simulated now


def setup() -> Setup:
    return _running[-1]


@contextmanager
def on(simulated: Setup) -> Iterator[None]:
    """The branches of a device inside of it."""
    install()
    _running.append(simulated)
    before = torch.is_autocast_enabled("ipu")
    torch.set_autocast_enabled("ipu", True)
    try:
        with torch._C._IncludeDispatchKeyGuard(getattr(torch._C.DispatchKey, KEY)):
            yield
    finally:
        torch.set_autocast_enabled("ipu", before)
        _running.pop()


@cache
def install() -> tuple[torch.library.Library, ...]:
    """Makes the kernels known to torch, once in a process. Nothing reaches them but inside `on`."""
    others = torch.library.Library("_", "IMPL")
    others.fallback(torch.library.fallthrough_kernel, KEY)
    library = torch.library.Library("aten", "IMPL")
    for name in {*BRANCHES, *LOWER, *WIDE, *WIDE_RESULT, *WIDEST}:
        library.impl(name, kernel(name), KEY, with_keyset=True)
    return library, others


def kernel(name: str) -> Callable[..., Any]:
    """What runs instead of an operation: autocast's casts, then the device's branch."""
    packet, _, overload = name.partition(".")
    op = getattr(getattr(aten, packet), overload or "default")
    branch, done = BRANCHES.get(name), policy(name)

    def run(keys: Any, *args: Any, **kwargs: Any) -> Any:
        call = partial(branch or op.redispatch, keys if branch else below(keys))
        if done is not None and enabled() and takes(name, setup().device):
            return done(call, args, kwargs)
        return call(*args, **kwargs)

    return run


def below(keys: Any) -> Any:
    """The keys that come after this one."""
    return keys & torch._C._dispatch_keyset_full_after(getattr(torch._C.DispatchKey, KEY))


# -- the operations ------------------------------------------------------------------------------------


def dropout(keys: Any, t: Tensor, p: float, train: bool) -> Tensor:
    """native/Dropout.cpp: CUDA's kernel saves a mask of one byte an element."""
    if setup().device == "cuda" and train and 0 < p < 1 and t.numel():
        out: Tensor = aten.native_dropout.default(t, p, True)[0]
        return out
    result: Tensor = aten.dropout.default.redispatch(below(keys), t, p, train)
    return result


def in_one(fused: Any, usual: Any) -> Any:
    """native/SoftMax.cpp: on CUDA one kernel from float16 to float32, of `softmax` and of `log_softmax`."""

    def run(keys: Any, t: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
        if setup().device == "cuda" and t.dtype is torch.float16 and dtype is torch.float32:
            widened: Tensor = fused(t, dim, True)
            return widened
        result: Tensor = usual.redispatch(below(keys), t, dim, dtype)
        return result

    return run


softmax = in_one(aten._softmax.default, aten.softmax.int)
log_softmax = in_one(aten._log_softmax.default, aten.log_softmax.int)


def attention(
    keys: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """transformers/attention.cpp, scaled_dot_product_attention."""
    kernel = attention_kernel(q, k, v, mask, dropout_p, enable_gqa)
    if mask is not None and mask.dtype is torch.bool:  # convert_boolean_attn_mask
        mask = _additive(mask, q)
    if kernel == "math":
        return _math(q, k, v, mask, dropout_p, is_causal, scale, q.shape[-3] // k.shape[-3] if enable_gqa else 1)
    return _FUSED[kernel](q, k, v, mask, dropout_p, is_causal, scale)


def attention_kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float, gqa: bool) -> str:
    """Which kernel runs: as the estimate has it (`galore_mem.memory.attention.sdpa_kernel`). No fused one takes fewer
    key heads than query heads, unless `gqa` says that they are meant (check_batch_size_and_num_heads_dense)."""
    if q.dim() != 4 or not q.shape[-1] == k.shape[-1] == v.shape[-1]:
        return "math"
    if q.shape[1] != k.shape[1] and not gqa:
        return "math"
    now = setup()
    if now.device == "cpu" and not cpu_takes(q, k, v, mask):
        return "math"
    like = Recorder(now.device).like
    hidden = None if mask is None else like(mask)
    groups = TORCH[now.torch].efficient_groups
    return allowed(sdpa_kernel(like(q), hidden, now.compute_capability, like(k), p, efficient_groups=groups))


def allowed(kernel: str) -> str:
    """A kernel, or the next that the program has not forbidden (torch.nn.attention.sdpa_kernel): flash, efficient, math
    (sdp_utils.cpp, select_sdp_backend)."""
    if kernel in ("flash", "cpu") and not torch.backends.cuda.flash_sdp_enabled():
        kernel = "efficient" if kernel == "flash" else "math"
    if kernel == "efficient" and not torch.backends.cuda.mem_efficient_sdp_enabled():
        kernel = "math"
    return kernel


def cpu_takes(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """sdp_utils_cpp.cpp, use_flash_attention_cpp: what the CPU's fused kernel asks of its operands, besides no
    dropout: rows in order, and a mask of two or four dimensions that needs no gradient (check_attn_mask_shape)."""
    if q.shape[0] != k.shape[0] or any(t.stride(-1) != 1 for t in (q, k, v)) or not q.shape[2] * k.shape[2]:
        return False
    return mask is None or (mask.dim() in (2, 4) and not mask.requires_grad)


def _math(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float, causal: bool, scale: float | None, groups: int
) -> Tensor:  # fmt: skip
    """_scaled_dot_product_attention_math, which adds the mask in place but where a dispatch mode looks on. Its local
    tensors live until the end, and go as they do in C++."""
    given = q.dtype
    wide_q, wide_k, wide_v = (t.float() if given in HALF else t for t in (q, k, v))
    root = (q.shape[-1] ** -0.5 if scale is None else scale) ** 0.5
    scaled = wide_q * root
    if causal:
        lower = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
        mask = _additive(lower, scaled)
        del lower
    all_k, all_v = (t if groups == 1 else t.repeat_interleave(groups, -3) for t in (wide_k, wide_v))
    scores = scaled @ (all_k.transpose(-2, -1) * root)
    if mask is not None:
        scores.add_(mask)
    scores = aten._safe_softmax.default(scores, -1)
    if p:
        scores = torch.dropout(scores, p, True)
    returned = scores.to(given)  # too, and dropped by the caller
    out: Tensor = (scores @ all_v).to(given)
    del scores, all_v, all_k, mask, scaled, wide_v, wide_k, wide_q, returned
    return out


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    """convert_boolean_attn_mask."""
    return torch.where(mask, 0.0, torch.scalar_tensor(float("-inf"), dtype=like.dtype, device=like.device))


def _flash(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float, causal: bool, scale: float | None) -> Tensor:
    width = q.shape[-1]
    scale = width**-0.5 if scale is None else scale
    more = -width % 8
    if more:  # pad_last_dim<8>
        q, k, v = (torch.nn.functional.pad(t, (0, more)) for t in (q, k, v))
    out: Tensor = aten._scaled_dot_product_flash_attention.default(q, k, v, p, causal, False, scale=scale)[0]
    return out[..., :width] if more else out


def _efficient(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float, causal: bool, scale: float | None
) -> Tensor:
    if mask is not None:  # preprocess_mask
        length = mask.shape[-1]
        if length % 8:
            mask = torch.nn.functional.pad(mask, (0, -length % 8))[..., :length]
        mask = mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    out: Tensor = aten._scaled_dot_product_efficient_attention.default(q, k, v, mask, wanted, p, causal, scale=scale)[0]
    return out


def _cpu(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float, causal: bool, scale: float | None) -> Tensor:
    out: Tensor = aten._scaled_dot_product_flash_attention_for_cpu.default(
        q, k, v, p, causal, attn_mask=mask, scale=scale
    )[0]
    return out


_FUSED: dict[str, Callable[..., Tensor]] = {"flash": _flash, "efficient": _efficient, "cpu": _cpu}
BRANCHES: dict[str, Callable[..., Any]] = {
    "dropout": dropout, "softmax.int": softmax, "log_softmax.int": log_softmax,
    "scaled_dot_product_attention": attention,
}  # fmt: skip
