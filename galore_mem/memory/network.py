"""A model laid out on a tape: its parameters, as an implementation stores them, and its layers.

`Network` is what a family's `forward` is written against. It expands the model to a chosen number of
layers; see `galore_mem.memory.phases` for why two and three are enough for any depth.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from galore_mem.dtypes import INT64, NF4, DType
from galore_mem.errors import InputError
from galore_mem.memory.checkpoint import checkpoint
from galore_mem.memory.linears import LINEARS, Layer
from galore_mem.memory.tape import ACTIVATIONS, WEIGHTS, Bytes, Parameter, Shape, Tape, Tensor
from galore_mem.methods.base import Buffer, Implementation, Job, Slot, Stored, Trained
from galore_mem.setup import Setup
from galore_mem.spec.model import ModelSpec, ParamSpec, is_target
from galore_mem.units import round_up

BEFORE, AFTER = "before", "after"
ADAPTER = ".lora_"  # in the names of what peft adds


class Prepared(NamedTuple):
    """A template row with the tensors it is stored as, each with what the optimizer sees of it (None: frozen)."""

    spec: ParamSpec
    kind: str  # how a linear layer with this weight runs: a key of LINEARS
    layer: Layer
    tensors: tuple[tuple[Stored, Trained | None], ...]

    @classmethod
    def of(cls, row: ParamSpec, projected: bool, code: Implementation, job: Job) -> Prepared:
        tensors = [
            (stored, None if stored.grad is None else trained_as(row, stored, projected, job))
            for stored in code.store(row, projected, job)
        ]
        quantized = any(stored.dtype is NF4 for stored, _ in tensors)  # with or without adapters
        kind = "nf4" if quantized else code.linear if projected else "dense"
        transposed = row.module == "conv1d"
        compute = job.recipe.autocast or job.recipe.weights
        layer = Layer(row.shape[-1] if transposed else row.shape[0], compute, transposed)
        return cls(row, kind, layer, tuple(tensors))


class Layout:
    """A model's rows as an implementation stores them, worked out once for every depth."""

    def __init__(self, model: ModelSpec, code: Implementation, job: Job, targets: tuple[str, ...] | None) -> None:
        self.model = model
        self.states = States(code, job)
        self._blocks = [
            (block, [Prepared.of(row, is_target(row, targets), code, job) for row in block.rows])
            for block in model.blocks
        ]

    def rows(self, layers: int) -> Iterator[tuple[Prepared, str, int | str]]:
        """The rows of the model with that many layers, in order: (row, number for its `{i}`, its layer, or `BEFORE`
        or `AFTER` where it lies outside the stack of identical layers)."""
        depth, passed = self.model.num_layers, False
        for block, rows in self._blocks:
            stack = block.repeat == depth and depth > 1 and not passed
            passed = passed or stack
            outside = AFTER if passed else BEFORE
            for i in range(layers if stack else block.repeat):
                for row in rows:
                    yield row, str(block.start + i), i if stack else outside

    def layer_bytes(self, granularity: int, master: DType | None) -> Bytes:
        """Bytes of weights, gradients and optimizer state that one more layer has, in the allocator's blocks."""
        stack = max((b for b in self._blocks), key=lambda b: b[0].repeat)[1]
        weights = gradients = state = 0
        for stored, trained in (pair for row in stack for pair in row.tensors):
            weights += round_up(stored.dtype.nbytes(stored.shape), granularity)
            if trained is not None and stored.grad is not None:
                gradients += round_up(stored.grad.nbytes(stored.shape), granularity)
                state += 0 if master is None else round_up(master.nbytes(stored.shape), granularity)
                state += sum(round_up(b.nbytes, granularity) for b in self.states.of(trained))
        return weights, gradients, state, 0, 0


def place(tape: Tape, stored: Stored) -> Tensor:
    """A stored tensor on the tape. Operations see a quantized weight in the format of its gradient; its storage has the
    real size."""
    storage = tape.bytes(stored.dtype.nbytes(stored.shape), WEIGHTS)
    return Tensor(storage, stored.shape, stored.grad or stored.dtype, requires_grad=stored.grad is not None)


class Turn(NamedTuple):
    """A backward pass of a layer-wise update: does the step renew projectors, and is it the last before that step?"""

    refresh: bool = False
    last: bool = True


