"""A torch-free twin of eager autograd's memory: storages, tensors, the graph and its backward pass.

A `Tensor` is a shape, strides, a dtype and a reference to a `Storage`; there are no values. Python's own
reference counts free a storage when the last tensor (or saved reference) goes, which is when eager
PyTorch frees it, so code that is written like the real code has the real code's peaks. The `Tape`
counts the live bytes by category and remembers, for each segment of the program, the moment they
were highest.

The backward pass runs nodes in autograd's order (torch/csrc/autograd/engine.cpp: latest created first,
gradient accumulation as soon as it is ready), keeps a node's incoming gradients until it has run,
releases what it saved afterwards, and adds gradients that meet in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from heapq import heappop, heappush
from math import prod
from sys import getrefcount
from typing import TYPE_CHECKING, Protocol

from galore_mem.dtypes import DType

if TYPE_CHECKING:
    from collections.abc import Iterator

Shape = tuple[int, ...]

CATEGORIES = ("weights", "gradients", "optimizer_state", "activations", "temporaries")
WEIGHTS, GRADIENTS, OPTIMIZER_STATE, ACTIVATIONS, TEMPORARIES = range(5)

# A segment of the program: (phase, stage within it, layer number or a name for what lies outside the layers).
Segment = tuple[str, int, int | str]
Bytes = tuple[int, int, int, int, int]


class Storage:
    """Bytes that live as long as something refers to them."""

    __slots__ = ("category", "nbytes", "saves", "tape")

    def __init__(self, tape: Tape, nbytes: int, category: int) -> None:
        self.tape = tape
        self.nbytes = nbytes
        self.category = category
        self.saves = 0
        tape._grow(category, nbytes)

    def __del__(self) -> None:
        self.tape.live[self.category] -= self.nbytes
        self.tape.total -= self.nbytes

    def move(self, category: int) -> None:
        """Count these bytes under another category from now on."""
        self.tape.live[self.category] -= self.nbytes
        self.tape.live[category] += self.nbytes
        self.category = category

    def save(self) -> None:
        """Autograd keeps this storage for backward: a temporary becomes an activation."""
        self.saves += 1
        if self.category == TEMPORARIES:
            self.move(ACTIVATIONS)

    def unsave(self) -> None:
        self.saves -= 1
        if not self.saves and self.category == ACTIVATIONS:
            self.move(TEMPORARIES)


def contiguous_strides(shape: Shape) -> Shape:
    strides = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


class Tensor:
    """A view of a storage: shape and strides in elements, dtype, and the node that made it."""

    __slots__ = ("dtype", "index", "node", "requires_grad", "shape", "storage", "strides")

    def __init__(
        self,
        storage: Storage,
        shape: Shape,
        dtype: DType,
        strides: Shape | None = None,
        *,
        requires_grad: bool = False,
    ) -> None:
        self.storage = storage
        self.shape = shape
        self.dtype = dtype
        self.strides = contiguous_strides(shape) if strides is None else strides
        self.requires_grad = requires_grad
        self.node: Node | None = None
        self.index = 0

    @property
    def tape(self) -> Tape:
        return self.storage.tape

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def is_contiguous(self) -> bool:
        step = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1:
                if stride != step:
                    return False
                step *= size
        return True

    def detach(self) -> Tensor:
        """The same storage without the graph."""
        return Tensor(self.storage, self.shape, self.dtype, self.strides)

    def like(self, shape: Shape, strides: Shape | None = None) -> Tensor:
        """Another view of the same storage, without the graph."""
        return Tensor(self.storage, shape, self.dtype, strides)


Grads = tuple[Tensor | None, ...]
# (saved tensors, incoming gradients) -> one gradient for each input
Backward = Callable[[Sequence[Tensor], Sequence[Tensor | None]], Grads]


class Node:
    """One recorded operation: where its gradients go and what it keeps until backward.

    `edges` names, for each input that wants a gradient, the node that made it, and the shape and dtype
    the gradient must have (the engine sums and casts what a backward returns to fit: validate_outputs).
    """

    __slots__ = ("backward", "edges", "name", "outputs", "saved", "sequence")

    def __init__(self, tape: Tape, name: str, edges: list[Edge | None], outputs: int, backward: Backward) -> None:
        tape.sequence += 1
        self.sequence = tape.sequence
        self.name = name
        self.edges = edges
        self.outputs = outputs
        self.saved: list[Held] = []
        self.backward = backward


Edge = tuple[Node, int, Shape, DType]


class Held(Protocol):
    """What a node holds for its backward pass: tensors, or the promise to recompute them."""

    def unpack(self) -> Sequence[Tensor]: ...

    def release(self) -> None: ...


class Packer(Protocol):
    """Decides what becomes of a tensor that an operation saves: kept, or promised."""

    def pack(self, tensors: Sequence[Tensor]) -> Held: ...


class Saved:
    """Tensors an operation keeps for its backward pass."""

    __slots__ = ("tensors",)

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors: Sequence[Tensor] = [t.detach() for t in tensors]
        for t in self.tensors:
            t.storage.save()

    def unpack(self) -> Sequence[Tensor]:
        return self.tensors

    def release(self) -> None:
        for t in self.tensors:
            t.storage.unsave()
        self.tensors = ()


class Parameter:
    """A leaf that the model owns: its weight, its gradient, and the node that accumulates into it.

    `hook`, when set, runs after each accumulation (a post-accumulate-grad hook: the layer-wise update).
    """

    __slots__ = ("_accumulate", "grad", "hook", "name", "weight")

    def __init__(self, name: str, weight: Tensor) -> None:
        self.name = name
        self.weight = weight
        self.grad: Tensor | None = None
        self.hook: Callable[[Parameter], None] | None = None
        self._accumulate: Node | None = None

    def tensor(self) -> Tensor:
        """The weight as an input of operations."""
        weight = self.weight
        if weight.requires_grad and weight.node is None:
            node = Node(weight.tape, "AccumulateGrad", [], 0, _no_backward)
            node.sequence = _FIRST
            weight.tape.leaves[node] = self
            weight.node = node
        return weight

    def accumulate(self, grad: Tensor) -> None:
        """Takes the gradient over when there is none yet, otherwise adds it in place (accumulate_grad.h)."""
        if self.grad is None:
            grad.storage.move(GRADIENTS)
            self.grad = Tensor(grad.storage, self.weight.shape, grad.dtype, grad.strides)
        if self.hook is not None:
            self.hook(self)


def _no_backward(saved: Sequence[Tensor], grads: Sequence[Tensor | None]) -> Grads:
    return ()


_FIRST = 2**62  # gradient accumulation comes before any other ready node


@dataclass(slots=True)
class Peak:
    """The highest moment of a segment."""

    total: int
    live: Bytes


class Tape:
    """Counts live bytes by category, records the graph, runs backward."""

    def __init__(self, granularity: int = 1, device: str = "cuda") -> None:
        self.granularity = granularity
        self.device = device
        self.live = [0, 0, 0, 0, 0]
        self.total = 0
        self.peaks: dict[Segment, Peak] = {}
        self.sequence = 0
        self.grad_enabled = True
        self.autocast: DType | None = None
        self.autocast_cache: dict[int, Tensor] = {}
        self.frame: Packer | None = None
        self.leaves: dict[Node, Parameter] = {}
        self._peak = Peak(0, (0, 0, 0, 0, 0))
        self.mark("start", 0, "start")

    # -- memory ------------------------------------------------------------------------------------

    def _grow(self, category: int, nbytes: int) -> None:
        self.live[category] += nbytes
        self.total += nbytes
        if self.total > self._peak.total:
            self._peak.total = self.total
            self._peak.live = tuple(self.live)  # type: ignore[assignment]  # five categories, always

    def mark(self, phase: str, stage: int, layer: int | str) -> None:
        """From here on, peaks belong to this segment (entered again, it keeps its highest moment)."""
        peak = self.peaks.get((phase, stage, layer))
        if peak is None:
            peak = self.peaks[phase, stage, layer] = Peak(-1, (0, 0, 0, 0, 0))
        self._peak = peak
        if self.total > peak.total:
            peak.total = self.total
            peak.live = tuple(self.live)  # type: ignore[assignment]  # five categories, always

    def nbytes(self, shape: Iterable[int], dtype: DType) -> int:
        """What the allocator takes for a dense tensor: its bytes, rounded up to the allocator's granularity."""
        n = dtype.nbytes(shape)
        return -(-n // self.granularity) * self.granularity

    def empty(self, shape: Shape, dtype: DType, category: int = TEMPORARIES, strides: Shape | None = None) -> Tensor:
        """A new tensor with a storage of its own."""
        return Tensor(Storage(self, self.nbytes(shape, dtype), category), shape, dtype, strides)

    def bytes(self, n: int, category: int = TEMPORARIES) -> Storage:
        """n raw bytes (a kernel's workspace)."""
        return Storage(self, -(-n // self.granularity) * self.granularity, category)

    # -- graph -------------------------------------------------------------------------------------

    def node(
        self,
        name: str,
        inputs: Sequence[Tensor | None],
        saved: Sequence[Tensor],
        backward: Backward,
        outputs: int = 1,
    ) -> Node | None:
        """Records an operation before it runs, as autograd does: its inputs are saved, then the kernel allocates.

        None when no input wants a gradient; then nothing is kept.
        """
        if not self.grad_enabled or not any(t is not None and t.requires_grad for t in inputs):
            return None
        edges = [(t.node, t.index, t.shape, t.dtype) if t is not None and t.node is not None else None for t in inputs]
        node = Node(self, name, edges, outputs, backward)
        if saved:
            self.save(node, saved)
        return node

    def save(self, node: Node | None, tensors: Sequence[Tensor]) -> None:
        """The node keeps these tensors until it has run backward."""
        if node is not None:
            node.saved.append(self.frame.pack(tensors) if self.frame is not None else Saved(tensors))

    def bind(self, node: Node | None, *outputs: Tensor) -> None:
        """Makes the tensors the outputs of the node."""
        if node is not None:
            for i, out in enumerate(outputs):
                out.requires_grad = True
                out.node = node
                out.index = i

    @contextmanager
    def no_grad(self) -> Iterator[None]:
        before, self.grad_enabled = self.grad_enabled, False
        try:
            yield
        finally:
            self.grad_enabled = before

    @contextmanager
    def autocast_region(self, dtype: DType | None) -> Iterator[None]:
        """Lower-precision region; the casts of weights it caches are dropped when it ends."""
        before, self.autocast = self.autocast, dtype
        try:
            yield
        finally:
            self.autocast = before
            if before is None:
                self.autocast_cache.clear()

    def backward(self, loss: Tensor, on_node: Callable[[Node], None] | None = None) -> None:
        """Runs the graph of `loss` backward; gradients end in the parameters' `grad`."""
        root = loss.node
        if root is None:
            return
        waiting = _dependencies(root)
        incoming: Incoming = {root: [None] * root.outputs}
        incoming[root][loss.index] = self.empty(loss.shape, loss.dtype)
        with self.no_grad():
            ready: list[tuple[int, Node]] = [(-root.sequence, root)]
            while ready:
                node = heappop(ready)[1]
                if on_node is not None:
                    on_node(node)
                self._run(node, incoming, waiting, ready)

    def _run(self, node: Node, incoming: Incoming, waiting: dict[Node, int], ready: list[tuple[int, Node]]) -> None:
        parameter = self.leaves.get(node)
        if parameter is not None:
            grad = incoming.pop(node)[0]
            if grad is not None:
                parameter.accumulate(grad)
            return
        results = _apply(self, node, incoming.pop(node))
        for saved in node.saved:
            saved.release()
        node.saved.clear()
        results.reverse()
        for edge in node.edges:
            grad = results.pop() if results else None
            if edge is None:
                continue
            target, index = edge[:2]
            slots = incoming.setdefault(target, [None] * max(target.outputs, 1))
            if grad is not None:
                if slots[index] is None:
                    slots[index] = grad
                else:
                    self._add(slots, index)
            grad = None
            waiting[target] -= 1
            if not waiting[target]:
                heappush(ready, (-target.sequence, target))

    def _add(self, slots: list[Tensor | None], index: int) -> None:
        """A second gradient for one value is added to the first in place, unless the first or its storage
        has another owner; then the sum is a new tensor (input_buffer.cpp, can_accumulate_inplace)."""
        if _owners(slots, index) != _SOLE_OWNER:
            held = slots[index]
            assert held is not None
            slots[index] = self.empty(held.shape, held.dtype)

    def fit(self, grad: Tensor, shape: Shape, dtype: DType) -> Tensor:
        """A gradient summed over broadcast dimensions and cast to what the input was (validate_outputs)."""
        if grad.shape != shape:
            if grad.numel == prod(shape):
                grad = grad.like(shape, contiguous_strides(shape))
            else:
                grad = self.empty(shape, grad.dtype)
        if grad.dtype is not dtype:
            grad = self.empty(shape, dtype, strides=grad.strides)
        return grad


Incoming = dict[Node, list[Tensor | None]]


def _owners(slots: list[Tensor | None], index: int) -> tuple[int, int]:
    """Reference counts of a held gradient and of its storage, as seen from here."""
    held = slots[index]
    assert held is not None
    return getrefcount(held), getrefcount(held.storage)


def _sole_owner() -> tuple[int, int]:
    """What `_owners` says of a gradient that nothing else holds (interpreters differ in what they count)."""
    tape = Tape()
    return _owners([Tensor(Storage(tape, 0, TEMPORARIES), (), _PROBE)], 0)


def _apply(tape: Tape, node: Node, grads: list[Tensor | None]) -> list[Tensor | None]:
    """The node's backward, its results fitted to the inputs; afterwards nothing here holds the incoming gradients."""
    saved = [t for held in node.saved for t in held.unpack()]
    results = list(node.backward(saved, grads))
    for i, edge in enumerate(node.edges):
        grad = results[i] if i < len(results) else None
        if edge is not None and grad is not None:
            results[i] = tape.fit(grad, edge[2], edge[3])
    return results


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


_PROBE = DType("probe", 8)
_SOLE_OWNER = _sole_owner()
