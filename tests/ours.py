"""Our optimizers as one table that all generic tests go through: a new optimizer adds a row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from low_rank import HEADS

from galore_mem.methods.base import Implementation, Job
from galore_mem.methods.registry import method
from galore_mem.optim import (
    AdamMini,
    Flora,
    GaLoreAdafactor,
    GaLoreAdamW,
    GaLoreAdamW8bit,
    GaLoreMini,
    LayerWise,
    ParameterWise,
    QGaLoreAdamW8bit,
    TensorGaLoreAdamW,
)
from galore_mem.optim.adam_mini import Partitioned
from galore_mem.partition import partition
from galore_mem.setup import recipe

RANK = 64
FLOAT = "galore-mem-float-weights"
Named = list[tuple[str, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class Ours:
    """An optimizer, the method whose ledger describes it, and how it is made. `options` go to the projected group
    where there is one, `told` to the ledger."""

    method: str
    made: type[ParameterWise]
    options: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    told: Mapping[str, int | float | str] = field(default_factory=dict)
    implementation: str = "galore-mem"

    def __str__(self) -> str:
        more = {**self.options, **self.arguments}
        return "-".join((self.method, *(f"{name}={value}" for name, value in more.items() if name != "approach")))

    @property
    def ledger(self) -> Implementation:
        return method(self.method).implementation(self.implementation)

    @property
    def randomized(self) -> bool:
        """Do its projectors come from a randomized SVD, whose orthogonalization takes LAPACK's workspace?"""
        return self.options.get("svd") == "randomized"

    @property
    def projects(self) -> bool:
        return "rank" in self.made.RANGES

    def every(self, steps: int) -> dict[str, int]:
        """The option that renews projections every so many steps."""
        return {"kappa" if self.made is Flora else "update_proj_gap": steps}

    def job(self, rank: int = RANK) -> Job:
        told = {"rank": rank, **self.told} if self.projects else dict(self.told)
        defaults = {h.name: h.default for h in method(self.method).hyperparameters}
        return Job({**defaults, **told}, recipe("fp32"), "cpu", HEADS)

    def build(
        self, regular: Named, projected: Named, layerwise: LayerWise | None = None, **changed: Any
    ) -> ParameterWise:
        """The optimizer over named parameters. `changed` overrides constructor arguments and group options."""
        arguments: dict[str, Any] = {"lr": 1e-3, **self.arguments, "layerwise": layerwise}
        if issubclass(self.made, Partitioned):
            arguments["partition"] = {
                name: partition(name, tuple(p.shape), HEADS) for name, p in (*regular, *projected)
            }
        if not self.projects:
            return self.made([*regular, *projected], **{**arguments, **changed})
        group = {"rank": RANK, **self.every(4), **self.options}
        group.update({name: changed.pop(name) for name in tuple(changed) if name not in ("lr", "betas", "eps")})
        groups: list[dict[str, Any]] = [{"params": regular}] if regular else []
        groups += [{"params": projected, **group}] if projected else []
        return self.made(groups, **{**arguments, **changed})


OURS = (
    Ours("galore", GaLoreAdamW),
    Ours("galore", GaLoreAdamW, {"proj_type": "reverse_std"}, told={"proj_type": "reverse_std"}),
    Ours("galore", GaLoreAdamW, {"proj_type": "full"}, told={"proj_type": "full"}),
    Ours("galore-2", GaLoreAdamW, {"svd": "randomized"}),
    Ours("adam-mini", AdamMini),
    Ours("galore-mini", GaLoreMini),
    Ours("galore-mini", GaLoreMini, {"proj_type": "reverse_std"}, told={"proj_type": "reverse_std"}),
    Ours("galore-mini", GaLoreMini, {"proj_type": "full"}, told={"proj_type": "full"}),
    Ours("galore-mini", GaLoreMini, {"svd": "randomized"}, implementation="galore-mem-randomized"),
    Ours("galore-mini-1", GaLoreMini, arguments={"approach": 1}),
    Ours("galore-mini-2", GaLoreMini, arguments={"approach": 2}),
    Ours("galore-adafactor", GaLoreAdafactor),
    Ours("galore-adafactor", GaLoreAdafactor, arguments={"beta1": 0.9}, told={"beta1": 0.9}),
    Ours("tensor-galore", TensorGaLoreAdamW),
    Ours("flora", Flora),
    Ours("flora", Flora, arguments={"beta1": 0.0}, told={"beta1": 0.0}),
    Ours("galore-8bit", GaLoreAdamW8bit),
    Ours("galore-8bit", GaLoreAdamW8bit, {"proj_type": "full"}, told={"proj_type": "full"}),
    # these tables have float weights; INT8 ones: test_methods_q_galore.py, test_optim_quantized.py
    Ours("q-galore", QGaLoreAdamW8bit, implementation=FLOAT),
    Ours("q-galore", QGaLoreAdamW8bit, {"proj_type": "full"}, told={"proj_type": "full"}, implementation=FLOAT),
)