class Network:
    """Parameters on a tape. `trained` lists what the optimizer will see, in its order; layers share an entry's
    `Trained`, whose name has `{i}` for the layer's number."""

    def __init__(self, tape: Tape, layout: Layout, layers: int, setup: Setup) -> None:
        model = layout.model
        self.tape = tape
        self.model = model
        self.layer_count = layers
        self.setup = setup
        self.config: Any = model.config
        self.head_dim = model.heads.head_dim if model.heads else 0
        self.trained: list[tuple[Trained, Parameter, int | str]] = []
        self.adapters: list[Parameter] = []  # trained beside a frozen weight: put on the model after it was loaded
        self.waiting: list[Callable[[], None]] = []  # of late hooks, the update that the next one makes
        self.stage, self.turn = 0, Turn()  # which pass of several it is
        self._stored: dict[str, list[Parameter]] = {}
        self._linear: dict[str, tuple[str, Layer]] = {}
        self._rows: dict[str, tuple[Prepared, list[Parameter]]] = {}
        self._inputs: Parameter | None = None
        self._boundaries: list[int] = []
        self._segments: list[int | str] = []
        for row, number, layer in layout.rows(layers):
            self._add(row, row.spec.name.replace("{i}", number), layer)
        fmt = setup.recipe.weights
        self._registered = [
            tape.empty(row.shape, row.dtype or fmt, WEIGHTS)
            for row in model.registered(setup.transformers)
            for _ in range(layers if row.in_each_layer else 1)
        ]

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the tensors that the model registers beside its parameters."""
        return sum(t.storage.nbytes for t in self._registered)

    def _add(self, row: Prepared, name: str, layer: int | str) -> None:
        self._linear[name] = row.kind, row.layer
        found = self._stored[name] = []
        self._rows[name] = row, found
        for stored, trained in row.tensors:
            parameter = Parameter(name + stored.suffix, place(self.tape, stored))
            found.append(parameter)
            if trained is not None:
                self.trained.append((trained, parameter, layer))
                if row.tensors[0][1] is None:
                    self.adapters.append(parameter)

    def named(self) -> dict[int, tuple[str, DType]]:
        """Names and formats of parameters by the numbers of their storages. What belongs to a quantized weight has its
        name."""
        return {
            parameter.weight.storage.number: (name + (stored.suffix if ADAPTER in stored.suffix else ""), stored.dtype)
            for name, (row, parameters) in self._rows.items()
            for (stored, _), parameter in zip(row.tensors, parameters, strict=True)
        }

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
            return LINEARS["dense"](Layer(weight.shape[0], weight.dtype), x, [weight], added)
        weights = [p.tensor() for p in self._stored[name]]
        kind, layer = self._linear[name]
        return LINEARS[kind](layer, x, weights, added)

    def head_weight(self) -> Tensor:
        """The weight of the language-model head: its own, or the embedding it is tied to. Raises `InputError` where a
        method has put something else in its place."""
        for name in reversed(list(self._stored)):
            if name.endswith(("lm_head.weight", "decoder.weight")):
                if self._linear[name][0] != "dense":
                    raise InputError("--loss fused needs the head's weight as it is; take the head out of --target")
                return self.weight(name)
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
        self.tape.mark(phase, self.stage, where)
        self._boundaries.append(self.tape.sequence)
        self._segments.append(where)

    def where(self, sequence: int) -> int | str:
        """The part of the model that was running when the node with this number was recorded."""
        return self._segments[bisect_right(self._boundaries, sequence - 1) - 1]

    def embedded(self, x: Tensor) -> Tensor:
        """The embeddings as the layers receive them: with checkpointing and a frozen embedding they are made to want a
        gradient, which then accumulates (peft, enable_input_require_grads)."""
        if self.setup.gradient_checkpointing and self.tape.grad_enabled and not x.requires_grad:
            x.requires_grad = True
            self._inputs = Parameter("inputs_embeds", x)
            return self._inputs.tensor()
        return x

    def dropped(self) -> None:
        """The graph is gone, and with it a gradient of the embeddings."""
        self._inputs = None

    def inputs_gradient(self) -> int:
        """Bytes of the gradient of the embeddings, which is no parameter's and is there as long as the graph."""
        grad = None if self._inputs is None else self._inputs.grad
        return 0 if grad is None else grad.storage.nbytes

    def settle(self) -> None:
        """The update that no further hook makes, after backward."""
        while self.waiting:
            self.waiting.pop()()

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


class States:
    """The tensors that an optimizer keeps, worked out once for parameters that are alike."""

    def __init__(self, code: Implementation, job: Job) -> None:
        self._code, self._job = code, job
        self._known: dict[int, tuple[Buffer, ...]] = {}

    def of(self, param: Trained) -> tuple[Buffer, ...]:
        """The parameter's tensors on the device (what lies in host memory takes nothing from it)."""
        buffers = self._known.get(id(param))
        if buffers is None:
            buffers = tuple(b for b in self._code.state(param, self._job) if not b.host)
            self._known[id(param)] = buffers
        return buffers

    def give(self, slot: Slot) -> None:
        """Puts the slot's state on the tape."""
        for buffer in self.of(slot.param):
            slot.keep(buffer)


Forward = Callable[[Network, Tensor, Tensor], tuple[Tensor, tuple[Tensor, ...]]]
