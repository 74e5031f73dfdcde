"""Linear layers with INT8 weights: what they compute, and how they are made, saved, moved and copied."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from galore_mem.errors import InputError
from galore_mem.optim import (
    GaLoreAdamW,
    Int8Linear,
    QGaLoreAdamW8bit,
    dequantize_linears,
    parameter_groups,
    partition_of,
    quantize_linears,
)
from galore_mem.optim.int8 import Int8Weight
from galore_mem.optim.int8_linear import Int8Conv1D

FORMATS = [torch.float32, torch.bfloat16]
VOCABULARY = 64
GPT2 = GPT2Config(
    vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=4, n_positions=16, resid_pdrop=0.0, embd_pdrop=0.0,
    attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
)  # fmt: skip
IDS = torch.randint(0, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(3))


class Small(nn.Module):
    """Two linear layers that are targets, with and without bias, and a head that is not."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.mlp = nn.Sequential(nn.Linear(30, 41), nn.GELU(), nn.Linear(41, 24, bias=False))
        self.head = nn.Linear(24, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mlp(x))


def small(dtype: torch.dtype = torch.float32, seed: int = 0) -> Small:
    model = Small(seed).to(dtype)
    quantize_linears(model)
    return model


def state_bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(t, b[name]) for name, t in a.items())


