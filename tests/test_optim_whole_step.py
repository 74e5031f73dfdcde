"""Whole training steps with our optimizers: the estimate's peaks against the allocator's, layer-wise update included.

The model is small and its batch of eight tokens smaller, so that optimizer, gradients and projectors decide the peaks.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import bitsandbytes  # noqa: F401  # its import makes tensors
import pytest
import torch
from allocations import allocations
from low_rank import plain_kernels
from ours import OURS, Ours
from transformers import LlamaConfig, LlamaForCausalLM

import galore_mem
from galore_mem.optim import LayerWise, QGaLoreAdamW8bit, for_trainer, quantize_linears
from galore_mem.setup import recipe

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "tie_word_embeddings": False, "max_position_embeddings": 64,
}  # fmt: skip
RANK, GAP, TOKENS = 32, 3, 8
INT8 = Ours("q-galore", QGaLoreAdamW8bit)
MARK = 1_234_567
RECIPES = {"float32": "fp32", "bfloat16": "pure-bf16"}
# Not followed: scalars (the loss, Python numbers as tensors, the gradients' smallest and largest values), at most 8
# bytes each on both sides; and, where a projector is orthonormalized, LAPACK's workspace.
SCALARS, QR = 256, 16_384


def predicted(ours: Ours, folder: Path, fmt: str, *, layerwise: bool) -> dict[str, int]:
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **SIZES}
    (folder / "config.json").write_text(json.dumps(config))
    setup = galore_mem.Setup(recipe(RECIPES[fmt]), batch_size=1, seq_len=TOKENS, device="cpu", layerwise=layerwise)
    rank = RANK if ours.projects else None
    (found,) = galore_mem.estimate(
        str(folder), [ours.method], implementation=ours.implementation, rank=rank, setup=setup, **ours.told
    ).estimates
    highest = max(p.allocated_bytes for p in found.phases if p.name != "refresh")
    return {"step": highest, "refresh": max(highest, *(p.allocated_bytes for p in found.phases))}


def measured(ours: Ours, fmt: str, *, layerwise: bool) -> dict[str, int]:
    """The highest number of live bytes in a step that renews no projector, and in one that does."""

    def life() -> None:
        config = LlamaConfig(**SIZES, attn_implementation="sdpa")
        model = LlamaForCausalLM(config).to(getattr(torch, fmt))
        if ours.ledger.linear == "int8":
            quantize_linears(model)
        options = {**ours.arguments, **ours.options, "layerwise": LayerWise() if layerwise else None}
        if ours.projects:
            options |= {"rank": RANK, **ours.every(GAP)}
        made, arguments = for_trainer(model, ours.made, lr=1e-3, **options)
        optimizer = made(**arguments)
        ids = torch.randint(0, SIZES["vocab_size"], (1, TOKENS))
        for _ in range(GAP + 1):
            torch.empty(MARK, dtype=torch.int8)
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            del loss
            optimizer.step()
            optimizer.zero_grad()
        torch.empty(MARK, dtype=torch.int8)

    with plain_kernels():
        steps = allocations(life, ignore=8).steps
    marks = [i for i, (size, _) in enumerate(steps) if size == MARK]
    peaks = [max(live for _, live in steps[a + 1 : b]) for a, b in pairwise(marks)]
    return {"step": peaks[-2], "refresh": peaks[-1]}


@pytest.mark.parametrize("layerwise", [False, True], ids=["step", "layer-wise"])
@pytest.mark.parametrize("fmt", RECIPES)
@pytest.mark.parametrize("ours", [*OURS, INT8], ids=str)
def test_estimate_meets_the_allocator(ours: Ours, fmt: str, layerwise: bool, tmp_path: Path) -> None:
    said, seen = predicted(ours, tmp_path, fmt, layerwise=layerwise), measured(ours, fmt, layerwise=layerwise)
    assert abs(said["step"] - seen["step"]) <= SCALARS
    assert abs(said["refresh"] - seen["refresh"]) <= (QR if ours.randomized else SCALARS)
