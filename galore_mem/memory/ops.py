"""What each tensor operation allocates, saves for backward, and allocates in its backward pass.

One function for each operation of eager PyTorch that the families use, under torch's name. The saved
tensors follow `tools/autograd/derivatives.yaml`, the backward formulas `FunctionsManual.cpp`, the
kernels' own buffers the file named beside them. `tests/test_ops.py` runs each beside torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from galore_mem.dtypes import BOOL, FLOAT16, FLOAT32, DType, promote
from galore_mem.memory.tape import Grads, Shape, Tensor, contiguous_strides

Saved = Sequence[Tensor]
Incoming = Sequence[Tensor | None]


# -- views: no bytes of their own ------------------------------------------------------------------


def _view_strides(t: Tensor, shape: Shape) -> Shape | None:
    """Strides of t seen with another shape, or None when that needs a copy (TensorUtils.cpp, computeStride)."""
    if t.is_contiguous:
        return contiguous_strides(shape)
    strides = [0] * len(shape)
    view_d = len(shape) - 1
    chunk_stride = t.strides[-1]
    tensor_numel = view_numel = 1
    for d in range(len(t.shape) - 1, -1, -1):
        tensor_numel *= t.shape[d]
        if d == 0 or (t.shape[d - 1] != 1 and t.strides[d - 1] != tensor_numel * chunk_stride):
            while view_d >= 0 and (view_numel < tensor_numel or shape[view_d] == 1):
                strides[view_d] = view_numel * chunk_stride
                view_numel *= shape[view_d]
                view_d -= 1
            if view_numel != tensor_numel:
                return None
            if d > 0:
                chunk_stride = t.strides[d - 1]
                tensor_numel = view_numel = 1
    return tuple(strides) if view_d == -1 else None


def _viewed(t: Tensor, name: str, shape: Shape, strides: Shape) -> Tensor:
    before = t.shape

    def backward(saved: Saved, grads: Incoming) -> Grads:
        grad = grads[0]
        return (None if grad is None else _reshaped(grad, before),)

    node = t.tape.node(name, (t,), (), backward)
    out = t.like(shape, strides)
    t.tape.bind(node, out)
    return out


def _reshaped(t: Tensor, shape: Shape) -> Tensor:
    """reshape without the graph: a view where possible, otherwise a contiguous copy."""
    strides = _view_strides(t, shape)
    return t.tape.empty(shape, t.dtype) if strides is None else t.like(shape, strides)


def view(t: Tensor, *shape: int) -> Tensor:
    """Another shape over the same storage. A single -1 is inferred."""
    full = _infer(t, shape)
    strides = _view_strides(t, full)
    assert strides is not None, f"view of {t.shape} {t.strides} as {full} needs a copy; torch would raise"
    return _viewed(t, "ViewBackward", full, strides)


def reshape(t: Tensor, *shape: int) -> Tensor:
    """A view where strides allow it, otherwise a view of a contiguous copy."""
    full = _infer(t, shape)
    strides = _view_strides(t, full)
    if strides is None:
        t = contiguous(t)
        strides = contiguous_strides(full)
    return _viewed(t, "ViewBackward", full, strides)


def _infer(t: Tensor, shape: Shape) -> Shape:
    if -1 not in shape:
        return shape
    known = -prod(shape)
    return tuple(t.numel // known if s == -1 else s for s in shape)


def transpose(t: Tensor, a: int, b: int) -> Tensor:
    """Two dimensions exchanged."""

    def swap(values: Shape) -> Shape:
        swapped = list(values)
        swapped[a], swapped[b] = swapped[b], swapped[a]
        return tuple(swapped)

    def backward(saved: Saved, grads: Incoming) -> Grads:
        grad = grads[0]
        return (None if grad is None else grad.like(swap(grad.shape), swap(grad.strides)),)

    node = t.tape.node("TransposeBackward", (t,), (), backward)
    out = t.like(swap(t.shape), swap(t.strides))
    t.tape.bind(node, out)
    return out


def unsqueeze(t: Tensor, dim: int) -> Tensor:
    """A new dimension of size 1 at a non-negative position."""
    stride = t.strides[dim] * t.shape[dim] if dim < len(t.shape) else 1
    shape = (*t.shape[:dim], 1, *t.shape[dim:])
    return _viewed(t, "UnsqueezeBackward", shape, (*t.strides[:dim], stride, *t.strides[dim:]))


def expand(t: Tensor, *shape: int) -> Tensor:
    """Dimensions of size 1 repeated without copying; backward sums them."""
    strides = tuple(0 if now != size else stride for now, size, stride in zip(t.shape, shape, t.strides, strict=True))

    def backward(saved: Saved, grads: Incoming) -> Grads:
        return (grads[0],)  # the engine sums it to the input's shape

    node = t.tape.node("ExpandBackward", (t,), (), backward)
    out = t.like(shape, strides)
    t.tape.bind(node, out)
    return out


def narrow(t: Tensor, dim: int, length: int) -> Tensor:
    """A slice along one dimension; backward writes into zeros of the full shape (slice_backward)."""
    dim %= len(t.shape)
    full = t.shape

    def backward(saved: Saved, grads: Incoming) -> Grads:
        grad = grads[0]
        return (None if grad is None else grad.tape.empty(full, grad.dtype),)

    node = t.tape.node("SliceBackward", (t,), (), backward)
    out = t.like((*full[:dim], length, *full[dim + 1 :]), t.strides)
    t.tape.bind(node, out)
    return out


def split(t: Tensor, length: int, dim: int) -> list[Tensor]:
    """Equal slices along one dimension; backward joins their gradients in one new tensor."""
    dim %= len(t.shape)
    full, dtype = t.shape, t.dtype
    parts = full[dim] // length

    def backward(saved: Saved, grads: Incoming) -> Grads:
        return (t_tape.empty(full, dtype),)

    t_tape = t.tape
    node = t_tape.node("SplitBackward", (t,), (), backward, outputs=parts)
    outs = [t.like((*full[:dim], length, *full[dim + 1 :]), t.strides) for _ in range(parts)]
    t_tape.bind(node, *outs)
    return outs


# -- copies ----------------------------------------------------------------------------------------


def contiguous(t: Tensor) -> Tensor:
    """The tensor itself when its elements lie in order, otherwise a copy."""
    if t.is_contiguous:
        return t
    return clone(t)


def clone(t: Tensor) -> Tensor:
    """A contiguous copy."""
    node = t.tape.node("CloneBackward", (t,), (), lambda saved, grads: (grads[0],))
    out = t.tape.empty(t.shape, t.dtype)
    t.tape.bind(node, out)
    return out


def to(t: Tensor, dtype: DType) -> Tensor:
    """A copy in another format; the tensor itself when it has it already."""
    if t.dtype is dtype:
        return t
    node = t.tape.node("ToCopyBackward", (t,), (), lambda saved, grads: (grads[0],))  # the engine casts back
    out = t.tape.empty(t.shape, dtype, strides=_dense_strides(t))
    t.tape.bind(node, out)
    return out


def cat(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Joined along one dimension; backward hands out views of the one gradient (cat_tensors_backward)."""
    dim %= len(parts[0].shape)
    shapes = [p.shape for p in parts]

    def backward(saved: Saved, grads: Incoming) -> Grads:
        grad = grads[0]
        assert grad is not None
        return tuple(grad.like(shape, grad.strides) for shape in shapes)

    tape = parts[0].tape
    node = tape.node("CatBackward", parts, (), backward)
    shape = (*shapes[0][:dim], sum(s[dim] for s in shapes), *shapes[0][dim + 1 :])
    out = tape.empty(shape, parts[0].dtype)
    tape.bind(node, out)
    return out


