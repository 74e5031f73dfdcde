"""Q-GaLore's ledgers: stored weights, state and step against our optimizer on INT8 weights, its linear layer against
`linears.int8`, and the package's optimizer. (With float weights ours is in `test_methods_low_rank.py`.)"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from allocations import allocations
from ledgers import job, measured, predicted
from low_rank import FORMATS, ORDERS, TALL, WIDE, Param, peak_of, plain_kernels, program_peak, run, step_peak
from ours import RANK
from side_by_side import Record, RecordingTape

from galore_mem.dtypes import BFLOAT16, FLOAT32, UINT8, dtype
from galore_mem.errors import InputError
from galore_mem.memory.linears import LINEARS, Layer
from galore_mem.memory.network import place
from galore_mem.memory.tape import Parameter, Shape
from galore_mem.methods import q_galore
from galore_mem.methods.base import Job
from galore_mem.methods.registry import method
from galore_mem.optim import Int8Linear, QGaLoreAdamW8bit
from galore_mem.optim.blockwise import Tables, adam_, begin
from galore_mem.optim.int8 import Int8Weight
from galore_mem.setup import recipe
from galore_mem.spec.model import ParamSpec, Role

GAP = 4
SIDES = ("std", "reverse_std", "full")
RECIPES = {"float32": "fp32", "bfloat16": "pure-bf16"}


def how(**told: int | float | str) -> Job:
    return job("q-galore", {"rank": RANK, **told})


# -- stored weights --------------------------------------------------------------------------------


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


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("shape", [WIDE, (688, 65), (3, 5)], ids=str)
def test_int8_weights_take_what_the_ledger_says(shape: Shape, fmt: str) -> None:
    """Codes, scales, zeros; their storages hold nothing else."""
    given = Job(how().hyperparameters, recipe(RECIPES[fmt]))
    stored = q_galore.store(ParamSpec("mlp.up_proj.weight", shape, Role.MLP, "linear"), True, given)
    weight = Int8Weight.of(torch.randn(shape).to(getattr(torch, fmt)))
    found = measured(dict(zip((s.suffix for s in stored), weight.stored, strict=True)))
    assert found == {s.suffix: (s.shape, s.dtype.name, s.dtype.nbytes(s.shape)) for s in stored}


def test_blocks_are_whole_groups() -> None:
    """About 2**22 elements: 4096 columns, 1024 rows; 688 = 16 * 43 columns need a multiple of 256 / 16 rows,
    2**22 // 688 = 6096 = 381 * 16; at 7 columns 2**22 // 7 = 599,186 rows, 2340 * 256 = 599,040 of them; few rows are
    one block; and a single aligned step may be larger: 2**20 + 1 columns, 256 rows."""
    found = [q_galore.block_rows(10**6, cols) for cols in (4096, 688, 7)]
    assert found == [1024, 6096, 599_040]
    assert q_galore.block_rows(100, 4096) == 100
    assert q_galore.block_rows(1000, 2**20 + 1) == 256


# -- the optimizer ---------------------------------------------------------------------------------


def builder(**options: Any) -> Callable[..., QGaLoreAdamW8bit]:
    """An optimizer over INT8 weights in the place of the projected parameters."""

    def build(regular: list[Any], projected: list[Any], named: list[Any]) -> QGaLoreAdamW8bit:
        coded = []
        for i, p in enumerate(named):
            if p.low_rank:
                named[i] = torch.nn.Parameter(Int8Weight.of(p.detach()))
                named[i].grad, named[i].low_rank = p.grad, True
                coded.append(named[i])
        groups: list[dict[str, Any]] = [{"params": regular}] if regular else []
        group = {"params": coded, "rank": RANK, "update_proj_gap": GAP, **options}
        return QGaLoreAdamW8bit([*groups, *([group] if coded else [])], lr=1e-3)

    return build


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("side", SIDES)
def test_state_is_the_ledger(side: str, fmt: str) -> None:
    code, told = method("q-galore").implementation("galore-mem"), how(proj_type=side)
    for params in ORDERS.values():
        optimizer, named = run(builder(proj_type=side), params, fmt, 2)
        for given, p in zip(params, named, strict=True):
            own = {k: t for k, t in optimizer.state[p].items() if isinstance(t, torch.Tensor) and k[:4] != "qmap"}
            assert measured(own) == predicted(code.state(given.trained(fmt), told)), given
            assert isinstance(p, Int8Weight) == given.projected


def test_two_projector_values_per_byte() -> None:
    """256 x 64 values: 8,192 bytes, and 64 groups with two numbers each. 63 x 5 = 315 values: 157 pairs and one."""
    params = (Param(WIDE), Param((63, 5)))
    optimizer, (wide, small) = run(builder(), params, "bfloat16", 1)
    assert [tuple(optimizer.state[p]["projector"].shape) for p in (wide, small)] == [(8_192,), (13,)]
    assert [tuple(optimizer.state[p]["projector_scales"].shape) for p in (wide, small)] == [(64, 1), (1, 1)]


@pytest.mark.parametrize("block", [2**16, 2**22], ids=["blocks", "whole"])
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("side", SIDES)
def test_step_needs_what_the_program_says(side: str, fmt: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the byte, without and with a refresh; a small block makes a weight need several."""
    monkeypatch.setattr(q_galore, "BLOCK", block)
    code, told, build = method("q-galore").implementation("galore-mem"), how(proj_type=side), builder(proj_type=side)
    for label, params in ORDERS.items():
        for refresh in (False, True):
            real = step_peak(build, params, fmt, GAP if refresh else GAP - 1)
            assert real == program_peak(code, params, fmt, told, refresh), (label, refresh)


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_step_has_no_float_copy_of_the_weight(fmt: str) -> None:
    """On an accelerator, at 4096 x 11008 and rank 128: the projector, the update (11008 x 128), and one block of
    381 rows: its values and random numbers in float32, and a byte for each. The float matrix would be 4096 rows."""
    code = method("q-galore").implementation("galore-mem")
    on_gpu = Job({**how().hyperparameters, "rank": 128}, recipe("fp32"), "cuda")
    size = {"float32": 4, "bfloat16": 2}[fmt]
    assert q_galore.block_rows(4096, 11008) == 381
    expected = size * (4096 * 128 + 11008 * 128) + 9 * 381 * 11008
    assert program_peak(code, (Param((4096, 11008)),), fmt, on_gpu, False) == expected


