"""What a method and an implementation are.

A *method* is what a paper describes; an *implementation* is code that a user runs. Both are data
here: pure functions from one parameter's shape to the tensors that are kept for it, and a step
program, the optimizer's `step()` written over sizes, from which the step's temporaries follow.
Adding a method is one file with a `METHOD` and one line in `registry.py`.

Legend used in every file: a matrix is m x n with m <= n (`Trained.m`, `Trained.n`), r is the rank,
clipped to m. Sizes are bytes unless they are called elements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

from galore_mem.dtypes import DType
from galore_mem.errors import InputError, unknown
from galore_mem.memory.tape import GRADIENTS, OPTIMIZER_STATE, WEIGHTS, Shape, Tape, Tensor
from galore_mem.setup import Recipe
from galore_mem.spec.model import Heads, ParamSpec, Role

PENDING = "pending"  # of a slot's state: the low-rank gradients of the micro-batches so far, summed
MOST = 2**31 - 1  # of any hyperparameter


class Citation(NamedTuple):
    """Where a method is described."""

    title: str
    authors: str
    where: str  # arXiv id or venue


@dataclass(frozen=True, slots=True)
class Hyperparameter:
    """A number or a choice that changes memory: its name in `optimizer.param_groups`, default and meaning.

    Numbers are bounded below by `least`; a text is one of `choices`.
    """

    name: str
    default: int | float | str
    help: str
    choices: tuple[str, ...] = ()
    least: int = 0

    def read(self, given: int | float | str) -> int | float | str:
        """The value in the default's type. Raises `InputError` where it is none, or out of bounds."""
        if isinstance(self.default, str):
            if given not in self.choices:
                raise unknown(self.name, str(given), self.choices)
            return given
        kind = type(self.default)
        try:
            value = kind(given)
        except (ValueError, OverflowError):
            raise InputError(f"{self.name} must be a number, got {str(given)[:40]!r}") from None
        if not self.least <= value <= MOST:
            raise InputError(f"{self.name} must be at least {self.least} and at most {MOST}, got {value}")
        return value


@dataclass(frozen=True, slots=True)
class Buffer:
    """One tensor an optimizer keeps for a parameter, under the name it has in `optimizer.state[p]`.

    `storage_bytes` is set where the tensor is a view of a larger storage that it keeps alive; `host`
    where it lives in host memory although the parameter is on an accelerator.
    """

    name: str
    shape: Shape
    dtype: DType
    storage_bytes: int | None = None
    host: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of the storage this tensor keeps alive."""
        return self.dtype.nbytes(self.shape) if self.storage_bytes is None else self.storage_bytes


class Stored(NamedTuple):
    """One tensor of the model as it is stored while training.

    `grad` is the format of its gradient, None where it is frozen. `suffix` is added to the parameter's
    name ("" for the weight itself).
    """

    suffix: str
    shape: Shape
    dtype: DType
    grad: DType | None


@dataclass(frozen=True, slots=True)
class Trained:
    """A parameter as its optimizer sees it. `dtype` is the format of the parameter and of its gradient
    as the optimizer reads them; `projected` says whether the method's low-rank treatment applies."""

    name: str
    shape: Shape
    dtype: DType
    projected: bool
    role: Role
    module: str

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.dtype.nbytes(self.shape)

    @property
    def m(self) -> int:
        """The smaller side of a matrix."""
        return min(self.shape)

    @property
    def n(self) -> int:
        """The larger side of a matrix."""
        return max(self.shape)


@dataclass(frozen=True, slots=True)
class Job:
    """What, besides a parameter, a ledger may depend on."""

    hyperparameters: Mapping[str, int | float | str]
    recipe: Recipe
    device: str = "cuda"
    heads: Heads | None = None

    @property
    def rank(self) -> int:
        return int(self.hyperparameters["rank"])

    def text(self, name: str) -> str:
        return str(self.hyperparameters[name])

    def number(self, name: str) -> int:
        return int(self.hyperparameters[name])

    def r(self, p: Trained) -> int:
        """The rank used for a matrix: never above its smaller side."""
        return min(self.rank, p.m)

    @property
    def on_host(self) -> bool:
        """Do torch's step counters live in host memory? (On the CPU they are counted like everything else.)"""
        return self.device != "cpu"


class Slot:
    """One parameter in a step program: its tensors now. Programs may replace or drop them, as the code does."""

    __slots__ = ("grad", "layer", "param", "state", "tape", "weight")

    def __init__(self, tape: Tape, param: Trained, layer: int | str, weight: Tensor, grad: Tensor | None) -> None:
        self.tape = tape
        self.param = param
        self.layer = layer
        self.weight = weight
        self.grad = grad
        self.state: dict[str, Tensor] = {}

    def layout(self) -> tuple[tuple[str, int], ...]:
        """Which tensors the slot has, and their bytes."""
        held = {"weight": self.weight, "grad": self.grad, **self.state}
        return tuple((name, t.storage.nbytes) for name, t in held.items() if t is not None)

    def new(self, shape: Shape, dtype: DType, *alive: object) -> Tensor:
        """A temporary tensor. `alive` are its operands: naming them here keeps them until it exists."""
        return self.tape.empty(shape, dtype)

    def like(self, *alive: object) -> Tensor:
        """A temporary of the parameter's own shape and format."""
        return self.tape.empty(self.param.shape, self.param.dtype)

    def keep(self, buffer: Buffer) -> Tensor:
        """Puts a state tensor into `state` under the buffer's name, replacing the one that is there."""
        storage = self.tape.bytes(buffer.nbytes, OPTIMIZER_STATE)
        tensor = Tensor(storage, buffer.shape, buffer.dtype)
        self.state[buffer.name] = tensor
        return tensor


