"""How the forward pass of a projected linear layer runs, by the way its weight is stored.

Each function receives the layer, its input, the tensors of `Implementation.store` in their order, and the bias.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from galore_mem.dtypes import DType
from galore_mem.memory.ops import add, autocast, clone, conv1d, linear, reshape, scale, to, view
from galore_mem.memory.reductions import reduce
from galore_mem.memory.tape import Grads, Tensor


class Layer(NamedTuple):
    """A linear layer: its number of output features, the format that the recipe computes in, and whether its weight is
    stored in x out (GPT-2's Conv1D)."""

    out_features: int
    compute: DType
    transposed: bool = False

    def plain(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer with an ordinary weight."""
        return conv1d(x, weight, bias) if self.transposed else linear(x, weight, bias)


LinearForward = Callable[[Layer, Tensor, Sequence[Tensor], Tensor | None], Tensor]


def dense(layer: Layer, x: Tensor, weights: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """nn.Linear (and GPT-2's Conv1D)."""
    return layer.plain(x, weights[0], bias)


def low_rank(layer: Layer, x: Tensor, weights: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """W = BA with A (r x in) and B (out x r), never multiplied out."""
    a, b = weights
    return linear(linear(x, a), b, bias)


def lora(layer: Layer, x: Tensor, weights: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """peft 0.21, tuners/lora/layer.py, Linear.forward: the input is cast to the adapter's format (a float32 copy that
    is saved where the base is 16-bit), and the sum is made in the wider format before it is cast back."""
    base, a, b = weights
    result = layer.plain(x, base, bias)
    result_dtype = result.dtype
    x = to(x, a.dtype)
    result = add(result, scale(linear(linear(x, a), b)))
    return to(result, result_dtype)


def nf4(layer: Layer, x: Tensor, weights: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """bitsandbytes Linear4bit (nn/modules.py), alone or, where adapters follow the codes, under peft
    (tuners/lora/bnb.py, Linear4bit.forward).

    The input is cast to the compute format and the result back. The matrix is dequantized for the product and again for
    the gradient of the input; neither copy is kept. With adapters the base's result is cloned. The input is cast to
    their format, and what they give to the result's, unless `torch.is_autocast_enabled()`, which is asked without a
    device and so means CUDA's: under the CPU's autocast both casts are made.
    """
    if not weights[-1].requires_grad:
        return _nf4_base(layer, x, weights[0])
    a, b = weights[-2:]
    result = clone(_nf4_base(layer, x, weights[0]))
    result_dtype = result.dtype
    converts = x.tape.autocast is None or x.tape.device == "cpu"
    if converts:
        x = to(x, a.dtype)
    branch = scale(linear(linear(x, a), b))
    if converts:
        branch = to(branch, result_dtype)
    return add(result, branch)


def _nf4_base(layer: Layer, x: Tensor, codes: Tensor) -> Tensor:
    compute, width = layer.compute, layer.out_features
    tape, in_dtype, leading = x.tape, x.dtype, x.shape[:-1]
    x = to(x, compute)
    rows = reshape(x, -1, x.shape[-1])
    matrix, shape_x = (width, rows.shape[-1]), rows.shape

    def backward(saved: Sequence[Tensor], grads: Sequence[Tensor | None]) -> Grads:
        grad = grads[0]
        assert grad is not None
        weight = grad.tape.empty(matrix, grad.dtype)
        grad_x = grad.tape.empty(shape_x, grad.dtype)
        del weight
        return (grad_x,)

    node = tape.node("MatMul4BitBackward", (rows,), (codes,), backward)
    weight = tape.empty(matrix, compute)
    out = tape.empty((rows.shape[0], width), compute)
    del weight
    tape.bind(node, out)
    return to(view(out, *leading, width), in_dtype)


def int8(layer: Layer, x: Tensor, weights: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """galore_mem/optim/int8_linear.py, Product: the float matrix exists only during the product, in the forward pass
    and, for the gradient of the input, in the backward pass; the gradient of the matrix is a full one. Under autocast
    the input, the scales and zeros, and the bias are cast; the codes become a matrix of that format."""
    weight = weights[0]
    tape = x.tape
    x = autocast(x)
    compute = x.dtype
    rows = reshape(x, -1, x.shape[-1])
    shape_x, shape_w = rows.shape, weight.shape
    for_x, for_w = rows.requires_grad, weight.requires_grad
    for_b = bias is not None and bias.requires_grad

    def matrix() -> Tensor:
        made = tape.empty(shape_w, compute)
        grid = [tape.empty(t.shape, compute) for t in weights[1:] if t.dtype is not compute]
        del grid
        return made

    def backward(saved: Sequence[Tensor], grads: Sequence[Tensor | None]) -> Grads:
        grad = grads[0]
        assert grad is not None
        grad_x = None
        if for_x:
            multiplied = matrix()
            grad_x = tape.empty(shape_x, grad.dtype)
            del multiplied
        grad_w = tape.empty(shape_w, grad.dtype) if for_w else None
        return grad_x, grad_w, _summed_rows(grad) if for_b else None

    saved = (tuple(weights) if for_x else ()) + ((rows,) if for_w else ())
    node = tape.node("ProductBackward", (rows, weight, bias), saved, backward)
    multiplied = matrix()
    added = autocast(bias)
    out = tape.empty((rows.shape[0], layer.out_features), compute)
    del multiplied, added
    tape.bind(node, out)
    return view(out, *x.shape[:-1], layer.out_features)


def _summed_rows(grad: Tensor) -> Tensor:
    """`grad.sum(0)`: a bias's gradient."""
    found = grad.tape.empty(grad.shape[1:], grad.dtype)
    reduce(grad, (0,))
    return found


def int8_package(layer: Layer, x: Tensor, weights: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """Q-GaLore's linear (utils/quantization.py, W8Linear): as ours, but the matrix is made in every backward pass, a
    bias is added to the product in a new tensor, and its gradient is summed first."""
    weight = weights[0]
    tape = x.tape
    rows = reshape(x, -1, x.shape[-1])
    shape_x, shape_w = rows.shape, weight.shape

    def backward(saved: Sequence[Tensor], grads: Sequence[Tensor | None]) -> Grads:
        grad = grads[0]
        assert grad is not None
        matrix = tape.empty(shape_w, grad.dtype)
        grad_x = tape.empty(shape_x, grad.dtype)
        del matrix
        grad_bias = None if bias is None else _summed_rows(grad)
        return grad_x, tape.empty(shape_w, grad.dtype), grad_bias

    node = tape.node("W8LinearBackward", (rows, weight, bias), (rows, weight), backward)
    matrix = tape.empty(shape_w, x.dtype)
    out = tape.empty((rows.shape[0], layer.out_features), x.dtype)
    if bias is not None:
        out = tape.empty(out.shape, out.dtype)
    del matrix
    tape.bind(node, out)
    return view(out, *x.shape[:-1], layer.out_features)


LINEARS: dict[str, LinearForward] = {
    "dense": dense, "low-rank": low_rank, "lora": lora, "nf4": nf4, "int8": int8, "int8-package": int8_package,
}  # fmt: skip
