"""How the real optimizer of a method's implementation is made: what a row of the table (`peers.py`) says.

A row is data: the packages it needs, how the optimizer is made, what happens to the model before, and what of it
cannot be compared. No torch: which packages are missing is known without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from galore_mem.memory.phases import Work
from galore_mem.methods.base import Trained
from galore_mem.methods.svd import QR_WORKSPACE, SVD_WORKSPACE
from galore_mem.verify.case import TRAIN, WORKLOADS

if TYPE_CHECKING:
    import torch
    from torch import Tensor

GAP = 2  # steps between two refreshes in a verified run
LR = 1e-3
WORKSPACE = 0.01

# what `pip install` calls the package of a module, where that is not the module's name with hyphens
PIP = {"neuralop": "neuraloperator", "pytorch_optimizer": "pytorch_optimizer"}


class CannotRun(Exception):  # noqa: N818  # an answer about a case, which the record calls unsupported
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

    @property
    def told(self) -> Mapping[str, int | float | str]:
        """The method's hyperparameters."""
        return self.work.job.hyperparameters

    def named(self) -> list[tuple[str, Tensor]]:
        return [(m.name, m.p) for m in self.members]

    def split(self) -> tuple[list[Member], list[Member]]:
        """Parameters that are not projected, and those that are."""
        low = [m for m in self.members if m.trained.projected and m.p.dim() > 1]
        return [m for m in self.members if not (m.trained.projected and m.p.dim() > 1)], low

    def groups(self, low: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Both as parameter groups, the projected one with its options."""
        regular, targets = self.split()
        groups: list[dict[str, Any]] = [{"params": [m.p for m in regular]}] if regular else []
        return [*groups, {"params": [m.p for m in targets], **low}] if targets else groups

    def in_order(self, low: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Groups of neighbors: the optimizer goes through the parameters in the model's order."""
        groups: list[dict[str, Any]] = []
        for targeted, run in groupby(self.members, lambda m: m.trained.projected and m.p.dim() > 1):
            groups.append({"params": [m.p for m in run], **(low if targeted else {})})
        return groups


@dataclass(frozen=True, slots=True)
class Builder:
    """How one implementation is made and run.

    `needs`: modules that must be there. `plain` and `refresh` number a step (from 0) of each kind when projectors are
    renewed every `GAP` steps (`refresh` None: none after the first); both come after a first step that makes the state.
    `settle`: steps after the last, until the state is whole again. `hooks_itself`: its layer-wise update is its own.
    `only` says why it has not both `workloads`. `prepare` changes a real model first (adapters, quantized weights);
    `coded` makes the parameter that stands for a float matrix where the ledger stores codes. `around` is entered for
    the whole run, `making` while the model is made. `quantizes`: the model is quantized as it is read.

    `refuses` says why a work cannot be run. `not_compared` names phases that the ledger does not describe, with the
    reason; `workspace` gives for a phase the bytes of such workspaces at most, and its peak is not compared where they
    are more than a part `WORKSPACE` of it. `remarks` are told with every outcome, `on_cpu` with those of the CPU.
    """

    make: Callable[[Request], Any]
    needs: tuple[str, ...] = ()
    plain: int = 1
    refresh: int | None = 2
    settle: int = 0
    workloads: tuple[str, ...] = WORKLOADS
    only: str = ""
    hooks_itself: bool = False
    prepare: Callable[[Any, Work], Any] | None = None
    coded: Callable[[Any], Any] | None = None
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    making: Callable[[], AbstractContextManager[Any]] = nullcontext
    quantizes: bool = False
    refuses: Callable[[Work], str | None] = field(default=lambda work: None)
    not_compared: Mapping[str, str] = field(default_factory=dict)
    workspace: Mapping[str, tuple[Callable[[Work], int], str]] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    on_cpu: tuple[str, ...] = ()

    def missing(self) -> list[str]:
        """The packages it needs that are not installed, as pip calls them."""
        return [PIP.get(module, module.replace("_", "-")) for module in self.needs if find_spec(module) is None]

    def check(self, workload: str, work: Work) -> None:
        """Raises `CannotRun` where the case cannot run here."""
        missing = self.missing()
        if missing:
            raise CannotRun(without(missing))
        if workload not in self.workloads:
            raise CannotRun(f"{self.only}: use --workload {self.workloads[0]}")
        reason = self.refuses(work)
        if work.setup.recipe.master is not None:
            reason = f"verify keeps no master copy of the weights ({work.setup.recipe.name}); use another recipe"
        if reason is not None:
            raise CannotRun(reason)

    def left_out(self, workload: str, work: Work, expected: Mapping[str, int]) -> dict[str, str]:
        """Phases whose peaks are not compared, with the reason. In a layer-wise update a step is part of the backward
        pass."""
        found = dict(self.not_compared)
        unknown = [what for what in work.code.not_counted if what in (SVD_WORKSPACE, QR_WORKSPACE)]
        if unknown and work.setup.device != "cpu":  # LAPACK's is not torch's, or bounded
            found["refresh"] = unknown[0]
        for phase, (most, why) in self.workspace.items():
            if most(work) > WORKSPACE * expected.get(phase, 0):
                found[phase] = why
        if workload == TRAIN and work.setup.layerwise and "step" in found:
            found["backward"] = found["step"]
        return found

    def told(self, work: Work, left_out: Mapping[str, str]) -> str:
        """What an outcome says besides numbers."""
        by_reason: dict[str, list[str]] = {}
        for phase, why in left_out.items():
            by_reason.setdefault(why, []).append(phase)
        parts = [f"not compared: {', '.join(phases)} ({why})" for why, phases in by_reason.items()]
        return "; ".join([*self.remarks, *(self.on_cpu if work.setup.device == "cpu" else ()), *parts])


def without(missing: Sequence[str]) -> str:
    """Says which packages an implementation needs."""
    return f"needs the package {', '.join(missing)}, which is not installed"


# -- how optimizers are made ---------------------------------------------------------------------------


def load(path: str) -> Any:
    """The class (or function) at a dotted path."""
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def package_version(name: str) -> tuple[int, ...]:
    """The numbers of a package's release; () where it is not installed."""
    try:
        return tuple(int(part) for part in version(name).split(".")[:3] if part.isdigit())
    except PackageNotFoundError:
        return ()


def told(request: Request, names: Mapping[str, Callable[[Any], Any]]) -> dict[str, Any]:
    """Constructor arguments that are hyperparameters of the method, each as the constructor takes it."""
    return {name: read(request.told[name]) for name, read in names.items() if name in request.told}


def all_together(
    path: str, read: Mapping[str, Callable[[Any], Any]] | None = None, more: Mapping[str, Any] | None = None,
    **row: Any,
) -> Builder:  # fmt: skip
    """An optimizer over all parameters, in one group. `read`: hyperparameters it takes; `more`: other arguments."""

    def make(request: Request) -> Any:
        return load(path)([m.p for m in request.members], lr=LR, **told(request, read or {}), **(more or {}))

    return Builder(make, **{"needs": (path.partition(".")[0],), **row})


def ours(name: str, more: Mapping[str, Any] | None = None, **row: Any) -> Builder:
    """One of `galore_mem.optim`, its groups with the case's rank and side."""

    def make(request: Request) -> Any:
        from galore_mem import optim
        from galore_mem.optim.adam_mini import Partitioned
        from galore_mem.partition import partition

        made, hyper = getattr(optim, name), request.told
        arguments: dict[str, Any] = {"lr": LR, **(more or {})}
        if issubclass(made, Partitioned):
            heads = request.work.job.heads
            arguments["partition"] = {
                m.name: partition(m.name, m.trained.shape, heads, transposed=m.trained.module == "conv1d")
                for m in request.members
            }
        if request.work.setup.layerwise:
            arguments["layerwise"] = optim.LayerWise(request.work.setup.gradient_accumulation)
        if "beta1" in made.RANGES:
            arguments["beta1"] = hyper["beta1"] or (None if made.RANGES["beta1"].optional else 0.0)
        if "rank" not in made.RANGES:
            return made(request.named(), **arguments)
        group = {k: v for k, v in {**hyper, "update_proj_gap": GAP, "kappa": GAP}.items() if k in made.RANGES}
        group |= {k: hyper[k] for k in made.CHOICES if k in hyper}
        regular, low = ([(m.name, m.p) for m in part] for part in request.split())
        groups: list[dict[str, Any]] = [{"params": regular}] if regular else []
        groups += [{"params": low, **group}] if low else []
        return made(groups, **arguments)

    return Builder(make, **{"needs": ("torch",), "hooks_itself": True, **row})


def projected(
    path: str,
    group: Mapping[str, Any] | None = None,
    read: Mapping[str, Callable[[Any], Any]] | None = None,
    more: Mapping[str, Any] | None = None,
    **row: Any,
) -> Builder:
    """A published projected optimizer, with the groups of the GaLore reference. `group`: what its low-rank group has
    besides."""

    def make(request: Request) -> Any:
        low = {"rank": request.told.get("rank"), "update_proj_gap": GAP, "scale": 0.25, "proj_type": "std"}
        low |= {**(group or {}), **{k: request.told[k] for k in ("proj_type", "proj") if k in request.told}}
        return load(path)(request.groups(low), lr=LR, **told(request, read or {}), **(more or {}))

    return Builder(make, **{"needs": (path.partition(".")[0],), **row})


def builder(method: str, implementation: str) -> Builder:
    """The row of an implementation. Raises `CannotRun`, with the reason, where it cannot be built at all."""
    from galore_mem.verify.peers import BUILDERS, NOT_BUILT

    found = BUILDERS.get((method, implementation))
    if found is None:
        raise CannotRun(NOT_BUILT.get((method, implementation), "no builder has been written for it"))
    return found


def missing(method: str, implementation: str) -> list[str]:
    """Packages that must be installed for this implementation to run, as pip calls them. Raises `CannotRun`."""
    return builder(method, implementation).missing()


def every() -> Iterator[tuple[str, str]]:
    """All methods and implementations of the registry."""
    from galore_mem.methods.registry import METHODS

    return ((m.name, code.name) for m in METHODS.values() for code in m.implementations)