# -- what it computes ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_both_passes_are_those_of_the_float_layers(dtype: torch.dtype) -> None:
    """To the bit: outputs, and all gradients, which have the float format."""
    model = small(dtype)
    floats = dequantize_linears(copy.deepcopy(model))
    assert [type(m) for m in (model.mlp[0], model.head, floats.mlp[0])] == [Int8Linear, nn.Linear, nn.Linear]
    results = []
    for each in (model, floats):
        x = torch.randn(3, 5, 30, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        y = each(x)
        y.square().sum().backward()
        results.append([y, x.grad, *(p.grad for p in each.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert all(type(p.grad) is Tensor and p.grad.dtype is dtype for p in model.parameters())


def test_conv1d() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2)
    partition = partition_of(model)
    quantize_linears(model)
    assert type(model.transformer.h[0].attn.c_attn) is Int8Conv1D
    assert partition_of(model) == partition
    floats = dequantize_linears(copy.deepcopy(model))
    assert type(floats.transformer.h[0].attn.c_attn) is Conv1D
    for each in (model, floats):
        each(input_ids=IDS, labels=IDS).loss.backward()
    for p, q in zip(model.parameters(), floats.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_autocast() -> None:
    """Within a region the output is bfloat16, gradients float32; the same but for the rounding of scales to bfloat16
    (2^-9 of a weight, of which 30 or 41 are summed), and of the float layers' weights."""
    model = small()
    floats = dequantize_linears(copy.deepcopy(model))
    x = torch.randn(5, 30)
    outs = []
    for each in (model, floats):
        with torch.autocast("cpu", torch.bfloat16):
            outs.append(each(x))
        outs[-1].float().square().sum().backward()
    assert outs[0].dtype is torch.bfloat16
    torch.testing.assert_close(outs[0], outs[1], rtol=0.05, atol=0.02)
    for p, q in zip(model.parameters(), floats.parameters(), strict=True):
        assert p.grad.dtype is torch.float32
        torch.testing.assert_close(p.grad, q.grad, rtol=0.1, atol=0.05 * float(q.grad.abs().max()))


def test_checkpointing() -> None:
    """A layer whose forward pass is repeated in the backward pass, also of the reentrant kind."""
    grads = []
    for reentrant in (None, False, True):
        model, x = small(), torch.ones(2, 30, requires_grad=True)
        inner = model.mlp(x) if reentrant is None else checkpoint(model.mlp, x, use_reentrant=reentrant)
        model.head(inner).sum().backward()
        grads.append(model.mlp[0].weight.grad)
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2])


@pytest.mark.parametrize("by_copy", [True, False], ids=["copy", "step"])
def test_a_changed_weight_is_noticed(by_copy: bool) -> None:
    """As with any layer: a weight that changes between the passes makes the backward pass an error."""
    model = small()
    y = model(torch.ones(2, 30, requires_grad=True))
    if by_copy:
        with torch.no_grad():
            model.mlp[0].weight.copy_(torch.zeros(41, 30))
    else:
        model.mlp[0].weight.grad = torch.ones(41, 30)
        QGaLoreAdamW8bit(parameter_groups(model, rank=4), lr=0.1).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_gradients_are_ordinary() -> None:
    """Accumulated, clipped, zeroed, seen by hooks."""
    model, x = small(), torch.randn(4, 30)
    weight = model.mlp[0].weight
    seen: list[float] = []
    handle = weight.register_post_accumulate_grad_hook(lambda p: seen.append(float(p.grad.sum())))
    model(x).sum().backward()
    once = weight.grad.clone()
    model(x).sum().backward()
    assert torch.equal(weight.grad, 2 * once)
    assert len(seen) == 2
    handle.remove()
    norm = nn.utils.clip_grad_norm_([weight], 0.5)
    assert float(norm) == pytest.approx(2 * float(once.norm()))
    assert float(weight.grad.norm()) == pytest.approx(0.5)
    model.zero_grad(set_to_none=False)
    assert not weight.grad.any()
    model.zero_grad()
    assert weight.grad is None


# -- moving, copying, saving -----------------------------------------------------------------------


def test_conversions_keep_the_parameter_and_its_hooks() -> None:
    """As `.to` does with any parameter: same object, same place in `parameters()`, gradient converted."""
    layer = small().mlp[0]
    weight, names = layer.weight, [name for name, _ in layer.named_parameters()]
    seen: list[Any] = []
    weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.dtype))
    layer(torch.ones(1, 30)).sum().backward()
    for dtype in (torch.bfloat16, torch.float32, torch.float32):
        layer.to(dtype)
        assert layer.weight is weight
        assert isinstance(weight, nn.Parameter)
        assert {weight.dtype, weight.scales.dtype, weight.grad.dtype, weight.data.dtype} == {dtype}
        layer(torch.ones(1, 30, dtype=dtype)).sum().backward()
    assert seen == [torch.float32, torch.bfloat16, torch.float32, torch.float32]
    assert [name for name, _ in layer.named_parameters()] == names
    assert layer.share_memory().weight.codes.is_shared()
    layer.to("meta")
    assert layer.weight.codes.is_meta
    with pytest.raises(InputError, match="loses INT8 weights"):
        layer.to_empty(device="cpu")


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_their_own(how: str) -> None:
    model = small()
    if how == "deepcopy":
        again = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        again = torch.load(file, weights_only=False)
    assert same(state_bits(model), state_bits(again))
    assert isinstance(again.mlp[0].weight, Int8Weight)
    assert isinstance(again.mlp[0].weight, nn.Parameter)
    again.mlp[0].weight.codes.zero_()
    assert model.mlp[0].weight.codes.any()


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_a_state_dict_is_plain(dtype: torch.dtype, tmp_path: Path) -> None:
    """Codes, scales and zeros (41 · 30 = 1230 values: 5 groups), which are the model's own tensors; through a file of
    torch's with `weights_only`, through safetensors, and assigned."""
    model = small(dtype)
    state = model.state_dict()
    assert list(state)[:4] == ["mlp.0.weight", "mlp.0.bias", "mlp.0.weight_scales", "mlp.0.weight_zeros"]
    assert all(type(t) is Tensor for t in state.values())
    found = [(state[f"mlp.0.weight{end}"].dtype, tuple(state[f"mlp.0.weight{end}"].shape)) for end in ("", "_scales")]
    assert found == [(torch.uint8, (41, 30)), (dtype, (5, 1))]
    assert state["mlp.0.weight"].data_ptr() == model.mlp[0].weight.codes.data_ptr()
    torch.save(state, tmp_path / "model.pt")
    save_model(model, str(tmp_path / "model.safetensors"))
    loaded = torch.load(tmp_path / "model.pt", weights_only=True)
    for assign in (False, True):
        again = small(dtype, 1)
        again.load_state_dict(loaded, assign=assign)
        assert same(state_bits(again), state)
        assert again.mlp[0].weight.requires_grad
    again = small(dtype, 1)
    assert load_model(again, str(tmp_path / "model.safetensors")) == (set(), [])
    assert same(state_bits(again), state)


