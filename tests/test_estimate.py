"""`estimate` as a service and as a command: answers, JSON contract, errors, cost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
from typer.testing import CliRunner

import galore_mem
from galore_mem.cli import app
from galore_mem.errors import InputError
from galore_mem.methods.registry import METHODS
from galore_mem.report.schema import schema

COMMAND = Path(sys.executable).with_name("galore-mem")


def cli(*words: str) -> subprocess.CompletedProcess[str]:
    """The installed command, as a user runs it."""
    return subprocess.run([COMMAND, *words], capture_output=True, text=True, check=False, timeout=60)


def answer(*words: str) -> dict:
    done = CliRunner().invoke(app, ["estimate", *words, "--format", "json"], standalone_mode=False)
    if done.exception is not None:
        raise done.exception
    return json.loads(done.stdout)


# -- answers -----------------------------------------------------------------------------------------


def test_llama_350m_counts() -> None:
    """GaLore#67: 367.97 M parameters, 302.38 M of them in attention and MLP matrices.

    24 layers of 4 x 1024 x 1024 + 3 x 1024 x 2736 = 24 x 12,599,296 = 302,383,104; embedding and head
    2 x 32000 x 1024 = 65,536,000; norms 49 x 1024 = 50,176.
    """
    model = answer("--model", "llama-350m", "--method", "adamw")["model"]
    assert model["parameters"] == 302_383_104 + 65_536_000 + 50_176 == 367_969_280
    assert model["parameters_projected"] == 302_383_104


def test_adamw_on_llama_7b_step_by_step() -> None:
    """pure bf16: 2 B weights, 2 B gradients, 2 x 2 B moments; foreach makes one more copy of the moments' roots."""
    n = 6_738_415_616
    found = answer("--model", "llama-7b", "--method", "adamw")["estimates"][0]
    assert found["weights_bytes"] == found["gradients_bytes"] == 2 * n
    assert found["optimizer_state_bytes"] == 4 * n
    step = next(p for p in found["phases"] if p["name"] == "step")
    workspaces = 2 * (2 * 4096 + 8 * 16) * 1024  # cuBLAS, one a thread
    loss = 512  # one scalar, in one block
    frequencies = 2 * 512  # of rotary embedding, and their copy: 64 float32 each, in a block each
    assert found["buffers_bytes"] == 2 * 64 * 4
    assert step["allocated_bytes"] == 10 * n + workspaces + loss + frequencies
    assert found["peak_phase"] == "step"
    assert found["peak_allocated_bytes"] == step["allocated_bytes"]
    assert found["device_bytes"] == found["peak_allocated_bytes"] + found["outside_allocator_bytes"]


def test_loop_needs_two_roots_and_the_last_denominator() -> None:
    """The loop holds the last parameter's denom while it makes a root and a quotient: the head follows a norm of 8 KiB,
    so the highest moment has two tensors of 32000 x 4096 and the norm's denom; or three equal MLP matrices."""
    found = answer("--model", "llama-7b", "--method", "adamw", "--implementation", "torch-loop")["estimates"][0]
    step = next(p for p in found["phases"] if p["name"] == "step")
    head, mlp = 2 * 32000 * 4096, 2 * 11008 * 4096
    workspaces, loss = 2 * 8_519_680, 512
    assert step["components"]["temporaries"] == max(2 * head + 2 * 4096, 3 * mlp) + workspaces + loss


def test_layerwise_holds_one_gradient() -> None:
    words = ("--model", "llama-1b", "--method", "galore", "--rank", "512", "--seq-len", "256")
    plain, hooked = answer(*words)["estimates"][0], answer(*words, "--layerwise")["estimates"][0]
    assert hooked["layerwise"]
    assert hooked["gradients_bytes"] == 2 * 32000 * 2048  # the embedding's, the largest
    assert hooked["peak_allocated_bytes"] < plain["peak_allocated_bytes"]
    assert [p["name"] for p in hooked["phases"]] == ["load", "forward", "loss", "backward", "refresh"]


