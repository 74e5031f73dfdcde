"""Operations, and pieces of models, allocate, keep and free what torch does: every allocation in order, to the byte."""

from __future__ import annotations

import composite_cases
import op_cases
import pytest
from side_by_side import Case, torch_record, twin_record

CASES = [*op_cases.CASES, *composite_cases.CASES]
ROWS = [pytest.param(case, format, id=f"{case.name}-{format}") for case in CASES for format in case.dtypes]


@pytest.mark.parametrize(("case", "format"), ROWS)
def test_allocations_are_torchs(case: Case, format: str) -> None:
    assert twin_record(case, format) == torch_record(case, format)
