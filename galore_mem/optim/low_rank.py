"""Low-Rank: a linear layer whose weight is the product of two trained factors, W = B·A.

The baseline of GaLore (arXiv:2403.03507, table 2) and GaLore-mini (section 4); Kamalakara, Locatelli, Venkitesh, Ba,
Gal, Gomez: Exploring Low Rank Training of Deep Neural Networks, arXiv:2209.13569. With r x in and out x r factors a
layer has r·(in + out) weights, and its optimizer, any of torch's, as many values per moment.

The factors start from normal distributions of one standard deviation s, with r·s⁴ the mean square of the replaced
weight: entries of B·A then have that weight's variance, whatever it was drawn from. (The papers of the baseline do not
say how they start; a product of two default initializations shrinks what passes through it.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from galore_mem.optim.adafactor import rms
from galore_mem.optim.groups import parameter_groups
from galore_mem.optim.options import COUNT


class LowRankLinear(nn.Module):
    """x·Aᵀ·Bᵀ + bias, never multiplied out. `weight_a` is r x in, `weight_b` out x r; the rank is clipped to both.

    `std`: the standard deviation of an entry of B·A; by default that of `nn.Linear`, 1/sqrt(3·in).
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        *,
        std: float | Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        COUNT.check("rank", rank)
        self.in_features, self.out_features = in_features, out_features
        self.rank = min(rank, in_features, out_features)
        self.weight_a = nn.Parameter(torch.empty(self.rank, in_features, device=device, dtype=dtype))
        self.weight_b = nn.Parameter(torch.empty(out_features, self.rank, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters((3 * in_features) ** -0.5 if std is None else std)

    @torch.no_grad()
    def reset_parameters(self, std: float | Tensor) -> None:
        """New factors, with a product of this standard deviation. (For 0, only B is zero: else neither would learn.)"""
        each = torch.as_tensor((std / self.rank**0.5) ** 0.5)
        self.weight_a.normal_().mul_(torch.where(each > 0, each, self.in_features**-0.5))
        self.weight_b.normal_().mul_(each)

    @property
    def weight(self) -> Tensor:
        """B·A, for code that looks at a layer's weight."""
        return self.weight_b @ self.weight_a

    def forward(self, x: Tensor) -> Tensor:
        return linear(linear(x, self.weight_a), self.weight_b, self.bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"bias={self.bias is not None}"
        )


def factorize(model: nn.Module, rank: int, target: Sequence[str] | None = None) -> nn.Module:
    """Replaces linear layers (and GPT-2's Conv1D) by `LowRankLinear`, in the model itself, which is returned.

    `target` as in `parameter_groups`: None for attention and MLP. A layer keeps its bias, format and device; trained
    weights are thrown away. Random numbers are torch's own (`torch.manual_seed`). A checkpoint of a factorized model
    loads into a model that was factorized in the same way. Raises `InputError` for a rank below 1 and as
    `parameter_groups` does.
    """
    COUNT.check("rank", rank)
    chosen = parameter_groups(model, target=target)[-1]["params"]
    owners = {id(model.get_submodule(name.rpartition(".")[0])) for name, p in chosen if p.dim() == 2}
    made: dict[int, LowRankLinear] = {}  # a layer that occurs twice stays one layer
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) in owners:
            if id(module) not in made:
                made[id(module)] = _factorized(module, rank)
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, made[id(module)])
    return model


def _factorized(layer: nn.Module, rank: int) -> LowRankLinear:
    weight, bias = cast(Tensor, layer.weight), cast("nn.Parameter | None", layer.bias)
    outputs, inputs = weight.shape if isinstance(layer, nn.Linear) else weight.shape[::-1]
    new = LowRankLinear(
        inputs, outputs, rank, False, std=rms(weight.detach()), device=weight.device, dtype=weight.dtype
    )
    new.bias = bias
    return new.train(layer.training)