def test_four_square_and_two_wide_matrices_at_h_4096() -> None:
    """GaLore-mini 3.2, one layer: 24 h^2, 12 h^2, 30 h r and 18 h r elements at h = 4096, r = 1024."""
    h, r = 4096, 1024
    shapes = [("attention", (h, h))] * 4 + [("mlp", (h, 4 * h)), ("mlp", (4 * h, h))]
    rows = tuple(
        galore_mem.ParamSpec(f"layers.0.{role}.w{i}.weight", shape, galore_mem.Role(role), "linear")
        for i, (role, shape) in enumerate(shapes)
    )
    layer = galore_mem.ModelSpec("layer", None, (galore_mem.Block(rows),))
    names = ["adamw", "adam-mini", "galore", "galore-mini"]
    result = galore_mem.estimate(layer, names, convention="paper", rank=r)
    elements = [e.optimizer_state_bytes // 2 for e in result.estimates]
    assert elements == [24 * h * h, 12 * h * h, 30 * h * r, 18 * h * r]
    assert elements == [402_653_184, 201_326_592, 125_829_120, 75_497_472]
    assert 100 * (elements[2] - elements[3]) == 40 * elements[2]
    assert 10_000 * (elements[0] - elements[3]) == 8_125 * elements[0]


def test_exit_code_of_a_verdict() -> None:
    assert cli("estimate", "-m", "llama-7b", "--method", "adamw", "--gpu", "rtx-4090").returncode == 1
    assert cli("estimate", "-m", "llama-60m", "--method", "adamw", "--gpu", "rtx-4090").returncode == 0
    assert cli("estimate", "-m", "llama-7b", "--gpu", "rtx-4090").returncode == 0  # a comparison, not a question


def test_rank_beyond_a_matrix_is_clipped_and_said() -> None:
    capped = answer("--model", "llama-60m", "--method", "galore", "--rank", "99999")["estimates"][0]
    exact = answer("--model", "llama-60m", "--method", "galore", "--rank", "512")["estimates"][0]
    assert capped["optimizer_state_bytes"] == exact["optimizer_state_bytes"]
    assert any("clipped" in a for a in capped["assumptions"])
    assert not any("clipped" in a for a in exact["assumptions"])


def test_targets_choose_what_is_projected() -> None:
    found = answer("--model", "llama-60m", "--target", "q_proj,lm_head", "--method", "galore")
    assert found["model"]["parameters_projected"] == 8 * 512 * 512 + 32000 * 512
    with pytest.raises(InputError, match="names no linear layer"):
        answer("--model", "llama-60m", "--target", "c_attn")


# -- the JSON contract and the other formats ---------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ("--model", "llama-130m"),
        ("--model", "gpt2", "--gpu", "t4", "--tensors", "--layerwise"),
        ("--model", "roberta-base-glue", "--convention", "paper", "--recipe", "amp-bf16"),
        ("--model", "llama-60m", "--implementation", "all", "--device", "cpu"),
    ],
)
def test_json_follows_the_published_schema(words: tuple[str, ...]) -> None:
    jsonschema.Draft202012Validator(schema("estimate")).validate(answer(*words))


def test_papers_json_follows_the_published_schema() -> None:
    done = cli("papers", "--format", "json")
    assert done.returncode == 0
    jsonschema.Draft202012Validator(schema("papers")).validate(json.loads(done.stdout))
    table = cli("papers", "--paper", "galore-mini").stdout
    assert "0.44" in table
    assert "Not reproduced, and what was tried:" in table


def test_models_lists_and_shows() -> None:
    data = json.loads(cli("models", "--format", "json").stdout)
    jsonschema.Draft202012Validator(schema("models")).validate(data)
    listed = data["models"]
    one = json.loads(cli("models", "gpt2", "--format", "json").stdout)
    jsonschema.Draft202012Validator(schema("models")).validate(one)
    assert len(listed) >= 28
    shown = cli("models", "llama-350m").stdout
    assert "367,969,280" in shown
    assert "302,383,104" in shown


