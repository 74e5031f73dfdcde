"""The methods that are trained: what each makes of a model, its optimizer, and the learning rates it is tried with.

Each takes three learning rates about a factor of 3 apart. GaLore and its relatives take ten times the others', and
multiply what they project by 0.25, as in the paper's experiments (arXiv:2403.03507, section 5.1: 0.01, where AdamW has
0.001). So embeddings, norms and head, which are not projected, learn ten times as fast; `adamw-scaled` is AdamW with
the same two learning rates, to tell what the projection does from what they do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from galore_mem import optim

ADAM = (1e-3, 3e-3, 1e-2)
GALORE = (1e-2, 3e-2, 1e-1)


@dataclass(frozen=True)
class LowRankSettings:
    """What all low-rank methods are given."""

    rank: int = 32
    update_proj_gap: int = 50
    scale: float = 0.25
    lora_alpha: int = 32
    merge_every: int = 100
    merge_warmup: int = 10


def nothing(step: int) -> float:
    return 1.0


class Trainee(NamedTuple):
    """A model ready to train. `after` is called with the number of finished steps; `factor` multiplies the learning
    rate of a step (counted from 0)."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    after: Callable[[int], object] = nothing
    factor: Callable[[int], float] = nothing


Build = Callable[[nn.Module, float, LowRankSettings], Trainee]


class Method(NamedTuple):
    """A row of the table. `ledger` is the method of galore_mem whose prediction stands beside the measurement."""

    title: str
    build: Build
    learning_rates: tuple[float, ...]
    ledger: str


def adamw(model: nn.Module, lr: float, low: LowRankSettings) -> Trainee:
    trained = [p for p in model.parameters() if p.requires_grad]
    return Trainee(model, torch.optim.AdamW(trained, lr, weight_decay=0.0))


def adamw_scaled(model: nn.Module, lr: float, low: LowRankSettings) -> Trainee:
    """AdamW with GaLore's learning rates: `scale` times as much for what GaLore projects."""
    regular, matrices = ([p for _, p in group["params"]] for group in optim.parameter_groups(model))
    groups = [{"params": regular}, {"params": matrices, "lr": lr * low.scale}]
    return Trainee(model, torch.optim.AdamW(groups, lr, weight_decay=0.0))


def adamw_8bit(model: nn.Module, lr: float, low: LowRankSettings) -> Trainee:
    import bitsandbytes as bnb

    return Trainee(model, bnb.optim.AdamW8bit(model.parameters(), lr, weight_decay=0.0))


def adam_mini(model: nn.Module, lr: float, low: LowRankSettings) -> Trainee:
    return Trainee(model, optim.AdamMini(model.named_parameters(), lr, partition=optim.partition_of(model)))


def low_rank(model: nn.Module, lr: float, low: LowRankSettings) -> Trainee:
    return adamw(optim.factorize(model, low.rank), lr, low)


def lora(model: nn.Module, lr: float, low: LowRankSettings) -> Trainee:
    """peft's adapters beside every projected weight; what is not projected is trained in full."""
    return adamw(optim.with_adapters(model, low.rank, alpha=low.lora_alpha), lr, low)


def relora(model: nn.Module, lr: float, low: LowRankSettings) -> Trainee:
    """The same with merges and restarts, and a short warm-up after each."""
    trainee = lora(model, lr, low)
    merges = optim.ReLoRA(trainee.model, trainee.optimizer, low.merge_every)

    def factor(step: int) -> float:
        merged, since = divmod(step, low.merge_every)
        return min(1.0, (since + 1) / low.merge_warmup) if merged else 1.0

    return trainee._replace(after=lambda step: merges.step(), factor=factor)


def projected(optimizer: Any, options: Callable[[nn.Module], dict[str, Any]] = lambda model: {}) -> Build:
    """A GaLore-like optimizer over the model's two groups."""

    def build(model: nn.Module, lr: float, low: LowRankSettings) -> Trainee:
        groups = optim.parameter_groups(model, rank=low.rank, update_proj_gap=low.update_proj_gap, scale=low.scale)
        return Trainee(model, optimizer(groups, lr, **options(model)))

    return build


def galore_mini(approach: int) -> Build:
    return projected(optim.GaLoreMini, lambda model: {"approach": approach, "partition": optim.partition_of(model)})


def q_galore(model: nn.Module, lr: float, low: LowRankSettings) -> Trainee:
    return projected(optim.QGaLoreAdamW8bit)(optim.quantize_linears(model), lr, low)


METHODS = {
    "adamw": Method("AdamW", adamw, ADAM, "adamw"),
    "adamw-scaled": Method("AdamW, GaLore's learning rates", adamw_scaled, GALORE, "adamw"),
    "adamw-8bit": Method("8-bit AdamW", adamw_8bit, ADAM, "adamw-8bit"),
    "adam-mini": Method("Adam-mini", adam_mini, ADAM, "adam-mini"),
    "low-rank": Method("Low-Rank (W = BA)", low_rank, ADAM, "low-rank"),
    # the ledger of LoRA freezes embeddings, norms and head, as fine-tuning does; ReLoRA's trains them, as here
    "lora": Method("LoRA", lora, ADAM, "relora"),
    "relora": Method("ReLoRA", relora, ADAM, "relora"),
    "galore": Method("GaLore", projected(optim.GaLoreAdamW), GALORE, "galore"),
    "galore-8bit": Method("8-bit GaLore", projected(optim.GaLoreAdamW8bit), GALORE, "galore-8bit"),
    "q-galore": Method("Q-GaLore", q_galore, GALORE, "q-galore"),
    "galore-mini-1": Method("GaLore-mini, approach 1", galore_mini(1), GALORE, "galore-mini-1"),
    "galore-mini-2": Method("GaLore-mini, approach 2", galore_mini(2), GALORE, "galore-mini-2"),
    "galore-mini-3": Method("GaLore-mini (approach 3)", galore_mini(3), GALORE, "galore-mini"),
}
