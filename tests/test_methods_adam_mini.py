"""Adam-mini's partitions, ours and the packages', and LOMO: methods that go by a parameter's name or by hooks."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from allocations import allocations
from ledgers import (
    SCALAR,
    Named,
    job,
    measured,
    measured_temporaries,
    predicted,
    predicted_temporaries,
    real_parameters,
    tensors,
    trained,
)

from galore_mem.errors import InputError
from galore_mem.methods.base import Implementation
from galore_mem.methods.registry import METHODS, method
from galore_mem.spec.model import Heads

FORMATS = ("float32", "bfloat16")
# head_dim = hidden_size / num_attention_heads, the geometry that both packages take for granted
HEADS = Heads(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
LAYER = "model.layers.0."
LLAMA = (
    ("model.embed_tokens.weight", (1000, 64)),
    (LAYER + "self_attn.q_proj.weight", (64, 64)),
    (LAYER + "self_attn.q_proj.bias", (64,)),
    (LAYER + "self_attn.k_proj.weight", (32, 64)),
    (LAYER + "self_attn.v_proj.weight", (32, 64)),
    (LAYER + "self_attn.o_proj.weight", (64, 64)),
    (LAYER + "mlp.gate_proj.weight", (172, 64)),
    (LAYER + "mlp.down_proj.weight", (64, 172)),
    (LAYER + "input_layernorm.weight", (64,)),
    ("lm_head.weight", (1000, 64)),
)
# GPT-2's fused attention: no rule of adam-mini 1.1.1 knows it, so it has one value for the whole matrix
GPT2 = (("transformer.h.0.attn.c_attn.weight", (64, 192)), ("transformer.h.0.mlp.c_fc.weight", (64, 256)))


def implementation(name: str) -> Implementation:
    return method("adam-mini").implementation(name)


def official(named: Named) -> torch.optim.Optimizer:
    package = pytest.importorskip("adam_mini")
    made: torch.optim.Optimizer = package.Adam_mini(named, dim=64, n_heads=4, n_kv_heads=2, verbose=False)
    return made


def older(named: Named) -> torch.optim.Optimizer:
    package = pytest.importorskip("pytorch_optimizer")
    model = SimpleNamespace(named_parameters=lambda: iter(named))
    made: torch.optim.Optimizer = package.AdamMini(model, lr=1e-3, num_embeds=64, num_heads=4, num_query_groups=2)
    return made


PACKAGES = {"adam-mini": official, "pytorch-optimizer": older}


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("package", PACKAGES)
def test_state_of_packages_is_the_ledger(package: str, fmt: str) -> None:
    rows = LLAMA + GPT2
    named = real_parameters(rows, fmt)
    optimizer = PACKAGES[package](named)
    optimizer.step()
    for (name, p), (_, shape) in zip(named, rows, strict=True):
        ledger = implementation(package).state(trained(shape, name, fmt), job("adam-mini", heads=HEADS))
        assert measured(tensors(optimizer.state[p])) == predicted(ledger), name


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("order", [1, -1], ids=["model", "reversed"])
@pytest.mark.parametrize("package", PACKAGES)
def test_step_of_packages_needs_what_the_program_says(package: str, order: int, fmt: str) -> None:
    rows = (LLAMA + GPT2)[::order]
    named = real_parameters(rows, fmt)
    parameters = [trained(shape, name, fmt) for name, shape in rows]
    program = predicted_temporaries(implementation(package), parameters, job("adam-mini", heads=HEADS))
    assert measured_temporaries(PACKAGES[package](named), named) == program


N = 256 * 688


@pytest.mark.parametrize("shape", [(256, 688), (688, 256)], ids=["wide", "tall"])
def test_step_needs_what_is_derived(shape: tuple[int, int]) -> None:
    rows = shape[0]

    def program(name: str, fmt: str, device: str, count: int = 1) -> int:
        matrices = [trained(shape, f"layers.{i}.mlp.up_proj.weight", fmt) for i in range(count)]
        return predicted_temporaries(implementation(name), matrices, job("adam-mini", device=device, heads=HEADS))

    # update and -update; tmp_lr, h and stepsize, one value per row each
    assert program("adam-mini", "float32", "cpu") == 2 * N * 4 + 3 * rows * 4
    assert program("adam-mini", "bfloat16", "cuda") == 2 * N * 2 + 3 * rows * 2
    # grad * grad, its float32 copy, the sums in float32 and the means in bfloat16
    assert program("adam-mini", "bfloat16", "cpu") == N * 2 + N * 4 + rows * 4 + rows * 2
    # ours: per row a float32 value and a flag (no gradient so far), or the value again in bfloat16; nothing of m·n
    assert program("galore-mem", "float32", "cpu") == rows * 4 + rows
    assert program("galore-mem", "bfloat16", "cuda", count=2) == rows * 4 + rows * 2
    # pytorch_optimizer: gradient in float32; the update; the parameter read and written in float32
    assert program("pytorch-optimizer", "bfloat16", "cpu") == 4 * N * 4
    # on CUDA all MLP matrices together: a float32 gradient and an update of each
    assert program("pytorch-optimizer", "bfloat16", "cuda", count=3) == 3 * 2 * N * 4


def test_our_partition() -> None:
    """Query and key by head, biases in full, norms one value, every other matrix by row."""
    how = job("adam-mini", heads=HEADS)
    partition = {
        name.removeprefix(LAYER): predicted(implementation("galore-mem").state(trained(shape, name), how))
        for name, shape in LLAMA
    }
    assert {name: kept["exp_avg_sq"][0] for name, kept in partition.items()} == {
        "model.embed_tokens.weight": (1000, 1),
        "self_attn.q_proj.weight": (4, 1),  # 64 rows in heads of 16
        "self_attn.q_proj.bias": (64, 1),
        "self_attn.k_proj.weight": (2, 1),  # grouped: 32 rows in heads of 16
        "self_attn.v_proj.weight": (32, 1),
        "self_attn.o_proj.weight": (64, 1),
        "mlp.gate_proj.weight": (172, 1),
        "mlp.down_proj.weight": (64, 1),
        "input_layernorm.weight": (1, 1),
        "lm_head.weight": (1000, 1),
    }


def test_heads_wider_than_their_share() -> None:
    """Four heads of 32 rows in a model of 64: ours finds 4 blocks, adam-mini 1.1.1 blocks of 64 * 64 / 4 elements,
    of which 128 * 64 has 8."""
    wide = job("adam-mini", heads=Heads(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=32))
    query = trained((128, 64), LAYER + "self_attn.q_proj.weight")
    assert predicted(implementation("galore-mem").state(query, wide))["exp_avg_sq"][0] == (4, 1)
    assert predicted(implementation("adam-mini").state(query, wide))["vmean"][0] == (8, 1)


@pytest.mark.parametrize(
    ("name", "shape", "why"),
    [
        # Gemma-2 2B: 2048 * 2304 elements are 7.1 times 2304^2 / 8
        (LAYER + "self_attn.q_proj.weight", (2048, 2304), "cannot view"),
        # names of a matrix on a vector: torch.mean(..., dim=1) has no dimension 1
        ("bert.encoder.layer.0.attention.output.LayerNorm.weight", (768,), "takes .* for a matrix"),
        ("model.decoder.layers.0.final_layer_norm.weight", (512,), "takes .* for a matrix"),
    ],
)
def test_what_adam_mini_cannot_run(name: str, shape: tuple[int, ...], why: str) -> None:
    gemma = job("adam-mini", heads=Heads(2304, 8, 4, 256))
    with pytest.raises(InputError, match=why):
        implementation("adam-mini").state(trained(shape, name), gemma)
    implementation("galore-mem").state(trained(shape, name), gemma)  # ours can


@pytest.mark.parametrize("name", ["galore-mem", "adam-mini", "pytorch-optimizer"])
def test_heads_are_never_guessed(name: str) -> None:
    with pytest.raises(InputError, match="by head"):
        implementation(name).state(trained((64, 64), LAYER + "self_attn.q_proj.weight"), job("adam-mini"))


@pytest.mark.parametrize(("fmt", "per_element"), [("float32", 0), ("bfloat16", 4 - 2 + 4)])
def test_lomo(fmt: str, per_element: int) -> None:
    """In bfloat16 a float32 gradient takes the gradient's place, then the weight is copied to float32."""
    package = pytest.importorskip("lomo_optim")
    ledger = method("lomo").implementation("lomo-optim")
    matrix = trained((256, 688), fmt=fmt)
    assert METHODS["lomo"].always_layerwise
    assert ledger.state(matrix, job("lomo")) == ()
    assert predicted_temporaries(ledger, [matrix], job("lomo")) == per_element * N

    model = torch.nn.Linear(688, 256, bias=False, dtype=getattr(torch, fmt))
    optimizer = package.Lomo(model)

    def backward_and_update() -> None:
        model.weight.grad = torch.zeros_like(model.weight)  # here, so that the release is seen with its size
        optimizer.grad_func(0)

    assert allocations(backward_and_update, ignore=SCALAR).peak == matrix.nbytes + per_element * N
