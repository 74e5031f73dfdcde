"""Follows every storage of a program that runs on tensors without values.

A storage is born where an operation returns it for the first time, and dies when its last reference goes, which is when
the real program would free it: views, in-place operations, saved tensors, frozen parameters and checkpoints need no
rules of their own.
"""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from galore_mem.memory.phases import cublas_workspace
from galore_mem.memory.tensor import ACTIVATIONS, GRADIENTS, TEMPORARIES, WEIGHTS
from galore_mem.setup import Setup
from galore_mem.simulate.kernels import RESULTS, Program, cpu, cuda
from galore_mem.simulate.trace import Allocation, Mark, Trace
from galore_mem.simulate.tracing.accumulate import in_place, sole
from galore_mem.simulate.tracing.memo import Memo, flat
from galore_mem.simulate.tracing.modules import Modules
from galore_mem.simulate.tracing.values import Assumed, assumed

aten = torch.ops.aten
NO_CODE = torch._C._disabled_torch_dispatch_impl  # of tensors that are not made of others
ON_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
# what runs: anything but backward; backward; in it, a checkpoint's forward pass again
OUTSIDE, BACKWARD, AGAIN = "outside", "backward", "again"
WORKSPACE = "cublas workspace"  # in the place of an operation


class Follower(weakref.ref):  # type: ignore[type-arg]  # weakref.ref takes its argument at run time only
    """Tells when a storage dies, and which it was."""

    __slots__ = ("index", "key")
    index: int
    key: int


