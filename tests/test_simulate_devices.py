"""What a program of one's own says of devices, and what it is told, while it is simulated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from galore_mem.errors import InputError
from galore_mem.setup import Setup
from galore_mem.simulate import simulate
from galore_mem.simulate.result import Simulation
from galore_mem.simulate.subjects.load import UserStep

CUDA, CPU = Setup(), Setup(device="cpu")
KIB = 2**10


def run(program: Callable[[], Any], setup: Setup = CUDA) -> Simulation:
    return simulate(UserStep("own:program", program), setup=setup, keep_run=True).estimates[0]


def sizes(made: Simulation) -> list[int]:
    """Bytes of each tensor that comes to the device, in order; kernels' own buffers are left out."""
    assert made.run is not None
    trace = made.run.trace
    return [trace.allocations[e].nbytes for e in trace.events if e >= 0 and not trace.allocations[e].kernel]


# Each puts one tensor of 1 KiB on the card and nothing else.
ONCE: dict[str, Callable[[], Tensor]] = {
    "factory": lambda: torch.randn(256, device="cuda"),
    "index": lambda: torch.zeros(256, device="cuda:0"),
    "number": lambda: torch.zeros(256).to(0),
    "cuda": lambda: torch.randn(256).cuda(),
    "to": lambda: torch.randn(256).to("cuda"),
    "to and format": lambda: torch.zeros(256, dtype=torch.float64).to("cuda", torch.float32),
    "to keywords": lambda: torch.ones(256).to(device=torch.device("cuda"), dtype=torch.float32, non_blocking=True),
    "pinned": lambda: torch.randn(256).pin_memory().to("cuda", non_blocking=True),
    "numpy": lambda: torch.from_numpy(np.zeros(256, np.float32)).cuda(),
    "tensor": lambda: torch.tensor([1.0] * 256, device="cuda"),
    "as_tensor": lambda: torch.as_tensor(np.zeros(256, np.float32), device="cuda"),
    "large": lambda: torch.randn(2**24)[:256].cuda(),  # of 64 MiB without values in host memory
    "like": lambda: torch.zeros_like(torch.empty(256), device="cuda"),
    "twice": lambda: torch.randn(256).cuda().to("cuda:0"),
    "parameter": lambda: nn.Linear(16, 16, bias=False).cuda().weight,
    "context": lambda: _within(torch.device("cuda")),
    "inference": lambda: _within(torch.inference_mode()).cuda(),
    "generator": lambda: torch.randn(256, generator=torch.Generator("cuda").manual_seed(0), device="cuda"),
}


def _within(context: Any) -> Tensor:
    with context:
        return torch.zeros(256)


@pytest.mark.parametrize("name", ONCE)
def test_what_comes_to_the_card(name: str) -> None:
    def program() -> None:
        t = ONCE[name]()
        assert (t.device, t.is_cuda, t.is_cpu) == (torch.device("cuda", 0), True, False)

    assert sizes(run(program)) == [KIB]


def test_what_stays_in_host_memory() -> None:
    """A data set of 400 MB, random orders, what comes back: none is counted. A batch of 8 rows is."""

    def program() -> None:
        data = torch.randn(100_000, 1000)
        labels = torch.zeros(100_000, dtype=torch.long)
        dataset = torch.utils.data.TensorDataset(data, labels)
        loader = torch.utils.data.DataLoader(dataset, batch_size=8, shuffle=True, num_workers=2, pin_memory=True)
        rows, _ = next(iter(loader))
        assert rows.device.type == data.device.type == "cpu"
        moved = rows.to("cuda")
        back = moved.cpu()
        assert (back.device.type, back.is_cuda, data.mean(0).device.type) == ("cpu", False, "cpu")

    assert sizes(run(program)) == [8 * 1000 * 4]


def test_a_default_device_is_the_programs_own() -> None:
    def program() -> None:
        torch.set_default_device("cuda")
        torch.set_default_dtype(torch.float16)
        assert torch.zeros(512).device.type == "cuda"

    assert sizes(run(program)) == [KIB]
    assert (torch.zeros(1).device.type, torch.get_default_dtype()) == ("cpu", torch.float32)


