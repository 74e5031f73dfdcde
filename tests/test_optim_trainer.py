"""Our optimizers in the transformers Trainer: it trains, saves, and resumes to the bit where it would have been.

Models are tiny and random; nothing is downloaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ledgers import tensors
from ours import OURS, Ours
from small import plain, row, snapshot
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)
from transformers.utils.logging import disable_progress_bar

from galore_mem.errors import InputError
from galore_mem.optim import (
    AdamMini,
    GaLoreAdamW,
    GaLoreMini,
    LayerWise,
    QGaLoreAdamW8bit,
    for_trainer,
    parameter_groups,
    quantize_linears,
)

disable_progress_bar()
VOCABULARY, RANK = 64, 6
LLAMA = LlamaConfig(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=16,
)  # fmt: skip
GPT2 = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=16)  # with dropout
DATA = [
    {"input_ids": ids, "labels": ids}
    for ids in torch.randint(0, VOCABULARY, (40, 8), generator=torch.Generator().manual_seed(3))
]


def model_of(config: LlamaConfig | GPT2Config, fmt: str = "float32", seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    made: PreTrainedModel = LlamaForCausalLM(config) if isinstance(config, LlamaConfig) else GPT2LMHeadModel(config)
    return made.to(getattr(torch, fmt))


def pair(ours: Ours, model: PreTrainedModel, layerwise: LayerWise | None) -> Any:
    options = {"rank": RANK, **ours.every(3), **ours.options} if ours.projects else {}
    return for_trainer(model, ours.made, lr=0.01, layerwise=layerwise, **options, **ours.arguments)


def trainer(model: PreTrainedModel, chosen: Any, folder: Path, **changed: Any) -> Trainer:
    arguments = {
        "max_steps": 5, "save_steps": 2, "save_total_limit": None, "per_device_train_batch_size": 2,
        "lr_scheduler_type": "cosine", "warmup_steps": 1, "logging_strategy": "no", "report_to": [],
        "disable_tqdm": True, "use_cpu": True, **changed,
    }  # fmt: skip
    return Trainer(
        model,
        TrainingArguments(output_dir=str(folder), **arguments),
        train_dataset=DATA,
        optimizer_cls_and_kwargs=chosen,
    )


# -- resume ----------------------------------------------------------------------------------------

SETUPS: dict[str, tuple[Any, str, LayerWise | None]] = {
    "step": (LLAMA, "float32", None),
    "layer-wise": (GPT2, "bfloat16", LayerWise(2)),
}


@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.parametrize("ours", OURS, ids=str)
def test_resumed_from_a_checkpoint(ours: Ours, setup: str, tmp_path: Path) -> None:
    """Five steps of two micro-batches with warm-up and cosine, against the last three from the checkpoint between two
    refreshes (steps 0 and 3). The resumed run starts from another random model: all comes from the checkpoint."""
    config, fmt, layerwise = SETUPS[setup]
    ends = []
    for seed, checkpoint in ((0, None), (1, str(tmp_path / "checkpoint-2"))):
        model = model_of(config, fmt, seed)
        run = trainer(model, pair(ours, model, layerwise), tmp_path, gradient_accumulation_steps=2)
        run.train(resume_from_checkpoint=checkpoint)
        assert type(run.optimizer.optimizer) is ours.made
        ends.append(snapshot([*model.named_parameters()], run.optimizer.optimizer))
        assert {state["step"] for state in run.optimizer.state.values()} == {5}
    assert ends[0] == ends[1]


@pytest.mark.parametrize("layerwise", [None, LayerWise(2)], ids=["step", "layer-wise"])
def test_resumed_with_int8_weights(layerwise: LayerWise | None, tmp_path: Path) -> None:
    ends = []
    for seed, checkpoint in ((0, None), (1, str(tmp_path / "checkpoint-2"))):
        model = quantize_linears(model_of(LLAMA, "bfloat16", seed))
        chosen = for_trainer(model, QGaLoreAdamW8bit, lr=0.01, rank=RANK, update_proj_gap=3, layerwise=layerwise)
        run = trainer(model, chosen, tmp_path, gradient_accumulation_steps=2)
        run.train(resume_from_checkpoint=checkpoint)
        weights = {n: tensors({n: p.detach()}) for n, p in model.named_parameters()}
        assert len(weights["model.layers.0.self_attn.q_proj.weight"]) == 3  # codes, scales, zeros
        ends.append([plain(weights), plain(run.optimizer.optimizer.state_dict())])
    assert ends[0] == ends[1]


def test_epochs_that_do_not_divide(tmp_path: Path) -> None:
    """Five batches an epoch, three per step: the second step of each epoch has two only. Resumed in the second epoch.
    The layer-wise run ends near the normal one (float32 sums in the low-rank space are rounded otherwise)."""
    found = []
    for layerwise in (None, LayerWise(3)):
        ends = []
        folder = tmp_path / str(layerwise)
        for seed, checkpoint in ((0, None), (1, str(folder / "checkpoint-3"))):
            model = model_of(LLAMA, seed=seed)
            run = trainer(
                model, pair(row("galore"), model, layerwise), folder, gradient_accumulation_steps=3, max_steps=-1,
                num_train_epochs=2, save_steps=3, per_device_train_batch_size=8, max_grad_norm=0.0,
            )  # fmt: skip
            run.train(resume_from_checkpoint=checkpoint)
            assert run.state.global_step == 4
            ends.append(snapshot([*model.named_parameters()], run.optimizer.optimizer))
        assert ends[0] == ends[1]
        found.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


# -- what reaches the optimizer --------------------------------------------------------------------


def test_arguments_of_the_trainer_that_do_not_apply(tmp_path: Path) -> None:
    """`learning_rate` and `weight_decay` are the optimizer's, scheduled; what is projected is `target`'s."""
    model = model_of(LLAMA)
    chosen = for_trainer(model, GaLoreAdamW, target=("q_proj", "mlp"), lr=0.5, weight_decay=0.25, rank=RANK)
    run = trainer(model, chosen, tmp_path, learning_rate=9.0, weight_decay=9.0, warmup_steps=0)
    run.create_optimizer_and_scheduler(10)
    regular, low = run.optimizer.param_groups
    assert [group["lr"] for group in (regular, low)] == [0.5, 0.5]
    assert [group["weight_decay"] for group in (regular, low)] == [0.25, 0.25]
    assert [group["rank"] for group in (regular, low)] == [None, RANK]
    names = [name for name, _ in model.named_parameters()]
    assert low["param_names"] == [n for n in names if "q_proj" in n or ".mlp." in n]
    assert regular["param_names"] == [n for n in names if n not in low["param_names"]]
    groups = parameter_groups(model, target=("q_proj", "mlp"), rank=RANK)
    assert [[name for name, _ in group["params"]] for group in groups] == [
        group["param_names"] for group in (regular, low)
    ]


class Norms(Trainer):
    """Keeps what would be logged as `grad_norm`."""

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        found = super()._get_grad_norm(model, grad_norm=grad_norm)
        self.norms = [*getattr(self, "norms", ()), float(found)]
        return found


@pytest.mark.parametrize("layerwise", [None, LayerWise()], ids=["step", "layer-wise"])
def test_clipping_by_norm(layerwise: LayerWise | None, tmp_path: Path) -> None:
    """The Trainer clips what is there: all gradients, or, when they were used in the backward pass, none."""
    ends = []
    for limit in (1e-6, 0.0):
        model = model_of(LLAMA)
        run = trainer(model, pair(row("galore"), model, layerwise), tmp_path, max_steps=2, max_grad_norm=limit)
        run.__class__ = Norms
        run.train()
        assert all((norm > 0) == (layerwise is None) for norm in run.norms)  # type: ignore[attr-defined]  # a field of this run
        ends.append(snapshot([*model.named_parameters()], run.optimizer.optimizer))
    assert (ends[0] == ends[1]) == (layerwise is not None)


# -- bad use ---------------------------------------------------------------------------------------


def test_accumulation_that_the_layer_wise_update_was_not_told(tmp_path: Path) -> None:
    """Steps of half the batch would go unnoticed otherwise."""
    model = model_of(LLAMA)
    run = trainer(model, pair(row("galore"), model, LayerWise()), tmp_path, gradient_accumulation_steps=2)
    with pytest.raises(InputError, match=r"another gradient since its update.*gradient_accumulation_steps"):
        run.train()


@pytest.mark.parametrize("optimizer", [GaLoreAdamW, GaLoreMini, AdamMini])
def test_a_pair_is_good_for_one_trainer(optimizer: Any, tmp_path: Path) -> None:
    """The Trainer takes the parameters out of the pair; another would make groups of its own, without ranks or names,
    and plain AdamW of GaLore."""
    model = model_of(LLAMA)
    chosen = for_trainer(model, optimizer, lr=0.01, **({} if optimizer is AdamMini else {"rank": RANK}))
    trainer(model, chosen, tmp_path).create_optimizer()
    with pytest.raises(InputError):
        trainer(model, chosen, tmp_path).create_optimizer()


def test_a_loss_scaler_of_accelerate() -> None:
    """`fp16` wraps the optimizer so. (The Trainer refuses it on the CPU.)"""
    from accelerate.optimizer import AcceleratedOptimizer

    model = model_of(LLAMA)
    made, arguments = pair(row("galore"), model, LayerWise())
    scaler = torch.amp.GradScaler("cpu")
    wrapped = AcceleratedOptimizer(made(**arguments), device_placement=False, scaler=scaler)
    ids = DATA[0]["input_ids"][None]
    scaler.scale(model(input_ids=ids, labels=ids).loss).backward()
    with pytest.raises(InputError, match="before the loss scaler can unscale them"):
        wrapped.step()
