"""Every model type of transformers, simulated: the section of docs/simulate.md."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from errors import percent, table, text
from families import BATCH, LENGTH, PHASES, WAYS
from record import Line

# Bytes. Python's numbers beside tensors become tensors of 8 bytes in C++, which no dispatch mode sees; derivatives keep
# some of them. An error below this is theirs.
NUMBERS = 1024


def families(lines: Sequence[Line]) -> Iterator[str]:
    found = [one["found"] for one in lines]
    yield "## Every causal and masked model type of transformers"
    yield text(
        f"A tiny config.json of each model type in transformers' tables of causal and masked language models, "
        f"simulated with every layer and beside a real run on the CPU: batch {BATCH}, {LENGTH} tokens, fp32, AdamW "
        f"(torch-loop), without and with gradient checkpointing, peaks of {', '.join(PHASES)}, every event of torch's "
        f"allocator, one thread, without oneDNN; sdpa attention where the model has it. And once more on CUDA "
        f"(pure-bf16, or fp32 where the model's own code knows no other), where there is nothing to compare with here."
    )
    kinds = {kind: [one for one in found if state(one) == kind] for kind in ("equal", "off", "refused", "untrained")}
    compared = kinds["equal"] + kinds["off"]
    runs = sum("phases" in one[way]["measured"] for one in compared for way in WAYS)
    worst = max((abs(error) for one in compared for error in errors(one)), default=0.0)
    wrong = [one for one in compared if "refused" in one["cuda"]]
    yield text(
        f"**{len(types(compared))} of {len(types(found))} types ({len(compared)} of {len(found)} with their heads, "
        f"{runs} runs): {len(kinds['equal'])} to the byte but for Python's numbers, worst {percent(worst)}; "
        f"{len(kinds['refused'])} refused; {len(kinds['untrained'])} that transformers itself does not train on "
        f"`input_ids, labels` here.** What stays (weights, gradients, optimizer state) is equal in "
        f"{sum(stays(one) for one in compared)} of {len(compared)}. On CUDA {len(compared) - len(wrong)} are simulated."
    )
    yield table(
        {"type": False, "head": False, "what": False, "why": False},
        [*map(row_off, kinds["off"]), *map(row_refused, kinds["refused"]), *map(row_untrained, kinds["untrained"]),
         *((one["type"], one["head"], "not on CUDA", shown(one["cuda"]["refused"])) for one in wrong)],
    )  # fmt: skip
    yield text(
        f"*To the byte but for Python's numbers*: a number beside a tensor (`x * 0.5`) is a tensor of 8 bytes in C++, "
        f"which no dispatch mode sees and derivatives keep; the peaks of these are off by at most "
        f"{max((abs(gap) for one in kinds['equal'] for gap in gaps(one)), default=0)} bytes, and on CUDA such numbers "
        f"take no device memory."
    )
    guessed = sorted({one["type"] for one in compared if any("top-k" in said for said in assumed(one))})
    if guessed:
        yield text(
            f"Which experts tokens choose decides shapes in {', '.join(guessed)}, whose code loops over them: each is "
            f"taken to be chosen equally often, and the answer says so."
        )
    yield text(f"Equal: {', '.join(names(kinds['equal']))}.")


def state(one: Mapping[str, Any]) -> str:
    """equal, off, refused (the real model trains, and is not simulated), or untrained."""
    ways = [one[way] for way in WAYS if "phases" in one[way]["measured"]]
    if not ways:
        return "untrained"
    if any("refused" in way["simulate"] for way in ways):
        return "refused"
    return "equal" if stays(one) and all(abs(gap) < NUMBERS for gap in gaps(one)) else "off"


def compared_ways(one: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for way in WAYS:
        if "phases" in one[way]["measured"] and "phases" in one[way]["simulate"]:
            yield way, one[way]


def gaps(one: Mapping[str, Any]) -> Iterator[int]:
    """Bytes, of each phase."""
    for _, way in compared_ways(one):
        yield from (way["simulate"]["phases"][name] - n for name, n in way["measured"]["phases"].items())


def errors(one: Mapping[str, Any]) -> Iterator[float]:
    for _, way in compared_ways(one):
        yield from (way["simulate"]["phases"][name] / n - 1 for name, n in way["measured"]["phases"].items())


def stays(one: Mapping[str, Any]) -> bool:
    return all(way["simulate"]["residents"] == way["measured"]["residents"] for _, way in compared_ways(one))


def row_off(one: Mapping[str, Any]) -> tuple[str, str, str, str]:
    said = []
    for way, found in compared_ways(one):
        for name, n in found["measured"]["phases"].items():
            more = found["simulate"]["phases"][name] - n
            if abs(more) >= NUMBERS:
                said.append(f"{way}, {name} {percent(more / n)} ({more:+,} B)")
    taken = [note for note in assumed(one) if "was taken" in note]
    return one["type"], one["head"], "; ".join(said), shown(taken[0]) if taken else ""


def assumed(one: Mapping[str, Any]) -> Sequence[str]:
    """What the simulation took for granted."""
    found: Sequence[str] = one["cuda"].get("assumed", [])
    return found


def row_refused(one: Mapping[str, Any]) -> tuple[str, str, str, str]:
    why = next(one[way]["simulate"]["refused"] for way in WAYS if "refused" in one[way]["simulate"])
    return one["type"], one["head"], "refused", shown(why)


def row_untrained(one: Mapping[str, Any]) -> tuple[str, str, str, str]:
    return one["type"], one["head"], "not trained", shown(one["plain"]["measured"]["failed"])


def shown(said: str) -> str:
    """One line for a table."""
    return said.removeprefix("adamw (torch-loop): ").replace("|", "\\|")[:160]


def types(found: Sequence[Mapping[str, Any]]) -> set[str]:
    return {one["type"] for one in found}


def names(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Types, with their head where another is not among them."""
    both = {one["type"] for one in found if sum(other["type"] == one["type"] for other in found) > 1}
    return sorted({one["type"] if one["type"] in both else f"{one['type']} ({one['head']})" for one in found})
