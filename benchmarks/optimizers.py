"""How fast is a step of our GaLore, beside galore-torch's, in one run on one machine? And how good is the fast refresh?

    pip install galore-torch==1.0
    python benchmarks/optimizers.py [--layers 1] [--rank 512] [--steps 5] [--output docs/optimizers.md]

The matrices of LLaMA-1B (hidden 2048, intermediate 5461), bfloat16, random gradients. Steps of the optimizers take
turns; the median of the steps counts. A refresh renews every projector once: by exact SVD (both), and by ours
with `svd="randomized"`. The second table shows how near the randomized subspace comes to the exact one of the float32
gradient, for singular values that fall as i^-power (power 0: all equal, where no subspace is better than another).
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from galore_mem.optim import GaLoreAdamW, GaLoreMini
from galore_mem.optim.projection import Randomized, found
from galore_mem.partition import by_row

HIDDEN, INNER = 2048, 5461
LAYER = (("q", HIDDEN, HIDDEN), ("k", HIDDEN, HIDDEN), ("v", HIDDEN, HIDDEN), ("o", HIDDEN, HIDDEN),
         ("gate", INNER, HIDDEN), ("up", INNER, HIDDEN), ("down", HIDDEN, INNER))  # fmt: skip
NEVER = 10**9
Named = list[tuple[str, torch.nn.Parameter]]


def parameters(layers: int) -> Named:
    torch.manual_seed(0)
    made = []
    for i in range(layers):
        for name, rows, cols in LAYER:
            p = torch.nn.Parameter(torch.randn(rows, cols).bfloat16())
            p.grad = torch.randn(rows, cols).bfloat16()
            made.append((f"{i}.{name}", p))
    return made


def reference(named: Named, rank: int) -> torch.optim.Optimizer:
    from galore_torch import GaLoreAdamW as Reference

    group = {"params": [p for _, p in named], "rank": rank, "update_proj_gap": NEVER, "scale": 0.25, "proj_type": "std"}
    made: torch.optim.Optimizer = Reference([group], lr=1e-3, no_deprecation_warning=True)
    return made


def ours(named: Named, rank: int, **options: Any) -> torch.optim.Optimizer:
    return GaLoreAdamW([{"params": named, "rank": rank, "update_proj_gap": NEVER, **options}], lr=1e-3)


def mini(named: Named, rank: int) -> torch.optim.Optimizer:
    partition = {name: by_row(tuple(p.shape)) for name, p in named}
    groups = [{"params": named, "rank": rank, "update_proj_gap": NEVER}]
    return GaLoreMini(groups, lr=1e-3, partition=partition)


Maker = Callable[[Named, int], torch.optim.Optimizer]
MAKERS: dict[str, Maker] = {
    "galore-torch 1.0, exact SVD": reference,
    "galore-mem GaLoreAdamW, exact SVD": ours,
    "galore-mem GaLoreAdamW, randomized": lambda named, rank: ours(named, rank, svd="randomized"),
    "galore-mem GaLoreMini, exact SVD": mini,
}


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def speed(layers: int, rank: int, steps: int) -> Iterator[str]:
    """Rows of the first table. The first step of each optimizer is its refresh: the faster of two counts, as what else
    the machine does can only make it slower."""
    made: dict[str, tuple[torch.optim.Optimizer, float]] = {}
    for turn in range(2):
        for name, make in MAKERS.items():
            print(f"refresh of {name}, {turn + 1} of 2", file=sys.stderr, flush=True)
            optimizer = make(parameters(layers), rank)
            taken = seconds(optimizer.step)
            made[name] = optimizer, min(taken, made[name][1] if name in made else taken)
    times: dict[str, list[float]] = {name: [] for name in made}
    for i in range(steps + 1):
        print(f"step {i} of {steps}", file=sys.stderr, flush=True)
        for name, (optimizer, _) in made.items():
            taken = seconds(optimizer.step)
            if i:  # the first round warms up
                times[name].append(taken)
    base_step, base_refresh = statistics.median(times[next(iter(made))]), made[next(iter(made))][1]
    yield "| optimizer | step without refresh | to galore-torch | step with refresh | to galore-torch |"
    yield "|---|---:|---:|---:|---:|"
    for name, (_, refresh) in made.items():
        step = statistics.median(times[name])
        yield (
            f"| {name} | {step * 1e3:.0f} ms | {step / base_step:.2f} | {refresh:.2f} s | {refresh / base_refresh:.3f}"
            " |"
        )


def decaying(rows: int, cols: int, power: float) -> torch.Tensor:
    """A random matrix whose singular values fall as i^-power."""
    short = min(rows, cols)
    u = torch.linalg.qr(torch.randn(rows, short)).Q
    v = torch.linalg.qr(torch.randn(cols, short)).Q
    return (u * torch.arange(1, short + 1).float().pow(-power)) @ v.T


def errors(rank: int, powers: tuple[float, ...] = (0.0, 0.5, 1.0, 2.0)) -> Iterator[str]:
    """Rows of the second table."""
    yield "| singular values | power iterations | float32: energy | in common | bfloat16: energy | in common |"
    yield "|---|---:|---:|---:|---:|---:|"
    for power in powers:
        torch.manual_seed(0)
        grad = decaying(HIDDEN, HIDDEN, power)
        exact = found(grad, ("left",), rank, None)["left"]
        best = (exact.T @ grad).square().sum()
        for rounds in (0, 1, 2, 3):
            print(f"subspace error, power {power:g}, {rounds} iterations", file=sys.stderr, flush=True)
            cells = []
            for given in (grad, grad.bfloat16()):
                how = Randomized(torch.Generator().manual_seed(1), 10, rounds)
                near = found(given, ("left",), rank, how)["left"].float()
                cells += [(near.T @ grad).square().sum() / best, (near.T @ exact).square().sum() / rank]
            yield f"| i^-{power:g} | {rounds} | " + " | ".join(f"{float(cell):.4f}" for cell in cells) + " |"


def document(layers: int, rank: int, steps: int) -> Iterator[str]:
    yield "# Speed of the optimizers"
    yield ""
    command = f"python benchmarks/optimizers.py --layers {layers} --rank {rank} --steps {steps}"
    yield f"Made by `{command}` (see there for what is measured)."
    yield f"{layers} layer(s) of LLaMA-1B, bfloat16, rank {rank}, {torch.get_num_threads()} CPU threads"
    yield f"({platform.machine()}), torch {torch.__version__}. Times are this machine's; the ratios are the result."
    yield ""
    yield from speed(layers, rank, steps)
    yield ""
    yield f"## The randomized projector beside the exact one: {HIDDEN} x {HIDDEN}, rank {rank}, oversampling 10"
    yield ""
    yield "Energy: ‖PᵀG‖² of the randomized projector divided by the exact one's. In common: the mean squared cosine of"
    yield "the principal angles between the two subspaces. The default is 1 power iteration."
    yield ""
    yield from errors(rank)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--rank", type=int, default=512)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--output", type=Path, help="write the tables there instead of printing them")
    given = parser.parse_args()
    text = "\n".join(document(given.layers, given.rank, given.steps)) + "\n"
    if given.output:
        given.output.write_text(text)
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
