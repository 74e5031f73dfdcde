"""Q-GaLore: INT8 weights and INT4 projectors, against ours in plain torch and against the package's optimizer."""

from __future__ import annotations

from typing import Any

import plain_q_galore as plain
import pytest
import torch
from ledgers import job, measured, predicted
from low_rank import FORMATS, TALL, WIDE, Param, peak_of, program_peak
from plain_low_rank import RANK
from plain_q_galore import quantize

from galore_mem.dtypes import BFLOAT16, FLOAT32, UINT8
from galore_mem.memory.tape import Shape
from galore_mem.methods import q_galore
from galore_mem.methods.base import Job
from galore_mem.methods.registry import method
from galore_mem.setup import recipe
from galore_mem.spec.model import ParamSpec, Role

SHAPES = (WIDE, TALL, (512, 512), (1024, 64))


def how() -> Job:
    return job("q-galore", {"rank": RANK})


def coded(shape: Shape, fmt: str) -> Any:
    """A parameter of codes, as Q-GaLore keeps it, with its gradient beside it."""
    given = getattr(torch, fmt)
    codes, scales, zeros = quantize(torch.randn(shape).to(given), 255)
    p: Any = torch.nn.Parameter(codes, requires_grad=False)
    p.scales, p.zeros, p.group_size, p.stochastic_round = scales, zeros, 256, True
    p.float_grad = torch.randn(shape).to(given)
    return p


def test_stored_weights() -> None:
    """256 x 688 = 176,128 codes and 688 groups of 256: 176,128 + 2 * 688 * 2 bytes beside bfloat16 gradients.
    688 x 65 = 44,720 elements fill 174 groups and begin another."""
    row = ParamSpec("mlp.up_proj.weight", WIDE, Role.MLP, "linear")
    bf16 = Job(how().hyperparameters, recipe("pure-bf16"))
    stored = q_galore.store(row, True, bf16)
    assert [(s.suffix, s.shape, s.dtype, s.grad) for s in stored] == [
        ("", WIDE, UINT8, BFLOAT16),
        (".scales", (688, 1), BFLOAT16, None),
        (".zeros", (688, 1), BFLOAT16, None),
    ]
    ragged = ParamSpec("mlp.up_proj.weight", (688, 65), Role.MLP, "linear")
    assert q_galore.store(ragged, True, bf16)[1].shape == (175, 1)
    assert [s.dtype for s in q_galore.store(row, False, how())] == [FLOAT32]
    codes, scales, zeros = quantize(torch.randn(WIDE), 255)
    assert (tuple(codes.shape), tuple(scales.shape), tuple(zeros.shape)) == (WIDE, (688, 1), (688, 1))


@pytest.mark.parametrize("block", [2**16, 2**22], ids=["blocks", "whole"])
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ours(shape: Shape, fmt: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """State and peaks; a small block makes the weight need several."""
    monkeypatch.setattr(plain, "BLOCK", block)
    monkeypatch.setattr(q_galore, "BLOCK", block)
    code, given = method("q-galore").implementation("galore-mem"), Param(shape)
    state: dict[str, Any] = {}

    def start(refresh: bool) -> Any:
        torch.manual_seed(0)
        p = coded(shape, fmt)
        state.clear()
        with torch.no_grad():
            plain.q_galore(p, state, True)
        return torch.no_grad()(lambda: plain.q_galore(p, state, refresh))

    for refresh in (False, True):
        real = peak_of(lambda refresh=refresh: start(refresh))
        assert real == program_peak(code, (given,), fmt, how(), refresh), refresh
    own = {name: t for name, t in state.items() if isinstance(t, torch.Tensor) and not name.startswith("qmap")}
    expected = predicted(code.state(given.trained(fmt), how()))
    packed = expected["projector"]
    assert packed[1:] == ("int4", own["projector"].numel()), "two values per byte"
    expected["projector"] = (tuple(own["projector"].shape), "uint8", packed[2])
    assert measured(own) == expected


def reference(params: list[Any]) -> Any:
    """The package's optimizer, its call of bitsandbytes brought up to date; a refresh every four steps."""
    package = pytest.importorskip("q_galore_torch")
    functional = pytest.importorskip("bitsandbytes.functional")
    base = pytest.importorskip("bitsandbytes.optim.optimizer").Optimizer2State

    class Current(package.QGaLoreAdamW8bit):
        def __init__(self, groups: Any) -> None:
            base.__init__(self, "adam", groups, 1e-3, (0.9, 0.999), 1e-8, 0.0, 8)

        def update_step(self, group: Any, p: Any, g: int, i: int, flag_use_float_grad: bool = False) -> None:
            assert flag_use_float_grad
            plain.kernel(p, p.float_grad, self.state[p])

    assert functional is not None
    group = {
        "params": params, "rank": RANK, "update_proj_gap": 4, "scale": 0.25, "proj_type": "std", "quant": True,
        "quant_group_size": 256, "quant_n_bit": 4, "cos_threshold": 2.0, "gamma_proj": 2, "queue_size": 5,
    }  # fmt: skip
    return Current([group])


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("shapes", [(WIDE,), (TALL,), (WIDE, (64, 64), TALL)], ids=str)
def test_package(shapes: tuple[Shape, ...], fmt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    code = method("q-galore").implementation("q-galore-torch")
    params: list[Any] = []

    def start(steps: int) -> Any:
        torch.manual_seed(0)
        params[:] = [coded(shape, fmt) for shape in shapes]
        optimizer = reference(params)
        for _ in range(steps):
            optimizer.step()
            for p in params:
                p.float_grad = torch.randn(p.shape).to(getattr(torch, fmt))
        params.append(optimizer)
        return optimizer.step

    for steps in (3, 4):
        real = peak_of(lambda steps=steps: start(steps))
        given = tuple(Param(shape) for shape in shapes)
        assert real == program_peak(code, given, fmt, how(), steps == 4), steps
    optimizer = params.pop()
    for p, shape in zip(params, shapes, strict=True):
        state = optimizer.state[p]
        own = {f"projector.{k}": t for k, t in vars(state["projector"]).items() if isinstance(t, torch.Tensor)}
        own |= {k: t for k, t in state.items() if isinstance(t, torch.Tensor) and not k.startswith("qmap")}
        assert measured(own) == predicted(code.state(Param(shape).trained(fmt), how()))
