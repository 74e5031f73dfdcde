"""`simulate` with a training step of the user's own: `module:function`."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from typer.testing import CliRunner

from galore_mem.cli import app
from galore_mem.errors import InputError
from galore_mem.memory.tensor import ACTIVATIONS
from galore_mem.report.schema import schema
from galore_mem.setup import Setup, recipe
from galore_mem.simulate import simulate
from galore_mem.simulate.explain import POINTS

OWN = """
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(256, 1024, bias=False), nn.Linear(1024, 256, bias=False)

        def forward(self, x, y):
            return ((self.down(torch.relu(self.up(x))) - y) ** 2).mean()

    def net(**more):
        model = Net(**more)
        batch = lambda: {"x": torch.randn(8, 256), "y": torch.randn(8, 256)}
        return model, torch.optim.AdamW(model.parameters()), batch

    def scheduled():
        model, optimizer, batch = net()
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
        return model, optimizer, torch.utils.data.DataLoader([batch()] * 3, batch_size=None)

    def chatty():
        print("not data")
        return net()

    def asks_for_values():
        model, optimizer, batch = net()
        forward = model.forward
        model.forward = lambda x, y: forward(x[torch.nonzero(x[:, 0])[:, 0]], y)
        return model, optimizer, batch

    def fails():
        raise ValueError("first line\\nsecond line")

    def fails_in_step():
        model, optimizer, _ = net()
        return model, optimizer, {"x": torch.randn(8, 3), "y": torch.randn(8, 256)}

    def mixes():
        net()[0].cuda()(torch.randn(8, 256), torch.randn(8, 256))

    def does_nothing(): pass

    def names_no_device():
        model, optimizer, batch = net()
        model(**batch()).backward()

    def closes_over():
        model, optimizer, _ = net()
        wanted = torch.randn(8, 256)
        return model, optimizer, (torch.randn(8, 256), wanted), lambda loss, batch: (loss + wanted).mean()

    async def awaits(): return net()

    def needs_a_closure():
        model, _, batch = net()
        return model, torch.optim.LBFGS(model.parameters()), batch

    def is_sparse():
        model = nn.Embedding(10, 4, sparse=True)
        return model, torch.optim.SparseAdam(model.parameters()), torch.arange(3), lambda output, batch: output.sum()

    def names_no_phase(): return lambda phase: phase(3)

    def whole():
        model, optimizer, batch = net()
        model.cuda()
        for _ in range(2):
            model(**{name: t.cuda() for name, t in batch().items()}).backward()
            optimizer.step()
            optimizer.zero_grad()

    def named():
        def program(phase):
            phase("all of it")
            whole()
        return program

    def ends(): raise SystemExit(3)
    def returns_two(): return net()[:2]
    def wants_more(size): return net()
    number = 3
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory with modules, from which the user runs the command."""
    for name, text in (
        ("own_step", OWN), ("own_broken", "def f(:\n"), ("own_needs", "import no_such_package\n"),
        ("own_raises", "1 / 0\n"),
    ):  # fmt: skip
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in [n for n in sys.modules if n.startswith("own_")]:
        del sys.modules[name]


def test_a_step_of_ones_own(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """2 x 256 x 1024 parameters in float32, gradients of that size, and AdamW's two moments. What the function prints
    does not reach stdout, which is for data."""
    result = simulate("own_step:chatty", gpu="24GiB")
    [made] = result.estimates
    assert (made.method, made.implementation) == ("AdamW", "torch")
    size = 2 * 256 * 1024 * 4
    assert (made.weights_bytes, made.gradients_bytes, made.optimizer_state_bytes) == (size, size, 2 * size)
    assert [p.name for p in made.phases] == ["load", "first-step", "forward", "backward", "step"]
    assert made.phases[0].allocated_bytes == size
    assert (result.model["parameters"], result.setup["batch_size"], result.setup["recipe"]) == (size // 4, None, None)
    jsonschema.validate(result.to_json(), schema("simulate"))
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "not data\n")
    assert str(here) not in sys.path


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("own_step:fails", "own_step:fails failed: ValueError: first line (own_step.py, line 34)"),
        ("own_step:fails_in_step", "own_step:fails_in_step failed in its training step: RuntimeError: "),
        ("own_step:asks_for_values", "the program asks for values, by aten.nonzero"),
        ("own_step:mixes", "finds tensors on the card and in host memory, as it would with a real one: aten."),
        ("./own_step.py:net", "own_step.py is a file; name its module's function: --model own_step:net, run from"),
        ("own_step:does_nothing", "it puts nothing on the device: there is nothing to simulate"),
        ("own_step:awaits", "it is an async function, which nobody awaits"),
        (
            "own_step:needs_a_closure",
            "LBFGS.step takes closure, which the training loop does not give; return a program",
        ),
        ("own_step:is_sparse", "sparse gradients are not followed"),
        ("own_step:names_no_phase", "phase is called with a name, as phase('forward'); it was given 3"),
        ("own_step.py", "own_step.py is a file; name its module's function: --model own_step:function"),
        ("own_step:ends", "it ended the program: SystemExit: 3"),
        (
            "own_step:returns_two",
            "must return a torch.nn.Module, a torch.optim.Optimizer (or None: forward only) and a batch",
        ),
        ("own_step:wants_more", "missing 1 required positional argument: 'size'"),
        ("own_step:number", "is no function that returns (model, optimizer, batch), but of the type int"),
        ("own_step:nett", "unknown function of own_step 'nett'; did you mean net, Net?"),
        ("own_step.py:net", "names a file; write own_step:net"),
        ("no_such_module:f", "there is no module 'no_such_module' in "),
        ("own_step.inner:f", "there is no module 'own_step.inner' in "),
        ("own_broken:f", "importing own_broken failed: SyntaxError: "),
        ("own_needs:f", "importing own_needs failed: ModuleNotFoundError: No module named 'no_such_package'"),
        ("own_raises:f", "importing own_raises failed: ZeroDivisionError: division by zero (own_raises.py, line 1)"),
    ],
)
def test_what_can_go_wrong_with_it(reference: str, expected: str, here: Path) -> None:
    with pytest.raises(InputError) as raised:
        simulate(reference)
    assert expected in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"methods": ["adamw"]}, "brings its own optimizer"),
        ({"rank": 8}, "brings its own optimizer"),
        ({"setup": Setup(batch_size=2)}, "leave out --batch-size"),
        ({"setup": Setup(recipe("fp32"))}, "decides its model's format"),
        ({"full": False}, "leave out --extrapolate"),
        ({"warm_up": 1001}, "warm-up must be between 0 and 1000, got 1001"),
    ],
)
def test_options_that_it_decides_itself(given: dict[str, Any], expected: str, here: Path) -> None:
    with pytest.raises(InputError, match=expected):
        simulate("own_step:net", **given)


def test_autocast_and_no_steps_before(here: Path) -> None:
    """In an autocast region the second layer's weight is cast, and the cast is kept for backward: 256 x 1024 in
    bfloat16. (The first layer's input needs no gradient.)"""
    plain, cast = (
        simulate("own_step:net", setup=Setup(recipe(name)), warm_up=0).estimates[0]
        for name in ("pure-bf16", "amp-bf16")
    )
    assert [p.name for p in plain.phases] == ["load", "forward", "backward", "step"]
    kept = [p.phases[1].components[ACTIVATIONS] for p in (plain, cast)]
    assert kept[0] < 256 * 1024 * 2 <= kept[1]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"warm_up": 2}, "leave out --warm-up"),
        ({"setup": Setup(recipe("amp-bf16"))}, "leave out --recipe"),
        ({"setup": Setup(keep_gradients=True)}, "leave out --keep-gradients"),
        ({"setup": Setup(gradient_accumulation=2)}, "leave out --gradient-accumulation"),
    ],
)
@pytest.mark.parametrize("name", ["whole", "named"])
def test_options_that_a_program_decides(name: str, given: dict[str, Any], expected: str, here: Path) -> None:
    with pytest.raises(InputError, match=f"runs its own loop; {expected}"):
        simulate(f"own_step:{name}", **given)