def test_the_card_answers() -> None:
    """A weight of 256 x 256 in float32 is 256 KiB; a KiB beside it; both are gone after."""
    said: list[Any] = []

    def program() -> None:
        cuda = torch.cuda
        assert cuda.is_available()
        layer = nn.Linear(256, 256, bias=False).cuda()
        said.append(cuda.memory_allocated())
        start, end = (cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        more = torch.zeros(256, device="cuda")
        del more
        end.record()
        cuda.synchronize()
        said.extend(
            (cuda.memory_allocated(), cuda.max_memory_allocated(), cuda.memory_stats()["allocated_bytes.all.peak"])
        )
        cuda.reset_peak_memory_stats()
        said.append(cuda.max_memory_allocated())
        cuda.manual_seed_all(0)
        with cuda.stream(cuda.Stream()), cuda.nvtx.range("named"):
            assert start.elapsed_time(end) > 0
        assert cuda.get_device_properties(0).total_memory >= cuda.mem_get_info()[0]
        assert (cuda.device_count(), cuda.current_device()) == (1, 0)
        del layer
        cuda.empty_cache()

    made = run(program)
    weight = 256 * KIB
    assert said == [weight, weight, weight + KIB, weight + KIB, weight]
    assert made.run is not None
    assert made.run.reserved is not None
    assert made.run.trace.emptied == [len(made.run.trace.events)]
    assert not torch.cuda.is_available()


def test_values_that_a_program_takes_out() -> None:
    def program() -> None:
        loss = nn.Linear(8, 1).cuda()(torch.randn(4, 8, device="cuda")).mean()
        assert (loss.item(), float(loss), f"{loss:.3f}", str(loss)) == (1.0, 1.0, "1.000", "tensor(1.0)")
        assert loss.detach().cpu().numpy() == 1
        assert torch.arange(3, device="cuda").tolist() == [0, 1, 2]
        assert bool(loss)

    made = run(program)
    assert any("nothing has values here: 1.0 was taken" in one for one in made.assumptions)


FINITE: dict[str, Callable[[Tensor], Any]] = {
    "isnan": lambda t: torch.isnan(t).any(),
    "isinf": lambda t: torch.isinf(t).any().item(),
    "sum": lambda t: torch.isnan(t).sum() > 0,
    "either": lambda t: (torch.isnan(t) | torch.isinf(t)).any(),
    "itself": lambda t: (t != t).any(),
    "one": lambda t: torch.isnan(t.sum()),
    "isfinite": lambda t: not torch.isfinite(t).all(),
    "none": lambda t: not (~torch.isnan(t)).all(),
}


@pytest.mark.parametrize("name", FINITE)
@pytest.mark.parametrize("elements", [16, 2**23])  # (of more than 2**22 no values are worked out)
def test_nothing_is_nan(name: str, elements: int) -> None:
    def program() -> None:
        assert not FINITE[name](torch.randn(elements, device="cuda"))

    run(program)


def test_a_scaled_step_is_taken() -> None:
    """GradScaler's own tensors are scalars; found_inf is nothing, so the optimizer steps: momentum of 64 x 64."""

    def program() -> None:
        model = nn.Linear(64, 64, bias=False).cuda()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        scaler = torch.cuda.amp.GradScaler()
        with torch.autocast("cuda", torch.float16):
            loss = model(torch.randn(4, 64, device="cuda")).float().mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        assert optimizer.state[model.weight]["momentum_buffer"].shape == (64, 64)

    assert run(program).optimizer_state_bytes == 64 * 64 * 4


def test_a_program_that_looks_for_a_card_runs_on_either_device() -> None:
    """The same tensors: 16 x 16 weights, a batch of 4 x 16, their product and its mean, then the gradients of these:
    the mean's, the product's (a view of a scalar, divided: a copy), the weights'."""

    def program() -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = nn.Linear(16, 16, bias=False).to(device)
        model(torch.randn(4, 16, device=device)).mean().backward()

    on_card, on_cpu = (run(program, setup) for setup in (CUDA, CPU))
    assert sizes(on_card) == [1024, 256, 256, 4, 4, 256, 1024]
    assert sizes(on_cpu)[:1] == [1024]
    assert sorted(set(sizes(on_cpu))) == sorted(set(sizes(on_card)))


@pytest.mark.parametrize(
    ("backends", "kernel"),
    [
        ([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH], "flash"),
        ([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH], "efficient"),
        ([SDPBackend.MATH], "math"),
    ],
)
def test_an_attention_that_the_program_chooses(backends: list[SDPBackend], kernel: str) -> None:
    def program() -> None:
        q = torch.randn(2, 4, 64, 64, device="cuda", dtype=torch.float16)
        with sdpa_kernel(backends):
            nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)

    found = [one for one in run(program).assumptions if one.startswith("attention kernel")]
    if kernel == "math":  # (which is other operations: its probabilities in float32 are 2 x 4 x 64 x 64)
        assert not found
        assert 2 * 4 * 64 * 64 * 4 in sizes(run(program))
    else:
        assert found == [f"attention kernel {kernel}"]


def test_no_card_on_the_cpu() -> None:
    with pytest.raises(InputError, match="asks for a CUDA device"):
        run(lambda: torch.zeros(2).cuda(), CPU)
