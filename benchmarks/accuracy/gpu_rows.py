"""Runs that others measured on GPUs, and how each becomes a training run of ours. No torch.

`gpu_runs.jsonl`: one run a line, sizes in bytes, each with its source. GALORE_MEM_GPU_RUNS names another file of this
form. `gpu_published.jsonl`: printed figures, of which only what was printed is compared; a peak that lies in the
forward pass of a release that is not described (transformers 4.39 copies the shifted logits) is left out.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from gpu_loops import LOOPS, Loop

from galore_mem.errors import InputError
from galore_mem.estimator import Case, given_for
from galore_mem.methods.registry import method
from galore_mem.setup import RECIPES, Setup
from galore_mem.spec.bundled import bundled
from galore_mem.spec.config import model_from_config
from galore_mem.spec.model import ModelSpec
from galore_mem.spec.resolve import resolve

OTHER = os.environ.get("GALORE_MEM_GPU_RUNS")
ROWS = Path(OTHER) if OTHER else Path(__file__).with_name("gpu_runs.jsonl")
PUBLISHED = Path(__file__).with_name("gpu_published.jsonl")
TUNED = ("-instruct", "-chat-v1.0", "-chat")  # what follows a base model's name where its shapes are the same
# https://huggingface.co/distilbert/distilbert-base-uncased/blob/main/config.json
DISTILBERT = {
    "model_type": "distilbert", "architectures": ["DistilBertForMaskedLM"], "vocab_size": 30522, "dim": 768,
    "hidden_dim": 3072, "n_layers": 6, "n_heads": 12, "max_position_embeddings": 512, "dropout": 0.1,
    "attention_dropout": 0.1,
}  # fmt: skip
CONFIGS = {"distilbert-base-uncased": DISTILBERT}  # of models that are no bundled spec
CAPABILITY = {"NVIDIA RTX A6000": (8, 6), "Tesla T4": (7, 5), "t4": (7, 5)}
CARDS = {"NVIDIA RTX A6000": "rtx-a6000", "Tesla T4": "t4", "t4": "t4"}
PHASES = {"forward": "peak_forward_bytes", "backward": "peak_backward_bytes", "step": "peak_optimizer_bytes"}


@dataclass(frozen=True)
class Row:
    """A measured run. `told` is its line."""

    told: Mapping[str, Any]

    @property
    def key(self) -> str:
        return str(self.told["id"])

    @property
    def measured(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.told["measured"]
        return found

    @property
    def trains(self) -> bool:
        return self.told["mode"] == "train"

    @property
    def loop(self) -> Loop:
        """How its source trains. Raises `InputError` for a source whose loop is not known."""
        source = str(self.told["source"])
        for name, loop in LOOPS.items():
            if source.startswith(name):
                return loop
        raise InputError(f"the training loop of {source} is not known")

    @cached_property
    def config(self) -> Mapping[str, Any] | None:
        """The model's config.json where it is no bundled spec."""
        name = str(self.told["model"]).rpartition("/")[2].lower()
        found: Mapping[str, Any] | None = self.told.get("config") or CONFIGS.get(name)
        return found

    @cached_property
    def spec(self) -> ModelSpec | None:
        """The model; None of a family that `estimate` does not know. Raises `InputError` for an unknown name."""
        name = str(self.told["model"]).rpartition("/")[2].lower()
        if self.config is not None:
            try:
                return model_from_config(self.config, name, str(self.told["source"]))
            except InputError:
                return None
        for ending in ("", *TUNED):
            if name.removesuffix(ending) in bundled():
                return resolve(name.removesuffix(ending))
        return resolve(name)

    @property
    def headless(self) -> bool:
        """Is it an encoder alone (AutoModel), with a loss of its own?"""
        family = self.spec.family if self.spec else str((self.config or {}).get("model_type"))
        return self.loop.encoders_without_head and family in ("bert", "distilbert", "roberta")

    @property
    def recipe(self) -> str:
        if self.told["dtype"] == "amp":
            return self.loop.autocast
        if str(self.told.get("recipe", "")).startswith("amp"):
            return f"amp-{self.told['dtype']}"
        return "fp32" if self.told["dtype"] == "fp32" else f"pure-{self.told['dtype']}"

    @property
    def setup(self) -> Setup:
        """The stack is the nearest that is described: of transformers by the major version; of torch, which matters
        for the kernel of grouped heads alone, the one that runs the kernel that the source pinned."""
        t, loop = self.told, self.loop
        return Setup(
            RECIPES[self.recipe],
            batch_size=t["batch"],
            seq_len=t["seq_len"],
            attention=t.get("attention") or loop.attention,
            gradient_checkpointing=bool(t["gradient_checkpointing"]),
            keep_gradients=loop.keep_gradients,
            keep_logits=loop.outputs,
            use_cache=loop.use_cache,
            load=loop.load,
            transformers="4.57" if str(t["versions"].get("transformers", "5")).startswith("4") else "5.23",
            torch="2.14" if loop.pins_kernel else "2.13",
            compute_capability=CAPABILITY.get(t["gpu"]),
        )

    @property
    def implementation(self) -> str:
        low_rank = self.told["method"] in ("lora", "qlora")
        return str(self.told.get("implementation") or ("peft" if low_rank else "torch-foreach"))

    @property
    def case(self) -> Case:
        """What `estimate` is asked. Raises `InputError` for what cannot be said."""
        if self.spec is None:
            raise InputError(f"no family {(self.config or {}).get('model_type')}")
        t, found = self.told, method(self.told["method"])
        given = {"rank": t["rank"]} if t.get("rank") else {}
        if t["method"] == "qlora":
            given["double_quant"] = int(bool(t.get("double_quant")))
        targets = tuple(t["lora_targets"]) if t.get("lora_targets") else None
        code = found.implementation(self.implementation)
        return Case(self.spec, self.setup, found, code, targets, given_for(found, given))

    @property
    def title(self) -> str:
        t = self.told
        model, how = str(t["model"]).rpartition("/")[2], t["method"] if self.trains else t["mode"]
        more = " checkpointed" if t["gradient_checkpointing"] else ""
        return f"{self.key} {model} {how} {self.recipe} {t['batch']} x {t['seq_len']} {self.setup.attention}{more}"


def rows(path: Path = ROWS) -> Iterator[Row]:
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.strip():
            yield Row(json.loads(line))


def every() -> Iterator[Row]:
    """The measured runs and the printed figures; of another file, its runs."""
    yield from rows()
    if not OTHER:
        yield from rows(PUBLISHED)
