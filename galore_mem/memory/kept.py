"""What one layer keeps for backward, tensor by tensor: the reason for a model's activations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from galore_mem.dtypes import DType
from galore_mem.memory.checkpoint import Promise
from galore_mem.memory.network import BEFORE, Network
from galore_mem.memory.phases import Work
from galore_mem.memory.tape import WEIGHTS, Node, Saved, Shape, Tensor


class KeptTensor(NamedTuple):
    """A storage that a layer keeps: the operations that saved it (in forward order), a tensor on it, its bytes, and
    whether other layers keep the same one."""

    operations: tuple[str, ...]
    shape: Shape
    dtype: DType
    nbytes: int
    shared: bool


def kept_by_layer(work: Work) -> tuple[KeptTensor, ...]:
    """The storages that a layer in the middle of the model keeps from forward to backward, largest first.

    With checkpointing, the layer's input. Weights are not among them. Empty where the forward pass is not known.
    """
    if work.forward is None:
        return ()
    layers = min(work.model.num_layers, 3)
    tape = work.tape()
    network = Network(tape, work.layout(), layers, work.setup)
    network.enter("forward", BEFORE)
    with tape.autocast_region(work.setup.recipe.autocast):
        loss, _ = work.forward(network, network.ids(), network.labels())
    found: dict[int, tuple[list[str], Tensor]] = {}
    elsewhere: set[int] = set()
    for node in sorted(_nodes(loss), key=lambda n: n.sequence):
        if node in tape.leaves:
            continue
        here = network.where(node.sequence) == min(1, layers - 1)
        for tensor in _tensors(node):
            if tensor.storage.category != WEIGHTS:
                if here:
                    names, _ = found.setdefault(id(tensor.storage), ([], tensor))
                    names.append(node.name.removesuffix("Backward"))
                elif network.where(node.sequence) in range(layers):
                    elsewhere.add(id(tensor.storage))
    kept = [
        KeptTensor(tuple(dict.fromkeys(names)), t.shape, t.dtype, t.storage.nbytes, key in elsewhere)
        for key, (names, t) in found.items()
    ]
    return tuple(sorted(kept, key=lambda k: -k.nbytes))


def _nodes(loss: Tensor) -> Iterator[Node]:
    if loss.node is None:
        return
    seen, stack = {loss.node}, [loss.node]
    while stack:
        node = stack.pop()
        yield node
        for edge in node.edges:
            if edge is not None and edge[0] not in seen:
                seen.add(edge[0])
                stack.append(edge[0])


def _tensors(node: Node) -> Iterator[Tensor]:
    for held in node.saved:
        if isinstance(held, Saved):
            yield from held.tensors
        elif isinstance(held, Promise):
            yield from held.frame.kept
