"""The LLaMA sizes that fit a card: what a run without further wishes adds where there is one. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from galore_mem.estimator import estimate
from galore_mem.methods.registry import METHODS
from galore_mem.verify.case import TRAIN, Case
from galore_mem.verify.matrix import hyperparameters

# the sizes of the GaLore paper, largest first, with the ranks of its tables 2 and 3
SIZES = (("llama-7b", 1024), ("llama-1b", 512), ("llama-350m", 256), ("llama-130m", 256), ("llama-60m", 128))
RECIPE = "pure-bf16"
OPTIONS = {"batch_size": 1, "seq_len": 512, "gradient_checkpointing": True}


def fitting(capacity: int, device: str = "cuda") -> Iterator[Case]:
    """For each method, by its first implementation, whole training steps of the largest size that the estimate says
    fits `capacity` bytes; and, where a larger one fits with a layer-wise update, of that one too."""
    for name, found in METHODS.items():
        last = None
        for layerwise in (False, True):
            if layerwise and not found.implementations[0].layerwise:
                continue
            largest = next((s for s in SIZES if fits(name, *s, capacity, layerwise=layerwise)), None)
            if largest is not None and largest != last:
                yield case(name, *largest, device, layerwise=layerwise)
            last = largest


def case(name: str, model: str, rank: int, device: str, *, layerwise: bool) -> Case:
    options = {"device": device, **OPTIONS, "layerwise": layerwise}
    code = METHODS[name].implementations[0].name
    return Case(model, name, code, TRAIN, RECIPE, options, hyperparameters(name, {"rank": rank}))


def fits(name: str, model: str, rank: int, capacity: int, *, layerwise: bool) -> bool:
    """Does the estimate of this training run say that it fits?"""
    asked = case(name, model, rank, "cuda", layerwise=layerwise)
    hyper: dict[str, Any] = {**asked.hyperparameters}
    [one] = estimate(model, [name], setup=asked.setup(), gpu=f"{capacity}B", **hyper).estimates
    return one.fits is not None and one.fits.verdict == "fits"
