"""Small models to factorize and to adapt, and steps with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from galore_mem.optim import with_adapters

SIZES: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama", "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "vocab_size": 96,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32,
        "tie_word_embeddings": False, "attention_bias": True,
    },
    "gpt2": {
        "model_type": "gpt2", "n_embd": 48, "n_layer": 2, "n_head": 4, "vocab_size": 96, "n_positions": 32,
        "bos_token_id": 0, "eos_token_id": 0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0,
    },
}  # fmt: skip
TARGETS: dict[str, tuple[str, ...] | None] = {"llama": ("q_proj", "v_proj", "down_proj"), "gpt2": None}
RECIPES = {"fp32": torch.float32, "pure-bf16": torch.bfloat16}
IDS = torch.randint(0, 96, (2, 16), generator=torch.Generator().manual_seed(0))
RANK = 8


def model_of(family: str, given: str = "fp32") -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**SIZES[family])
    return transformers.AutoModelForCausalLM.from_config(config, dtype=RECIPES[given])


def adapted(family: str, given: str = "fp32") -> Any:
    pytest.importorskip("peft")
    return with_adapters(model_of(family, given), RANK, TARGETS[family])


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def train(model: Any, optimizer: torch.optim.Optimizer, steps: int, after: Callable[[], object] = lambda: None) -> None:
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        after()