# -- element by element ----------------------------------------------------------------------------


def _broadcast(a: Shape, b: Shape) -> Shape:
    if a == b:
        return a
    width = max(len(a), len(b))
    return tuple(max(x, y) for x, y in zip((1,) * (width - len(a)) + a, (1,) * (width - len(b)) + b, strict=True))


def _dense_strides(t: Tensor) -> Shape | None:
    """Strides of a new tensor that keeps t's order of dimensions, if t is a permutation without gaps."""
    if t.is_contiguous:
        return None
    order = sorted(range(len(t.shape)), key=lambda d: (-t.strides[d], d))
    strides = [0] * len(t.shape)
    step = 1
    for d in reversed(order):
        if t.shape[d] != 1 and t.strides[d] != step:
            return _restrided(t, order)
        strides[d] = step
        step *= t.shape[d]
    return tuple(strides)


def _restrided(t: Tensor, order: list[int]) -> Shape | None:
    """Elementwise results are dense in the input's order of dimensions even where the input has gaps."""
    if 0 in t.strides:
        return None
    strides = [0] * len(t.shape)
    step = 1
    for d in reversed(order):
        strides[d] = step
        step *= t.shape[d]
    return tuple(strides)


def _pointwise(a: Tensor, b: Tensor | None = None) -> Tensor:
    """A new tensor for the result of an elementwise operation."""
    if b is None:
        return a.tape.empty(a.shape, a.dtype, strides=_dense_strides(a))
    shape = _broadcast(a.shape, b.shape)
    leader = a if a.shape == shape else b
    strides = _dense_strides(leader) if leader.shape == shape else None
    return a.tape.empty(shape, promote_tensors(a, b), strides=strides)