def test_a_program_and_the_step_that_it_takes(here: Path) -> None:
    """The same two steps as a program and as what a function returns: the same tensors at the peak. Named by its calls,
    a program has the parts of its steps, here of the second too: with states, which the first makes."""
    step, whole, named = (simulate(f"own_step:{name}").estimates[0] for name in ("net", "whole", "named"))
    assert [p.name for p in whole.phases] == ["load", "forward", "backward", "step"]
    assert [p.name for p in named.phases] == ["load", "program", "all of it"]
    assert {p.name: p.allocated_bytes for p in whole.phases if p.name == "step"} == {
        "step": max(p.allocated_bytes for p in step.phases)
    }
    assert named.peak_allocated_bytes == whole.peak_allocated_bytes == step.peak_allocated_bytes
    residents = [(s.weights_bytes, s.gradients_bytes, s.optimizer_state_bytes) for s in (step, whole, named)]
    assert residents[0] == residents[1] == residents[2]
    assert (whole.method, whole.implementation) == ("AdamW", "torch")


def test_a_scheduler_and_a_loader_change_nothing(here: Path) -> None:
    [plain], [made] = (simulate(f"own_step:{name}").estimates for name in ("net", "scheduled"))
    assert [p.allocated_bytes for p in made.phases] == [p.allocated_bytes for p in plain.phases]


