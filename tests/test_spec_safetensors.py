"""Headers of safetensors files: what they say about a model, and what is refused."""

from __future__ import annotations

import json
import os
import time
from math import prod
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from spec_inputs import JSON, QUICK, TEXT, entry, line, stored, valid_or_one_line

from galore_mem.errors import InputError
from galore_mem.spec.bundled import bundled, bundled_model
from galore_mem.spec.checkpoint import model_from_checkpoint
from galore_mem.spec.config import model_from_config
from galore_mem.spec.model import Role
from galore_mem.spec.names import fold, guess_rows, natural_key, role_of
from galore_mem.spec.safetensors import FORMATS, read_header

# --- what a header says ---------------------------------------------------------

LLAMA = {
    "model_type": "llama", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 12,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "vocab_size": 96, "n_positions": 16, "n_embd": 32, "n_layer": 3, "n_head": 4}
BERT = LLAMA | {"model_type": "bert", "num_hidden_layers": 2, "max_position_embeddings": 16, "type_vocab_size": 2}


def tensors_of(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Tensors with the names and shapes of this model's parameters."""
    rows = model_from_config(config, "name", "source").parameters()
    return {row.name: torch.zeros(row.shape, dtype=torch.bfloat16) for row in rows}


def save(path: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any] | None = None) -> Path:
    """A real safetensors file, with this config beside it."""
    save_file(tensors, path)
    if config is not None:
        path.with_name("config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("name", bundled())
def test_names_alone_tell_roles_modules_and_layers(name: str) -> None:
    """For every bundled model the guesses from names and shapes are what its family says, and its layers fold."""
    known = {row.name: row for row in bundled_model(name).parameters()}
    rows = guess_rows({row.name: row.shape for row in known.values()})
    assert rows == [known[row.name] for row in rows]
    blocks = fold(rows)
    assert max(block.repeat for block in blocks) == bundled_model(name).num_layers
    assert len(blocks) <= 3


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("tok_embeddings.weight", Role.EMBEDDING),
        ("output.weight", Role.HEAD),
        ("embed_out.weight", Role.HEAD),
        ("layers.0.attention.wq.weight", Role.ATTENTION),
        ("layers.0.feed_forward.w1.weight", Role.MLP),
        ("layers.0.output.dense.weight", Role.MLP),
        ("layers.0.attention.output.dense.weight", Role.ATTENTION),
        ("layers.0.self_attn.q_norm.weight", Role.NORM),
        ("layers.0.block_sparse_moe.experts.3.w1.weight", Role.MLP),
        ("model.layers.0.mlp.experts.7.down_proj.weight", Role.MLP),
        ("h.0.self_attention.query_key_value.weight", Role.ATTENTION),
        ("h.0.mlp.dense_h_to_4h.weight", Role.MLP),
        ("encoder.block.0.layer.0.SelfAttention.q.weight", Role.ATTENTION),
        ("encoder.block.0.layer.1.DenseReluDense.wo.weight", Role.MLP),
        ("layers.0.mixer.A_log", Role.OTHER),
    ],
)
def test_roles_of_other_families_are_guessed(name: str, role: Role) -> None:
    assert role_of(name) is role


def test_a_gpt2_of_linear_modules_is_not_taken_for_conv1d() -> None:
    """Some implementations of GPT-2 keep its names and store (out, in): the bias is as long as the first dimension."""
    shapes = {"h.0.mlp.c_fc.weight": (128, 32), "h.0.mlp.c_fc.bias": (128,)}
    assert {row.module for row in guess_rows(shapes)} == {"linear"}
    shapes = {"h.0.mlp.c_fc.weight": (32, 128), "h.0.mlp.c_fc.bias": (128,)}
    assert {row.module for row in guess_rows(shapes)} == {"conv1d"}


