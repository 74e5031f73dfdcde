"""Of docs/accuracy.md, what its numbers do not cover."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from errors import table, text
from record import Line

LIMITS = (
    "**No GPU of ours.** Runs and recordings on GPUs are other people's; here everything was compared on a CPU.",
    "**`estimate` without `--reserved` counts tensors**, not the room that they leave in the allocator's blocks: up to "
    "some percent of a small model's peak (below, *What the allocator's blocks add*). Its answers allow for that "
    "(`within`).",
    "**How a model comes to the card** decides which blocks it lies in: `--load` says it, where it is known.",
    "**Scratch of CUDA libraries** whose size is not public: cuSOLVER's drivers (the SVD of a projector), cuDNN's "
    "convolutions and recurrent layers.",
    "**Releases of transformers before 4.57.** Of torchao's three runs (transformers 4.39) two peaks lie in a forward "
    "pass that copies the shifted logits, and are not compared: {torchao}.",
)  # fmt: skip


def section(lines: Sequence[Line]) -> Iterator[str]:
    yield "## What is not in these numbers"
    yield "\n".join(
        text(f"- {one}").replace("\n", "\n  ") for one in (limit.format(torchao=left()) for limit in LIMITS)
    )
    yield "Runs of others that a command cannot be asked for:"
    yield silent(lines)


def left() -> str:
    """Printed peaks that are left out, beside what `estimate` says of them."""
    from gpu_rows import PUBLISHED, rows

    from galore_mem.estimator import budget

    said = []
    for row in rows(PUBLISHED):
        printed = row.told.get("not_compared", {}).get("peak_allocated_bytes")
        if printed:
            peak = budget(row.case).peak_allocated_bytes
            said.append(f"{row.key} {printed:,} B (`estimate`: {peak / printed - 1:+.2%})")
    return ", ".join(said).replace("%", " %")


def silent(lines: Sequence[Line]) -> str:
    why: dict[tuple[str, str], list[str]] = {}
    for line in lines:
        for predictor, reason in line["found"]["not"].items():
            why.setdefault((predictor, reason), []).append(line["key"])
    columns = {"predictor": False, "why": False, "runs": False}
    return table(columns, ((f"`{name}`", reason, ", ".join(keys)) for (name, reason), keys in why.items()))
