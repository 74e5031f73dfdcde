"""The command line as a whole: options that commands share, what is refused before work begins, and `methods`."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
from typer.main import get_command
from typer.testing import CliRunner

from galore_mem.cli import app
from galore_mem.errors import InputError
from galore_mem.estimator import check_hyperparameters
from galore_mem.methods.registry import METHODS
from galore_mem.report.schema import schema


def cli(*words: str) -> str:
    """What the command prints."""
    done = CliRunner().invoke(app, words, standalone_mode=False)
    if done.exception is not None:
        raise done.exception
    return done.stdout


def refused(*words: str) -> str:
    """The one line that says what is wrong."""
    with pytest.raises(InputError) as raised:
        cli(*words)
    assert "\n" not in str(raised.value)
    return str(raised.value)


# -- methods -----------------------------------------------------------------------------------------


def test_methods_are_listed_in_the_registrys_order() -> None:
    heading, *lines = cli("methods").splitlines()
    assert heading.split() == ["method", "title", "implementations", "hyperparameters", "paper"]
    assert [line.split()[0] for line in lines[: len(METHODS)]] == list(METHODS)
    assert lines[list(METHODS).index("qlora")].split() == [
        "qlora", "QLoRA", "peft,", "peft-fused,", "peft-loop", "rank,", "double_quant", "arXiv:2305.14314",
    ]  # fmt: skip


@pytest.mark.parametrize("name", [None, *METHODS])
def test_methods_json_follows_the_published_schema(name: str | None) -> None:
    """One shape for all and for one; exactly one default, the first."""
    data = json.loads(cli("methods", *([name] if name else []), "--format", "json"))
    jsonschema.Draft202012Validator(schema("methods")).validate(data)
    assert [m["name"] for m in data["methods"]] == ([name] if name else list(METHODS))
    for found in data["methods"]:
        method = METHODS[found["name"]]
        assert found["citation"]["where"] == method.citation.where
        assert found["paper"]["equations"] == method.paper.equations
        codes = found["implementations"]
        assert [(c["name"], c["version"], c["source"]) for c in codes] == [
            (c.name, c.version, c.source) for c in method.implementations
        ]
        assert [c["default"] for c in codes] == [True] + [False] * (len(codes) - 1)
        assert [h["name"] for h in found["hyperparameters"]] == [h.name for h in method.hyperparameters]


def test_a_method_is_shown_with_all_that_is_known_of_it() -> None:
    """galore: three implementations count as the paper does and share a row, galore-torch has its own; which source
    each release is described from; what a hyperparameter may be and which option gives it."""
    lines = [" ".join(line.split()) for line in cli("methods", "galore").splitlines()]
    for line in (
        "galore: GaLore",
        "paper GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection",
        "authors Zhao, Zhang, Chen, Wang, Anandkumar, Tian",
        "where arXiv:2403.03507",
        "counts table 1: mr + 2nr",
        "galore-mem yes galore-mem yes galore_mem/optim",
        "galore-torch galore-torch 1.0 yes galore_torch/adamw.py, galore_torch/galore_projector.py",
        "paper, galore-mem, galore-mem-randomized, pytorch-optimizer projected m·r + 2·n·r",
        "other 2·m·n",
        "galore-torch projected m·r + 2·n·r (float32 gradients: m·m + 2·n·r, the whole factor stays alive)",
        "rank 128 integer, at least 1 --rank rank r of the low-rank space",
        "proj_type std std, reverse_std, left, right, full --set proj_type= side that is projected",
    ):
        assert line in lines, line
    assert lines.count("other 2·m·n") == 2


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("adamw", "paper, torch-foreach, torch-fused, torch-loop all 2·m·n"),  # nothing is projected
        ("lomo", "lomo-optim yes lomo-optim 0.1.1 always lomo_optim/lomo.py:Lomo.fuse_update"),
        ("relora", "relora relora 176f376, torch 2.13 no peft_pretraining/relora.py"),
        ("low-rank", "counts arXiv:2403.03507, table 2: weights mr + nr, states 2mr + 2nr"),  # counted in another paper
        ("sgd", "momentum 0.9 number, at least 0 --set momentum= momentum factor; 0 keeps no buffer"),
    ],
)
def test_how_methods_differ_is_shown(name: str, said: str) -> None:
    assert said in [" ".join(line.split()) for line in cli("methods", name).splitlines()]


def test_methods_csv_has_a_row_per_implementation_and_the_papers() -> None:
    rows = list(csv.DictReader(io.StringIO(cli("methods", "--format", "csv"))))
    assert len(rows) == sum(1 + len(m.implementations) for m in METHODS.values())
    [paper, ours] = [r for r in rows if r["method"] == "galore-2"]
    assert (paper["implementation"], paper["projected"], paper["layerwise"]) == ("paper", "m·r + 2·n·r", "")
    assert (ours["implementation"], ours["default"], ours["layerwise"]) == ("galore-mem", "True", "yes")
    assert ours["hyperparameters"].startswith("rank=128; update_proj_gap=200; proj_type=std; ")
    assert list(csv.DictReader(io.StringIO(cli("methods", "galore-2", "-f", "csv")))) == [paper, ours]


def test_methods_as_markdown_and_into_a_file(tmp_path: Path) -> None:
    out = tmp_path / "methods.md"
    assert cli("methods", "flora", "-f", "markdown", "--output", str(out)) == ""
    text = out.read_text(encoding="utf-8")
    assert text.startswith(
        "**flora: Flora**\n\n| paper | Flora: Low-Rank Adapters Are Secretly Gradient Compressors |\n"
    )
    assert "| kappa | 1000 | integer, at least 1 | --set kappa= |" in text


def test_an_unknown_method_is_answered_with_the_nearest() -> None:
    assert refused("methods", "galor") == refused("estimate", "-m", "llama-60m", "--method", "galor")
    assert refused("methods", "galor").startswith("unknown method 'galor'; did you mean galore, ")


def test_methods_imports_nothing_heavy() -> None:
    program = (
        "import sys; sys.argv = ['galore-mem', 'methods', 'q-galore']\n"
        "from galore_mem.cli import app; app(standalone_mode=False)\n"
        "heavy = {'torch', 'transformers', 'numpy', 'bitsandbytes', 'peft', 'matplotlib'} & set(sys.modules)\n"
        "print('HEAVY', sorted(heavy), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "HEAVY []" in done.stderr


# -- options -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--format", "--output", "--method", "--rank", "--target", "--set"])
def test_an_option_means_the_same_in_every_command(option: str) -> None:
    """Its spellings, its help and what it takes are those of one definition."""
    commands = get_command(app).commands  # type: ignore[attr-defined]  # a group
    found = [p for c in (*commands.values(), *commands["verify"].commands.values()) for p in c.params]
    found = [p for p in found if option in p.opts]
    assert len(found) >= 3
    assert len({(p.name, tuple(p.opts), p.help, p.multiple) for p in found}) == 1


@pytest.mark.parametrize(
    "words",
    [
        ("estimate", "--model", "no-such-model"),
        ("methods", "no-such-method"),
        ("models", "no-such-model"),
        ("papers", "--paper", "no-such-paper"),
        ("simulate", "--model", "no-such-model"),
        ("verify", "--model", "no-such-model"),
        ("verify", "report", "no-such-record"),
    ],
)
def test_where_the_answer_goes_is_looked_at_before_all_else(words: tuple[str, ...], tmp_path: Path) -> None:
    gone = tmp_path / "gone" / "answer.txt"
    assert refused(*words, "--output", str(gone)) == f"cannot write {gone}: there is no such folder"
    assert refused(*words, "--output", str(tmp_path)) == f"cannot write '{tmp_path}': not a file"
    assert "no-such" in refused(*words, "--output", str(tmp_path / "answer.txt"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--batch-size", "3"), "--batch-size is an option of verify, not of report"),
        (("--set", "rank=3"), "--set is an option of verify, not of report"),
        (("-f", "csv"), "--format is an option of verify report: write it after report"),
        (("--tolerance", "0.1"), "--tolerance is an option of verify report: write it after report"),
    ],
)
def test_options_before_report_are_not_lost_in_silence(words: tuple[str, ...], said: str) -> None:
    assert refused("verify", *words, "report", "record.jsonl") == said


@pytest.mark.parametrize(
    ("methods", "name", "said"),
    [
        ((), "foo", "no method has a hyperparameter 'foo'; known: beta1, double_quant, kappa, "),
        ((), "proj_typ", "no method has a hyperparameter 'proj_typ'; did you mean proj_type, "),
        (("adamw",), "update_proj_ga", "unknown hyperparameter of adamw 'update_proj_ga'; known: none"),
        (("galore",), "update_proj_ga", "unknown hyperparameter of galore 'update_proj_ga'; did you mean update_"),
        (("adamw", "sgd"), "moment", "unknown hyperparameter of adamw, sgd 'moment'; did you mean momentum?"),
    ],
)  # fmt: skip
def test_only_what_the_methods_have_is_suggested(methods: tuple[str, ...], name: str, said: str) -> None:
    with pytest.raises(InputError) as raised:
        check_hyperparameters(methods, {name: 1})
    assert str(raised.value).startswith(said)


def test_rank_and_gap_are_left_alone_by_methods_without_a_projector() -> None:
    """They have options of their own, which a comparison of several methods gives once."""
    check_hyperparameters(("adamw",), {"rank": 8, "update_proj_gap": 100})