def test_a_float_state_dict_loads() -> None:
    """Rounded to the nearest codes: the model that is quantized after loading."""
    model = small(seed=1)
    model.load_state_dict(Small().state_dict())
    assert same(state_bits(model), state_bits(small()))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"mlp.0.weight_scales": None}, 'Missing key.*"mlp.0.weight_scales"'),
        ({"mlp.0.weight_zeros": torch.zeros(4, 1)}, r"mlp\.0\.weight: zeros must be \(5, 1\)"),
        ({"mlp.0.weight": torch.zeros(41, 30, dtype=torch.int8)}, r"mlp\.0\.weight: codes must be .* uint8"),
        ({"mlp.0.weight": torch.zeros(30, 41, dtype=torch.uint8)}, "size mismatch for mlp.0.weight"),
        ({"mlp.0.weight_more": torch.zeros(1)}, 'Unexpected key.*"mlp.0.weight_more"'),
    ],
)
def test_a_state_that_does_not_fit(changed: dict[str, Tensor | None], message: str) -> None:
    model = small()
    before = state_bits(model)
    state = {name: t for name, t in {**small(seed=1).state_dict(), **changed}.items() if t is not None}
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(state)
    if "mlp.0.weight_more" not in changed:
        assert torch.equal(model.mlp[0].weight.codes, before["mlp.0.weight"])


# -- which layers ----------------------------------------------------------------------------------


def test_layers_stay_where_they_are() -> None:
    """The same objects, with hooks and flags; a second call finds nothing to do; groups are as before."""
    model = Small()
    layer = model.mlp[0]
    called: list[int] = []
    layer.register_forward_hook(lambda *_: called.append(1))
    names = [[name for name, _ in group["params"]] for group in parameter_groups(model, rank=4)]
    assert quantize_linears(model) is model
    weight = layer.weight
    quantize_linears(model)
    assert model.mlp[0] is layer
    assert layer.weight is weight
    model(torch.ones(1, 30))
    assert called == [1]
    assert [[name for name, _ in group["params"]] for group in parameter_groups(model, rank=4)] == names
    made = quantize_linears(Small(), target=["head"])
    assert [type(m) for m in (made.mlp[0], made.head)] == [nn.Linear, Int8Linear]
    direct = Int8Linear(30, 41, bias=False, dtype=torch.bfloat16)
    assert (direct.weight.dtype, direct.bias) == (torch.bfloat16, None)


class Other(nn.Linear):
    """A layer with a forward pass of its own."""


def test_layers_that_cannot_be_int8() -> None:
    """Nothing has changed after an error."""
    shared = Small()
    shared.extra = nn.Linear(30, 41)
    shared.extra.weight = shared.mlp[0].weight
    own = Small()
    own.mlp[2] = Other(41, 24)
    for model, told, message in (
        (shared, {}, r"mlp\.0\.weight is shared by two modules"),
        (own, {}, r"mlp\.2\.weight is in a Other"),
        (Small(), {"target": ["attn"]}, "target 'attn' names no linear layer"),
    ):
        with pytest.raises(InputError, match=message):
            quantize_linears(model, **told)
        assert not any(isinstance(p, Int8Weight) for p in model.parameters())
    for given in (torch.zeros(3), torch.zeros(2, 2, 2), torch.zeros(0, 3), torch.zeros(2, 2, dtype=torch.int32)):
        with pytest.raises(InputError, match="stand for float matrices"):
            Int8Weight.of(given)


def test_only_q_galore_writes_them() -> None:
    model = small()
    model(torch.ones(1, 30)).sum().backward()
    low = parameter_groups(model, rank=4)
    with pytest.raises(InputError, match=r"mlp\.0\.weight is an INT8 weight in a group without rank"):
        QGaLoreAdamW8bit([{"params": low[1]["params"]}])
    before = state_bits(model)
    with pytest.raises(InputError, match=r"mlp\.0\.weight is an INT8 weight; only QGaLoreAdamW8bit"):
        GaLoreAdamW(low[1:])
    with pytest.raises(InputError, match="writes to an INT8 weight; only QGaLoreAdamW8bit"):
        torch.optim.AdamW([p for _, p in low[1]["params"]]).step()
    with pytest.raises(InputError, match="writes to an INT8 weight"):
        nn.init.normal_(model.mlp[0].weight)
    assert same(state_bits(model), before)
