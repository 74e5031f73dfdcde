"""Full-rank methods: their ledgers against real optimizers, buffer by buffer, and their step programs against
the CPU allocator. The optimizers that a test needs and does not find are skipped by name."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from ledgers import (
    Case,
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

from galore_mem.methods.registry import METHODS, method

Shape = tuple[int, ...]

WIDE, TALL = (256, 688), (688, 256)
# square; vectors below and above 4096 elements; sizes that no block divides; a side smaller than any rank
SHAPES: tuple[Shape, ...] = (WIDE, TALL, (64, 64), (512,), (1000, 3), (5,), (63, 65), (4096,), (5461,))
FORMATS = ("float32", "bfloat16")


def case(
    method: str, implementation: str, path: str, *, told: dict[str, float] | None = None, **arguments: object
) -> Case:
    """The optimizer class at `path`, built with `arguments`, beside a ledger that is told `told`."""
    module, _, name = path.rpartition(".")

    def build(named: Named) -> torch.optim.Optimizer:
        pytest.importorskip(module.partition(".")[0])
        made: torch.optim.Optimizer = getattr(import_module(module), name)([p for _, p in named], **arguments)
        return made

    return Case(method, implementation, build, tuple((told or {}).items()))


TRAINER = {"lr": 1e-3, "relative_step": False, "scale_parameter": False}  # what the Trainer's "adafactor" passes
TOLD = {"weight_decay": 0.1, "nesterov": 1}
NESTEROV = {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True}
CASES = (
    case("adamw", "torch-foreach", "torch.optim.AdamW", foreach=True),
    case("adamw", "torch-fused", "torch.optim.AdamW", fused=True),
    case("adamw", "torch-loop", "torch.optim.AdamW", foreach=False),
    case("sgd", "torch-foreach", "torch.optim.SGD", momentum=0.9, foreach=True),
    case("sgd", "torch-fused", "torch.optim.SGD", momentum=0.9, fused=True),
    case("sgd", "torch-loop", "torch.optim.SGD", momentum=0.9),
    case("sgd", "torch-loop", "torch.optim.SGD", told={"momentum": 0.0}),
    case("sgd", "torch-loop", "torch.optim.SGD", told={"momentum": 0.0, "weight_decay": 0.1}, weight_decay=0.1),
    case("sgd", "torch-loop", "torch.optim.SGD", told={"weight_decay": 0.1}, momentum=0.9, weight_decay=0.1),
    case("sgd", "torch-loop", "torch.optim.SGD", told=TOLD, **NESTEROV),
    case("sgd", "torch-foreach", "torch.optim.SGD", told=TOLD, **NESTEROV, foreach=True),
    case("adamw-8bit", "bitsandbytes", "bitsandbytes.optim.AdamW8bit"),
    case("adafactor", "transformers", "transformers.optimization.Adafactor", **TRAINER),
    case("adafactor", "transformers", "transformers.optimization.Adafactor", told={"beta1": 0.9}, beta1=0.9, **TRAINER),
    case("adafactor", "torch-loop", "torch.optim.Adafactor"),
    case("adafactor", "torch-foreach", "torch.optim.Adafactor", foreach=True),
    case("came", "came-pytorch", "came_pytorch.CAME", lr=1e-3),
    case("came", "pytorch-optimizer", "pytorch_optimizer.CAME"),
)  # fmt: skip
COMPILED = (
    case("adamw-8bit", "torchao", "torchao.optim.AdamW8bit"),
    case("adamw-4bit", "torchao", "torchao.optim.AdamW4bit"),
    case("adamw-fp8", "torchao", "torchao.optim.AdamWFp8"),
)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("given", CASES, ids=str)
def test_state_is_the_ledger(given: Case, fmt: str) -> None:
    check_state(given, fmt)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("given", COMPILED, ids=str)
def test_state_of_compiled_optimizers_is_the_ledger(given: Case, fmt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchao compiles its step; state does not depend on that, and compiling would take minutes."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    check_state(given, fmt)


def check_state(given: Case, fmt: str) -> None:
    named = real_parameters([(f"p{i}", shape) for i, shape in enumerate(SHAPES)], fmt)
    optimizer = given.build(named)
    for _ in range(2):  # transformers' Adafactor and CAME replace a Python 0 by a tensor in the first step
        optimizer.step()
    how = given.job()
    shared = predicted(given.ledger.shared(how))
    shared_storages: dict[str, set[int]] = {name: set() for name in shared}
    for (name, p), shape in zip(named, SHAPES, strict=True):
        kept = tensors(optimizer.state[p])
        if "param_groups.0.lr" in shared:
            kept["param_groups.0.lr"] = optimizer.param_groups[0]["lr"]
        own = {key: t for key, t in kept.items() if key not in shared}
        assert measured(own) == predicted(given.ledger.state(trained(shape, name, fmt), how)), shape
        for key in shared.keys() & kept.keys():
            shared_storages[key].add(kept[key].untyped_storage().data_ptr())
            assert measured({key: kept[key]})[key] == shared[key]
        private = [t.untyped_storage().data_ptr() for t in own.values()]
        assert len(set(private)) == len(private), "two buffers of one storage would be counted twice"
    assert all(len(storages) == 1 for storages in shared_storages.values())


ONEDNN = "oneDNN's bfloat16 matrix product takes scratch space that depends on the processor"


def derivable(given: Case, fmt: str) -> bool:
    """Can the CPU's temporaries be derived? (`row_var @ col_var` of torch's Adafactor, see ONEDNN.)"""
    return not (given.method == "adafactor" and given.implementation.startswith("torch") and fmt == "bfloat16")


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("given", CASES, ids=str)
@pytest.mark.parametrize("order", [(WIDE,), (TALL,), SHAPES, SHAPES[::-1]], ids=["wide", "tall", "all", "reversed"])
def test_step_needs_what_the_program_says(given: Case, fmt: str, order: tuple[Shape, ...]) -> None:
    """To the byte, scalars apart; with several parameters, names that outlive an iteration count too."""
    if not derivable(given, fmt):
        pytest.skip(ONEDNN)
    named = real_parameters([(f"p{i}", shape) for i, shape in enumerate(order)], fmt)
    parameters = [trained(shape, name, fmt) for (name, _), shape in zip(named, order, strict=True)]
    program = predicted_temporaries(given.ledger, parameters, given.job())
    assert measured_temporaries(given.build(named), named) == program


N = 256 * 688
FACTORS = (256 + 688) * 4  # a float32 value per row and per column
# one matrix of N elements, on the CPU: (method, implementation, what it is told, format) -> bytes
DERIVED = {
    ("adamw", "torch-foreach", "float32"): N * 4,  # sqrt of every exp_avg_sq
    ("adamw", "torch-foreach", "bfloat16"): N * 2,
    ("adamw", "torch-loop", "float32"): 2 * N * 4,  # exp_avg_sq.sqrt(), and its quotient
    ("adamw", "torch-loop", "bfloat16"): 2 * N * 2,
    ("adamw", "torch-fused", "float32"): 0,
    ("sgd", "torch-foreach", "float32"): 0,
    ("sgd", "torch-loop", "bfloat16"): 0,
    ("sgd", "torch-fused", "float32"): 0,
    # both states dequantized, gradient * 1.0, sqrt(state2) and its quotient
    ("adamw-8bit", "bitsandbytes", "float32"): 5 * N * 4,
    # and the parameter in float32
    ("adamw-8bit", "bitsandbytes", "bfloat16"): 6 * N * 4,
    # the old update, the new one, and its two factors
    ("adafactor", "transformers", "float32"): 2 * N * 4 + FACTORS,
    # and gradient and parameter in float32
    ("adafactor", "transformers", "bfloat16"): 4 * N * 4 + FACTORS,
    ("adafactor", "torch-loop", "float32"): N * 4 + FACTORS,  # row_var @ col_var; row_mean and col_mean
    ("adafactor", "torch-foreach", "float32"): N * 4,  # the means are gone by then
    # update, instability, the new update and its two factors
    ("came", "came-pytorch", "float32"): 3 * N * 4 + FACTORS,
    # gradient in float32, update, instability, -update; the parameter read and written in float32
    ("came", "came-pytorch", "bfloat16"): 6 * N * 4,
    # update, instability; one parameter's two factors
    ("came", "pytorch-optimizer", "float32"): 2 * N * 4 + FACTORS,
}


@pytest.mark.parametrize("shape", [WIDE, TALL], ids=["wide", "tall"])
@pytest.mark.parametrize(("key", "nbytes"), DERIVED.items(), ids=["-".join(key) for key in DERIVED])
def test_step_needs_what_is_derived(key: tuple[str, str, str], nbytes: int, shape: Shape) -> None:
    name, implementation, fmt = key
    program = predicted_temporaries(method(name).implementation(implementation), [trained(shape, fmt=fmt)], job(name))
    assert program == nbytes


def test_step_on_cuda_casts_without_copies() -> None:
    """CAME in bfloat16: no float32 copies of the parameter, so the factored update is the highest moment
    (gradient copy, update, instability, new update, factors); bitsandbytes' kernels allocate nothing."""
    matrix = [trained(WIDE, fmt="bfloat16")]
    came = method("came").implementation("came-pytorch")
    assert predicted_temporaries(came, matrix, job("came", device="cuda")) == 4 * N * 4 + FACTORS
    eight_bit = method("adamw-8bit").implementation("bitsandbytes")
    assert predicted_temporaries(eight_bit, matrix, job("adamw-8bit", device="cuda")) == 0


