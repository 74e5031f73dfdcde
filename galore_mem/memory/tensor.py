"""Storages, tensors and the nodes of the graph: what the tape counts and what the engine runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import TYPE_CHECKING, Protocol

from galore_mem.dtypes import DType
from galore_mem.memory.strides import Shape, contiguous_strides, is_contiguous

if TYPE_CHECKING:
    from galore_mem.memory.tape import Tape

CATEGORIES = ("weights", "gradients", "optimizer_state", "activations", "temporaries")
WEIGHTS, GRADIENTS, OPTIMIZER_STATE, ACTIVATIONS, TEMPORARIES = range(5)


class Storage:
    """Bytes that live as long as something refers to them."""

    __slots__ = ("category", "nbytes", "number", "saves", "tape")

    def __init__(self, tape: Tape, nbytes: int, category: int) -> None:
        self.tape = tape
        self.nbytes = nbytes
        self.category = category
        self.saves = 0
        self.number = -1 if tape.log is None else tape.log.born(nbytes, category)
        tape._grow(category, nbytes)

    def __del__(self) -> None:
        self.tape.live[self.category] -= self.nbytes
        self.tape.total -= self.nbytes
        if self.number >= 0 and self.tape.log is not None:
            self.tape.log.events.append(~self.number)

    def move(self, category: int) -> None:
        """Count these bytes under another category from now on."""
        self.tape.live[self.category] -= self.nbytes
        self.tape.live[category] += self.nbytes
        self.category = category
        if self.number >= 0 and category != TEMPORARIES and self.tape.log is not None:
            self.tape.log.categories[self.number] = category

    def save(self) -> None:
        """Autograd keeps this storage for backward: a temporary becomes an activation."""
        self.saves += 1
        if self.category == TEMPORARIES:
            self.move(ACTIVATIONS)

    def unsave(self) -> None:
        self.saves -= 1
        if not self.saves and self.category == ACTIVATIONS:
            self.move(TEMPORARIES)

    def forget(self) -> None:
        """As `unsave`, for a storage that is read a last time and then dropped."""
        self.saves -= 1


class Tensor:
    """Shape and strides (in elements) over a storage, a dtype, and the node that made it.

    `is_view`: made from another tensor by a view operation. Autograd then keeps that tensor as the view's base, so
    that the view is never the only owner of its storage (torch/csrc/autograd/variable.h, ViewInfo).
    """

    __slots__ = ("dtype", "index", "is_view", "node", "requires_grad", "shape", "storage", "strides")

    def __init__(
        self,
        storage: Storage,
        shape: Shape,
        dtype: DType,
        strides: Shape | None = None,
        *,
        requires_grad: bool = False,
        is_view: bool = False,
    ) -> None:
        self.storage = storage
        self.shape = shape
        self.dtype = dtype
        self.strides = contiguous_strides(shape) if strides is None else strides
        self.requires_grad = requires_grad
        self.node: Node | None = None
        self.index = 0
        self.is_view = is_view

    @property
    def tape(self) -> Tape:
        return self.storage.tape

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def is_contiguous(self) -> bool:
        return is_contiguous(self.shape, self.strides)

    @property
    def layout(self) -> tuple[Shape, Shape]:
        return self.shape, self.strides

    def detach(self) -> Tensor:
        """The same storage without the graph."""
        return Tensor(self.storage, self.shape, self.dtype, self.strides)

    def like(self, shape: Shape, strides: Shape | None = None) -> Tensor:
        """Another view of the same storage, without the graph."""
        return Tensor(self.storage, shape, self.dtype, strides, is_view=True)


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
