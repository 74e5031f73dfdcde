"""JSON Schemas (draft 2020-12) are made of these."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

INT: Schema = {"type": "integer"}
BYTES: Schema = {"type": "integer", "minimum": 0}
TEXT: Schema = {"type": "string"}
FLAG: Schema = {"type": "boolean"}
TEXTS: Schema = {"type": "array", "items": TEXT}
HYPERPARAMETERS: Schema = {"type": "object", "additionalProperties": {"type": ["integer", "number", "string"]}}


def object_of(optional: tuple[str, ...] = (), /, **properties: Schema) -> Schema:
    """An object with exactly these keys; all but `optional` are required."""
    return {
        "type": "object",
        "properties": properties,
        "required": [name for name in properties if name not in optional],
        "additionalProperties": False,
    }


def list_of(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}
