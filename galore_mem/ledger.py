"""Every tensor that stays: weights, gradients and optimizer state of a model under a method, in exact bytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from galore_mem.dtypes import DType
from galore_mem.memory.network import trained_as
from galore_mem.memory.tape import Shape
from galore_mem.methods.base import Implementation, Job
from galore_mem.setup import Setup
from galore_mem.spec.model import ModelSpec, is_target


class Entry(NamedTuple):
    """A tensor and how often it occurs (`param` has `{i}` where it occurs once a layer).

    `nbytes` is what one of them keeps alive; `kind` is weights, gradients, optimizer_state, or buffers for what the
    model registers beside its parameters; tensors in host memory take nothing from the device and are listed with
    `host` set.
    """

    kind: str
    param: str
    buffer: str
    shape: Shape
    dtype: DType
    nbytes: int
    repeat: int
    projected: bool
    host: bool = False

    @property
    def total(self) -> int:
        """Bytes on the device, all occurrences together."""
        return 0 if self.host else self.nbytes * self.repeat

    @property
    def is_view(self) -> bool:
        """Does the tensor keep more alive than its own elements?"""
        return self.nbytes != self.dtype.nbytes(self.shape)


def ledger(model: ModelSpec, code: Implementation, job: Job, targets: tuple[str, ...] | None) -> Iterator[Entry]:
    """The persistent tensors of training `model` with `code`, but for those of `registered`."""
    for row, repeat in model.groups():
        projected = is_target(row, targets)
        for stored in code.store(row, projected, job):
            name = row.name + stored.suffix
            size = stored.dtype.nbytes(stored.shape)
            yield Entry("weights", name, "", stored.shape, stored.dtype, size, repeat, projected)
            if stored.grad is None:
                continue
            grad = stored.grad.nbytes(stored.shape)
            yield Entry("gradients", name, "grad", stored.shape, stored.grad, grad, repeat, projected)
            trained = trained_as(row, stored, projected, job)
            if job.recipe.master is not None:
                size = job.recipe.master.nbytes(stored.shape)
                yield Entry("optimizer_state", name, "master", stored.shape, job.recipe.master, size, repeat, projected)
            for b in code.state(trained, job):
                yield Entry("optimizer_state", name, b.name, b.shape, b.dtype, b.nbytes, repeat, projected, host=b.host)
    for b in code.shared(job):
        yield Entry("optimizer_state", "(shared)", b.name, b.shape, b.dtype, b.nbytes, 1, False, host=b.host)


def totals(entries: Iterable[Entry], setup: Setup) -> dict[str, int]:
    """Bytes by kind: weights, gradients, optimizer_state. A layer-wise update that does not wait for further passes has
    one gradient at a time, the largest."""
    sums, largest = dict.fromkeys(("weights", "gradients", "optimizer_state"), 0), 0
    for e in entries:
        sums[e.kind] += e.total
        largest = max(largest, e.nbytes if e.kind == "gradients" else 0)
    return sums | ({"gradients": largest} if setup.layerwise and not setup.waits else {})


def registered(model: ModelSpec, setup: Setup) -> Iterator[Entry]:
    """The model's buffers, which no method changes."""
    for row in model.registered(setup.transformers):
        dtype = row.dtype or setup.recipe.weights
        repeat = model.num_layers if row.in_each_layer else 1
        yield Entry("buffers", row.name, "", row.shape, dtype, dtype.nbytes(row.shape), repeat, False)
