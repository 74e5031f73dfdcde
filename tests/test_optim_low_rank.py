"""`factorize` and `LowRankLinear`. (That their weights are the ledger's: `test_optim_adapters.py`.)"""

from __future__ import annotations

import copy

import pytest
import torch
from adapted import IDS, RANK, SIZES, TARGETS, model_of
from torch import nn

from galore_mem.errors import InputError
from galore_mem.optim import LowRankLinear, factorize


@pytest.mark.parametrize("family", SIZES)
def test_a_factorized_model_computes_with_the_products(family: str) -> None:
    """The same model with B·A (GPT-2: its transpose) as its weights: two products in place of one, in float64."""
    dense = model_of(family).double()
    low = factorize(copy.deepcopy(dense), RANK, TARGETS[family])
    replaced = 0
    for path, layer in low.named_modules():
        if isinstance(layer, LowRankLinear):
            weight = dense.get_submodule(path).weight
            weight.data = layer.weight.detach() if family == "llama" else layer.weight.detach().T
            assert torch.linalg.matrix_rank(weight) == RANK
            replaced += 1
    assert replaced == {"llama": 6, "gpt2": 8}[family]
    torch.testing.assert_close(low(input_ids=IDS).logits, dense(input_ids=IDS).logits, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("std", [0.02, 1.0])
@pytest.mark.parametrize("shape", [(400, 300), (300, 400)])
def test_the_product_has_the_replaced_weights_variance(shape: tuple[int, int], std: float) -> None:
    """r·s⁴ = std². The mean square of the 120,000 entries is a mean over 16·400 and 16·300 squares of factors, each of
    relative deviation sqrt(2): their products deviate by sqrt(2/6400 + 2/4800) = 2.7 %; three times that."""
    torch.manual_seed(0)
    layer = nn.Linear(shape[1], shape[0], dtype=torch.float64)
    layer.weight.data.normal_(0, std)
    model = factorize(nn.ModuleDict({"mlp": nn.ModuleDict({"up_proj": layer})}), 16)
    made = model.get_submodule("mlp.up_proj")
    assert isinstance(made, LowRankLinear)
    assert made.bias is layer.bias
    ratio = float((made.weight.detach().square().mean() / layer.weight.detach().square().mean()).sqrt())
    assert abs(ratio - 1) < 3 * 0.027
    assert abs(float(made.weight_a.detach().std() / made.weight_b.detach().std()) - 1) < 0.05


def test_a_layer_of_zeros_can_learn() -> None:
    """B·A is zero as the weight was, and the gradient of B is not."""
    layer = nn.Linear(12, 10)
    nn.init.zeros_(layer.weight)
    model = factorize(nn.Sequential(nn.Linear(12, 12), layer), 4, ["1"])
    made = model.get_submodule("1")
    assert isinstance(made, LowRankLinear)
    assert not made.weight.any()
    made(torch.ones(1, 12)).sum().backward()
    assert made.weight_b.grad is not None
    assert made.weight_b.grad.any()


def test_a_layer_that_occurs_twice_stays_one() -> None:
    shared = nn.Linear(8, 8)
    model = factorize(
        nn.ModuleDict({"a": nn.ModuleDict({"q_proj": shared}), "b": nn.ModuleDict({"q_proj": shared})}), 2
    )
    assert model.get_submodule("a.q_proj") is model.get_submodule("b.q_proj")
    assert isinstance(model.get_submodule("a.q_proj"), LowRankLinear)


def test_ranks_and_targets_of_factorize() -> None:
    """A rank above the shorter side is clipped; what is no rank or no target is refused."""
    assert LowRankLinear(12, 10, 64).weight_b.shape == (10, 10)
    model = nn.ModuleDict({"q_proj": nn.Linear(8, 8)})
    for rank in (0, -1, True, 2.0):
        with pytest.raises(InputError, match="rank must be a whole number of at least 1"):
            factorize(model, rank)  # type: ignore[arg-type]  # ranks that are wrong on purpose
    with pytest.raises(InputError, match="target 'x_proj' names no linear layer"):
        factorize(model, 2, ["x_proj"])
    assert isinstance(model["q_proj"], nn.Linear)


def test_a_factorized_checkpoint_loads() -> None:
    first, second = factorize(model_of("llama"), RANK), factorize(model_of("llama"), RANK)
    nn.init.ones_(first.get_parameter("model.layers.0.self_attn.q_proj.weight_a"))
    second.load_state_dict(first.state_dict())
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))