def test_all_methods_by_default_in_the_registrys_order() -> None:
    assert [e["method"] for e in answer("--model", "llama-60m")["estimates"]] == list(METHODS)


def test_csv_markdown_tensors_and_explanation(tmp_path: Path) -> None:
    csv = cli("estimate", "-m", "llama-60m", "--method", "adamw", "--format", "csv").stdout.splitlines()
    assert csv[0].startswith("model,method,implementation")
    assert len(csv) == 1 + 5  # load, forward, loss, backward, step
    markdown = cli("estimate", "-m", "llama-60m", "--method", "adamw", "-f", "markdown").stdout
    assert "| method | implementation |" in markdown
    tensors = cli("estimate", "-m", "llama-60m", "--method", "adamw", "--tensors").stdout
    assert "model.layers.{i}.self_attn.q_proj.weight" in tensors
    explained = cli("estimate", "-m", "llama-60m", "--method", "galore", "--rank", "128", "--explain").stdout
    assert "58,073,600 elements x 2 B (bfloat16) = 116,147,200 B" in explained
    assert "activations grow by" in explained
    target = tmp_path / "out.json"
    assert cli("estimate", "-m", "llama-60m", "-f", "json", "-o", str(target)).stdout == ""
    assert json.loads(target.read_text())["schema"] == "galore-mem.estimate/1"


def test_output_goes_through_links_and_into_pipes(tmp_path: Path) -> None:
    """A link keeps pointing to its file; a pipe stays a pipe; a new file obeys the umask."""
    words = ("estimate", "-m", "llama-60m", "--method", "adamw", "-f", "csv", "-o")
    real, link, pipe = tmp_path / "real.csv", tmp_path / "link.csv", tmp_path / "pipe"
    real.write_text("old")
    real.chmod(0o640)
    link.symlink_to(real)
    assert cli(*words, str(link)).returncode == 0
    assert link.is_symlink()
    assert real.read_text().startswith("model,")
    assert real.stat().st_mode & 0o777 == 0o640
    os.mkfifo(pipe)
    reader = subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE, text=True)
    assert cli(*words, str(pipe)).returncode == 0
    assert reader.communicate(timeout=30)[0].startswith("model,")
    assert pipe.is_fifo()
    assert {p.name for p in tmp_path.iterdir()} == {"real.csv", "link.csv", "pipe"}  # nothing left behind


