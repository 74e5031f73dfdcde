"""What a case's paper counts as optimizer state, to be shown beside what its implementation holds. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from galore_mem.errors import InputError
from galore_mem.estimator import Case as Estimated
from galore_mem.estimator import given_for
from galore_mem.ledger import ledger
from galore_mem.methods.registry import method
from galore_mem.verify.case import Case
from galore_mem.verify.matrix import model_of


class PaperState(NamedTuple):
    """Bytes of all parameters and of the projected ones, and the equations they follow from (elements, by `projected`
    and `other`)."""

    nbytes: int
    projected_bytes: int
    equations: Mapping[str, str]


def paper_state(case: Case) -> PaperState | None:
    """The optimizer state as `estimate --convention paper` counts it; None where the model of a record is no longer
    there, or the paper does not say."""
    try:
        spec, found = model_of(case.model), method(case.method)
        given = given_for(found, case.hyperparameters)
        work = Estimated(spec, case.setup(), found, found.paper, case.targets, given, "paper").work()
        state = [e for e in ledger(work.model, work.code, work.job, work.targets) if e.kind == "optimizer_state"]
        projected = sum(e.total for e in state if e.projected)
        return PaperState(sum(e.total for e in state), projected, found.paper.equations)
    except InputError:
        return None
