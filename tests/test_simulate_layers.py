"""Deep models from shallow ones: the same events, to the byte and to the name, as when every layer is traced."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import pytest
from simulate_models import config, work
from simulate_runs import alike
from torch.optim import SGD

from galore_mem.estimator import Case, budget, given_for
from galore_mem.memory.tensor import ACTIVATIONS, CATEGORIES, GRADIENTS, OPTIMIZER_STATE, TEMPORARIES, WEIGHTS
from galore_mem.methods.registry import method
from galore_mem.setup import Setup, recipe
from galore_mem.simulate.depths import Pattern, cut, pattern
from galore_mem.simulate.layers import WHOLE, from_config, trace_layers
from galore_mem.simulate.repeat import Block, Part, Parts, Unlike, repeated
from galore_mem.simulate.subjects.models import work_of
from galore_mem.simulate.trace import Allocation, Mark, Trace
from galore_mem.spec.resolve import resolve
from galore_mem.verify.builders import builder

# -- real models ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "layers", "method", "implementation", "options", "ran"),
    [
        ("gpt_neox", 10, "adamw", "torch-foreach", {"gradient_checkpointing": True}, (2, 3, 4)),
        # sliding and full attention take turns: two layers at a time
        ("gemma2", 14, "adamw", "torch-foreach", {}, (2, 4, 6)),
        # two dense layers, which are the same at every depth, then experts
        ("deepseek_v3", 13, "adamw", "torch-loop", {"gradient_checkpointing": True}, (3, 4, 5)),
        ("llama", 10, "galore", "galore-mem", {"gradient_accumulation": 2}, (2, 3, 4)),
        ("llama", 10, "galore-mini", "galore-mem", {"layerwise": True}, (2, 3, 4)),
        ("qwen3", 10, "lora", "peft", {"gradient_checkpointing": True}, (2, 3, 4)),
    ],
)
def test_the_same_as_with_every_layer(
    model: str, layers: int, method: str, implementation: str, options: dict[str, Any], ran: tuple[int, ...]
) -> None:
    fmt = "amp-bf16" if method == "lora" else "pure-bf16"
    more = {"first_k_dense_replace": 2} if model == "deepseek_v3" else {}
    run = work(model, method, implementation, fmt, {"num_hidden_layers": layers, **more}, device="cuda", **options)
    row = builder(method, implementation)
    short, full = trace_layers(run, row), trace_layers(run, row, full=True)
    assert (short.layers, full.layers) == (ran, (layers,))
    assert alike(short.trace, full.trace)
    assert short.trace.peaks() == full.trace.peaks()  # every phase, every category
    assert short.measured[:3] == full.measured[:3]
    assert short.assumed == full.assumed


def test_the_result_says_what_ran() -> None:
    run = work("llama", "adamw", "torch-loop", "fp32", {"num_hidden_layers": 10})
    told: list[str] = []
    short = trace_layers(run, builder("adamw", "torch-loop"), told=told.append)
    assert short.notes == ("10 layers, from traces of 2, 3 and 4, which show what a layer adds",)
    phases = ["warm-up", "forward", "backward", "step"]  # of each; the step that makes the state is warming up
    assert list(dict.fromkeys(told)) == [f"{n} of 10 layers, {phase}" for n in (2, 3, 4) for phase in phases]


def test_an_optimizer_of_ones_own() -> None:
    """SGD with momentum keeps as many bytes as there are weights; the method's own builder gives the same trace."""
    setup = Setup(recipe("fp32"), device="cuda", batch_size=2, seq_len=32)
    keys = config("qwen3", num_hidden_layers=10)
    found = from_config(keys, setup, lambda model: SGD(model.parameters(), momentum=0.9, foreach=False))
    assert found.layers == (2, 3, 4)
    assert found.measured.optimizer_state == found.measured.weights
    usual = from_config(keys, setup, "sgd", "torch-loop", {"momentum": 0.9})
    assert found.trace.peaks()["step"] == usual.trace.peaks()["step"]


def test_few_layers_are_all_traced() -> None:
    """9 layers are not more than 2, 3 and 4 together."""
    run = work("llama", "adamw", "torch-loop", "fp32", {"num_hidden_layers": 9})
    found = trace_layers(run, builder("adamw", "torch-loop"))
    assert found.layers == (9,)
    assert found.notes[0].startswith(WHOLE)


