"""`galore-mem simulate` as a command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
from typer.testing import CliRunner, Result

from galore_mem.allocator.snapshot import read_snapshot
from galore_mem.cli import app
from galore_mem.errors import InputError
from galore_mem.report.schema import schema
from galore_mem.verify.matrix import SMALL

COMMAND = Path(sys.executable).with_name("galore-mem")


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A config.json of a small model."""
    path = tmp_path / "small.json"
    path.write_text(json.dumps(SMALL["small-tied"]))
    return str(path)


def invoke(*words: str) -> Result:
    done = CliRunner().invoke(app, ["simulate", *words], standalone_mode=False)
    if done.exception is not None:
        raise done.exception
    return done


def test_a_table_with_its_files(model: str, tmp_path: Path) -> None:
    page, kept = tmp_path / "run.html", tmp_path / "run.pickle"
    words = ("--model", model, "--method", "adamw", "--seq-len", "32", "--gpu", "24GiB")
    done = invoke(*words, "--timeline", str(page), "--snapshot", str(kept))
    assert done.return_value == 0
    assert "at the peak, in " in done.stdout
    assert "first-step" in done.stdout
    assert page.read_text().startswith("<!DOCTYPE html>")
    [device] = read_snapshot(kept).devices
    assert len([e for e in device.events if e.action == "alloc"]) > 100


def test_json(model: str, tmp_path: Path) -> None:
    """With options of `estimate`; the timeline where its points are asked for."""
    out = tmp_path / "answer.json"
    invoke(
        "--model", model, "--method", "galore", "--rank", "8", "--set", "proj_type=left", "--batch-size", "2",
        "--update-proj-gap", "50",
        "--seq-len", "16", "--gradient-checkpointing", "--points", "20", "--alloc-conf", "expandable_segments:True",
        "--format", "json", "--output", str(out),
    )  # fmt: skip
    data = json.loads(out.read_text())
    jsonschema.validate(data, schema("simulate"))
    setup = data["setup"]
    assert (setup["batch_size"], setup["seq_len"], setup["gradient_checkpointing"]) == (2, 16, True)
    assert setup["allocator"] == "expandable_segments:True"
    [made] = data["estimates"]
    assert made["hyperparameters"] == {"rank": 8, "update_proj_gap": 50, "proj_type": "left"}
    assert len(made["timeline"]["at"]) == 20


@pytest.mark.parametrize(("named", "code"), [(True, 1), (False, 0)])
def test_exit_code_where_nothing_fits(named: bool, code: int, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of `estimate`: the answer is no where methods were named. (Not all methods are run here.)"""
    from galore_mem.methods import registry
    from galore_mem.simulate import service

    monkeypatch.setattr(
        service, "select", lambda *given: [(registry.METHODS["sgd"], registry.METHODS["sgd"].implementations[0])]
    )
    done = invoke("--model", model, *(("--method", "sgd") if named else ()), "--seq-len", "8", "--gpu", "528MiB")
    assert done.return_value == code
    assert "out of memory in first-step" in done.stdout


def test_a_step_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is named by giving it, so exit code 1 where it does not fit; nothing is imported without being asked for."""
    (tmp_path / "own_cli.py").write_text(
        "import torch\n"
        "def make():\n"
        "    net = torch.nn.Sequential(torch.nn.Linear(8, 1), torch.nn.Flatten(0))\n"
        "    return net, torch.optim.SGD(net.parameters()), [torch.randn(1, 8)]\n"
    )
    monkeypatch.chdir(tmp_path)
    done = invoke("--model", "own_cli:make", "--warm-up", "2", "--gpu", "300MiB")
    assert done.return_value == 1
    assert done.stdout.startswith("own_cli:make: 9 parameters\n")
    sys.modules.pop("own_cli")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--format", "xml"], "unknown format 'xml'"),
        (["--recipe", "fp64"], "unknown recipe 'fp64'"),
        (["--set", "proj_type"], "--set takes name=value"),
        (["--set", "update_proj_gap=3", "--update-proj-gap", "4"], "update_proj_gap is given twice"),
        (["--alloc-conf", "expandable_segments"], "cannot read allocator setting"),
        (["--gpu", "24"], "--gpu 24 would be a card of 24 B"),
        (["--platform", "os2"], "unknown platform 'os2'; known: linux, windows"),
        (["--timeline", "run.pdf"], "unknown kind of picture"),
        (["--snapshot", "run.pickle"], "name one method"),
        (["--snapshot", "run.txt"], "cannot write 'run.txt': a snapshot is a .pickle file"),
        (["--points", "20"], "give --format json too"),
        (["--free-logits", "--keep-logits-until", "step"], "contradict each other"),
        (["--method", "sgd", "--rank", "0"], "rank"),
        (["--method", "no-such"], "unknown method"),
    ],
)
def test_what_is_wrong_is_one_line(words: list[str], expected: str, model: str) -> None:
    with pytest.raises(InputError) as raised:
        invoke("--model", model, *words)
    assert expected in str(raised.value)
    assert "\n" not in str(raised.value)


def test_as_a_user_runs_it(tmp_path: Path) -> None:
    """One line on stderr, exit code 2, no traceback."""
    words = [COMMAND, "simulate", "--model", "no_such_module:make"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: there is no module 'no_such_module' in ")
    assert done.stderr.count("\n") == 1


def test_the_schema_is_printed() -> None:
    done = CliRunner().invoke(app, ["schema", "simulate"], standalone_mode=False)
    assert json.loads(done.stdout)["title"] == "galore-mem simulate"