class Slots(Sequence[Slot]):
    """The parameters of a step program, in the optimizer's order.

    Iterating marks on the tape where the program is, under the name of `phase` (None: the step runs inside
    another phase, whose marks stand).
    """

    def __init__(self, tape: Tape, slots: Sequence[Slot], phase: str | None) -> None:
        self.tape = tape
        self._slots = slots
        self._phase = phase
        self._stage = 0

    def __getitem__(self, index):  # type: ignore[no-untyped-def]  # Sequence's overloads, for one use
        return self._slots[index]

    def __len__(self) -> int:
        return len(self._slots)

    def begin(self) -> None:
        """The step starts here."""
        if self._phase is not None:
            self.tape.mark(self._phase, 0, "all")

    def unmarked(self) -> Iterator[Slot]:
        """The parameters without marking the tape."""
        return iter(self._slots)

    def __iter__(self) -> Iterator[Slot]:
        self._stage += 1
        stage = self._stage
        for slot in self._slots:
            if self._phase is not None:
                self.tape.mark(self._phase, stage, slot.layer)
            yield slot
        if self._phase is not None:
            self.tape.mark(self._phase, stage, "end")


StateRule = Callable[[Trained, Job], tuple[Buffer, ...]]
SharedRule = Callable[[Job], tuple[Buffer, ...]]
StoreRule = Callable[[ParamSpec, bool, Job], tuple[Stored, ...]]
# step(slots, job, refresh): `refresh` is a step that also renews projectors (or merges adapters)
StepProgram = Callable[[Slots, Job, bool], None]
# what is kept of a micro-batch's gradient in its stead (None: the gradient itself)
Compression = Callable[[Slot, Job], Tensor | None]


def dense(row: ParamSpec, projected: bool, job: Job) -> tuple[Stored, ...]:
    """Every parameter stored as it is, in the recipe's format, and trained."""
    return (Stored("", row.shape, job.recipe.weights, job.recipe.weights),)


def nothing_shared(job: Job) -> tuple[Buffer, ...]:
    """No tensors besides those of each parameter."""
    return ()


def kept_whole(slot: Slot, job: Job) -> None:
    """Gradients stay as they are until the last micro-batch."""


def no_temporaries(slots: Slots, job: Job, refresh: bool) -> None:
    """A step that allocates nothing (fused kernels; and papers, which do not count temporaries)."""


@dataclass(frozen=True, slots=True)
class Implementation:
    """Code that a user runs, as ledger and step program.

    `version` and `source` name the release and files whose allocations are described. `state` gives the
    persistent tensors of a trained parameter, `shared` those of the optimizer as a whole, `store` how the
    model's weights are kept. `linear` names how the forward pass of a projected layer runs
    (`galore_mem.memory.linears`). `refreshes` says that some steps renew a projector. `one_by_one` says that the step
    goes through the parameters singly and leaves each with the tensors it had, so that what it holds besides does not
    grow with the model (one run then tells every depth; a test holds it to that). `late` says that its hook of a
    layer-wise update comes before a gradient is stored, and updates the parameter before: two gradients are alive.
    `one_each` says that a layer-wise update takes an optimizer for each parameter, with what it shares of its own.
    `compresses` is what a layer-wise update keeps of a gradient that is not complete, where it waits for several
    backward passes (None: it steps in every one).
    """

    name: str
    version: str
    source: str
    state: StateRule
    step: StepProgram = no_temporaries
    shared: SharedRule = nothing_shared
    store: StoreRule = dense
    linear: str = "dense"
    refreshes: bool = False
    one_by_one: bool = True
    layerwise: bool = True
    late: bool = False
    one_each: bool = False
    compresses: Compression | None = None
    equations: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    not_counted: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Method:
    """What a paper describes. `paper` is its own counting; `implementations[0]` is the default.

    `always_layerwise` says that the update is part of the backward pass by nature: there is no other step.
    """

    name: str
    title: str
    citation: Citation
    paper: Implementation
    implementations: tuple[Implementation, ...]
    hyperparameters: tuple[Hyperparameter, ...] = ()
    always_layerwise: bool = False

    @property
    def projects(self) -> bool:
        """Are some parameters treated apart, in a space of low rank?"""
        return "projected" in self.paper.equations

    def implementation(self, name: str | None) -> Implementation:
        """The implementation of this name (None: the default). Raises `InputError`."""
        if name is None:
            return self.implementations[0]
        for candidate in self.implementations:
            if candidate.name == name:
                return candidate
        raise unknown(f"implementation of {self.name}", name, [i.name for i in self.implementations])


RANK = Hyperparameter("rank", 128, "rank r of the low-rank space", least=1)
UPDATE_PROJ_GAP = Hyperparameter("update_proj_gap", 200, "steps between two refreshes of the projector", least=1)


__all__ = [
    "GRADIENTS", "OPTIMIZER_STATE", "PENDING", "RANK", "UPDATE_PROJ_GAP", "WEIGHTS",
    "Buffer", "Citation", "Hyperparameter", "Implementation", "Job", "Method", "Slot", "Slots", "Stored", "Trained",
    "dense", "kept_whole", "no_temporaries", "nothing_shared",
]  # fmt: skip