def test_a_file_without_config_is_its_tensors(tmp_path: Path) -> None:
    tensors = tensors_of(LLAMA) | {"model.rotary_emb.inv_freq": torch.zeros(4)}
    model = model_from_checkpoint(save(tmp_path / "x.safetensors", tensors), "name")
    assert model.family is None
    assert model.heads is None
    assert {row.name: row.shape for row in model.parameters()} == {
        name: tuple(tensor.shape) for name, tensor in tensors.items() if "rotary" not in name
    }
    assert [block.repeat for block in model.blocks] == [1, 12, 1]  # layer 10 after layer 9, though stored after layer 1
    assert set(model.dtypes.values()) == {"bfloat16"}
    assert set(model.dtypes) == {row.name for row in model.parameters()}


def test_layers_that_differ_do_not_fold(tmp_path: Path) -> None:
    tensors = {f"layers.{i}.mlp.weight": torch.zeros(2, 3 + (i == 2)) for i in (0, 1, 2, 3, 5, 6)}
    model = model_from_checkpoint(save(tmp_path / "x.safetensors", tensors), "name")
    assert [(b.start, b.repeat) for b in model.blocks] == [(0, 2), (2, 1), (3, 1), (5, 2)]
    assert [row.name for row in model.parameters()] == list(tensors)


def test_a_config_beside_the_file_gives_the_family(tmp_path: Path) -> None:
    model = model_from_checkpoint(save(tmp_path / "model.safetensors", tensors_of(LLAMA), LLAMA), "name")
    expected = model_from_config(LLAMA, "name", "source")
    assert (model.family, model.blocks, model.heads, model.config) == (
        "llama", expected.blocks, expected.heads, expected.config,
    )  # fmt: skip
    assert model.dtypes["lm_head.weight"] == "bfloat16"


def test_a_config_of_another_family_leaves_the_shapes(tmp_path: Path) -> None:
    path = save(tmp_path / "model.safetensors", tensors_of(LLAMA), LLAMA | {"model_type": "gemma"})
    assert model_from_checkpoint(path, "name").family is None
    save(path, tensors_of(LLAMA), LLAMA | {"model_type": ["llama"]})
    assert model_from_checkpoint(path, "name").family is None


def test_a_tied_head_is_no_second_parameter(tmp_path: Path) -> None:
    tied = LLAMA | {"tie_word_embeddings": True}
    path = save(tmp_path / "model.safetensors", tensors_of(LLAMA), tied)
    model = model_from_checkpoint(path, "name")
    assert model.parameter_count == model_from_config(tied, "name", "source").parameter_count
    assert "not parameters of this model: 'lm_head.weight'" in model.source


def test_a_bare_gpt2_checkpoint_with_masks_is_known(tmp_path: Path) -> None:
    """As on the hub: no `transformer.` in front, and the causal masks stored with each layer."""
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors_of(GPT2).items()}
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 16, 16) for i in range(3)}
    masks |= {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(3)}
    model = model_from_checkpoint(save(tmp_path / "model.safetensors", tensors | masks, GPT2), "name")
    assert model.blocks == model_from_config(GPT2, "name", "source").blocks
    assert len(model.dtypes) == len(tensors)


def test_an_old_bert_checkpoint_is_known(tmp_path: Path) -> None:
    """As on the hub: gamma and beta for the norms, the next-sentence head, the pooler, ids as integers."""
    tensors = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in tensors_of(BERT).items()
    }
    others = {
        "cls.seq_relationship.weight": torch.zeros(2, 32),
        "bert.pooler.dense.weight": torch.zeros(32, 32),
        "bert.embeddings.position_ids": torch.arange(16)[None],
    }
    model = model_from_checkpoint(save(tmp_path / "model.safetensors", tensors | others, BERT), "name")
    assert model.blocks == model_from_config(BERT, "name", "source").blocks
    assert "not parameters of this model: 'bert.pooler.dense.weight', 'cls.seq_relationship.weight'" in model.source


