"""How the real optimizer of each method and implementation is made: one table, and what a row needs to run.

A row is data: the packages it needs, the class, what its arguments and groups are called. `Request` is what it is made
from. Nothing here is imported at module level but torch: a missing package is that case's status, not an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from galore_mem.memory.phases import Work
from galore_mem.methods.base import Trained
from galore_mem.verify.case import OPTIMIZER, TRAIN, WORKLOADS

GAP = 2  # steps between two refreshes in a verified run
LR = 1e-3


class Unsupported(Exception):  # noqa: N818  # a status, as the record calls it
    """This case cannot run here; the message says why."""


class Member(NamedTuple):
    """A trained parameter, as the optimizer's ledger sees it and as it is."""

    trained: Trained
    p: Tensor

    @property
    def name(self) -> str:
        return self.trained.name


class Request(NamedTuple):
    """What an optimizer is made from. `model` is None where there are parameters only."""

    members: Sequence[Member]
    work: Work
    model: torch.nn.Module | None

    def split(self) -> tuple[list[Member], list[Member]]:
        """Parameters that are not projected, and those that are."""
        low = [m for m in self.members if m.trained.projected and m.p.dim() > 1]
        return [m for m in self.members if not (m.trained.projected and m.p.dim() > 1)], low


@dataclass(frozen=True, slots=True)
class Builder:
    """How one implementation is made. `plain` and `refresh` number a step (from 0) of each kind when projectors are
    renewed every `GAP` steps; both come after a first step that makes the state. `hooks_itself`: its layer-wise update
    is its own. `prepare` changes a real model first (adapters, quantized weights)."""

    make: Callable[[Request], Any]
    needs: tuple[str, ...] = ()
    plain: int = 1
    refresh: int = 2
    workloads: tuple[str, ...] = WORKLOADS
    hooks_itself: bool = False
    prepare: Callable[[torch.nn.Module, Request], torch.nn.Module] | None = None
    broken: Callable[[], str | None] = field(default=lambda: None)

    def check(self, workload: str) -> None:
        """Raises `Unsupported` where the case cannot run here."""
        for package in self.needs:
            if find_spec(package) is None:
                raise Unsupported(f"needs the package {package.replace('_', '-')}, which is not installed")
        if workload not in self.workloads:
            raise Unsupported(f"has no {workload} workload; use --workload {self.workloads[0]}")
        reason = self.broken()
        if reason is not None:
            raise Unsupported(reason)


# -- rows ------------------------------------------------------------------------------------------


