"""JSON Schemas (draft 2020-12) of what the commands print with `--format json`."""

from __future__ import annotations

from collections.abc import Sequence

from galore_mem.errors import unknown
from galore_mem.evidence import CLASSES
from galore_mem.memory.phases import PHASES
from galore_mem.memory.tape import CATEGORIES
from galore_mem.report.methods import KINDS, LAYERWISE, METHODS_SCHEMA, WHERE
from galore_mem.report.schema_parts import (
    BYTES,
    FLAG,
    HYPERPARAMETERS,
    INT,
    TEXT,
    TEXTS,
    Schema,
    list_of,
    object_of,
    or_null,
)
from galore_mem.report.verify import OF_PASSES, VERIFY_SCHEMA
from galore_mem.result import ESTIMATE_SCHEMA
from galore_mem.simulate.result import DECIDED, SIMULATE_SCHEMA, SIMULATED_PHASES
from galore_mem.verify.case import COUNTED, RESIDENTS, STATUSES, TOLD, WORKLOADS


def _estimate() -> Schema:
    phase = object_of(**_phase(PHASES))
    one = object_of(
        ("tensors", "kept_by_layer"),
        **_answer(phase, PHASES),
        tensors=list_of(
            object_of(
                kind={"enum": ["weights", "gradients", "optimizer_state", "buffers"]},
                param=TEXT,
                buffer=TEXT,
                shape=list_of(BYTES),
                dtype=TEXT,
                bytes=BYTES,
                count=BYTES,
                host=FLAG,
            )
        ),
        kept_by_layer=list_of(object_of(operations=TEXTS, shape=list_of(BYTES), dtype=TEXT, bytes=BYTES, shared=FLAG)),
    )
    return object_of(**_result(ESTIMATE_SCHEMA, one, object_of(**_setup())))


def _phase(names: Sequence[str]) -> dict[str, Schema]:
    components = object_of(**dict.fromkeys(CATEGORIES, BYTES))
    allocator = dict.fromkeys(("reserved_bytes", "slack_bytes"), or_null(BYTES))
    return {"name": {"enum": list(names)}, "allocated_bytes": BYTES, "components": components, **allocator}


def _answer(phase: Schema, names: Sequence[str]) -> dict[str, Schema]:
    """Of one method: what `estimate` and `simulate` both say."""
    fits = object_of(
        gpu=TEXT,
        capacity_bytes=BYTES,
        headroom_bytes=INT,
        verdict={"enum": ["fits", "tight", "does_not_fit"]},
    )
    confidence = object_of(
        evidence={"enum": list(CLASSES)}, band={"type": "number"}, band_above={"type": "number"}, low_bytes=BYTES,
        high_bytes=BYTES, reserved_band=or_null({"type": "number"}), text=TEXT,
    )  # fmt: skip
    reserved = object_of(low_bytes=BYTES, usual_bytes=BYTES, high_bytes=BYTES, pairs=INT, text=TEXT)
    return {
        "method": TEXT,
        "implementation": TEXT,
        "convention": {"enum": ["implementation", "paper"]},
        "hyperparameters": HYPERPARAMETERS,
        "layerwise": FLAG,
        **dict.fromkeys(("weights_bytes", "gradients_bytes", "optimizer_state_bytes"), BYTES),
        "buffers_bytes": or_null(BYTES),  # null: not told apart from the weights of each phase
        "phases": list_of(phase),
        "peak_phase": {"enum": list(names)},
        "peak_allocated_bytes": BYTES,
        "peak_reserved_bytes": or_null(BYTES),
        "outside_allocator_bytes": BYTES,
        "device_bytes": BYTES,
        "confidence": or_null(confidence),
        "reserved_by_rule": or_null(reserved),
        "fits": or_null(fits),
        "assumptions": TEXTS,
        "not_counted": TEXTS,
    }


