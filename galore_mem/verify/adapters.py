"""peft's adapters around a transformers model, as its users put them there; with codes of four bits underneath.

`from_pretrained` with a BitsAndBytesConfig makes the model on `meta`, then reads a matrix, quantizes it and lets it go
before the next (transformers, core_model_loading.py: without threads where it quantizes): the model never lies there
whole. So does `qlora`, where the model was made inside of `without_matrices`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import _disable_current_modes

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


@contextmanager
def without_matrices() -> Iterator[None]:
    """A model made inside has linear layers whose matrices are nowhere yet: `qlora` makes them, one at a time."""
    with ExitStack() as stack:
        for kind in _linear_layers():
            stack.enter_context(patch.object(kind, "__init__", _later(kind.__init__)))
        yield


def _later(original: Callable[..., None]) -> Callable[..., None]:
    """How a linear layer is made but for its matrix, which is on `meta` whatever the device, and in no trace."""

    def init(layer: Any, *args: Any, **kwargs: Any) -> None:
        with _disable_current_modes(), torch.device("meta"):
            original(layer, *args, **kwargs)
        layer.weight._is_hf_initialized = True  # transformers leaves it alone (initialization.py)
        layer.weight.nowhere = True
        if layer.bias is not None:
            layer.bias = torch.nn.Parameter(torch.zeros(layer.bias.shape, dtype=layer.bias.dtype))

    return init


def _made(weight: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A matrix with random values; one that is there already is itself."""
    if not hasattr(weight, "nowhere"):
        return weight.detach()
    return torch.empty(weight.shape, dtype=weight.dtype, device=device).normal_(std=0.02)


def qlora(model: Any, work: Work) -> Any:
    """The model in NF4, prepared and adapted as peft's guide does it."""
    peft: Any = import_module("peft")
    layers = targeted(model, work)
    device = model.get_input_embeddings().weight.device
    output = model.get_output_embeddings()  # transformers keeps it (quantizers/base.py, get_keys_to_not_convert)
    for path, module in list(model.named_modules()):
        if not _is_linear(module):
            continue
        if module is output:
            if hasattr(module.weight, "nowhere"):  # it shares no embedding's
                module.weight = torch.nn.Parameter(_made(module.weight, device))
        else:
            model.set_submodule(path, _nf4(module, work, device))
    model.is_loaded_in_4bit = True
    prepared = peft.prepare_model_for_kbit_training(
        model,
        use_gradient_checkpointing=work.setup.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    return _with(prepared, work, dict.fromkeys(layers, False))


def _linear_layers() -> tuple[type[torch.nn.Module], ...]:
    return torch.nn.Linear, import_module("transformers.pytorch_utils").Conv1D


def _is_linear(module: torch.nn.Module) -> bool:
    return type(module) in _linear_layers()


def _nf4(module: Any, work: Work, device: torch.device) -> Any:
    """bitsandbytes' layer with the weights of a float one; transformers replaces layers the same way."""
    nn: Any = import_module("bitsandbytes.nn")
    weight = _made(module.weight, device)
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