# -- the linear layer ------------------------------------------------------------------------------


def real_layer(fmt: str, lead: Shape, *, bias: bool, trained: bool, x_grad: bool, autocast: bool) -> Record:
    torch.manual_seed(0)
    layer = Int8Linear(80, 48, bias=bias, dtype=getattr(torch, fmt))
    layer.weight.requires_grad_(trained)
    x = torch.randn((*lead, 80)).to(layer.weight.dtype).requires_grad_(x_grad)

    def forward() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return layer(x)

    with plain_kernels():
        forwards = allocations(forward)
        out, kept = forwards.value, forwards.live
        backwards = allocations(lambda: torch.autograd.backward(out, torch.ones_like(out)))
    steps = [(n, kept + live) for n, live in backwards.steps]
    return Record(forwards.steps, kept, steps, kept + backwards.live)


def twin_layer(fmt: str, lead: Shape, *, bias: bool, trained: bool, x_grad: bool, autocast: bool) -> Record:
    tape = RecordingTape("cpu", 0)
    row = ParamSpec("mlp.up_proj.weight", (48, 80), Role.MLP, "linear")
    stored = q_galore.store(row, True, Job(how().hyperparameters, recipe(RECIPES[fmt]), "cpu"))
    tensors = [place(tape, s) for s in stored]
    tensors[0].requires_grad = trained
    given = [tape.empty(shape, dtype(fmt)) for shape in ((*lead, 80), (48,))]
    given[0].requires_grad, given[1].requires_grad = x_grad, True
    parameters = [Parameter(str(i), t) for i, t in enumerate((*tensors, *given))]
    *weights, x, b = (p.tensor() for p in parameters)
    start = tape.total
    tape.since(start)
    with tape.autocast_region(BFLOAT16) if autocast else nullcontext():
        out = LINEARS["int8"](Layer(48, dtype(fmt)), x, weights, b if bias else None)
    forward, kept = tape.since(start), tape.total - start
    tape.backward(out)
    return Record(forward, kept, tape.since(start), tape.total - start)