def test_output_that_cannot_be_encoded_is_written_plainly() -> None:
    done = subprocess.run(
        [COMMAND, "estimate", "-m", "llama-60m", "--method", "adamw"],
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 0
    assert b"# weights  = gradients" in done.stdout


def test_what_differs_between_methods_is_said() -> None:
    """QLoRA's float32 activations take another attention kernel than bfloat16 does."""
    table = cli("estimate", "-m", "llama-60m").stdout
    assert "Assumed: attention kernel flash." in table
    assert "Assumed: attention kernel efficient for qlora." in table
    assert "2 cuBLAS workspaces of 8,519,680 bytes" in table


def test_all_linear_leaves_the_head_alone() -> None:
    found = answer("--model", "llama-60m", "--target", "all-linear", "--method", "galore")["model"]
    assert found["parameters_projected"] == 25_296_896  # 8 x (4 x 512 x 512 + 3 x 512 x 1376)


def test_a_method_that_cannot_handle_the_model_is_named() -> None:
    found = answer("--model", "bert-base-uncased", "--implementation", "all")
    assert any(u["implementation"] == "adam-mini" and u["reason"] for u in found["unsupported"])


# -- misuse ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "lama-7b"], "did you mean llama-7b"),
        (["--model", "llama-7b", "--method", "galor"], "did you mean galore"),
        (["--model", "llama-7b", "--rank", "0"], "rank must be at least 1 and at most 2147483647, got 0"),
        (["--model", "llama-7b", "--rank", "-3"], "got -3"),
        (["--model", "llama-7b", "--rank", str(2**63)], "rank must be at least 1 and at most"),
        (["--model", "llama-7b", "--set", "proj_typ=left"], "did you mean proj_type"),
        (["--model", "llama-7b", "--set", "proj_type=up"], "unknown proj_type 'up'"),
        (["--model", "llama-7b", "--set", "momentum=much"], "momentum must be a number"),
        (["--model", "llama-7b", "--set", "momentum"], "--set takes name=value"),
        (["--model", "llama-7b", "--set", "rank=4", "--rank", "8"], "rank is given twice"),
        (["--model", "llama-7b", "--method", "lora", "--set", "momentum=0.9"], "hyperparameter of lora"),
        (["--model", "llama-7b", "--torch", "1.0"], "unknown torch version '1.0'"),
        (["--model", "llama-7b", "--batch-size", "0"], "batch-size must be between 1"),
        (["--model", "llama-7b", "--seq-len", "-1"], "seq-len must be between 1"),
        (["--model", "llama-7b", "--gpu", "rtx-4091"], "did you mean rtx-4090"),
        (["--model", "llama-7b", "--gpu", "24 apples"], "cannot read '24 apples' as a size"),
        (["--model", "llama-7b", "--recipe", "bf16"], "unknown recipe 'bf16'"),
        (["--model", "llama-7b", "--attention", "fast"], "unknown attention 'fast'"),
        (["--model", "llama-7b", "--transformers", "3.0"], "unknown transformers version '3.0'"),
        (["--model", "llama-7b", "--format", "xml"], "unknown format 'xml'"),
        (["--model", "llama-7b", "--implementation", "nobody"], "'nobody'"),
        (["--model", "llama-7b", "--method", "adamw", "--implementation", "nobody"], "implementation of adamw"),
        (["--model", "llama-7b", "--convention", "rumour"], "unknown convention 'rumour'"),
        (["--model", "gpt2", "--seq-len", "4096"], "beyond the 1024 positions"),
        (["--model", "llama-7b", "--layerwise", "--keep-gradients"], "excludes --keep-gradients"),
        (["--model", "llama-7b", "--attention", "flash", "--recipe", "fp32"], "flash attention needs"),
        (["--model", "llama-7b", "--output", "/nonexistent/folder/file"], "cannot write"),
        (["--model", "llama-7b", "--target", ","], "--target names no linear layer"),
        (["--model", "llama-7b", "--gpu", "24GiB", "--device", "cpu"], "--gpu asks about a card"),
        (["--model", "llama-7b", "--gpu", "4090"], "did you mean rtx-4090"),
        (["--model", "bert-base-uncased", "--implementation", "adam-mini"], "no method can answer: adam-mini"),
        (["--model", "llama-60m", "--method", "lora", "--target", "lm_head", "--loss", "fused"], "take the head out"),
        (["--model", "llama-7b", "--batch-size", "many"], "Invalid value for '--batch-size'"),
        (["--model", "llama-7b", "--no-such-option"], "--no-such-option"),
        ([], "--model"),
    ],
)
def test_misuse_is_one_line_and_exit_code_2(words: list[str], said: str) -> None:
    done = cli("estimate", *words)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    assert said in done.stderr


# -- cost --------------------------------------------------------------------------------------------


def test_estimate_imports_nothing_heavy() -> None:
    program = (
        "import sys; sys.argv = ['galore-mem', 'estimate', '--model', 'llama-7b']\n"
        "from galore_mem.cli import app; app(standalone_mode=False)\n"
        "heavy = {'torch', 'transformers', 'numpy', 'bitsandbytes', 'peft', 'matplotlib'} & set(sys.modules)\n"
        "print('HEAVY', sorted(heavy), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "HEAVY []" in done.stderr


def test_public_names() -> None:
    assert set(galore_mem.__all__) == {
        "Block", "EstimateResult", "InputError", "ModelSpec", "ParamSpec", "Role", "Setup", "__version__", "estimate",
        "resolve",
    }  # fmt: skip
