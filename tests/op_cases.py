"""Every operation of the twin beside the torch operation it stands for."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 # its customary name
from side_by_side import Case, Frozen, Ids
from torch.nn.attention import SDPBackend, sdpa_kernel

from galore_mem.dtypes import FLOAT32
from galore_mem.memory import ops
from galore_mem.memory.attention import sdpa
from galore_mem.memory.tape import Tensor

B, S, D, H, K = 2, 12, 40, 4, 10  # batch, length, width, heads, width of a head
ROW, HEADS = (B, S, D), (B, S, H, K)

ONEDNN = {"bfloat16": "oneDNN reorders operands into blocked copies"}
FLOAT_SUM = {"bfloat16": "the CPU's mean casts its operand to float32 (ReduceOps.cpp)"}
PER_THREAD = dict.fromkeys(("float32", "bfloat16"), "LayerNormBackwardKernelImpl: sums of each thread")
TILES = dict.fromkeys(("float32", "bfloat16"), "cpu/FlashAttentionKernel.cpp: tiles of each thread")


def heads(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2)


VIEWS = [
    Case(
        "view",
        (ROW,),
        lambda x: x.view(-1, D) * x.view(-1, D),
        lambda x: ops.mul(ops.view(x, -1, D), ops.view(x, -1, D)),
    ),
    Case("view alone", (ROW,), lambda x: x.view(-1, D), lambda x: ops.view(x, -1, D)),
    Case(
        "reshape of a view",
        (ROW,),
        lambda x: x.reshape(B, S, H, K).tanh(),
        lambda x: ops.tanh(ops.reshape(x, B, S, H, K)),
    ),
    Case(
        "reshape that copies",
        (HEADS,),
        lambda x: x.transpose(1, 2).reshape(B * H, S, K).tanh(),
        lambda x: ops.tanh(ops.reshape(ops.transpose(x, 1, 2), B * H, S, K)),
    ),
    Case(
        "reshape of a transposed batch of one",
        ((1, S, H, K),),
        lambda x: x.transpose(1, 2).reshape(H, S, K).tanh(),
        lambda x: ops.tanh(ops.reshape(ops.transpose(x, 1, 2), H, S, K)),
    ),
    Case("transpose", (HEADS,), lambda x: x.transpose(1, 2).tanh(), lambda x: ops.tanh(ops.transpose(x, 1, 2))),
    Case(
        "gradient of a view that copies",
        (ROW, (B, H, K, S)),
        lambda x, y: x.view(HEADS).transpose(1, 2) * y.transpose(2, 3),
        lambda x, y: ops.mul(ops.transpose(ops.view(x, *HEADS), 1, 2), ops.transpose(y, 2, 3)),
    ),
    Case("unsqueeze", (ROW,), lambda x: x.unsqueeze(1).tanh(), lambda x: ops.tanh(ops.unsqueeze(x, 1))),
    Case("unsqueeze at the end", (ROW,), lambda x: x.unsqueeze(3).tanh(), lambda x: ops.tanh(ops.unsqueeze(x, 3))),
    Case(
        "expand",
        ((B, 1, D),),
        lambda x: x.expand(B, S, D).tanh(),
        lambda x: ops.tanh(ops.expand(x, B, S, D)),
    ),
    Case(
        "repeat_kv",
        ((B, S, 2, K),),
        lambda x: heads(x)[:, :, None].expand(B, 2, 3, S, K).reshape(B, 6, S, K).tanh(),
        lambda x: ops.tanh(
            ops.reshape(ops.expand(ops.unsqueeze(ops.transpose(x, 1, 2), 2), B, 2, 3, S, K), B, 6, S, K)
        ),
    ),
    Case("narrow", (ROW,), lambda x: x[..., : D // 2].tanh(), lambda x: ops.tanh(ops.narrow(x, -1, D // 2))),
    Case("narrow of rows", (ROW,), lambda x: x[:, : S // 2].tanh(), lambda x: ops.tanh(ops.narrow(x, 1, S // 2))),
    Case(
        "split",
        (ROW,),
        lambda x: split_product(*x.split(D // 2, dim=2)),
        lambda x: ops.mul(*ops.split(x, D // 2, 2)),
    ),
    Case(
        "split with an unused part",
        (ROW,),
        lambda x: x.split(D // 4, dim=2)[1].tanh(),
        lambda x: ops.tanh(ops.split(x, D // 4, 2)[1]),
    ),
]


def split_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a * b


COPIES = [
    Case("contiguous", (ROW,), lambda x: x.contiguous().tanh(), lambda x: ops.tanh(ops.contiguous(x))),
    Case(
        "contiguous of transposed",
        (HEADS,),
        lambda x: heads(x).contiguous(),
        lambda x: ops.contiguous(ops.transpose(x, 1, 2)),
    ),
    Case("clone", (ROW,), lambda x: x.clone(), lambda x: ops.clone(x)),
    Case(
        "clone of transposed",
        (HEADS,),
        lambda x: heads(x).clone().reshape(B, H, S * K),
        lambda x: ops.reshape(ops.clone(ops.transpose(x, 1, 2)), B, H, S * K),
    ),
    Case("to", (ROW,), lambda x: x.to(torch.float32).tanh(), lambda x: ops.tanh(ops.to(x, FLOAT32))),
    Case(
        "to and back",
        (HEADS,),
        lambda x: (heads(x).to(torch.float32) * 2).to(x.dtype),
        lambda x: ops.to(ops.scale(ops.to(ops.transpose(x, 1, 2), FLOAT32)), x.dtype),
        numbers=True,
    ),
    Case("cat", (ROW, ROW), lambda a, b: torch.cat((a, b), -1), lambda a, b: ops.cat([a, b], -1)),
    Case("cat of rows", (ROW, (B, 3, D)), lambda a, b: torch.cat((a, b), 1), lambda a, b: ops.cat([a, b], 1)),
    Case("cat with itself", (ROW,), lambda a: torch.cat((a, a), -1), lambda a: ops.cat([a, a], -1)),
    Case("cat stolen as a view", ((3, D), (2, D)), lambda a, b: torch.cat((a, b), 0), lambda a, b: ops.cat([a, b], 0)),
]

POINTWISE = [
    Case("mul", (ROW, ROW), lambda a, b: a * b, ops.mul),
    Case("mul with a weight", ((D,), ROW), lambda w, x: w * x, ops.mul),
    Case("mul with a weight on the right", (ROW, (D,)), lambda x, w: x * w, ops.mul),
    Case("mul by a frozen factor", (ROW, Frozen((D,))), lambda x, w: x * w, ops.mul),
    Case("mul with (1, 1, S, K)", ((B, H, S, K), (1, 1, S, K)), lambda x, c: x * c, ops.mul),
    Case(
        "mul of transposed with (1, 1, S, K)",
        (HEADS, Frozen((1, 1, S, K))),
        lambda x, c: (heads(x) * c).reshape(B * H, S, K),
        lambda x, c: ops.reshape(ops.mul(ops.transpose(x, 1, 2), c), B * H, S, K),
    ),
    Case("mul with itself", (ROW,), lambda x: x * x, lambda x: ops.mul(x, x)),
    Case(
        "mul of two formats",
        (ROW, (D,)),
        lambda x, w: x.float() * w,
        lambda x, w: ops.mul(ops.to(x, FLOAT32), w),
    ),
    Case("add", (ROW, ROW), lambda a, b: a + b, ops.add),
    Case("add of one tensor twice", (ROW,), lambda a: a + a, lambda a: ops.add(a, a)),
    Case("add with a bias", (ROW, (D,)), lambda a, b: a + b, ops.add),
    Case("add with (1, S, D)", (ROW, (1, S, D)), lambda a, b: a + b, ops.add),
    Case("add with a mask", ((B, H, S, S), Frozen((B, 1, S, S))), lambda a, b: a + b, ops.add),
    Case("residual", (ROW,), lambda x: x + x.tanh(), lambda x: ops.add(x, ops.tanh(x))),
    Case("scale", (ROW,), lambda x: x * 0.5, ops.scale, numbers=True),
    Case("scale of a slice", (ROW,), lambda x: -x[..., : D // 2], lambda x: ops.scale(ops.narrow(x, -1, D // 2))),
    Case("shift", (ROW,), lambda x: x + 1, ops.shift, numbers=True),
    Case("pow", (ROW,), lambda x: x.pow(2), ops.pow, numbers=True),
    Case("rsqrt", (ROW,), lambda x: x.rsqrt(), ops.rsqrt, numbers=True),
    Case("tanh", (ROW,), torch.tanh, ops.tanh),
    Case("tanh of transposed", (HEADS,), lambda x: heads(x).tanh(), lambda x: ops.tanh(ops.transpose(x, 1, 2))),
    Case("relu", (ROW,), F.relu, ops.relu),
    Case("silu", (ROW,), F.silu, ops.silu),
    Case("gelu", (ROW,), F.gelu, ops.gelu),
    Case("gelu with tanh", (ROW,), lambda x: F.gelu(x, approximate="tanh"), ops.gelu),
    Case("mean", (ROW,), lambda x: x.mean(-1, keepdim=True), ops.mean_last, numbers=True, scratch=FLOAT_SUM),
    Case("dropout", (ROW,), lambda x: F.dropout(x, 0.1), lambda x: ops.dropout(x, 0.1), numbers=True),
    Case("dropout of nothing", (ROW,), lambda x: F.dropout(x, 0.0).tanh(), lambda x: ops.tanh(ops.dropout(x, 0.0))),
]


def conv1d(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """transformers pytorch_utils.py, Conv1D.forward"""
    size_out = (*x.size()[:-1], weight.shape[1])
    x = torch.addmm(bias, x.view(-1, x.size(-1)), weight)
    return x.view(size_out)


N = 24  # output features
PRODUCTS = [
    Case("linear of 2-D", ((S, D), (N, D)), F.linear, ops.linear, scratch=ONEDNN),
    Case("linear of 2-D with bias", ((S, D), (N, D), (N,)), F.linear, ops.linear, scratch=ONEDNN),
    Case("linear of 3-D", (ROW, (N, D)), F.linear, ops.linear, scratch=ONEDNN),
    Case("linear of 3-D with bias", (ROW, (N, D), (N,)), F.linear, ops.linear, scratch=ONEDNN),
    Case("linear of 4-D with bias", (HEADS, (N, K), (N,)), F.linear, ops.linear, scratch=ONEDNN),
    Case("linear with a frozen weight", (ROW, Frozen((N, D))), F.linear, ops.linear, scratch=ONEDNN),
    Case("linear of a frozen input", (Frozen(ROW), (N, D), (N,)), F.linear, ops.linear, scratch=ONEDNN),
    Case("linear of one row with bias", ((1, D), (N, D), (N,)), F.linear, ops.linear, scratch=ONEDNN),
    *(
        Case(
            f"linear of transposed 3-D {suffix}",
            ((S, B, D), weight, *bias),
            lambda x, *w: F.linear(x.transpose(0, 1), *w),
            lambda x, *w: ops.linear(ops.transpose(x, 0, 1), *w),
            scratch=ONEDNN,
        )
        for suffix, weight, bias in (
            ("", (N, D), ()),
            ("with bias", (N, D), ((N,),)),
            ("with a frozen weight", Frozen((N, D)), ()),
        )
    ),
    Case(
        "linear of a transposed 2-D input",
        ((D, S), (N, D)),
        lambda x, w: F.linear(x.t(), w),
        lambda x, w: ops.linear(ops.transpose(x, 0, 1), w),
        scratch=ONEDNN,
    ),
    Case("conv1d", (ROW, (D, N), (N,)), conv1d, ops.conv1d, scratch=ONEDNN),
    Case("matmul of 2-D", ((S, D), (D, N)), torch.matmul, ops.matmul, scratch=ONEDNN),
    Case("matmul of 4-D", ((B, H, S, K), (B, H, K, S)), torch.matmul, ops.matmul, scratch=ONEDNN),
    *(
        Case(
            f"scores of permuted query and key, batch {batch}",
            ((batch, S, H, K), (batch, S, H, K)),
            lambda q, k: heads(q) @ heads(k).transpose(2, 3),
            lambda q, k: ops.matmul(ops.transpose(q, 1, 2), ops.transpose(ops.transpose(k, 1, 2), 2, 3)),
            scratch=ONEDNN,
        )
        for batch in (1, 2)
    ),
    *(
        Case(
            f"weights times permuted values, batch {batch}",
            ((batch, H, S, S), (batch, S, H, K)),
            lambda w, v: (w @ heads(v)).transpose(1, 2).contiguous(),
            lambda w, v: ops.contiguous(ops.transpose(ops.matmul(w, ops.transpose(v, 1, 2)), 1, 2)),
            scratch=ONEDNN,
        )
        for batch in (1, 2)
    ),
    Case("matmul with broadcast batches", ((B, H, S, K), (1, H, K, S)), torch.matmul, ops.matmul, scratch=ONEDNN),
    Case("rotary frequencies", ((1, K, 1), (1, 1, S)), torch.matmul, ops.matmul, scratch=ONEDNN),
]

LOSSES = [
    Case("softmax", ((B, H, S, S),), lambda x: x.softmax(-1), ops.softmax),
    Case(
        "softmax in float32",
        ((B, H, S, S),),
        lambda x: x.softmax(-1, dtype=torch.float32),
        lambda x: ops.softmax(x, FLOAT32),
    ),
    Case(
        "softmax in float32 and back",
        ((B, H, S, S),),
        lambda x: x.softmax(-1, dtype=torch.float32).to(x.dtype),
        lambda x: ops.to(ops.softmax(x, FLOAT32), x.dtype),
    ),
    Case("log_softmax", (ROW,), lambda x: x.log_softmax(-1), ops.log_softmax),
    Case("nll_loss", ((S, D), Ids((S,), D)), F.nll_loss, ops.nll_loss),
    Case("cross_entropy", ((S, D), Ids((S,), D)), F.cross_entropy, ops.cross_entropy),
    Case(
        "cross_entropy in float32",
        ((S, D), Ids((S,), D)),
        lambda x, y: F.cross_entropy(x.float(), y),
        lambda x, y: ops.cross_entropy(ops.to(x, FLOAT32), y),
    ),
    Case(
        "layer_norm", (ROW, (D,), (D,)), lambda x, w, b: F.layer_norm(x, (D,), w, b), ops.layer_norm, scratch=PER_THREAD
    ),
    Case(
        "layer_norm with frozen weights",
        (ROW, Frozen((D,)), Frozen((D,))),
        lambda x, w, b: F.layer_norm(x, (D,), w, b),
        ops.layer_norm,
        scratch=PER_THREAD,
    ),
    Case("embedding", ((50, D), Ids((B, S), 50)), lambda w, ids: F.embedding(ids, w), ops.embedding),
]


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool = True) -> torch.Tensor:
    grouped = q.shape[2] != k.shape[2]
    out = F.scaled_dot_product_attention(heads(q), heads(k), heads(v), is_causal=causal, enable_gqa=grouped)
    return out.transpose(1, 2).contiguous()


def attend_twin(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (ops.transpose(t, 1, 2) for t in (q, k, v))
    return ops.contiguous(ops.transpose(sdpa(q, k, v, None, "cpu"), 1, 2))


def math(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None, dropout: float = 0.0
) -> torch.Tensor:
    grouped = q.shape[2] != k.shape[2]
    options = {"attn_mask": mask, "dropout_p": dropout, "is_causal": mask is None, "enable_gqa": grouped}
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(heads(q), heads(k), heads(v), **options)


def math_twin(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    q, k, v = (ops.transpose(t, 1, 2) for t in (q, k, v))
    return sdpa(q, k, v, mask, "math", dropout)


BOOLEAN = Frozen((B, 1, S, S), "bool")
ATTENTION = [
    Case("sdpa", (HEADS, HEADS, HEADS), attend, attend_twin, scratch=TILES),
    Case("sdpa, not causal", (HEADS, HEADS, HEADS), lambda *t: attend(*t, causal=False), attend_twin, scratch=TILES),
    Case("sdpa, grouped queries", (HEADS, (B, S, 2, K), (B, S, 2, K)), attend, attend_twin, scratch=TILES),
    Case(
        "sdpa of contiguous heads",
        ((B, H, S, K),) * 3,
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).contiguous(),
        lambda q, k, v: ops.contiguous(ops.transpose(sdpa(q, k, v, None, "cpu"), 1, 2)),
        scratch=TILES,
    ),
    *(
        Case(
            f"sdpa with {name}",
            (HEADS, HEADS, HEADS, mask),
            lambda q, k, v, m: F.scaled_dot_product_attention(heads(q), heads(k), heads(v), attn_mask=m),
            lambda q, k, v, m: sdpa(*(ops.transpose(t, 1, 2) for t in (q, k, v)), m, "cpu"),
            numbers=True,
            scratch=TILES,
        )
        for name, mask in (("a mask", Frozen((B, 1, S, S))), ("a boolean mask", BOOLEAN))
    ),
    Case("math", (HEADS, HEADS, HEADS), math, math_twin, numbers=True),
    Case("math, grouped queries", (HEADS, (B, S, 2, K), (B, S, 2, K)), math, math_twin, numbers=True),
    # bfloat16 left out: the CPU adds a mask to float32 scores through a float32 copy of it
    Case(
        "math with a mask",
        (HEADS, HEADS, HEADS, Frozen((B, 1, S, S))),
        math,
        math_twin,
        numbers=True,
        dtypes=("float32",),
    ),
    Case(
        "math with a boolean mask", (HEADS, HEADS, HEADS, BOOLEAN), math, math_twin, numbers=True, dtypes=("float32",)
    ),
    Case(
        "sdpa with dropout",
        (HEADS, HEADS, HEADS),
        lambda q, k, v: F.scaled_dot_product_attention(heads(q), heads(k), heads(v), dropout_p=0.1, is_causal=True),
        lambda q, k, v: sdpa(*(ops.transpose(t, 1, 2) for t in (q, k, v)), None, None, 0.1),
        numbers=True,
    ),
    Case("pad", (ROW,), lambda x: F.pad(x, (0, 8)), lambda x: ops.pad_last(x, D + 8)),
]

CASES = [*VIEWS, *COPIES, *POINTWISE, *PRODUCTS, *LOSSES, *ATTENTION]
