"""JSON Schemas (draft 2020-12) of what the commands print with `--format json`."""

from __future__ import annotations

from typing import Any

from galore_mem.errors import unknown
from galore_mem.memory.phases import PHASES
from galore_mem.memory.tape import CATEGORIES
from galore_mem.report.verify import OF_PASSES, VERIFY_SCHEMA
from galore_mem.result import ESTIMATE_SCHEMA
from galore_mem.verify.case import COUNTED, RESIDENTS, STATUSES, TOLD, WORKLOADS

Schema = dict[str, Any]

INT: Schema = {"type": "integer"}
BYTES: Schema = {"type": "integer", "minimum": 0}
TEXT: Schema = {"type": "string"}
FLAG: Schema = {"type": "boolean"}
TEXTS: Schema = {"type": "array", "items": TEXT}
HYPERPARAMETERS: Schema = {"type": "object", "additionalProperties": {"type": ["integer", "number", "string"]}}


def _object(optional: tuple[str, ...] = (), **properties: Schema) -> Schema:
    """An object with exactly these keys; all but `optional` are required."""
    return {
        "type": "object",
        "properties": properties,
        "required": [name for name in properties if name not in optional],
        "additionalProperties": False,
    }


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _estimate() -> Schema:
    components = _object((), **dict.fromkeys(CATEGORIES, BYTES))
    phase = _object(name={"enum": list(PHASES)}, allocated_bytes=BYTES, components=components)
    fits = _object(
        gpu=TEXT,
        capacity_bytes=BYTES,
        headroom_bytes=INT,
        verdict={"enum": ["fits", "tight", "does_not_fit"]},
    )
    tensor = _object(
        kind={"enum": ["weights", "gradients", "optimizer_state"]},
        param=TEXT,
        buffer=TEXT,
        shape=_list(BYTES),
        dtype=TEXT,
        bytes=BYTES,
        count=BYTES,
        host=FLAG,
    )
    one = _object(
        ("tensors", "kept_by_layer"),
        method=TEXT,
        implementation=TEXT,
        convention={"enum": ["implementation", "paper"]},
        hyperparameters=HYPERPARAMETERS,
        layerwise=FLAG,
        weights_bytes=BYTES,
        gradients_bytes=BYTES,
        optimizer_state_bytes=BYTES,
        phases=_list(phase),
        peak_phase={"enum": list(PHASES)},
        peak_allocated_bytes=BYTES,
        peak_reserved_bytes=_or_null(BYTES),
        outside_allocator_bytes=BYTES,
        device_bytes=BYTES,
        fits=_or_null(fits),
        assumptions=TEXTS,
        not_counted=TEXTS,
        tensors=_list(tensor),
        kept_by_layer=_list(_object(operations=TEXTS, shape=_list(BYTES), dtype=TEXT, bytes=BYTES, shared=FLAG)),
    )
    model = _object(
        name=TEXT,
        family=_or_null(TEXT),
        parameters=BYTES,
        parameters_projected=BYTES,
        layers=BYTES,
        source=TEXT,
    )
    setup = _object(
        (),
        recipe=TEXT,
        batch_size=INT,
        seq_len=INT,
        attention=TEXT,
        gradient_checkpointing=FLAG,
        loss=TEXT,
        layerwise=FLAG,
        keep_gradients=FLAG,
        keep_logits=FLAG,
        gradient_accumulation=INT,
        transformers=TEXT,
        torch=TEXT,
        device=TEXT,
        target=_or_null(TEXTS),
        gpu=_or_null(TEXT),
    )
    unsupported = _object(method=TEXT, implementation=TEXT, reason=TEXT)
    return _object(
        schema={"const": ESTIMATE_SCHEMA},
        version=TEXT,
        model=model,
        setup=setup,
        estimates=_list(one),
        unsupported=_list(unsupported),
    )