@pytest.mark.parametrize("lead", [(24,), (4, 6)], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize(("fmt", "autocast"), [("float32", False), ("bfloat16", False), ("float32", True)])
@pytest.mark.parametrize(("trained", "x_grad"), [(True, True), (True, False), (False, True)])
def test_layer(fmt: str, lead: Shape, bias: bool, trained: bool, x_grad: bool, autocast: bool) -> None:
    """Every allocation of both passes in order, and what is kept."""
    told = {"bias": bias, "trained": trained, "x_grad": x_grad, "autocast": autocast}
    assert real_layer(fmt, lead, **told) == twin_layer(fmt, lead, **told)


def test_the_packages_layer() -> None:
    """48 x 80 matrix, 24 rows, float32: the matrix (15,360 bytes), the product (4,608) and its sum with the bias
    (4,608). Backward: the gradient of the output, the matrix also where the input wants no gradient, that gradient
    (24 x 80: 7,680), the bias's (192) and the weight's (15,360)."""
    tape = RecordingTape("cpu", 0)
    stored = q_galore.store(ParamSpec("mlp.w", (48, 80), Role.MLP, "linear"), True, how())
    given = [place(tape, s) for s in stored] + [tape.empty(shape, FLOAT32) for shape in ((24, 80), (48,))]
    given[4].requires_grad = True
    parameters = [Parameter(str(i), t) for i, t in enumerate(given)]
    *weights, x, b = (p.tensor() for p in parameters)
    tape.since(0)
    out = LINEARS["int8-package"](Layer(48, FLOAT32), x, weights, b)
    assert [n for n, _ in tape.since(0)] == [15_360, 4_608, 4_608]
    tape.backward(out)
    assert [n for n, _ in tape.since(0)] == [4_608, 15_360, 7_680, 192, 15_360]


# -- the package -----------------------------------------------------------------------------------


def test_the_package_projects_one_way() -> None:
    code = method("q-galore").implementation("q-galore-torch")
    with pytest.raises(InputError, match="std only"):
        code.state(Param(WIDE).trained(), how(proj_type="reverse_std"))


def coded(shape: Shape, fmt: str) -> Any:
    """A parameter of codes, as the package keeps it, with its gradient beside it."""
    given = getattr(torch, fmt)
    codes, scales, zeros = Int8Weight.of(torch.randn(shape).to(given)).stored
    p: Any = torch.nn.Parameter(codes, requires_grad=False)
    p.scales, p.zeros, p.group_size, p.stochastic_round = scales, zeros, 256, True
    p.float_grad = torch.randn(shape).to(given)
    return p


def reference(params: list[Any]) -> Any:
    """The package's optimizer, its call of bitsandbytes brought up to date; a refresh every four steps."""
    package = pytest.importorskip("q_galore_torch")
    base = pytest.importorskip("bitsandbytes.optim.optimizer").Optimizer2State
    tables = Tables()

    class Current(package.QGaLoreAdamW8bit):
        def __init__(self, groups: Any) -> None:
            base.__init__(self, "adam", groups, 1e-3, (0.9, 0.999), 1e-8, 0.0, 8)

        def update_step(self, group: Any, p: Any, g: int, i: int, flag_use_float_grad: bool = False) -> None:
            assert flag_use_float_grad
            state = self.state[p]
            if "state1" not in state:
                begin(state, p, tables)
            adam_(p, p.float_grad, state, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
            state["step"] = state.get("step", 0) + 1

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
