"""Our optimizers beside the packages of the papers' authors, where those do what their papers say.

Neither package is needed to use or to test this project; without them these tests are skipped.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from literal import AdamMini as LiteralMini
from literal_follow import gradients, same, start
from torch import Tensor

from galore_mem.optim import AdamMini, GaLoreAdamW
from galore_mem.partition import partition
from galore_mem.spec.model import Heads

STEPS = 25
BETAS = (0.8, 0.95)


def both(
    one: Any,
    other: Any,
    pairs: list[tuple[torch.nn.Parameter, torch.nn.Parameter]],
    compare: Callable[[torch.nn.Parameter, torch.nn.Parameter, str], None],
    before: Callable[[int], None] = lambda t: None,
) -> None:
    """Steps two optimizers with the same gradients. `before` is called with the step's number (from 0)."""
    streams = [gradients(p.shape, STEPS, seed=i, dtype=p.dtype) for i, (p, _) in enumerate(pairs)]
    for t in range(STEPS):
        before(t)
        for (p, q), stream in zip(pairs, streams, strict=True):
            grad = next(stream)
            p.grad, q.grad = grad.clone(), grad.clone()
        one.step()
        other.step()
        for p, q in pairs:
            compare(p, q, f"step {t}, {tuple(p.shape)}")


# -- galore-torch ------------------------------------------------------------------------------------

# float32 on both sides: 25 steps of products over 12 terms, rounded at 6e-8 in another order
FLOAT32 = {"rtol": 1e-5, "atol": 5e-6}
# large against float32's rounding: at a refresh Pᵀ·G·Q is diagonal, and what Adam makes of the rest, which is rounding,
# is decided by ε
EPS = 1e-3
# `reverse_std` of galore-torch 1.0 projects back by the shape of the low-rank gradient, and fails where that is square
SHAPES = {(12, 8): 4, (8, 12): 4, (9, 9): 3, (5, 12): 4}


@pytest.fixture(scope="module")
def galore_torch() -> Any:
    return pytest.importorskip(
        "galore_torch", reason="compares with galore-torch 1.0, which is not installed", exc_type=ImportError
    )


