"""The twin beside real models: peaks of forward and backward, predicted and measured, as docs/accuracy.md.

    python benchmarks/twin.py > docs/accuracy.md

Runs every case of tests/test_families.py: the real transformers model with random weights on the CPU, measured by the
allocator's own events.
"""

from __future__ import annotations

import datetime
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from test_families import CASES, measured, predicted


def main() -> None:
    rows, errors = [], []
    for i, case in enumerate(CASES):
        print(f"\r{i + 1}/{len(CASES)} {case!s:60}", end="", file=sys.stderr, flush=True)
        for phase, p, m in zip(("forward", "backward"), predicted(case), measured(case), strict=True):
            errors.append((abs(p - m) / m, p - m, f"{case} {phase}"))
            mode = " checkpointing" if case.checkpointing else ""
            size = f"{case.batch_size} x {case.seq_len}"
            model = case.config + (f", LoRA on {', '.join(case.lora)}" if case.lora else "")
            cells = (model, case.attention + mode, size, case.recipe, phase, f"{p:,}", f"{m:,}", f"{p - m:+,}")
            rows.append("| " + " | ".join(cells) + " |")
    print(file=sys.stderr)
    worst = max(errors)
    stack = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    print(
        f"""# Accuracy

Written by `python benchmarks/twin.py` on {datetime.date.today()}: Python {platform.python_version()}, {stack}, CPU.

Each row is a real model with random weights, one training step after a warm-up. *Measured* is the highest number
of bytes that torch's CPU allocator had handed out above the weights, every kernel's own buffers included; *predicted*
is what the twin says with `device="cpu"`. The twin does not follow each scalar, hence differences of a few bytes.

{len(rows)} peaks: median error {median(e[0] for e in errors):.6%}, worst {worst[0]:.6%} ({worst[1]:+,} bytes,
{worst[2]}).

| model | attention | batch | recipe | phase | predicted | measured | difference |
|---|---|---|---|---|---:|---:|---:|"""
    )
    print("\n".join(rows))


if __name__ == "__main__":
    main()
