"""What `--model` accepts: names, paths and the hub's local cache, in this order."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from spec_inputs import line

import galore_mem
from galore_mem.spec import bundled as bundled_module
from galore_mem.spec.bundled import bundled, folder, spec_file
from galore_mem.spec.hub import cache_folder, is_repo_id
from galore_mem.spec.resolve import resolve

LLAMA = {
    "model_type": "llama", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3,
    "num_attention_heads": 4,
}  # fmt: skip
# embedding and head; 4 attention and 3 MLP matrices and 2 norms a layer; the last norm
LLAMA_COUNT = 2 * 96 * 32 + 3 * (4 * 32 * 32 + 3 * 32 * 40 + 2 * 32) + 32


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache of the test's own, and a folder of its own to stand in."""
    cache = tmp_path / "cache"
    stand = tmp_path / "stand"
    stand.mkdir()
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    monkeypatch.chdir(stand)
    return cache


def write_config(path: Path, config: dict[str, Any] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(LLAMA if config is None else config))
    return path


# --- names -------------------------------------------------------------------


def test_enough_models_are_bundled() -> None:
    assert len(bundled()) >= 34
    assert list(bundled()) == sorted(bundled())


@pytest.mark.parametrize(
    ("given", "near"),
    [
        ("llama-7", "llama-7b"),
        ("LLaMA-7B", "llama-7b"),
        ("mistral7b", "mistral-7b"),
        ("bert-base", "bert-base-uncased"),
    ],
)
def test_the_nearest_names_are_offered(given: str, near: str) -> None:
    message = line(resolve, given)
    assert message.startswith(f"unknown model {given!r}; did you mean ")
    assert near in message


def test_a_name_that_is_near_nothing_gets_the_list() -> None:
    assert "known: bert-base-uncased, " in line(resolve, "zzzzzz")


@pytest.mark.parametrize("given", ["", " ", "\n"])
def test_no_name_is_refused(given: str) -> None:
    assert line(resolve, given).startswith("the model is empty; give a bundled name")


def test_a_bundled_name_wins_over_a_file_of_that_name() -> None:
    write_config(Path("gpt2") / "config.json")
    assert resolve("gpt2").family == "gpt2"
    assert resolve("./gpt2").parameter_count == LLAMA_COUNT


def test_one_name_reads_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All other spec files may be broken."""
    specs = tmp_path / "galore_mem" / "model_specs"
    specs.mkdir(parents=True)
    shutil.copy(folder() / "gpt2.toml", specs / "gpt2.toml")
    (specs / "broken.toml").write_text("name = ")
    monkeypatch.setattr(galore_mem, "__file__", str(specs.parent / "__init__.py"))
    assert bundled_module.bundled() == ("broken", "gpt2")
    assert resolve("gpt2").parameter_count == 124_439_808
    assert "is not TOML" in line(resolve, "broken")


def test_specs_are_found_in_the_package_and_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "galore_mem"
    package.mkdir()
    monkeypatch.setattr(galore_mem, "__file__", str(package / "__init__.py"))
    assert folder() == tmp_path / "model_specs"
    (package / "model_specs").mkdir()
    assert folder() == package / "model_specs"


def test_resolving_imports_nothing_heavy() -> None:
    """Neither a name, nor a config, nor a header of weights needs torch, transformers, numpy or the hub's client."""
    script = (
        "import sys\n"
        "from galore_mem.spec.resolve import resolve\n"
        "resolve('llama-7b'); resolve('roberta-base-glue')\n"
        "import galore_mem.spec.checkpoint\n"
        "heavy = {'torch', 'transformers', 'numpy', 'huggingface_hub', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


# --- paths -------------------------------------------------------------------


def test_a_config_file_is_a_model(tmp_path: Path) -> None:
    for path in (tmp_path / "tiny" / "config.json", tmp_path / "tiny.json"):
        model = resolve(str(write_config(path)))
        assert (model.name, model.family, model.parameter_count) == ("tiny", "llama", LLAMA_COUNT)
        assert str(path)[-100:] in model.source


def test_a_path_may_be_relative() -> None:
    write_config(Path("tiny") / "config.json")
    assert [resolve(path).name for path in ("tiny", "./tiny", "tiny/", "tiny/config.json")] == ["tiny"] * 4
    os.chdir("tiny")
    assert resolve("config.json").name == "tiny"
    assert resolve(".").name == "tiny"


def test_a_folder_is_its_config(tmp_path: Path) -> None:
    write_config(tmp_path / "tiny" / "config.json")
    (tmp_path / "tiny" / "model.safetensors").write_bytes(b"not looked at")
    assert resolve(str(tmp_path / "tiny")).parameter_count == LLAMA_COUNT


def weights(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"layers.0.fc.weight": torch.zeros(2, 3), "layers.1.fc.weight": torch.zeros(2, 3)}, path)
    return path


