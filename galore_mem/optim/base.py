"""What all optimizers here share: one parameter at a time, in `step()` or in the backward pass.

`step()` first looks at every gradient and then updates parameter by parameter, so that a gradient which cannot be
used changes nothing. A subclass says how one parameter is updated; the rest (groups and their checks, the layer-wise
update, gradient accumulation, saving and loading) is here.

State per parameter: tensors under the names of the ledger (`galore_mem.methods`), and plain Python numbers. Both
load with `torch.load(weights_only=True)`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from galore_mem.dtypes import dtype
from galore_mem.errors import InputError, unknown
from galore_mem.methods.base import Buffer, Job, Method, Trained
from galore_mem.setup import RECIPES
from galore_mem.spec.model import Role

State = dict[str, Any]
Group = dict[str, Any]

PENDING = "pending"  # a low-rank gradient of the micro-batches so far
MICRO = "micro_batches"


@dataclass(frozen=True, slots=True)
class LayerWise:
    """The update in the backward pass: each parameter as soon as its gradient is complete, which is then freed.

    `gradient_accumulation_steps`: backward passes per update. What is projected is summed in the low-rank space
    (projection is linear), where the method and `clip_value` allow it; other gradients stay until they are complete,
    as does that of a parameter whose projector is about to be renewed. `clip_value` clamps each complete gradient to
    [-clip_value, clip_value], as `torch.nn.utils.clip_grad_value_` does. Call `optimizer.step()` after the last
    backward pass as usual: it updates parameters that had no gradient in some of them, and schedulers expect it.
    """

    gradient_accumulation_steps: int = 1
    clip_value: float | None = None

    def __post_init__(self) -> None:
        if self.gradient_accumulation_steps < 1:
            raise InputError(f"gradient_accumulation_steps must be at least 1, got {self.gradient_accumulation_steps}")
        if self.clip_value is not None and not self.clip_value > 0:
            raise InputError(f"clip_value must be above 0, got {self.clip_value}")


class Range(NamedTuple):
    """Which values an option of a parameter group may have."""

    least: float = 0.0
    below: float = float("inf")
    whole: bool = False

    def check(self, name: str, value: object) -> None:
        """Raises `InputError` where the value is no number of this range."""
        number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
        right = int if self.whole else (int, float)
        if not isinstance(number, right) or isinstance(number, bool) or not self.least <= number < self.below:
            kind = "a whole number" if self.whole else "a number"
            bound = f" and below {self.below:g}" if isfinite(self.below) else ""
            raise InputError(f"{name} must be {kind} of at least {self.least:g}{bound}, got {value!r}")


FRACTION = Range(0.0, 1.0)
COUNT = Range(1, whole=True)


class Found(NamedTuple):
    """A parameter with its group, and its number in it."""

    p: Tensor
    group: Group
    i: int

    @property
    def name(self) -> str:
        """Its name where the optimizer was given names, else its number and shape."""
        named = self.group.get("param_names")
        return str(named[self.i]) if named else f"parameter {self.i} of its group, {tuple(self.p.shape)}"


class ParameterWise(torch.optim.Optimizer):
    """The base class. Give it `model.named_parameters()`, and errors name the parameter.

    `layerwise` turns on the update in the backward pass. With `error_if_nonfinite` a NaN or infinite gradient is an
    `InputError` before anything has changed; it costs one pass over the gradients and one wait for the device.

    A subclass sets `METHOD` (its ledger is that method's `galore-mem` implementation) and `RANGES`, and writes
    `_update`; `_compressed` where micro-batches can be summed in less than a full gradient; `_check` for
    parameters that it cannot take.
    """

    METHOD: ClassVar[Method]
    IMPLEMENTATION: ClassVar[str] = "galore-mem"
    RANGES: ClassVar[Mapping[str, Range]] = {"lr": Range(), "eps": Range(), "weight_decay": Range()}
    CHOICES: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        layerwise: LayerWise | None = None,
        error_if_nonfinite: bool = True,
    ) -> None:
        self.error_if_nonfinite = error_if_nonfinite
        self.layerwise = layerwise
        self._hooks: list[Any] = []
        if layerwise is not None and _distributed():
            raise InputError(
                "the layer-wise update sees a gradient before it is reduced over processes: one process only"
            )
        super().__init__(params, defaults)

    # -- what a subclass writes --------------------------------------------------------------------

    def _update(self, at: Found, grad: Tensor | None, state: State) -> None:
        """One update of `at.p`, in place; may change `state` only when nothing can fail any more. `grad` is None where
        all of it is in `state[PENDING]`."""
        raise NotImplementedError

    def _compressed(self, at: Found, grad: Tensor, state: State) -> Tensor | None:
        """What is kept of a micro-batch's gradient in its stead, or None where the gradient itself is needed."""
        return None

    def _check(self, at: Found) -> None:
        """Raises `InputError` where the method cannot take the parameter."""

    def _buffers(self, at: Found) -> tuple[Buffer, ...]:
        """The tensors that the ledger keeps for a parameter."""
        code = self.METHOD.implementation(self.IMPLEMENTATION)
        return code.state(self._trained(at), self._job(at.group))

    def _trained(self, at: Found) -> Trained:
        """The parameter as the ledger sees it."""
        projected = at.group.get("rank") is not None
        return Trained(
            at.name, tuple(at.p.shape), dtype(str(at.p.dtype).removeprefix("torch.")), projected, Role.OTHER, "linear"
        )

    def _job(self, group: Group) -> Job:
        defaults = {h.name: h.default for h in self.METHOD.hyperparameters}
        told = {name: group[name] for name in defaults if group.get(name) is not None}
        return Job({**defaults, **told}, RECIPES["fp32"])

    # -- groups ------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's, with every option checked. Raises `InputError`, which names the parameter if it is about one."""
        where = f"group {len(self.param_groups)}"
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            if not group["params"]:
                raise InputError(f"{where} has no parameters")
            self._check_group(group)
            for at in members(group):
                if not at.p.is_floating_point():
                    raise InputError(f"{at.name} is {at.p.dtype}; these optimizers take real floating-point parameters")
                self._check(at)
        except InputError:
            self.param_groups.pop()
            raise
        if self.layerwise is not None:
            number = len(self.param_groups) - 1
            for at in members(group):
                if at.p.requires_grad:
                    hook = self._in_backward(number, at.i)
                    self._hooks.append(at.p.register_post_accumulate_grad_hook(hook))  # type: ignore[no-untyped-call]

    def _check_group(self, group: Group) -> None:
        for name, allowed in self.RANGES.items():
            if group.get(name) is not None:
                allowed.check(name, group[name])
        for name, choices in self.CHOICES.items():
            if group[name] not in choices:
                raise unknown(name, str(group[name]), choices)
        if "betas" in group:
            for i, beta in enumerate(group["betas"]):
                FRACTION.check(f"betas[{i}]", beta)

    def remove_hooks(self) -> None:
        """Ends the layer-wise update: from now on `step()` does the work."""
        while self._hooks:
            self._hooks.pop().remove()
        self.layerwise = None

    # -- a step ------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step over all parameters that have a gradient. Raises `InputError` before the first update where a
        gradient is sparse, of another shape, NaN or infinite; a failing SVD raises when its parameter is reached."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        ready = [at for group in self.param_groups for at in members(group) if self._ready(at)]
        for at in ready:
            self._clip(at)
        self._refuse([at for at in ready if at.p.grad is not None])
        for at in ready:
            self._advance(at)
        return loss

    def _ready(self, at: Found) -> bool:
        return at.p.grad is not None or (at.p in self.state and PENDING in self.state[at.p])

    def _advance(self, at: Found) -> None:
        """Updates one parameter. The gradient of a layer-wise update is freed."""
        state = self.state.get(at.p, {})
        self._update(at, at.p.grad, state)
        state.pop(PENDING, None)
        state.pop(MICRO, None)
        self.state[at.p] = state
        if self.layerwise is not None:
            at.p.grad = None

    def _clip(self, at: Found) -> None:
        if self.layerwise is not None and self.layerwise.clip_value is not None and at.p.grad is not None:
            at.p.grad.clamp_(-self.layerwise.clip_value, self.layerwise.clip_value)

    def _in_backward(self, group: int, i: int) -> Callable[[Tensor], None]:
        """The hook of one parameter, called when a backward pass has added to its gradient."""

        @torch.no_grad()
        def hook(p: Tensor) -> None:
            assert self.layerwise is not None
            at = Found(p, self.param_groups[group], i)
            passes = self.layerwise.gradient_accumulation_steps
            if passes > 1:
                state = self.state[p]
                state[MICRO] = state.get(MICRO, 0) + 1
                if state[MICRO] < passes:
                    self._accumulate(at, state)
                    return
            self._clip(at)
            self._refuse([at])
            self._advance(at)

        return hook

    def _accumulate(self, at: Found, state: State) -> None:
        """Takes in a micro-batch: its compressed gradient, or the gradient as it is."""
        assert self.layerwise is not None
        assert at.p.grad is not None
        if self.layerwise.clip_value is not None:
            return
        self._refuse([at])
        low = self._compressed(at, at.p.grad, state)
        if low is not None:
            state[PENDING] = low if PENDING not in state else state[PENDING].add_(low)
            at.p.grad = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; gradients that a layer-wise update has summed so far are dropped too."""
        super().zero_grad(set_to_none)
        for state in self.state.values():
            state.pop(PENDING, None)
            state.pop(MICRO, None)

    def _refuse(self, found: Iterable[Found]) -> None:
        """Raises `InputError` for the first gradient that cannot be used."""
        extremes: dict[torch.device, list[tuple[Found, tuple[Tensor, Tensor]]]] = defaultdict(list)
        for at in found:
            grad = at.p.grad
            assert grad is not None
            if grad.is_sparse or grad.layout is not torch.strided:
                raise InputError(f"{at.name} has a sparse gradient, which these optimizers do not take")
            if grad.shape != at.p.shape:
                raise InputError(f"{at.name}: its gradient is {tuple(grad.shape)}, not {tuple(at.p.shape)}")
            if self.error_if_nonfinite and grad.numel():
                extremes[grad.device].append((at, torch.aminmax(grad)))  # one pass, NaN included, and two scalars
        for ranges in extremes.values():
            ends = torch.stack([torch.stack(pair).float() for _, pair in ranges])
            if not ends.isfinite().all():
                bad = (~ends.isfinite()).any(dim=1).tolist().index(True)
                raise InputError(f"{ranges[bad][0].name} has a NaN or infinite gradient; nothing was updated")

    # -- saving and loading ------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict()` returned, every tensor in its own format and on its parameter's device.

        (torch's casts a state tensor to the parameter's format: codes and float32 averages would be lost.) Raises
        `InputError` that names the parameter where a tensor does not fit; the optimizer is then as it was.
        """
        boxed = {i: _boxed(kept) for i, kept in self._fitting(state_dict).items()}
        super().load_state_dict({**state_dict, "state": boxed})

    def __getstate__(self) -> dict[str, Any]:
        """A copy has no hooks: they belong to the parameters."""
        more: dict[str, Any] = {"error_if_nonfinite": self.error_if_nonfinite, "layerwise": None, "_hooks": []}
        return {**super().__getstate__(), **more}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for kept in self.state.values():
            for name, value in kept.items():
                if isinstance(value, _Box):
                    kept[name] = value.tensor

    def _fitting(self, state_dict: Mapping[str, Any]) -> dict[int, State]:
        """The state of each number, moved and copied."""
        groups = state_dict["param_groups"]
        if len(groups) != len(self.param_groups):
            raise InputError(
                f"the state has {len(groups)} parameter groups, and the optimizer {len(self.param_groups)}"
            )
        fitting: dict[int, State] = {}
        for number, (saved, group) in enumerate(zip(groups, self.param_groups, strict=True)):
            if len(saved["params"]) != len(group["params"]):
                raise InputError(
                    f"group {number} of the state has {len(saved['params'])} parameters, and the optimizer's "
                    f"{len(group['params'])}"
                )
            merged = {**saved, "params": group["params"]}
            for key, at in zip(saved["params"], members(merged), strict=True):
                if key in state_dict["state"]:
                    named = Found(at.p, {**merged, "param_names": group.get("param_names")}, at.i)
                    fitting[key] = self._fit(named, state_dict["state"][key])
        return fitting

    def _fit(self, at: Found, kept: Mapping[str, Any]) -> State:
        """One parameter's state. Raises `InputError` where names, shapes or formats are not the ledger's."""
        fitted: State = {k: v for k, v in kept.items() if not isinstance(v, Tensor)}
        tensors = {k: v for k, v in kept.items() if isinstance(v, Tensor)}
        expected = {b.name: b for b in self._buffers(at)}
        missing = [name for name in expected if name not in tensors] if tensors else []
        if missing:
            raise InputError(f"{at.name}: the state has no {missing[0]!r}; it has {', '.join(tensors) or 'nothing'}")
        for name, tensor in tensors.items():
            buffer = expected.get(name)
            if buffer is None:
                if name in (PENDING, *(b.name for b in self._shared())):
                    fitted[name] = tensor.to(at.p.device, copy=True)
                    continue
                raise InputError(f"{at.name}: the state has {name!r}, which {type(self).__name__} does not keep")
            fitted[name] = _as_buffer(at, buffer, tensor)
        return fitted

    def _shared(self) -> tuple[Buffer, ...]:
        code = self.METHOD.implementation(self.IMPLEMENTATION)
        return code.shared(self._job({}))


class _Box:
    """Carries a tensor through torch's load, which casts bare ones."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _boxed(kept: State) -> State:
    return {name: _Box(value) if isinstance(value, Tensor) else value for name, value in kept.items()}


def members(group: Group) -> Iterator[Found]:
    return (Found(p, group, i) for i, p in enumerate(group["params"]))


def _as_buffer(at: Found, buffer: Buffer, tensor: Tensor) -> Tensor:
    packed = not hasattr(torch, buffer.dtype.name)
    shape = (buffer.nbytes,) if packed else buffer.shape
    if tuple(tensor.shape) != shape:
        raise InputError(f"{at.name}: its {buffer.name} is {tuple(tensor.shape)} in the state, and {shape} here")
    dtype = torch.uint8 if packed else getattr(torch, buffer.dtype.name)
    if dtype.is_floating_point != tensor.dtype.is_floating_point:
        raise InputError(f"{at.name}: its {buffer.name} is {tensor.dtype} in the state, and {dtype} here")
    return tensor.to(at.p.device, dtype, copy=True)


def _distributed() -> bool:
    return (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    )
