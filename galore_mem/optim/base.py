"""What all optimizers here share: one parameter at a time, in `step()` or in the backward pass.

`step()` first looks at every gradient and then updates parameter by parameter, so that a gradient which cannot be
used changes nothing. A subclass says how one parameter is updated; the rest (groups and their checks, the layer-wise
update, gradient accumulation, saving and loading) is here.

State per parameter: tensors under the names of the ledger (`galore_mem.methods`), and plain Python numbers. Both
load with `torch.load(weights_only=True)`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from typing import Any, ClassVar

import torch
from torch import Tensor

from galore_mem.dtypes import dtype
from galore_mem.errors import InputError, unknown
from galore_mem.methods.base import Buffer, Job, Method, Trained
from galore_mem.optim.int8 import Int8Weight
from galore_mem.optim.layerwise import Hook, LayerWise, distributed, has_hook
from galore_mem.optim.options import COUNT, FRACTION, Range
from galore_mem.optim.state import MICRO, PENDING, Found, Group, State, fitted, members
from galore_mem.setup import RECIPES
from galore_mem.spec.model import Role

__all__ = [
    "COUNT", "FRACTION", "MICRO", "PENDING",
    "Found", "Group", "LayerWise", "ParameterWise", "Range", "State", "members",
]  # fmt: skip


DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


# what a group may hold besides the optimizer's options: its members, and what schedulers and trainers write there
FREE = frozenset((
    "params", "param_names", "partition", "name", "initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum",
    "swa_lr", "lr_scale",
))  # fmt: skip


class ParameterWise(torch.optim.Optimizer):
    """The base class. Give it `model.named_parameters()`, and errors name the parameter.

    `layerwise` turns on the update in the backward pass. With `error_if_nonfinite` a NaN or infinite gradient is an
    `InputError` before anything has changed (in a layer-wise update: before its parameter has); it costs one pass over
    the gradients and one wait for the device, in a layer-wise update one for each parameter.

    A copy, or a pickle, of the optimizer has parameters of its own, which it updates as this one does.

    A subclass sets `METHOD` (its ledger is that method's `galore-mem` implementation) and `RANGES`, and writes
    `_update`; `_compressed` where micro-batches can be summed in less than a full gradient; `_check` for
    parameters that it cannot take; `_needs_finite` where an update fails on NaN.
    """

    METHOD: ClassVar[Method]
    IMPLEMENTATION: ClassVar[str] = "galore-mem"
    RANGES: ClassVar[Mapping[str, Range]] = {"lr": Range(), "eps": Range(), "weight_decay": Range()}
    CHOICES: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    FLAGS: ClassVar[tuple[str, ...]] = ()
    INT8: ClassVar[bool] = False  # does it update INT8 weights?

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        layerwise: LayerWise | None = None,
        error_if_nonfinite: bool = True,
    ) -> None:
        if layerwise is not None and not isinstance(layerwise, LayerWise):
            raise InputError(f"layerwise must be a LayerWise or None, got {layerwise!r}")
        if layerwise is not None and distributed():
            raise InputError(
                "the layer-wise update sees a gradient before it is reduced over processes: one process only"
            )
        if isinstance(params, Tensor) or not isinstance(params, Iterable):
            raise InputError(f"params must be an iterable of parameters or of groups, got {type(params).__name__}")
        if isinstance(params, set | frozenset):
            raise InputError("params must have an order, by which a saved state is found again; a set has none")
        given = list(params)
        if not given:
            raise InputError("the optimizer got no parameters; is everything frozen?")
        if not isinstance(error_if_nonfinite, bool):
            raise InputError(f"error_if_nonfinite must be True or False, got {error_if_nonfinite!r}")
        self.error_if_nonfinite = error_if_nonfinite
        self.layerwise = layerwise
        self._hooks: list[Any] = []
        self._updated: set[Tensor] = set()  # in a backward pass, since the last `step()`
        try:
            super().__init__(given, defaults)
        except BaseException:  # undone and raised again, whatever it was
            self.remove_hooks()  # of the groups before
            raise

    # -- what a subclass writes --------------------------------------------------------------------

    def _update(self, at: Found, grad: Tensor | None, state: State) -> None:
        """One update of `at.p`, in place; may change `state` only when nothing can fail any more. `grad` is None where
        all of it is in `state[PENDING]`; `state["step"]`, if there, is the number of updates before this."""
        raise NotImplementedError

    def _compressed(self, at: Found, grad: Tensor, state: State) -> Tensor | None:
        """What is kept of a micro-batch's gradient in its stead, or None where the gradient itself is needed."""
        return None

    def _check(self, at: Found) -> None:
        """Raises `InputError` where the method cannot take the parameter."""

    def _needs_finite(self, at: Found) -> bool:
        """Would a NaN make the next update of this parameter fail?"""
        return False

    def _buffers(self, at: Found) -> tuple[Buffer, ...]:
        """The tensors that the ledger keeps for a parameter."""
        code = self.METHOD.implementation(self.IMPLEMENTATION)
        return code.state(self._trained(at), self._job(at.group))

    def _shared(self) -> tuple[Buffer, ...]:
        """The tensors that the ledger keeps once for all parameters."""
        return self.METHOD.implementation(self.IMPLEMENTATION).shared(self._job({}))

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
        if not isinstance(param_group, dict) or param_group.get("params") is None:
            raise InputError(f"{where} must be a dict with params, got {type(param_group).__name__}")
        for name in param_group:
            if name not in self.defaults and name not in FREE:
                raise unknown("option of a parameter group", str(name), self.defaults)
        try:
            super().add_param_group(dict(param_group))  # torch writes the defaults into the dict it is given
        except (TypeError, ValueError) as error:
            raise InputError(f"{where}: {error}") from None
        group = self.param_groups[-1]
        try:
            self._check_members(where, group)
        except BaseException:  # undone and raised again, whatever it was
            self.param_groups.pop()
            raise
        self._register(len(self.param_groups) - 1)

    def _check_members(self, where: str, group: Group) -> None:
        if not group["params"]:
            raise InputError(f"{where} has no parameters")
        self._check_group(group)
        seen: set[Tensor] = set()
        for at in members(group):
            if at.p.dtype not in DTYPES:
                raise InputError(f"{at.name} is {at.p.dtype}; these optimizers take {', '.join(map(str, DTYPES))}")
            if hasattr(at.p, "placements"):
                raise InputError(f"{at.name} is a distributed tensor; these optimizers need whole parameters")
            if at.p in seen:
                raise InputError(f"{at.name} is in {where} twice")
            seen.add(at.p)
            if isinstance(at.p, Int8Weight) and not self.INT8:
                raise InputError(f"{at.name} is an INT8 weight; only QGaLoreAdamW8bit rounds its updates to one")
            self._check(at)
            if self.layerwise is not None and has_hook(at.p):
                raise InputError(f"{at.name} has a layer-wise optimizer already; call remove_hooks() of that one first")

    def _check_group(self, group: Group) -> None:
        for name, allowed in self.RANGES.items():
            if name in group:
                value = group[name]
                if name == "lr" and isinstance(value, Tensor) and value.numel() == 1:
                    allowed.check(name, value.item())
                else:
                    group[name] = allowed.check(name, value)
        for name, choices in self.CHOICES.items():
            if group[name] not in choices:
                raise unknown(name, str(group[name]), choices)
        for name in self.FLAGS:
            if not isinstance(group[name], bool):
                raise InputError(f"{name} must be True or False, got {group[name]!r}")
        if "betas" in group:
            betas = group["betas"]
            if not isinstance(betas, tuple | list) or len(betas) != 2:
                raise InputError(f"betas must be two numbers, got {betas!r}")
            group["betas"] = tuple(FRACTION.check(f"betas[{i}]", beta) for i, beta in enumerate(betas))

    def _register(self, number: int) -> None:
        """Hooks for the parameters of a group, if they are updated in the backward pass."""
        if self.layerwise is not None:
            for at in members(self.param_groups[number]):
                if at.p.requires_grad and not has_hook(at.p):
                    self._hooks.append(Hook(self._in_backward, number, at.i).register(at.p))

    def remove_hooks(self) -> None:
        """Ends the layer-wise update: from now on `step()` does the work."""
        while self._hooks:
            self._hooks.pop().remove()
        self.layerwise = None

    # -- a step ------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step over all parameters that have a gradient. Raises `InputError` before the first update where a
        gradient is sparse, of another shape, NaN or infinite. An SVD that fails although its gradient is finite raises
        when its parameter is reached: that one is as it was, those before it are updated."""
        if "grad_scale" in self.__dict__:  # see `_step_supports_amp_scaling`; None after `scaler.unscale_`
            for name in ("grad_scale", "found_inf"):
                self.__dict__.pop(name, None)
            raise InputError("a layer-wise update has used the gradients before the loss scaler can unscale them")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        ready = [at for group in self.param_groups for at in members(group) if self._ready(at)]
        self._make_ready([at for at in ready if at.p.grad is not None])
        for at in ready:
            self._advance(at)
        self._updated.clear()
        return loss

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """True makes torch's `GradScaler` give us its scale, which a layer-wise `step` refuses in words; else it would
        fail on gradients that are gone."""
        return self.layerwise is not None

    def _ready(self, at: Found) -> bool:
        return at.p.grad is not None or (at.p in self.state and PENDING in self.state[at.p])

    def _advance(self, at: Found) -> None:
        """Updates one parameter. The gradient of a layer-wise update is freed."""
        state = self.state.get(at.p, {})
        self._update(at, at.p.grad, state)
        state["step"] = state.get("step", 0) + 1
        state.pop(PENDING, None)
        state.pop(MICRO, None)
        self.state[at.p] = state
        if self.layerwise is not None:
            at.p.grad = None

    def _in_backward(self, p: Tensor, group: int, i: int) -> None:
        """A backward pass has added to a parameter's gradient. (The place, as loading a state makes new groups.)"""
        assert self.layerwise is not None
        at = Found(p, self.param_groups[group], i)
        if at.p in self._updated:
            raise InputError(
                f"{at.name} has another gradient since its update, and step() was not called: set LayerWise's "
                "gradient_accumulation_steps to the number of backward passes for each step()"
            )
        state = self.state.get(at.p, {})
        passes = state.get(MICRO, 0) + 1
        if passes < self.layerwise.gradient_accumulation_steps:
            self._accumulate(at, state)
            state[MICRO] = passes
            self.state[at.p] = state
        else:
            self._make_ready([at])
            self._advance(at)
            self._updated.add(at.p)

    def _accumulate(self, at: Found, state: State) -> None:
        """Takes in a micro-batch: its compressed gradient, or the gradient as it is."""
        assert self.layerwise is not None
        assert at.p.grad is not None
        if self.layerwise.clip_value is not None:
            return  # the sum is what is clipped
        self._make_ready([at])
        low = self._compressed(at, at.p.grad, state)
        if low is not None:
            state[PENDING] = low if PENDING not in state else state[PENDING].add_(low)
            at.p.grad = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; gradients that a layer-wise update has summed so far are dropped too."""
        super().zero_grad(set_to_none)
        self._updated.clear()
        for state in self.state.values():
            state.pop(PENDING, None)
            state.pop(MICRO, None)

    def _make_ready(self, found: Iterable[Found]) -> None:
        """Clips gradients where that is asked for. Raises `InputError` for the first that cannot be used."""
        clip = None if self.layerwise is None else self.layerwise.clip_value
        checked: dict[torch.device, list[Found]] = defaultdict(list)
        for at in found:
            grad = at.p.grad
            assert grad is not None
            if grad.layout is not torch.strided:
                raise InputError(f"{at.name} has a sparse gradient, which these optimizers do not take")
            if grad.shape != at.p.shape:
                raise InputError(f"{at.name}: its gradient is {tuple(grad.shape)}, not {tuple(at.p.shape)}")
            if clip is not None:
                grad.clamp_(-clip, clip)
            if (self.error_if_nonfinite or self._needs_finite(at)) and grad.numel():
                checked[grad.device].append(at)
        for device, those in checked.items():
            finite = torch.empty(len(those), dtype=torch.bool, device=device)  # one tensor, read once
            for i, at in enumerate(those):
                assert at.p.grad is not None
                both = torch.stack(torch.aminmax(at.p.grad))  # one pass, NaN included, and two scalars
                torch.all(both.isfinite(), out=finite[i])
            if not finite.all():
                bad = finite.tolist().index(False)
                left = "nothing was updated" if self.layerwise is None else "its update was left out"
                raise InputError(f"{those[bad].name} has a NaN or infinite gradient; {left}")

    # -- saving and loading ------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict()` returned, every tensor in its own format and on its parameter's device.

        As in torch the saved options replace those of the groups, but for those that decide which tensors a parameter
        has (`rank`, `proj_type`, ...): they must agree. Raises `InputError`, which names the parameter where it is
        about one; the optimizer is then as it was.

        (torch's own casts a state tensor to the parameter's format: codes and float32 averages would be lost.)
        """
        given = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            given = before(self, given) or given
        groups, state = self._fitting(given)
        super().__setstate__({"state": state, "param_groups": groups})
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def __getstate__(self) -> dict[str, Any]:
        """All of it but the hooks (torch leaves out users' too) and the `step` that a scheduler has put in its way."""
        left = ("_hooks", "_updated", "step", "grad_scale", "found_inf")
        return {k: v for k, v in self.__dict__.items() if k not in left and not k.startswith("_optimizer_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._hooks = []
        self._updated = set()
        for number in range(len(self.param_groups)):
            self._register(number)

    def _fitting(self, state_dict: Mapping[str, Any]) -> tuple[list[Group], dict[Tensor, State]]:
        """Groups with the saved options, and the saved states, moved and copied."""
        if not {"state", "param_groups"} <= state_dict.keys():
            raise InputError(
                f"this is not the state of an optimizer; it has {', '.join(map(str, state_dict)) or 'nothing'}"
            )
        saved = state_dict["param_groups"]
        if len(saved) != len(self.param_groups):
            raise InputError(f"the state has {len(saved)} parameter groups, and the optimizer {len(self.param_groups)}")
        groups: list[Group] = []
        states: dict[Tensor, State] = defaultdict(dict)
        for number, (old, group) in enumerate(zip(saved, self.param_groups, strict=True)):
            keys = old["params"]
            if len(keys) != len(group["params"]):
                raise InputError(
                    f"group {number}: {len(keys)} parameters in the state, and {len(group['params'])} here"
                )
            merged = {**group, **deepcopy(old), "params": group["params"]}
            try:
                self._check_group(merged)
            except InputError as error:
                raise InputError(f"group {number} of the state: {error}") from None
            groups.append(merged)
            for key, at in zip(keys, members(group), strict=True):
                self._agree(at, merged)
                if key in state_dict["state"]:
                    states[at.p] = self._fit(at, state_dict["state"][key])
        return groups, states

    def _agree(self, at: Found, merged: Group) -> None:
        """Raises `InputError` where the saved options ask for other tensors than ours."""
        ours = {b.name: b.shape for b in self._buffers(at)}
        saved = {b.name: b.shape for b in self._buffers(at._replace(group=merged))}
        for name in sorted({**ours, **saved}):
            if ours.get(name) != saved.get(name):
                raise InputError(
                    f"{at.name}: by the options in the state its {name} is {saved.get(name, 'not there')}, and "
                    f"{ours.get(name, 'not there')} by those of the optimizer; make it with the saved ones (rank, ...)"
                )

    def _fit(self, at: Found, kept: Mapping[str, Any]) -> State:
        """One parameter's state as this optimizer keeps it."""
        return fitted(at, kept, self._buffers(at), (PENDING, *(b.name for b in self._shared())), type(self).__name__)