def promote_tensors(a: Tensor, b: Tensor) -> DType:
    """torch's result type; a tensor without dimensions does not widen one that has some."""
    if bool(a.shape) != bool(b.shape):
        return a.dtype if a.shape else b.dtype
    return promote(a.dtype, b.dtype)


def mul(a: Tensor, b: Tensor) -> Tensor:
    """a * b with broadcasting: each factor is saved if the other wants a gradient."""
    for_a, for_b = a.requires_grad, b.requires_grad
    saved = ((b,) if for_a else ()) + ((a,) if for_b else ())

    def backward(saved: Saved, grads: Incoming) -> Grads:
        grad = grads[0]
        assert grad is not None
        grad_a = _pointwise(grad, saved[0]) if for_a else None
        grad_b = _pointwise(grad, saved[-1]) if for_b else None
        return grad_a, grad_b

    node = a.tape.node("MulBackward", (a, b), saved, backward)
    out = _pointwise(a, b)
    a.tape.bind(node, out)
    return out


def add(a: Tensor, b: Tensor) -> Tensor:
    """a + b with broadcasting; nothing is saved, both sides receive the same gradient."""
    node = a.tape.node("AddBackward", (a, b), (), lambda saved, grads: (grads[0], grads[0]))
    out = _pointwise(a, b)
    a.tape.bind(node, out)
    return out


def scale(t: Tensor) -> Tensor:
    """t times a Python number (also -t): nothing saved, one new tensor each way."""

    def backward(saved: Saved, grads: Incoming) -> Grads:
        grad = grads[0]
        assert grad is not None
        return (_pointwise(grad),)

    node = t.tape.node("MulScalarBackward", (t,), (), backward)
    out = _pointwise(t)
    t.tape.bind(node, out)
    return out


def shift(t: Tensor) -> Tensor:
    """t plus a Python number: nothing saved, the gradient passes through."""
    node = t.tape.node("AddScalarBackward", (t,), (), lambda saved, grads: (grads[0],))
    out = _pointwise(t)
    t.tape.bind(node, out)
    return out


def _unary(name: str, t: Tensor, *, save: str, temporaries: int = 0) -> Tensor:
    """One input, one output of its shape; saves the input or the output; backward makes `temporaries`
    tensors of that shape besides its result, alive together."""

    def backward(saved: Saved, grads: Incoming) -> Grads:
        grad = grads[0]
        assert grad is not None
        scratch = [_pointwise(grad) for _ in range(temporaries)]
        result = _pointwise(grad)
        del scratch
        return (result,)

    node = t.tape.node(name, (t,), (t,) if save == "input" else (), backward)
    out = _pointwise(t)
    t.tape.bind(node, out)
    if save == "output":
        t.tape.save(node, (out,))
    return out


def pow(t: Tensor) -> Tensor:
    """t to a number: backward is grad * (exponent * t.pow(exponent - 1)), two tensors besides the result."""
    return _unary("PowBackward", t, save="input", temporaries=2)


def rsqrt(t: Tensor) -> Tensor:
    """1 / sqrt(t): backward is -0.5 * grad * result.pow(3)."""
    return _unary("RsqrtBackward", t, save="output", temporaries=2)


def tanh(t: Tensor) -> Tensor:
    return _unary("TanhBackward", t, save="output")


def silu(t: Tensor) -> Tensor:
    return _unary("SiluBackward", t, save="input")


def gelu(t: Tensor) -> Tensor:
    return _unary("GeluBackward", t, save="input")


def gelu_new(t: Tensor) -> Tensor:
    """GPT-2's activation, written out in elementwise operations (transformers activations.py, NewGELUActivation):
    0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x**3)))."""
    return mul(scale(t), shift(tanh(scale(add(t, scale(pow(t)))))))


