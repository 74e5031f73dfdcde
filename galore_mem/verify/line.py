"""The form of an outcome between processes and in records: one line of JSON, checked when it is read. No torch.

A tensor of the optimizer's state that is the same in neighboring layers is one row for all of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from itertools import groupby
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr, ValidationError

from galore_mem.errors import InputError
from galore_mem.verify.case import BufferPair, Case, Outcome, Sizes

SCHEMA = "galore-mem.verify-record/2"

MOST = 2**62  # bytes, elements, layers
LAYERS = 100_000  # that a line may unfold to
Count = Annotated[StrictInt, Field(ge=0, le=MOST)]
Scalar = StrictBool | StrictInt | StrictFloat | StrictStr
LAYER = re.compile(r"\.(\d+)\.")


class Form(BaseModel):
    """Nothing is converted, and nothing is there that is not named."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class SizesForm(Form):
    weights_bytes: Count
    gradients_bytes: Count
    optimizer_state_bytes: Count
    peak_allocated_bytes: Count
    phases: dict[str, Count]
    reserved: dict[str, Count] = {}
    requested: dict[str, Count] = {}
    workspaces_bytes: Count | None = None
    device_used_bytes: Annotated[StrictInt, Field(ge=-MOST, le=MOST)] | None = None

    def sizes(self) -> Sizes:
        return Sizes.from_json(self.model_dump(exclude_none=True))


class Row(NamedTuple):
    """A tensor in `layers` layers from number `first` on (`param` has {i} for the number; None: it is in no layer)."""

    param: str
    first: int | None
    layers: int
    buffer: str
    shape: list[Count]
    dtype: str
    predicted: Count | None
    measured: Count | None


class Line(Form):
    schema_: Literal["galore-mem.verify-record/2"] = Field(alias="schema")
    model: str
    method: str
    implementation: str
    workload: str
    recipe: str
    options: dict[str, Scalar]
    hyperparameters: dict[str, StrictInt | StrictFloat | StrictStr]
    targets: list[str] | None
    status: Literal["ok", "mismatch", "oom", "unsupported", "failed"]
    detail: str
    predicted: SizesForm | None = None
    measured: SizesForm | None = None
    rel_error: dict[str, Any] | None = None
    buffers: list[tuple[str, Count | None, Count, str, list[Count], str, Count | None, Count | None]] = []
    environment: dict[str, Any]
    not_compared: list[str] = []
    seconds: Annotated[StrictFloat | StrictInt, Field(ge=0)]

    def outcome(self) -> Outcome:
        """Raises `InputError` where the case is none."""
        targets = None if self.targets is None else tuple(self.targets)
        case = Case(
            self.model, self.method, self.implementation, self.workload, self.recipe, self.options,
            self.hyperparameters, targets,
        )  # fmt: skip
        try:
            case.setup()
        except TypeError:
            raise InputError(f"the options of its case are none: {dict(self.options)}") from None
        sizes = [None if form is None else form.sizes() for form in (self.predicted, self.measured)]
        if sum(Row(*row).layers for row in self.buffers) > LAYERS:
            raise InputError(f"buffers: more than {LAYERS} tensors")
        buffers = tuple(pair for row in self.buffers for pair in unfolded(Row(*row)))
        return Outcome(
            case, self.status, self.detail, sizes[0], sizes[1], buffers, self.environment, float(self.seconds),
            tuple(self.not_compared),
        )  # fmt: skip


def folded(pairs: Iterable[BufferPair]) -> Iterator[Row]:
    """Rows of neighbors that differ in the number of their layer alone, one following the other."""

    def key(numbered: tuple[int, BufferPair]) -> tuple[Any, ...]:
        place, pair = numbered
        found = LAYER.search(pair.param)
        name = LAYER.sub(".{i}.", pair.param, count=1)
        return name, None if found is None else int(found[1]) - place, *list(asdict(pair).values())[1:]

    for (name, offset, buffer, shape, dtype, predicted, measured), group in groupby(enumerate(pairs), key):
        members = [place for place, _ in group]
        if offset is None:
            yield from (Row(name, None, 1, buffer, list(shape), dtype, predicted, measured) for _ in members)
        else:
            yield Row(name, offset + members[0], len(members), buffer, list(shape), dtype, predicted, measured)


def unfolded(row: Row) -> Iterator[BufferPair]:
    """The tensors of a row."""
    for number in range(row.layers):
        name = row.param if row.first is None else row.param.replace("{i}", str(row.first + number))
        yield BufferPair(name, row.buffer, tuple(row.shape), row.dtype, row.predicted, row.measured)


def dump(outcome: Outcome) -> str:
    """One line."""
    found = {
        "schema": SCHEMA, **outcome.to_json(buffers=False), "buffers": list(folded(outcome.buffers)),
        "environment": dict(outcome.environment),
    }  # fmt: skip
    return json.dumps(found, allow_nan=False, separators=(",", ":"))


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")


def load(text: str) -> Outcome:
    """The outcome that `dump` wrote. Raises `InputError` for anything else."""
    try:
        given = json.loads(text, parse_constant=_no_number)
        if not isinstance(given, Mapping) or given.get("schema") != SCHEMA:
            raise InputError(f"its schema is not {SCHEMA}")
        return Line.model_validate(given, strict=False).outcome()
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except (ValueError, RecursionError, OverflowError) as error:
        raise InputError(f"this is no line of a record: {error}") from None
