"""The low-memory optimizers themselves. `import galore_mem` does not import this; it needs torch."""

from __future__ import annotations

try:
    import torch  # noqa: F401  # one clear line where it is missing
except ImportError:
    raise ImportError(
        "galore_mem.optim needs torch; install it, or galore-mem with its extra: galore-mem[verify]"
    ) from None

from galore_mem.optim.adam_mini import AdamMini
from galore_mem.optim.base import LayerWise, ParameterWise
from galore_mem.optim.flora import Flora
from galore_mem.optim.galore import GaLoreAdamW
from galore_mem.optim.galore_8bit import GaLoreAdamW8bit
from galore_mem.optim.galore_adafactor import GaLoreAdafactor
from galore_mem.optim.galore_mini import GaLoreMini
from galore_mem.optim.groups import for_trainer, parameter_groups, partition_of
from galore_mem.optim.int8_linear import Int8Linear, dequantize_linears, quantize_linears
from galore_mem.optim.low_rank import LowRankLinear, factorize
from galore_mem.optim.q_galore import QGaLoreAdamW8bit
from galore_mem.optim.relora import ReLoRA, jagged_cosine, merge_and_restart, with_adapters
from galore_mem.optim.tensor_galore import TensorGaLoreAdamW

__all__ = [
    "AdamMini",
    "Flora",
    "GaLoreAdafactor",
    "GaLoreAdamW",
    "GaLoreAdamW8bit",
    "GaLoreMini",
    "Int8Linear",
    "LayerWise",
    "LowRankLinear",
    "ParameterWise",
    "QGaLoreAdamW8bit",
    "ReLoRA",
    "TensorGaLoreAdamW",
    "dequantize_linears",
    "factorize",
    "for_trainer",
    "jagged_cosine",
    "merge_and_restart",
    "parameter_groups",
    "partition_of",
    "quantize_linears",
    "with_adapters",
]