def mean_last(t: Tensor) -> Tensor:
    """Mean over the last dimension, kept as 1; backward expands and divides: one tensor of the input's shape."""
    full = t.shape

    def backward(saved: Saved, grads: Incoming) -> Grads:
        grad = grads[0]
        assert grad is not None
        return (grad.tape.empty(full, grad.dtype),)

    node = t.tape.node("MeanBackward", (t,), (), backward)
    out = t.tape.empty((*full[:-1], 1), t.dtype)
    t.tape.bind(node, out)
    return out


def dropout(t: Tensor, p: float) -> Tensor:
    """CUDA: a fused kernel saves a mask of one byte an element. CPU: noise in t's own format, then a product
    (native/Dropout.cpp). Nothing at all for p = 0."""
    if p == 0:
        return t
    if t.tape.device == "cpu":
        noise = _pointwise(t)  # bernoulli_ and div_ in place
        return mul(t, noise)

    def backward(saved: Saved, grads: Incoming) -> Grads:
        grad = grads[0]
        assert grad is not None
        return (_pointwise(grad),)

    node = t.tape.node("NativeDropoutBackward", (t,), (), backward)
    out = _pointwise(t)
    mask = t.tape.empty(t.shape, BOOL)
    t.tape.bind(node, out)
    t.tape.save(node, (mask,))
    return out


# -- matrix products -------------------------------------------------------------------------------


def autocast(t: Tensor) -> Tensor:
    """The tensor in the autocast region's format; casts of leaf weights are made once and cached."""
    tape = t.tape
    if tape.autocast is None or not t.dtype.floating or t.dtype is tape.autocast:
        return t
    leaf = t.node is not None and t.node in tape.leaves
    if not leaf:
        return to(t, tape.autocast)
    cached = tape.autocast_cache.get(id(t.storage))
    if cached is None:
        cached = tape.autocast_cache[id(t.storage)] = to(t, tape.autocast)
    return cached


