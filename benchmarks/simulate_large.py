"""Large models without values: LLaMA-7B beside PyTorch's MemTracker, and the largest public models."""

from __future__ import annotations

import os
import resource
import time
from typing import Any

from galore_mem.setup import Setup, recipe
from galore_mem.spec.resolve import resolve

GIB = 2**30
BATCH, LENGTH = 1, 2048
# config.json of deepseek-ai/DeepSeek-V3, but for what only inference reads
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "vocab_size": 129280, "hidden_size": 7168,
    "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 128,
    "num_key_value_heads": 128, "n_shared_experts": 1, "n_routed_experts": 256, "num_experts_per_tok": 8, "n_group": 8,
    "topk_group": 4, "first_k_dense_replace": 3, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128, "v_head_dim": 128, "max_position_embeddings": 163840, "tie_word_embeddings": False,
}  # fmt: skip
# model, method, implementation, options, every layer traced
LARGE = [
    *((("llama-7b", "adamw", code, {}, full)) for code in ("torch-loop", "torch-foreach") for full in (False, True)),
    *(
        (("llama-7b", m, "galore-mem", {"rank": 1024}, full))
        for m in ("galore", "galore-mini")
        for full in (False, True)
    ),
    *((("llama-3.1-405b", "adamw", "torch-foreach", {}, full)) for full in (False, True)),
    *((("deepseek-v3", "adamw", "torch-foreach", {}, full)) for full in (False, True)),
    ("deepseek-v3", "galore", "galore-mem", {"rank": 512}, False),
]
CHECKPOINTED = ("llama-3.1-405b", "deepseek-v3")


def simulated(model: str, method: str, implementation: str, given: dict[str, Any], full: bool) -> dict[str, Any]:
    """A run of one of `LARGE`, in a process that does nothing else: bytes, seconds, and the process's memory at most.
    Imports of torch and transformers are not in its time."""
    from galore_mem.simulate.layers import trace_layers
    from galore_mem.simulate.subjects.models import spec_of, work_of
    from galore_mem.verify.builders import builder

    start = time.perf_counter()
    spec = spec_of(DEEPSEEK_V3, model) if model == "deepseek-v3" else resolve(model)
    setup = Setup(recipe("pure-bf16"), batch_size=BATCH, seq_len=LENGTH, gradient_checkpointing=model in CHECKPOINTED)
    work = work_of(spec, setup, method, implementation, given)
    found = trace_layers(work, builder(method, implementation), full=full)
    peaks = found.trace.peaks()
    seconds = time.perf_counter() - start
    return {
        "model": model, "method": method, "implementation": implementation, "full": full, "layers": list(found.layers),
        "phases": {phase: list(peaks[phase].live) for phase in PHASES if phase in peaks},
        "stays": list(found.measured[:3]), "parameters": spec.parameter_count, "operations": found.operations,
        "events": len(found.trace.events), "notes": list(found.notes), "seconds": seconds,
        "process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "load": os.getloadavg()[0],
    }  # fmt: skip


PHASES = ("forward", "backward", "step", "refresh")


def mem_tracker(foreach: bool) -> dict[str, Any]:
    """LLaMA-7B's training step under torch.distributed._tools.MemTracker: a step that makes the state, and one in
    steady state. Its bytes are of the highest moment of both."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.mem_tracker import MemTracker
    from transformers import AutoModelForCausalLM, LlamaConfig

    given = {key: value for key, value in resolve("llama-7b").config.items() if key != "model_type"}
    start = time.perf_counter()
    with FakeTensorMode():
        model = AutoModelForCausalLM.from_config(LlamaConfig(**given), dtype=torch.bfloat16).train()
        model.config.use_cache = False
        optimizer = torch.optim.AdamW(model.parameters(), foreach=foreach)
        tracker: Any = MemTracker()
        tracker.track_external(model, optimizer)
        with tracker:
            for _ in range(2):
                ids = torch.randint(0, 32000, (BATCH, LENGTH))
                model(input_ids=ids, labels=ids).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                tracker.reset_mod_stats()
        peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    return {
        "implementation": "torch-foreach" if foreach else "torch-loop", "bytes": int(peak),
        "seconds": time.perf_counter() - start, "load": os.getloadavg()[0],
    }  # fmt: skip
