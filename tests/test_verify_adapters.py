"""QLoRA's model is made as from_pretrained makes it: matrix by matrix, never whole before it is quantized."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from galore_mem.estimator import Case, given_for
from galore_mem.memory.phases import Work
from galore_mem.methods.registry import method
from galore_mem.setup import RECIPES, Setup
from galore_mem.simulate.session import trace_work
from galore_mem.spec.config import model_from_config
from galore_mem.verify.builders import builder

pytest.importorskip("bitsandbytes")
adapters = pytest.importorskip("galore_mem.verify.adapters")

HIDDEN, MLP, VOCABULARY, LAYERS = 64, 512, 128, 4


def work(tied: bool = False, device: str = "cuda") -> Work:
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": VOCABULARY, "hidden_size": HIDDEN,
        "intermediate_size": MLP, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "num_key_value_heads": 2,
        "tie_word_embeddings": tied,
    }  # fmt: skip
    found = method("qlora")
    setup = Setup(RECIPES["pure-bf16"], seq_len=16, device=device)
    spec = model_from_config(config, "small", "test")
    given = given_for(found, {"rank": 4, "double_quant": 0})
    return Case(spec, setup, found, found.implementation("peft"), None, given).work()


def test_the_model_is_never_whole_before_it_is_quantized() -> None:
    """A matrix of 64 x 512 takes 65,536 bytes in 16 bits, all of them (16 of 64 x 64, 12 of 64 x 512) 917,504: more
    than what stays. Beside that there is never more than the largest, or an embedding that is being widened."""
    pytest.importorskip("peft")
    trace = trace_work(work(), builder("qlora", "peft")).trace
    begin = trace.marks[1].at
    live = highest = 0
    for event in trace.events[:begin]:
        size = trace.nbytes(max(event, ~event))
        live += size if event >= 0 else -size
        highest = max(highest, live)
    largest = max(2 * HIDDEN * MLP, 2 * 2 * HIDDEN * VOCABULARY)
    assert highest <= live + largest
    assert live < 2 * LAYERS * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * MLP)


@pytest.mark.parametrize("tied", [False, True])
def test_a_real_model_has_values_everywhere(tied: bool) -> None:
    """On the CPU: what was nowhere while the model was made is there, quantized or (the head) as it is."""
    pytest.importorskip("peft")
    from galore_mem.verify.models import transformers_model

    said = work(tied, "cpu")
    with adapters.without_matrices():
        made = transformers_model(said, torch.device("cpu"))
        linear: Any = torch.nn.Linear(2, 3)
    assert linear.weight.is_meta
    assert linear.bias.tolist() == [0, 0, 0]
    assert not torch.nn.Linear(2, 3).weight.is_meta  # nothing is left patched
    model = adapters.qlora(made, said)
    assert not any(p.is_meta for p in model.parameters())
    quantized = [n for n, p in model.named_parameters() if type(p).__name__ == "Params4bit"]
    assert len(quantized) == 7 * LAYERS
    assert all(p.float().isfinite().all() for p in model.parameters())
    out = model(input_ids=torch.zeros(1, 4, dtype=torch.int64)).logits
    assert out.shape == (1, 4, VOCABULARY)
    assert out.isfinite().all()