@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right", "full"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_galore_follows_galore_torch(galore_torch: Any, shape: tuple[int, int], proj_type: str) -> None:
    """Refreshes at 0, 6, 12, 18, 24. galore-torch adds ε to the root before its bias correction, the paper and ours
    after it: sqrt(c)/(sqrt(V) + ε) = 1/(sqrt(V/c) + ε/sqrt(c)) with c = 1 - β2^t, so ours is given ε/sqrt(c).
    Without weight decay: the package's comes after the update, ours before it."""
    p, q = start(shape, dtype=torch.float32), start(shape, dtype=torch.float32)
    v, w = start((5,), 7, dtype=torch.float32), start((5,), 7, dtype=torch.float32)
    low = {"rank": SHAPES[shape], "update_proj_gap": 6, "scale": 0.25, "proj_type": proj_type}
    settings = {"lr": 0.05, "betas": BETAS, "eps": EPS, "weight_decay": 0.0}
    ours = GaLoreAdamW([{"params": [p], **low}, {"params": [v]}], **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # it is derived from a deprecated class
        theirs = galore_torch.GaLoreAdamW([{"params": [q], **low}, {"params": [w]}], **settings)

    def compare(a: torch.nn.Parameter, b: torch.nn.Parameter, what: str) -> None:
        same(a, b.detach().double(), what, **FLOAT32)
        for name in ("exp_avg", "exp_avg_sq"):
            same(ours.state[a][name], theirs.state[b][name].double(), f"{what}: {name}", **FLOAT32)
        assert ours.state[a]["step"] == theirs.state[b]["step"]

    def before(t: int) -> None:
        for group in ours.param_groups:
            group["eps"] = EPS / math.sqrt(1 - BETAS[1] ** (t + 1))

    both(ours, theirs, [(p, q), (v, w)], compare, before)
    kept = theirs.state[q]["projector"].ortho_matrix
    names = ["projector"] if isinstance(kept, Tensor) else ["projector_left", "projector_right"]
    for name, matrix in zip(names, [kept] if isinstance(kept, Tensor) else kept, strict=True):
        same(ours.state[p][name], matrix.double(), name, **FLOAT32)


# -- adam-mini ---------------------------------------------------------------------------------------


def llama(heads: Heads, dim: int) -> dict[str, tuple[int, ...]]:
    """One layer under the names of transformers' LLaMA."""
    q, kv = heads.num_attention_heads * heads.head_dim, heads.num_key_value_heads * heads.head_dim
    layer = {
        "input_layernorm.weight": (dim,),
        "self_attn.q_proj.weight": (q, dim),
        "self_attn.k_proj.weight": (kv, dim),
        "self_attn.v_proj.weight": (kv, dim),
        "self_attn.o_proj.weight": (dim, q),
        "self_attn.q_proj.bias": (q,),
        "post_attention_layernorm.weight": (dim,),
        "mlp.gate_proj.weight": (20, dim),
        "mlp.up_proj.weight": (20, dim),
        "mlp.down_proj.weight": (dim, 20),
    }
    return {
        "model.embed_tokens.weight": (30, dim),
        **{f"model.layers.0.{name}": shape for name, shape in layer.items()},
        "model.norm.weight": (dim,),
        "lm_head.weight": (30, dim),
    }


@pytest.fixture(scope="module")
def adam_mini() -> Any:
    return pytest.importorskip(
        "adam_mini", reason="compares with adam-mini 1.1.1, which is not installed", exc_type=ImportError
    )


def packages(adam_mini: Any, heads: Heads, dim: int, **settings: Any) -> tuple[Any, Any, dict[str, Any]]:
    named = {name: (start(shape, i), start(shape, i)) for i, (name, shape) in enumerate(llama(heads, dim).items())}
    ours = AdamMini(
        [(name, p) for name, (p, _) in named.items()],
        partition={name: partition(name, tuple(p.shape), heads) for name, (p, _) in named.items()},
        **settings,
    )
    theirs = adam_mini.Adam_mini(
        [(name, q) for name, (_, q) in named.items()],
        dim=dim, n_heads=heads.num_attention_heads, n_kv_heads=heads.num_key_value_heads, verbose=False, **settings,
    )  # fmt: skip
    return ours, theirs, named


# one formula in two orders, float64, 25 steps
SAME_FORMULA = {"rtol": 1e-11, "atol": 1e-12}


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_adam_mini_follows_the_package(adam_mini: Any, kv_heads: int) -> None:
    """Where head_dim is hidden_size / heads, which the package takes for granted. Without weight decay, which it leaves
    out for names with `norm`, `ln` or `bias` in them; ours leaves that to the groups, as torch does."""
    heads = Heads(16, 4, kv_heads, 4)
    ours, theirs, named = packages(adam_mini, heads, 16, lr=0.02, betas=BETAS, eps=1e-3, weight_decay=0.0)

    def compare(a: torch.nn.Parameter, b: torch.nn.Parameter, what: str) -> None:
        same(a, b.detach(), what, **SAME_FORMULA)
        mine, other = ours.state[a], theirs.state[b]
        same(mine["exp_avg"].flatten(), other["m"].flatten(), f"{what}: m", **SAME_FORMULA)
        second = other["vmean"] if "vmean" in other else other["v"]
        same(mine["exp_avg_sq"].flatten(), second.flatten(), f"{what}: v", **SAME_FORMULA)

    both(ours, theirs, list(named.values()), compare)


def test_where_the_package_takes_something_else_for_a_head(adam_mini: Any) -> None:
    """head_dim 8 where hidden_size / heads is 4: the package's blocks are half heads, ours are heads."""
    heads = Heads(16, 4, 4, 8)
    ours, theirs, named = packages(adam_mini, heads, 16, lr=0.02, betas=BETAS, eps=1e-3, weight_decay=0.0)
    name = "model.layers.0.self_attn.q_proj.weight"
    p, q = named[name]
    halves = LiteralMini(q, [[4 * h + k for k in range(4)] for h in range(8)], lr=0.02, betas=BETAS, eps=1e-3)
    for grad in gradients(p.shape, 3):
        for a, b in named.values():
            a.grad, b.grad = torch.zeros_like(a), torch.zeros_like(b)
        p.grad, q.grad = grad.clone(), grad.clone()
        ours.step()
        theirs.step()
        halves.step(grad)
    assert ours.state[p]["exp_avg_sq"].numel() == 4
    same(q, halves.weight, "the package", **SAME_FORMULA)
    assert float((p - q).detach().abs().max()) > 1e-3