def _setup() -> dict[str, Schema]:
    return {
        "recipe": TEXT,
        "batch_size": INT,
        "seq_len": INT,
        "attention": TEXT,
        "gradient_checkpointing": FLAG,
        "loss": TEXT,
        "layerwise": FLAG,
        "keep_gradients": FLAG,
        "keep_logits": TEXT,
        "load": TEXT,
        "use_cache": FLAG,
        "gradient_accumulation": INT,
        "transformers": TEXT,
        "torch": TEXT,
        "device": TEXT,
        "target": or_null(TEXTS),
        "gpu": or_null(TEXT),
    }


def _result(name: str, one: Schema, setup: Schema) -> dict[str, Schema]:
    """A whole answer, method by method."""
    model = object_of(
        name=TEXT,
        family=or_null(TEXT),
        parameters=BYTES,
        parameters_projected=BYTES,
        layers=BYTES,
        source=TEXT,
    )
    return {
        "schema": {"const": name},
        "version": TEXT,
        "model": model,
        "setup": setup,
        "estimates": list_of(one),
        "unsupported": list_of(object_of(method=TEXT, implementation=TEXT, reason=TEXT)),
    }


def _simulate() -> Schema:
    # (a program of one's own names its phases)
    phase = object_of(**_phase(SIMULATED_PHASES) | {"name": TEXT})
    place: dict[str, Schema] = {"phase": TEXT, "module": TEXT, "operation": TEXT}
    live = object_of(
        category={"enum": list(CATEGORIES)},
        name=TEXT,
        **place,
        shape=list_of(BYTES),
        dtype=TEXT,
        count=BYTES,
        bytes=BYTES,
    )
    sizes = ("requested_bytes", "tried_bytes", "allocated_bytes", "reserved_bytes", "free_bytes")
    timeline = object_of(
        events=BYTES,
        phases=list_of(object_of(at=BYTES, name=TEXT)),
        at=list_of(BYTES),
        **dict.fromkeys(CATEGORIES, list_of(BYTES)),
        reserved_bytes=or_null(list_of(BYTES)),
        out_of_memory_at=or_null(BYTES),
    )
    one = object_of(
        ("timeline",),
        **_answer(phase, SIMULATED_PHASES) | {"peak_phase": TEXT},
        fragmentation_bytes=or_null(BYTES),
        retries=or_null(BYTES),
        events=BYTES,
        layers_traced=list_of(BYTES),
        out_of_memory=or_null(object_of(**place, **dict.fromkeys(sizes, BYTES), message=TEXT)),
        at_peak=object_of(**place, live=list_of(live)),
        timeline=timeline,
    )
    setup = _setup()
    setup |= {name: or_null(setup[name]) for name in ("recipe", *DECIDED)}
    return object_of(**_result(SIMULATE_SCHEMA, one, object_of(**setup, allocator=TEXT, full=FLAG)))


