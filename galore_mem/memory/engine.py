"""The backward pass: autograd's order, and its rules of who owns a gradient.

Nodes run latest created first, gradient accumulation as soon as it is ready (torch/csrc/autograd/engine.cpp).
A node's incoming gradients live until it has run; what it saved is released afterwards; gradients that meet
are added in place where nobody else holds the first. Who holds what is asked of Python's reference counts, as
the engine asks its own: so a backward function keeps no tensor in its closure, and where autograd passes a
gradient through it returns the very object it was given.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from sys import getrefcount
from typing import TYPE_CHECKING, cast

from galore_mem.dtypes import FLOAT32, DType
from galore_mem.memory.reductions import reduce
from galore_mem.memory.strides import Shape, is_dense, result_strides
from galore_mem.memory.tensor import GRADIENTS, Grads, Node, Storage, Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from galore_mem.memory.tape import Tape

Incoming = dict[Node, list[Tensor | None]]

_FIRST = 2**62  # gradient accumulation comes before any other ready node


class Parameter:
    """A leaf that the model owns: its weight and its gradient. The graph knows it weakly: keep it while it is needed.

    `hook`, when set, runs after each accumulation (a post-accumulate-grad hook: the layer-wise update).
    """

    __slots__ = ("__weakref__", "grad", "hook", "name", "weight")

    def __init__(self, name: str, weight: Tensor) -> None:
        self.name = name
        self.weight = weight
        self.grad: Tensor | None = None
        self.hook: Callable[[Parameter], None] | None = None

    def tensor(self) -> Tensor:
        """The weight as an input of operations."""
        weight = self.weight
        if weight.requires_grad and weight.node is None:
            node = Node(weight.tape, "AccumulateGrad", [], 1, _no_backward)
            node.sequence = _FIRST
            weight.tape.leaves[node] = self
            weight.node = node
        return weight

    def accumulate(self, grads: list[Tensor | None]) -> None:
        """Takes over the gradient in `grads` or copies it, when there is none yet; otherwise adds it in place.

        It is taken over if nothing else refers to it and it lies in memory as the weight does; a view is, and
        keeps its whole storage alive (accumulate_grad.h, accumulateGrad). When the hook runs, nothing else holds what
        came (accumulate_grad.cpp, AccumulateGrad_apply_impl, which has returned).
        """
        tensors, _ = _owners(grads, 0)
        grad, grads[0] = grads[0], None
        if grad is None:
            return
        if self.grad is None:
            if tensors == _SOLE_OWNER[0] and _obeys_layout(grad, self.weight):
                grad.storage.move(GRADIENTS)
                self.grad = grad.detach()
            else:
                strides = self.weight.strides if is_dense(*self.weight.layout) else None
                self.grad = grad.tape.empty(grad.shape, grad.dtype, GRADIENTS, strides)
        del grad
        if self.hook is not None:
            self.hook(self)


def _obeys_layout(grad: Tensor, weight: Tensor) -> bool:
    """The gradient has the weight's strides, or is contiguous where those have gaps (grad_layout_contract.h)."""
    if not is_dense(*weight.layout):
        return grad.is_contiguous
    return all(
        own == wanted if size != 1 else own != 0
        for size, own, wanted in zip(grad.shape, grad.strides, weight.strides, strict=True)
    )


def _no_backward(saved: Sequence[Tensor], grads: Sequence[Tensor | None]) -> Grads:
    return ()


def run_backward(tape: Tape, loss: Tensor, on_node: Callable[[Node], None] | None) -> None:
    """Runs the graph of `loss`. Its first gradient is held to the end (torch/autograd/__init__.py, backward)."""
    root = loss.node
    if root is None:
        return
    seed = tape.empty(loss.shape, loss.dtype)
    incoming: Incoming = {root: [None] * root.outputs}
    incoming[root][loss.index] = seed
    waiting = _dependencies(root)
    # latest first; among equals (leaves that became ready together) in order of arrival
    ready: list[tuple[int, int, Node]] = [(-root.sequence, 0, root)]
    arrival = 0
    while ready:
        node = heappop(ready)[2]
        if on_node is not None:
            on_node(node)
        for target in _run(tape, node, incoming, waiting):
            arrival += 1
            heappush(ready, (-target.sequence, arrival, target))


