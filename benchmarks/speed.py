"""How fast is `galore-mem estimate`, beside `accelerate estimate-memory`, in one run on one machine?

    python benchmarks/speed.py [--runs 7]

Whole processes, one after the other in turn, median of the runs (the first of each is not counted). accelerate
asks the hub whether the model exists; offline that one call is answered locally, everything else is its own work.
Prints a Markdown table: wall time, CPU time and peak resident memory of each, and the ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

LLAMA_7B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
ACCELERATE = """
import sys
from types import SimpleNamespace
from accelerate.commands import accelerate_cli, estimate
estimate.verify_on_hub = lambda repo, token=None: SimpleNamespace(library_name="transformers", config={})
sys.argv = ["accelerate", "estimate-memory", sys.argv[1], "--library_name", "transformers"]
accelerate_cli.main()
"""


@dataclass(frozen=True)
class Run:
    wall: float
    cpu: float
    peak_mib: float


def measure(command: list[str]) -> Run:
    """One process, from start to end; its own CPU time and peak resident memory."""
    start = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    if os.waitstatus_to_exitcode(status) != 0:
        message = process.stderr.read().decode(errors="replace") if process.stderr else ""
        sys.exit(f"{' '.join(command[:4])} failed:\n{message}")
    unit = 1024 if sys.platform != "darwin" else 1024 * 1024
    return Run(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / unit)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7)
    runs = parser.parse_args().runs
    galore_mem = [str(Path(sys.executable).with_name("galore-mem")), "estimate", "--model"]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(LLAMA_7B))
        commands = {
            "galore-mem estimate, LLaMA-7B, all methods": [*galore_mem, "llama-7b"],
            "galore-mem estimate, LLaMA-60M, all methods": [*galore_mem, "llama-60m"],
            "galore-mem estimate, Llama-3.1-405B, all methods": [*galore_mem, "llama-3.1-405b"],
            "accelerate estimate-memory, LLaMA-7B": [sys.executable, "-c", ACCELERATE, folder],
        }
        measured: dict[str, list[Run]] = {name: [] for name in commands}
        for i in range(runs + 1):
            for name, command in commands.items():
                run = measure(command)
                if i:
                    measured[name].append(run)
    names = list(commands)
    wall = {n: statistics.median(r.wall for r in measured[n]) for n in names}
    print("| whole process | wall s | CPU s | peak RSS MiB |\n|---|---:|---:|---:|")
    for n in names:
        cpu = statistics.median(r.cpu for r in measured[n])
        peak = max(r.peak_mib for r in measured[n])
        print(f"| {n} | {wall[n]:.2f} | {cpu:.2f} | {peak:.0f} |")
    print(f"\naccelerate / galore-mem, LLaMA-7B: {wall[names[3]] / wall[names[0]]:.1f} x")
    print(f"405B / 60M: {wall[names[2]] / wall[names[1]]:.2f} x")


if __name__ == "__main__":
    main()