class Tracer(TorchDispatchMode):
    """Writes a `Trace` of what runs inside of it. `setup` says on which device the program is thought to run."""

    def __init__(self, setup: Setup, modules: Modules) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # untyped in torch
        self.trace = Trace(setup.granularity)
        self.assumed: dict[Assumed, None] = {}
        self.operations = 0
        self.names: dict[int, str] = {}  # of parameters, by their id
        self._modules = modules
        self._setup = setup
        self._on_host = setup.device == "cpu"  # are tensors in host memory on the device?
        table = cpu if setup.device == "cpu" else cuda
        self._rule, self._order, self._composed, self._cublas = table.rule, table.ORDER, table.COMPOSED, table.CUBLAS
        self._with_workspace: set[bool] = set()  # threads that have one: is it autograd's?
        self._memo = Memo(self._program, table.RUN)
        sole()  # is looked up inside backward, and cannot be found out there
        self._alive: dict[int, Follower] = {}
        self._phase = ""
        self._pass = OUTSIDE
        self._leaf: int | None = None  # whose gradient is being accumulated
        self._since = 0  # the first allocation of this pass

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here; torch would wrap each call to say so."""
        return False

    # -- what others tell ----------------------------------------------------------------------------------

    def enter(self, phase: str) -> None:
        """A phase begins here."""
        self._phase = phase
        self.trace.marks.append(Mark(len(self.trace.events), phase))

    def index(self, t: Tensor) -> int | None:
        """The allocation of a tensor's storage; None where it is not followed."""
        follower = self._alive.get(t.untyped_storage()._cdata)
        return None if follower is None else follower.index

    def label(self, t: Tensor, category: int, name: str) -> None:
        """Says what a tensor's storage is."""
        index = self.index(t)
        if index is not None:
            one = self.trace.allocations[index]
            one.category, one.name = category, name or one.name

    # -- the program ---------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind.__torch_dispatch__ is not NO_CODE for kind in types):
            return NotImplemented  # a tensor made of others: its own code says what runs on those
        kwargs = kwargs or {}
        self.operations += 1
        self._enter_pass(self._passing())
        func = in_place(func, args, kwargs)
        if func.namespace != "aten" and func.name() in self._composed and any(t.is_meta for t in flat(args)):
            parts = self._composed[func.name()] or partial(func.redispatch, ON_CPU)
            with self:
                return parts(*args, **kwargs)
        said = assumed(func, args)
        if said is not None:
            self.assumed[Assumed(self._modules.path, str(args[0].dtype).removeprefix("torch."), said)] = None
            return said
        if kwargs.get("generator") is not None and _on_meta(args, kwargs):
            kwargs = {**kwargs, "generator": None}
        value, program = self._memo.run(func, args, kwargs)
        if program is None:
            self._see(value, func)
        else:
            self._kernel(func, program, value)
        if func.overloadpacket in self._cublas and self._counts(value):
            self._workspace()
        return value

    def follow(self, t: Tensor, op: str) -> None:
        """A tensor that no operation shows (made inside of torch): as if `op` had returned it."""
        self._see(t, op)

    def _program(self, op: Any, args: Any, kwargs: Any, value: Any) -> Program | None:
        rule = self._rule(op)
        return None if rule is None or not self._counts(value) else rule(args, kwargs, value)

    def _counts(self, value: Any) -> bool:
        first = value if isinstance(value, Tensor) else next((t for t in value or () if isinstance(t, Tensor)), None)
        return first is not None and (first.is_meta or self._on_host)

    def _workspace(self) -> None:
        """cuBLAS keeps one for each handle, and each thread has a handle of its own (cuda/CublasHandlePool.cpp). It is
        made at the thread's first product and stays. Backward runs in a thread of autograd's."""
        of_autograd = self._pass is not OUTSIDE
        if of_autograd not in self._with_workspace:
            self._with_workspace.add(of_autograd)
            self._born(Allocation(cublas_workspace(self._setup), WORKSPACE, "", self._phase, kernel=True))

    def _kernel(self, op: Any, program: Program, value: Any) -> None:
        own: list[int | None] = []
        for step in program:
            if step == RESULTS:
                self._see(value, op)
            elif step > 0:
                own.append(self._born(Allocation(step, str(op), self._where(), self._phase, kernel=True)))
            else:
                self._gone(own, ~step)
        for i in reversed(range(len(own))):
            self._gone(own, i)

    def _gone(self, own: list[int | None], i: int) -> None:
        index = own[i]
        if index is not None:
            self.trace.events.append(~index)
            own[i] = None

    def _see(self, value: Any, op: Any) -> None:
        if isinstance(value, Tensor):
            self._see_one(value, op)
        elif isinstance(value, list | tuple):
            for i in self._order.get(str(op)) or range(len(value)):
                self._see(value[i], op)

    def _see_one(self, t: Tensor, op: Any) -> None:
        if not t.is_meta and not (self._on_host and t.device.type == "cpu"):
            return
        storage = t.untyped_storage()
        key = storage._cdata
        known = self._alive.get(key)
        if known is None:
            size = storage.nbytes()
            if not size:
                return
            known = Follower(storage, self._died)
            known.key = key
            made = Allocation(
                size, str(op), self._where(), self._phase, shape=tuple(t.shape),
                dtype=str(t.dtype).removeprefix("torch."),
            )  # fmt: skip
            known.index = self._born(made)
            self._alive[key] = known
        if self._pass is BACKWARD:
            self._stored_gradient(known.index)

    def _stored_gradient(self, index: int) -> None:
        """The first thing that gradient accumulation does is to store the gradient; hooks come after it."""
        node: Any = torch._C._current_autograd_node()  # (must not be kept: it keeps others)
        leaf = id(node.variable) if type(node).__name__ == "AccumulateGrad" else None
        if leaf is not None and leaf != self._leaf:
            one = self.trace.allocations[index]
            if one.category != WEIGHTS:
                one.category = GRADIENTS
                one.name = f"{self.names[leaf]}:grad" if leaf in self.names else one.name
        self._leaf = leaf

    def _born(self, made: Allocation) -> int:
        index = len(self.trace.allocations)
        self.trace.allocations.append(made)
        self.trace.events.append(index)
        return index

    def _died(self, follower: Follower) -> None:
        del self._alive[follower.key]
        self.trace.events.append(~follower.index)

    # -- where it is ---------------------------------------------------------------------------------------

    def _where(self) -> str:
        if self._pass is BACKWARD:
            node = torch._C._current_autograd_node()
            if node is not None and type(node).__name__ != "AccumulateGrad":
                return self._modules.path_of(node)
        return self._modules.path

    def _passing(self) -> str:
        if torch._C._current_graph_task_id() == -1:
            return OUTSIDE
        return AGAIN if torch.is_grad_enabled() else BACKWARD

    def _enter_pass(self, now: str) -> None:
        """Where a pass ends in backward, what was made in it and is alive is kept for backward."""
        if now is self._pass:
            return
        if now is BACKWARD:
            for follower in self._alive.values():
                one = self.trace.allocations[follower.index]
                if follower.index >= self._since and one.category == TEMPORARIES:
                    one.category = ACTIVATIONS
        else:
            self._since = len(self.trace.allocations)
        self._pass = now


def _on_meta(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    device = kwargs.get("device")
    return (device is not None and torch.device(device).type == "meta") or any(t.is_meta for t in flat(args))
