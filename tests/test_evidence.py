"""What stands behind a prediction, from rows by hand; and that the package's own rows are usable."""

from __future__ import annotations

from dataclasses import replace

import pytest

import galore_mem
from galore_mem import evidence
from galore_mem.evidence import (
    APART,
    ASSUMED,
    CPU,
    FORMULA,
    GPU,
    Asked,
    Compared,
    Confidence,
    Reserve,
    confidence,
    weighed,
)
from galore_mem.gpus import gpu
from galore_mem.setup import Setup, recipe
from galore_mem.units import GIB, MIB
from galore_mem.verdict import between, fit

# on a card: llama with LoRA off by up to 0.3 %, qwen2 with LoRA by 1 %, llama with AdamW by 0.1 %; here: llama with
# GaLore by 0.2 %, bert with AdamW by 2 %
ROWS = (
    Compared("Card", "llama", "lora", "peft", 8, -0.003, 0.001),
    Compared("Card", "qwen2", "lora", "peft", 2, -0.01, 0.0),
    Compared("Card", "llama", "adamw", "torch-foreach", 1, 0.0, 0.001),
    Compared(CPU, "llama", "galore", "galore-mem", 5, -0.002, 0.0),
    Compared(CPU, "bert", "adamw", "torch-foreach", 3, -0.02, 0.0),
)

USUAL = 0.004  # what 95 of 100 runs on cards stay within


@pytest.mark.parametrize(
    ("device", "family", "method", "implementation", "expected"),
    [
        # measured there: its own largest error
        ("cuda", "qwen2", "lora", "peft", (GPU, 0.01)),
        # its own is 0.1 %, and 95 of 100 runs on cards were within 0.4 %
        ("cuda", "llama", "adamw", "torch-foreach", (GPU, 0.004)),
        # measured here with 0.2 %: on a card, what the worst on any card was
        ("cuda", "llama", "galore", "galore-mem", (CPU, 0.01)),
        ("cuda", "bert", "adamw", "torch-foreach", (CPU, 0.02)),
        # on the CPU its own, whatever cards showed
        ("cpu", "llama", "galore", "galore-mem", (CPU, 0.002)),
        # a family and a method that were measured with others: the worst of these, and of cards
        ("cuda", "qwen2", "galore", "galore-mem", (APART, 0.01)),
        ("cuda", "bert", "galore", "galore-mem", (APART, 0.02)),
        # nothing
        ("cuda", "mistral", "galore", "galore-mem", (FORMULA, ASSUMED)),
        ("cuda", "llama", "galore", "galore-torch", (FORMULA, ASSUMED)),
        ("cuda", None, "galore", "galore-mem", (FORMULA, ASSUMED)),
    ],
)
def test_classes_and_bands(
    device: str, family: str | None, method: str, implementation: str, expected: tuple[str, float]
) -> None:
    found = weighed(ROWS, USUAL, Asked(device, family, method, implementation))
    assert (found.evidence, found.band) == expected


SEEN = (
    ROWS[0]._replace(ways=("eager",)), ROWS[3]._replace(ways=("eager", "layer-wise")),
    Compared(CPU, "llama", "lora", "peft", 3, -0.001, 0.0, ("layer-wise",)),
)  # fmt: skip


@pytest.mark.parametrize(
    ("method", "ways", "expected"),
    [
        ("lora", ("eager",), (GPU, 0.004)),
        # on no card, but on the CPU with this family and method: what the worst on any card was
        ("lora", ("layer-wise",), (CPU, 0.003)),
        # each somewhere, never together
        ("lora", ("eager", "layer-wise"), (APART, 0.003)),
        ("lora", ("eager", "chunked"), (FORMULA, ASSUMED)),
    ],
)
def test_how_it_trains(method: str, ways: tuple[str, ...], expected: tuple[str, float]) -> None:
    found = weighed(SEEN, USUAL, Asked("cuda", "llama", method, "peft", ways))
    assert (found.evidence, found.band) == expected


def test_what_is_said() -> None:
    assert weighed(ROWS, USUAL, Asked("cuda", "llama", "lora", "peft")).text == (
        "8 measured runs of this family and method on Card, by others"
    )
    assert weighed(ROWS, USUAL, Asked("cuda", "llama", "galore", "galore-mem")).text == (
        "5 measured runs of this family and method on the CPU; the band is the largest error of 11 measured runs of "
        "others on GPUs"
    )
    assert weighed(ROWS, USUAL, Asked("cuda", "mistral", "galore", "galore-mem")).text == (
        "nothing of this family was measured; the band is assumed"
    )
    assert weighed([], USUAL, Asked("cuda", "llama", "galore", "galore-mem")).text == (
        "nothing of this family and this method was measured; the band is assumed"
    )


def test_a_way_of_training_that_was_never_measured() -> None:
    """A chunked loss has its formula and no run."""
    usual = confidence("estimate", Setup(), "llama", "adamw", "torch-foreach")
    chunked = confidence("estimate", Setup(loss="chunked"), "llama", "adamw", "torch-foreach")
    assert usual.evidence in (GPU, CPU)
    assert (chunked.evidence, chunked.band) == (FORMULA, ASSUMED)
    assert chunked.text == "nothing of loss chunked was measured; the band is assumed"
    allocator = confidence("simulate", Setup(), "llama", "lora", "peft", "expandable_segments:True")
    assert allocator.text == "nothing of allocator settings expandable_segments:True was measured; the band is assumed"


