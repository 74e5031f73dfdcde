"""The CPU kernels' own buffers beside the real ones: every event of a small program, run for real and traced."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from simulate_runs import Phase, events, phases
from torch.nn import functional

from galore_mem.setup import Setup, recipe
from galore_mem.simulate.kernels import lapack
from galore_mem.simulate.session import META, trace
from galore_mem.verify.meters import CpuMeter, _happened

Program = Callable[[Any, torch.device], None]  # of a meter and a device; it enters the phases `here`, `there` and `end`


def real(program: Program) -> list[Phase]:
    gc.collect()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with CpuMeter() as meter, torch.backends.mkldnn.flags(enabled=False):
            program(meter, torch.device("cpu"))
    finally:
        torch.set_num_threads(threads)
    return phases([what for _, what in sorted(_happened(meter._profile), key=lambda one: one[0])])


def compare(program: Program) -> None:
    """The phases `here` and `there`, without the first, in which real tensors are filled."""
    simulated = events(trace(lambda meter: program(meter, META), Setup(recipe("fp32"), device="cpu")).trace)
    recorded = dict(real(program))
    for phase in ("here", "there"):
        assert dict(simulated)[phase] == recorded[phase], phase


def attend(
    queries: int, keys: int, dtype: torch.dtype, groups: int = 1, dropout: float = 0.0, causal: bool = True
) -> Program:
    def program(meter: Any, device: torch.device) -> None:
        meter.enter("before")
        q = torch.zeros(1, 4, queries, 32, dtype=dtype, device=device, requires_grad=True)
        k, v = (torch.zeros(1, 4 // groups, keys, 32, dtype=dtype, device=device, requires_grad=True) for _ in "kv")
        grad = torch.ones(q.shape, dtype=dtype, device=device)
        meter.enter("here")
        out = functional.scaled_dot_product_attention(
            q, k, v, is_causal=causal, dropout_p=dropout, enable_gqa=groups > 1
        )
        meter.enter("there")
        out.backward(grad)
        meter.enter("end")

    return program


# tiles have 32 rows, from 192 queries on 64, from 768 on 256; and 512 columns
@pytest.mark.parametrize("length", [32, 191, 192, 300, 512, 767, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_of_attention(length: int, dtype: torch.dtype) -> None:
    compare(attend(length, length, dtype))


def test_attention_of_groups_and_of_other_keys() -> None:
    compare(attend(200, 200, torch.bfloat16, groups=2))
    compare(attend(40, 600, torch.float16, causal=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_attention_written_out(dtype: torch.dtype) -> None:
    """With dropout the CPU has no fused kernel."""
    compare(attend(64, 64, dtype, groups=2, dropout=0.5))


def test_an_embedding_whose_gradient_is_a_part_of_another() -> None:
    """And whose tokens are expanded: both are copied."""

    def program(meter: Any, device: torch.device) -> None:
        meter.enter("before")
        tokens = torch.zeros(1, 20, dtype=torch.long, device=device).expand(3, 20)
        table, other = torch.zeros(50, 8, device=device, requires_grad=True), torch.zeros(3, 20, 24, device=device)
        grad = torch.ones(3, 20, 32, device=device)
        meter.enter("here")
        out = torch.cat((functional.embedding(tokens, table), other), -1)
        meter.enter("there")
        out.backward(grad)
        meter.enter("end")

    compare(program)


def hand_written(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """A cross-entropy as courses have it: the maximum's derivative scatters, and so does that of picking targets."""
    shifted = logits - logits.max(-1, keepdim=True).values
    picked = shifted.gather(1, targets).squeeze(1)
    return (shifted.exp().sum(-1).log() - picked).mean()


SCATTERED: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "picked": lambda t, where: t.detach().gather(1, where),
    "in place": lambda t, where: t.detach().scatter_(1, where, 1.0),
    "from a tensor": lambda t, where: t.detach().scatter(1, where, t.detach()[:, :1]),
    "added": lambda t, where: t.detach().scatter_add_(1, where, t.detach()[:, :1]),
    "a loss": hand_written,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SCATTERED)
