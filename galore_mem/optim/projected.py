"""What the projected optimizers share: low-rank groups, and when and how a projector is renewed.

A group with a `rank` is projected, one without is not. Its options, with the names of the GaLore reference where it
has them:

`rank`: r, clipped to the smaller side. `update_proj_gap`: steps between two refreshes. `scale`: alpha, what the
update is multiplied by once it is projected back. `proj_type`: the side that is projected (`std`, `reverse_std`,
`left`, `right`, `full`). `svd`: `exact`, or `randomized` with `oversampling` columns beyond the rank and
`power_iterations` rounds (`seed` starts its random numbers, from which a resumed run continues). `carry_moments`: a
refresh turns the moments into the new coordinates (the reference leaves the old numbers). `cos_threshold`: None, or
the similarity of adjacent projectors from which on a parameter's gap grows: when each of the last `queue_size`
refreshes reached it, the gap is multiplied by `gamma_proj` (rounded down) and the count starts over (Q-GaLore,
arXiv:2407.08296, section 3.2).

With `full`, the low-rank gradient of a refresh is diagonal but for rounding, and Adam makes steps of full size of that
rounding while epsilon is below it: such runs differ from machine to machine, here as in the reference.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, TypedDict
from zlib import crc32

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # not in torch's __all__

from galore_mem.errors import InputError, unknown
from galore_mem.methods.projection import OURS, PROJ_TYPES, names, sides_of
from galore_mem.optim.base import COUNT, PENDING, Found, ParameterWise, Range, State
from galore_mem.optim.projection import (
    Projectors,
    Randomized,
    add_raised_,
    carried,
    found,
    lowered,
    rotations,
    similarity,
)

SVD = ("exact", "randomized")


class LowRank(TypedDict, total=False):
    """The options of a low-rank group, as keyword arguments of every projected optimizer."""

    rank: int | None
    update_proj_gap: int
    scale: float
    proj_type: str
    svd: str
    oversampling: int
    power_iterations: int
    carry_moments: bool
    cos_threshold: float | None
    gamma_proj: float
    queue_size: int
    seed: int


DEFAULTS: LowRank = {
    "rank": None,
    "update_proj_gap": 200,
    "scale": 0.25,
    "proj_type": "std",
    "svd": "exact",
    "oversampling": 10,
    "power_iterations": 1,
    "carry_moments": False,
    "cos_threshold": None,
    "gamma_proj": 2.0,
    "queue_size": 5,
    "seed": 0,
}


def low_rank_options(given: Mapping[str, Any], **changed: Any) -> dict[str, Any]:
    """The options of low-rank groups: the defaults, an optimizer's own, what was given. Raises `InputError` for a name
    that is none of them."""
    for name in given:
        if name not in DEFAULTS:
            raise unknown("option", name, DEFAULTS)
    return {**DEFAULTS, **changed, **given}


class Projected(ParameterWise):
    """The base class of the GaLore family. A subclass writes `_update_low` and `_update_full`, and says in `CARRIED`
    and `CARRIED_SQUARES` which tensors `carry_moments` turns."""

    RANGES: ClassVar[Mapping[str, Range]] = {
        **ParameterWise.RANGES,
        "rank": COUNT._replace(optional=True),
        "update_proj_gap": COUNT,
        "scale": Range(),
        "oversampling": Range(whole=True),
        "power_iterations": Range(whole=True),
        "cos_threshold": Range(optional=True),
        "gamma_proj": Range(1.0),
        "queue_size": COUNT,
        "seed": Range(whole=True),
    }
    CHOICES: ClassVar[Mapping[str, tuple[str, ...]]] = {"proj_type": PROJ_TYPES, "svd": SVD}
    FLAGS: ClassVar[tuple[str, ...]] = ("carry_moments",)
    CARRIED: ClassVar[tuple[str, ...]] = ("exp_avg",)
    CARRIED_SQUARES: ClassVar[tuple[str, ...]] = ("exp_avg_sq",)

    def _update_full(self, at: Found, grad: Tensor, state: State) -> None:
        """One update of a parameter that is not projected."""
        raise NotImplementedError

    def _update_low(self, at: Found, grad: Tensor | None, state: State) -> None:
        """One update of a projected parameter whose projector is up to date."""
        raise NotImplementedError

    # -- one parameter -----------------------------------------------------------------------------

    def _projects(self, at: Found) -> bool:
        return at.group["rank"] is not None

    def _check(self, at: Found) -> None:
        if self._projects(at) and at.p.dim() != 2:
            raise InputError(
                f"{at.name} has the shape {tuple(at.p.shape)}; {type(self).__name__} projects matrices: put it into a "
                "group without rank"
            )

    def _needs_finite(self, at: Found) -> bool:
        return self._projects(at) and self._due(self.state.get(at.p, {}))

    def _update(self, at: Found, grad: Tensor | None, state: State) -> None:
        if not self._projects(at):
            assert grad is not None
            self._update_full(at, grad, state)
        else:
            if self._due(state):
                assert grad is not None
                self._refresh(at, grad, state)
            self._update_low(at, grad, state)

    def _compressed(self, at: Found, grad: Tensor, state: State) -> Tensor | None:
        if not self._projects(at) or self._due(state):
            return None
        return self._lowered(at, grad, state)

    def _lowered(self, at: Found, grad: Tensor, state: State) -> Tensor:
        """The low-rank gradient."""
        return lowered(grad, self._projectors(at, state))

    def _add_raised_(self, at: Found, low: Tensor, state: State, alpha: float) -> None:
        """`p += alpha · (low projected back)`."""
        add_raised_(at.p, low, self._projectors(at, state), alpha)

    def _gradient(self, at: Found, grad: Tensor | None, state: State) -> Tensor:
        """The low-rank gradient of all micro-batches; its tensor is free to be overwritten."""
        pending: Tensor | None = state.pop(PENDING, None)
        if grad is None:
            assert pending is not None
            return pending
        low = self._lowered(at, grad, state)
        return low if pending is None else low.add_(pending)

    # -- the projector -----------------------------------------------------------------------------

    def _sides(self, at: Found) -> tuple[str, ...]:
        return sides_of(tuple(at.p.shape), at.group["proj_type"])

    def _names(self, at: Found) -> tuple[str, ...]:
        """What the projectors of the sides are called in the state."""
        return names(self._sides(at), OURS)

    def _rank(self, at: Found) -> int:
        return int(min(at.group["rank"], *at.p.shape))

    def _due(self, state: State) -> bool:
        return bool(state.get("step", 0) >= state.get("next_refresh", 0))

    def _refresh(self, at: Found, grad: Tensor, state: State) -> None:
        """Renews the projector of the current gradient, and settles when to do so again."""
        fresh = self._found(at, grad, state)
        if self._compares(at) and "next_refresh" in state:
            self._compare(at, self._projectors(at, state), fresh, state)
        self._keep(at, fresh, state)
        state["next_refresh"] = state.get("step", 0) + state.get("gap", at.group["update_proj_gap"])

    def _found(self, at: Found, grad: Tensor, state: State) -> dict[str, Tensor]:
        how = None
        if at.group["svd"] == "randomized":
            generator = self._generator(at, state)
            how = Randomized(generator, at.group["oversampling"], at.group["power_iterations"])
        try:
            return self._decomposed(at, grad, how)
        except LinAlgError as error:
            raise InputError(
                f"{at.name}: the SVD of its gradient {tuple(grad.shape)} does not converge; its state and weight are "
                f"as they were ({error})"
            ) from error

    def _decomposed(self, at: Found, grad: Tensor, how: Randomized | None) -> dict[str, Tensor]:
        """New projectors by side."""
        return found(grad, self._sides(at), self._rank(at), how)

    def _compares(self, at: Found) -> bool:
        return at.group["cos_threshold"] is not None or bool(at.group["carry_moments"])

    def _compare(self, at: Found, old: Projectors, fresh: Projectors, state: State) -> None:
        """What a refresh does with the projector before: the gap by their similarity, the moments carried over."""
        group = at.group
        if group["cos_threshold"] is not None:
            seen = [*state.get("similarities", ()), similarity(old, fresh)][-group["queue_size"] :]
            if len(seen) == group["queue_size"] and min(seen) >= group["cos_threshold"]:
                state["gap"] = int(state.get("gap", group["update_proj_gap"]) * group["gamma_proj"])
                seen = []
            state["similarities"] = seen
        if group["carry_moments"]:
            self._carry(state, rotations(old, fresh))

    def _carry(self, state: State, by: Mapping[str, Tensor]) -> None:
        for name in (*self.CARRIED, *self.CARRIED_SQUARES):
            if name in state:
                state[name].copy_(carried(state[name], by, squares=name in self.CARRIED_SQUARES))

    def _keep(self, at: Found, fresh: Projectors, state: State) -> None:
        """Puts new projectors into the state, in the place of those that are there."""
        state.update(zip(self._names(at), (fresh[side] for side in self._sides(at)), strict=True))

    def _projectors(self, at: Found, state: State) -> dict[str, Tensor]:
        """The projectors in the gradient's format."""
        return {side: state[name] for side, name in zip(self._sides(at), self._names(at), strict=True)}

    def _generator(self, at: Found, state: Mapping[str, Any]) -> torch.Generator:
        """Random numbers that depend on the seed, the parameter and the step only: a resumed run has the same.
        (A CPU generator takes 32 bits of a seed.)"""
        key = crc32(f"{at.group['seed']} {state.get('step', 0)} {at.name}".encode())
        return torch.Generator(at.p.device).manual_seed(key)