def test_what_decides_how_a_model_is_trained() -> None:
    assert evidence.ways(Setup(recipe("fp32"), gradient_accumulation=2)) == (
        "recipe fp32", "attention sdpa", "loss eager", "gradient accumulation",
    )  # fmt: skip
    assert evidence.ways(Setup(gradient_checkpointing=True, layerwise=True, use_cache=True))[3:] == (
        "gradient checkpointing", "a layer-wise update", "keys and values",
    )  # fmt: skip


def test_the_band_in_bytes() -> None:
    """2 % of 1,000 bytes."""
    found = Confidence(CPU, 0.02, "")
    assert (found.low(1000), found.high(1000)) == (980, 1020)
    assert found.to_json(1000)["high_bytes"] == 1020


def test_slack_raises_the_upper_end() -> None:
    """From 1 GiB on 1 % of a peak, below 4 %: more than the band of 2 % only there."""
    found = Confidence(CPU, 0.02, "", slack=((GIB, 0.01), (0, 0.04)))
    assert (found.low(1000), found.high(1000), found.short(1000)) == (980, 1040, "4.0% cpu")
    assert (found.above(GIB), found.short(GIB)) == (0.02, "2.0% cpu")


def test_the_reserve_in_bytes() -> None:
    """100 MiB at 1.05, 1.10 and 1.25 times, in segments of 2 MiB: 106, 110 and 126."""
    found = Reserve(20, 1.05, 1.10, 1.25)
    assert found.bytes(100 * MIB) == (106 * MIB, 110 * MIB, 126 * MIB)
    assert found.text.startswith(
        "in 20 published GPU runs the allocator reserved 1.05 to 1.25 times what was allocated (median 1.10)"
    )


@pytest.mark.parametrize(
    ("low", "high", "verdict"), [(22, 23, "fits"), (22, 24, "tight"), (23, 24, "tight"), (24, 25, "does_not_fit")]
)
def test_between(low: int, high: int, verdict: str) -> None:
    """Of a card of 24 GiB one is taken."""
    assert between(low * GIB, high * GIB, gpu("24GiB"), GIB) == verdict


def test_the_verdict_uses_the_band_and_the_reserve() -> None:
    """LLaMA-1B with AdamW: the smallest card that it fits has room for the context and, in segments, for the usual
    multiple of the peak's upper end; the largest that it does not fit has none for the lower end."""
    (made,) = galore_mem.estimate("llama-1b", ["adamw"]).estimates
    assert made.confidence is not None
    assert made.reserve is not None
    peak, outside = made.peak_allocated_bytes, made.outside_allocator_bytes
    made = replace(made, confidence=Confidence(CPU, 0.01, ""), reserve=Reserve(9, 1.0, 1.1, 1.5))
    high = int(peak * 1.01)
    usual = made.reserve.bytes(high)[1] if made.reserve else 0
    for capacity, verdict in (
        (usual + outside + 2 * MIB, "fits"),
        (int(high * 1.1) + outside - 2 * MIB, "tight"),
        (int(peak * 0.99) + outside + 1, "tight"),
        (int(peak * 0.99) + outside - 1, "does_not_fit"),
    ):
        found = fit(made, gpu(str(capacity) + "B"))
        assert found.verdict == verdict, capacity
        assert found.headroom_bytes == capacity - outside - peak


def test_a_papers_counting_has_no_evidence() -> None:
    (made,) = galore_mem.estimate("llama-1b", ["galore"], convention="paper").estimates
    assert made.confidence is None
    assert made.to_json()["confidence"] is None


def test_the_cpu_reserves_nothing() -> None:
    (made,) = galore_mem.estimate("llama-60m", ["sgd"], setup=Setup(recipe("fp32"), device="cpu")).estimates
    assert made.reserve is None


@pytest.mark.parametrize("predictor", ["estimate", "estimate --reserved", "simulate"])
def test_the_packages_own_rows(predictor: str) -> None:
    rows = evidence.compared(predictor)
    assert all(row.lowest <= row.highest and row.runs > 0 for row in rows)
    assert len({row[:4] for row in rows}) == len(rows)
    # what everyone asks about was measured, on both sides
    assert confidence(predictor, Setup(), "llama", "lora", "peft").evidence == GPU
    assert confidence(predictor, Setup(), "llama", "galore-mini", "galore-mem").evidence == CPU
    # a layer-wise update and accumulation were on the CPU alone
    assert confidence(predictor, Setup(layerwise=True), "llama", "galore-mini", "galore-mem").evidence == CPU
    assert confidence(predictor, Setup(gradient_accumulation=4), "llama", "lora", "peft").evidence != GPU
    for attention in ("sdpa", "eager"):
        found = evidence.reserve(attention)
        assert found is not None
        assert 1 <= found.lowest <= found.median <= found.highest
