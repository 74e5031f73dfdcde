"""Matrix products, as aten/src/ATen/native/Linear.cpp and LinearAlgebra.cpp run them."""

from __future__ import annotations

from math import prod

from galore_mem.memory.autocast import autocast
from galore_mem.memory.strides import broadcast
from galore_mem.memory.tape import Grads, Shape, Tensor
from galore_mem.memory.views import Incoming, Kept, expand, first, reshape, transpose, view


def mm(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (rows x k) times weight (k x n), plus a bias of n: saves x for the weight and the weight for x. A gradient is
    laid out as its operand is, also where that is a transposed view (mm_mat1_backward, mm_mat2_backward)."""
    tape = x.tape
    for_x, for_w = x.requires_grad, weight.requires_grad
    shape_x, shape_w = x.shape, weight.shape
    columns_x, columns_w = _by_columns(x), _by_columns(weight)

    def backward_mm(saved: Kept, grads: Incoming) -> Grads:
        grad = first(grads)
        grad_w = _product(grad, shape_w, columns_w) if for_w else None
        return _product(grad, shape_x, columns_x) if for_x else None, grad_w

    def backward_addmm(saved: Kept, grads: Incoming) -> Grads:
        grad = first(grads)
        grad_x = _product(grad, shape_x, columns_x) if for_x else None
        return grad, grad_x, _product(grad, shape_w, columns_w) if for_w else None

    saved = ((weight,) if for_x else ()) + ((x,) if for_w else ())
    if bias is None:
        node = tape.node("MmBackward", (x, weight), saved, backward_mm)
    else:
        node = tape.node("AddmmBackward", (bias, x, weight), saved, backward_addmm)
    out = tape.multiplied(tape.empty((x.shape[0], weight.shape[1]), x.dtype))
    tape.bind(node, out)
    return out


def _by_columns(t: Tensor) -> bool:
    return t.strides == (1, t.shape[0])


def _product(grad: Tensor, shape: Shape, by_columns: bool) -> Tensor:
    """A new matrix; one that lies by columns is the transpose of a product."""
    tape = grad.tape
    if not by_columns:
        return tape.multiplied(tape.empty(shape, grad.dtype))
    return tape.multiplied(tape.empty(shape[::-1], grad.dtype)).like(shape, (1, shape[0]))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ W.T + b over the last dimension, for any number of leading dimensions (Linear.cpp, linear)."""
    bias, weight, x = autocast(bias), autocast(weight), autocast(x)
    if bias is not None:
        if len(x.shape) == 2:
            return mm(x, transpose(weight, 0, 1), bias)
        if x.is_contiguous:
            rows = view(x, -1, x.shape[-1])
            return view(mm(rows, transpose(weight, 0, 1), bias), *x.shape[:-1], weight.shape[0])
    out = matmul(x, transpose(weight, 0, 1))
    return out if bias is None else add_(out, bias)


def conv1d(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ W + b with the weight stored in x out (transformers pytorch_utils.py, Conv1D)."""
    rows = view(x, -1, x.shape[-1])
    weight, rows, bias = autocast(weight), autocast(rows), autocast(bias)
    return view(mm(rows, weight, bias), *x.shape[:-1], weight.shape[1])


def add_(t: Tensor, other: Tensor) -> Tensor:
    """t += other: no bytes in either direction, but a node in the graph."""
    node = t.tape.node("AddBackward", (t, other), (), lambda saved, grads: (grads[0], grads[0]))
    out = t.like(t.shape, t.strides)
    t.tape.bind(node, out)
    return out


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Product over the last two dimensions (LinearAlgebra.cpp, _matmul_impl).

    A matrix on the right is multiplied with the rows of a; else both are reshaped to three dimensions, where what
    strides do not allow as a view is copied, and the copy is what is saved.
    """
    b, a = autocast(b), autocast(a)
    if len(a.shape) == len(b.shape) == 2:
        return mm(a, b)
    if len(b.shape) == 2 and _folds(a, b):
        rows = reshape(a, -1, a.shape[-1])
        return view(mm(rows, b), *a.shape[:-1], b.shape[1])
    batch = broadcast(a.shape[:-2], b.shape[:-2])
    return view(bmm(_batched(a, batch), _batched(b, batch)), *batch, a.shape[-2], b.shape[-1])


def _folds(a: Tensor, b: Tensor) -> bool:
    """Whether a's leading dimensions become rows: always beside a trained matrix, else if no copy (should_fold)."""
    leading = zip(a.shape[1:-1], a.strides[:-2], a.strides[1:-1], strict=True)
    return b.requires_grad or all(stride == size * following for size, stride, following in leading)


def _batched(t: Tensor, batch: Shape) -> Tensor:
    missing = len(batch) + 2 - len(t.shape)
    full = (*batch, *t.shape[-2:])
    if missing:  # a matrix beside a batch: expand adds the dimensions
        node = t.tape.node("ExpandBackward", (t,), (), lambda saved, grads: (grads[0],))
        expanded = t.like(full, (0,) * missing + t.strides)
        t.tape.bind(node, expanded)
    else:
        expanded = expand(t, *full)
    return reshape(expanded, prod(batch), *t.shape[-2:])


def bmm(a: Tensor, b: Tensor) -> Tensor:
    """Product of two batches of matrices: each is saved for the other."""
    tape = a.tape
    for_a, for_b = a.requires_grad, b.requires_grad
    shape_a, shape_b = a.shape, b.shape

    def backward(saved: Kept, grads: Incoming) -> Grads:
        dtype = first(grads).dtype
        grad_b = tape.multiplied(tape.empty(shape_b, dtype)) if for_b else None
        return tape.multiplied(tape.empty(shape_a, dtype)) if for_a else None, grad_b

    saved = ((b,) if for_a else ()) + ((a,) if for_b else ())
    node = tape.node("BmmBackward", (a, b), saved, backward)
    out = tape.multiplied(tape.empty((a.shape[0], a.shape[1], b.shape[2]), a.dtype))
    tape.bind(node, out)
    return out
