"""The drift alarm: what torch and transformers save and allocate is what it was when this package learnt it; and the
alarm itself, on transformers and torch changed in the ways in which releases have changed them."""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from drift_lines import Part, parts_of
from drift_record import FOLDER, Record, changes, differences, installed, read, stamps, text_of
from drift_subjects import BATCH, LENGTH, SUBJECTS, Subject, record
from torch import nn

from galore_mem.memory.tensor import ACTIVATIONS
from galore_mem.simulate.trace import Allocation, Mark, Trace

ROOT = Path(__file__).resolve().parent.parent


@cache
def recorded(subject: str) -> Record:
    return read((FOLDER / f"{subject}.txt").read_text(encoding="utf-8"))


def alarm(subject: str, *variants: str) -> str:
    """What the alarm says of some variants now (of all of them: none given)."""
    packages = SUBJECTS[subject].packages
    was = recorded(subject)
    if variants:
        parts = {place: part for place, part in was.parts.items() if place.startswith(variants)}
        was = was._replace(parts=parts)
    now = Record(installed(packages), record(SUBJECTS[subject], lambda one: not variants or one in variants))
    return differences(subject, was, now)


def rows(said: str) -> set[tuple[int, int, str]]:
    """The rows of a message's tables: was, now, what."""
    found = (line.split(maxsplit=2) for line in said.splitlines() if line.startswith("  "))
    return {(int(was), int(now), " ".join(what[0].split())) for was, now, *what in found if what}


@pytest.mark.parametrize("subject", SUBJECTS)
def test_nothing_has_drifted(subject: str) -> None:
    for package in SUBJECTS[subject].packages:
        pytest.importorskip(package)
    said = alarm(subject)
    if said:
        pytest.fail(said, pytrace=False)


def test_every_subject_has_a_record() -> None:
    assert sorted(path.stem for path in FOLDER.iterdir()) == sorted(SUBJECTS)


@pytest.mark.parametrize("subject", SUBJECTS)
def test_records_are_as_they_are_written(subject: str) -> None:
    """What is read and written again is the same text, and no variant is missing in it."""
    assert text_of(recorded(subject)) == (FOLDER / f"{subject}.txt").read_text(encoding="utf-8")
    places = recorded(subject).parts
    assert all(any(place.startswith(f"{variant} ") for place in places) for variant in SUBJECTS[subject].variants)


# -- changed libraries ---------------------------------------------------------------------------------------------
# Shapes: 2 sequences of 24 tokens, width 64, MLP of 96, 4 heads of 16 in 2 groups.


def one_more_copy(self: Any, states: torch.Tensor) -> torch.Tensor:
    """LlamaRMSNorm.forward with a copy of the float32 states, which is saved for the product's derivative."""
    wide = states.to(torch.float32)
    variance = wide.pow(2).mean(-1, keepdim=True)
    out: torch.Tensor = self.weight * (wide.clone() * torch.rsqrt(variance + self.variance_epsilon)).to(states.dtype)
    return out


def test_one_more_copy_in_a_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaRMSNorm.forward", one_more_copy)
    said = alarm("llama", "sdpa pure-bf16")
    found = rows(said)
    for norm in ("input_layernorm", "post_attention_layernorm", "model.norm"):
        assert (0, 1, f"saved {norm} clone float32 2x24x64") in found
    assert said.startswith("llama: what is saved and allocated is not what it was\n")
    assert "sdpa pure-bf16 forward, layer 0; sdpa pure-bf16 forward, layer 1\n" in said
    assert "renew the record: python benchmarks/drift.py llama" in said
    # two norms a layer, each 2 x 24 x 64 numbers of 4 bytes
    (kept,) = {now - was for was, now, what in found if what == "bytes kept" and was > 100_000}
    assert kept == 2 * BATCH * LENGTH * 64 * 4