def _run(tape: Tape, node: Node, incoming: Incoming, waiting: dict[Node, int]) -> list[Node]:
    """Runs one node, hands its results on, and says which nodes became ready (engine.cpp, evaluate_function)."""
    if node.sequence == _FIRST:
        tape.leaves[node].accumulate(incoming.pop(node))
        return []
    results = _apply(tape, node, incoming.pop(node))
    for saved in node.saved:
        saved.release()
    node.saved.clear()
    ready = []
    for i, edge in enumerate(node.edges):
        if edge is None:
            continue
        target, index = edge[:2]
        slots = incoming.get(target)
        if slots is None:
            slots = incoming[target] = [None] * target.outputs
        if slots[index] is None:
            slots[index], results[i] = results[i], None
        else:
            _add(tape, slots, index, results[i])
        waiting[target] -= 1
        if not waiting[target]:
            ready.append(target)
    return ready


def _apply(tape: Tape, node: Node, grads: list[Tensor | None]) -> list[Tensor | None]:
    """The node's results, fitted to its inputs; afterwards nothing here holds the incoming gradients."""
    results: list[Tensor | None] = []
    if grads[0] is not None or any(grad is not None for grad in grads):
        results += node.backward([t for held in node.saved for t in held.unpack()], grads)
    results += [None] * (len(node.edges) - len(results))
    for i, edge in enumerate(node.edges):
        if edge is not None:
            grad = results[i]
            if grad is not None and (grad.shape != edge[2] or grad.dtype is not edge[3]):
                del grad
                _fit(tape, results, i, edge[2], edge[3])
    return results


def _fit(tape: Tape, results: list[Tensor | None], i: int, shape: Shape, dtype: DType) -> None:
    """Sums a gradient over dimensions that were broadcast, then casts it to the input's format (engine.cpp,
    validate_outputs). A leading dimension of size 1 is summed too, into a new tensor (ExpandUtils.h, _sum_to)."""
    grad = results[i]
    assert grad is not None
    if grad.shape != shape:
        leading = len(grad.shape) - len(shape)
        summed = tape.empty(shape, grad.dtype)
        reduce(grad, (*range(leading), *_broadcast(grad.shape[leading:], shape, leading)))
        results[i] = grad = summed.like(shape) if leading else summed
        del summed
    if grad.dtype is not dtype:
        results[i] = tape.empty(shape, dtype, strides=result_strides(shape, grad.layout))


def _broadcast(shape: Shape, wanted: Shape, first: int) -> list[int]:
    """The dimensions that were expanded from 1, counted from `first` on."""
    return [first + i for i, (n, size) in enumerate(zip(shape, wanted, strict=True)) if size == 1 != n]


def _add(tape: Tape, slots: list[Tensor | None], index: int, grad: Tensor | None) -> None:
    """A second gradient for one value is added to the first in place, unless the first or its storage has
    another owner, as a view always has; then the sum is a new tensor (input_buffer.cpp, can_accumulate_inplace).
    Either way the second one lives until the node that made it has handed on all its results."""
    sole = _owners(slots, index) == _SOLE_OWNER
    held = slots[index]
    if held is None or grad is None:
        return
    if not sole or held.is_view:
        slots[index] = tape.empty(held.shape, held.dtype, strides=result_strides(held.shape, held.layout, grad.layout))


def _owners(slots: list[Tensor | None], index: int) -> tuple[int, int]:
    """Reference counts of a held gradient and of its storage, as seen from here."""
    held = slots[index]
    return (0, 0) if held is None else (getrefcount(held), getrefcount(held.storage))


# what `_owners` says of a gradient that nothing else holds (interpreters differ in what they count)
_SOLE_OWNER = _owners([Tensor(cast("Storage", object()), (), FLOAT32)], 0)


def _dependencies(root: Node) -> dict[Node, int]:
    """How many gradients each node of the graph will receive."""
    waiting: dict[Node, int] = {}
    seen = {root}
    stack = [root]
    while stack:
        for edge in stack.pop().edges:
            if edge is not None:
                waiting[edge[0]] = waiting.get(edge[0], 0) + 1
                if edge[0] not in seen:
                    seen.add(edge[0])
                    stack.append(edge[0])
    return waiting
