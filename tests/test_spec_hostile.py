"""Whatever a config, a file or a model's name is: a valid model or one clear line, never another exception."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from spec_inputs import JSON, QUICK, TEXT, line, valid_or_one_line

from galore_mem.families import FAMILIES, family
from galore_mem.spec.bundled import read_spec_file
from galore_mem.spec.config import model_from_config, read_config
from galore_mem.spec.resolve import resolve

LLAMA = {
    "model_type": "llama", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3,
    "num_attention_heads": 4,
}  # fmt: skip


def config_line(config: Any) -> str:
    return line(model_from_config, config, "name", "config.json")


# --- configs -----------------------------------------------------------------


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_size_that_is_missing_is_named(model_type: str) -> None:
    """A size that transformers would silently fill in is asked for."""
    fields = family(model_type).Config.model_fields
    required = [name for name, field in fields.items() if field.is_required() and name != "model_type"]
    assert {"vocab_size"} < set(required)
    message = config_line({"model_type": model_type})
    assert message.startswith(f"config.json: {required[0]} is missing; ")
    assert message.endswith(f"and {len(required) - 3} more")


def test_a_config_without_hidden_size_is_refused() -> None:
    assert config_line({k: v for k, v in LLAMA.items() if k != "hidden_size"}) == "config.json: hidden_size is missing"


@pytest.mark.parametrize(
    "value", ["4096", 4096.0, True, None, [4096], {"a": 1}, 0, -1, 2**20 + 1, 10**5000], ids=range(10)
)
def test_a_size_that_is_no_size_is_refused(value: Any) -> None:
    message = config_line(LLAMA | {"hidden_size": value})
    assert message.startswith("config.json: hidden_size must be an integer from 1 to 1048576, got ")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_hidden_layers": 10**4 + 1}, "num_hidden_layers must be an integer from 1 to 10000, got 10001"),
        ({"vocab_size": 2**24 + 1}, "vocab_size must be an integer from 1 to 16777216, got 16777217"),
        ({"num_attention_heads": 5}, "hidden_size 32 is not a multiple of num_attention_heads 5"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"head_dim": 8, "num_key_value_heads": 8}, "num_attention_heads 4 is not a multiple of num_key_value_heads 8"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings must be a valid boolean, got 'false'"),
        ({"tie_word_embeddings": None}, "tie_word_embeddings must be a valid boolean, got null"),
        ({"attention_dropout": 1.5}, "attention_dropout must be a number from 0 to 1, got 1.5"),
        ({"attention_dropout": float("nan")}, "attention_dropout must be a number from 0 to 1, got nan"),
        ({"attention_dropout": False}, "attention_dropout must be a number from 0 to 1, got false"),
        ({"hidden_act": "sillu"}, "hidden_act: unknown activation 'sillu'; did you mean silu"),
        ({"hidden_act": "prelu"}, "unknown activation 'prelu'"),
        ({"hidden_act": 1}, "hidden_act must be a valid string, got 1"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "is not supported; set it to LlamaForCausalLM"),
        ({"architectures": "LlamaForCausalLM"}, "architectures must be a valid list, got 'LlamaForCausalLM'"),
        ({"model_type": "lama"}, "unknown model_type 'lama'; known: bert, gpt2, llama, mistral, qwen2, roberta; "),
        ({"model_type": "x\ny\x1b[0m"}, "unknown model_type 'x\\ny\\x1b[0m'"),
        ({"model_type": None}, "model_type must be one of bert, gpt2, llama, mistral, qwen2, roberta; got null"),
        ({"model_type": ["llama"]}, "got a list of 1"),
        ({"model_type": "mistral"}, "num_key_value_heads is missing"),
        ({"model_type": "qwen2"}, "num_key_value_heads is missing"),
    ],
)
def test_what_is_wrong_is_said(change: dict[str, Any], says: str) -> None:
    assert says in config_line(LLAMA | change)


GPT2 = {"model_type": "gpt2", "vocab_size": 96, "n_positions": 16, "n_embd": 32, "n_layer": 3, "n_head": 4}
BERT = LLAMA | {"model_type": "bert", "max_position_embeddings": 16, "type_vocab_size": 2}


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (GPT2 | {"n_head": 5}, "n_embd 32 is not a multiple of n_head 5"),
        (GPT2 | {"add_cross_attention": True}, "add_cross_attention is supported only as false"),
        (GPT2 | {"hidden_size": 64}, "hidden_size and n_embd are two names of one key and must agree"),
        (BERT | {"is_decoder": True}, "is_decoder is supported only as false"),
        (BERT | {"position_embedding_type": "relative_key"}, "position_embedding_type is supported only as 'absolute'"),
        (BERT | {"num_labels": 3, "id2label": {"0": "a"}}, "num_labels 3 contradicts id2label with 1 entries"),
        (BERT | {"architectures": ["BertModel"]}, "set it to BertForMaskedLM or BertForSequenceClassification"),
        (
            LLAMA | {"model_type": "qwen2", "num_key_value_heads": 4, "layer_types": ["full_attention"]},
            "layer_types has 1 entries for num_hidden_layers 3",
        ),
    ],
)
def test_what_is_wrong_in_other_families_is_said(config: dict[str, Any], says: str) -> None:
    assert says in config_line(config)


@pytest.mark.parametrize("config", [None, [], "llama", 3, [("model_type", "llama")]])
def test_a_config_that_is_no_object_is_refused(config: Any) -> None:
    assert "a config must be an object" in config_line(config)


def test_a_config_without_model_type_is_refused() -> None:
    assert config_line({}).endswith(
        "model_type must be one of bert, gpt2, llama, mistral, qwen2, roberta; it is missing"
    )


# --- files -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "is not JSON: Expecting value at line 1 column 1"),
        (b"{", "is not JSON"),
        (b'{"model_type": "llama",}', "is not JSON"),
        (b"\xff\xfe{\x00}\x00", "is not UTF-8 text (byte 0)"),
        (b'"llama"', "must be a JSON object, got 'llama'"),
        (b"[1, 2]", "must be a JSON object, got a list of 2"),
        (b"null", "must be a JSON object, got null"),
        (b'{"hidden_size": NaN}', "NaN is not a JSON number"),
        (b'{"hidden_size": -Infinity}', "-Infinity is not a JSON number"),
        (b'{"hidden_size": 1, "hidden_size": 2}', "key 'hidden_size' is given twice"),
        (b'{"hidden_size": ' + b"9" * 5000 + b"}", "has an integer of thousands of digits"),
        (b"[" * 200_000, "is nested too deeply"),
        (b'{"a":' * 200_000, "is nested too deeply"),
    ],
    ids=range(13),
)
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, data: bytes, says: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(data)
    message = line(read_config, path, "name")
    assert "config.json'" in message
    assert says in message


def test_a_byte_order_mark_is_no_reason_to_refuse(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA), encoding="utf-8-sig")
    assert read_config(path, "name").num_layers == 3


def test_a_huge_file_is_refused_without_reading_it(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(2**40)  # sparse: takes no space on the disk
    start = time.perf_counter()
    assert "is too large: more than 4.00 MiB" in line(read_config, path, "name")
    assert time.perf_counter() - start < 5


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    assert "it is a folder" in line(read_config, tmp_path, "name")
    assert "there is no file" in line(read_config, tmp_path / "absent.json", "name")
    assert "there is no file" in line(read_config, tmp_path / "a" / "b" / "config.json", "name")
    assert "is not a valid path" in line(read_config, Path("a\0b"), "name")
    assert "File name too long" in line(read_config, Path("x" * 5000), "name")


@pytest.mark.skipif(sys.platform == "win32", reason="no pipes or devices in the file system")
def test_pipes_and_devices_are_refused_without_waiting(tmp_path: Path) -> None:
    pipe = tmp_path / "config.json"
    os.mkfifo(pipe)
    for path in (pipe, Path("/dev/zero"), Path("/dev/tty")):
        if path.exists():
            assert "not a regular file" in line(read_config, path, "name")
    assert "not a regular file" in line(resolve, str(pipe))
    assert "not a regular file" in line(resolve, "/dev/zero")


def test_links_in_a_circle_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").symlink_to(tmp_path / "config.json")
    assert "symbolic links" in line(read_config, tmp_path / "config.json", "name")


def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As root every file can be read, so the refusal is played."""

    def refuse(*_: object, **__: object) -> Iterator[None]:
        raise PermissionError(13, "Permission denied")

    path = tmp_path / "config.json"
    path.write_text("{}")
    monkeypatch.setattr(Path, "open", refuse)
    assert line(read_config, path, "name").endswith("config.json': Permission denied")
    monkeypatch.setattr(Path, "stat", refuse)
    assert line(read_config, path, "name").endswith("config.json': Permission denied")
    monkeypatch.undo()
    monkeypatch.setattr(Path, "iterdir", refuse)
    path.unlink()
    assert line(resolve, str(tmp_path)).endswith("Permission denied")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "name is missing; description is missing; config is missing"),
        ('name = "x"\nname = "y"', "is not TOML: Cannot overwrite a value"),
        ("name = ", "is not TOML"),
        ('name = 1\ndescription = ""\n[config]', "name must be a valid string, got 1"),
        ('name = "x"\ndescription = ""\nlayers = 3\n[config]', "'layers' is not a key of it"),
        ('name = "x"\ndescription = ""\nconfig = "x"', "config must be a valid dictionary, got 'x'"),
        ("a = " + "9" * 5000, "is not TOML"),
        ("a = " + "[" * 100_000, "is nested too deeply"),
    ],
    ids=range(8),
)
def test_a_spec_file_that_is_none_is_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "spec.toml"
    path.write_text(text)
    assert says in line(read_spec_file, path)