def test_a_mask_that_appears(monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers 4.57 does: a mask for sdpa, because of which keys and values are repeated for their groups."""
    monkeypatch.setattr("transformers.masking_utils._ignore_causal_mask_sdpa", lambda *args, **kwargs: False)
    found = rows(alarm("llama", "sdpa pure-bf16"))
    assert (0, 1, "temporary model le bool 1x1x24x24") in found
    assert (0, 2, "saved self_attn clone bfloat16 2x2x2x24x16") in found


def test_groups_that_are_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.integrations.sdpa_attention.use_gqa_in_sdpa", lambda *args: False)
    found = rows(alarm("llama", "sdpa pure-bf16"))
    assert (0, 2, "saved self_attn clone bfloat16 2x2x2x24x16") in found
    assert not any("model le bool" in what for _, _, what in found)


def test_a_softmax_in_another_format(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 nothing is copied to float32 before it, and nothing back after it."""
    softmax = torch.nn.functional.softmax
    monkeypatch.setattr("torch.nn.functional.softmax", lambda t, dim, dtype=None: softmax(t, dim))
    found = rows(alarm("llama", "eager pure-bf16"))
    assert {
        (1, 0, "saved self_attn _softmax float32 2x4x24x24"),
        (0, 1, "saved self_attn _softmax bfloat16 2x4x24x24"),
        (1, 0, "temporary self_attn _to_copy float32 2x4x24x24"),
        (1, 0, "saved self_attn _to_copy bfloat16 2x4x24x24"),
    } <= found


def test_a_saved_tensor_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """An MLP whose branches are added instead of multiplied: silu's result and the other branch are not needed."""
    monkeypatch.setattr(
        "transformers.models.llama.modeling_llama.LlamaMLP.forward",
        lambda self, x: self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x)),
    )
    found = rows(alarm("llama", "sdpa fp32"))
    assert {
        (1, 0, "saved mlp.act_fn silu float32 2x24x96"),
        (0, 1, "temporary mlp.act_fn silu float32 2x24x96"),
        (1, 0, "saved mlp.up_proj mm float32 48x96"),
        (0, 1, "temporary mlp.up_proj mm float32 48x96"),
        (1, 0, "saved mlp mul float32 2x24x96"),
        (0, 1, "saved mlp add float32 2x24x96"),
    } <= found


def test_a_derivative_with_one_more_temporary(monkeypatch: pytest.MonkeyPatch) -> None:
    class Silu(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x)
            return nn.functional.silu(x)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return torch.ops.aten.silu_backward(grads[0].clone(), *ctx.saved_tensors)

    monkeypatch.setattr("transformers.activations.SiLUActivation.forward", lambda self, x: Silu.apply(x))  # type: ignore[no-untyped-call]  # torch has no types for it
    said = alarm("llama", "sdpa pure-bf16")
    assert rows(said) >= {(0, 1, "temporary mlp.act_fn clone bfloat16 2x24x96")}
    assert "sdpa pure-bf16 forward" not in said  # which has not changed


def test_an_optimizer_with_one_more_temporary(monkeypatch: pytest.MonkeyPatch) -> None:
    """AdamW that scales all gradients first, into new tensors."""
    adam: Any = sys.modules["torch.optim.adam"]  # torch.optim hides its submodule's name
    original = adam._multi_tensor_adam

    def changed(params: Any, grads: Any, *args: Any, **kwargs: Any) -> None:
        original(params, torch._foreach_mul(grads, 1.0), *args, **kwargs)

    monkeypatch.setattr(adam, "_multi_tensor_adam", changed)
    found = rows(alarm("optimizers", "AdamW foreach fp32"))
    assert {(0, 1, f"temporary - _foreach_mul float32 {shape}") for shape in ("80x48", "80", "16x80", "16")} <= found
    # the four gradients' bytes: 4 x (80 x 48 + 80 + 16 x 80 + 16), as much as is there without them (the square roots)
    assert (20864, 2 * 20864, "bytes more at the highest") in found


def test_an_optimizer_with_one_more_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """amsgrad, the last of the defaults by position, is switched on."""
    init: Any = torch.optim.AdamW.__init__
    monkeypatch.setattr(init, "__defaults__", (*init.__defaults__[:-1], True))
    said = alarm("optimizers", "AdamW loop fp32")
    assert (0, 1, "state - zeros_like float32 80x48 0.weight:max_exp_avg_sq") in rows(said)
    assert said.splitlines()[1] == "AdamW loop fp32 first step"


# -- what is no change ---------------------------------------------------------------------------------------------


def test_another_order_of_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The MLP's branches the other way around: all that they make is saved, so as much is alive."""
    monkeypatch.setattr(
        "transformers.models.llama.modeling_llama.LlamaMLP.forward",
        lambda self, x: self.down_proj(self.up_proj(x) * self.act_fn(self.gate_proj(x))),
    )
    assert alarm("llama", "eager fp32") == ""


NOW = {"torch": "2.13.0", "transformers": "5.23.0"}
PART = Part({"saved     mlp mul float32 2x3": 2, "temporary mlp mm float32 2x3": 1}, 48, 72)
LESS = Part({"saved     mlp mul float32 2x3": 1, "temporary mlp mm float32 2x3": 1}, 24, 48)


@pytest.mark.parametrize(
    ("versions", "hint"),
    [
        (NOW, "the versions are the same: look at this package first"),
        ({**NOW, "transformers": "5.23.1"}, "the minor versions are the same"),
        ({**NOW, "transformers": "5.24.0"}, "another minor version is installed of transformers: look there first"),
        (
            {"torch": "2.14.0", "transformers": "4.57.6"},
            "another minor version is installed of torch and of transformers: look there first",
        ),
    ],
)
def test_versions_are_told_with_differences_alone(versions: dict[str, str], hint: str) -> None:
    was, now = Record(NOW, {"a forward, layer 0": PART}), Record(versions, {"a forward, layer 0": PART})
    assert differences("x", was, now) == ""
    said = differences("x", was, now._replace(parts={"a forward, layer 0": LESS}))
    assert f"- {hint}\n" in said
    shown = ", ".join(f"{name} {number}" for name, number in versions.items())
    assert f"made with torch 2.13.0, transformers 5.23.0; installed are {shown}\n" in said
    assert list(stamps(NOW, versions))[1] == hint


