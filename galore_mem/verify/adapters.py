"""peft's adapters around a transformers model, as its users put them there; with codes of four bits underneath."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch

from galore_mem.memory.phases import Work
from galore_mem.optim.groups import parameter_groups, rows


def targeted(model: Any, work: Work) -> dict[str, bool]:
    """Paths of the layers that get an adapter; whether each stores its matrix in x out."""
    chosen = {name for name, p in parameter_groups(model, target=work.targets)[-1]["params"] if p.dim() == 2}
    return {row.module_path: row.module == "conv1d" for row, _ in rows(model) if row.name in chosen}


def lora(model: Any, work: Work) -> Any:
    """The model with LoRA."""
    return _with(model, work, targeted(model, work))


def _with(model: Any, work: Work, layers: dict[str, bool]) -> Any:
    import peft

    config = peft.LoraConfig(
        r=work.job.rank, lora_dropout=0.0, target_modules=sorted(layers), fan_in_fan_out=all(layers.values())
    )
    # on `meta` they are made there: to initialize wide ones in host memory first takes seconds a layer
    return peft.get_peft_model(model, config, low_cpu_mem_usage=next(model.parameters()).device.type == "meta")


def qlora(model: Any, work: Work) -> Any:
    """The model in NF4, prepared and adapted as peft's guide does it."""
    peft: Any = import_module("peft")
    layers = targeted(model, work)
    device = next(model.parameters()).device
    for path, module in list(model.named_modules()):
        if not path.endswith("lm_head") and _is_linear(module):
            model.set_submodule(path, _nf4(module, work, device))
    model.is_loaded_in_4bit = True
    prepared = peft.prepare_model_for_kbit_training(
        model,
        use_gradient_checkpointing=work.setup.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    return _with(prepared, work, dict.fromkeys(layers, False))


def _is_linear(module: torch.nn.Module) -> bool:
    return type(module) is torch.nn.Linear or type(module).__name__ == "Conv1D"


def _nf4(module: Any, work: Work, device: torch.device) -> Any:
    """bitsandbytes' layer with the weights of a float one; transformers replaces layers the same way."""
    nn: Any = import_module("bitsandbytes.nn")
    weight = module.weight.detach()
    if type(module) is not torch.nn.Linear:
        weight = weight.T.contiguous()
    double = bool(work.job.number("double_quant"))
    compute = getattr(torch, (work.job.recipe.autocast or work.job.recipe.weights).name)
    with torch.device("meta"):
        layer = nn.Linear4bit(weight.shape[1], weight.shape[0], False, compute, double, "nf4")
    layer.weight = nn.Params4bit(weight, compress_statistics=double, quant_type="nf4", module=layer)
    layer.bias = module.bias
    if device.type == "meta":  # moving there does not quantize
        layer.weight = layer.weight._quantize(device)
    return layer.requires_grad_(False).to(device)
