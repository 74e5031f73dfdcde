"""`simulate` with a training step of the user's own: `module:function`."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from galore_mem.errors import InputError
from galore_mem.memory.tensor import ACTIVATIONS
from galore_mem.report.schema import schema
from galore_mem.setup import Setup, recipe
from galore_mem.simulate import simulate

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

    def on_a_card():
        return net()[0].cuda(), None, None

    def on_the_cpu():
        with torch.device("cpu"):
            return net()

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
        ("own_step:fails", "own_step:fails failed: ValueError: first line (own_step.py, line 29)"),
        ("own_step:fails_in_step", "own_step:fails_in_step failed in its training step: RuntimeError: "),
        ("own_step:asks_for_values", "the program asks for values, by aten.nonzero"),
        ("own_step:on_a_card", "the program asks for a CUDA device"),
        ("own_step:on_the_cpu", "its model is on cpu; name no device there"),
        ("own_step:ends", "it ended the program: SystemExit: 3"),
        ("own_step:returns_two", "must return a torch.nn.Module, a torch.optim.Optimizer and a batch"),
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
