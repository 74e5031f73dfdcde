"""Leaves of ten numbers, and what backward does with them."""

from __future__ import annotations

from galore_mem.dtypes import FLOAT32
from galore_mem.memory.tape import WEIGHTS, Node, Parameter, Shape, Tape, Tensor

N = 4 * 10  # bytes of ten float32 numbers


def leaf(tape: Tape, shape: Shape = (10,), strides: Shape | None = None) -> Parameter:
    weight = tape.empty(shape, FLOAT32, WEIGHTS, strides)
    weight.requires_grad = True
    return Parameter("leaf", weight)


def names(tape: Tape, loss: Tensor) -> list[str]:
    """Nodes in the order in which backward runs them."""
    found: list[str] = []

    def note(node: Node) -> None:
        found.append(node.name.removesuffix("Backward"))

    tape.backward(loss, note)
    return found


def highest(tape: Tape, loss: Tensor) -> int:
    """The most bytes above those at the start while backward runs."""
    tape.mark("backward", 0, "all")
    start = tape.total
    tape.backward(loss)
    return tape.peaks["backward", 0, "all"].total - start