def test_what_lives_on_the_host() -> None:
    """torch's step counter beside CUDA parameters unless fused; paged states from 100,000 elements on."""

    def on_host(name: str, implementation: str, shape: Shape, device: str) -> set[str]:
        ledger = method(name).implementation(implementation)
        return {b.name for b in ledger.state(trained(shape), job(name, device=device)) if b.host}

    assert on_host("adamw", "torch-foreach", WIDE, "cuda") == {"step"}
    assert on_host("adamw", "torch-foreach", WIDE, "cpu") == set()
    assert on_host("adafactor", "torch-loop", WIDE, "cuda") == {"step"}
    assert on_host("adamw-4bit", "torchao", WIDE, "cuda") == {"step"}
    assert on_host("adamw-8bit", "bitsandbytes-paged", (1000, 100), "cuda") == {"state1", "state2"}
    assert on_host("adamw-8bit", "bitsandbytes-paged", (1000, 99), "cuda") == set()
    assert on_host("adamw-8bit", "bitsandbytes-paged", (1000, 100), "cpu") == set()


H = 4096
# GaLore-mini, section 3.2: a layer is four h x h and two h x 4h matrices, 12 h^2 parameters, here in bfloat16
LAYER = (*[(H, H)] * 4, (H, 4 * H), (4 * H, H))
PAPER_BYTES = {
    "adamw": 2 * 24 * H**2,  # two moments: 2 (4 h^2 + 8 h^2) values of 2 bytes
    "sgd": 2 * 12 * H**2,  # one velocity
    "adamw-8bit": 24 * H**2,  # two moments of 1 byte
    "adamw-4bit": 12 * H**2,  # of half a byte
    "adamw-fp8": 24 * H**2,
    "adafactor": 4 * (4 * 2 * H + 2 * 5 * H),  # m + n of each matrix, in float32
    "came": 4 * (12 * H**2 + 2 * (4 * 2 * H + 2 * 5 * H)),  # mn + 2 (m + n), in float32
    "adam-mini": 2 * 12 * H**2,  # the second moment is neglected
    "lomo": 0,
}


@pytest.mark.parametrize(("name", "nbytes"), PAPER_BYTES.items(), ids=PAPER_BYTES)
def test_paper_ledgers(name: str, nbytes: int) -> None:
    paper = METHODS[name].paper
    buffers = [b for shape in LAYER for b in paper.state(trained(shape, fmt="bfloat16"), job(name))]
    assert sum(b.nbytes for b in buffers) == nbytes
