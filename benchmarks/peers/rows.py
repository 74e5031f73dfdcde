"""The measured runs on GPUs as a peer can be asked about them: the model by its config, the recipe in words."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gpu_rows import Row, every, rows

SPECS = Path(__file__).resolve().parent.parent.parent / "model_specs"
# where a row's name is not the Hub's
HUB = {
    "Llama-3.2-1B": "meta-llama/Llama-3.2-1B",
    "Llama-3.2-3B": "meta-llama/Llama-3.2-3B",
    "Qwen2.5-1.5B": "Qwen/Qwen2.5-1.5B",
}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
GPUS = {"NVIDIA RTX A6000": "a6000", "Tesla T4": "t4", "t4": "t4"}  # the name that peers have


class Run(NamedTuple):
    """`method` is adamw, lora, qlora (on q, k, v and o) or another; `precision` is amp (fp32 weights, autocast to
    `dtype`) or pure (weights in `dtype`); `parameters` are the base model's, `adapters` those of LoRA; `fused`: by a
    kernel that does not hold the scores, as far as the source says; sizes in bytes, `device_bytes` where reserved
    memory was measured."""

    key: str
    title: str
    gpu: str | None
    model: str
    config: Mapping[str, Any]
    parameters: int
    method: str
    rank: int | None
    adapters: int
    quantization: str
    double_quant: bool
    precision: str
    dtype: str
    batch_size: int
    seq_len: int
    checkpointing: bool
    attention: str
    fused: bool
    peak_allocated_bytes: int
    device_bytes: int | None


def runs(path: Path | None = None) -> Iterator[Run]:
    """The training runs whose peak was measured (what inference takes is another question): of a file, or all that the
    accuracy suite has."""
    found = every() if path is None else rows(path)
    return (run_of(row) for row in found if row.trains and "peak_allocated_bytes" in row.measured)


def run_of(row: Row) -> Run:
    told = row.told
    config = config_of(row)
    low_rank = told["method"] in ("lora", "qlora")
    if low_rank and tuple(told["lora_targets"]) != ATTENTION:
        raise ValueError(f"{row.key}: the peers are asked about LoRA on {', '.join(ATTENTION)} only")
    precision, _, dtype = row.recipe.rpartition("-")
    return Run(
        key=row.key,
        title=row.title,
        gpu=GPUS.get(told["gpu"]),
        model=HUB.get(told["model"], told["model"]),
        config=config,
        parameters=parameters_of(row),
        method=told["method"],
        rank=told["rank"] if low_rank else None,
        adapters=lora_parameters(config, told["rank"]) if low_rank else 0,
        quantization=told.get("quantization") or "none",
        double_quant=bool(told.get("double_quant")),
        precision=precision or "pure",
        dtype=dtype,
        batch_size=told["batch"],
        seq_len=told["seq_len"],
        checkpointing=told["gradient_checkpointing"],
        attention=row.setup.attention,
        fused=told.get("flash_attention", row.setup.attention == "sdpa"),
        peak_allocated_bytes=row.measured["peak_allocated_bytes"],
        device_bytes=device_bytes(row.measured),
    )


def config_of(row: Row) -> Mapping[str, Any]:
    """What config.json says: the row's own, or the bundled spec's as it is written."""
    if row.config is not None or row.spec is None:
        return dict(row.config or {})
    found: dict[str, Any] = tomllib.loads((SPECS / f"{row.spec.name}.toml").read_text("utf-8"))["config"]
    return found


def parameters_of(row: Row) -> int:
    """Some rows say how many there are, of encoders without the head that our spec has."""
    if "params" in row.told:
        return int(row.told["params"])
    assert row.spec is not None
    return row.spec.parameter_count


def lora_parameters(config: Mapping[str, Any], rank: int) -> int:
    """On q, k, v and o of every layer: rank x (in + out) each."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head = config.get("head_dim", hidden // heads)
    q, kv = heads * head, config["num_key_value_heads"] * head
    return int(config["num_hidden_layers"] * rank * (2 * (hidden + q) + 2 * (hidden + kv)))


def device_bytes(measured: Mapping[str, int]) -> int | None:
    """What the process takes of the device at its highest: reserved, and what is outside the allocator."""
    outside = measured.get("cuda_context_bytes", measured.get("outside_allocator_bytes"))
    reserved = measured.get("peak_reserved_bytes")
    return None if outside is None or reserved is None else reserved + outside


def write_cache(folder: Path, wanted: Iterable[Run]) -> None:
    """The configs as a cache of the Hub has them, so that a peer that looks names up there finds them offline."""
    revision = "0" * 40
    for run in wanted:
        model = folder / f"models--{run.model.replace('/', '--')}"
        snapshot = model / "snapshots" / revision
        snapshot.mkdir(parents=True, exist_ok=True)
        (model / "refs").mkdir(exist_ok=True)
        (model / "refs" / "main").write_text(revision, encoding="utf-8")
        (snapshot / "config.json").write_text(json.dumps(dict(run.config)), encoding="utf-8")
