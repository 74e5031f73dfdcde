"""One training run: a small LLaMA from random weights, one method, one learning rate, one seed."""

from __future__ import annotations

import datetime
import math
import platform
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from train_corpus import Corpus, standard_library
from train_methods import METHODS, LowRankSettings
from transformers import LlamaConfig, LlamaForCausalLM

PACKAGES = ("galore-mem", "torch", "transformers", "peft", "bitsandbytes")


@dataclass(frozen=True)
class Settings:
    """Everything the runs of one record share."""

    hidden_size: int = 128
    intermediate_size: int = 344
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 4
    seq_len: int = 128
    batch_size: int = 8
    steps: int = 300
    warmup: int = 30
    final_lr: float = 0.1  # of the highest, as in GaLore's schedule
    validation_windows: int = 512
    low_rank: LowRankSettings = field(default_factory=LowRankSettings)

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            architectures=["LlamaForCausalLM"],
            vocab_size=256,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            max_position_embeddings=self.seq_len,
            initializer_range=self.hidden_size**-0.5,  # keeps variance; 0.02 does at a hidden size of 2500
            tie_word_embeddings=False,
            use_cache=False,
        )

    def lr_factor(self, step: int) -> float:
        """Linear warm-up, then a cosine down to `final_lr`; `step` counts from 0."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.final_lr + (1 - self.final_lr) * (1 + math.cos(math.pi * done)) / 2


class Run(NamedTuple):
    """What is trained; the name of a line in the record."""

    method: str
    lr: float
    seed: int

    def __str__(self) -> str:
        return f"{self.method}, lr {self.lr:g}, seed {self.seed}"


@cache
def corpus() -> Corpus:
    return standard_library()


def train(run: Run, settings: Settings) -> dict[str, Any]:
    """The line of the record: losses of every step, final validation loss, bytes (of the optimizer's state at its
    fullest: ReLoRA drops some), time and versions. A run whose loss or gradient is no longer finite ends there, and
    `diverged` says at which step."""
    torch.set_num_threads(1)
    torch.manual_seed(run.seed)
    start = time.perf_counter()
    method = METHODS[run.method]
    model = LlamaForCausalLM(settings.config())
    trainee = method.build(model, run.lr, settings.low_rank)
    for group in trainee.optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    losses: list[float] = []
    diverged, state_bytes = None, 0
    trainee.model.train()
    for step, batch in enumerate(corpus().batches(run.seed, settings.steps, settings.batch_size, settings.seq_len)):
        for group in trainee.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * settings.lr_factor(step) * trainee.factor(step)
        loss = next_byte_loss(trainee.model, batch)
        loss.backward()
        if not finite(loss, trainee.model):
            diverged = step
            break
        losses.append(round(loss.item(), 3))
        trainee.optimizer.step()
        state_bytes = max(state_bytes, storage_bytes(tensors_in(trainee.optimizer.state.values())))
        trainee.optimizer.zero_grad()
        trainee.after(step + 1)
    return {
        **run._asdict(),
        "settings": asdict(settings),
        "corpus": corpus().described(),
        "train_loss": losses,
        "validation_loss": None if diverged is not None else validation_loss(trainee.model, settings),
        "diverged": diverged,
        "state_bytes": state_bytes,
        "weight_bytes": storage_bytes(trainee.model.state_dict().values()),
        "trainable": sum(p.numel() for group in trainee.optimizer.param_groups for p in group["params"]),
        "seconds": round(time.perf_counter() - start, 1),
        "versions": {"python": platform.python_version(), **dict(installed())},
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def finite(loss: Tensor, model: nn.Module) -> bool:
    """Are the loss and all gradients finite?"""
    return all(t.isfinite().all() for t in (loss, *(p.grad for p in model.parameters() if p.grad is not None)))


def next_byte_loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Mean cross entropy, nats per byte."""
    logits = model(input_ids=batch[:, :-1]).logits
    return cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def validation_loss(model: nn.Module, settings: Settings) -> float | None:
    """Nats per byte on windows of the held-out files; None where it is not finite."""
    model.eval()
    parts = corpus().held_out(settings.validation_windows, settings.seq_len).split(32)
    loss = sum(next_byte_loss(model, part).item() * len(part) for part in parts) / settings.validation_windows
    return round(loss, 5) if math.isfinite(loss) else None


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """All tensors in nested containers."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            yield from tensors_in(value.values())
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes that the tensors keep alive: each storage once, whole."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def installed() -> Iterator[tuple[str, str]]:
    for name in PACKAGES:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            continue