@pytest.mark.parametrize("name", ["gpt2", "llama-1b", "bert-large-uncased"])
def test_the_estimate_agrees(name: str) -> None:
    """To the byte, buffers included; the estimate has the loss (a block of 512 bytes) besides, in steps."""
    spec, found = resolve(name), method("galore")
    setup = Setup(recipe("pure-bf16"), batch_size=4, seq_len=256)
    given = given_for(found, {"rank": 128})
    case = Case(spec, setup, found, found.implementation(None), None, given)
    peaks = trace_layers(work_of(spec, setup, "galore", None, given), builder("galore", "galore-mem")).trace.peaks()
    said = {phase.name: phase.allocated_bytes for phase in budget(case).phases}
    for phase, loss in (("loss", 0), ("backward", 0), ("step", 512), ("refresh", 512)):
        assert said[phase] - peaks["forward" if phase == "loss" else phase].total == loss


# -- patterns ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kinds", "expected", "depths"),
    [
        ("a" * 32, Pattern(0, 1, 32, 0), (2, 3, 4)),
        ("ab" * 13, Pattern(0, 2, 13, 0), (1, 2, 3)),
        ("ddd" + "m" * 58, Pattern(3, 1, 58, 0), (1, 2, 3)),
        ("sssssf" * 10 + "ss", Pattern(0, 6, 10, 2), (1, 2, 3)),
        ("a" * 9, None, ()),  # 2 + 3 + 4
        ("sssssf" * 5 + "ssss", None, ()),  # 10 + 16 + 22
        ("abcdefghij", None, ()),
        ("", None, ()),
    ],
)
def test_patterns_of_layers(kinds: str, expected: Pattern | None, depths: tuple[int, ...]) -> None:
    found = pattern(kinds)
    assert found == expected
    if found is not None:
        assert found.depths() == depths


def test_layers_that_are_kept() -> None:
    """Of one, three times (2, 3), then one more: with a period less, what follows moves up."""
    assert Pattern(1, 2, 3, 1).kept(2) == [0, 1, 2, 3, 4, 7]


def test_a_config_is_cut_with_its_lists() -> None:
    keys = {"layers": 4, "layer_types": ["s", "f", "s", "f"], "other": [1, 2], "name": "abcd"}
    assert cut(keys, "layers", [0, 1]) == {"layers": 2, "layer_types": ["s", "f"], "other": [1, 2], "name": "abcd"}


# -- traces, by hand -----------------------------------------------------------------------------------------


class Writer:
    """Writes a trace event by event."""

    def __init__(self) -> None:
        self.trace = Trace()

    def phase(self, name: str) -> None:
        self.trace.marks.append(Mark(len(self.trace.events), name))

    def take(self, nbytes: int, op: str, module: str = "", category: int = TEMPORARIES) -> int:
        phase = self.trace.marks[-1].phase
        self.trace.allocations.append(Allocation(nbytes, op, module, phase, category, shape=(nbytes,)))
        self.trace.events.append(len(self.trace.allocations) - 1)
        return self.trace.events[-1]

    def free(self, *taken: int) -> None:
        self.trace.events += [~one for one in taken]


def stack(depth: int) -> Trace:
    """A training step: weights; a pass in which each layer keeps 30, the first one with 100 besides for a moment; a
    pass back through the layers; and steps over lists of all weights, with a vector of an entry of 4 for each."""
    w = Writer()
    w.phase("load")
    weights = [w.take(10, "weight", f"layers.{i}.w", WEIGHTS) for i in range(depth)]
    w.phase("forward")
    first = w.take(100, "embed")
    kept = []
    for i in range(depth):
        kept.append(w.take(30, "mm", f"layers.{i}", ACTIVATIONS))
        if not i:
            w.free(first)
    w.phase("backward")
    grads = []
    for i in reversed(range(depth)):
        grads.insert(0, w.take(10, "grad", f"layers.{i}", GRADIENTS))
        w.free(kept.pop())
    w.phase("step")
    flags = w.take(4 * depth, "stack")
    squares = [w.take(10, "foreach_mul") for _ in weights]
    roots = [w.take(10, "foreach_sqrt") for _ in weights]
    w.free(*squares, *roots, flags, *grads)
    return w.trace


@pytest.mark.parametrize("depth", [2, 4, 5, 9])
def test_a_trace_of_any_depth(depth: int) -> None:
    made = repeated([stack(2), stack(3), stack(4)], depth - 2)
    assert alike(made, stack(depth))


