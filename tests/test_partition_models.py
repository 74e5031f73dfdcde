"""Are the blocks of query and key really heads? Asked of transformers' models: who attends differently when the rows of
one block change?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from galore_mem.optim import partition_of

transformers = pytest.importorskip("transformers")

VOCABULARY, HEADS, KV_HEADS = 50, 4, 2
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": HEADS}
GATED = {**SIZES, "num_key_value_heads": KV_HEADS, "intermediate_size": 24}
# class, settings, the modules of layer 0 whose weights hold queries and keys, key-value heads
MODELS: dict[str, tuple[str, dict[str, Any], tuple[str, ...], int]] = {
    # 32 / 4 = 8, but a head has 12 rows
    "llama": ("Llama", {**GATED, "head_dim": 12}, ("q_proj", "k_proj", "v_proj"), KV_HEADS),
    "phi3": ("Phi3", {**GATED, "pad_token_id": 0}, ("qkv_proj",), KV_HEADS),
    "gpt2": ("GPT2", {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 1, "n_head": HEADS}, ("c_attn",), HEADS),
    "gpt_neox": ("GPTNeoX", {**SIZES, "intermediate_size": 24}, ("query_key_value",), HEADS),
    "bloom": ("Bloom", {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 1, "n_head": HEADS},
              ("query_key_value",), HEADS),
}  # fmt: skip


def built(kind: str) -> nn.Module:
    name, settings, _, _ = MODELS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**settings)
    model: nn.Module = getattr(transformers, f"{name}ForCausalLM" if kind != "gpt2" else "GPT2LMHeadModel")(config)
    model.set_attn_implementation("eager")
    return model.double().eval()


@torch.no_grad()
def attention(model: nn.Module) -> torch.Tensor:
    """Attention of the first layer, heads x tokens x tokens."""
    tokens = torch.arange(9).unsqueeze(0) * 5
    found: torch.Tensor = model(tokens, output_attentions=True, use_cache=False).attentions[0][0]
    return found


def changed(model: nn.Module, weight: torch.Tensor, rows: range, transposed: bool) -> set[int]:
    """Heads that attend otherwise when these rows are other ones."""
    before, kept = attention(model), weight.detach().clone()
    with torch.no_grad():
        chosen = weight[:, rows.start : rows.stop] if transposed else weight[rows.start : rows.stop]
        chosen.add_(torch.randn(chosen.shape, dtype=chosen.dtype))
        after = attention(model)
        weight.copy_(kept)
    return {h for h in range(HEADS) if float((after[h] - before[h]).abs().max()) > 1e-9}


@pytest.mark.parametrize("kind", MODELS)
def test_blocks_are_heads(kind: str) -> None:
    """A query head's rows change one head's attention, a key head's those of the heads that share it, and rows of
    values none. Each head has one block of queries and one of keys, so that none is a half or a double one."""
    model = built(kind)
    _, _, modules, kv = MODELS[kind]
    parts, sharing = partition_of(model), HEADS // kv
    seen: dict[tuple[int, ...], int] = {}
    for name, weight in model.named_parameters():
        if not name.endswith("weight") or name.split(".")[-2] not in modules:
            continue
        part, row = parts[name], 0
        for size in [size for _ in range(part.repeat) for count, size in part.runs for _ in range(count)]:
            heads = changed(model, weight, range(row, row + size), bool(part.dim))
            assert bool(heads) == (size > 1), (name, row)
            if heads:
                seen[tuple(sorted(heads))] = seen.get(tuple(sorted(heads)), 0) + 1
            row += size
        assert row == part.rows
    queries = [(h,) for h in range(HEADS)]
    keys = [tuple(range(k * sharing, (k + 1) * sharing)) for k in range(kv)]
    assert seen == {heads: (queries + keys).count(heads) for heads in {*queries, *keys}}
