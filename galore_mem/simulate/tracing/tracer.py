"""Follows every storage of a program that runs on tensors without values.

A storage is born where an operation returns it for the first time, and dies when its last reference goes, which is when
the real program would free it: views, in-place operations, saved tensors, frozen parameters and checkpoints need no
rules of their own.
"""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from galore_mem.memory.phases import cublas_workspace
from galore_mem.memory.tensor import ACTIVATIONS, GRADIENTS, TEMPORARIES, WEIGHTS
from galore_mem.setup import Setup
from galore_mem.simulate.kernels import RESULTS, Program, cpu, cuda
from galore_mem.simulate.trace import WORKSPACE, Allocation, Mark, Trace
from galore_mem.simulate.tracing.accumulate import in_place, sole
from galore_mem.simulate.tracing.known import Known, Unknown, may_ask, told
from galore_mem.simulate.tracing.memo import Memo, Result, flat
from galore_mem.simulate.tracing.modules import Modules
from galore_mem.simulate.tracing.places import META, NO_CODE, Places
from galore_mem.simulate.tracing.values import Answer, Assumed, answer, assumed

aten = torch.ops.aten
ON_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
# what runs: anything but backward; backward; in it, a checkpoint's forward pass again
OUTSIDE, BACKWARD, AGAIN = "outside", "backward", "again"


class Follower(weakref.ref):  # type: ignore[type-arg]  # weakref.ref takes its argument at run time only
    """Tells when a storage dies, and which it was."""

    __slots__ = ("index", "key")
    index: int
    key: int


class Tracer(TorchDispatchMode):
    """Writes a `Trace` of what runs inside of it. `setup` says on which device the program is thought to run; `places`,
    for a program that names devices itself, where its tensors are (None: all without values are on the device)."""

    def __init__(self, setup: Setup, modules: Modules, places: Places | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # untyped in torch
        self._places = places
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
        self._known = Known()
        if places is not None:
            places.on_gone = self._known.forget
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
        if composite(func) and any(t.is_inference() for t in flat(args)):  # autograd, which takes apart, is left out
            with self:
                return func.decompose(*args, **(kwargs or {}))
        if self._places is None:
            return self._run(func, args, kwargs or {})
        with self._places.below():
            return self._run(func, args, self._places.placed(func, args, kwargs or {}))

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        self.operations += 1
        self._enter_pass(self._passing())
        func = in_place(func, args, kwargs)
        if func.namespace != "aten" and func.name() in self._composed and any(t.is_meta for t in flat(args)):
            parts = self._composed[func.name()] or partial(func.redispatch, ON_CPU)
            with self:
                return parts(*args, **kwargs)
        if may_ask(func):
            said = self._told(func, args, kwargs)
            if said is not None:
                return said
        if kwargs.get("generator") is not None and _on_meta(args, kwargs):
            kwargs = {**kwargs, "generator": None}
        value, program = self._memo.run(func, args, kwargs) if self._places is None else self._alike(func, args, kwargs)
        if program is None:
            self._see(value, func)
        else:
            self._kernel(func, program, value)
        if func.overloadpacket in self._cublas and self._counts(value):
            self._workspace()
        self._known.note(func, args, kwargs, value)
        return value

    def _alike(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Runs an operation where some tensors may have values and others none: as if none had."""
        assert self._places is not None
        if func is aten._to_copy.default and args[0].is_meta and kwargs.get("device", META).type == "cpu":
            kwargs = {**kwargs, "device": META}
        if not self._places.mixed:
            return self._memo.run(func, args, kwargs)
        real: dict[int, Tensor] = {}
        like = self._places.alike(args, real)
        value, program = self._memo.run(func, like, self._places.alike(kwargs, real))
        return Result(_instead(value, real), program)

    def _told(self, op: Any, args: Any, kwargs: Any) -> Any:
        """The answer to an operation that asks for values: what is known, or what is assumed; None where it asks for
        nothing, or there is no answer."""
        try:
            said = told(self._known, op, args, kwargs)
        except Unknown:
            said = assumed(op, args)
            if said is not None:
                self._assume(args[0], said)
            return said
        if self._known.guessed:
            self._assume(next(flat(args)), self._known.guessed)
            self._known.guessed = ""
        if any(t.is_meta for t in flat((said,))):
            self._see(said, op)
        return said

    def _assume(self, t: Tensor, answer: Answer) -> None:
        self.assumed[Assumed(self._modules.path, str(t.dtype).removeprefix("torch."), answer)] = None

    def follow(self, t: Tensor, op: str) -> None:
        """A tensor that no operation shows (made inside of torch): as if `op` had returned it."""
        if self._places is not None:
            self._places.in_host = False
        self._see(t, op)

    def replace(self, old: Tensor, new: Tensor) -> None:
        """A tensor without values takes the place of one with values: it is the same allocation."""
        known = self._alive.pop(old.untyped_storage()._cdata, None)
        if known is not None:
            storage = new.untyped_storage()
            self._alive[storage._cdata] = one = Follower(storage, self._died)
            one.key, one.index, known.index = storage._cdata, known.index, -1

    def values(self, t: Tensor) -> Tensor:
        """A tensor's values on the host, for a program that takes them out of torch: what is known, or assumed."""
        with nullcontext() if self._places is None else self._places.below(), _disable_current_modes():
            try:
                found = self._known.values(t.detach())
                if self._known.guessed:
                    self._assume(t, self._known.guessed)
                    self._known.guessed = ""
            except Unknown:
                found = torch.full(tuple(t.shape), answer(t), dtype=t.dtype, device="cpu")
                self._assume(t, answer(t))
        return found

    def _program(self, op: Any, args: Any, kwargs: Any, value: Any) -> Program | None:
        rule = self._rule(op)
        return None if rule is None or not self._counts(value) else rule(args, kwargs, value)

    def _counts(self, value: Any) -> bool:
        if self._places is not None and self._places.in_host:
            return False
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
            if not size or (self._places is not None and self._places.keeps(t)):
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
        if follower.index < 0:  # another has taken its place
            return
        del self._alive[follower.key]
        self._known.forget(follower.key)
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


@cache
def composite(op: Any) -> bool:
    """Is an operation made of others for every device?"""
    return bool(op.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd))


def _instead(value: Any, real: dict[int, Tensor]) -> Any:
    """What an operation returned, with the tensors themselves in the place of what stood for them."""
    if isinstance(value, Tensor):
        return real.get(id(value), value)
    return type(value)(_instead(one, real) for one in value) if isinstance(value, list | tuple) else value


def _on_meta(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    device = kwargs.get("device")
    return (device is not None and torch.device(device).type == "meta") or any(t.is_meta for t in flat(args))