def test_a_new_head_need_not_be_stored(tmp_path: Path) -> None:
    """A classifier on a pretrained encoder: pooler and classifier are made when training starts."""
    classifier = BERT | {"architectures": ["BertForSequenceClassification"]}
    path = save(tmp_path / "model.safetensors", tensors_of(BERT), classifier)
    model = model_from_checkpoint(path, "name")
    assert model.blocks == model_from_config(classifier, "name", "source").blocks
    assert "classifier.weight" not in model.dtypes


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (
            LLAMA | {"vocab_size": 100},
            "model.embed_tokens.weight is stored as [96, 32], config.json makes it [100, 32]",
        ),
        (LLAMA | {"num_hidden_layers": 13}, "lacks 'model.layers.12.self_attn.q_proj.weight', "),
        (LLAMA | {"num_hidden_layers": 11}, "holds 'model.layers.11.input_layernorm.weight', "),
        (LLAMA | {"attention_bias": True}, "lacks 'model.layers.0.self_attn.q_proj.bias', "),
        (LLAMA | {"hidden_size": 0}, "config.json': hidden_size must be an integer"),
    ],
)
def test_a_config_that_contradicts_the_file_is_refused(tmp_path: Path, config: dict[str, Any], says: str) -> None:
    path = save(tmp_path / "model.safetensors", tensors_of(LLAMA), config)
    assert says in line(model_from_checkpoint, path, "name")


def test_one_shard_is_not_the_model(tmp_path: Path) -> None:
    tensors = dict(list(tensors_of(LLAMA).items())[:20])
    path = save(tmp_path / "model-00001-of-00002.safetensors", tensors, LLAMA)
    assert "of the 111 parameters in config.json" in line(model_from_checkpoint, path, "name")


def test_two_names_of_one_parameter_are_refused(tmp_path: Path) -> None:
    tensors = tensors_of(BERT) | {"bert.embeddings.LayerNorm.gamma": torch.zeros(32)}
    path = save(tmp_path / "model.safetensors", tensors, BERT)
    assert "holds 'bert.embeddings.LayerNorm.weight' twice" in line(model_from_checkpoint, path, "name")


def test_shards_are_read_together(tmp_path: Path) -> None:
    tensors = tensors_of(LLAMA)
    names = list(tensors)
    shards = {"one.safetensors": names[:50], "two.safetensors": names[50:]}
    for shard, held in shards.items():
        save(tmp_path / shard, {name: tensors[name] for name in held})
    index = tmp_path / "model.safetensors.index.json"
    weight_map = {name: shard for shard, held in shards.items() for name in held}
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    model = model_from_checkpoint(index, "name")
    assert model.family is None
    assert model.parameter_count == model_from_config(LLAMA, "name", "source").parameter_count
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert model_from_checkpoint(index, "name").family == "llama"


def test_every_format_of_torch_is_read(tmp_path: Path) -> None:
    """What torch can save is read with torch's name for it."""
    for format_ in FORMATS.values():
        dtype = getattr(torch, format_.name, None)
        if isinstance(dtype, torch.dtype):
            path = save(tmp_path / f"{format_.name}.safetensors", {"a": torch.zeros(2, 3).to(dtype)})
            assert read_header(path)["a"].format is format_
            assert format_.bits == 8 * dtype.itemsize


