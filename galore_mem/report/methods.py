"""`methods` as a table, CSV or Markdown: every method, or one with its paper, implementations and hyperparameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from galore_mem.methods.base import RANK, UPDATE_PROJ_GAP, Hyperparameter, Implementation, Method
from galore_mem.report.tables import Column, Table, to_csv, to_markdown, to_terminal

METHODS_SCHEMA = "galore-mem.methods/1"
KINDS = {int: "integer", float: "number", str: "text"}
LAYERWISE = ALWAYS, YES, NO = "always", "yes", "no"
WHERE = PROJECTED, OTHER = "projected", "other"  # the parameters that an equation is about
OPTIONS = (RANK.name, UPDATE_PROJ_GAP.name)  # the others are given with --set
LEGEND = "elements for each m x n parameter (m <= n; r: the rank)"
TARGETS = "projected: attention and MLP matrices, or --target"


def to_json(methods: Iterable[Method]) -> dict[str, Any]:
    """All that the registry says of each method; the first of its implementations is the default."""
    return {"schema": METHODS_SCHEMA, "methods": [_method(m) for m in methods]}


def _method(method: Method) -> dict[str, Any]:
    return {
        "name": method.name,
        "title": method.title,
        "citation": method.citation._asdict(),
        "paper": _counting(method.paper),
        "implementations": [
            {
                "name": code.name,
                "default": code is method.implementations[0],
                **_counting(code),
                "layerwise": ALWAYS if method.always_layerwise else YES if code.layerwise else NO,
                "not_counted": list(code.not_counted),
            }
            for code in method.implementations
        ],
        "hyperparameters": [_hyperparameter(h) for h in method.hyperparameters],
    }


def _counting(code: Implementation) -> dict[str, Any]:
    return {
        "version": code.version,
        "source": code.source,
        "equations": dict(code.equations),
        "notes": list(code.notes),
    }


def _hyperparameter(h: Hyperparameter) -> dict[str, Any]:
    return {
        "name": h.name,
        "type": KINDS[type(h.default)],
        "default": h.default,
        "choices": list(h.choices),
        "least": None if h.choices else h.least,
        "help": h.help,
    }


def render(data: Mapping[str, Any], format: str, *, detail: bool, plain: bool) -> str:
    """The methods' JSON as text in one of the formats `table`, `csv` and `markdown`. `detail` is for one method: a CSV
    always has all that is known, a row per implementation."""
    methods = data["methods"]
    if format == "csv":
        return _csv(methods)
    tables = _one(methods[0]) if detail else iter([_list(methods)])
    return "\n".join(to_markdown(t) if format == "markdown" else to_terminal(t, plain=plain) for t in tables)


def _csv(methods: Sequence[Mapping[str, Any]]) -> str:
    keys = ("method", "title", "implementation", "default", "version", "source", "layerwise", *WHERE, "notes",
            "not_counted", "hyperparameters", "paper", "authors", "where")  # fmt: skip
    return to_csv(keys, [row for m in methods for row in _csv_rows(m)])


def _csv_rows(m: Mapping[str, Any]) -> Iterator[tuple[object, ...]]:
    paper = {"name": "paper", "default": False, "layerwise": "", "not_counted": (), **m["paper"]}
    given = "; ".join(f"{h['name']}={h['default']}" for h in m["hyperparameters"])
    for code in (paper, *m["implementations"]):
        yield (
            m["name"], m["title"], *(code[key] for key in ("name", "default", "version", "source", "layerwise")),
            *(code["equations"].get(where, "") for where in WHERE), "; ".join(code["notes"]),
            "; ".join(code["not_counted"]), given, *m["citation"].values(),
        )  # fmt: skip


def _list(methods: Sequence[Mapping[str, Any]]) -> Table:
    columns = (
        Column("method"),
        Column("title", drop=2),
        Column("implementations"),
        Column("hyperparameters", drop=1),
        Column("paper"),
    )
    rows = tuple(
        (m["name"], m["title"], _names(m["implementations"]), _names(m["hyperparameters"]), m["citation"]["where"])
        for m in methods
    )
    footer = ("the first implementation is the default; galore-mem methods NAME shows one with its equations",)
    return Table("", columns, rows, footer)


def _names(rows: Iterable[Mapping[str, Any]]) -> str:
    return ", ".join(row["name"] for row in rows)


def _one(m: Mapping[str, Any]) -> Iterator[Table]:
    """The paper, the code, what each of them keeps, and what can be chosen."""
    yield _paper(m)
    yield _implementations(m)
    yield _equations(m)
    if m["hyperparameters"]:
        yield _hyperparameters(m)


def _paper(m: Mapping[str, Any]) -> Table:
    cited, paper = m["citation"], m["paper"]
    elsewhere = "" if paper["version"] == cited["where"] else f"{paper['version']}, "
    rows = (("authors", cited["authors"]), ("where", cited["where"]), ("counts", elsewhere + paper["source"]))
    return Table(
        f"{m['name']}: {m['title']}",
        (Column("paper"), Column(cited["title"])),
        rows,
        tuple(f"paper: {note}" for note in paper["notes"]),
    )


def _implementations(m: Mapping[str, Any]) -> Table:
    names = ("implementation", "default", "release", "layer-wise", "source")
    codes = m["implementations"]
    rows = tuple((c["name"], "yes" * c["default"], c["version"], c["layerwise"], c["source"]) for c in codes)
    notes = [f"{who}: {note}" for note, who in _by_text(codes, "notes")]
    notes += [f"not counted ({who}): {what}" for what, who in _by_text(codes, "not_counted")]
    return Table("", tuple(Column(name) for name in names), rows, tuple(notes))


def _by_text(codes: Sequence[Mapping[str, Any]], key: str) -> Iterator[tuple[str, str]]:
    """Each remark once, with the implementations it is about."""
    for text in dict.fromkeys(text for code in codes for text in code[key]):
        yield text, _names(code for code in codes if text in code[key])


def _equations(m: Mapping[str, Any]) -> Table:
    """Who counts the same way shares the rows."""
    counting: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for name, code in (("paper", m["paper"]), *((c["name"], c) for c in m["implementations"])):
        counting.setdefault(tuple(code["equations"].items()), []).append(name)
    projects = any(PROJECTED in dict(equations) for equations in counting)
    rows = tuple(
        ("" if i else ", ".join(names), where if projects else "all", equation)
        for equations, names in counting.items()
        for i, (where, equation) in enumerate(equations)
    )
    columns = (Column("counted by"), Column("parameters"), Column("optimizer state"))
    return Table("", columns, rows, (LEGEND, TARGETS) if projects else (LEGEND,))


def _hyperparameters(m: Mapping[str, Any]) -> Table:
    columns = (
        Column("hyperparameter"), Column("default", right=True), Column("allowed"), Column("option"), Column("meaning"),
    )  # fmt: skip
    rows = tuple(
        (h["name"], str(h["default"]), _allowed(h), _option(h["name"]), h["help"]) for h in m["hyperparameters"]
    )
    return Table("", columns, rows)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}" if name in OPTIONS else f"--set {name}="


def _allowed(h: Mapping[str, Any]) -> str:
    return ", ".join(h["choices"]) or f"{h['type']}, at least {h['least']}"