def _class(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def all_together(path: str, **arguments: Any) -> Builder:
    """An optimizer over all parameters, in one group."""

    def make(request: Request) -> Any:
        return _class(path)([m.p for m in request.members], lr=LR, **arguments)

    return Builder(make, (path.partition(".")[0],))


def ours(name: str, **options: Any) -> Builder:
    """One of `galore_mem.optim`, its groups with the case's rank and side."""

    def make(request: Request) -> Any:
        from galore_mem import optim
        from galore_mem.optim.adam_mini import Partitioned
        from galore_mem.partition import partition

        made = getattr(optim, name)
        arguments: dict[str, Any] = {"lr": LR, **options}
        if issubclass(made, Partitioned):
            heads = request.work.job.heads
            arguments["partition"] = {
                m.name: partition(m.name, m.trained.shape, heads, transposed=m.trained.module == "conv1d")
                for m in request.members
            }
        if request.work.setup.layerwise:
            arguments["layerwise"] = optim.LayerWise(request.work.setup.gradient_accumulation)
        told = request.work.job.hyperparameters
        group = {k: v for k, v in {**told, "update_proj_gap": GAP, "kappa": GAP}.items() if k in made.RANGES}
        group |= {k: told[k] for k in made.CHOICES if k in told}
        regular, low = request.split()
        if "rank" not in made.RANGES:
            return made([(m.name, m.p) for m in request.members], **arguments)
        groups: list[dict[str, Any]] = [{"params": [(m.name, m.p) for m in regular]}] if regular else []
        groups += [{"params": [(m.name, m.p) for m in low], **group}] if low else []
        return made(groups, **arguments)

    return Builder(make, hooks_itself=True)


def projected(path: str, group: Mapping[str, Any] | None = None, *, first: int = 0, **arguments: Any) -> Builder:
    """A published projected optimizer, with the groups of the GaLore reference. `first`: number of its first step."""

    def make(request: Request) -> Any:
        told = request.work.job.hyperparameters
        low = {"rank": told.get("rank"), "update_proj_gap": GAP, "scale": 0.25, "proj_type": "std", **(group or {})}
        low |= {k: told[k] for k in ("proj_type", "proj") if k in told}
        regular, targets = request.split()
        groups: list[dict[str, Any]] = [{"params": [m.p for m in regular]}] if regular else []
        groups += [{"params": [m.p for m in targets], **low}] if targets else []
        return _class(path)(groups, lr=LR, **arguments)

    plain, refresh = (1, 2) if first == 0 else (2, 3)
    return Builder(make, (path.partition(".")[0],), plain, refresh)


KINDS: dict[str, dict[str, Any]] = {"foreach": {"foreach": True}, "fused": {"fused": True}, "loop": {"foreach": False}}
ADAMW, SGD = "torch.optim.AdamW", "torch.optim.SGD"
FACTORED: dict[str, Any] = {
    "relative_step": False,
    "scale_parameter": False,
}  # what the transformers Trainer's "adafactor" passes
OLD: dict[str, Any] = {"no_deprecation_warning": True}
CHANNEL = {"scale_type": "channel", "proj": "random"}
TENSOR = {"scale_type": "tensor", "proj": "random", "rank": 1}
BUILDERS: dict[tuple[str, str], Builder] = {
    **{
        (method, f"torch-{kind}"): all_together(path, **arguments, **more)
        for method, path, more in (("adamw", ADAMW, {}), ("sgd", SGD, {"momentum": 0.9}))
        for kind, arguments in KINDS.items()
    },
    ("adamw-8bit", "bitsandbytes"): all_together("bitsandbytes.optim.AdamW8bit"),
    ("adamw-8bit", "bitsandbytes-paged"): all_together("bitsandbytes.optim.PagedAdamW8bit"),
    ("adafactor", "transformers"): all_together("transformers.optimization.Adafactor", **FACTORED),
    ("adafactor", "torch-loop"): all_together("torch.optim.Adafactor"),
    ("adafactor", "torch-foreach"): all_together("torch.optim.Adafactor", foreach=True),
    ("came", "came-pytorch"): all_together("came_pytorch.CAME"),
    ("came", "pytorch-optimizer"): all_together("pytorch_optimizer.CAME"),
    ("adam-mini", "galore-mem"): ours("AdamMini"),
    ("galore", "galore-mem"): ours("GaLoreAdamW"),
    ("galore", "galore-torch"): projected("galore_torch.GaLoreAdamW", **OLD),
    ("galore", "pytorch-optimizer"): projected("pytorch_optimizer.GaLore", {"projection_type": "std"}, first=1),
    ("galore-8bit", "galore-mem"): ours("GaLoreAdamW8bit"),
    ("galore-adafactor", "galore-mem"): ours("GaLoreAdafactor"),
    ("galore-adafactor", "galore-torch"): projected("galore_torch.GaLoreAdafactor", **FACTORED),
    ("tensor-galore", "galore-mem"): ours("TensorGaLoreAdamW"),
    ("galore-2", "galore-mem"): ours("GaLoreAdamW", svd="randomized"),
    ("galore-mini", "galore-mem"): ours("GaLoreMini"),
    ("galore-mini-1", "galore-mem"): ours("GaLoreMini", approach=1),
    ("galore-mini-2", "galore-mem"): ours("GaLoreMini", approach=2),
    ("flora", "galore-mem"): ours("Flora"),
    ("apollo", "apollo-torch"): projected("apollo_torch.APOLLOAdamW", CHANNEL),
    ("apollo-mini", "apollo-torch"): projected("apollo_torch.APOLLOAdamW", TENSOR),
    ("fira", "fira"): projected("fira.FiraAdamW", {"alpha": 1.0}, **OLD),
}


def builder(method: str, implementation: str) -> Builder:
    """The row of an implementation. Raises `Unsupported` where there is none."""
    found = BUILDERS.get((method, implementation))
    if found is None:
        raise Unsupported("there is no builder for it")
    return found


__all__ = ["BUILDERS", "GAP", "OPTIMIZER", "TRAIN", "Builder", "Member", "Request", "Unsupported", "builder"]