# --- what is refused ------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "is too short for a safetensors file: 0 bytes"),
        (b"1234567", "is too short for a safetensors file: 7 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "is a Git LFS pointer"),
        (stored({}, length=2**63), "it claims a header of 9223372036854775808 bytes, at most 2 fit"),
        (stored({}, length=3), "it claims a header of 3 bytes, at most 2 fit"),
        (stored(b""), "its header is not a JSON object"),
        (stored(b"[]"), "its header is not a JSON object"),
        (stored(b"{]"), "is not JSON"),
        (stored(b"{\xff}"), "is not UTF-8"),
        (stored(b'{"a":' * 100_000), "is nested too deeply"),
        (stored(b'{"a": {}, "a": {}}'), "key 'a' is given twice"),
        (stored({"__metadata__": {"a": 1}}), "__metadata__ must map names to strings"),
        (stored({"__metadata__": []}), "__metadata__ must map names to strings"),
        (stored({"a": None}), "tensor 'a' must be described by an object, got null"),
        (stored({"": entry()}), "tensor '' has no usable name"),
        (stored({"a{i}": entry()}), "tensor 'a{i}' has no usable name"),
        (stored({"a\nb": entry()}), "has no usable name"),
        (stored({"a" * 513: entry()}), "has no usable name"),
        (stored({"a": entry(dtype=None)}), "tensor 'a' needs a dtype, got null"),
        (stored({"a": entry(dtype="BF17")}), "tensor 'a': unknown dtype 'BF17'; known: BF16, BOOL, "),
        (stored({"a": entry(shape=None)}), "shape must be a list"),
        (stored({"a": entry(shape=[-1, 3])}), "shape must be a list"),
        (stored({"a": entry(shape=[2.0, 3])}), "shape must be a list"),
        (stored({"a": entry(shape=[True, 6])}), "shape must be a list"),
        (stored({"a": entry(shape=[1] * 65)}), "shape must be a list"),
        (stored({"a": entry(shape=[2**62, 2**62, 0], offsets=[0, 0])}), "more than 2**63 elements"),
        (stored({"a": entry(offsets=[0])}, bytes(24)), "needs data_offsets [begin, end], got a list of 1"),
        (stored({"a": entry(offsets=[-24, 0])}, bytes(24)), "needs data_offsets"),
        (stored({"a": entry(offsets=[24, 0])}, bytes(24)), "but its data_offsets span -24"),
        (
            stored({"a": entry(offsets=[0, 23])}, bytes(23)),
            "takes 24 bytes as F32 [2, 3], but its data_offsets span 23",
        ),
        (stored({"a": entry("F4", [3], [0, 2])}, bytes(2)), "takes 2 bytes as F4 [3]"),
        (stored({"a": entry()}, bytes(23)), "is truncated: its tensors take 24 bytes of data, it holds 23"),
        (stored({"a": entry()}, bytes(25)), "is corrupt: its tensors take 24 bytes of data, it holds 25"),
        (stored({"a": entry(offsets=[8, 32])}, bytes(32)), "leaves 8 bytes unused before it"),
        (stored({"a": entry(), "b": entry(offsets=[20, 44])}, bytes(44)), "the data of tensor 'b' overlaps"),
        (stored({"a": entry(), "b": entry()}, bytes(24)), "the data of tensor 'b' overlaps"),
        (stored({}), "holds no parameters"),
        (stored({"rotary_emb.inv_freq": entry()}, bytes(24)), "holds no parameters"),
        (stored({"a": entry("I32")}, bytes(24)), "tensor 'a' is stored as int32, which is not a format to train in"),
    ],
    ids=range(39),
)
def test_a_file_that_is_no_safetensors_is_refused(tmp_path: Path, data: bytes, says: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    message = line(model_from_checkpoint, path, "name")
    assert "model.safetensors'" in message
    assert says in message


def test_only_the_header_is_read(tmp_path: Path) -> None:
    """A tensor of 1 TiB in a sparse file: what is read is 100 bytes."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(stored({"a": entry("F32", [2**19, 2**19], [0, 2**40])}))
    os.truncate(path, path.stat().st_size + 2**40)
    start = time.perf_counter()
    assert model_from_checkpoint(path, "name").parameter_count == 2**38
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    ("weight_map", "says"),
    [
        (None, "needs a weight_map of tensor names to file names, got null"),
        ([], "needs a weight_map"),
        ({}, "needs a weight_map"),
        ({"a": 1}, "names the shard '1'"),
        ({"a": "../secret.safetensors"}, "a shard is a .safetensors file beside the index"),
        ({"a": "/etc/secret.safetensors"}, "a shard is a .safetensors file beside the index"),
        ({"a": "sub/x.safetensors"}, "a shard is a .safetensors file beside the index"),
        ({"a": "..\\x.safetensors"}, "a shard is a .safetensors file beside the index"),
        ({"a": "C:x.safetensors"}, "a shard is a .safetensors file beside the index"),
        ({"a": "x\0.safetensors"}, "a shard is a .safetensors file beside the index"),
        ({"a": "x.bin"}, "a shard is a .safetensors file beside the index"),
        ({"a": ""}, "a shard is a .safetensors file beside the index"),
        ({"a": "absent.safetensors"}, "there is no file"),
        ({"a": "one.safetensors"}, "lists tensor 'b' nowhere, but it is in 'one.safetensors'"),
        ({"a": "one.safetensors", "b": "two.safetensors"}, "lists tensor 'b' 'two.safetensors', but it is in 'one"),
        ({"a": "one.safetensors", "b": "one.safetensors", "c": "one.safetensors"}, "lists tensor 'c' in"),
    ],
)
def test_an_index_that_does_not_hold_is_refused(tmp_path: Path, weight_map: Any, says: str) -> None:
    header = {"a": entry(), "b": entry(offsets=[24, 48])}
    (tmp_path / "one.safetensors").write_bytes(stored(header, bytes(48)))
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert says in line(model_from_checkpoint, index, "name")


# --- anything -----------------------------------------------------------------

NAMES = st.sampled_from(["a", "h.0.w", "h.1.w", "h.2.attn.weight", "h.0.attn.bias", "lm_head.weight"])


@st.composite
def tensors_files(draw: st.DrawFn) -> bytes:
    """A valid file, or one with a single thing wrong."""
    header: dict[str, Any] = {}
    at = 0
    for name in draw(st.lists(NAMES, max_size=5, unique=True)):
        dtype = draw(st.sampled_from(["F32", "BF16", "F8_E4M3", "I64", "F4"]))
        shape = [*draw(st.lists(st.sampled_from([0, 1, 2, 6]), max_size=3)), 2]
        size = prod(shape) * FORMATS[dtype].bits // 8
        header[name] = entry(dtype, shape, [at, at + size])
        at += size
    fault = draw(st.sampled_from(["none", "none", "none", "entry", "key", "name", "length", "size"]))
    tensor = draw(st.sampled_from([*header, "new"]))
    if fault == "entry":
        header[tensor] = draw(JSON)
    elif fault == "key" and tensor in header:
        header[tensor][draw(st.sampled_from(["dtype", "shape", "data_offsets"]))] = draw(JSON)
    elif fault == "name":
        header[draw(TEXT | st.just("__metadata__"))] = header.pop(tensor, {})
    data = stored(header, bytes(at), draw(st.integers(0, 2**64 - 1)) if fault == "length" else None)
    return data[: draw(st.integers(0, len(data)))] if fault == "size" else data


@settings(QUICK, max_examples=300)
@given(tensors_files() | st.binary(max_size=64))
def test_any_bytes_as_safetensors_are_valid_or_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    """And what is accepted, the reference reader accepts, with the same shapes."""
    path = tmp_path_factory.mktemp("any", numbered=True) / "x.safetensors"
    path.write_bytes(data)
    valid_or_one_line(model_from_checkpoint, path, "name")
    try:
        header = read_header(path)
    except InputError:
        return
    real = dict(safetensors.deserialize(data))
    assert {name: list(tensor.shape) for name, tensor in header.items()} == {name: real[name]["shape"] for name in real}


PARTS = st.sampled_from(["h", "0", "1", "2", "10", "w", "weight", "bias", "attn", "007", "٣"])


@QUICK
@given(st.dictionaries(st.lists(PARTS, min_size=1, max_size=4).map(".".join), st.sampled_from([(), (2,), (2, 3)])))
def test_folding_changes_no_row(shapes: dict[str, tuple[int, ...]]) -> None:
    rows = guess_rows(shapes)
    assert [row for block in fold(rows) for row in block.expand()] == rows
    assert [row.name for row in rows] == sorted(shapes, key=natural_key)
