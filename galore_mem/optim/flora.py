"""Flora: momentum in a random subspace that is made again from a seed, on top of Adafactor.

Hao, Cao, Mou: Flora: Low-Rank Adapters Are Secretly Gradient Compressors, ICML 2024, arXiv:2402.03293, algorithm 2;
Shazeer, Stern: Adafactor, arXiv:1804.04235, algorithm 4 (`adafactor.py` writes it down). For a matrix whose smaller
side is its columns, with A of r x cols and entries from N(0, 1/r), so that E[AᵀA] is the identity:

1. U = G / sqrt(V̂), Adafactor's second moment being factored
2. every κ steps a new A' takes the place of A:  M = M·A·A'ᵀ
3. M = β1·M + (1 - β1)·U·Aᵀ
4. W = W - ρ·max(ε2, RMS(W)) · M·A / max(1, RMS(M·A)/d)

(Otherwise A is r x rows, and stands on the left.) No projection is stored: A is drawn again from its seed in each step.

Choices. Algorithm 2 is written for a gradient; Adafactor's momentum averages U, as in the authors' code. Clipping comes
last, as there: M·A is noisier than U, by cols/r in its square. The authors' code mixes this step's U in uncompressed,
(1 - β1)·U + β1·M·A; algorithm 2 applies M·A, which needs no tensor of the weight's size: the factors of V̂ go into A
and into U·Aᵀ, and RMS(M·A) follows from r x r matrices. The authors leave momentum uncompressed where a matrix is more
than four times as long as wide; here the parameter groups decide. Where r reaches the smaller side nothing would be
saved, and momentum is kept as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar
from zlib import crc32

import torch
from torch import Tensor

from galore_mem.errors import InputError
from galore_mem.methods import flora
from galore_mem.optim import adafactor
from galore_mem.optim.base import Found, Group, LayerWise, ParameterWise, State
from galore_mem.optim.options import COUNT, Range
from galore_mem.optim.projection import at_least_float32

# A CPU generator takes 32 bits of a seed. From one seed to the next: 2^32 over the golden ratio; odd, so all come up
NEXT = 0x9E3779B9


class Flora(ParameterWise):
    """Adafactor whose first moment is a random projection of the update.

    `params`: parameters or named parameters, or groups of them; in groups with a `rank` the momentum is compressed
    (matrices only). `galore_mem.optim.parameter_groups(model, rank=...)` makes the two groups of a model. `beta1`: 0
    keeps no momentum. `kappa`: steps between two projections. `seed`: makes each parameter's first seed, with its name.
    The other arguments are `GaLoreAdafactor`'s.

    State of an m x n matrix (m <= n): `exp_avg` n·r in the gradient's format, n + m float32 means; the seed is a Python
    number. A step needs the projection twice, 2·m·r, and n·r. The random numbers of a seed depend on the device's type:
    a run is resumed bit for bit on the same type.

    The second moment needs whole gradients, so micro-batches of a layer-wise update are not summed in the compressed
    space. Raises `InputError` as the other optimizers do.
    """

    METHOD = flora.METHOD
    RANGES: ClassVar[Mapping[str, Range]] = {
        **adafactor.RANGES,
        "beta1": Range(0.0, 1.0),
        "rank": COUNT._replace(optional=True),
        "kappa": COUNT,
        "seed": Range(whole=True),
    }

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        beta1: float = 0.9,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float | None = 1.0,
        decay_rate: float = -0.8,
        weight_decay: float = 0.0,
        *,
        rank: int | None = None,
        kappa: int = 1000,
        seed: int = 0,
        scale_parameter: bool = False,
        relative_step: bool = False,
        layerwise: LayerWise | None = None,
        error_if_nonfinite: bool = True,
    ) -> None:
        defaults = {
            "lr": lr, "beta1": beta1, "eps": eps, "clip_threshold": clip_threshold, "decay_rate": decay_rate,
            "weight_decay": weight_decay, "rank": rank, "kappa": kappa, "seed": seed,
            "scale_parameter": scale_parameter, "relative_step": relative_step,
        }  # fmt: skip
        super().__init__(params, defaults, layerwise=layerwise, error_if_nonfinite=error_if_nonfinite)

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        adafactor.check(group)

    def _check(self, at: Found) -> None:
        if at.group["rank"] is not None and at.p.dim() != 2:
            raise InputError(
                f"{at.name} has the shape {tuple(at.p.shape)}; Flora compresses the momentum of matrices: put it into "
                "a group without rank"
            )

    def _compresses(self, at: Found) -> bool:
        rank = at.group["rank"]
        return rank is not None and bool(at.group["beta1"]) and rank < min(at.p.shape)

    def _update(self, at: Found, grad: Tensor | None, state: State) -> None:
        assert grad is not None
        (self._compressed_momentum if self._compresses(at) else self._whole_momentum)(at, grad, state)

    def _whole_momentum(self, at: Found, grad: Tensor, state: State) -> None:
        """Adafactor with a first moment as it is, or with none."""
        group, p = at.group, at.p
        update = adafactor.normalize_(adafactor.own(grad), state, group)
        if group["beta1"]:
            if "exp_avg" not in state:
                state["exp_avg"] = torch.zeros_like(p)
            update.copy_(state["exp_avg"].lerp_(update.to(p.dtype), 1 - group["beta1"]))
        clip = adafactor.clipping(adafactor.rms(update), group)
        rho, size = adafactor.step_size(p, state, group)
        adafactor.decay_(p, group, rho, size)
        update.mul_(clip if size is None else clip.mul_(size))
        p.add_(update.to(p.dtype), alpha=-rho)

    def _compressed_momentum(self, at: Found, grad: Tensor, state: State) -> None:
        """The steps of algorithm 2. A wide matrix is turned, as a view, so that the update is M·A for all."""
        group, p = at.group, at.p
        grad = adafactor.in_range(grad)
        rows, cols = adafactor.factors(grad, state, group)
        wide = p.shape[0] < p.shape[1]
        if wide:
            p, grad, rows, cols = p.T, grad.T, cols.T, rows.T
        projection = self._projection(at, grad, state)
        low = (grad @ (projection * cols).T).mul_(rows)
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros(_turned(low, wide).shape, dtype=p.dtype, device=p.device)
        average = _turned(state["exp_avg"], wide).lerp_(low.to(p.dtype), 1 - group["beta1"])
        del low
        clip = adafactor.clipping(_rms_of_product(adafactor.in_range(average), projection), group)
        rho, size = adafactor.step_size(p, state, group)
        adafactor.decay_(p, group, rho, size)
        projection.mul_(clip if size is None else clip.mul_(size))
        p.addmm_(average, projection.to(p.dtype), alpha=-rho)

    def _projection(self, at: Found, grad: Tensor, state: State) -> Tensor:
        """A of this step; where it is a new one, the momentum is carried over."""
        rank = at.group["rank"]
        if "seed" not in state:
            state["seed"] = crc32(f"{at.group['seed']} {at.name}".encode())
        elif state["step"] % at.group["kappa"] == 0:
            old = _drawn(state["seed"], rank, grad)
            state["seed"] = (state["seed"] + NEXT) % 2**32
            new = _drawn(state["seed"], rank, grad)
            average = _turned(state["exp_avg"], at.p.shape[0] < at.p.shape[1])
            average.copy_(adafactor.in_range(average) @ (old @ new.T))
            return new
        return _drawn(state["seed"], rank, grad)


def _turned(t: Tensor, wide: bool) -> Tensor:
    return t.T if wide else t


def _drawn(seed: int, rank: int, like: Tensor) -> Tensor:
    """A (r x cols) of a seed, in the format of a matrix and for its columns."""
    generator = torch.Generator(like.device).manual_seed(seed)
    drawn = torch.randn(rank, like.shape[1], generator=generator, dtype=like.dtype, device=like.device)
    return drawn.div_(rank**0.5)


def _rms_of_product(left: Tensor, right: Tensor) -> Tensor:
    """The RMS of left @ right, which is not made: the sum of its squares is that of (leftᵀ·left)∘(right·rightᵀ)."""
    inner = at_least_float32(left.T @ left).flatten()
    outer = at_least_float32(right @ right.T).flatten()
    return torch.dot(inner, outer).div_(left.shape[0] * right.shape[1]).sqrt_()
