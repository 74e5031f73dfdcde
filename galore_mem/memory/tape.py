"""A torch-free twin of eager autograd's memory.

A `Tensor` is a shape, strides, a dtype and a reference to a `Storage`; there are no values. Python's own
reference counts free a storage when the last tensor (or saved reference) goes, which is when eager
PyTorch frees it, so code that is written like the real code has the real code's peaks. The `Tape`
counts the live bytes by category, remembers, for each segment of the program, the moment they were
highest, and records the graph that `backward` runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from galore_mem.dtypes import DType
from galore_mem.memory.engine import Parameter, run_backward
from galore_mem.memory.strides import Shape, contiguous_strides
from galore_mem.memory.tensor import (
    ACTIVATIONS,
    CATEGORIES,
    GRADIENTS,
    OPTIMIZER_STATE,
    TEMPORARIES,
    WEIGHTS,
    Backward,
    Edge,
    Grads,
    Held,
    Node,
    Packer,
    Saved,
    Storage,
    Tensor,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "ACTIVATIONS",
    "CATEGORIES",
    "GRADIENTS",
    "OPTIMIZER_STATE",
    "TEMPORARIES",
    "WEIGHTS",
    "Backward",
    "Bytes",
    "Edge",
    "Grads",
    "Held",
    "Node",
    "Packer",
    "Parameter",
    "Peak",
    "Saved",
    "Segment",
    "Shape",
    "Storage",
    "Tape",
    "Tensor",
    "contiguous_strides",
]

# A segment of the program: (phase, stage within it, layer number or a name for what lies outside the layers).
Segment = tuple[str, int, int | str]
Bytes = tuple[int, int, int, int, int]


@dataclass(slots=True)
class Peak:
    """The highest moment of a segment."""

    total: int
    live: Bytes


class Log:
    """Every event of a program in order, as `galore_mem.simulate.trace.Trace` has them: the number of a storage that is
    made, the complement of one that goes; sizes and categories by number (the last but `temporaries` that a storage
    had); where phases begin. `called` says what a phase is called (None: as it is); `stored` are the names and formats
    of the model's tensors, by number."""

    def __init__(self) -> None:
        self.events: list[int] = []
        self.sizes: list[int] = []
        self.categories: list[int] = []
        self.marks: list[tuple[int, str]] = []
        self.called: str | None = None
        self.stored: dict[int, tuple[str, DType]] = {}

    def born(self, nbytes: int, category: int) -> int:
        """The storage's number; -1 of one without bytes, which no allocator sees."""
        if not nbytes:
            return -1
        self.events.append(len(self.sizes))
        self.sizes.append(nbytes)
        self.categories.append(category)
        return len(self.sizes) - 1

    def mark(self, phase: str) -> None:
        phase = self.called or phase
        if not self.marks or self.marks[-1][1] != phase:
            self.marks.append((len(self.events), phase))


class Tape:
    """Counts live bytes by category, records the graph, runs backward."""

    def __init__(
        self, granularity: int = 1, device: str = "cuda", capability: tuple[int, int] | None = None
    ) -> None:  # the card's compute capability, where it is known
        self.granularity = granularity
        self.device = device
        self.capability = capability
        self.live = [0, 0, 0, 0, 0]
        self.total = 0
        self.peaks: dict[Segment, Peak] = {}
        self.sequence = 0
        self.grad_enabled = True
        self.autocast: DType | None = None
        self.autocast_cache: dict[int, Tensor] = {}
        self.frame: Packer | None = None
        self.log: Log | None = None  # every event, where it was asked for
        self.kernels: set[str] = set()  # attention kernels that ran
        self.workspace = 0  # bytes that a thread's first matrix product takes for the library (0: it has them already)
        self._workspaces: dict[bool, Storage] = {}  # by whether it is autograd's thread
        self._in_backward = False
        self.leaves: WeakValueDictionary[Node, Parameter] = WeakValueDictionary()
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
        if self.log is not None:
            self.log.mark(phase)
        self._peak = peak
        if self.total > peak.total:
            peak.total = self.total
            peak.live = tuple(self.live)  # type: ignore[assignment]  # five categories, always

    def nbytes(self, shape: Iterable[int], dtype: DType) -> int:
        """What the allocator takes for a dense tensor: its bytes, rounded up to the allocator's granularity."""
        return -(prod(shape) * dtype.bits // -8 // self.granularity) * self.granularity

    def empty(self, shape: Shape, dtype: DType, category: int = TEMPORARIES, strides: Shape | None = None) -> Tensor:
        """A new tensor with a storage of its own."""
        return Tensor(Storage(self, self.nbytes(shape, dtype), category), shape, dtype, strides)

    def converted(self, t: Tensor, dtype: DType) -> Tensor | None:
        """The copy of an operand that a kernel makes because it works on one format: on the CPU only."""
        return self.empty(t.shape, dtype) if self.device == "cpu" else None

    def bytes(self, n: int, category: int = TEMPORARIES) -> Storage:
        """n raw bytes (a kernel's workspace)."""
        return Storage(self, -(-n // self.granularity) * self.granularity, category)

    def multiplied(self, product: Tensor) -> Tensor:
        """A matrix product that has its storage, hence runs. cuBLAS keeps a workspace for each handle, and each thread
        has a handle of its own (cuda/CublasHandlePool.cpp); backward runs in a thread of autograd's."""
        if self.workspace and self._in_backward not in self._workspaces:
            self._workspaces[self._in_backward] = self.bytes(self.workspace)
        return product

    def close(self) -> None:
        """Logs no more, and lets go of what libraries keep."""
        self.log = None
        self._workspaces.clear()

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
        self._in_backward = True
        with self.no_grad():
            run_backward(self, loss, on_node)
        self._in_backward = False
