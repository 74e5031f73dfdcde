"""A model laid out on a tape: its parameters, as an implementation stores them, and its layers.

`Network` is what a family's `forward` is written against. It expands the model to a chosen number of
layers; see `galore_mem.memory.phases` for why three and four are enough for any depth.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from typing import Any

from galore_mem.dtypes import INT64, DType
from galore_mem.memory.checkpoint import checkpoint
from galore_mem.memory.linears import LINEARS
from galore_mem.memory.tape import ACTIVATIONS, WEIGHTS, Parameter, Shape, Tape, Tensor
from galore_mem.methods.base import Implementation, Job, Slot, Stored, Trained
from galore_mem.setup import Setup
from galore_mem.spec.model import Block, ModelSpec, ParamSpec, is_target

BEFORE, AFTER = "before", "after"


def scaled_blocks(model: ModelSpec, layers: int) -> Iterator[tuple[Block, int, int | str]]:
    """The model's blocks at another depth: (block, repeats, position), position being `BEFORE` or `AFTER` the
    stack of identical layers, or `-1` for the stack itself (rows are then numbered)."""
    depth = model.num_layers
    position: int | str = BEFORE
    for block in model.blocks:
        if block.repeat == depth and depth > 1 and position == BEFORE:
            yield block, layers, -1
            position = AFTER
        else:
            yield block, block.repeat, position


def rows_at(model: ModelSpec, layers: int) -> Iterator[tuple[ParamSpec, int | str]]:
    """Every parameter row of the model with `layers` layers, and the layer (or `BEFORE`/`AFTER`) it belongs to."""
    for block, repeat, position in scaled_blocks(model, layers):
        for i in range(repeat):
            number = str(block.start + i)
            for row in block.rows:
                named = ParamSpec(row.name.replace("{i}", number), row.shape, row.role, row.module)
                yield named, (i if position == -1 else position)


class Network:
    """Parameters on a tape. `trained` lists what the optimizer will see, in its order."""

    def __init__(
        self,
        tape: Tape,
        model: ModelSpec,
        layers: int,
        implementation: Implementation,
        job: Job,
        setup: Setup,
        targets: tuple[str, ...] | None,
    ) -> None:
        self.tape = tape
        self.model = model
        self.layer_count = layers
        self.setup = setup
        self.config: Any = model.config
        self.head_dim = model.heads.head_dim if model.heads else 0
        self.trained: list[tuple[Trained, Parameter, int | str]] = []
        self._linear = implementation.linear
        self._stored: dict[str, list[Parameter]] = {}
        self._width: dict[str, int] = {}
        self._projected: set[str] = set()
        self._boundaries: list[int] = []
        self._segments: list[int | str] = []
        for row, layer in rows_at(model, layers):
            self._add(row, layer, is_target(row, targets), implementation, job)

    def _add(self, row: ParamSpec, layer: int | str, projected: bool, code: Implementation, job: Job) -> None:
        if projected:
            self._projected.add(row.name)
        if row.is_matrix_of_linear:
            self._width[row.name] = row.shape[1] if row.module == "conv1d" else row.shape[0]
        for stored in code.store(row, projected, job):
            parameter = self._place(row, stored)
            self._stored.setdefault(row.name, []).append(parameter)
            if stored.grad is not None:
                trained = trained_as(row, stored, projected, job)
                self.trained.append((trained, parameter, layer))

    def _place(self, row: ParamSpec, stored: Stored) -> Parameter:
        storage = self.tape.bytes(stored.dtype.nbytes(stored.shape), WEIGHTS)
        # operations see a quantized weight in the format of its gradient; its storage has the real size
        weight = Tensor(storage, stored.shape, stored.grad or stored.dtype, requires_grad=stored.grad is not None)
        return Parameter(row.name + stored.suffix, weight)

    # -- what families call --------------------------------------------------------------------------

    def weight(self, name: str) -> Tensor:
        """The parameter of this name as an input of operations."""
        return self._stored[name][0].tensor()

    def has(self, name: str) -> bool:
        return name in self._stored

    def linear(self, path: str, x: Tensor, bias: str | None = None) -> Tensor:
        """The linear module at `path`, as this implementation runs it; a head without a weight of its own uses
        the token embedding's. `bias` names the bias where it is not `<path>.bias`."""
        name, bias_name = f"{path}.weight", bias or f"{path}.bias"
        added = self.weight(bias_name) if bias_name in self._stored else None
        if name not in self._stored:
            weight = self.weight(self.tied_embedding)
            return LINEARS["dense"](x, [weight], added, weight.shape[0])
        kind = self._linear if name in self._projected else "dense"
        weights = [p.tensor() for p in self._stored[name]]
        return LINEARS[kind](x, weights, added, self._width[name])

    def head_weight(self) -> Tensor:
        """The weight of the language-model head: its own, or the embedding it is tied to."""
        for row in reversed(list(self._stored)):
            if row.endswith(("lm_head.weight", "decoder.weight")):
                return self.weight(row)
        return self.weight(self.tied_embedding)

    @property
    def tied_embedding(self) -> str:
        """The name of the token embedding's weight: the first parameter."""
        return next(iter(self._stored))

    def layers(self) -> Iterator[int]:
        """The numbers of the layers, marking where each begins and where the last ends."""
        for i in range(self.layer_count):
            self.enter("forward", i)
            yield i
        self.enter("forward", AFTER)

    def enter(self, phase: str, where: int | str) -> None:
        """From here on the program is in this part of the model; backward finds its way by it."""
        self.tape.mark(phase, 0, where)
        self._boundaries.append(self.tape.sequence)
        self._segments.append(where)

    def where(self, sequence: int) -> int | str:
        """The part of the model that was running when the node with this number was recorded."""
        return self._segments[bisect_right(self._boundaries, sequence - 1) - 1]

    def checkpoint(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """`function(x)`, checkpointed if the setup says so."""
        return checkpoint(function, x) if self.setup.gradient_checkpointing else function(x)

    def buffer(self, shape: Shape, dtype: DType) -> Tensor:
        """A view of a registered buffer, which the model has had since it was loaded: no new bytes."""
        return Tensor(self.tape.bytes(0), shape, dtype)

    def ids(self) -> Tensor:
        """A batch of token ids (batch x length, int64), as the data loader puts it on the device."""
        return self.tape.empty((self.setup.batch_size, self.setup.seq_len), INT64, ACTIVATIONS)

    def labels(self) -> Tensor:
        """The batch's labels: one a token, or one a sequence for a classifier."""
        if (self.config.get("architectures") or [""])[0].endswith("SequenceClassification"):
            return self.tape.empty((self.setup.batch_size,), INT64, ACTIVATIONS)
        return self.ids()


def trained_as(row: ParamSpec, stored: Stored, projected: bool, job: Job) -> Trained:
    """The parameter as the optimizer sees it: a master copy's format where the recipe has one."""
    assert stored.grad is not None
    dtype = job.recipe.master or stored.grad
    return Trained(row.name + stored.suffix, stored.shape, dtype, projected, row.role, row.module)


def slots_of(network: Network, states: bool, code: Implementation, job: Job) -> list[Slot]:
    """The optimizer's view of a network's parameters, with their state tensors if asked for."""
    slots = []
    for trained, parameter, layer in network.trained:
        slot = Slot(network.tape, trained, layer, parameter.weight, None)
        if states:
            keep_state(slot, code, job)
        slots.append(slot)
    return slots


def keep_state(slot: Slot, code: Implementation, job: Job) -> None:
    """Gives a slot the tensors its optimizer keeps (those in host memory take nothing from the device)."""
    for buffer in code.state(slot.param, job):
        if not buffer.host:
            slot.keep(buffer)


Forward = Callable[[Network, Tensor, Tensor], tuple[Tensor, tuple[Tensor, ...]]]