@pytest.mark.parametrize("name", ["model.safetensors", "other.safetensors"])
def test_a_folder_without_config_is_its_weights(tmp_path: Path, name: str) -> None:
    path = weights(tmp_path / "tiny" / name)
    model = resolve(str(path.parent))
    assert (model.name, model.family, model.parameter_count, model.num_layers) == ("tiny", None, 12, 2)
    assert resolve(str(path)).name == ("tiny" if name.startswith("model") else "other")


def test_a_folder_with_an_index_is_its_shards(tmp_path: Path) -> None:
    shard = weights(tmp_path / "tiny" / "model-00001-of-00001.safetensors")
    index = shard.with_name("model.safetensors.index.json")
    names = ("layers.0.fc.weight", "layers.1.fc.weight")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, shard.name)}))
    for path in (index, index.parent):
        assert (resolve(str(path)).name, resolve(str(path)).parameter_count) == ("tiny", 12)


def test_a_folder_of_another_family_is_its_weights(tmp_path: Path) -> None:
    """Its shapes are known although its forward pass is not; without weights the config is all there is."""
    path = write_config(tmp_path / "tiny" / "config.json", LLAMA | {"model_type": "gemma"})
    assert "unknown model_type 'gemma'" in line(resolve, str(path.parent))
    weights(path.with_name("model.safetensors"))
    assert resolve(str(path.parent)).family is None
    assert "unknown model_type 'gemma'" in line(resolve, str(path))


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    assert "holds neither config.json nor safetensors weights" in line(resolve, str(tmp_path / "tiny"))
    weights(tmp_path / "tiny" / "a.safetensors")
    weights(tmp_path / "tiny" / "b.safetensors")  # which of them?
    assert "holds neither config.json nor safetensors weights" in line(resolve, str(tmp_path / "tiny"))


def test_a_spec_file_of_ones_own_is_a_model(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    text = (folder() / "mistral-7b-v0.3.toml").read_text()
    path.write_text(text.replace('name = "mistral-7b-v0.3"', 'name = "own"'))
    model = resolve(str(path))
    assert (model.name, model.parameter_count) == ("own", 7_248_023_552)
    assert model.config["sliding_window"] is None
    assert spec_file("mistral-7b-v0.3").hf_config["sliding_window"] is None
    path.write_text(text.replace("hidden_size = 4096", "hidden_size = 4096.0"))
    assert "own.toml': hidden_size must be an integer from 1 to 1048576, got 4096.0" in line(resolve, str(path))


@pytest.mark.parametrize("given", ["x.json", "x.safetensors", "./x", "/x/y", "a/b/c", "a/", "~/x", "../x", "a/../b"])
def test_a_path_to_nothing_is_refused(given: str) -> None:
    assert line(resolve, given).startswith(f"there is no file or folder {given!r}; give ")


@pytest.mark.parametrize("name", ["model.gguf", "pytorch_model.bin", "model.pt"])
def test_files_of_other_kinds_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x02")
    assert "cannot tell what" in line(resolve, str(tmp_path / name))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_refused(tmp_path: Path) -> None:
    path = write_config(tmp_path / "tiny" / "config.json")
    path.chmod(0)
    assert "Permission denied" in line(resolve, str(path))
    path.chmod(0o600)
    path.parent.chmod(0)
    assert "Permission denied" in line(resolve, str(path))
    path.parent.chmod(0o700)


# --- the hub's cache ---------------------------------------------------------


def cached(cache: Path, repo_id: str, revision: str = "a1b2", main: str | None = "a1b2") -> Path:
    """A model as the hub's client stores it: a blob, a snapshot that links to it, a branch."""
    repo = cache / f"models--{repo_id.replace('/', '--')}"
    blob = write_config(repo / "blobs" / "1234")
    snapshot = repo / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").symlink_to(blob)
    if main is not None:
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / "main").write_text(main)
    return repo