def test_a_change_in_many_parts_is_told_once() -> None:
    places = [f"a forward, layer {i}" for i in range(3)]
    was = Record(NOW, {**dict.fromkeys(places, PART), "b forward, layer 0": LESS})
    now = Record(NOW, {**dict.fromkeys(places, LESS), "b forward, layer 0": LESS, "c forward, layer 0": LESS})
    assert differences("x", was, now).splitlines()[1:10] == [
        "a forward, layer 0; a forward, layer 1; a forward, layer 2",
        "      was       now",
        "        2         1  saved     mlp mul float32 2x3",
        "       48        24  bytes kept",
        "       72        48  bytes more at the highest",
        "c forward, layer 0",
        "      was       now",
        "        0         1  saved     mlp mul float32 2x3",
        "        0         1  temporary mlp mm float32 2x3",
    ]


def test_what_lives_together_is_told_apart() -> None:
    """The same tensors, 8 bytes more of them at once."""
    assert list(changes(PART, Part(PART.lines, 48, 80))) == ["       72        80  bytes more at the highest"]


# -- lines, by hand ------------------------------------------------------------------------------------------------


def test_parts_of_a_trace() -> None:
    """Made before the layers: 0 (16 bytes), which layer 0 frees. In layer 0: 1 and 2 (8 each), of which 1 goes, a
    buffer of a kernel, and 4, a view's base of 40 bytes. In layer 1: 5 (8). Above its start layer 0 has 8, 16, 8 (as 1
    goes), 48, then 32 (as 0 goes): 48 at the highest; 2 and 4 stay, 48 bytes."""
    aten = "aten.{}.default".format
    f32 = {"shape": (2,), "dtype": "float32"}
    made = [
        Allocation(16, aten("embedding"), "model.embed", "forward", shape=(4,), dtype="float32"),
        Allocation(8, aten("mm"), "model.layers.0.mlp", "forward", **f32),  # type: ignore[arg-type]  # the same options of each
        Allocation(8, "aten.mul.Tensor", "model.layers.0", "forward", ACTIVATIONS, **f32),  # type: ignore[arg-type]  # the same options of each
        Allocation(99, aten("mm"), "model.layers.0.mlp", "forward", kernel=True),
        Allocation(40, aten("mm"), "model.layers.0.mlp", "forward", ACTIVATIONS, shape=(2, 2), dtype="bfloat16"),
        Allocation(8, aten("mm"), "model.layers.1.mlp", "forward", ACTIVATIONS, **f32),  # type: ignore[arg-type]  # the same options of each
    ]
    events = [0, 1, 2, ~1, 3, 4, ~3, ~0, 5, ~5]
    trace = Trace(512, made, events, [Mark(0, "forward"), Mark(9, "backward")])
    assert parts_of(trace, "forward") == {
        "outside the layers": Part({"temporary model.embed embedding float32 4": 1}, 0, 16),
        "layer 0": Part(
            {
                "temporary mlp mm float32 2": 1,
                "saved     . mul float32 2": 1,
                "saved     mlp mm bfloat16 2x2 in 40 bytes": 1,
            },
            48,
            48,
        ),
        "layer 1": Part({"saved     mlp mm float32 2": 1}, 8, 8),
    }


# -- the command ---------------------------------------------------------------------------------------------------


def test_the_record_is_renewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    spec = importlib.util.spec_from_file_location("renew_drift", ROOT / "benchmarks" / "drift.py")
    assert spec is not None
    assert spec.loader is not None
    command = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec.loader.exec_module(command)
    now: dict[str, Part] = {"forward, layer 0": PART}
    monkeypatch.setattr(command, "FOLDER", tmp_path)
    monkeypatch.setattr(command, "SUBJECTS", {"x": Subject({"a": lambda: now})})

    def says(*options: str) -> str:
        monkeypatch.setattr(sys, "argv", ["drift.py", *options])
        assert command.main() == 0
        found: str = capsys.readouterr().out
        return found

    assert says() == "x: new\n"
    assert says() == "x: the same\n"
    now["forward, layer 0"] = Part(dict(reversed(PART.lines.items())), 48, 72)
    assert says("--check") == "x: the same but for versions and the order of lines\n"
    now["forward, layer 0"] = LESS
    row = "        2         1  saved     mlp mul float32 2x3\n"
    assert row in says("--check")
    assert row in says()
    assert says() == "x: the same\n"
