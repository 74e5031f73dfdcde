"""ReLoRA: LoRA whose factors are merged into the weights, and started again, every few thousand steps.

Lialin, Shivagunde, Muckatira, Rumshisky: ReLoRA: High-Rank Training Through Low-Rank Updates, arXiv:2307.05695.
At a restart
1. W = W + s·B·A for every adapted matrix;
2. A starts again as it was drawn at first (Kaiming uniform, peft's default), B as zero: the model's function stays;
3. the optimizer forgets both factors' moments;
4. the learning rate falls to about zero and is warmed up again, along a cosine (`jagged_cosine`).

The adapters are peft's. What is not adapted (embeddings, norms, biases, head) is trained in full.

Choices. The paper prunes 99 % of the moments, the smallest; its code, by default, sets nearly all to zero. Here the
factors' states are dropped, and the optimizer makes them anew as for a new parameter, step counter included: right for
any torch optimizer, also one whose fresh state is not zero. A and B are cast to the weight's format and multiplied
straight into it (`addmm_`): there is no product of the weight's size, and what the cast of the factors loses is below
the rounding of the sum. New factors are drawn from a seed and the restart's number: a resumed run, and every process of
a distributed one, has the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from galore_mem.errors import InputError
from galore_mem.optim.groups import parameter_groups, rows
from galore_mem.optim.options import COUNT, FRACTION, Range

WHOLE = Range(whole=True)


def with_adapters(
    model: nn.Module, rank: int, target: Sequence[str] | None = None, *, alpha: int = 32, dropout: float = 0.0
) -> Any:
    """The model with a peft adapter beside every targeted linear layer, ready for ReLoRA: the adapters and all that has
    none are trained, the weights beneath adapters are not.

    `target` as in `parameter_groups`: None for attention and MLP. `alpha`: B·A is multiplied by alpha/rank. Raises
    `InputError` for a rank below 1 and as `parameter_groups` does.
    """
    peft = _peft()
    COUNT.check("rank", rank)
    Range(above=True).check("alpha", alpha)
    FRACTION.check("dropout", dropout)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    chosen = {name for name, p in parameter_groups(model, target=target)[-1]["params"] if p.dim() == 2}
    transposed = [row.module == "conv1d" for row, _ in rows(model) if row.name in chosen]
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=sorted(name.removesuffix(".weight") for name in chosen),
        fan_in_fan_out=all(transposed),
    )
    others = [p for name, p in model.named_parameters() if name in trained - chosen]
    made = peft.get_peft_model(model, config)
    for p in others:
        p.requires_grad_(True)
    return made


def pairs(model: nn.Module) -> Iterator[tuple[Tensor, nn.Parameter, nn.Parameter, float]]:
    """Of each adapter: the weight as out x in (a view), A (r x in), B (out x r), and s, by which B·A is multiplied.

    Raises `InputError` for adapters that are not a plain product beside a floating-point matrix.
    """
    LoraLayer = _peft("peft.tuners.lora").LoraLayer  # noqa: N806  # a class

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            layer: Any = module
            weight: Any = getattr(layer.get_base_layer(), "weight", None)
            if not _mergeable(layer, weight):
                raise InputError(
                    f"{name or 'the model'}: ReLoRA merges plain LoRA adapters (no DoRA, no bias, not merged) into "
                    f"floating-point matrices, and this is a {type(layer).__name__} over {_described(weight)}"
                )
            matrix = weight.detach().T if layer.fan_in_fan_out else weight.detach()
            for adapter in layer.active_adapters:
                if adapter in layer.lora_A:
                    yield matrix, layer.lora_A[adapter].weight, layer.lora_B[adapter].weight, layer.scaling[adapter]


def adapters(model: nn.Module) -> list[tuple[Tensor, nn.Parameter, nn.Parameter, float]]:
    """All `pairs` of a model. Raises `InputError` as they do, and where there are none."""
    found = list(pairs(model))
    if not found:
        raise InputError("the model has no LoRA adapters to merge; make them with galore_mem.optim.with_adapters")
    return found


def _peft(module: str = "peft") -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise InputError(f"ReLoRA needs peft ({error}); install it, or galore-mem[verify]") from error


def _mergeable(layer: Any, weight: Any) -> bool:
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or layer.merged or layer.lora_variant:
        return False
    whole = sorted(weight.shape) == sorted((layer.in_features, layer.out_features))  # else it is packed
    return whole and hasattr(layer, "fan_in_fan_out") and not any(layer.lora_bias.values())


def _described(weight: Any) -> str:
    return f"{weight.dtype} {tuple(weight.shape)}" if isinstance(weight, Tensor) else "no weight"


@torch.no_grad()
def merge_and_restart(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int | None = None) -> None:
    """Merges every adapter into its weight, one matrix at a time, and starts it again.

    All that this needs besides is both factors in the weight's format, where theirs is another. `seed` starts the new
    factors' random numbers (None: torch's own). Raises `InputError` as `pairs` does, before anything has changed, and
    where the model has no adapters.
    """
    found = adapters(model)
    generators: dict[torch.device, torch.Generator | None] = {}
    for weight, a, b, scaling in found:
        if a.device not in generators:
            generators[a.device] = None if seed is None else torch.Generator(a.device).manual_seed(seed)
        weight.addmm_(b.to(weight.dtype), a.to(weight.dtype), alpha=scaling)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generators[a.device])
        nn.init.zeros_(b)
        for factor in (a, b):
            optimizer.state.pop(factor, None)


class ReLoRA:
    """Merges and restarts the adapters of a peft model every `update_proj_gap` steps.

    Call `step()` after each `optimizer.step()`. Its own state, the number of steps, is in `state_dict()`; save it with
    the optimizer's and `torch.save(model.state_dict())`. (peft's `save_pretrained` writes adapters only: the weights
    that they were merged into, embeddings, norms and head would be lost. After `merge_and_unload()` all is saved.)
    `seed` starts the new factors' random numbers.

        model = with_adapters(model, rank=128)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        schedule = LambdaLR(optimizer, jagged_cosine(20_000, update_proj_gap=5_000))
        relora = ReLoRA(model, optimizer, update_proj_gap=5_000)
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, update_proj_gap: int = 1000, seed: int = 0
    ) -> None:
        COUNT.check("update_proj_gap", update_proj_gap)
        WHOLE.check("seed", seed)
        adapters(model)
        self.model, self.optimizer = model, optimizer
        self.update_proj_gap, self.seed = update_proj_gap, seed
        self.steps = 0

    def step(self) -> bool:
        """Counts a step of the optimizer; True where it was followed by a merge."""
        self.steps += 1
        if self.steps % self.update_proj_gap:
            return False
        merge_and_restart(self.model, self.optimizer, self.seed * 1_000_003 + self.steps // self.update_proj_gap)
        return True

    def state_dict(self) -> dict[str, int]:
        return {"steps": self.steps, "update_proj_gap": self.update_proj_gap, "seed": self.seed}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continues where the saved run was. Raises `InputError` where this is no such state."""
        try:
            steps, gap, seed = (state[name] for name in ("steps", "update_proj_gap", "seed"))
        except KeyError as error:
            raise InputError(f"the state of ReLoRA has no {error.args[0]!r}; it has {', '.join(state)}") from None
        WHOLE.check("steps", steps)
        COUNT.check("update_proj_gap", gap)
        WHOLE.check("seed", seed)
        self.steps, self.update_proj_gap, self.seed = steps, gap, seed


def jagged_cosine(
    total_steps: int,
    update_proj_gap: int,
    *,
    warmup_steps: int = 500,
    restart_warmup_steps: int = 100,
    least: float = 0.1,
) -> Callable[[int], float]:
    """For `torch.optim.lr_scheduler.LambdaLR`: the factor of the learning rate in a step, counted from 0.

    A linear warm-up over `warmup_steps`, then a cosine from 1 down to `least` at `total_steps`. After every restart
    (the multiples of `update_proj_gap`) it begins near zero and is back on the cosine `restart_warmup_steps` later. No
    step has a factor of 0. Raises `InputError` for numbers out of range.
    """
    COUNT.check("total_steps", total_steps)
    COUNT.check("update_proj_gap", update_proj_gap)
    Range(0, whole=True, below=total_steps).check("warmup_steps", warmup_steps)
    Range(0, whole=True, below=update_proj_gap + 1).check("restart_warmup_steps", restart_warmup_steps)
    Range(0.0, 1.0).check("least", least)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = min(1.0, (step - warmup_steps) / (total_steps - warmup_steps))
        cosine = least + (1 - least) * 0.5 * (1 + math.cos(math.pi * progress))
        restart, since = divmod(step, update_proj_gap)
        return cosine * min(1.0, (since + 1) / restart_warmup_steps) if restart and restart_warmup_steps else cosine

    return factor
