"""`models` as a table, CSV or Markdown: the bundled models, or one with its parameters by role."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from galore_mem.report.tables import Column, Table, to_csv, to_markdown, to_terminal
from galore_mem.spec.model import ModelSpec, is_target

MODELS_SCHEMA = "galore-mem.models/1"


def to_json(models: Sequence[ModelSpec], *, detail: bool) -> dict[str, Any]:
    """Counts of each model; with `detail`, its parameter rows (one for rows that repeat in each layer)."""
    return {"schema": MODELS_SCHEMA, "models": [_model(m, detail=detail) for m in models]}


def _model(model: ModelSpec, *, detail: bool) -> dict[str, Any]:
    by_role: dict[str, int] = {}
    projected = 0
    for row, repeat in model.groups():
        by_role[row.role.value] = by_role.get(row.role.value, 0) + row.count * repeat
        projected += row.count * repeat if is_target(row, None) else 0
    found: dict[str, Any] = {
        "name": model.name,
        "family": model.family,
        "parameters": model.parameter_count,
        "parameters_projected": projected,
        "parameters_by_role": by_role,
        "layers": model.num_layers,
        "source": model.source,
    }
    if detail:
        found["rows"] = [
            {
                "name": row.name,
                "shape": list(row.shape),
                "role": row.role.value,
                "module": row.module,
                "count": repeat,
                "parameters": row.count * repeat,
                "projected": is_target(row, None),
            }
            for row, repeat in model.groups()
        ]
    return found


def render(data: Mapping[str, Any], format: str, *, plain: bool) -> str:
    """The models' JSON as text in one of the formats `table`, `csv` and `markdown`."""
    models = data["models"]
    if format == "csv":
        return _csv(models)
    tables = [_rows_table(models[0]), _roles_table(models[0])] if "rows" in models[0] else [_list_table(models)]
    return "\n".join(to_markdown(t) if format == "markdown" else to_terminal(t, plain=plain) for t in tables)


def _csv(models: Sequence[Mapping[str, Any]]) -> str:
    if "rows" in models[0]:
        keys = ["name", "shape", "role", "module", "count", "parameters", "projected"]
        rows = [[{**r, "shape": "x".join(map(str, r["shape"]))}[k] for k in keys] for r in models[0]["rows"]]
        return to_csv(keys, rows)
    keys = ["name", "family", "parameters", "parameters_projected", "layers", "source"]
    return to_csv(keys, [[m[k] for k in keys] for m in models])


def _list_table(models: Sequence[Mapping[str, Any]]) -> Table:
    columns = (
        Column("model"),
        Column("family"),
        Column("parameters", right=True),
        Column("projected", right=True),
        Column("layers", right=True),
    )
    rows = tuple(
        (m["name"], m["family"] or "-", f"{m['parameters']:,}", f"{m['parameters_projected']:,}", str(m["layers"]))
        for m in models
    )
    return Table("", columns, rows, ("projected: attention and MLP matrices, what low-rank methods apply to",))


def _rows_table(model: Mapping[str, Any]) -> Table:
    columns = (
        Column("parameter"),
        Column("shape"),
        Column("role"),
        Column("x", right=True),
        Column("parameters", right=True),
        Column("projected"),
    )
    rows = tuple(
        (
            r["name"],
            " x ".join(map(str, r["shape"])),
            r["role"],
            str(r["count"]),
            f"{r['parameters']:,}",
            "yes" if r["projected"] else "",
        )
        for r in model["rows"]
    )
    return Table(f"{model['name']} ({model['family'] or 'shapes only'}; {model['source']})", columns, rows)


def _roles_table(model: Mapping[str, Any]) -> Table:
    total = model["parameters"]
    rows = [(role, f"{n:,}", f"{n / total:.1%}") for role, n in model["parameters_by_role"].items()]
    rows += [("all", f"{total:,}", ""), ("projected", f"{model['parameters_projected']:,}", "")]
    return Table("", (Column("role"), Column("parameters", right=True), Column("share", right=True)), tuple(rows))