def test_scattering_in_16_bits(name: str, dtype: torch.dtype) -> None:
    """It is done in a float32 copy of what is scattered into. (By hand: 24 x 100 numbers of 4 bytes.)"""

    def program(meter: Any, device: torch.device) -> None:
        meter.enter("before")
        t = torch.zeros(24, 100, dtype=dtype, device=device, requires_grad=True)
        where = torch.zeros(24, 1, dtype=torch.long, device=device)
        meter.enter("here")
        out = SCATTERED[name](t, where)
        meter.enter("there")
        if out.requires_grad:
            out.backward()
        meter.enter("end")

    compare(program)


CONVOLVED: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "of one dimension": ((2, 6, 40), (8, 6, 3), {"padding": 1}),
    "with a kernel of one": ((2, 6, 40), (8, 6, 1), {}),
    "of each channel": ((2, 6, 40), (6, 1, 4), {"groups": 6, "padding": 3}),
    "of one sequence": ((1, 6, 40), (6, 1, 4), {"groups": 6, "padding": 3}),
    "of groups": ((2, 8, 40), (12, 4, 3), {"groups": 2}),
    "of groups, with a kernel of one": ((2, 8, 40), (12, 4, 1), {"groups": 2}),
    "of two dimensions": ((2, 6, 16, 16), (10, 6, 2, 2), {"stride": 2}),
    "of the channels of two dimensions": ((2, 6, 20, 10), (6, 1, 5, 1), {"groups": 6, "padding": (2, 0)}),
}


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("name", CONVOLVED)
def test_convolutions(name: str, swapped: bool) -> None:
    """`swapped`: the channels come last, as language models have them. (With groups no bias, whose gradient comes at
    another place there.)"""
    shape, kernel, options = CONVOLVED[name]
    if swapped and len(shape) > 3:
        pytest.skip("images whose channels come last have kernels of their own")
    call = functional.conv1d if len(shape) == 3 else functional.conv2d

    def program(meter: Any, device: torch.device) -> None:
        meter.enter("before")
        t = torch.zeros(shape, device=device, requires_grad=True)
        if swapped:
            t = torch.zeros(shape[0], *shape[2:], shape[1], device=device, requires_grad=True).movedim(-1, 1)
        weight, bias = (torch.zeros(size, device=device, requires_grad=True) for size in (kernel, kernel[:1]))
        meter.enter("here")
        out = call(t, weight, None if "groups" in options else bias, **options)
        grad = torch.ones(out.shape, device=device)
        meter.enter("there")
        out.backward(grad)
        meter.enter("end")

    compare(program)


DECOMPOSITIONS: dict[str, Callable[[torch.Tensor], Any]] = {
    "qr": torch.linalg.qr,
    "qr of a transposed matrix": lambda t: torch.linalg.qr(t.t()),
    "eigh": lambda t: torch.linalg.eigh(t @ t.t()),
    "svd": lambda t: torch.linalg.svd(t, full_matrices=False),
    "svd of a transposed matrix": lambda t: torch.linalg.svd(t.t(), full_matrices=False),
}


@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (128, 16), (300, 74), (40, 40)])
@pytest.mark.parametrize("name", DECOMPOSITIONS)
def test_decompositions(name: str, shape: tuple[int, int]) -> None:
    """LAPACK's workspaces are asked from the library that torch uses."""
    if not lapack.geqrf(2, 2, torch.float32):
        pytest.skip("this build of torch does not show LAPACK's functions")

    def program(meter: Any, device: torch.device) -> None:
        meter.enter("before")
        t = torch.empty(shape, device=device)
        if not t.is_meta:
            t.normal_(generator=torch.Generator().manual_seed(0))
        meter.enter("here")
        parts = DECOMPOSITIONS[name](t)
        meter.enter("there")
        del parts
        meter.enter("end")

    compare(program)


def test_a_library_that_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then no workspace is counted: Q and R of 8 x 4, and the factors of the reflections."""
    monkeypatch.setattr(lapack, "_function", lambda name, dtype: (None, lapack.FORMATS[torch.float32]))

    def program(meter: Any) -> None:
        t = torch.empty(8, 4, device=META)
        meter.enter("here")
        torch.linalg.qr(t)
        torch.linalg.eigh(t[:4])

    found = trace(program, Setup(recipe("fp32"), device="cpu")).trace
    start = found.marks[0].at
    assert [found.allocations[e].nbytes for e in found.events[start:] if e >= 0] == [128, 64, 16, 64, 16]
