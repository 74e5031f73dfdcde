"""Every causal and masked language model type of transformers: a tiny one simulated, beside its real run on the CPU."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from family_configs import config

from galore_mem.errors import InputError
from galore_mem.setup import Setup, recipe

BATCH, LENGTH = 2, 64
WAYS = {"plain": False, "checkpointing": True}  # gradient checkpointing or not
PHASES = ("forward", "backward", "step")
RESIDENTS = ("weights", "gradients", "optimizer_state")
Found = dict[str, dict[str, int]]  # `phases` and `residents`, in bytes


class Family(NamedTuple):
    """A model type with one of its heads, causal or masked; `model` is transformers' class."""

    type: str
    head: str
    model: str

    @property
    def key(self) -> str:
        return f"{self.type} {self.head}"

    def keys(self) -> dict[str, Any]:
        """Its config.json."""
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        decides = {"is_decoder": True} if self.head == "causal" and self.type in heads()["masked"] else {}
        given = {**config(self.type), **decides, "architectures": [self.model]}
        made: Any = CONFIG_MAPPING[given.pop("model_type")](**given)
        found: dict[str, Any] = json.loads(made.to_json_string())
        return found


def heads() -> dict[str, dict[str, str]]:
    """The classes of each head by model type."""
    from transformers.models.auto import modeling_auto as auto

    return {
        "causal": dict(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), "masked": dict(auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES)
    }  # fmt: skip


def cases() -> Iterator[Family]:
    found = [Family(kind, head, name) for head, names in heads().items() for kind, name in names.items()]
    yield from sorted(found)


def run(family: Family) -> dict[str, Any]:
    """In each way what was measured and what was simulated, or why not; and what is simulated on CUDA."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        keys = family.keys()
        path.write_text(json.dumps(keys), encoding="utf-8")
        attention = attention_of(str(path))
        found: dict[str, Any] = {"type": family.type, "head": family.head, "attention": attention}
        for way, again in WAYS.items():
            options = {"batch_size": BATCH, "seq_len": LENGTH, "attention": attention, "gradient_checkpointing": again}
            found[way] = {
                "measured": measured(keys, Setup(recipe("fp32"), device="cpu", **options)),
                "simulate": simulated(str(path), Setup(recipe("fp32"), device="cpu", **options)),
            }
        found["cuda"] = on_cuda(str(path), attention)
    return found


def on_cuda(path: str, attention: str) -> dict[str, Any]:
    """On a GPU, in bfloat16 where the model's code knows that."""
    found: dict[str, Any] = {}
    for fmt in ("pure-bf16", "fp32"):
        found = simulated(path, Setup(recipe(fmt), batch_size=BATCH, seq_len=LENGTH, attention=attention))
        if "refused" not in found:
            return found
    return found


def attention_of(path: str) -> str:
    """sdpa where the model has it."""
    from galore_mem.simulate.subjects.models import built, work_of
    from galore_mem.simulate.subjects.subject import subject

    try:
        built(work_of(subject(path), Setup(recipe("fp32"), device="cpu"), "adamw"))
    except InputError as error:
        return "eager" if "--attention eager" in str(error) else "sdpa"
    return "sdpa"


def simulated(path: str, setup: Setup) -> dict[str, Any]:
    """By the Python interface, every layer traced: bytes, and what was assumed; or why it is refused. (Another
    exception is a failure of ours.)"""
    import torch

    from galore_mem.simulate import simulate

    torch.manual_seed(0)
    try:
        one = simulate(path, ["adamw"], implementation="torch-loop", setup=setup).estimates[0]
    except InputError as error:
        return {"refused": str(error).replace(path, "config.json")}
    stays = one.weights_bytes, one.gradients_bytes, one.optimizer_state_bytes
    assumed = [note for note in one.assumptions if "was taken" in note or note.startswith("experts")]
    return {
        "phases": {phase.name: phase.allocated_bytes for phase in one.phases if phase.name in PHASES},
        "residents": dict(zip(RESIDENTS, stays, strict=True)), "assumed": assumed,
    }  # fmt: skip


def measured(keys: dict[str, Any], setup: Setup) -> dict[str, Any]:
    """Every event of torch's allocator from before the first tensor; or why the real model is not trained."""
    import gc

    import torch

    from galore_mem.simulate.subjects.models import spec_of, work_of
    from galore_mem.verify.builders import builder
    from galore_mem.verify.kernels import chosen_kernels
    from galore_mem.verify.meters import CpuMeter
    from galore_mem.verify.workloads import run_train

    row = builder("adamw", "torch-loop")
    gc.collect()  # what runs before have left is not given back in this one
    gc.freeze()
    torch.manual_seed(0)
    try:
        work = work_of(spec_of(keys, "x"), setup, "adamw", "torch-loop")
        with CpuMeter() as meter, chosen_kernels(work):
            made = run_train(work, row, torch.device("cpu"), meter)
    except Exception as error:  # of whatever class the model's own code raises
        return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]}
    peaks = {name: peak.allocated for name, peak in meter.peaks().items() if name in PHASES}
    return {"phases": peaks, "residents": dict(zip(RESIDENTS, made[:3], strict=True))}