def mm(x: Tensor, weight: Tensor, out_features: int, bias: Tensor | None = None) -> Tensor:
    """x (rows x k) times a matrix, plus a bias: saves x for the matrix and the matrix for x."""
    for_x, for_w = x.requires_grad, weight.requires_grad
    shape_w, shape_x = weight.shape, x.shape
    saved = ((weight,) if for_x else ()) + ((x,) if for_w else ())

    def backward(saved: Saved, grads: Incoming) -> Grads:
        grad = grads[0]
        assert grad is not None
        grad_x = grad.tape.empty(shape_x, grad.dtype) if for_x else None
        grad_w = grad.tape.empty(shape_w, grad.dtype) if for_w else None
        return grad_x, grad_w, grad

    node = x.tape.node("MmBackward", (x, weight, bias), saved, backward)
    out = x.tape.empty((x.shape[0], out_features), x.dtype)
    x.tape.bind(node, out)
    return out


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, out_features: int | None = None) -> Tensor:
    """x @ W.T + b over the last dimension, for any number of leading dimensions.

    `out_features` says which side of the weight is the output when it is not the first (GPT-2's Conv1D).
    """
    x, weight = autocast(x), autocast(weight)
    if bias is not None:
        bias = autocast(bias)
    width = out_features or weight.shape[0]
    rows = reshape(x, -1, x.shape[-1]) if len(x.shape) != 2 else x
    out = mm(rows, weight, width, bias)
    return out if len(x.shape) == 2 else view(out, *x.shape[:-1], width)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Batched product of two tensors with the same leading dimensions; operands whose strides do not allow a
    three-dimensional view are copied, and the copies are what is saved (LinearAlgebra.cpp, matmul)."""
    a, b = autocast(a), autocast(b)
    batch = a.shape[:-2]
    m, n = a.shape[-2], b.shape[-1]
    a3, b3 = reshape(a, prod(batch), m, a.shape[-1]), reshape(b, prod(batch), b.shape[-2], n)
    for_a, for_b = a3.requires_grad, b3.requires_grad
    shape_a, shape_b = a3.shape, b3.shape

    def backward(saved: Saved, grads: Incoming) -> Grads:
        grad = grads[0]
        assert grad is not None
        grad_a = grad.tape.empty(shape_a, grad.dtype) if for_a else None
        grad_b = grad.tape.empty(shape_b, grad.dtype) if for_b else None
        return grad_a, grad_b

    tape = a.tape
    saved = ((b3,) if for_a else ()) + ((a3,) if for_b else ())
    node = tape.node("BmmBackward", (a3, b3), saved, backward)
    out = tape.empty((prod(batch), m, n), a.dtype)
    tape.bind(node, out)
    return view(out, *batch, m, n)


# -- softmax, losses, normalisation, lookup ---------------------------------------------------------


def softmax(t: Tensor, dtype: DType | None = None) -> Tensor:
    """Softmax over the last dimension, saving its result.

    On CUDA a float16 input with dtype=float32 is one kernel; elsewhere the input is cast first
    (native/SoftMax.cpp). The CUDA backward makes grad * output first (cuda/SoftMax.cu).
    """
    fused = t.tape.device == "cuda" and t.dtype is FLOAT16 and dtype is FLOAT32
    if dtype is not None and not fused:
        t = to(t, dtype)
    return _softmax(t, "SoftmaxBackward", dtype or t.dtype, product=t.tape.device == "cuda")


def log_softmax(t: Tensor) -> Tensor:
    """log-softmax over the last dimension, saving its result; backward makes one tensor."""
    return _softmax(t, "LogSoftmaxBackward", t.dtype, product=False)


def _softmax(t: Tensor, name: str, dtype: DType, *, product: bool) -> Tensor:
    tape, in_dtype = t.tape, t.dtype

    def backward(saved: Saved, grads: Incoming) -> Grads:
        grad = grads[0]
        assert grad is not None
        inner = tape.empty(grad.shape, grad.dtype) if product else None
        result = tape.empty(grad.shape, in_dtype)
        del inner
        return (result,)

    node = tape.node(name, (t,), (), backward)
    out = tape.empty(t.shape, dtype)
    tape.bind(node, out)
    tape.save(node, (out,))
    return out


def nll_loss(log_probs: Tensor, target: Tensor) -> Tensor:
    """Mean negative log-likelihood: saves its inputs and the total weight; backward fills a tensor like log_probs."""
    tape, shape, dtype = log_probs.tape, log_probs.shape, log_probs.dtype

    def backward(saved: Saved, grads: Incoming) -> Grads:
        return (tape.empty(shape, dtype),)

    node = tape.node("NllLossBackward", (log_probs,), (log_probs, target), backward)
    out, total_weight = tape.empty((), dtype), tape.empty((), dtype)
    tape.bind(node, out)
    tape.save(node, (total_weight,))
    return out


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy of rows of logits, in their own format (float32 under autocast)."""
    if logits.tape.autocast is not None:
        logits = to(logits, FLOAT32)
    return nll_loss(log_softmax(logits), target)


def layer_norm(t: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Saves the input, the weights and each row's mean and reciprocal deviation; float32 under autocast."""
    tape = t.tape
    if tape.autocast is not None:
        t = to(t, FLOAT32)
    shape, dtype = t.shape, t.dtype
    wide, wide_dtype = weight.shape, weight.dtype
    trained = weight.requires_grad

    def backward(saved: Saved, grads: Incoming) -> Grads:
        grad_x = tape.empty(shape, dtype)
        if not trained:
            return (grad_x,)
        return grad_x, tape.empty(wide, wide_dtype), tape.empty(wide, wide_dtype)

    node = tape.node("NativeLayerNormBackward", (t, weight, bias), (t, weight, bias), backward)
    out = tape.empty(shape, dtype)
    # row statistics: float32 on CUDA (layer_norm_kernel.cu, acc_type), the input's format on the CPU
    stats = FLOAT32 if tape.device == "cuda" else dtype
    mean, rstd = tape.empty((*shape[:-1], 1), stats), tape.empty((*shape[:-1], 1), stats)
    tape.bind(node, out)
    tape.save(node, (mean, rstd))
    return out


def embedding(weight: Tensor, ids: Tensor) -> Tensor:
    """Rows of a table: saves the ids; backward is a dense gradient of the whole table."""
    tape, table, dtype = weight.tape, weight.shape, weight.dtype

    def backward(saved: Saved, grads: Incoming) -> Grads:
        return (tape.empty(table, dtype),)

    node = tape.node("EmbeddingBackward", (weight,), (ids,), backward)
    out = tape.empty((*ids.shape, table[1]), dtype)
    tape.bind(node, out)
    return out