def test_a_picture_has_all_its_points(here: Path) -> None:
    """`--points` are those of the answer; a picture beside it is not drawn with fewer than its own."""
    words = ["simulate", "--model", "own_step:net", "--format", "json", "--points", "2", "--timeline", "run.html"]
    done = CliRunner().invoke(app, [*words, "--output", "run.json"], standalone_mode=False)
    assert done.exception is None
    [made] = json.loads((here / "run.json").read_text())["estimates"]
    assert len(made["timeline"]["at"]) == made["events"] < POINTS


def test_what_is_not_what_runs_is_said(here: Path) -> None:
    (here / "own_said.py").write_text(
        "import torch\n"
        "from own_step import Net, net\n"
        "def compiled():\n"
        "    model, optimizer, batch = net()\n"
        "    return torch.compile(model), optimizer, batch\n"
        "def recurrent():\n"
        "    torch.nn.LSTM(8, 8).cuda()(torch.randn(2, 3, 8, device='cuda'))[0].sum().backward()\n"
    )
    [plain], [made] = (simulate(name).estimates for name in ("own_step:net", "own_said:compiled"))
    said = "torch.compile: what it compiles is simulated as eager, operation by operation"
    assert said in made.assumptions
    assert said not in plain.assumptions
    assert made.peak_allocated_bytes == plain.peak_allocated_bytes
    [made] = simulate("own_said:recurrent").estimates
    assert any(one.startswith("cuDNN's LSTM: ") for one in made.not_counted)
    [made] = simulate("own_step:net", setup=Setup(device="cpu")).estimates
    assert "the CPU's kernels with one thread, oneDNN off" in made.assumptions


@pytest.mark.parametrize("name", ["names_no_device", "closes_over"])
def test_a_program_that_names_no_device(name: str, here: Path) -> None:
    """As if there were two, nothing would be on the card, or what a loss needs would not be: it is all on the card, and
    is said to be."""
    [made] = simulate(f"own_step:{name}").estimates
    assert made.weights_bytes == made.gradients_bytes == 2 * 256 * 1024 * 4
    assert "it names no device, so what it makes is taken to be on the card" in made.assumptions
    [plain] = simulate("own_step:net").estimates
    assert not any("names no device" in one for one in plain.assumptions)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_module_that_asks_for_a_card_as_it_is_imported(device: str, here: Path) -> None:
    """Its tensors are where it then puts them; who asks later in this process is told what is."""
    (here / f"own_asks_{device}.py").write_text(
        "import torch\n"
        "device = 'cuda' if torch.cuda.is_available() else 'cpu'\n"
        "def main():\n"
        "    model = torch.nn.Linear(256, 256, bias=False).to(device)\n"
        "    model(torch.randn(4, 256, device=device)).sum().backward()\n"
    )
    [made] = simulate(f"own_asks_{device}:main", setup=Setup(device=device)).estimates
    assert made.weights_bytes == 256 * 256 * 4
    assert sys.modules.pop(f"own_asks_{device}").device == device
    assert not torch.cuda.is_available()