def _papers() -> Schema:
    cell = object_of(
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
    table = object_of(paper=TEXT, table=TEXT, cells=BYTES, reproduced=BYTES, conventions=counts)
    reasons: Schema = {"type": "object", "additionalProperties": TEXT}
    return object_of(
        schema={"const": "galore-mem.papers/1"}, cells=list_of(cell), tables=list_of(table), conventions=reasons
    )


def _methods() -> Schema:
    equations = object_of(WHERE, **dict.fromkeys(WHERE, TEXT))
    counting = {"version": TEXT, "source": TEXT, "equations": equations, "notes": TEXTS}
    code = object_of(name=TEXT, default=FLAG, **counting, layerwise={"enum": list(LAYERWISE)}, not_counted=TEXTS)
    hyperparameter = object_of(
        name=TEXT,
        type={"enum": list(KINDS.values())},
        default={"type": ["integer", "number", "string"]},
        choices=TEXTS,
        least=or_null(INT),
        help=TEXT,
    )
    method = object_of(
        name=TEXT,
        title=TEXT,
        citation=object_of(title=TEXT, authors=TEXT, where=TEXT),
        paper=object_of(**counting),
        implementations=list_of(code),
        hyperparameters=list_of(hyperparameter),
    )
    return object_of(schema={"const": METHODS_SCHEMA}, methods=list_of(method))


def _models() -> Schema:
    counts: Schema = {"type": "object", "additionalProperties": BYTES}
    row = object_of(
        name=TEXT, shape=list_of(BYTES), role=TEXT, module=TEXT, count=BYTES, parameters=BYTES, projected=FLAG
    )
    model = object_of(
        ("rows",),
        name=TEXT,
        family=or_null(TEXT),
        parameters=BYTES,
        parameters_projected=BYTES,
        parameters_by_role=counts,
        layers=BYTES,
        source=TEXT,
        rows=list_of(row),
    )
    return object_of(schema={"const": "galore-mem.models/1"}, models=list_of(model))


def _verify() -> Schema:
    phases: Schema = {"type": "object", "additionalProperties": BYTES}
    sizes = object_of(
        (*COUNTED, *TOLD),
        **dict.fromkeys((*RESIDENTS, "peak_allocated_bytes"), BYTES),
        phases=phases,
        **dict.fromkeys(COUNTED, phases),
        **dict.fromkeys(TOLD, BYTES),
    )
    error = or_null({"type": "number"})  # null: something was predicted, and nothing measured
    errors = object_of(
        **dict.fromkeys((*RESIDENTS, "peak_allocated_bytes"), error),
        phases={"type": "object", "additionalProperties": error},
    )
    buffer = object_of(
        param=TEXT,
        buffer=TEXT,
        shape=list_of(BYTES),
        dtype=TEXT,
        predicted_bytes=or_null(BYTES),
        measured_bytes=or_null(BYTES),
    )
    passes = {"batch_size": INT, "seq_len": INT, "gradient_checkpointing": FLAG, "use_cache": FLAG}
    setup = object_of(
        recipe=TEXT,
        **{name: or_null(passes.get(name, TEXT)) for name in OF_PASSES},
        layerwise=FLAG,
        keep_gradients=FLAG,
        gradient_accumulation=INT,
        load=TEXT,
        torch=TEXT,
        device=TEXT,
        target=or_null(TEXTS),
        gpu={"type": "null"},
    )
    environment: Schema = {"type": "object"}  # versions and settings, as they were found
    case = object_of(
        ("buffers", "environment"),
        model=TEXT,
        method=TEXT,
        implementation=TEXT,
        workload={"enum": list(WORKLOADS)},
        hyperparameters=HYPERPARAMETERS,
        setup=setup,
        status={"enum": list(STATUSES)},
        detail=TEXT,
        predicted=or_null(sizes),
        measured=or_null(sizes),
        rel_error=or_null(errors),
        paper_optimizer_state_bytes=or_null(BYTES),
        seconds={"type": "number", "minimum": 0},
        buffers=list_of(buffer),
        environment=environment,
    )
    share = {"type": "number", "minimum": 0}
    off = object_of(
        **dict.fromkeys(("model", "method", "implementation", "workload", "phase"), TEXT),
        rel_error={"type": "number"},
    )
    summary = object_of(
        cases=BYTES,
        **dict.fromkeys(STATUSES, BYTES),
        **dict.fromkeys(("buffers_compared", "buffers_different", "phases_compared"), BYTES),
        **dict.fromkeys(("worst_rel_error", "p95_rel_error", "median_rel_error"), or_null(share)),
        worst=or_null(off),
    )
    return object_of(
        schema={"const": VERIFY_SCHEMA}, version=TEXT, environment=environment, cases=list_of(case), summary=summary
    )


SCHEMAS = {
    "estimate": _estimate,
    "methods": _methods,
    "models": _models,
    "papers": _papers,
    "simulate": _simulate,
    "verify": _verify,
}


def schema(name: str) -> Schema:
    """The JSON Schema of a command's output. Raises `InputError` for a command that has none."""
    if name not in SCHEMAS:
        raise unknown("schema", name, SCHEMAS)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": f"galore-mem {name}", **SCHEMAS[name]()}
