"""The training loops of those who measured, as data, and one program that runs any of them. No torch where imported.

What is alive at a phase's peak is decided by a loop as much as by a model: what it still holds of the last forward
pass, when it clears gradients, whether its batch is made once.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from galore_mem.collector import paused
from galore_mem.setup import LOADS

LOADED, FIRST, FORWARD, BACKWARD, STEP, END = "loaded", "first", "forward", "backward", "step", "end"
STEPS = 3  # that are looked at, after the first
TO_DEVICE, DEVICE_MAP = LOADS


class Loop(NamedTuple):
    """`outputs`: until when what forward returned is held (as `Setup.keep_logits`). `keep_gradients`: they are zeroed
    after the step, and not set to None before the next forward pass. `empties_cache` before each step that is
    measured. `load`: how a model that is not quantized comes to the card. `pins_kernel`: sdpa runs the
    memory-efficient or the flash kernel whatever torch would choose. `encoders_without_head`: BERT and its like are
    AutoModel, and the loss is the mean square of the last hidden state. `use_cache`: the model's default is left, and a
    decoder returns keys and values. `autocast` and `attention` are of rows that do not say."""

    outputs: str
    keep_gradients: bool = False
    empties_cache: bool = False
    load: str = TO_DEVICE
    pins_kernel: bool = False
    encoders_without_head: bool = False
    use_cache: bool = False
    autocast: str = "amp-bf16"
    attention: str = "sdpa"


# by how a row's source begins
LOOPS = {
    # deletes outputs and loss before the step, zeroes gradients after it; labels are the inputs
    "vramcalc": Loop("backward", keep_gradients=True, empties_cache=True, load=DEVICE_MAP, pins_kernel=True),
    # one function for the whole step: its variables live to its end
    "fitcheck-llm": Loop("step", pins_kernel=True),
    # torch says of a T4 that it supports bfloat16 (torch.cuda.is_bf16_supported counts emulation)
    "torch-preflight": Loop("step", encoders_without_head=True, use_cache=True),
    # test/galore/profile_memory_usage.py of torchao: `loss = model(...).loss`
    "pytorch/ao": Loop("none"),
}


class Subject(NamedTuple):
    """What a loop trains: `ids` makes token ids, `inputs` from them the arguments of forward; `context` is the
    autocast region."""

    model: Any
    optimizer: Any
    ids: Callable[[], Any]
    inputs: Callable[[Any], Mapping[str, Any]]
    loss: Callable[[Any], Any]
    context: Callable[[], AbstractContextManager[Any]]


def with_labels(ids: Any) -> Mapping[str, Any]:
    """Labels are the inputs, the same tensor."""
    return {"input_ids": ids, "labels": ids}


def mean_square(outputs: Any) -> Any:
    return outputs.last_hidden_state.float().pow(2).mean()


def run(loop: Loop, subject: Subject, enter: Callable[[str], None]) -> None:
    """The first step, and those that are looked at; `enter` hears where phases begin. Nothing is left to the
    collector."""
    gc.collect()
    with paused():
        enter(FIRST)
        ids = subject.ids()
        _step(loop, subject, ids, lambda phase: None)
        for _ in range(STEPS):
            enter(FORWARD)
            _step(loop, subject, ids, enter)
        enter(END)


def _step(loop: Loop, subject: Subject, ids: Any, enter: Callable[[str], None]) -> None:
    optimizer = subject.optimizer
    if not loop.keep_gradients:
        optimizer.zero_grad(set_to_none=True)
    with subject.context():
        outputs = subject.model(**subject.inputs(ids))
    loss = subject.loss(outputs)
    if loop.outputs == "none":
        del outputs
    enter(BACKWARD)
    loss.backward()
    if loop.outputs == "backward":
        del outputs, loss
    enter(STEP)
    optimizer.step()
    if loop.keep_gradients:
        optimizer.zero_grad(set_to_none=False)


def infer(model: Any, ids: Callable[[], Any], enter: Callable[[str], None]) -> None:
    """Forward passes of the whole batch without gradients; the output, with keys and values, is let go each time.
    (In inference mode a tracer would be shown `linear` and `matmul` whole, not what they are made of.)"""
    import torch

    gc.collect()
    enter(FIRST)
    batch = ids()
    for number in range(1 + STEPS):
        if number:
            enter(FORWARD)
        with torch.no_grad():
            outputs = model(input_ids=batch)
        del outputs
    enter(END)