def test_the_highest_moment_may_be_another() -> None:
    """In `forward` 10 a layer of weights, and 130 with the first layer (100 + 30) or 30 a layer at the end: of 4 layers
    40 + 130 = 170 at the beginning and 160 at the end; of 9 layers, 220 and 90 + 270 = 360."""
    assert repeated([stack(2), stack(3), stack(4)], 2).peaks()["forward"].total == 170
    peak = repeated([stack(2), stack(3), stack(4)], 7).peaks()["forward"]
    assert (peak.live[WEIGHTS], peak.live[ACTIVATIONS], peak.total) == (90, 270, 360)


def drawn(seed: int, depth: int) -> Trace:
    """A program of so many layers that are alike: what each takes, and when it is given back, is drawn."""
    draw = Random(seed)
    taken = [(draw.choice((8, 8, 16, 24)), draw.choice(["soon", "back", "end"])) for _ in range(draw.randint(1, 6))]
    twice, first = draw.random() < 0.5, draw.choice((0, 40))
    w = Writer()
    for phase in ("a", "b")[: 1 + twice]:
        w.phase(f"forward {phase}")
        kept: list[list[int]] = []
        rest: list[int] = []
        passing: list[int] = [w.take(first, "start")] if first else []
        for i in range(depth):
            here = {"soon": [], "back": [], "end": []}  # type: dict[str, list[int]]
            for nbytes, when in taken:
                here[when].append(w.take(nbytes, "op", f"layers.{i}"))
            w.free(*passing)
            passing = here["soon"]
            kept.append(here["back"])
            rest += here["end"]
        w.phase(f"backward {phase}")
        w.free(*passing)
        for layer in reversed(kept):
            grad = w.take(12, "grad")
            w.free(*layer, grad)
        w.phase(f"end {phase}")
        lists = [w.take(20, "list") for _ in range(depth * len(taken) + 2)]
        w.free(*rest, *reversed(lists))
    return w.trace


@pytest.mark.parametrize("seed", range(40))
def test_drawn_programs(seed: int) -> None:
    shallow = [drawn(seed, n) for n in (3, 4, 5)]
    assert alike(repeated(shallow, 6), drawn(seed, 9))


def widened(depth: int) -> Trace:
    """The k-th layer keeps k times 10."""
    w = Writer()
    w.phase("forward")
    for i in range(depth):
        w.take(10 * (i + 1), "mm", f"layers.{i}", ACTIVATIONS)
    return w.trace


def paired(depth: int) -> Trace:
    """Every layer keeps a tensor for each other layer: 1, 4, 9 ... in all."""
    w = Writer()
    w.phase("forward")
    for _ in range(depth * depth):
        w.take(10, "mm")
    return w.trace


def misnamed(depth: int) -> Trace:
    w = Writer()
    w.phase("forward" if depth < 4 else "backward")
    w.take(10, "mm")
    return w.trace


def freed_in_the_middle(depth: int) -> Trace:
    """The tensor of the middle layer goes first."""
    w = Writer()
    w.phase("forward")
    kept = [w.take(10, "mm", f"layers.{i}") for i in range(depth)]
    w.free(kept.pop(depth // 2), *kept)
    return w.trace


@pytest.mark.parametrize("program", [paired, misnamed, freed_in_the_middle])
def test_what_does_not_repeat_is_refused(program: Callable[[int], Trace]) -> None:
    with pytest.raises(Unlike):
        repeated([program(n) for n in (2, 3, 4)], 5)


def test_sizes_that_grow_evenly_are_followed() -> None:
    assert alike(repeated([widened(n) for n in (2, 3, 4)], 5), widened(7))


def test_blocks() -> None:
    """x a b y, with 'a b' once and twice more."""

    def part(text: str) -> Part:
        return Part("", [ord(c) for c in text], list(range(len(text))))

    assert Parts([part("xaby"), part("xababy"), part("xabababy")]).blocks() == [Block(3, 2)]
    assert Parts([part("xy"), part("xy"), part("xy")]).blocks() == []
    with pytest.raises(Unlike):
        Parts([part("xaby"), part("xabaxy"), part("xabababy")]).blocks()


def test_categories_have_their_names() -> None:
    assert [CATEGORIES[i] for i in (WEIGHTS, GRADIENTS, OPTIMIZER_STATE, ACTIVATIONS, TEMPORARIES)] == list(CATEGORIES)
