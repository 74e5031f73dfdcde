"""Operations that work element by element, and the mean of the last dimension."""

from __future__ import annotations

from galore_mem.dtypes import BOOL, DType, promote
from galore_mem.memory.autocast import autocast_wide
from galore_mem.memory.reductions import reduce
from galore_mem.memory.strides import broadcast, result_strides
from galore_mem.memory.tape import Grads, Tensor
from galore_mem.memory.views import Incoming, Kept, first


def _same(t: Tensor) -> Tensor:
    """A new tensor for an elementwise result of one operand."""
    return t.tape.empty(t.shape, t.dtype, strides=result_strides(t.shape, t.layout))


def _both(a: Tensor, b: Tensor) -> Tensor:
    """A new tensor for an elementwise result of two operands; the order of dimensions is a's before b's.

    Operands of another format than the result's are converted on the fly on CUDA; on the CPU they are first copied
    (TensorIterator.cpp, compute_types).
    """
    shape = a.shape if a.shape == b.shape else broadcast(a.shape, b.shape)
    strides = result_strides(shape, a.layout, b.layout)
    if a.dtype is b.dtype:
        return a.tape.empty(shape, a.dtype, strides=strides)
    dtype, tape = promote_tensors(a, b), a.tape
    copies = [tape.converted(t, dtype) for t in (a, b) if t.dtype is not dtype]
    out = tape.empty(shape, dtype, strides=strides)
    del copies
    return out


def promote_tensors(a: Tensor, b: Tensor) -> DType:
    """torch's result type; a tensor without dimensions does not widen one that has some."""
    if bool(a.shape) != bool(b.shape):
        return a.dtype if a.shape else b.dtype
    return promote(a.dtype, b.dtype)


def mul(a: Tensor, b: Tensor) -> Tensor:
    """a * b with broadcasting: each factor is saved if the other wants a gradient."""
    for_a, for_b = a.requires_grad, b.requires_grad
    saved = ((b,) if for_a else ()) + ((a,) if for_b else ())

    def backward(saved: Kept, grads: Incoming) -> Grads:
        grad = first(grads)
        grad_b = _both(grad, saved[-1]) if for_b else None  # the generated code works on `other` first
        grad_a = _both(grad, saved[0]) if for_a else None
        return grad_a, grad_b

    node = a.tape.node("MulBackward", (a, b), saved, backward)
    out = _both(a, b)
    a.tape.bind(node, out)
    return out


def add(a: Tensor, b: Tensor) -> Tensor:
    """a + b with broadcasting; nothing is saved, both sides receive the same gradient."""
    node = a.tape.node("AddBackward", (a, b), (), lambda saved, grads: (grads[0], grads[0]))
    out = _both(a, b)
    a.tape.bind(node, out)
    return out


def scale(t: Tensor) -> Tensor:
    """t times a Python number (also -t): nothing saved, one new tensor each way."""
    node = t.tape.node("MulScalarBackward", (t,), (), lambda saved, grads: (_same(first(grads)),))
    out = _same(t)
    t.tape.bind(node, out)
    return out


def shift(t: Tensor) -> Tensor:
    """t plus a Python number: nothing saved, the gradient passes through."""
    node = t.tape.node("AddScalarBackward", (t,), (), lambda saved, grads: (grads[0],))
    out = _same(t)
    t.tape.bind(node, out)
    return out


def _unary(name: str, t: Tensor, *, save: str) -> Tensor:
    """One input, one output of its shape; saves the input or the output; backward is one kernel over the gradient
    and what was saved."""
    node = t.tape.node(
        name,
        (t,),
        (t,) if save == "input" else (),
        lambda saved, grads: (_both(first(grads), saved[0]),),
    )
    out = _same(t)
    t.tape.bind(node, out)
    if save == "output":
        t.tape.save(node, (out,))
    return out


def tanh(t: Tensor) -> Tensor:
    return _unary("TanhBackward", t, save="output")


def relu(t: Tensor) -> Tensor:
    return _unary("ReluBackward", t, save="output")


def silu(t: Tensor) -> Tensor:
    return _unary("SiluBackward", t, save="input")


def gelu(t: Tensor) -> Tensor:
    return _unary("GeluBackward", t, save="input")


def pow(t: Tensor) -> Tensor:
    """t to a number: backward is grad * (exponent * t.pow(exponent - 1)), two tensors besides the result
    (pow_backward). Float32 under autocast."""
    t = autocast_wide(t)

    def backward(saved: Kept, grads: Incoming) -> Grads:
        power = _same(saved[0])
        factor = _same(power)
        return (_both(first(grads), factor),)

    node = t.tape.node("PowBackward", (t,), (t,), backward)
    out = _same(t)
    t.tape.bind(node, out)
    return out


def rsqrt(t: Tensor) -> Tensor:
    """1 / sqrt(t): backward is (-0.5 * grad) * result.pow(3) (derivatives.yaml). Float32 under autocast."""
    t = autocast_wide(t)

    def backward(saved: Kept, grads: Incoming) -> Grads:
        half, cube = _same(first(grads)), _same(saved[0])
        return (_both(half, cube),)

    node = t.tape.node("RsqrtBackward", (t,), (), backward)
    out = _same(t)
    t.tape.bind(node, out)
    t.tape.save(node, (out,))
    return out


def gelu_new(t: Tensor) -> Tensor:
    """GPT-2's activation, written out in elementwise operations (transformers activations.py, NewGELUActivation):
    0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x**3)))."""
    return mul(scale(t), shift(tanh(scale(add(t, scale(pow(t)))))))


def mean_last(t: Tensor) -> Tensor:
    """Mean over the last dimension, kept as 1; backward divides the expanded gradient: one tensor of the input's
    shape (mean_backward)."""
    full = t.shape

    def backward(saved: Kept, grads: Incoming) -> Grads:
        grad = first(grads)
        return (_same(grad.like(full, (*grad.strides[:-1], 0))),)

    node = t.tape.node("MeanBackward", (t,), (), backward)
    out = t.tape.empty((*full[:-1], 1), t.dtype)
    reduce(t, (-1,))
    t.tape.bind(node, out)
    return out


def dropout(t: Tensor, p: float) -> Tensor:
    """CUDA: a fused kernel saves a mask of one byte an element (cuda/Dropout.cu). CPU: noise in t's own format, then
    a product (native/Dropout.cpp). Nothing at all for p = 0."""
    if p == 0:
        return t
    if t.tape.device == "cpu":
        return mul(t, _same(t))  # empty_like, then bernoulli_ and div_ in place

    def backward(saved: Kept, grads: Incoming) -> Grads:
        return (_same(first(grads)),)

    node = t.tape.node("NativeDropoutBackward", (t,), (), backward)
    out = _same(t)
    mask = t.tape.empty(t.shape, BOOL)
    t.tape.bind(node, out)
    t.tape.save(node, (mask,))
    return out
