"""What can be known of CUDA's branches without a card.

Meta kernels say which tensors a CUDA kernel returns, and the autograd formulas which of them are saved: those are
compared here. Meta tensors have no fused dropout, no half_to_float softmax of their own accord and no kernel's own
buffers: the first two are called by name, the buffers are compared with sizes that were recorded on cards, or that
follow from the sources named in the code.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 # its customary name
from side_by_side import NUMBER, Case, Frozen, Record, RecordingTape, twin_record
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from galore_mem.dtypes import BFLOAT16, FLOAT16, FLOAT32, INT64, DType
from galore_mem.memory import ops
from galore_mem.memory.attention import sdpa, sdpa_kernel
from galore_mem.memory.tape import TEMPORARIES, Parameter, Shape, Storage, Tape, Tensor

aten = torch.ops.aten
B, S, H, K, D = 2, 12, 4, 16, 64
ROW, HEADS = (B, S, D), (B, S, H, K)


# -- tensors, beside meta kernels -------------------------------------------------------------------------


class Storages(TorchDispatchMode):
    """Follows storages from the operation that first returns them to their last reference."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.known = {t.untyped_storage()._cdata for t in known}
        self.alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self.live = 0
        self.steps: list[tuple[int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage().nbytes() > NUMBER:
                self._follow(t.untyped_storage())
        return out

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, nbytes = storage._cdata, storage.nbytes()
        if key in self.known or key in self.alive:
            return

        def gone(_: object) -> None:
            self.live -= nbytes
            del self.alive[key]

        self.alive[key] = weakref.ref(storage, gone)
        self.live += nbytes
        self.steps.append((nbytes, self.live))


def meta_record(case: Case, format: str) -> Record:
    """What meta kernels allocate; a number of 8 bytes or fewer is left out (attention's seed and offset are in
    host memory, except for flash)."""
    inputs = []
    for given in case.inputs:
        assert isinstance(given, tuple | Frozen)
        shape, grad = (given.shape, False) if isinstance(given, Frozen) else (given, True)
        inputs.append(torch.empty(shape, dtype=getattr(torch, format), device="meta", requires_grad=grad))
    with Storages(inputs) as storages:
        out = case.torch(*inputs)
        forward, kept = storages.steps.copy(), storages.live
        storages.steps.clear()
        torch.autograd.backward(out, torch.ones(out.shape, dtype=out.dtype, device="meta"))
        return Record(forward, kept, storages.steps, storages.live)


class KernelessTape(RecordingTape):
    """Leaves out kernels' own buffers, which are raw bytes on the tape and nothing on meta."""

    def bytes(self, n: int, category: int = TEMPORARIES) -> Storage:
        return super().bytes(0, category)


def heads(t: torch.Tensor) -> torch.Tensor:
    return t.transpose(1, 2)


def rows(out: torch.Tensor) -> torch.Tensor:
    return out.transpose(1, 2).contiguous()


def fused(kernel: str) -> Callable[..., Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return rows_twin(sdpa(*heads_twin(q, k, v), mask, kernel))

    return run


def heads_twin(*inputs: Tensor) -> list[Tensor]:
    return [ops.transpose(t, 1, 2) for t in inputs]


def rows_twin(out: Tensor) -> Tensor:
    return ops.contiguous(ops.transpose(out, 1, 2))


def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[0]


def padded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """attention.cpp, pad_last_dim<8>: heads of 20 become heads of 24."""
    q, k, v = heads(q), heads(k), heads(v)
    return flash(*(F.pad(t, (0, 4)) for t in (q, k, v)))[..., :20]


def efficient(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    if mask is not None:
        mask = mask.expand(B, H, S, S)
    return aten._scaled_dot_product_efficient_attention(heads(q), heads(k), heads(v), mask, True)[0]


def padded_mask(*inputs: torch.Tensor) -> torch.Tensor:
    """attention.cpp, preprocess_mask: rows of 12 become rows of 16, seen as 12."""
    *qkv, mask = inputs
    return rows(efficient(*qkv, F.pad(mask, (0, 4))[..., :S]))


CASES = [
    Case("dropout", (ROW,), lambda x: torch.native_dropout(x, 0.1, True)[0], lambda x: ops.dropout(x, 0.1)),
    Case("layer_norm", (ROW, (D,), (D,)), lambda x, w, b: F.layer_norm(x, (D,), w, b), ops.layer_norm),
    Case("flash", (HEADS,) * 3, lambda *t: rows(flash(*map(heads, t))), fused("flash")),
    Case("flash, grouped", (HEADS, *((B, S, 2, K),) * 2), lambda *t: rows(flash(*map(heads, t))), fused("flash")),
    Case(
        "flash of contiguous heads",
        ((B, H, S, K),) * 3,
        lambda *t: rows(flash(*t)),
        lambda *t: rows_twin(sdpa(*t, None, "flash")),
    ),
    Case("flash, padded", ((B, S, H, 20),) * 3, padded, lambda *t: sdpa(*heads_twin(*t), None, "flash")),
    Case("efficient", (HEADS,) * 3, lambda *t: rows(efficient(*t)), fused("efficient")),
    Case(
        "efficient of contiguous heads",
        ((B, H, S, K),) * 3,
        lambda *t: rows(aten._scaled_dot_product_efficient_attention(*t, None, True)[0]),
        lambda *t: rows_twin(sdpa(*t, None, "efficient")),
    ),
    Case("efficient with a mask", (*(HEADS,) * 3, Frozen((B, 1, S, S))), padded_mask, fused("efficient")),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_tensors_are_those_of_meta_kernels(case: Case) -> None:
    tape = KernelessTape("cuda", NUMBER)
    assert twin_record(case, "bfloat16", tape) == meta_record(case, "bfloat16")


def test_a_float16_softmax_in_float32_is_one_kernel() -> None:
    shape = (B, H, S, S)
    case = Case("", (shape,), lambda x: aten._softmax(x, -1, True), lambda x: ops.softmax(x, FLOAT32))
    on_meta, on_cuda = meta_record(case, "float16"), twin_record(case, "float16", RecordingTape("cuda", 0))
    assert (on_cuda.forward, on_cuda.kept, on_cuda.left) == (on_meta.forward, on_meta.kept, on_meta.left)


# -- kernels' own buffers, derived or recorded ------------------------------------------------------------


def buffers(program: Callable[..., Tensor], format: DType, *shapes: Shape) -> list[int]:
    """What a program allocates in its backward pass on CUDA, in order, after the output's gradient."""
    tape = RecordingTape("cuda", 0)
    parameters = []
    for shape in shapes:
        weight = tape.empty(shape, format)
        weight.requires_grad = True
        parameters.append(Parameter("", weight))
    out = program(*(p.tensor() for p in parameters))
    tape.steps.clear()
    tape.backward(out)
    return [n for n, _ in tape.steps][1:]


def test_softmax_multiplies_before_its_kernel() -> None:
    """cuda/SoftMax.cu: grad * output in float32, then the float16 result; no float32 gradient of the scores."""
    n = B * H * S * S
    assert buffers(lambda x: ops.softmax(x, FLOAT32), FLOAT16, (B, H, S, S)) == [4 * n, 2 * n]
    assert buffers(ops.softmax, BFLOAT16, (B, H, S, S)) == [2 * n, 2 * n]
    # bfloat16 is cast first: product and result in float32, then the cast of the gradient
    assert buffers(lambda x: ops.softmax(x, FLOAT32), BFLOAT16, (B, H, S, S)) == [4 * n, 4 * n, 2 * n]


def test_efficient_attention_as_recorded() -> None:
    """A training step of TinyLlama-1.1B on one sequence of 1,000 tokens (32 heads of 64, 16-bit), as a card's
    allocator recorded it: log-sum-exp 131,072 bytes, delta 128,000, workspace 8,396,800."""
    shape = (1, 32, 1000, 64)
    tape = RecordingTape("cuda", 0)
    q = Parameter("", tape.empty(shape, FLOAT16))
    q.weight.requires_grad = True
    sdpa(q.tensor(), q.tensor(), q.tensor(), None, "efficient")
    assert [n for n, _ in tape.steps][-2:] == [4_096_000, 131_072]
    made = buffers(lambda q, k, v: sdpa(q, k, v, None, "efficient"), FLOAT16, shape, shape, shape)
    contiguous_gradient = 4_096_000  # the output's gradient is not in the output's order here
    assert made[:6] == [contiguous_gradient, *(4_096_000,) * 3, 128_000, 8_396_800]


def test_efficient_attention_in_float32() -> None:
    """attention_backward.cu: delta = (grad * out).sum(-1).transpose().contiguous(), and no workspace."""
    b, s, h, d = 1, 100, 2, 32
    made = buffers(fused("efficient"), FLOAT32, *((b, s, h, d),) * 3)
    n, row = 4 * b * s * h * d, 4 * b * s * h
    assert made[:6] == [n, n, n, n, row, row]


@pytest.mark.parametrize(("dim", "rounded"), [(64, 64), (80, 96), (128, 128), (160, 192)])
def test_flash_attention(dim: int, rounded: int) -> None:
    """flash_api.cpp, mha_bwd: dq, dk, dv; softmax_d and dq_accum in float32 over 100 rows rounded to 128 and heads
    rounded to 32, or 64 above 128; dk and dv again, for all 4 heads of which keys have 2."""
    b, s, h, kv = 2, 100, 4, 2
    made = buffers(fused("flash"), BFLOAT16, (b, s, h, dim), (b, s, kv, dim), (b, s, kv, dim))
    gradients = [2 * b * s * n * dim for n in (h, kv, kv)]
    assert made[:7] == [*gradients, 4 * b * h * 128, 4 * b * 128 * h * rounded, *(2 * b * s * h * dim,) * 2]


def test_embedding_sorts_many_tokens() -> None:
    """Embedding.cu up to 3,072 tokens: the gradient alone. Above: two sorted arrays that stay and one that goes;
    the gradient; four arrays of offsets; float32 sums for tokens / 10 + min(tokens, vocabulary) rows."""

    def program(tokens: int) -> Callable[[Tensor], Tensor]:
        return lambda table: ops.embedding(table, table.tape.empty((tokens,), INT64))

    vocabulary, width = 5000, 16
    gradient = 2 * vocabulary * width
    assert buffers(program(3072), BFLOAT16, (vocabulary, width)) == [gradient]
    assert buffers(program(4000), BFLOAT16, (vocabulary, width)) == [
        *(32_000,) * 3,  # 8 * 4000
        gradient,
        *(32_000,) * 3,  # 8 * 4000 tokens, and twice 8 * 4000 segments
        35_200,  # 8 * (400 + 4000)
        281_600,  # 4 * 4400 * 16
    ]


@pytest.mark.parametrize(
    ("format", "heads", "dim", "mask", "capability", "kernel"),
    [
        (BFLOAT16, 8, 64, False, None, "flash"),
        (BFLOAT16, 2, 64, False, (8, 0), "flash"),
        (FLOAT16, 8, 64, False, (7, 5), "efficient"),
        (BFLOAT16, 8, 64, False, (7, 5), "math"),
        (BFLOAT16, 8, 64, True, (8, 0), "efficient"),
        (BFLOAT16, 8, 320, False, (8, 0), "efficient"),
        (FLOAT32, 8, 64, False, (8, 0), "efficient"),
        (FLOAT32, 2, 64, False, (8, 0), "math"),
        (FLOAT32, 8, 66, False, (8, 0), "math"),
    ],
)
def test_which_kernel(
    format: DType, heads: int, dim: int, mask: bool, capability: tuple[int, int] | None, kernel: str
) -> None:
    tape = Tape()
    q, k = (tape.empty((1, n, 16, dim), format) for n in (8, heads))
    given = tape.empty((1, 1, 16, 16), format) if mask else None
    assert sdpa_kernel(q, given, capability, k) == kernel


def test_grouped_queries_in_float32_have_their_scores() -> None:
    """No fused kernel takes them: (1, 8, 16, 16) scores, their softmax, and the product's operands."""
    tape = RecordingTape("cuda", 0)
    q, k = (tape.empty((1, n, 16, 64), FLOAT32) for n in (8, 2))
    tape.steps.clear()
    sdpa(q, k, k, None, None)
    scores = 4 * 8 * 16 * 16
    assert [n for n, _ in tape.steps].count(scores) == 2
