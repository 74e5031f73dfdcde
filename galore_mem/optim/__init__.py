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
from galore_mem.optim.galore import GaLoreAdamW
from galore_mem.optim.galore_mini import GaLoreMini
from galore_mem.optim.groups import for_trainer, parameter_groups, partition_of

__all__ = [
    "AdamMini",
    "GaLoreAdamW",
    "GaLoreMini",
    "LayerWise",
    "ParameterWise",
    "for_trainer",
    "parameter_groups",
    "partition_of",
]