def _papers() -> Schema:
    cell = _object(
        paper=TEXT,
        table=TEXT,
        row=TEXT,
        column=TEXT,
        printed=TEXT,
        computed={"type": ["integer", "number"]},
        unit=TEXT,
        convention=TEXT,
        verdict={"enum": ["reproduced", "not_reproduced"]},
        note=TEXT,
    )
    counts: Schema = {"type": "object", "additionalProperties": BYTES}
    table = _object(paper=TEXT, table=TEXT, cells=BYTES, reproduced=BYTES, conventions=counts)
    reasons: Schema = {"type": "object", "additionalProperties": TEXT}
    return _object(schema={"const": "galore-mem.papers/1"}, cells=_list(cell), tables=_list(table), conventions=reasons)


def _models() -> Schema:
    counts: Schema = {"type": "object", "additionalProperties": BYTES}
    row = _object(name=TEXT, shape=_list(BYTES), role=TEXT, module=TEXT, count=BYTES, parameters=BYTES, projected=FLAG)
    model = _object(
        ("rows",),
        name=TEXT,
        family=_or_null(TEXT),
        parameters=BYTES,
        parameters_projected=BYTES,
        parameters_by_role=counts,
        layers=BYTES,
        source=TEXT,
        rows=_list(row),
    )
    return _object(schema={"const": "galore-mem.models/1"}, models=_list(model))


def _verify() -> Schema:
    phases: Schema = {"type": "object", "additionalProperties": BYTES}
    sizes = _object(
        (*COUNTED, *TOLD),
        **dict.fromkeys((*RESIDENTS, "peak_allocated_bytes"), BYTES),
        phases=phases,
        **dict.fromkeys(COUNTED, phases),
        **dict.fromkeys(TOLD, BYTES),
    )
    error = _or_null({"type": "number"})  # null: something was predicted, and nothing measured
    errors = _object(
        (),
        **dict.fromkeys((*RESIDENTS, "peak_allocated_bytes"), error),
        phases={"type": "object", "additionalProperties": error},
    )
    buffer = _object(
        param=TEXT,
        buffer=TEXT,
        shape=_list(BYTES),
        dtype=TEXT,
        predicted_bytes=_or_null(BYTES),
        measured_bytes=_or_null(BYTES),
    )
    passes = {"batch_size": INT, "seq_len": INT, "gradient_checkpointing": FLAG, "keep_logits": FLAG}
    setup = _object(
        (),
        recipe=TEXT,
        **{name: _or_null(passes.get(name, TEXT)) for name in OF_PASSES},
        layerwise=FLAG,
        keep_gradients=FLAG,
        gradient_accumulation=INT,
        torch=TEXT,
        device=TEXT,
        target=_or_null(TEXTS),
        gpu={"type": "null"},
    )
    environment: Schema = {"type": "object"}  # versions and settings, as they were found
    case = _object(
        ("buffers", "environment"),
        model=TEXT,
        method=TEXT,
        implementation=TEXT,
        workload={"enum": list(WORKLOADS)},
        hyperparameters=HYPERPARAMETERS,
        setup=setup,
        status={"enum": list(STATUSES)},
        detail=TEXT,
        predicted=_or_null(sizes),
        measured=_or_null(sizes),
        rel_error=_or_null(errors),
        paper_optimizer_state_bytes=_or_null(BYTES),
        seconds={"type": "number", "minimum": 0},
        buffers=_list(buffer),
        environment=environment,
    )
    share = {"type": "number", "minimum": 0}
    off = _object(
        (),
        **dict.fromkeys(("model", "method", "implementation", "workload", "phase"), TEXT),
        rel_error={"type": "number"},
    )
    summary = _object(
        (),
        cases=BYTES,
        **dict.fromkeys(STATUSES, BYTES),
        **dict.fromkeys(("buffers_compared", "buffers_different", "phases_compared"), BYTES),
        **dict.fromkeys(("worst_rel_error", "p95_rel_error", "median_rel_error"), _or_null(share)),
        worst=_or_null(off),
    )
    return _object(
        schema={"const": VERIFY_SCHEMA}, version=TEXT, environment=environment, cases=_list(case), summary=summary
    )


SCHEMAS = {"estimate": _estimate, "models": _models, "papers": _papers, "verify": _verify}


def schema(name: str) -> Schema:
    """The JSON Schema of a command's output. Raises `InputError` for a command that has none."""
    if name not in SCHEMAS:
        raise unknown("schema", name, SCHEMAS)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": f"galore-mem {name}", **SCHEMAS[name]()}