@pytest.mark.parametrize("repo_id", ["org/Some-Model_1.0", "some-model"])
def test_a_model_in_the_cache_is_found(empty_cache: Path, repo_id: str) -> None:
    cached(empty_cache, repo_id)
    model = resolve(repo_id)
    assert (model.name, model.parameter_count) == (repo_id, LLAMA_COUNT)


def test_the_main_branch_decides(empty_cache: Path) -> None:
    repo = cached(empty_cache, "org/tiny", revision="a1", main="a1\n")
    write_config(repo / "snapshots" / "b2" / "config.json", LLAMA | {"num_hidden_layers": 1})
    assert resolve("org/tiny").num_layers == 3
    (repo / "refs" / "main").write_text("b2")
    assert resolve("org/tiny").num_layers == 1
    (repo / "refs" / "main").unlink()
    assert "holds 2 snapshots and no main" in line(resolve, "org/tiny")
    shutil.rmtree(repo / "snapshots" / "a1")
    assert resolve("org/tiny").num_layers == 1


@pytest.mark.parametrize("revision", ["../../../etc", "", "/etc", "a b", "..", "\0"])
def test_a_branch_that_is_no_revision_is_refused(empty_cache: Path, revision: str) -> None:
    cached(empty_cache, "org/tiny", main=revision)
    assert "does not hold a revision" in line(resolve, "org/tiny")


def test_a_folder_wins_over_the_cache(empty_cache: Path) -> None:
    cached(empty_cache, "org/tiny")
    write_config(Path("org/tiny/config.json"), LLAMA | {"num_hidden_layers": 1})
    assert resolve("org/tiny").num_layers == 1


def test_what_is_not_cached_is_not_downloaded(empty_cache: Path) -> None:
    message = line(resolve, "meta-llama/Llama-3.2-1B")
    assert "'meta-llama/Llama-3.2-1B' is no folder here and not in the Hugging Face cache" in message
    assert "nothing is downloaded; use a bundled model (llama-3.2-1b" in message
    assert "nothing is downloaded; download its config.json or give" in line(resolve, "org/zzzzzzzzzzzz")
    cached(empty_cache, "org/partial", main="other")  # a branch whose files were never fetched
    assert "not in the Hugging Face cache" in line(resolve, "org/partial")


def test_the_cache_is_where_the_client_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "HOME")
    expected = ("/v", "/v", "/v/hub", "/v/huggingface/hub", "/v/.cache/huggingface/hub")
    for variable, path in zip(variables, expected, strict=True):
        for other in variables:
            monkeypatch.delenv(other, raising=False)
        monkeypatch.setenv(variable, "/v")
        script = "from huggingface_hub.constants import HF_HUB_CACHE; print(HF_HUB_CACHE)"
        client = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
        assert str(cache_folder()) == path == client.stdout.strip()


def test_ids_of_the_hub() -> None:
    assert all(map(is_repo_id, ("gpt2", "org/name", "Org-1/na_me-1.5")))
    assert not any(map(is_repo_id, ("", "a/b/c", "/a", "a/", "../a", "a/..", "a..b/c", "a--b", "a b", "ä/b", "a\n")))