# --- anything -----------------------------------------------------------------

SIZES = st.sampled_from([1, 2, 3, 4, 8, 12, 64, 2**20, 2**24])
VALID = [LLAMA, *({**LLAMA, "model_type": name, "num_key_value_heads": 2} for name in ("mistral", "qwen2")), GPT2, BERT]
VALID.append(BERT | {"model_type": "roberta"})


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """A valid config with up to two of its family's keys changed or dropped, to a size or to anything."""
    config = dict(draw(st.sampled_from(VALID)))
    keys = st.sampled_from(sorted(family(config["model_type"]).Config.model_fields))
    for key in draw(st.lists(keys, max_size=2)):
        if draw(st.booleans()):
            config[key] = draw(SIZES)
        elif draw(st.booleans()):
            config[key] = draw(st.none() | st.booleans() | JSON)
        else:
            config.pop(key, None)
    return config


@QUICK
@given(configs())
@example({"model_type": "llama", "hidden_size": "\ud800"})
def test_any_config_is_valid_or_refused_in_one_line(config: dict[str, Any]) -> None:
    model = valid_or_one_line(model_from_config, config, "name", "source")
    if model is not None:
        assert model_from_config(model.config, "name", "source") == model


@QUICK
@given(JSON)
def test_any_json_is_valid_or_refused_in_one_line(config: Any) -> None:
    valid_or_one_line(model_from_config, config, "name", "source")


@QUICK
@given(st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_as_a_config_are_refused_in_one_line(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("any", numbered=True) / "config.json"
    path.write_bytes(data)
    valid_or_one_line(read_config, path, "name")


@QUICK
@given(TEXT | st.from_regex(r"[\w./~-]{0,20}", fullmatch=True))
def test_any_model_name_is_refused_in_one_line(name: str) -> None:
    """Also when it happens to be a path: `/` and `..` are folders without a model in them."""
    valid_or_one_line(resolve, name)
